package guest

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestUMLArgs(t *testing.T) {
	s := Spec{
		Name: "vm2", Number: 2, Dir: "/d", Root: "/root.erofs", Memory: 512, Parts: Parts{Initrd: "/initrd"},
		Net: Net{Mgmt: "m2", Data: [2]string{"", "e2"}},
	}
	args := umlArgs(s)
	for _, want := range []string{
		"umid=vm2", "uml_dir=/d/uml", "mem=512M", "ubd0r=/root.erofs", "initrd=/initrd",
		"vec0:transport=tap,ifname=m2,gro=1,mac=52:54:00:00:00:02", "vec2:transport=tap,ifname=e2,gro=1,mac=52:54:00:00:02:02",
		"dummy.numdummies=0", "ifb.numifbs=0", "bonding.max_bonds=0",
	} {
		if !slices.Contains(args, want) {
			t.Errorf("no %q in %q", want, args)
		}
	}
	if strings.Contains(strings.Join(args, " "), "vec1") {
		t.Errorf("a device for a tap that is not there: %q", args)
	}
}

// A saved state belongs to the machine and not to what the host connects to it.
func TestStateKey(t *testing.T) {
	base := Spec{
		Name: "vm1", Number: 1, Dir: "/a", Root: "/root-1", Memory: 512,
		Parts: Parts{Program: os.Args[0], Kernel: "/k", Initrd: "/i", Modules: "/m"},
		Net:   Net{Mgmt: "m1", Data: [2]string{"d1", "e1"}, Address: netip.MustParsePrefix("172.30.0.11/24")},
	}
	key := func(change func(*Spec)) string {
		s := base
		change(&s)
		hw, err := hardware(s)
		if err != nil {
			t.Fatal(err)
		}
		k, err := stateKey(s, hw)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	want := key(func(*Spec) {})
	for name, change := range map[string]func(*Spec){
		"name": func(s *Spec) { s.Name = "other" }, "directory": func(s *Spec) { s.Dir = "/b" }, "files": func(s *Spec) { s.Files = "/f" },
		"taps": func(s *Spec) { s.Net.Data = [2]string{"x", ""}; s.Net.Mgmt = "y" }, "namespace": func(s *Spec) { s.Net.Namespace = "n" },
	} {
		if key(change) != want {
			t.Errorf("another %s makes another state", name)
		}
	}
	for name, change := range map[string]func(*Spec){
		"root": func(s *Spec) { s.Root = "/root-2" }, "memory": func(s *Spec) { s.Memory = 1024 }, "kernel": func(s *Spec) { s.Parts.Kernel = "/k2" },
		"number": func(s *Spec) { s.Number = 2 }, "management": func(s *Spec) { s.Net.Mgmt = "" }, "emulator": func(s *Spec) { s.Parts.Program = "/bin/sh" },
	} {
		if key(change) == want {
			t.Errorf("another %s makes the same state", name)
		}
	}
}

func TestInitrd(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"guestd": "program", "m.ko": "module!"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(dir, "initrd")
	if err := writeInitrd(image, filepath.Join(dir, "guestd"), map[string]string{"lib/x/m.ko": filepath.Join(dir, "m.ko")}); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	cpio := exec.Command("busybox", "cpio", "-t")
	cpio.Stdin = bytes.NewReader(content)
	list, err := cpio.Output()
	if err != nil {
		t.Fatalf("list the archive (Debian package busybox-static): %v", err)
	}
	if want := "dev\ndev/console\ninit\nlib\nlib/x\nlib/x/m.ko\n"; string(list) != want {
		t.Errorf("got %q, want %q", list, want)
	}
	extract := exec.Command("busybox", "cpio", "-i", "--to-stdout", "lib/x/m.ko")
	extract.Stdin = bytes.NewReader(content)
	if got, err := extract.Output(); err != nil || string(got) != "module!" {
		t.Errorf("the module in the archive is %q, %v", got, err)
	}
	if err := writeInitrd(image, filepath.Join(dir, "missing"), nil); err == nil {
		t.Error("a missing program gave no error")
	}
}

// Sweep ends all of a guest's session, also what outlives its leader, and
// nothing of anyone else's.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	p, err := launch(command(sh, []string{"-c", "echo hello; sh -c 'sh -c \"kill -STOP $$; :\"; :' & exit 0"}), dir, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	<-p.ended
	for deadline := time.Now().Add(time.Minute); len(p.members()) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the leader's children are not there")
		}
	}
	if !Alive(dir) {
		t.Error("not alive, though a part of the guest is")
	}
	if err := Sweep(dir); err != nil {
		t.Fatal(err)
	}
	if Alive(dir) || len(p.members()) != 0 {
		t.Errorf("still there after the sweep: %v", p.members())
	}
	if got := consoleTail(dir, 5); got != "hello" {
		t.Errorf("console %q, want %q", got, "hello")
	}
	if err := Sweep(dir); err != nil {
		t.Errorf("second sweep: %v", err)
	}

	// The note of a guest that is long gone, whose process id someone else has.
	other := exec.Command("sleep", "60")
	other.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { other.Process.Kill(); other.Wait() }()
	stranger := process{PID: other.Process.Pid, Program: "/no/such/kernel"}
	if err := stranger.kill(); err != nil {
		t.Fatal(err)
	}
	if err := other.Process.Signal(syscall.Signal(0)); err != nil || len((&process{PID: other.Process.Pid, Program: other.Path}).members()) != 1 {
		t.Error("the sweep killed a stranger")
	}
	// A note cut short.
	os.WriteFile(filepath.Join(dir, processFile), []byte(`{"PID":12`), 0o644)
	if err := Sweep(dir); err != nil {
		t.Errorf("sweep with a note cut short: %v", err)
	}
}

func TestFailureSaysWhy(t *testing.T) {
	dir := t.TempDir()
	console := strings.Repeat("line\n", 100) + "[ 1.0] Kernel panic - not syncing: test\r\n" + strings.Repeat("trace\n", 50)
	if err := os.WriteFile(filepath.Join(dir, consoleFile), []byte(console), 0o644); err != nil {
		t.Fatal(err)
	}
	text := failure("vm1", dir, os.ErrClosed).Error()
	for _, want := range []string{"guest vm1: ", "not syncing: test\n", "likely cause: the guest's kernel panicked"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	if n := strings.Count(text, "line"); n > 25 {
		t.Errorf("%d lines of the console, want its end", n)
	}
}

func TestCheck(t *testing.T) {
	good := Spec{Kind: UML, Root: os.Args[0], Parts: Parts{Program: os.Args[0], Initrd: os.Args[0]}}
	for _, tt := range []struct {
		name, want string
		change     func(*Spec)
	}{
		{"good", "", func(*Spec) {}},
		{"kind", `kind "xen" is neither "uml" nor "qemu"`, func(s *Spec) { s.Kind = "xen" }},
		{"root", "find its root image: stat /no/root", func(s *Spec) { s.Root = "/no/root" }},
		{"namespace", "open the network namespace no-such-ns", func(s *Spec) { s.Net.Namespace = "no-such-ns" }},
		{"tap", "tap no-such-tap", func(s *Spec) { s.Net.Mgmt = "no-such-tap" }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := good
			tt.change(&s)
			err := check(s)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestCPU(t *testing.T) {
	for n := range 5 {
		if set, err := cpu(n); err != nil || set.Count() != 1 {
			t.Errorf("cpu %d: %v, %v", n, set, err)
		}
	}
}
