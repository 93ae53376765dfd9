package durable

import (
	"errors"
	"os"
	"path/filepath"
)

// OnStep, unless nil, is called before each change to the disk, with its name. Tests end
// the process in it.
var OnStep func(step string)

func step(name string) {
	if OnStep != nil {
		OnStep(name)
	}
}

// WriteFile replaces the file at path. After a crash there is either the old
// file or the new one, whole; once WriteFile has returned it is the new one.
// A crash may leave a file beside it, for Sweep.
func WriteFile(path string, b []byte) error {
	step("create")
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*"+unfinished)
	if err != nil {
		return err
	}
	step("write")
	_, err = f.Write(b)
	step("sync")
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		step("rename")
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncDir(filepath.Dir(path))
}

// Remove deletes the file at path; once it has returned the file stays deleted.
// A file that does not exist is deleted already.
func Remove(path string) error {
	step("remove")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// unfinished ends the names of files that are being written.
const unfinished = ".tmp"

// Sweep deletes what writes that did not come to their end have left in a folder. Nobody
// may be writing there meanwhile.
func Sweep(dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*"+unfinished))
	for _, f := range files {
		err = errors.Join(err, os.Remove(f))
	}
	return err
}

// syncDir makes the names in a folder durable (fsync(2), NOTES).
func syncDir(dir string) error {
	step("sync folder")
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
