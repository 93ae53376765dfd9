//go:build lab

package nic

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	pfDriver = "/sys/bus/pci/drivers/sluicenic"
	vfDriver = "/sys/bus/pci/drivers/sluicenicvf"
)

// TestLabFaults arms a fault of each operation: it fails as often as told, with
// the errno told, changes nothing, and then works again.
func TestLabFaults(t *testing.T) {
	c := cards[0]
	c.fresh(t, 1)
	pf := link(t, c.pf)
	for _, op := range []struct {
		name string
		do   func() error
	}{
		{"vf_mac", func() error { return netlink.LinkSetVfHardwareAddr(pf, 0, mac("02:00:00:00:00:01")) }},
		{"vf_vlan", func() error { return netlink.LinkSetVfVlan(pf, 0, 10) }},
		{"vf_spoofchk", func() error { return netlink.LinkSetVfSpoofchk(pf, 0, false) }},
		{"vf_trust", func() error { return netlink.LinkSetVfTrust(pf, 0, true) }},
		{"vf_link_state", func() error { return netlink.LinkSetVfState(pf, 0, netlink.VF_LINK_STATE_DISABLE) }},
		{"vf_rate", func() error { return netlink.LinkSetVfRate(pf, 0, 1, 2) }},
		{"mtu", func() error { return netlink.LinkSetMTU(link(t, c.vf(0)), 2000) }},
	} {
		file := c.debug("fail_" + op.name)
		t.Cleanup(func() { _ = os.WriteFile(file, []byte("0"), 0) })
		before := fmt.Sprint(c.dump(t, 0))
		write(t, file, "5")
		wantErrno(t, op.name+" with a fault", op.do(), unix.EIO)
		if after := fmt.Sprint(c.dump(t, 0)); after != before {
			t.Errorf("a failed %s left a trace:\n%s\n%s", op.name, before, after)
		}
		wantErrno(t, op.name+" after the fault", op.do(), 0)
		if after := fmt.Sprint(c.dump(t, 0)); after == before {
			t.Errorf("%s changed nothing", op.name)
		}
		if got := read(t, file); !strings.HasSuffix(got, "hits=1") {
			t.Errorf("the fault of %s says %q, want one hit", op.name, got)
		}
	}

	// "errno count skip", count 0 for ever, errno 0 disarms.
	set := func() error { return netlink.LinkSetVfTrust(pf, 0, false) }
	for _, step := range []struct {
		arm  string
		want []syscall.Errno
	}{
		{"16 2 1", []syscall.Errno{0, unix.EBUSY, unix.EBUSY, 0}},
		{"22 0", []syscall.Errno{unix.EINVAL, unix.EINVAL, unix.EINVAL, unix.EINVAL}},
		{"0", []syscall.Errno{0, 0}},
	} {
		write(t, c.debug("fail_vf_trust"), step.arm)
		for i, errno := range step.want {
			wantErrno(t, fmt.Sprintf("call %d with %q", i, step.arm), set(), errno)
		}
	}
	for _, bad := range []string{"EIO", "5000", "-5", strings.Repeat("1", 60)} {
		wantErrno(t, fmt.Sprintf("arm %q", bad), os.WriteFile(c.debug("fail_vf_trust"), []byte(bad), 0), unix.EINVAL)
	}

	write(t, c.debug("vf_op_delay_ms"), "200")
	start := time.Now()
	wantErrno(t, "slow change", set(), 0)
	if d := time.Since(start); d < 200*time.Millisecond {
		t.Errorf("a change that takes 200 ms took %v", d)
	}
	write(t, c.debug("vf_op_delay_ms"), "0")
}

func TestLabFaultsOfCreation(t *testing.T) {
	c := cards[0]
	c.fresh(t, 0)
	write(t, c.debug("fail_sriov_enable"), "12")
	wantErrno(t, "enable with a fault", os.WriteFile(c.dev("sriov_numvfs"), []byte("3"), 0), unix.ENOMEM)
	if got := read(t, c.dev("sriov_numvfs")); got != "0" {
		t.Errorf("sriov_numvfs is %s after a failure, want 0", got)
	}
	// The second of three VFs is refused by its driver; the VF stays without netdev.
	write(t, c.debug("fail_vf_probe"), "5 1 1")
	c.setVFs(t, 3)
	for vf, want := range []bool{true, false, true} {
		if exists(c.vf(vf)) != want {
			t.Errorf("netdev of VF %d is there: %v, want %v", vf, !want, want)
		}
	}
	write(t, vfDriver+"/bind", c.vfPCI(t, 1))
	if !exists(c.vf(1)) {
		t.Error("VF 1 has no netdev after it was bound by hand")
	}
}

func TestLabDriverBinding(t *testing.T) {
	c := cards[0]
	c.fresh(t, 0)
	write(t, c.dev("sriov_drivers_autoprobe"), "0")
	t.Cleanup(func() { _ = os.WriteFile(c.dev("sriov_drivers_autoprobe"), []byte("1"), 0) })
	c.setVFs(t, 2)
	pci := c.vfPCI(t, 0)
	dir := "/sys/bus/pci/devices/" + pci
	if exists(c.vf(0)) {
		t.Error("VF 0 has a driver, want none without autoprobe")
	}
	if got := c.vfInfo(t, 0).Mac.String(); got != "00:00:00:00:00:00" {
		t.Errorf("a VF that no driver has touched has MAC %s, want none", got)
	}
	write(t, dir+"/driver_override", "vfio-pci")
	wantErrno(t, "bind against driver_override", os.WriteFile(vfDriver+"/bind", []byte(pci), 0), unix.ENODEV)
	write(t, dir+"/driver_override", "\n")
	// Kernel rule (pci_device_can_probe): without autoprobe only an override binds.
	wantErrno(t, "bind without autoprobe", os.WriteFile(vfDriver+"/bind", []byte(pci), 0), unix.ENODEV)
	write(t, dir+"/driver_override", "sluicenicvf")
	// Settings live in the PF: those made before a driver came count.
	pf := link(t, c.pf)
	for what, err := range map[string]error{
		"mac":  netlink.LinkSetVfHardwareAddr(pf, 0, mac("02:00:00:00:00:07")),
		"vlan": netlink.LinkSetVfVlan(pf, 0, 7),
		"link": netlink.LinkSetVfState(pf, 0, netlink.VF_LINK_STATE_DISABLE),
	} {
		wantErrno(t, what+" of a VF without driver", err, 0)
	}
	write(t, vfDriver+"/bind", pci)
	l := link(t, c.vf(0))
	if got := l.Attrs().HardwareAddr.String(); got != "02:00:00:00:00:07" {
		t.Errorf("VF 0 came with %s, want the admin MAC", got)
	}
	up(t, c.vf(0))
	if carrier(t, c.vf(0)) {
		t.Error("VF 0 has a carrier, want none: its link is disabled")
	}
	c.rebind(t, 0)
	if got := c.vfInfo(t, 0); got.Vlan != 7 || got.LinkState != netlink.VF_LINK_STATE_DISABLE {
		t.Errorf("binding the driver again changed the VF to %+v", got)
	}

	// The PF's driver takes the VFs along, the cable and the address stay.
	addr := link(t, c.pf).Attrs().HardwareAddr.String()
	write(t, pfDriver+"/unbind", c.pci)
	if exists(c.pf) || exists(c.vf(0)) || !exists(c.wire) {
		t.Error("after the PF's driver was unbound: want no PF, no VF, and the wire")
	}
	if carrier(t, c.wire) {
		t.Error("the wire has a carrier without PF")
	}
	write(t, pfDriver+"/bind", c.pci)
	if got := link(t, c.pf).Attrs().HardwareAddr.String(); got != addr {
		t.Errorf("the PF came back with %s, want its own %s", got, addr)
	}
	if got := read(t, c.dev("sriov_numvfs")); got != "0" {
		t.Errorf("sriov_numvfs is %s, want 0", got)
	}
}

func TestLabNameTaken(t *testing.T) {
	c := cards[0]
	c.fresh(t, 0)
	d := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: c.vf(0)}}
	if err := netlink.LinkAdd(d); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(d) })
	c.setVFs(t, 1)
	names, err := os.ReadDir("/sys/bus/pci/devices/" + c.vfPCI(t, 0) + "/net")
	if err != nil || len(names) != 1 || !strings.HasPrefix(names[0].Name(), "eth") {
		t.Errorf("VF whose name is taken has netdevs %v (%v), want one ethN", names, err)
	}
}

// newNS makes a network namespace that lives until its handle is closed.
func newNS(t *testing.T) netns.NsHandle {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(home); err != nil {
		t.Fatal(err)
	}
	return ns
}

func TestLabNamespaces(t *testing.T) {
	c := cards[0]
	c.fresh(t, 2)
	ns := newNS(t)
	for vf := range 2 {
		if err := netlink.LinkSetNsFd(link(t, c.vf(vf)), int(ns)); err != nil {
			t.Fatalf("move VF %d: %v", vf, err)
		}
	}
	if exists(c.vf(0)) {
		t.Error("the VF is still in the first namespace")
	}
	// The PF sees and rules the VF wherever it is.
	wantErrno(t, "VLAN of a VF in another namespace", netlink.LinkSetVfVlan(link(t, c.pf), 0, 5), 0)
	ns.Close()
	eventually(t, "the VFs come back when their namespace ends", func() bool { return exists(c.vf(0)) && exists(c.vf(1)) })
	if got := c.dump(t, 0)["vlan"]; got != "5" {
		t.Errorf("VLAN is %s after the namespace ended, want 5", got)
	}

	ns = newNS(t)
	defer ns.Close()
	if err := netlink.LinkSetNsFd(link(t, c.vf(0)), int(ns)); err != nil {
		t.Fatal(err)
	}
	c.setVFs(t, 0)
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if _, err := h.LinkByName(c.vf(0)); err == nil {
		t.Error("the VF's netdev is still in its namespace without VFs")
	}
}

// station puts a VF into a namespace of its own with an address.
func station(t *testing.T, c card, vf int, cidr string) netns.NsHandle {
	t.Helper()
	ns := newNS(t)
	t.Cleanup(func() { ns.Close() })
	name := c.vf(vf)
	if err := netlink.LinkSetNsFd(link(t, name), int(ns)); err != nil {
		t.Fatal(err)
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		t.Fatal(err)
	}
	l, err := h.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.AddrAdd(l, addr); err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
	return ns
}

// inNS runs f on a thread of the namespace; sockets made there belong to it.
func inNS(t *testing.T, ns netns.NsHandle, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := netns.Set(ns)
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("enter namespace: %v", err)
	}
}

// TestLabBulk sends TCP data over every path and compares it: segmentation and
// checksums are left to the receiver, so this is where a wrong one shows.
func TestLabBulk(t *testing.T) {
	for _, c := range cards {
		c.fresh(t, 2)
	}
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "brt"}}
	if err := netlink.LinkAdd(br); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(br) })
	up(t, "brt")
	for _, c := range cards {
		if err := netlink.LinkSetMaster(link(t, c.wire), br); err != nil {
			t.Fatal(err)
		}
	}
	one := station(t, cards[0], 0, "10.9.0.1/24")
	same := station(t, cards[0], 1, "10.9.0.2/24")
	far := station(t, cards[1], 0, "10.9.0.3/24")

	for _, run := range []struct {
		name string
		vlan int
		to   netns.NsHandle
		addr string
	}{
		{"VF to VF of one card", 0, same, "10.9.0.2"},
		{"VF to VF of another card", 0, far, "10.9.0.3"},
		{"the same in a VLAN", 30, far, "10.9.0.3"},
	} {
		t.Run(run.name, func(t *testing.T) {
			for _, c := range cards {
				if err := netlink.LinkSetVfVlan(link(t, c.pf), 0, run.vlan); err != nil {
					t.Fatal(err)
				}
			}
			transfer(t, one, run.to, run.addr)
		})
	}
}

// TestLabSwitchdevBulk does the same through representors, which a bridge joins.
func TestLabSwitchdevBulk(t *testing.T) {
	c := cards[0]
	t.Cleanup(func() { c.fresh(t, 0) })
	c.switchdev(t, 2)
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "brt"}}
	if err := netlink.LinkAdd(br); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(br) })
	up(t, "brt")
	for vf := range 2 {
		up(t, c.rep(vf))
		if err := netlink.LinkSetMaster(link(t, c.rep(vf)), br); err != nil {
			t.Fatal(err)
		}
	}
	transfer(t, station(t, c, 0, "10.9.0.1/24"), station(t, c, 1, "10.9.0.2/24"), "10.9.0.2")
}

// transfer sends data from one namespace to an address of another and compares it.
func transfer(t *testing.T, from, to netns.NsHandle, addr string) {
	t.Helper()
	const size = 32 << 20
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i * i >> 3)
	}
	var l net.Listener
	var err error
	inNS(t, to, func() { l, err = net.Listen("tcp4", addr+":5001") })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sum := make(chan []byte, 1)
	go func() {
		h := sha256.New()
		if conn, err := l.Accept(); err == nil {
			_, _ = io.Copy(h, conn)
			conn.Close()
		}
		sum <- h.Sum(nil)
	}()
	var conn net.Conn
	inNS(t, from, func() { conn, err = net.DialTimeout("tcp4", addr+":5001", 20*time.Second) })
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if _, err := conn.Write(data); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	want := sha256.Sum256(data)
	if got := <-sum; !bytes.Equal(got, want[:]) {
		t.Error("the data arrived changed")
	}
	t.Logf("%.0f Mbit/s", size*8/1e6/time.Since(start).Seconds())
}

// TestLabUnplug takes the PF off the bus with its VFs, as a surprise removal does.
func TestLabUnplug(t *testing.T) {
	c := cards[1]
	c.fresh(t, 3)
	write(t, c.dev("remove"), "1")
	if exists(c.pf) || exists(c.vf(0)) {
		t.Error("the netdevs outlived the card")
	}
	write(t, "/sys/bus/pci/rescan", "1")
	eventually(t, "the card is back after a rescan", func() bool { return exists(c.pf) })
	c.fresh(t, 1)
}

// TestLabTurmoil changes all that can change under traffic from every side. It
// asserts little itself: TestMain reads what the kernel had to say.
func TestLabTurmoil(t *testing.T) {
	c := cards[0]
	c.fresh(t, 4)
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	flood := func(p tap) {
		wg.Go(func() {
			f := frame{dst: broadcast, src: "02:00:00:00:00:01"}
			for ctx.Err() == nil {
				for range 50 {
					_ = p.send(f) // the netdev comes and goes
					f.tags = nil
					if f.seq++; f.seq%3 == 0 {
						f.tags = []tag{{unix.ETH_P_8021Q, 10, 0}}
					}
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	flood(openTap(t, c.pf))
	flood(openTap(t, c.wire))
	for round := range 3 {
		for vf := range 4 {
			up(t, c.vf(vf))
			flood(openTap(t, c.vf(vf)))
		}
		ns := newNS(t)
		for i := range 30 {
			pf, vf := link(t, c.pf), i%4
			_ = netlink.LinkSetVfHardwareAddr(pf, vf, mac(fmt.Sprintf("02:00:00:00:00:%02x", i%8)))
			_ = netlink.LinkSetVfVlanQosProto(pf, vf, []int{0, 10}[i%2], 0, unix.ETH_P_8021Q)
			_ = netlink.LinkSetVfState(pf, vf, uint32(i%3))
			_ = netlink.LinkSetVfTrust(pf, vf, i%2 == 0)
			_ = netlink.LinkSetVfSpoofchk(pf, vf, i%5 == 0)
			if i%6 == 0 {
				c.rebind(t, vf)
				up(t, c.vf(vf))
			}
		}
		if err := netlink.LinkSetNsFd(link(t, c.vf(3)), int(ns)); err != nil {
			t.Fatal(err)
		}
		if round%2 == 0 {
			ns.Close()
			eventually(t, "the VF comes back", func() bool { return exists(c.vf(3)) })
		}
		switch round {
		case 0:
			c.setVFs(t, 0)
		case 1:
			write(t, pfDriver+"/unbind", c.pci)
			write(t, pfDriver+"/bind", c.pci)
			ns.Close()
		case 2:
			write(t, c.dev("remove"), "1")
			write(t, "/sys/bus/pci/rescan", "1")
		}
		eventually(t, "the PF is there", func() bool { return exists(c.pf) })
		c.fresh(t, 4)
	}
	stop()
	wg.Wait()
}

// TestLabReload unloads the module with VFs in use and loads it as it was.
func TestLabReload(t *testing.T) {
	const file = "/lib/sluice/sluicenic.ko" // where the guest keeps its own modules
	ko, err := os.Open(file)
	if err != nil {
		t.Fatalf("open the module to load it again: %v", err)
	}
	defer ko.Close()
	dir, err := os.ReadDir("/sys/module/sluicenic/parameters")
	if err != nil {
		t.Fatal(err)
	}
	var params []string
	for _, p := range dir {
		params = append(params, p.Name()+"="+read(t, "/sys/module/sluicenic/parameters/"+p.Name()))
	}
	for range 2 {
		cards[0].fresh(t, 2)
		up(t, cards[0].vf(0))
		cards[1].switchdev(t, 2)
		up(t, cards[1].rep(0))
		wantErrno(t, "add a vDPA device", netlink.VDPANewDev("v", "pci", cards[1].vfPCI(t, 0), netlink.VDPANewDevParams{}), 0)
		ns := newNS(t)
		if err := netlink.LinkSetNsFd(link(t, cards[0].vf(1)), int(ns)); err != nil {
			t.Fatal(err)
		}
		if err := unix.DeleteModule("sluicenic", 0); err != nil {
			t.Fatalf("unload the module: %v", err)
		}
		ns.Close()
		for _, c := range cards {
			if exists(c.pf) || exists(c.wire) || exists(c.rep(0)) {
				t.Errorf("netdevs of card %s outlived the module", c.pci)
			}
			if _, err := os.Stat(c.dev()); err == nil {
				t.Errorf("the card at %s outlived the module", c.pci)
			}
		}
		if _, err := os.Stat("/sys/kernel/debug/sluicenic"); err == nil {
			t.Error("the module's debugfs folder outlived it")
		}
		for _, bad := range []string{"cards=0", "cards=9", "total_vfs=0", "total_vfs=65", "pf_name=%x", "vf_name=a-very-long-name%v", "rep_name=rep%n", "wire_name=a/b%i"} {
			if err := unix.FinitModule(int(ko.Fd()), bad, 0); err == nil {
				t.Errorf("the module loaded with %q", bad)
				_ = unix.DeleteModule("sluicenic", 0)
			}
		}
		if err := unix.FinitModule(int(ko.Fd()), strings.Join(params, " "), 0); err != nil {
			t.Fatalf("load the module with %q: %v", params, err)
		}
	}
}
