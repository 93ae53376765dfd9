//go:build lab

package nic

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// switchdev gives the card n VFs in switchdev mode, with their drivers.
func (c card) switchdev(t *testing.T, n int) {
	t.Helper()
	c.fresh(t, 0)
	wantErrno(t, "set switchdev mode", c.setMode("switchdev"), 0)
	c.setVFs(t, n)
}

func (c card) bound(t *testing.T, vf int, on bool) {
	t.Helper()
	file := "/unbind"
	if on {
		file = "/bind"
	}
	write(t, vfDriver+file, c.vfPCI(t, vf))
}

func (c card) mode(t *testing.T) string {
	t.Helper()
	dl, err := netlink.DevLinkGetDeviceByName("pci", c.pci)
	if err != nil {
		t.Fatal(err)
	}
	return dl.Attrs.Eswitch.Mode
}

// ports are the card's devlink ports, "flavour netdev" in the order of their indexes.
func (c card) ports(t *testing.T) []string {
	t.Helper()
	list, err := netlink.DevLinkGetAllPortList()
	if err != nil {
		t.Fatal(err)
	}
	list = slices.DeleteFunc(list, func(p *netlink.DevlinkPort) bool { return p.DeviceName != c.pci })
	slices.SortFunc(list, func(a, b *netlink.DevlinkPort) int { return int(a.PortIndex) - int(b.PortIndex) })
	var out []string
	for _, p := range list {
		// enum devlink_port_flavour in uapi/linux/devlink.h
		flavour := map[uint16]string{0: "physical", 4: "pcivf"}[p.PortFlavour]
		if p.VfNumber != nil {
			flavour += fmt.Sprint(*p.VfNumber)
		}
		out = append(out, flavour+" "+p.NetdeviceName)
	}
	return out
}

// netdevs are what the PF's folder in sysfs lists, "phys_port_name name" sorted.
func (c card) netdevs(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(c.dev("net"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, read(t, c.dev("net", e.Name(), "phys_port_name"))+" "+e.Name())
	}
	slices.Sort(out)
	return out
}

// looks compares mode, devlink ports and netdevs with what n VFs in the mode mean.
func (c card) looks(t *testing.T, when, mode string, n int) {
	t.Helper()
	ports, netdevs := []string{"physical " + c.pf}, []string{"p0 " + c.pf}
	if mode == "switchdev" {
		for vf := range n {
			ports = append(ports, fmt.Sprintf("pcivf%d %s", vf, c.rep(vf)))
			netdevs = append(netdevs, fmt.Sprintf("pf0vf%d %s", vf, c.rep(vf)))
		}
	}
	slices.Sort(netdevs)
	if got := c.mode(t); got != mode {
		t.Errorf("%s: mode %s, want %s", when, got, mode)
	}
	if got := c.ports(t); !slices.Equal(got, ports) {
		t.Errorf("%s: devlink ports %q, want %q", when, got, ports)
	}
	if got := c.netdevs(t); !slices.Equal(got, netdevs) {
		t.Errorf("%s: netdevs of the PF %q, want %q", when, got, netdevs)
	}
	id, err := os.ReadFile(filepath.Join("/sys/class/net", c.pf, "phys_switch_id"))
	if mode == "legacy" {
		wantErrno(t, when+": switch id of the PF", err, unix.EOPNOTSUPP)
		return
	}
	for vf := range n {
		if got := read(t, filepath.Join("/sys/class/net", c.rep(vf), "phys_switch_id")); err != nil || got == "" || got != strings.TrimSpace(string(id)) {
			t.Errorf("%s: switch id of representor %d is %q, of the uplink %q (%v)", when, vf, got, id, err)
		}
	}
}

// TestLabSwitchdev goes there and back: what must be so before, and what there is after.
func TestLabSwitchdev(t *testing.T) {
	c := cards[0]
	c.fresh(t, 2)
	pf := link(t, c.pf)
	t.Cleanup(func() { c.fresh(t, 0) })
	wantErrno(t, "set an admin MAC", netlink.LinkSetVfHardwareAddr(pf, 1, mac("02:00:00:00:00:aa")), 0)
	wantErrno(t, "set a VLAN", netlink.LinkSetVfVlan(pf, 0, 100), 0)
	c.looks(t, "at first", "legacy", 2)
	wantErrno(t, "with VFs bound", c.setMode("switchdev"), unix.EBUSY)
	c.bound(t, 0, false)
	wantErrno(t, "with a VF bound", c.setMode("switchdev"), unix.EBUSY)
	c.looks(t, "after refusals", "legacy", 2)
	c.bound(t, 1, false)

	write(t, c.debug("fail_eswitch_mode"), "28")
	wantErrno(t, "with a fault", c.setMode("switchdev"), unix.ENOSPC)
	c.looks(t, "after a fault", "legacy", 2)
	wantErrno(t, "after it", c.setMode("switchdev"), 0)
	c.looks(t, "switchdev", "switchdev", 2)
	if got := link(t, c.pf).Attrs().Index; got != pf.Attrs().Index {
		t.Errorf("the PF's netdev was made anew: index %d, was %d", got, pf.Attrs().Index)
	}
	wantErrno(t, "the mode there is", c.setMode("switchdev"), 0)

	// As mlx5: what the host's rules say in this mode is refused, the rest is not.
	wantErrno(t, "VLAN", netlink.LinkSetVfVlan(pf, 0, 10), unix.EOPNOTSUPP)
	wantErrno(t, "no VLAN", netlink.LinkSetVfVlan(pf, 0, 0), 0)
	wantErrno(t, "spoof check", netlink.LinkSetVfSpoofchk(pf, 0, false), unix.EOPNOTSUPP)
	wantErrno(t, "trust", netlink.LinkSetVfTrust(pf, 0, true), unix.EOPNOTSUPP)
	wantErrno(t, "rate", netlink.LinkSetVfRate(pf, 0, 0, 100), 0)
	wantErrno(t, "MAC", netlink.LinkSetVfHardwareAddr(pf, 0, mac("02:00:00:00:00:bb")), 0)
	c.bound(t, 0, true)
	c.bound(t, 1, true)
	for vf, want := range []string{"02:00:00:00:00:bb", "02:00:00:00:00:aa"} {
		if got := link(t, c.vf(vf)).Attrs().HardwareAddr.String(); got != want {
			t.Errorf("VF %d has MAC %s, want %s", vf, got, want)
		}
	}

	// A VF's link is its representor being up.
	up(t, c.vf(0))
	for _, on := range []bool{false, true, false} {
		if on {
			up(t, c.rep(0))
		} else {
			down(t, c.rep(0))
		}
		if carrier(t, c.vf(0)) != on || carrier(t, c.rep(0)) != on {
			t.Errorf("with the representor up=%v: carrier of VF %v, of representor %v", on, carrier(t, c.vf(0)), carrier(t, c.rep(0)))
		}
	}
	ns := newNS(t)
	defer ns.Close()
	wantErrno(t, "move a representor", netlink.LinkSetNsFd(link(t, c.rep(0)), int(ns)), unix.EINVAL)

	wantErrno(t, "back with VFs bound", c.setMode("legacy"), unix.EBUSY)
	c.bound(t, 0, false)
	c.bound(t, 1, false)
	write(t, c.debug("fail_eswitch_mode"), "5")
	wantErrno(t, "back with a fault", c.setMode("legacy"), unix.EIO)
	c.looks(t, "after a fault on the way back", "switchdev", 2)
	wantErrno(t, "back", c.setMode("legacy"), 0)
	c.looks(t, "back", "legacy", 2)
	if v := c.vfInfo(t, 0); v.Vlan != 100 || !v.Spoofchk || v.LinkState != netlink.VF_LINK_STATE_AUTO {
		t.Errorf("back in legacy mode the VF has %+v, want what it had there, and link state auto", v)
	}
	c.bound(t, 0, true)
	up(t, c.vf(0))
	if !carrier(t, c.vf(0)) {
		t.Error("back in legacy mode the VF has no link")
	}
}

// TestLabSwitchdevVFs changes what representors stand for.
func TestLabSwitchdevVFs(t *testing.T) {
	c := cards[0]
	t.Cleanup(func() { c.fresh(t, 0) })
	c.switchdev(t, 3)
	c.looks(t, "3 VFs", "switchdev", 3)
	c.setVFs(t, 0)
	c.looks(t, "no VFs", "switchdev", 0)
	c.setVFs(t, 1)
	c.looks(t, "1 VF", "switchdev", 1)
	if !exists(c.vf(0)) {
		t.Error("the VF made in switchdev mode has no netdev")
	}
	c.setVFs(t, 0)
	write(t, c.debug("fail_sriov_enable"), "12")
	wantErrno(t, "VFs with a fault", os.WriteFile(c.dev("sriov_numvfs"), []byte("2"), 0), unix.ENOMEM)
	c.looks(t, "after a fault", "switchdev", 0)
	wantErrno(t, "legacy mode without VFs", c.setMode("legacy"), 0)
	wantErrno(t, "switchdev mode without VFs", c.setMode("switchdev"), 0)
	c.setVFs(t, 2)

	// The mode is the PF driver's: it ends with it, and with the device.
	write(t, pfDriver+"/unbind", c.pci)
	if exists(c.rep(0)) || exists(c.pf) {
		t.Error("netdevs outlived the PF's driver")
	}
	write(t, pfDriver+"/bind", c.pci)
	c.looks(t, "bound again", "legacy", 0)
	c.switchdev(t, 2)
	write(t, c.dev("remove"), "1")
	if exists(c.rep(0)) || exists(c.pf) {
		t.Error("netdevs outlived the device")
	}
	write(t, "/sys/bus/pci/rescan", "1")
	eventually(t, "the card is back", func() bool { return exists(c.pf) })
	c.looks(t, "found again", "legacy", 0)
}

// TestLabSwitchdevPath sends frames into each end: without the host's help there are
// only two kinds of ways, VF to representor and uplink to wire.
func TestLabSwitchdevPath(t *testing.T) {
	c := cards[0]
	t.Cleanup(func() { c.fresh(t, 0) })
	const vfs = 2
	c.switchdev(t, vfs)
	const a0, a1, foreign = "02:00:00:00:01:00", "02:00:00:00:01:01", "02:00:00:00:ff:01"
	ends := []string{c.pf, c.wire}
	for vf, addr := range []string{a0, a1} {
		if err := netlink.LinkSetVfHardwareAddr(link(t, c.pf), vf, mac(addr)); err != nil {
			t.Fatal(err)
		}
		c.rebind(t, vf)
		up(t, c.vf(vf))
		up(t, c.rep(vf))
		ends = append(ends, c.vf(vf), c.rep(vf))
	}
	taps := map[string]tap{}
	for _, name := range ends {
		waitLink(t, name, true)
		taps[name] = openTap(t, name)
	}
	seq := uint64(0)
	expect := func(what, from string, f frame, at ...string) {
		t.Helper()
		seq++
		f.seq = seq
		if err := taps[from].send(f); err != nil {
			t.Fatalf("%s: send: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
		for name, p := range taps {
			var got []string
			for _, g := range p.received(t) {
				got = append(got, g.String())
			}
			var want []string
			if slices.Contains(at, name) {
				want = []string{f.String()}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s: %s received %v, want %v", what, name, got, want)
			}
		}
	}
	vlan := []tag{{unix.ETH_P_8021Q, 10, 3}}
	expect("VF to all", c.vf(0), frame{dst: broadcast, src: a0}, c.rep(0))
	expect("VF to another VF", c.vf(0), frame{dst: a1, src: a0}, c.rep(0))
	expect("VF to the wire, with a foreign address and a tag", c.vf(1), frame{dst: foreign, src: foreign, tags: vlan}, c.rep(1))
	expect("representor to its VF", c.rep(0), frame{dst: a0, src: foreign}, c.vf(0))
	expect("representor to all", c.rep(1), frame{dst: broadcast, src: foreign}, c.vf(1))
	expect("representor to another's VF", c.rep(0), frame{dst: a1, src: foreign})
	expect("representor into a VLAN the VF has not", c.rep(0), frame{dst: a0, src: foreign, tags: vlan})
	expect("uplink to a VF's address", c.pf, frame{dst: a0, src: foreign}, c.wire)
	expect("uplink to all", c.pf, frame{dst: broadcast, src: foreign, tags: vlan}, c.wire)
	expect("wire to a VF's address", c.wire, frame{dst: a0, src: foreign}, c.pf)
	expect("wire to all in a VLAN", c.wire, frame{dst: broadcast, src: foreign, tags: vlan}, c.pf)

	down(t, c.rep(1))
	expect("to a VF whose representor is down", c.pf, frame{dst: a1, src: foreign}, c.wire)
	down(t, c.vf(1))
	up(t, c.rep(1))
	expect("to a VF that is down", c.rep(1), frame{dst: a1, src: foreign})
	up(t, c.vf(1))
	waitLink(t, c.vf(1), true)

	// The host forwards: a bridge of uplink and representors makes one network.
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "brt"}}
	if err := netlink.LinkAdd(br); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(br) })
	up(t, "brt")
	for _, name := range []string{c.pf, c.rep(0), c.rep(1)} {
		if err := netlink.LinkSetMaster(link(t, name), br); err != nil {
			t.Fatal(err)
		}
	}
	reach := func(what, from string, f frame, at string) {
		t.Helper()
		eventually(t, what, func() bool {
			if err := taps[from].send(f); err != nil {
				t.Fatal(err)
			}
			return len(taps[at].received(t)) > 0
		})
	}
	reach("a VF reaches the other over the bridge", c.vf(0), frame{dst: a1, src: a0}, c.vf(1))
	reach("a VF reaches the wire over the bridge", c.vf(0), frame{dst: foreign, src: a0}, c.wire)
	reach("the wire reaches a VF over the bridge", c.wire, frame{dst: a0, src: foreign}, c.vf(0))
}

// TestLabVDPA gives a VF of a switchdev card its vDPA device.
func TestLabVDPA(t *testing.T) {
	c := cards[0]
	c.fresh(t, 1)
	t.Cleanup(func() { c.fresh(t, 0) })
	add := func(name string, pairs uint16) error {
		return netlink.VDPANewDev(name, "pci", c.vfPCI(t, 0), netlink.VDPANewDevParams{MaxVQP: pairs})
	}
	wantErrno(t, "in legacy mode", add("v", 1), unix.ENODEV)
	c.switchdev(t, 1)
	mgmt, err := netlink.VDPAGetMGMTDevByBusAndName("pci", c.vfPCI(t, 0))
	if err != nil || mgmt.MaxVQS != 16 {
		t.Errorf("the management device is %+v, want 16 virtqueues: %v", mgmt, err)
	}
	wantErrno(t, "more virtqueues than there are", add("v", 9), unix.EINVAL)
	wantErrno(t, "a device", add("v", 8), 0)
	wantErrno(t, "a second device", add("w", 1), unix.ENOSPC)
	config, err := netlink.VDPAGetDevConfigByName("v")
	if want := link(t, c.vf(0)).Attrs().HardwareAddr.String(); err != nil || config.Net.Cfg.MACAddr.String() != want {
		t.Errorf("the device has %+v, want the VF's MAC %s: %v", config, want, err)
	}
	if got := read(t, "/sys/bus/pci/devices/"+c.vfPCI(t, 0)+"/v/uevent"); !strings.Contains(got, "DRIVER=") {
		t.Errorf("no driver of the vdpa bus took the device: %q", got)
	}
	wantErrno(t, "remove it", netlink.VDPADelDev("v"), 0)
	wantErrno(t, "another", add("w", 1), 0)
	c.bound(t, 0, false)
	wantErrno(t, "without the VF's driver", netlink.VDPADelDev("w"), unix.ENODEV)
	wantErrno(t, "legacy mode after it", c.setMode("legacy"), 0)
}

// TestLabSwitchdevTurmoil changes the mode under traffic from every side; what the
// kernel says of it is for TestMain.
func TestLabSwitchdevTurmoil(t *testing.T) {
	c := cards[0]
	c.fresh(t, 0)
	t.Cleanup(func() { c.fresh(t, 0) })
	stop := make(chan struct{})
	done := make(chan struct{})
	flood := func(p tap) {
		go func() {
			defer func() { done <- struct{}{} }()
			f := frame{dst: broadcast, src: "02:00:00:00:00:01"}
			for {
				select {
				case <-stop:
					return
				default:
				}
				for range 20 {
					_ = p.send(f) // the netdev comes and goes
				}
				time.Sleep(time.Millisecond)
			}
		}()
	}
	floods := 2
	flood(openTap(t, c.pf))
	flood(openTap(t, c.wire))
	for range 3 {
		c.switchdev(t, 3)
		for vf := range 3 {
			up(t, c.rep(vf))
			up(t, c.vf(vf))
			flood(openTap(t, c.rep(vf)))
			flood(openTap(t, c.vf(vf)))
			floods += 2
		}
		for vf := range 3 {
			c.bound(t, vf, false)
		}
		for _, mode := range []string{"legacy", "switchdev", "legacy"} {
			wantErrno(t, mode, c.setMode(mode), 0)
		}
		c.bound(t, 1, true)
		up(t, c.vf(1))
		c.setVFs(t, 0)
	}
	close(stop)
	for range floods {
		<-done
	}
	c.looks(t, "in the end", "legacy", 0)
}
