package server

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/host"
)

// newPod makes a network namespace bound at a path, as container runtimes do.
func newPod(t testing.TB, dir, name string) (path string) {
	t.Helper()
	path = filepath.Join(dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err == nil {
			err = unix.Unshare(unix.CLONE_NEWNET)
		}
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
				home.Close()
				runtime.UnlockOSThread()
			}
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { endPod(path) })
	return path
}

func endPod(path string) {
	_ = unix.Unmount(path, unix.MNT_DETACH)
	_ = os.Remove(path)
}

// agentProcess is a running agent.
type agentProcess struct {
	cmd   *exec.Cmd
	stdin io.Closer
	dir   string
}

// startAgent starts an agent and waits until it serves or is dead.
func startAgent(t testing.TB, dir string, dieAt int) *agentProcess {
	t.Helper()
	_ = os.Remove(filepath.Join(dir, "cni.sock"))
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), "SLUICE_TEST_AGENT="+dir, fmt.Sprintf("SLUICE_TEST_DIE_AT=%d", dieAt))
	c.Stderr = os.Stderr
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	a := &agentProcess{c, stdin, dir}
	t.Cleanup(a.stop)
	eventually(t, "agent", func() error {
		if a.died() {
			return nil
		}
		conn, err := net.Dial("unix", filepath.Join(dir, "cni.sock"))
		if err == nil {
			conn.Close()
		}
		return err
	})
	return a
}

// died tells whether the agent has killed itself.
func (a *agentProcess) died() bool {
	_, err := os.Stat(filepath.Join(a.dir, "died-at"))
	return err == nil
}

// stop ends the agent in an orderly way and returns the step it died at, if any.
func (a *agentProcess) stop() {
	a.stdin.Close()
	_ = a.cmd.Wait()
}

// step returns the step that the agent died at and forgets it.
func (a *agentProcess) step() string {
	b, _ := os.ReadFile(filepath.Join(a.dir, "died-at"))
	_ = os.Remove(filepath.Join(a.dir, "died-at"))
	return string(b)
}

func (a *agentProcess) call(req wire.Request) ([]byte, error) {
	resp, err := call(filepath.Join(a.dir, "cni.sock"), req)
	if err == nil && resp.Failed {
		err = errors.New(string(resp.Stdout))
	}
	return resp.Stdout, err
}

// insist calls until the agent has the call done. Of many callers at once on a busy machine
// some are too late for it to take their calls, or it for its own deadline, which it tells
// by the code for trying again; a runtime does.
func (a *agentProcess) insist(req wire.Request) (out []byte, err error) {
	for range 20 {
		out, err = a.call(req)
		late := errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF)
		if !late && (err == nil || !strings.Contains(err.Error(), `"code":11,`)) {
			break
		}
	}
	return out, err
}

// eventually waits longer than a minute: what fails because the machine is busy is done
// again at the agent's next look, which is once a minute.
func eventually(t testing.TB, what string, ok func() error) {
	t.Helper()
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("did not happen: %s: %v", what, err)
		}
	}
}

// inside runs f with a netlink handle of the pod's namespace.
func inside(pod string, f func(*netlink.Handle) error) error {
	ns, err := host.OpenNetns(pod)
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return f(h)
	})
}

// soak is how long tests that go round go on, at least two rounds.
func soak(t *testing.T) time.Duration {
	d, err := time.ParseDuration(os.Getenv("SLUICE_SOAK"))
	if err != nil && os.Getenv("SLUICE_SOAK") != "" {
		t.Fatal(err)
	}
	return d
}

// usage is what a process has of the system.
type usage struct {
	files, threads int
	memory         int // bytes, resident
}

func usageOf(t *testing.T, pid int) usage {
	t.Helper()
	count := func(dir string) int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/%s", pid, dir))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		t.Fatal(err)
	}
	return usage{count("fd"), count("task"), pages * os.Getpagesize()}
}

// notGrown fails when an agent has more than it had after its first round.
func notGrown(t *testing.T, first, last usage) {
	t.Helper()
	if last.files > first.files+16 || last.threads > first.threads+32 || last.memory > 2*first.memory+16<<20 {
		t.Errorf("the agent grew from %+v to %+v", first, last)
	}
}
