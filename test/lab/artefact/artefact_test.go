package artefact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// write is a build that writes one file.
func write(content string) func(context.Context, *Build) error {
	return func(_ context.Context, b *Build) error {
		return os.WriteFile(filepath.Join(b.Out, "file"), []byte(content), 0o644)
	}
}

func TestMakeBuildsOnce(t *testing.T) {
	dir := t.TempDir()
	builds := 0
	step := func() *Step {
		base := &Step{Name: "base", Inputs: []Input{Text("v", "1")}, Build: write("base")}
		return &Step{Name: "top", Inputs: []Input{Output(base)}, Build: func(ctx context.Context, b *Build) error {
			builds++
			below, err := os.ReadFile(filepath.Join(b.Dir(base), "file"))
			if err != nil {
				return err
			}
			return write(string(below)+" top")(ctx, b)
		}}
	}
	var first string
	for range 2 { // the second time another process
		out, err := open(t, dir).Make(t.Context(), step())
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(filepath.Join(out, "file")); string(got) != "base top" {
			t.Errorf("output %q, want %q", got, "base top")
		}
		if first != "" && first != out {
			t.Errorf("second output is %s, first %s", out, first)
		}
		first = out
	}
	if builds != 1 {
		t.Errorf("built %d times, want once", builds)
	}
}

// A present output does not need the outputs it was made from.
func TestMakeWithoutInputs(t *testing.T) {
	dir := t.TempDir()
	base := &Step{Name: "base", Build: write("base")}
	top := &Step{Name: "top", Inputs: []Input{Output(base)}, Build: write("top")}
	s := open(t, dir)
	if _, err := s.Make(t.Context(), top); err != nil {
		t.Fatal(err)
	}
	below, _ := s.path(base)
	os.RemoveAll(below)
	if _, err := open(t, dir).Make(t.Context(), top); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(below); !errors.Is(err, os.ErrNotExist) {
		t.Error("built the base again, which nobody needs")
	}
}

func TestKeyCoversInputs(t *testing.T) {
	src := t.TempDir()
	file := filepath.Join(src, "d/f")
	put := func(content string, mode os.FileMode) {
		os.MkdirAll(filepath.Dir(file), 0o755)
		os.Remove(file)
		if err := os.WriteFile(file, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	key := func(inputs ...Input) string {
		k, err := open(t, t.TempDir()).key(&Step{Name: "s", Inputs: inputs})
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	files := func() Input {
		return Files(src, func(rel string) bool { return strings.HasSuffix(rel, ".skip") }, ".")
	}
	put("a", 0o644)
	base := key(files())
	seen := map[string]string{base: "base"}
	differs := func(what, k string) {
		t.Helper()
		if other, ok := seen[k]; ok {
			t.Errorf("%s has the key of %s", what, other)
		}
		seen[k] = what
	}
	put("b", 0o644)
	differs("another content", key(files()))
	put("a", 0o755)
	differs("an executable", key(files()))
	os.Remove(file)
	os.Symlink("a", file)
	differs("a symbolic link", key(files()))
	put("a", 0o644)
	os.Rename(file, file+"2")
	differs("another name", key(files()))
	os.Rename(file+"2", file)
	differs("a text", key(Text("l", "v")))
	differs("another label", key(Text("v", "l")))
	differs("two texts", key(Text("l", "v"), Text("l", "v")))
	differs("a step", key(Output(&Step{Name: "n"})))
	differs("a step of another name", key(Output(&Step{Name: "m"})))
	differs("a step with an input", key(Output(&Step{Name: "n", Inputs: []Input{Text("l", "v")}})))

	os.WriteFile(file+".skip", []byte("x"), 0o644)
	if key(files()) != base {
		t.Error("a skipped file changed the key")
	}
	if _, err := open(t, t.TempDir()).Make(t.Context(), &Step{Name: "s", Inputs: []Input{Files(src, nil, "missing")}}); err == nil {
		t.Error("a missing input file gave no error")
	}
}

func TestFailure(t *testing.T) {
	dir := t.TempDir()
	fail := true
	step := &Step{Name: "shaky", Build: func(ctx context.Context, b *Build) error {
		if fail {
			if err := write("half")(ctx, b); err != nil {
				return err
			}
			return b.Run(ctx, "/bin/sh", "-c", "echo one; echo 'ld: No space left on device' >&2; exit 3")
		}
		return write("whole")(ctx, b)
	}}
	_, err := open(t, dir).Make(t.Context(), step)
	var build *BuildError
	if !errors.As(err, &build) {
		t.Fatalf("got %v, want a BuildError", err)
	}
	for _, want := range []string{"build shaky", "exit status 3", "one\n", "ld: No space left", "the disk is full", build.Log} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q:\n%v", want, err)
		}
	}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() && e.Name() != "log" {
			t.Errorf("the failed build left %s", e.Name())
		}
	}
	fail = false
	out, err := open(t, dir).Make(t.Context(), step)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(filepath.Join(out, "file")); string(got) != "whole" {
		t.Errorf("output %q, want %q", got, "whole")
	}
}

// helper runs this test binary as another process that makes a step slowly.
func helper(t *testing.T, dir, content string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestHelper$")
	cmd.Env = append(os.Environ(), "ARTEFACT_HELPER="+dir+" "+content)
	return cmd
}

func slow(content string) *Step {
	return &Step{Name: "slow", Build: func(ctx context.Context, b *Build) error {
		if err := write(content)(ctx, b); err != nil {
			return err
		}
		return b.Run(ctx, "/bin/sh", "-c", "sleep "+map[bool]string{true: "600", false: "0.3"}[content == "hang"])
	}}
}

func TestHelper(t *testing.T) {
	dir, content, ok := strings.Cut(os.Getenv("ARTEFACT_HELPER"), " ")
	if !ok {
		return
	}
	out, err := open(t, dir).Make(t.Context(), slow(content))
	if err != nil {
		t.Fatal(err)
	}
	got, _ := os.ReadFile(filepath.Join(out, "file"))
	fmt.Printf("made by %s\n", got)
}

func TestProcessesBuildOnce(t *testing.T) {
	dir := t.TempDir()
	outs := make([]bytes.Buffer, 4)
	var cmds []*exec.Cmd
	for i := range outs {
		cmd := helper(t, dir, fmt.Sprintf("process-%d", i))
		cmd.Stdout = &outs[i]
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		cmds = append(cmds, cmd)
	}
	made := map[string]bool{}
	for i, cmd := range cmds {
		if err := cmd.Wait(); err != nil {
			t.Errorf("process %d: %v\n%s", i, err, outs[i].String())
		}
		line, _, _ := strings.Cut(outs[i].String(), "\n")
		made[line] = true
	}
	if len(made) != 1 {
		t.Errorf("the processes see different builds: %v", made)
	}
}

// A build that was killed blocks nobody, and takes what it started with it.
func TestKilledBuild(t *testing.T) {
	dir := t.TempDir()
	cmd := helper(t, dir, "hang")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(dir, "log")
	wait(t, "the build's command", func() bool {
		logs, _ := filepath.Glob(log + "/slow-*.log")
		if len(logs) == 0 {
			return false
		}
		content, _ := os.ReadFile(logs[0])
		return bytes.Contains(content, []byte("sleep 600"))
	})
	var child string
	wait(t, "the sleeping child", func() bool {
		child = childOf(cmd.Process.Pid)
		return child != ""
	})
	cmd.Process.Signal(syscall.SIGKILL)
	cmd.Wait()
	wait(t, "the end of the killed build's command", func() bool {
		_, err := os.Stat("/proc/" + child)
		return err != nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := open(t, dir).Make(ctx, slow("after"))
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(filepath.Join(out, "file")); string(got) != "after" {
		t.Errorf("output %q, want %q", got, "after")
	}
}

func childOf(pid int) string {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, t := range tasks {
		if b, _ := os.ReadFile(t); len(b) > 0 {
			return strings.Fields(string(b))[0]
		}
	}
	return ""
}

func wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err := open(t, t.TempDir()).Make(ctx, slow("hang"))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the context's error", err)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("took %s to give up", took)
	}
}

func TestReady(t *testing.T) {
	there := false
	step := &Step{Name: "program", Ready: func() bool { return there }, Build: func(context.Context, *Build) error { there = true; return nil }}
	dir := t.TempDir()
	for _, absent := range []bool{true, false, true} { // the machine may lose it again
		if absent {
			there = false
		}
		if _, err := open(t, dir).Make(t.Context(), step); err != nil || !there {
			t.Errorf("absent %t: there %t, %v", absent, there, err)
		}
	}
}

func TestPrograms(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	for _, c := range []struct {
		comes   string
		missing []string
	}{
		{"ip", []string{"busybox-static", "nftables", "zstd"}},
		{"nft", []string{"busybox-static", "zstd"}},
		{"zstd", []string{"busybox-static"}},
		{"busybox", nil},
	} {
		if err := os.WriteFile(filepath.Join(dir, c.comes), nil, 0o755); err != nil {
			t.Fatal(err)
		}
		if s := Programs(); !slices.Equal(s.Packages, c.missing) || s.Ready() != (c.missing == nil) {
			t.Errorf("with %s: ready %v, missing %q, want %q", c.comes, s.Ready(), s.Packages, c.missing)
		}
	}
}

func TestCollect(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	age := func(path string, hours int) {
		at := time.Now().Add(-time.Duration(hours) * time.Hour)
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	var outs []string
	for i, hours := range []int{3, 1, 9} {
		out, err := s.Make(t.Context(), &Step{Name: "a-b", Inputs: []Input{Text("i", fmt.Sprint(i))}, Build: write("x")})
		if err != nil {
			t.Fatal(err)
		}
		age(out, hours)
		outs = append(outs, out)
	}
	lonely, err := s.Make(t.Context(), &Step{Name: "lonely", Build: write("x")})
	if err != nil {
		t.Fatal(err)
	}
	age(lonely, 100)
	rest := filepath.Join(dir, ".building-a-b-0123456789ab")
	state := filepath.Join(dir, "qemu-state/0123")
	os.Mkdir(rest, 0o755)
	os.Mkdir(filepath.Dir(state), 0o755)
	os.WriteFile(state, nil, 0o644)
	age(rest, 5)
	age(state, 5)

	removed, err := s.Collect(t.Context(), 4*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{rest, outs[2], state}
	if fmt.Sprint(removed) != fmt.Sprint(want) {
		t.Errorf("removed %v, want %v", removed, want)
	}
	for _, path := range want {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s is still there", path)
		}
	}
	if removed, err := s.Collect(t.Context(), 2*time.Hour); err != nil || len(removed) != 1 || removed[0] != outs[0] {
		t.Errorf("removed %v, %v; want %s: older than the limit, and not the newest", removed, err, outs[0])
	}
}

func TestSources(t *testing.T) {
	const deb822 = `Types: deb deb-src
# a comment
URIs: http://archive.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By:
 -----BEGIN
 .
 -----END

Types: deb
URIs: http://archive.example/security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://third.example/
Suites: nodistro
Components: main

Enabled: no
Types: deb
URIs: http://off.example/
Suites: bookworm
Components: main
`
	const oneLine = `# deb http://old.example/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] http://archive.example/debian bookworm main contrib
deb-src http://archive.example/debian bookworm main
deb http://third.example/ stable main
`
	for _, tt := range []struct {
		name, text, want, backports string
	}{
		{"deb822", deb822,
			"Types: deb deb-src\nURIs: http://archive.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: \n -----BEGIN\n .\n -----END\n\n" +
				"Types: deb\nURIs: http://archive.example/security\nSuites: bookworm-security\nComponents: main\n\n",
			"Types: deb deb-src\nURIs: http://archive.example/debian\nSuites: bookworm-backports\nComponents: main\nSigned-By: \n -----BEGIN\n .\n -----END\n\n"},
		{"one line", stanzas(oneLine),
			"Types: deb\nURIs: http://archive.example/debian\nSuites: bookworm\nComponents: main contrib\nSigned-By: /k.gpg\n\n",
			"Types: deb\nURIs: http://archive.example/debian\nSuites: bookworm-backports\nComponents: main contrib\nSigned-By: /k.gpg\n\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := parseSources(tt.text)
			if got.String() != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if b := got.With("bookworm-backports").String(); b != tt.backports {
				t.Errorf("backports: got %q, want %q", b, tt.backports)
			}
		})
	}
}

func TestCompareVersions(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"6.12.9+deb12", "6.12.100+deb12", -1},
		{"6.12.117", "6.12.117", 0},
		{"a-2", "a-1", 1},
		{"a", "a1", -1},
		{"a01", "a1", 0},
	} {
		if got := compareVersions(tt.a, tt.b); got != tt.want {
			t.Errorf("%s against %s: %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		version := rapid.StringMatching(`[a-b0-2.]{0,6}`)
		a, b, c := version.Draw(t, "a"), version.Draw(t, "b"), version.Draw(t, "c")
		if compareVersions(a, b) != -compareVersions(b, a) {
			t.Error("not antisymmetric")
		}
		if compareVersions(a, b) <= 0 && compareVersions(b, c) <= 0 && compareVersions(a, c) > 0 {
			t.Error("not transitive")
		}
	})
}
