package artefact

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
)

// Step describes one artefact: a directory made from inputs.
type Step struct {
	// Name is the step's name in paths and progress lines: lower case, digits, '-'.
	Name string
	// Inputs are everything the output depends on, in a fixed order.
	Inputs []Input
	// Packages are the Debian packages whose programs the build calls. Those
	// missing on this machine are installed before Build runs.
	Packages []string
	// Ready is for a step whose result is on the machine and not in the store,
	// such as an installed program: it tells whether the result is there.
	Ready func() bool
	// Build fills b.Out, an empty directory. It must not keep absolute paths
	// into b.Out in what it writes, since the directory is renamed afterwards.
	Build func(ctx context.Context, b *Build) error
}

// Input is one thing a step's output depends on: [Text], [Files] or [Output].
type Input interface {
	// sum writes the input's identity into h.
	sum(s *Store, h hash.Hash) error
}

// Text is a literal input: an option, a command line, a recipe's version.
// label keeps equal values of different meaning apart.
func Text(label, value string) Input { return text{label, value} }

type text struct{ label, value string }

func (t text) sum(_ *Store, h hash.Hash) error {
	fmt.Fprintf(h, "text %q %q\n", t.label, t.value)
	return nil
}

// Files is the input made of the regular files and symbolic links at or below
// the given paths: their names relative to root, their contents and whether
// they are executable. Paths are relative to root. skip, if not nil, leaves out
// a file or a whole directory by its path relative to root.
func Files(root string, skip func(rel string) bool, paths ...string) Input {
	return files{root, skip, paths}
}

type files struct {
	root  string
	skip  func(string) bool
	paths []string
}

func (f files) sum(_ *Store, h hash.Hash) error {
	var names []string
	for _, p := range f.paths {
		err := filepath.WalkDir(filepath.Join(f.root, p), func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(f.root, path)
			if err != nil {
				return err
			}
			if f.skip != nil && f.skip(rel) {
				if d.IsDir() {
					return filepath.SkipDir
				}
				return nil
			}
			if !d.IsDir() {
				names = append(names, rel)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("read input files: %w", err)
		}
	}
	sort.Strings(names)
	for _, name := range names {
		if err := sumFile(h, filepath.Join(f.root, name), name); err != nil {
			return fmt.Errorf("read input file %s: %w", name, err)
		}
	}
	return nil
}

func sumFile(h hash.Hash, path, name string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		target, err := os.Readlink(path)
		if err != nil {
			return err
		}
		fmt.Fprintf(h, "link %q %q\n", name, target)
		return nil
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	// The contents go in as their own digest, so that no content can imitate
	// the line that announces the next file.
	content := sha256.New()
	if _, err := io.Copy(content, file); err != nil {
		return err
	}
	fmt.Fprintf(h, "file %q %t %x\n", name, info.Mode()&0o111 != 0, content.Sum(nil))
	return nil
}

// Output is the input made of another step's output; the other step is built
// first and found by [Build.Dir].
func Output(step *Step) Input { return output{step} }

type output struct{ step *Step }

func (o output) sum(s *Store, h hash.Hash) error {
	key, err := s.key(o.step)
	if err != nil {
		return err
	}
	fmt.Fprintf(h, "step %q %s\n", o.step.Name, key)
	return nil
}

// needs returns the steps whose outputs a step takes.
func (st *Step) needs() []*Step {
	var out []*Step
	for _, in := range st.Inputs {
		if o, ok := in.(output); ok {
			out = append(out, o.step)
		}
	}
	return out
}

// key returns the hash of everything the step's output depends on.
func (s *Store) key(st *Step) (string, error) {
	if key, ok := s.keys[st]; ok {
		return key, nil
	}
	h := sha256.New()
	fmt.Fprintf(h, "artefact %q\n", st.Name)
	for _, in := range st.Inputs {
		if err := in.sum(s, h); err != nil {
			return "", fmt.Errorf("hash the inputs of %s: %w", st.Name, err)
		}
	}
	key := hex.EncodeToString(h.Sum(nil))
	s.keys[st] = key
	return key, nil
}
