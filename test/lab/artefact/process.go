package artefact

import (
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// runGroup runs cmd as the leader of a process group that dies as a whole:
// when cmd's context ends, and when this process is killed.
func runGroup(cmd *exec.Cmd) error {
	// The parent-death signal is sent when the thread that forked ends, so
	// that thread has to stay for as long as the command runs.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd.Run()
}
