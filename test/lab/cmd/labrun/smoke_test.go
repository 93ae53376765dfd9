//go:build lab

package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const smoke = "./testdata/smoke"

// goTest runs go test with labrun and returns its output and exit status.
func goTest(t *testing.T, labrun string, args ...string) (string, int) {
	t.Helper()
	cmd := exec.Command("go", append([]string{"test", "-count=1", "-exec", labrun, smoke}, args...)...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func TestSmoke(t *testing.T) {
	dir := t.TempDir()
	labrun := filepath.Join(dir, "labrun")
	if out, err := exec.Command("go", "build", "-o", labrun, ".").CombinedOutput(); err != nil {
		t.Fatalf("build labrun: %v: %s", err, out)
	}
	for _, kind := range []string{"uml", "qemu"} {
		exe := labrun + " -kind " + kind + " -totalvfs 5"
		t.Run(kind, func(t *testing.T) {
			profile := filepath.Join(dir, kind+".out")
			out, status := goTest(t, exe, "-v", "-coverprofile="+profile)
			t.Logf("%s", out)
			if status != 0 {
				t.Fatalf("exit status %d", status)
			}
			for _, want := range []string{"--- PASS: TestCards", "--- PASS: TestVFs", "labrun: " + kind + " guest up in"} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in the output", want)
				}
			}
			if content, err := os.ReadFile(profile); err != nil || !bytes.Contains(content, []byte("smoke.go")) {
				t.Errorf("cover profile: %d bytes, %v", len(content), err)
			}

			for _, bad := range []struct {
				what string
				args []string
				want []string
			}{
				{"fail", nil, []string{"failed as asked", "--- FAIL: TestMisbehave"}},
				{"panic", nil, []string{"Kernel panic", "likely cause: the guest's kernel panicked"}},
				{"hang", []string{"-timeout=2s"}, []string{"panic: test timed out after 2s", "TestMisbehave"}},
			} {
				out, status := goTest(t, exe, append([]string{"-run=TestMisbehave", "-what=" + bad.what}, bad.args...)...)
				if status == 0 {
					t.Errorf("%s: exit status 0", bad.what)
				}
				for _, want := range bad.want {
					if !strings.Contains(out, want) {
						t.Errorf("%s: no %q in the output:\n%s", bad.what, want, out)
					}
				}
			}
		})
		t.Run(kind+" killed", func(t *testing.T) {
			binary := filepath.Join(dir, "smoke.test")
			if out, err := exec.Command("go", "test", "-c", "-o", binary, smoke).CombinedOutput(); err != nil {
				t.Fatalf("build the test: %v: %s", err, out)
			}
			state := t.TempDir()
			command := func(what string) (*exec.Cmd, *bytes.Buffer) {
				cmd := exec.Command(labrun, "-kind", kind, "-totalvfs=5", binary, "-test.v", "-test.run=Misbehave", "-what="+what)
				cmd.Dir, cmd.Env = smoke, append(os.Environ(), "XDG_STATE_HOME="+state)
				out := new(bytes.Buffer)
				cmd.Stdout, cmd.Stderr = out, out
				return cmd, out
			}
			hung, _ := command("hang")
			hung.Stdout, hung.Stderr = nil, nil
			pipe, err := hung.StdoutPipe()
			if err == nil {
				err = hung.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			pipe.Read(make([]byte, 1)) // the test has begun
			hung.Process.Signal(syscall.SIGKILL)
			hung.Wait()
			// Its guest ends by itself, and blocks the next one no moment.
			cmd, out := command("")
			if err := cmd.Run(); err != nil {
				t.Errorf("the next run: %v\n%s", err, out)
			}
			for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
				left := withArgument(state)
				if len(left) == 0 {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("processes left: %v", left)
				}
			}
		})
	}
}

// withArgument lists the processes whose command line has the text.
func withArgument(text string) (found []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		if content, err := os.ReadFile(f); err == nil && bytes.Contains(content, []byte(text)) {
			found = append(found, f)
		}
	}
	return found
}
