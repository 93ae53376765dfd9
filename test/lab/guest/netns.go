package guest

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// InNetns runs f on a thread inside the named network namespace ("ip netns"
// name; "" is the present one). Sockets and processes that f itself makes
// belong to it; goroutines that f starts do not.
func InNetns(name string, f func() error) error {
	return onThread(name, nil, f)
}

// onThread runs f on a thread of its own, inside a network namespace and on
// the given host CPUs; nil is any. The thread ends with f.
func onThread(netns string, cpus *unix.CPUSet, f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: a thread in a foreign namespace must not be used again.
		runtime.LockOSThread()
		done <- func() error {
			if netns != "" {
				fd, err := unix.Open("/run/netns/"+netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
				if err != nil {
					return fmt.Errorf("open the network namespace %s: %w", netns, err)
				}
				err = unix.Setns(fd, unix.CLONE_NEWNET)
				if err := errors.Join(err, unix.Close(fd)); err != nil {
					return fmt.Errorf("enter the network namespace %s: %w", netns, err)
				}
			}
			if cpus != nil {
				if err := unix.SchedSetaffinity(0, cpus); err != nil {
					return fmt.Errorf("pin to a host CPU: %w", err)
				}
			}
			return f()
		}()
	}()
	return <-done
}

// cpu returns the n-th of the CPUs this process may use, modulo their number.
func cpu(n int) (*unix.CPUSet, error) {
	var may, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return nil, fmt.Errorf("ask for the usable host CPUs: %w", err)
	}
	n %= may.Count()
	for i := 0; ; i++ {
		if may.IsSet(i) {
			if n == 0 {
				one.Set(i)
				return &one, nil
			}
			n--
		}
	}
}
