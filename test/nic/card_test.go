//go:build lab

package nic

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// card names the three ends of one emulated card.
type card struct{ pci, pf, wire string }

var cards = [2]card{
	{"0000:01:00.0", "ens1f0", "wire0"},
	{"0000:02:00.0", "ens2f0", "wire1"},
}

const maxMTU = 9600

func TestMain(m *testing.M) { os.Exit(run(m)) }

// run fails the tests when the kernel complained while they ran: a splat that
// no assertion sees is still a defect of the module.
func run(m *testing.M) int {
	kmsg, err := os.OpenFile("/dev/kmsg", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		fmt.Fprintln(os.Stderr, "open the kernel log:", err)
		return 1
	}
	defer kmsg.Close()
	if _, err := kmsg.Seek(0, 2); err != nil { // SEEK_END: only what comes from now on
		fmt.Fprintln(os.Stderr, "go to the end of the kernel log:", err)
		return 1
	}
	// Address resolution and router discovery would add frames to the counters.
	for _, scope := range []string{"default", "all"} {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+scope+"/disable_ipv6", []byte("1"), 0)
	}
	code := m.Run()
	buf := make([]byte, 8192)
	for {
		n, err := syscall.Read(int(kmsg.Fd()), buf)
		if err == syscall.EPIPE { // older records were overwritten
			continue
		}
		if err != nil || n <= 0 {
			return code
		}
		line := string(buf[:n])
		for _, bad := range []string{"WARNING:", "BUG:", "Oops", "Call Trace", "possible circular", "refcount_t:", "waiting for"} {
			if strings.Contains(line, bad) {
				fmt.Fprintln(os.Stderr, "the kernel complained:", line)
				code = 1
			}
		}
	}
}

func (c card) dev(parts ...string) string {
	return filepath.Join(append([]string{"/sys/bus/pci/devices", c.pci}, parts...)...)
}

func (c card) debug(name string) string {
	return filepath.Join("/sys/kernel/debug/sluicenic", c.pci, name)
}

func (c card) vfPCI(t *testing.T, vf int) string {
	t.Helper()
	link, err := os.Readlink(c.dev(fmt.Sprintf("virtfn%d", vf)))
	if err != nil {
		t.Fatalf("find PCI address of VF %d: %v", vf, err)
	}
	return filepath.Base(link)
}

func (c card) vf(vf int) string { return fmt.Sprintf("%sv%d", c.pf, vf) }

// rep names the VF's representor, as systemd does.
func (c card) rep(vf int) string { return fmt.Sprintf("%snpf0vf%d", c.pf, vf) }

// fresh gives the card n VFs at their defaults, with PF and wire up and at theirs, in
// legacy mode.
func (c card) fresh(t *testing.T, n int) {
	t.Helper()
	if _, err := os.Stat(c.dev()); err != nil {
		t.Fatalf("the module is not loaded with a card at %s: %v", c.pci, err)
	}
	if n > 0 || read(t, c.dev("sriov_numvfs")) != "0" {
		c.setVFs(t, 0)
	}
	if err := c.setMode("legacy"); err != nil {
		t.Fatal(err)
	}
	if err := netlink.SetPromiscOff(link(t, c.pf)); err != nil {
		t.Fatal(err)
	}
	up(t, c.pf)
	up(t, c.wire)
	if n > 0 {
		c.setVFs(t, n)
	}
	for _, name := range []string{c.pf, c.wire} {
		if err := netlink.LinkSetMTU(link(t, name), 1500); err != nil {
			t.Fatal(err)
		}
	}
}

func (c card) setMode(mode string) error {
	return netlink.DevLinkSetEswitchMode(&netlink.DevlinkDevice{BusName: "pci", DeviceName: c.pci}, mode)
}

func (c card) setVFs(t *testing.T, n int) {
	t.Helper()
	write(t, c.dev("sriov_numvfs"), strconv.Itoa(n))
}

// vfs returns what the PF says of its VFs by rtnetlink. Only a handle of one's
// own asks for them.
func (c card) vfs(t *testing.T) []netlink.VfInfo {
	t.Helper()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	l, err := h.LinkByName(c.pf)
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().Vfs
}

func (c card) vfInfo(t *testing.T, vf int) netlink.VfInfo {
	t.Helper()
	vfs := c.vfs(t)
	if vf >= len(vfs) {
		t.Fatalf("%s shows %d VFs, want VF %d", c.pf, len(vfs), vf)
	}
	return vfs[vf]
}

// dump returns the key=value pairs that the module itself holds of a VF.
func (c card) dump(t *testing.T, vf int) map[string]string {
	t.Helper()
	for _, line := range strings.Split(read(t, c.debug("dump")), "\n") {
		if !strings.HasPrefix(line, fmt.Sprintf("vf=%d ", vf)) {
			continue
		}
		out := map[string]string{}
		for _, f := range strings.Fields(line) {
			k, v, _ := strings.Cut(f, "=")
			out[k] = v
		}
		return out
	}
	t.Fatalf("no VF %d in the dump of %s", vf, c.pci)
	return nil
}

func link(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatalf("find link %s: %v", name, err)
	}
	return l
}

func up(t *testing.T, name string) {
	t.Helper()
	if err := netlink.LinkSetUp(link(t, name)); err != nil {
		t.Fatalf("set %s up: %v", name, err)
	}
}

func down(t *testing.T, name string) {
	t.Helper()
	if err := netlink.LinkSetDown(link(t, name)); err != nil {
		t.Fatalf("set %s down: %v", name, err)
	}
}

func carrier(t *testing.T, name string) bool {
	t.Helper()
	return link(t, name).Attrs().RawFlags&unix.IFF_LOWER_UP != 0
}

func exists(name string) bool {
	_, err := netlink.LinkByName(name)
	return err == nil
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func write(t *testing.T, path, value string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

// wantErrno fails unless err is exactly this error of the kernel; 0 wants none.
func wantErrno(t *testing.T, what string, err error, want syscall.Errno) {
	t.Helper()
	if want == 0 && err == nil || want != 0 && errors.Is(err, want) {
		return
	}
	if want == 0 {
		t.Errorf("%s: %v, want no error", what, err)
		return
	}
	t.Errorf("%s: %v, want %q", what, err, want.Error())
}

// eventually waits for what the kernel does in the background.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("did not happen: %s", what)
		}
	}
}
