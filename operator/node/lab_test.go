//go:build lab

package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
)

// These run the agent in a lab guest, on a kernel with SR-IOV NICs; only the
// API server and the kubelet are stand-ins.

type lab struct {
	*testing.T
	host   *host.Host
	server *server
	plugin *plugin
	usage  *usage
	agent  *Agent
	stop   func()
	state  string
	kernel Kernel
	ovs    Switch
	line   Lifeline
	// advertiser is the plugin, or what takes its place.
	advertiser Advertiser
}

func newLab(t *testing.T) *lab {
	h, err := host.Open(host.DefaultSysfs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	l := &lab{
		T: t, host: h, kernel: h, line: &lifeline{}, state: t.TempDir(), plugin: &plugin{}, usage: &usage{pods: map[string]string{}},
		server: &server{
			watch: make(chan *v1.SriovNetworkNodeState, 1),
			state: &v1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Name: "guest", Generation: 1, UID: "1"}},
		},
	}
	l.advertiser = l.plugin
	pfs, err := h.Inventory(t.Context())
	if err != nil || len(pfs) < 2 {
		t.Fatalf("the guest has %d SR-IOV NICs, want 2: %v", len(pfs), err)
	}
	empty := func() {
		for _, pf := range pfs {
			if err := h.SetNumVFs(context.Background(), pf.PCIAddress, 0); err != nil {
				t.Error(err)
			}
		}
	}
	empty()
	t.Cleanup(empty)
	l.server.send()
	l.start()
	return l
}

func (l *lab) start() {
	l.agent = New(Config{Node: "guest", StateDir: l.state, Kernel: l.kernel, States: l.server, Advertiser: l.advertiser, Usage: l.usage, Attached: l.usage.Attached, Lifeline: l.line, Switch: l.ovs, Log: testr.New(l.T)})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := l.agent.Run(ctx); err != nil {
			l.Error(err)
		}
	}()
	l.stop = sync.OnceFunc(func() { cancel(); <-done })
	l.Cleanup(l.stop)
}

// restart makes a new agent.
func (l *lab) restart() {
	l.stop()
	l.server.mu.Lock()
	l.server.send()
	l.server.mu.Unlock()
	l.start()
}

// until waits for the status to be as wanted and tells how long it took.
func (l *lab) until(what string, ok func(v1.SriovNetworkNodeStateStatus) error) v1.SriovNetworkNodeStateStatus {
	l.Helper()
	start := time.Now()
	for {
		s := l.server.status()
		err := ok(s)
		if err == nil {
			l.Logf("%s: %s", what, time.Since(start).Round(time.Millisecond))
			return s
		}
		if time.Since(start) > 40*time.Second {
			l.Fatalf("%s: %v\n%+v", what, err, s)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (l *lab) succeeded(what, vfs string) v1.SriovNetworkNodeStateStatus {
	l.Helper()
	l.server.mu.Lock()
	generation := l.server.state.Generation
	l.server.mu.Unlock()
	return l.until(what, func(s v1.SriovNetworkNodeStateStatus) error {
		if s.ObservedGeneration != generation || s.SyncStatus != v1.SyncStatusSucceeded || s.VFs != vfs {
			return fmt.Errorf("%s, VFs %s, %s", s.SyncStatus, s.VFs, s.LastSyncError)
		}
		return nil
	})
}

func TestLabAgent(t *testing.T) {
	l := newLab(t)
	s := l.until("inventory", func(s v1.SriovNetworkNodeStateStatus) error {
		if len(s.Interfaces) < 2 {
			return fmt.Errorf("%d NICs", len(s.Interfaces))
		}
		return nil
	})
	if pf := s.Interfaces[0]; pf.Name != "ens1f0" || pf.PciAddress != nic0 || pf.TotalVfs == 0 || pf.Mac == "" || pf.Driver == "" || pf.Mtu != 1500 {
		t.Errorf("incomplete: %+v", pf)
	}

	left, right := wants(nic0, 3, of("left", "0-2", 1400)), wants(nic1, 2, of("right", "0-1", 0))
	l.server.spec(left, right)
	s = l.succeeded("3 and 2 VFs", "5/5")
	for _, vf := range s.Interfaces[0].VFs {
		mac, mtu, ok := l.agent.Baseline(vf.PciAddress)
		if !ok || mtu != 1400 || vf.Mtu != 1400 || vf.Mac != mac.String() || vf.Name == "" || vf.Message != "" {
			t.Errorf("%+v, baseline %s %d %t", vf, mac, mtu, ok)
		}
	}
	if a, b := l.plugin.healthy("left"), l.plugin.healthy("right"); len(a) != 3 || len(b) != 2 {
		t.Errorf("offered %v %v", a, b)
	}

	vf := s.Interfaces[0].VFs[1]
	t.Run("drift", func(t *testing.T) {
		run(t, "ip", "link", "set", vf.Name, "mtu", "1300")
		run(t, "ip", "link", "set", "ens1f0", "vf", "1", "mac", "02:00:00:00:aa:01")
		l.until("put right", func(v1.SriovNetworkNodeStateStatus) error {
			pf := l.read(nic0)
			if got := pf.VFs[1]; got.MTU != 1400 || got.Admin.MAC.String() != vf.Mac || got.MAC.String() != vf.Mac {
				return fmt.Errorf("VF is %+v", got)
			}
			return nil
		})
	})
	t.Run("namespace of a pod ends", func(t *testing.T) {
		run(t, "ip", "netns", "add", "pod")
		l.usage.set(vf.PciAddress, "default/p")
		run(t, "ip", "link", "set", vf.Name, "netns", "pod", "name", "net1")
		l.until("held", func(s v1.SriovNetworkNodeStateStatus) error {
			if got := s.Interfaces[0].VFs[1]; got.Assigned != "default/p" || got.Name != "" || s.VFs != "5/5" {
				return fmt.Errorf("%+v, %s", got, s.VFs)
			}
			return nil
		})
		if got := l.plugin.healthy("left"); len(got) != 3 {
			t.Errorf("the held VF is off offer: %v", got)
		}
		// A change of the number waits for the pod.
		l.server.spec(wants(nic0, 2, of("left", "0-1", 1400)), right)
		l.until("pending", func(s v1.SriovNetworkNodeStateStatus) error {
			if len(s.Pending) != 1 || len(s.Pending[0].Pods) != 1 || s.Pending[0].Pods[0].Name != "p" || s.Interfaces[0].NumVfs != 3 {
				return fmt.Errorf("%+v", s.Pending)
			}
			return nil
		})
		l.server.spec(left, right)
		run(t, "ip", "netns", "del", "pod")
		l.usage.set(vf.PciAddress, "")
		l.agent.HolderChanged()
		l.until("name and MAC back", func(s v1.SriovNetworkNodeStateStatus) error {
			if got := s.Interfaces[0].VFs[1]; got.Name != vf.Name || got.Mac != vf.Mac || got.Assigned != "" {
				return fmt.Errorf("%+v", got)
			}
			return nil
		})
	})
	t.Run("restart changes nothing", func(t *testing.T) {
		before := l.read(nic0)
		l.restart()
		l.server.spec(left, right)
		l.succeeded("seen", "5/5")
		if after := l.read(nic0); after.VFs[0].IfIndex != before.VFs[0].IfIndex {
			t.Error("the VFs were made anew")
		}
	})
	t.Run("growing one leaves the other", func(t *testing.T) {
		before := l.read(nic0)
		l.server.spec(left, wants(nic1, 4, of("right", "0-3", 0)))
		l.succeeded("4 VFs", "7/7")
		if after := l.read(nic0); after.VFs[0].IfIndex != before.VFs[0].IfIndex {
			t.Error("the other NIC's VFs were made anew")
		}
	})
	t.Run("someone removes the VFs", func(t *testing.T) {
		if err := os.WriteFile("/sys/bus/pci/devices/"+nic1+"/sriov_numvfs", []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
		l.until("made again", func(s v1.SriovNetworkNodeStateStatus) error {
			if pf := l.read(nic1); len(pf.VFs) != 4 || pf.VFs[3].Name == "" {
				return fmt.Errorf("%+v", pf.VFs)
			}
			return nil
		})
		l.succeeded("told", "7/7")
	})
	t.Run("policies gone, VFs gone", func(t *testing.T) {
		l.server.spec()
		l.succeeded("told", "0/0")
		if pf := l.read(nic0); pf.NumVFs != 0 {
			t.Errorf("%d VFs", pf.NumVFs)
		}
	})
}

// Whatever somebody changes of a VF that no pod holds, or of its PF, is put right
// within 200 ms, by the kernel's events alone.
func TestLabDriftIsPutRightAtOnce(t *testing.T) {
	l := newLab(t)
	want := wants(nic0, 4, of("left", "0-3", 1400))
	want.Mtu = 2000
	l.server.spec(want)
	l.succeeded("4 VFs", "4/4")
	link, err := netlink.LinkByName("ens1f0")
	if err != nil {
		t.Fatal(err)
	}
	vf := func() netlink.Link {
		l, err := netlink.LinkByName(l.read(nic0).VFs[1].Name)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	write := func(path, value string) error { return os.WriteFile(path, []byte(value), 0) }
	address := l.read(nic0).VFs[1].PCIAddress
	driver := l.read(nic0).Driver
	right := func() string {
		pf := l.read(nic0)
		facts := fmt.Sprintf("PF MTU %d, up %t, %d VFs", pf.MTU, pf.AdminUp, len(pf.VFs))
		if len(pf.VFs) > 1 {
			v := pf.VFs[1]
			facts += fmt.Sprintf("; driver %s, netdev %t, MTU %d, MAC %s, %+v", v.Driver, v.Name != "", v.MTU, v.MAC, v.Admin)
		}
		return facts
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 0xaa, 1}
	was := right()
	for _, c := range []struct {
		what   string
		limit  time.Duration
		change func() error
	}{
		{"admin MAC", 0, func() error { return netlink.LinkSetVfHardwareAddr(link, 1, mac) }},
		{"VLAN", 0, func() error { return netlink.LinkSetVfVlan(link, 1, 77) }},
		{"trust", 0, func() error { return netlink.LinkSetVfTrust(link, 1, true) }},
		{"spoof check", 0, func() error { return netlink.LinkSetVfSpoofchk(link, 1, false) }},
		{"link state", 0, func() error { return netlink.LinkSetVfState(link, 1, 2) }},
		{"rate", 0, func() error { return netlink.LinkSetVfRate(link, 1, 0, 100) }},
		{"MTU of the VF", 0, func() error { return netlink.LinkSetMTU(vf(), 1300) }},
		{"MTU of the PF", 0, func() error { return netlink.LinkSetMTU(link, 1500) }},
		{"PF down", 0, func() error { return netlink.LinkSetDown(link) }},
		{"driver", 0, func() error { return write("/sys/bus/pci/devices/"+address+"/driver/unbind", address) }},
		// The kernel itself takes a second to remove VFs, and 0.1 s to make them.
		{"number of VFs", time.Second, func() error { return write("/sys/bus/pci/devices/"+nic0+"/sriov_numvfs", "0") }},
	} {
		t.Run(c.what, func(t *testing.T) {
			if driver != "sluicenic" && (c.what == "link state" || c.what == "rate") {
				t.Skipf("driver %s cannot set it", driver)
			}
			limit := 200*time.Millisecond + c.limit
			if driver != "sluicenic" {
				limit += 3 * time.Second // on an emulated processor, every step takes ten times as long
			}
			// On a machine that is busy with other work every step takes longer: then
			// as long as some looks at the NIC take counts. It may delay anything, but
			// hardly each time.
			for try := 1; ; try++ {
				if err := c.change(); err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				for right() != was {
					if time.Since(start) > 20*time.Second {
						t.Fatalf("not put right:\n%s, was\n%s", right(), was)
					}
					time.Sleep(2 * time.Millisecond)
				}
				d := time.Since(start)
				t.Logf("%s: put right in %s", c.what, d.Round(time.Millisecond))
				if d <= max(limit, c.limit+15*l.look()) {
					break
				}
				if try == 5 {
					t.Fatalf("put right after %s", d)
				}
				time.Sleep(time.Second)
			}
			l.succeeded("told", "4/4")
		})
	}
	t.Run("cost of a look", func(t *testing.T) {
		pf := l.read(nic0)
		for what, look := range map[string]func() error{
			"all NICs":          func() error { _, err := l.host.Inventory(t.Context()); return err },
			"one NIC":           func() error { _, _, err := l.host.ReadPF(t.Context(), nic0); return err },
			"settings of 4 VFs": func() error { return l.host.ReadVFSettings(t.Context(), &pf) },
		} {
			start := time.Now()
			for range 20 {
				if err := look(); err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("%s: %s", what, time.Since(start)/20)
		}
	})
}

// cuttingHost is a kernel whose driver loses the NIC's link while there are VFs.
type cuttingHost struct {
	*host.Host
	t *testing.T
}

func (k cuttingHost) SetNumVFs(ctx context.Context, address string, n int) error {
	err := k.Host.SetNumVFs(ctx, address, n)
	state := "up"
	if n > 0 {
		state = "down"
	}
	run(k.t, "ip", "-n", "api", "link", "set", "wire0", state)
	return err
}

// dialled is the way to a server that the guest reaches by its first NIC.
type dialled struct{ at *net.TCPAddr }

func (d dialled) Addresses(context.Context) ([]net.IP, error) { return []net.IP{d.at.IP}, nil }

func (d dialled) Reach(ctx context.Context) error {
	dialer := net.Dialer{Timeout: 500 * time.Millisecond}
	c, err := dialer.DialContext(ctx, "tcp", d.at.String())
	if err != nil {
		return err
	}
	return c.Close()
}

// The NIC by which the node reaches its API server may have VFs; when making them
// takes its link away they are removed again, and the way is open.
func TestLabCutIsTakenBack(t *testing.T) {
	l := newLab(t)
	if driver := l.read(nic0).Driver; driver != "sluicenic" {
		t.Skipf("the other side of driver %s's link is outside the guest", driver)
	}
	l.stop()
	run(t, "ip", "netns", "add", "api")
	t.Cleanup(func() {
		run(t, "ip", "-n", "api", "link", "set", "wire0", "netns", "1")
		run(t, "ip", "netns", "del", "api")
	})
	for _, args := range []string{
		"link set wire0 netns api", "-n api addr add 10.99.0.1/24 dev wire0", "-n api link set wire0 up",
		"addr add 10.99.0.2/24 dev ens1f0", "link set ens1f0 up",
	} {
		run(t, "ip", strings.Fields(args)...)
	}
	t.Cleanup(func() { run(t, "ip", "addr", "del", "10.99.0.2/24", "dev", "ens1f0") })
	var server net.Listener
	within(t, "api", func() (err error) {
		server, err = net.Listen("tcp", "10.99.0.1:6443")
		return err
	})
	t.Cleanup(func() { server.Close() })
	way := dialled{server.Addr().(*net.TCPAddr)}
	l.line = way
	want := wants(nic0, 2, of("left", "0-1", 0))

	l.restart()
	l.server.spec(want)
	l.succeeded("VFs on the only NIC", "2/2")
	l.server.spec()
	l.succeeded("none", "0/0")
	l.stop()

	l.kernel = cuttingHost{l.host, t}
	l.restart()
	l.agent.regain = 5 * time.Second
	l.server.spec(want)
	l.until("taken back", func(s v1.SriovNetworkNodeStateStatus) error {
		if !strings.Contains(s.LastSyncError, "SetNumVFs 2") || !strings.Contains(s.LastSyncError, "could not be reached") || s.Interfaces[0].NumVfs != 0 {
			return fmt.Errorf("%q", s.LastSyncError)
		}
		return nil
	})
	l.until("the way is open", func(v1.SriovNetworkNodeStateStatus) error { return way.Reach(t.Context()) })
}

// What the driver answers is in the status within a second, the other NIC is
// not held up, and when the cause is gone all comes right by itself.
func TestLabAgentTellsErrno(t *testing.T) {
	l := newLab(t)
	if driver := l.read(nic0).Driver; driver != "sluicenic" {
		t.Skipf("driver %s injects no errors", driver)
	}
	knobs := map[string]struct {
		errno int
		want  string
	}{
		"fail_sriov_enable": {12, "ENOMEM"},
		"fail_vf_probe":     {5, "driver sluicenicvf: input/output error (EIO)"},
		"fail_vf_mac":       {22, "EINVAL"},
	}
	for name, c := range knobs {
		t.Run(name, func(t *testing.T) {
			l.server.spec()
			l.succeeded("empty", "0/0")
			knob := filepath.Join("/sys/kernel/debug/sluicenic", nic0, name)
			set := func(errno int) {
				if err := os.WriteFile(knob, fmt.Appendf(nil, "%d 1000", errno), 0); err != nil {
					t.Fatal(err)
				}
			}
			set(c.errno)
			defer set(0)
			start := time.Now()
			l.server.spec(wants(nic0, 2, of("left", "0-1", 0)), wants(nic1, 2, of("right", "0-1", 0)))
			l.until("told", func(s v1.SriovNetworkNodeStateStatus) error {
				told := s.Interfaces[0].Message
				for _, vf := range s.Interfaces[0].VFs {
					told += vf.Message
				}
				if !strings.Contains(told, c.want) {
					return fmt.Errorf("%q", told)
				}
				return nil
			})
			if d := time.Since(start); d > max(time.Second, 100*l.look()) {
				t.Errorf("told after %s", d)
			}
			l.until("other NIC", func(s v1.SriovNetworkNodeStateStatus) error {
				if pf := s.Interfaces[1]; pf.NumVfs != 2 || pf.Message != "" {
					return fmt.Errorf("%+v", pf)
				}
				return nil
			})
			set(0)
			l.succeeded("recovered", "4/4")
		})
	}
}

// look is how long a look at a NIC takes now: on a busy machine all takes longer.
func (l *lab) look() time.Duration {
	l.Helper()
	start := time.Now()
	for range 5 {
		if _, _, err := l.host.ReadPF(l.Context(), nic0); err != nil {
			l.Fatal(err)
		}
	}
	return time.Since(start) / 5
}

func (l *lab) read(address string) host.PF {
	l.Helper()
	pfs, err := l.host.Inventory(context.Background())
	if err != nil {
		l.Fatal(err)
	}
	for _, pf := range pfs {
		if pf.PCIAddress == address {
			if err := l.host.ReadVFSettings(context.Background(), &pf); err != nil {
				l.Fatal(err)
			}
			return pf
		}
	}
	l.Fatalf("%s is gone", address)
	return host.PF{}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// within does something in a network namespace.
func within(t *testing.T, name string, do func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends in that namespace
		ns, err := netns.GetFromName(name)
		if err == nil {
			err = errors.Join(netns.Set(ns), ns.Close())
		}
		if err == nil {
			err = do()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("in namespace %s: %v", name, err)
	}
}

// The cable of a PF is pulled and put back: where that is asked for its VFs are off offer
// meanwhile, and nobody looks at anything but the kernel's message.
func TestLabRequireCarrier(t *testing.T) {
	const wire = "/sys/class/net/wire0" // the other end of the emulated NIC's cable
	if _, err := os.Stat(wire); err != nil {
		t.Skipf("the NIC's cable cannot be pulled: %v", err)
	}
	l := newLab(t)
	run(t, "ip", "link", "set", "wire0", "up")
	t.Cleanup(func() { run(t, "ip", "link", "set", "wire0", "up") })
	strict := of("strict", "0-0", 0)
	strict.RequireCarrier = true
	l.server.spec(wants(nic0, 2, strict, of("left", "1-1", 0)))
	l.succeeded("2 VFs", "2/2")
	for _, cable := range []string{"up", "down", "up", "down", "up"} {
		run(t, "ip", "link", "set", "wire0", cable)
		l.until("cable "+cable, func(v1.SriovNetworkNodeStateStatus) error {
			if got := l.plugin.healthy("strict"); len(got) == 1 != (cable == "up") {
				return fmt.Errorf("offered %v", got)
			}
			return nil
		})
		if got := l.plugin.healthy("left"); len(got) != 1 {
			t.Errorf("cable %s: who does not ask for a carrier is offered %v", cable, got)
		}
	}
}
