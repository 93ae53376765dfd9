package ovstest

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// OVS is an Open vSwitch.
type OVS struct {
	Socket string // of its database
	t      *testing.T
	root   string
	dir    string
	db     *exec.Cmd
}

// New starts a database with Open vSwitch's schema, and no switch. Where SLUICE_OVS is not
// set the test is skipped, except in CI, where that is a failure.
func New(t *testing.T) *OVS {
	t.Helper()
	root := os.Getenv("SLUICE_OVS")
	if root == "" {
		const why = "SLUICE_OVS is not set: point it at what out/lab ovs prints"
		if os.Getenv("CI") == "true" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	dir := t.TempDir()
	o := &OVS{Socket: filepath.Join(dir, "db.sock"), t: t, root: root, dir: dir}
	o.Run("bin/ovsdb-tool", "create", filepath.Join(dir, "conf.db"), filepath.Join(root, "usr/share/openvswitch/vswitch.ovsschema"))
	o.StartDatabase()
	o.Ctl("--no-wait", "init")
	return o
}

// StartDatabase starts ovsdb-server, and returns when it listens.
func (o *OVS) StartDatabase() {
	o.t.Helper()
	o.db = o.start("sbin/ovsdb-server", "--remote=punix:"+o.Socket, "--no-chdir", "--unixctl="+filepath.Join(o.dir, "db.ctl"), filepath.Join(o.dir, "conf.db"))
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", o.Socket)
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Now().After(end) {
			o.t.Fatal(err)
		}
	}
}

// StopDatabase kills ovsdb-server.
func (o *OVS) StopDatabase() {
	_ = o.db.Process.Kill()
	_ = o.db.Wait()
}

// StartSwitch starts ovs-vswitchd. Up to 3.1 at least, that counts the CPUs, once for each
// ten seconds of the monotonic clock, and has none before: in a kernel that booted just
// now it would start no thread that handles packets.
func (o *OVS) StartSwitch(options ...string) {
	o.t.Helper()
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &up); err != nil {
		o.t.Fatal(err)
	}
	time.Sleep(10*time.Second - time.Duration(up.Nano()))
	o.start("lib/openvswitch-switch/ovs-vswitchd", append([]string{"unix:" + o.Socket, "--unixctl=" + filepath.Join(o.dir, "switch.ctl")}, options...)...)
}

// Ctl runs ovs-vsctl and returns what it prints.
func (o *OVS) Ctl(args ...string) string {
	o.t.Helper()
	return o.Run("bin/ovs-vsctl", append([]string{"--db=unix:" + o.Socket, "--timeout=10"}, args...)...)
}

// Run runs a program, given below /usr, and returns what it prints.
func (o *OVS) Run(program string, args ...string) string {
	o.t.Helper()
	out, err := o.command(program, args...).CombinedOutput()
	if err != nil {
		o.t.Fatalf("%s %v: %v: %s", program, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func (o *OVS) start(program string, args ...string) *exec.Cmd {
	o.t.Helper()
	cmd := o.command(program, args...)
	if err := cmd.Start(); err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

func (o *OVS) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(o.root, "usr", program), args...)
	libraries, err := filepath.Glob(filepath.Join(o.root, "usr/lib/*-linux-gnu"))
	if err != nil {
		o.t.Fatal(err)
	}
	cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+strings.Join(libraries, ":"), "OVS_RUNDIR="+o.dir)
	return cmd
}
