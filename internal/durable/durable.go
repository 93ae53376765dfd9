package durable

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// OnStep is called, unless nil, before each change to the disk, with its name. Tests
// end the process in it.
var OnStep func(step string)

func step(name string) {
	if OnStep != nil {
		OnStep(name)
	}
}

// unfinished ends the names of files that are being written.
const unfinished = ".tmp"

// Files are not opened by os here: that tries each in the runtime's poller, which takes
// five system calls more each, in vain; nor renamed, for it looks first what is there.

// WriteFile replaces the file at path. After a crash there is either the old
// file or the new one, whole; once WriteFile has returned it is the new one.
// A crash may leave a file beside it, for Sweep.
func WriteFile(path string, b []byte) error {
	if err := Replace(path, b); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// Replace is WriteFile for a file that is there already, and where the old one will do
// after the machine itself has crashed.
func Replace(path string, b []byte) error {
	step("create")
	tmp := path + "." + strconv.FormatUint(rand.Uint64(), 36) + unfinished
	fd, err := open(tmp, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL)
	if err != nil {
		return err
	}
	step("write")
	err = write(fd, b)
	if err == nil {
		step("sync")
		err = again(func() error { return syscall.Fsync(fd) })
	}
	if err = errors.Join(err, syscall.Close(fd)); err != nil {
		err = &os.PathError{Op: "write", Path: tmp, Err: err}
	} else {
		step("rename")
		if err = again(func() error { return syscall.Rename(tmp, path) }); err != nil {
			err = &os.LinkError{Op: "rename", Old: tmp, New: path, Err: err}
		}
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return nil
}

// Remove deletes the file at path; once it has returned the file stays deleted.
// A file that does not exist is deleted already.
func Remove(path string) error {
	if err := Forget(path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// Forget is Remove for a file that may be there again after the machine itself has
// crashed, until another is written to the folder.
func Forget(path string) error {
	step("remove")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

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
	fd, err := open(dir, syscall.O_RDONLY|syscall.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer func() { _ = syscall.Close(fd) }() // nothing was written
	if err := again(func() error { return syscall.Fsync(fd) }); err != nil {
		return &os.PathError{Op: "sync", Path: dir, Err: err}
	}
	return nil
}

func open(path string, flags int) (fd int, err error) {
	err = again(func() error {
		fd, err = syscall.Open(path, flags|syscall.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

func write(fd int, b []byte) error {
	for len(b) > 0 {
		n := 0
		if err := again(func() (err error) { n, err = syscall.Write(fd, b); return err }); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// again repeats what a signal has interrupted.
func again(f func() error) error {
	for {
		if err := f(); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}
