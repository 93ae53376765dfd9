package artefact

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

var entryName = regexp.MustCompile(`^(\.building-)?([a-z0-9-]+)-([0-9a-f]{12})$`)

// Collect removes what is not needed any more: of each name all outputs but the
// one used last, files below other directories (saved states, logs), and the
// rests of killed builds; each only if it was not used for minAge. It returns
// what it removed.
func (s *Store) Collect(ctx context.Context, minAge time.Duration) (removed []string, err error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list the cache: %w", err)
	}
	type output struct {
		id   string
		used time.Time
	}
	outputs := map[string][]output{}
	for _, e := range entries {
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list the cache: %w", err)
		}
		m := entryName.FindStringSubmatch(e.Name())
		switch {
		case !e.IsDir():
		case m == nil:
			old, err := collectFiles(filepath.Join(s.dir, e.Name()), minAge)
			if err != nil {
				return removed, err
			}
			removed = append(removed, old...)
		case m[1] != "": // a build, dead or alive: it has no rank among outputs
			outputs[e.Name()] = append(outputs[e.Name()], output{}, output{e.Name(), info.ModTime()})
		default:
			outputs[m[2]] = append(outputs[m[2]], output{e.Name(), info.ModTime()})
		}
	}
	for _, list := range outputs {
		if list[0].id != "" {
			slices.SortFunc(list, func(a, b output) int { return b.used.Compare(a.used) })
		}
		for _, o := range list[1:] {
			if time.Since(o.used) < minAge {
				continue
			}
			gone, err := s.remove(ctx, o.id)
			if err != nil {
				return removed, err
			}
			if gone {
				removed = append(removed, filepath.Join(s.dir, o.id))
			}
		}
	}
	slices.Sort(removed)
	return removed, nil
}

// remove removes an output or the rest of a build, unless a build of the same
// is going on.
func (s *Store) remove(ctx context.Context, id string) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	unlock, err := s.tryLock(strings.TrimPrefix(id, ".building-"))
	if err != nil || unlock == nil {
		return false, err
	}
	defer unlock()
	// Under another name first, so that nobody takes half of it for whole.
	dying := filepath.Join(s.dir, ".dying-"+id)
	if err := errors.Join(os.RemoveAll(dying), os.Rename(filepath.Join(s.dir, id), dying), os.RemoveAll(dying)); err != nil {
		return false, fmt.Errorf("remove %s from the cache: %w", id, err)
	}
	return true, nil
}

// collectFiles removes the files below dir that were not used for minAge.
func collectFiles(dir string, minAge time.Duration) (removed []string, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil || time.Since(info.ModTime()) < minAge {
			return err
		}
		removed = append(removed, path)
		return os.Remove(path)
	})
	if err != nil {
		return removed, fmt.Errorf("remove old files from the cache: %w", err)
	}
	return removed, nil
}
