package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func write(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func stat(t *testing.T, path string) os.FileInfo {
	t.Helper()
	st, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestInstallShim(t *testing.T) {
	dir := t.TempDir()
	source, bin := filepath.Join(dir, "src"), filepath.Join(dir, "opt/cni/bin")
	target := filepath.Join(bin, shimName)
	write(t, source, "one", 0o600)
	install := func() os.FileInfo {
		t.Helper()
		if err := installShim(source, bin); err != nil {
			t.Fatal(err)
		}
		if st := stat(t, target); st.Mode() != 0o755 {
			t.Errorf("mode %v", st.Mode())
		}
		if got, want := read(t, target), read(t, source); got != want {
			t.Errorf("content %q, want %q", got, want)
		}
		if is, _ := os.Readlink(filepath.Join(bin, "sluice")); is != shimName {
			t.Errorf("type sluice is %q", is)
		}
		if entries, _ := os.ReadDir(bin); len(entries) != 2 {
			t.Errorf("directory holds %v", entries)
		}
		return stat(t, target)
	}
	first := install()
	if again := install(); !os.SameFile(first, again) {
		t.Error("the same shim was installed again")
	}
	if err := os.Chmod(target, 0o600); err != nil {
		t.Fatal(err)
	}
	install()
	// A crash between writing and renaming leaves this.
	write(t, filepath.Join(bin, ".sluice-cni.sluice-new"), "half", 0o600)
	write(t, source, "two", 0o600)
	running, err := os.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = running.Close() })
	old := stat(t, target)
	if st := install(); os.SameFile(old, st) {
		t.Error("the file was changed in place, not replaced")
	}

	if err := installShim(filepath.Join(dir, "absent"), bin); err == nil || !strings.Contains(err.Error(), "absent") {
		t.Errorf("without a source: %v", err)
	}
}

func TestInstallAlias(t *testing.T) {
	for _, c := range []struct {
		name    string
		before  func(t *testing.T, alias string)
		replace bool
		foreign bool   // left alone, with an error
		kept    string // content of what was moved aside
	}{
		{name: "absent", before: func(*testing.T, string) {}},
		{name: "ours", before: func(t *testing.T, alias string) {
			if err := os.Symlink(shimName, alias); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "foreign file", foreign: true, before: func(t *testing.T, alias string) { write(t, alias, "foreign", 0o755) }},
		{name: "foreign link", foreign: true, before: func(t *testing.T, alias string) {
			if err := os.Symlink("/somewhere/else", alias); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "foreign file, replaced", replace: true, kept: "foreign",
			before: func(t *testing.T, alias string) { write(t, alias, "foreign", 0o755) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			alias := filepath.Join(dir, aliasName)
			write(t, filepath.Join(dir, shimName), "shim", 0o755)
			c.before(t, alias)
			err := installAlias(dir, c.replace)
			if c.foreign {
				if !errors.Is(err, errForeignAlias) || !strings.Contains(err.Error(), alias) || !strings.Contains(err.Error(), "REPLACE_SRIOV_CNI") {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := read(t, alias); got != "shim" {
				t.Errorf("alias runs %q", got)
			}
			if c.kept != "" {
				if got := read(t, alias+".before-sluice"); got != c.kept {
					t.Errorf("kept %q", got)
				}
			}
		})
	}
}

// What is taken off the node is ours, and what we took the place of is back.
func TestUninstall(t *testing.T) {
	for name, foreign := range map[string]bool{"nothing before": false, "another plugin before": true} {
		t.Run(name, func(t *testing.T) {
			dir, shim := t.TempDir(), filepath.Join(t.TempDir(), "shim")
			for path, content := range map[string]string{shim: "shim", filepath.Join(dir, "bridge"): "bridge"} {
				if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if foreign {
				if err := os.WriteFile(filepath.Join(dir, "sriov"), []byte("theirs"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(installShim(shim, dir), installAlias(dir, true)); err != nil {
				t.Fatal(err)
			}
			if err := uninstall(dir, []string{"pod ns/p"}); err == nil || !strings.Contains(err.Error(), "ns/p") {
				t.Errorf("with a pod attached: %v", err)
			}
			for range 2 {
				if err := uninstall(dir, nil); err != nil {
					t.Fatal(err)
				}
			}
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			want := []string{"bridge"}
			if foreign {
				want = append(want, "sriov")
				if b, err := os.ReadFile(filepath.Join(dir, "sriov")); err != nil || string(b) != "theirs" {
					t.Errorf("the plugin that was there before: %q, %v", b, err)
				}
			}
			var got []string
			for _, e := range entries {
				got = append(got, e.Name())
			}
			if !slices.Equal(got, want) {
				t.Errorf("left: %v, want %v", got, want)
			}
		})
	}
}
