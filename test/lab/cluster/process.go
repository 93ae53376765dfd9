package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-network/sluice/test/lab/guest"
)

// Process is a program of the lab that outlives its starter. Its log is
// Dir/log/Name.log; Dir/run/Name.pid tells later callers which process it is.
type Process struct {
	Dir, Name string
}

// Log is the path of the process's log.
func (p Process) Log() string { return filepath.Join(p.Dir, "log", p.Name+".log") }

func (p Process) pidFile() string { return filepath.Join(p.Dir, "run", p.Name+".pid") }

// start runs args in the network namespace netns, in a session of its own so
// that signals to the starter's terminal do not reach it. files become
// descriptors 3 and up. The channel gives the end of the process, for as long
// as the starter lives.
func (p Process) start(netns string, args []string, files ...*os.File) (<-chan error, error) {
	for _, path := range []string{p.Log(), p.pidFile()} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, fmt.Errorf("start %s: %w", p.Name, err)
		}
	}
	log, err := os.Create(p.Log())
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.Name, err)
	}
	defer log.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = log, log, files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err = guest.InNetns(netns, cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.Name, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	id, err := identify(cmd.Process.Pid)
	if err == nil {
		err = os.WriteFile(p.pidFile(), []byte(id), 0o644)
	}
	if err != nil {
		_ = cmd.Process.Kill() // unrecorded it would be lost
		return nil, fmt.Errorf("record the process id of %s: %w", p.Name, err)
	}
	return ended, nil
}

// identify returns "PID STARTTIME BOOT", which no other process has ever had:
// pids are used again, but not within one clock tick of one boot.
func identify(pid int) (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	started, ended, err := startTime(stat)
	if err != nil {
		return "", fmt.Errorf("read /proc/%d/stat: %w", pid, err)
	}
	if ended {
		return "", fmt.Errorf("process %d has ended: %w", pid, fs.ErrNotExist)
	}
	return fmt.Sprintf("%d %s %s", pid, started, bytes.TrimSpace(boot)), nil
}

// startTime reads the fields "starttime" and "state" of /proc/PID/stat, see
// proc(5). The command name before them may contain blanks and parentheses.
func startTime(stat []byte) (started string, ended bool, err error) {
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return "", false, fmt.Errorf("parse %q: want at least 20 fields after the command", stat)
	}
	return fields[19], fields[0] == "Z" || fields[0] == "X", nil
}

// Pid returns the id of the process if it runs.
func (p Process) Pid() (pid int, running bool) {
	recorded, err := os.ReadFile(p.pidFile())
	if err != nil {
		return 0, false
	}
	first, _, _ := strings.Cut(string(recorded), " ")
	if pid, err = strconv.Atoi(first); err != nil {
		return 0, false
	}
	current, err := identify(pid)
	return pid, err == nil && current == string(recorded)
}

// Stop kills the process, if it is still the one that was started, and waits
// until it is gone. A lab keeps no data, so there is nothing to end gently for.
func (p Process) Stop() error {
	pid, running := p.Pid()
	if running {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end %s (process %d): %w", p.Name, pid, err)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); running; _, running = p.Pid() {
		if time.Now().After(deadline) {
			return fmt.Errorf("end %s (process %d): still there 10 s after SIGKILL", p.Name, pid)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := os.Remove(p.pidFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget %s: %w", p.Name, err)
	}
	return nil
}

// Tail returns the last n lines of the process's log.
func (p Process) Tail(n int) string {
	content, err := os.ReadFile(p.Log())
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(content), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
