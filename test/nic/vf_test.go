//go:build lab

package nic

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestLabSysfs(t *testing.T) {
	c := cards[0]
	c.fresh(t, 0)
	total := read(t, c.dev("sriov_totalvfs"))
	vfDevice := read(t, "/sys/module/sluicenic/parameters/vf_device")
	vfDevice, _, _ = strings.Cut(vfDevice, ",")

	write(t, c.dev("sriov_numvfs"), "4")
	if got := read(t, c.dev("sriov_numvfs")); got != "4" {
		t.Errorf("sriov_numvfs is %s, want 4", got)
	}
	wantErrno(t, "change the number of VFs without 0 between", os.WriteFile(c.dev("sriov_numvfs"), []byte("2"), 0), unix.EBUSY)
	for vf := range 4 {
		pci := c.vfPCI(t, vf)
		// Routing id of a VF: PF + offset 16 + index.
		if want := fmt.Sprintf("0000:01:%02x.%d", (16+vf)/8, vf%8); pci != want {
			t.Errorf("VF %d is at %s, want %s", vf, pci, want)
		}
		dir := "/sys/bus/pci/devices/" + pci
		if got := fmt.Sprint(parseHex(t, read(t, dir+"/device"))); got != vfDevice {
			t.Errorf("VF %d has device id %s, want %s", vf, got, vfDevice)
		}
		if got, want := read(t, dir+"/vendor"), read(t, c.dev("vendor")); got != want {
			t.Errorf("VF %d has vendor id %s, want %s", vf, got, want)
		}
		phys, err := os.Readlink(dir + "/physfn")
		if err != nil || !strings.HasSuffix(phys, "/"+c.pci) {
			t.Errorf("physfn of VF %d is %q (%v), want the PF", vf, phys, err)
		}
		if !exists(c.vf(vf)) {
			t.Errorf("VF %d has no netdev %s", vf, c.vf(vf))
		}
		if err := os.WriteFile(dir+"/reset", []byte("1"), 0); err != nil {
			t.Errorf("reset VF %d: %v", vf, err)
		}
	}
	c.setVFs(t, 0)
	if exists(c.vf(0)) {
		t.Error("VF netdev is still there without VFs")
	}
	var n int
	if _, err := fmt.Sscan(total, &n); err != nil {
		t.Fatal(err)
	}
	wantErrno(t, "more VFs than there can be", os.WriteFile(c.dev("sriov_numvfs"), fmt.Append(nil, n+1), 0), unix.ERANGE)
	c.setVFs(t, n)
	if got := len(c.vfs(t)); got != n {
		t.Errorf("the PF shows %d VFs, want %d", got, n)
	}
}

func parseHex(t *testing.T, s string) (v uint) {
	t.Helper()
	if _, err := fmt.Sscanf(s, "0x%x", &v); err != nil {
		t.Fatalf("parse %q: %v", s, err)
	}
	return v
}

// TestLabVFSettings sets each setting through the PF and reads it back from
// rtnetlink and from the module's own dump.
func TestLabVFSettings(t *testing.T) {
	c := cards[0]
	c.fresh(t, 2)
	pf := link(t, c.pf)
	const addr = "02:00:00:00:00:aa"

	got := c.vfInfo(t, 1)
	if got.Vlan != 0 || got.Qos != 0 || !got.Spoofchk || got.Trust != 0 || got.LinkState != 0 || got.MaxTxRate != 0 || got.MinTxRate != 0 {
		t.Errorf("a new VF has %+v, want no VLAN, spoof check on, trust off, link auto, no rate", got)
	}
	for _, step := range []struct {
		name string
		set  func() error
		want func(netlink.VfInfo) bool
		dump string
	}{
		{"mac", func() error { return netlink.LinkSetVfHardwareAddr(pf, 1, mac(addr)) },
			func(v netlink.VfInfo) bool { return v.Mac.String() == addr }, "admin_mac=" + addr},
		{"vlan", func() error { return netlink.LinkSetVfVlanQos(pf, 1, 4094, 7) },
			func(v netlink.VfInfo) bool { return v.Vlan == 4094 && v.Qos == 7 }, "proto=802.1Q"},
		{"vlan 802.1ad", func() error { return netlink.LinkSetVfVlanQosProto(pf, 1, 100, 1, unix.ETH_P_8021AD) },
			func(v netlink.VfInfo) bool { return v.Vlan == 100 && v.Qos == 1 }, "proto=802.1ad"},
		{"no vlan", func() error { return netlink.LinkSetVfVlan(pf, 1, 0) },
			func(v netlink.VfInfo) bool { return v.Vlan == 0 && v.Qos == 0 }, "vlan=0"},
		{"spoofchk", func() error { return netlink.LinkSetVfSpoofchk(pf, 1, false) },
			func(v netlink.VfInfo) bool { return !v.Spoofchk }, "spoofchk=0"},
		{"trust", func() error { return netlink.LinkSetVfTrust(pf, 1, true) },
			func(v netlink.VfInfo) bool { return v.Trust == 1 }, "trust=1"},
		{"link", func() error { return netlink.LinkSetVfState(pf, 1, netlink.VF_LINK_STATE_DISABLE) },
			func(v netlink.VfInfo) bool { return v.LinkState == netlink.VF_LINK_STATE_DISABLE }, "link=disable"},
		{"rate", func() error { return netlink.LinkSetVfRate(pf, 1, 100, 25000) },
			func(v netlink.VfInfo) bool { return v.MinTxRate == 100 && v.MaxTxRate == 25000 }, "max_rate=25000"},
	} {
		if err := step.set(); err != nil {
			t.Errorf("set %s: %v", step.name, err)
			continue
		}
		if v := c.vfInfo(t, 1); !step.want(v) {
			t.Errorf("after %s rtnetlink says %+v", step.name, v)
		}
		k, want, _ := strings.Cut(step.dump, "=")
		if v := c.dump(t, 1)[k]; v != want {
			t.Errorf("after %s the dump says %s=%s, want %s", step.name, k, v, want)
		}
	}

	before := fmt.Sprint(c.dump(t, 1))
	wantErrno(t, "multicast MAC", netlink.LinkSetVfHardwareAddr(pf, 1, mac("01:00:00:00:00:01")), unix.EINVAL)
	wantErrno(t, "VLAN 4095", netlink.LinkSetVfVlan(pf, 1, 4095), unix.EINVAL)
	wantErrno(t, "VLAN 5000", netlink.LinkSetVfVlan(pf, 1, 5000), unix.EINVAL)
	wantErrno(t, "qos 8", netlink.LinkSetVfVlanQos(pf, 1, 10, 8), unix.EINVAL)
	wantErrno(t, "qos without VLAN", netlink.LinkSetVfVlanQos(pf, 1, 0, 1), unix.EINVAL)
	wantErrno(t, "VLAN of another protocol", netlink.LinkSetVfVlanQosProto(pf, 1, 10, 0, unix.ETH_P_IP), unix.EPROTONOSUPPORT)
	wantErrno(t, "rate above the link speed", netlink.LinkSetVfRate(pf, 1, 0, 25001), unix.EINVAL)
	wantErrno(t, "minimum above maximum", netlink.LinkSetVfRate(pf, 1, 20, 10), unix.EINVAL)
	wantErrno(t, "link state 3", netlink.LinkSetVfState(pf, 1, 3), unix.EINVAL)
	wantErrno(t, "a VF that is not there", netlink.LinkSetVfTrust(pf, 2, true), unix.EINVAL)
	if after := fmt.Sprint(c.dump(t, 1)); after != before {
		t.Errorf("refused changes left a trace:\n%s\n%s", before, after)
	}

	c.setVFs(t, 0)
	c.setVFs(t, 2)
	got = c.vfInfo(t, 1)
	if got.Mac.String() == addr || !got.Spoofchk || got.Trust != 0 || got.LinkState != 0 || got.MaxTxRate != 0 {
		t.Errorf("a VF made anew has kept %+v", got)
	}
}

func TestLabVFMAC(t *testing.T) {
	c := cards[0]
	c.fresh(t, 1)
	pf := link(t, c.pf)
	vfMAC := func() string { return link(t, c.vf(0)).Attrs().HardwareAddr.String() }
	setVF := func(addr string) error { return netlink.LinkSetHardwareAddr(link(t, c.vf(0)), mac(addr)) }
	const own, admin, other = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:03"

	random := vfMAC()
	if a := mac(random); a[0]&3 != 2 {
		t.Errorf("VF without admin MAC has %s, want a locally administered unicast address", random)
	}
	if got := c.vfInfo(t, 0).Mac.String(); got != random {
		t.Errorf("the PF shows %s for the VF, want %s", got, random)
	}
	c.rebind(t, 0)
	if vfMAC() == random {
		t.Errorf("VF without admin MAC kept %s when its driver was bound again, want a new one", random)
	}
	wantErrno(t, "VF without admin MAC sets its own", setVF(own), 0)
	if got := c.vfInfo(t, 0).Mac.String(); got != own {
		t.Errorf("the PF shows %s, want %s", got, own)
	}

	wantErrno(t, "set admin MAC", netlink.LinkSetVfHardwareAddr(pf, 0, mac(admin)), 0)
	if got := vfMAC(); got != own {
		t.Errorf("a running VF changed to %s by itself, want %s until the driver is bound again", got, own)
	}
	wantErrno(t, "untrusted VF sets another MAC", setVF(other), unix.EPERM)
	wantErrno(t, "untrusted VF sets the admin MAC", setVF(admin), 0)
	c.rebind(t, 0)
	if got := vfMAC(); got != admin {
		t.Errorf("VF has %s after its driver was bound again, want the admin MAC", got)
	}
	if got := link(t, c.vf(0)).Attrs().PermHWAddr.String(); got != admin {
		t.Errorf("permanent address is %q, want the admin MAC", got)
	}

	wantErrno(t, "trust", netlink.LinkSetVfTrust(pf, 0, true), 0)
	wantErrno(t, "trusted VF sets another MAC", setVF(other), 0)
	if got := c.vfInfo(t, 0).Mac.String(); got != other {
		t.Errorf("the PF shows %s, want %s", got, other)
	}
	wantErrno(t, "trust off", netlink.LinkSetVfTrust(pf, 0, false), 0)
	if got := c.vfInfo(t, 0).Mac.String(); got != admin {
		t.Errorf("the PF shows %s after trust went, want the admin MAC", got)
	}
	wantErrno(t, "take admin MAC back", netlink.LinkSetVfHardwareAddr(pf, 0, mac("00:00:00:00:00:00")), 0)
	if got := c.dump(t, 0)["admin_mac"]; got != "00:00:00:00:00:00" {
		t.Errorf("admin MAC is %s, want none", got)
	}
	wantErrno(t, "VF without admin MAC again", setVF(own), 0)
}

// rebind unbinds a VF's driver and binds it again.
func (c card) rebind(t *testing.T, vf int) {
	t.Helper()
	pci := c.vfPCI(t, vf)
	write(t, "/sys/bus/pci/drivers/sluicenicvf/unbind", pci)
	write(t, "/sys/bus/pci/drivers/sluicenicvf/bind", pci)
}

func TestLabLink(t *testing.T) {
	c := cards[0]
	c.fresh(t, 1)
	pf := link(t, c.pf)
	up(t, c.vf(0))
	want := func(when string, pfUp, wireUp, vfUp bool) {
		t.Helper()
		if carrier(t, c.pf) != pfUp || carrier(t, c.wire) != wireUp || carrier(t, c.vf(0)) != vfUp {
			t.Errorf("%s: carrier of PF %v wire %v VF %v, want %v %v %v", when,
				carrier(t, c.pf), carrier(t, c.wire), carrier(t, c.vf(0)), pfUp, wireUp, vfUp)
		}
	}
	state := func(s uint32) {
		t.Helper()
		if err := netlink.LinkSetVfState(pf, 0, s); err != nil {
			t.Fatal(err)
		}
	}
	want("all up", true, true, true)
	down(t, c.wire)
	want("wire down", false, false, false)
	state(netlink.VF_LINK_STATE_ENABLE)
	want("wire down, VF forced up", false, false, true)
	up(t, c.wire)
	state(netlink.VF_LINK_STATE_DISABLE)
	want("VF forced down", true, true, false)
	state(netlink.VF_LINK_STATE_AUTO)
	want("auto again", true, true, true)
	down(t, c.pf)
	want("PF down", false, false, false)
	up(t, c.pf)
	want("PF up again", true, true, true)
}

func TestLabMTU(t *testing.T) {
	c := cards[0]
	c.fresh(t, 1)
	for _, name := range []string{c.pf, c.vf(0)} {
		l := link(t, name)
		for mtu, want := range map[int]syscall.Errno{67: unix.EINVAL, 68: 0, 1500: 0, 9000: 0, maxMTU: 0, maxMTU + 1: unix.EINVAL} {
			wantErrno(t, fmt.Sprintf("MTU %d of %s", mtu, name), netlink.LinkSetMTU(l, mtu), want)
			if got := link(t, name).Attrs().MTU; want == 0 && got != mtu {
				t.Errorf("MTU of %s is %d, want %d", name, got, mtu)
			}
		}
	}
	// A frame above a VF's MTU does not reach it.
	up(t, c.vf(0))
	if err := netlink.LinkSetMTU(link(t, c.pf), maxMTU); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetMTU(link(t, c.vf(0)), 1500); err != nil {
		t.Fatal(err)
	}
	from := openTap(t, c.pf)
	long := append(frame{dst: broadcast, src: link(t, c.pf).Attrs().HardwareAddr.String()}.bytes(), make([]byte, 2000)...)
	if _, err := unix.Write(from.fd, long); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the long frame is counted as dropped", func() bool { return c.dump(t, 0)["rx_dropped"] == "1" })
}

func TestLabIdentity(t *testing.T) {
	c := cards[0]
	c.fresh(t, 1)
	e, err := ethtool.NewEthtool()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	up(t, c.vf(0))
	for name, want := range map[string]struct{ driver, bus string }{
		c.pf:    {"sluicenic", c.pci},
		c.vf(0): {"sluicenicvf", c.vfPCI(t, 0)},
	} {
		info, err := e.DriverInfo(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Driver != want.driver || info.BusInfo != want.bus || info.Version == "" || info.FwVersion == "" {
			t.Errorf("driver info of %s is %+v, want driver %s at %s with versions", name, info, want.driver, want.bus)
		}
		if speed, err := e.CmdGetMapped(name); err != nil || speed["speed"] != 25000 {
			t.Errorf("speed of %s is %d (%v), want 25000", name, speed["speed"], err)
		}
		if stats, err := e.Stats(name); err != nil || len(stats) == 0 {
			t.Errorf("statistics of %s are %v (%v)", name, stats, err)
		}
	}

	dl, err := netlink.DevLinkGetDeviceByName("pci", c.pci)
	if err != nil {
		t.Fatalf("find devlink device: %v", err)
	}
	if dl.Attrs.Eswitch.Mode != "legacy" {
		t.Errorf("eswitch mode is %q, want legacy", dl.Attrs.Eswitch.Mode)
	}
	wantErrno(t, "set legacy mode", c.setMode("legacy"), 0)
	dlInfo, err := netlink.DevlinkGetDeviceInfoByName("pci", c.pci)
	if err != nil || dlInfo.Driver != "sluicenic" || dlInfo.SerialNumber == "" {
		t.Errorf("devlink info is %+v (%v)", dlInfo, err)
	}
}
