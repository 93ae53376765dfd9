package guest

import (
	"encoding/json"
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

	"golang.org/x/sys/unix"
)

// Files in a guest's directory.
const (
	processFile = "process.json"
	consoleFile = "console.log"
	umlDir      = "uml"
)

// process is a guest's session of host processes.
type process struct {
	PID     int    // leader of the session
	Program string // what all of its processes run
	// ended is closed when the leader has ended; nil if it is not our child.
	ended chan struct{}
}

// launch starts cmd as the leader of a session, its output on the console, and
// notes it in dir for [Sweep]. It does not die with this process.
func launch(cmd *exec.Cmd, dir, netns string, cpus *unix.CPUSet) (*process, error) {
	console, err := os.OpenFile(filepath.Join(dir, consoleFile), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("make the console log: %w", err)
	}
	defer console.Close()
	cmd.Stdout, cmd.Stderr = console, console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := onThread(netns, cpus, cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	p := &process{PID: cmd.Process.Pid, Program: cmd.Path, ended: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // its status says nothing: guests are killed
		close(p.ended)
	}()
	note, err := json.Marshal(p)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, processFile), note, 0o644)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("note the guest's process: %w", err), p.kill())
	}
	return p, nil
}

// Sweep ends the guest that a killed process left in the directory dir, if
// there is one, and removes its files except the console log.
func Sweep(dir string) error {
	note, err := os.ReadFile(filepath.Join(dir, processFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read the guest's process: %w", err)
	}
	var p process
	// A note cut short is from a process that was killed while it wrote it,
	// and whose guest ends by itself since it was never set up.
	if json.Unmarshal(note, &p) == nil && p.PID > 1 {
		if err := p.kill(); err != nil {
			return err
		}
	}
	return errors.Join(os.RemoveAll(filepath.Join(dir, umlDir)), os.RemoveAll(filepath.Join(dir, processFile)))
}

// Alive tells whether the guest in the directory dir runs.
func Alive(dir string) bool {
	note, err := os.ReadFile(filepath.Join(dir, processFile))
	var p process
	return err == nil && json.Unmarshal(note, &p) == nil && len(p.members()) > 0
}

// kill ends every process of the session and waits until they are gone. A User-
// Mode Linux guest is one process for each of its address spaces, and those
// outlive the leader.
func (p *process) kill() error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		members := p.members()
		if len(members) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("end the guest of process %d: %v still there after SIGKILL", p.PID, members)
		}
		for _, pid := range members {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may just have ended
		}
	}
}

// members lists the living processes of the session. The program is compared
// because a process id may long belong to someone else.
func (p *process) members() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var found []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue
		}
		// After the name in parentheses: state, parent, group, session.
		f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(f) < 4 || f[0] == "Z" || f[3] != strconv.Itoa(p.PID) {
			continue
		}
		exe, err := os.Readlink(filepath.Join("/proc", e.Name(), "exe"))
		if err == nil && sameProgram(strings.TrimSuffix(exe, " (deleted)"), p.Program) {
			found = append(found, pid)
		}
	}
	return found
}

func sameProgram(a, b string) bool {
	if real, err := filepath.EvalSymlinks(b); err == nil {
		b = real
	}
	return a == b
}

// consoleTail returns the last n lines of the console of the guest in dir.
func consoleTail(dir string, n int) string {
	content, err := os.ReadFile(filepath.Join(dir, consoleFile))
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimRight(strings.ReplaceAll(string(content), "\r", ""), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
