package host

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNotNetns says that a file exists but is no network namespace, which is
// what a bind mount of a namespace leaves behind when it is unmounted.
var ErrNotNetns = errors.New("is not a network namespace")

// NetnsID names a network namespace for as long as it lives: the device and
// inode of its nsfs file. Paths are reused, these are not while anything holds
// the namespace.
type NetnsID struct {
	Dev   uint64 `json:"dev"`
	Inode uint64 `json:"inode"`
}

// Netns is an open network namespace. It keeps the namespace alive until
// Close. It is not safe for concurrent use.
type Netns struct {
	ID NetnsID

	fd   int   // 0 for none
	conn *rtnl // opened at first use
}

// OpenNetns opens the namespace bound at path. The error wraps fs.ErrNotExist
// when there is no such file and ErrNotNetns when it is something else.
func OpenNetns(path string) (*Netns, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	return NetnsFromFD(fd, path)
}

// NetnsFromFD makes a Netns of an open nsfs file, for example one received
// over a socket; name is for errors. It owns the descriptor from then on, also when it
// fails.
func NetnsFromFD(fd int, name string) (*Netns, error) {
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		unix.Close(fd)
		return nil, fmt.Errorf("%s %w", name, ErrNotNetns)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("stat network namespace %s: %w", name, err)
	}
	return &Netns{ID: NetnsID{Dev: st.Dev, Inode: st.Ino}, fd: fd}, nil
}

// Close lets go of the namespace.
func (n *Netns) Close() {
	if n.conn != nil {
		n.conn.close()
		n.conn = nil
	}
	if n.fd > 0 {
		unix.Close(n.fd)
		n.fd = 0
	}
}

// Do runs f on an operating system thread that is inside the namespace. Only
// system calls of f's own goroutine are affected.
func (n *Netns) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open the thread's network namespace: %w", err)
			return
		}
		defer unix.Close(home)
		if err = unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = f()
		if back := unix.Setns(home, unix.CLONE_NEWNET); back != nil {
			// The thread stays locked: the runtime ends it with this goroutine
			// and no other goroutine ever runs in the wrong namespace.
			done <- errors.Join(err, fmt.Errorf("leave network namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

// rtnl returns the namespace's socket.
func (n *Netns) rtnl() (_ *rtnl, err error) {
	if n.conn == nil {
		n.conn, err = openRtnl(n.Do)
	}
	return n.conn, err
}

// temporary tells errors that drivers give while they are busy with a reset of
// the VF and that go away by themselves.
func temporary(err error) bool {
	return errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EBUSY)
}
