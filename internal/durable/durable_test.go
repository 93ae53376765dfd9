package durable

import (
	"os"
	"path/filepath"
	"testing"
)

func TestWriteAndRemove(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.json")
	for _, want := range []string{"one", "two"} {
		if err := WriteFile(path, []byte(want)); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != want {
			t.Errorf("%q, %v", b, err)
		}
	}
	if st, _ := os.Stat(path); st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	for range 2 {
		if err := Remove(path); err != nil {
			t.Error(err)
		}
	}
	// A name that cannot be written leaves nothing beside it.
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(path, nil); err == nil {
		t.Error("a folder was replaced by a file")
	}
	if files, _ := filepath.Glob(filepath.Join(dir, "*")); len(files) != 1 {
		t.Errorf("left: %v", files)
	}
	if err := WriteFile(filepath.Join(dir, "none", "x"), nil); err == nil {
		t.Error("a file was written to a folder that does not exist")
	}
}

type death struct{}

// Whenever the process ends, the file is the old one or the new one, whole, and what else
// it left is swept away.
func TestEndAtEachStep(t *testing.T) {
	t.Cleanup(func() { OnStep = nil })
	for name, c := range map[string]struct {
		do       func(path string) error
		old, new string // "" for no file
	}{
		"write":   {func(path string) error { return WriteFile(path, []byte("one")) }, "", "one"},
		"replace": {func(path string) error { return WriteFile(path, []byte("two")) }, "one", "two"},
		"update":  {func(path string) error { return Replace(path, []byte("two")) }, "one", "two"},
		"remove":  {Remove, "one", ""},
		"forget":  {Forget, "one", ""},
	} {
		changed := false
		for at, done := 0, false; !done; at++ {
			dir := t.TempDir()
			path := filepath.Join(dir, "x.json")
			if c.old != "" {
				if err := os.WriteFile(path, []byte(c.old), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			last, n := "none", 0
			OnStep = func(step string) {
				if last = step; n == at {
					panic(death{})
				}
				n++
			}
			func() {
				defer func() {
					if p := recover(); p != nil && p != any(death{}) {
						panic(p)
					}
				}()
				if err := c.do(path); err != nil {
					t.Error(err)
				}
				done, last = true, "the end"
			}()
			OnStep = nil
			b, err := os.ReadFile(path)
			if err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			left, _ := filepath.Glob(filepath.Join(dir, "*"))
			t.Logf("%-8s ended before %-12q the file is %-6q %d files", name, last, b, len(left))
			if changed = changed || string(b) == c.new; string(b) != c.old && string(b) != c.new || changed && string(b) != c.new || done && !changed {
				t.Errorf("%s, ended before %q: %q", name, last, b)
			}
			if err := Sweep(dir); err != nil {
				t.Error(err)
			}
			if left, _ = filepath.Glob(filepath.Join(dir, "*")); len(left) > 1 || len(left) == 1 && left[0] != path {
				t.Errorf("%s, ended before %q: left %v", name, last, left)
			}
		}
	}
}
