package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

type mount struct {
	kind, from, to string
	flags          uintptr
	data           string
}

func (m mount) do() error {
	if err := os.MkdirAll(m.to, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(m.from, m.to, m.kind, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s of type %s at %s: %w", m.from, m.kind, m.to, err)
	}
	return nil
}

func mountAll(mounts ...mount) error {
	for _, m := range mounts {
		if err := m.do(); err != nil {
			return err
		}
	}
	return nil
}

// boot goes from the initramfs to the root image.
func boot() error {
	err := mountAll(
		mount{kind: "proc", from: "proc", to: "/proc"},
		mount{kind: "sysfs", from: "sysfs", to: "/sys"},
		mount{kind: "devtmpfs", from: "devtmpfs", to: "/dev"},
	)
	if err != nil {
		return err
	}
	if err := loadEarly("/modules"); err != nil {
		return err
	}
	disk, err := waitFor(5*time.Second, "/dev/ubda", "/dev/vda")
	if err != nil {
		return fmt.Errorf("find the root image: %w", err)
	}
	err = mountAll(
		mount{kind: "erofs", from: disk, to: "/lower", flags: unix.MS_RDONLY},
		mount{kind: "tmpfs", from: "tmpfs", to: "/rw", data: "size=90%"},
	)
	if err != nil {
		return err
	}
	if err := errors.Join(os.Mkdir("/rw/upper", 0o755), os.Mkdir("/rw/work", 0o755)); err != nil {
		return err
	}
	if err := (mount{kind: "overlay", from: "overlay", to: "/new", data: "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work"}).do(); err != nil {
		return err
	}
	if err := copyTree("/lib/sluice", "/new/lib/sluice"); err != nil {
		return fmt.Errorf("take along the modules of the cards: %w", err)
	}
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := os.MkdirAll("/new"+dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(dir, "/new"+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	// The initramfs itself cannot be left, only covered.
	if err := os.Chdir("/new"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter the root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	// The kubelet mounts into running pods: mounts have to propagate.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	err = mountAll(
		mount{kind: "tmpfs", from: "tmpfs", to: "/run", data: "mode=755"},
		mount{kind: "tmpfs", from: "tmpfs", to: "/tmp", data: "mode=1777"},
		mount{kind: "devpts", from: "devpts", to: "/dev/pts", data: "ptmxmode=666"},
		mount{kind: "tmpfs", from: "tmpfs", to: "/dev/shm"},
		mount{kind: "mqueue", from: "mqueue", to: "/dev/mqueue"},
		mount{kind: "cgroup2", from: "cgroup2", to: "/sys/fs/cgroup"},
		mount{kind: "bpf", from: "bpf", to: "/sys/fs/bpf"},
		mount{kind: "debugfs", from: "debugfs", to: "/sys/kernel/debug"},
	)
	if err != nil {
		return err
	}
	for link, target := range map[string]string{"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"} {
		if err := os.Symlink("/proc/self/fd"+target, "/dev/"+link); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if disk == "/dev/ubda" {
		return clockSpeed()
	}
	return stockModules()
}

// waitFor returns the first of the paths to appear.
func waitFor(limit time.Duration, paths ...string) (string, error) {
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		for _, p := range paths {
			if _, err := os.Stat(p); err == nil {
				return p, nil
			}
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("none of %s after %s", strings.Join(paths, ", "), limit)
		}
	}
}

// loadEarly loads the modules of the initramfs, whose names begin with their
// place in the order.
func loadEarly(dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, "*.ko")) // sorted
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := insmod(name, nil); err != nil {
			return err
		}
	}
	return nil
}

func insmod(path string, params []string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("load module: %w", err)
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), strings.Join(params, " "), 0)
	switch {
	case errors.Is(err, unix.EEXIST):
		return nil
	case errors.Is(err, unix.ENOEXEC), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("load module %s with %q: %w (module mismatch: built for another kernel, or it has no such parameter; see the console)", path, params, err)
	case err != nil:
		return fmt.Errorf("load module %s with %q: %w", path, params, err)
	}
	return nil
}

// clockSpeed adds a clock speed to /proc/cpuinfo, which User-Mode Linux has
// not and the kubelet's cadvisor wants.
func clockSpeed() error {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	text := strings.TrimRight(string(info), "\n") + "\ncpu MHz\t\t: 2000.000\n\n"
	if err := os.WriteFile("/run/cpuinfo", []byte(text), 0o444); err != nil {
		return err
	}
	if err := unix.Mount("/run/cpuinfo", "/proc/cpuinfo", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("cover /proc/cpuinfo: %w", err)
	}
	return nil
}

func copyTree(from, to string) error {
	if _, err := os.Stat(from); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return os.CopyFS(to, os.DirFS(from))
}
