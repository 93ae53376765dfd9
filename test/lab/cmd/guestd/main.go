// Command guestd is pid 1 of the lab's guests, from the initramfs on.
//
// It finds the root image, puts a tmpfs over it, mounts what a Linux system
// and a kubelet expect, and starts itself again as the server of the control
// line (see package control). Then it reaps orphans, and powers off when the
// server ends.
package main

import (
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "serve" {
		if err := serve(); err != nil {
			fatal("serve", err)
		}
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guestd is pid 1 of a lab guest; it is of no use on a host")
		os.Exit(2)
	}
	if err := boot(); err != nil {
		fatal("boot", err)
		powerOff()
	}
	server, err := os.StartProcess("/proc/self/exe", []string{"guestd", "serve"}, &os.ProcAttr{
		Dir: "/root", Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}, Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		fatal("start the server", err)
		powerOff()
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if pid == server.Pid {
			powerOff()
		}
		if err == syscall.ECHILD { // cannot be while the server runs
			time.Sleep(time.Second)
		}
	}
}

// fatal reports to the console; the host finds the words "guestd:" there.
func fatal(what string, err error) {
	fmt.Fprintf(os.Stderr, "guestd: %s: %v\n", what, err)
}

func powerOff() {
	fatal("power off", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
	select {}
}
