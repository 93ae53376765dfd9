package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// TestVFSettingsRoundTrip encodes settings as a request and reads them back as
// an answer: the kernel uses the same attributes both ways.
func TestVFSettingsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := VFSettings{
			MAC:  rapid.SliceOfN(rapid.Byte(), 6, 6).Draw(t, "mac"),
			VLAN: rapid.IntRange(0, 4094).Draw(t, "vlan"), VLANProto: Dot1Q,
			SpoofChk: rapid.Bool().Draw(t, "spoofchk"), Trust: rapid.Bool().Draw(t, "trust"),
			LinkState: LinkState(rapid.IntRange(0, 2).Draw(t, "link_state")),
			MinTxRate: rapid.IntRange(0, 1<<31-1).Draw(t, "min"), MaxTxRate: rapid.IntRange(0, 1<<31-1).Draw(t, "max"),
		}
		if want.VLAN > 0 {
			want.VLANQoS = rapid.IntRange(0, 7).Draw(t, "qos")
			want.VLANProto = rapid.SampledFrom([]VLANProto{Dot1Q, Dot1AD}).Draw(t, "proto")
		}
		index := rapid.IntRange(0, 255).Draw(t, "vf")
		all := map[int]VFSettings{}
		err := parseVFInfo(vfAnswer(index, want), all)
		got, ok := all[index]
		if err != nil || !ok || len(all) != 3 || DiffVFSettings(got, want) != nil || !bytes.Equal(got.MAC, want.MAC) {
			t.Fatalf("wrote %+v, read %+v, %v, %v", want, got, ok, err)
		}
	})
}

// vfAnswer is a link message that tells of the VF, and of two others.
func vfAnswer(index int, settings VFSettings) []byte {
	list := nl.NewRtAttr(unix.IFLA_VFINFO_LIST|unix.NLA_F_NESTED, nil)
	// The kernel leaves out VFs: the number counts, not the place.
	for _, vf := range []int{index + 7, index, index + 1} {
		info := list.AddRtAttr(nl.IFLA_VF_INFO|unix.NLA_F_NESTED, nil)
		s := settings
		if vf != index {
			s = VFSettings{VLAN: 1, Trust: !settings.Trust}
		}
		for _, attr := range vfAttrs {
			attr.encode(info, uint32(vf), s)
		}
		// answers have VLAN and priority here; requests only in the list
		info.AddRtAttr(nl.IFLA_VF_VLAN, u32(uint32(vf), uint32(s.VLAN), uint32(s.VLANQoS)))
	}
	return append(make([]byte, unix.SizeofIfInfomsg), list.Serialize()...)
}

func TestDiffVFSettings(t *testing.T) {
	a := VFSettings{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, VLAN: 5, VLANQoS: 1, VLANProto: Dot1AD, Trust: true}
	if d := DiffVFSettings(a, a); d != nil {
		t.Errorf("differs from itself: %v", d)
	}
	b := a
	b.MAC, b.VLAN, b.Trust = nil, 0, false
	want := []string{"vlan of the VF is 5 qos 1 proto 0x88a8, not 0", "trust of the VF is on, not off"}
	if d := DiffVFSettings(a, b); !slices.Equal(d, want) {
		t.Errorf("got %q", d)
	}
}

func FuzzParseVFInfo(f *testing.F) {
	f.Add(make([]byte, 40))
	f.Add(vfAnswer(3, VFSettings{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, VLAN: 5, VLANProto: Dot1AD, Trust: true, MaxTxRate: 100}))
	f.Fuzz(func(t *testing.T, m []byte) {
		all := map[int]VFSettings{}
		_ = parseVFInfo(m, all)
		for vf, s := range all {
			_ = s.Text(s.Drift())
			if vf < 0 {
				t.Errorf("VF %d", vf)
			}
		}
	})
}

func TestAnnouncements(t *testing.T) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	arp := announcement(mac, net.ParseIP("10.0.0.5"))
	want := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1,
		2, 0, 0, 0, 0, 1, 10, 0, 0, 5, 0, 0, 0, 0, 0, 0, 10, 0, 0, 5}
	if !bytes.Equal(arp, want) {
		t.Errorf("ARP is % x", arp)
	}
	na := announcement(mac, net.ParseIP("fd00::5"))
	if len(na) != 14+40+32 || na[12] != 0x86 || na[13] != 0xdd || na[54] != 136 {
		t.Errorf("NA is % x", na)
	}
	// The checksum over a message with its checksum in place is zero.
	if sum := checksum(na[22:38], na[38:54], na[54:]); sum != 0 {
		t.Errorf("checksum is wrong by %#x", sum)
	}
}

func TestVFLookup(t *testing.T) {
	tr := newTree(t)
	const pf = "0000:3b:00.0"
	tr.pf(pf, 8, 2)
	tr.netdev(pf, "ens1f0", 5, "p0")
	const v0, v1 = "0000:3b:10.0", "0000:3b:10.1"
	tr.netdev(v1, "ens1f0v1", 7, "")
	a := &Attacher{sysfs: tr.host().sysfs}
	vf, err := a.VF(v1)
	if err != nil || vf.PF != pf || vf.PFName != "ens1f0" || vf.Index != 1 || vf.Name != "ens1f0v1" {
		t.Errorf("%+v, %v", vf, err)
	}
	if vf, err := a.VF(v0); err != nil || vf.Name != "" || vf.Index != 0 {
		t.Errorf("VF without netdev: %+v, %v", vf, err)
	}
	for _, address := range []string{pf, "0000:ff:00.0", "../../etc", ""} {
		if _, err := a.VF(address); !errors.Is(err, ErrNoVF) {
			t.Errorf("%q: %v", address, err)
		}
	}
}

// twoNetns are two fresh namespaces: one that plays the host's and a pod's.
func twoNetns(t *testing.T) (a *Attacher, pod *Netns) {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("these tests need root")
		}
		t.Skip("needs root")
	}
	fresh := func() *Netns {
		done := make(chan error)
		var ns *Netns
		go func() {
			runtime.LockOSThread()
			home, err := os.Open("/proc/thread-self/ns/net")
			if err == nil {
				defer home.Close()
				err = unix.Unshare(unix.CLONE_NEWNET)
			}
			if err == nil {
				ns, err = OpenNetns("/proc/thread-self/ns/net")
				if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
					runtime.UnlockOSThread()
				}
			}
			done <- err
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		t.Cleanup(ns.Close)
		return ns
	}
	a, pod = &Attacher{sysfs: DefaultSysfs, host: fresh()}, fresh()
	return a, pod
}

// library returns the library's handle for the host's namespace.
func library(t *testing.T, a *Attacher) *netlink.Handle {
	t.Helper()
	conn, err := a.rtnl(nil)
	if err != nil {
		t.Fatal(err)
	}
	h, err := conn.library()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// veth makes a pair of links in the host's namespace; the peer is up.
func veth(t *testing.T, a *Attacher, name string) Netdev {
	t.Helper()
	handle := library(t, a)
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "p"}
	if err := handle.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	p, err := handle.LinkByName(name + "p")
	if err == nil {
		err = handle.LinkSetUp(p)
	}
	if err != nil {
		t.Fatal(err)
	}
	l, err := a.Link(nil, name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestMoveThereAndBack(t *testing.T) {
	ctx := context.Background()
	a, pod := twoNetns(t)
	l := veth(t, a, "vf0")
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 0x42}
	if err := a.ChangeLink(ctx, nil, l.Index, LinkChange{To: pod, Name: "net1", MAC: mac, MTU: 1400, State: SetUp}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Link(nil, "vf0"); !errors.Is(err, unix.ENODEV) {
		t.Errorf("link that was moved: %v", err)
	}
	in, err := a.Link(pod, "net1")
	if err != nil || !bytes.Equal(in.MAC, mac) || in.MTU != 1400 || !in.Up {
		t.Fatalf("in the pod: %+v, %v", in, err)
	}
	if err = a.ChangeLink(ctx, pod, in.Index, LinkChange{To: a.HostNetns(), Name: "vf0", State: SetDown}); err != nil {
		t.Fatal(err)
	}
	back, err := a.Link(nil, "vf0")
	if err != nil || back.Up {
		t.Fatalf("back: %+v, %v", back, err)
	}
	if err := a.AdoptMAC(ctx, back, l.MAC); err != nil {
		t.Fatal(err)
	}
	if back, _ = a.Link(nil, "vf0"); !bytes.Equal(back.MAC, l.MAC) {
		t.Errorf("MAC is %s, not %s", back.MAC, l.MAC)
	}
}

// TestMoveToTakenNames holds what the package says of the kernel: a name that is
// taken leaves the link in the new namespace, an alternative name stops the move.
func TestMoveToTakenNames(t *testing.T) {
	ctx := context.Background()
	a, pod := twoNetns(t)
	taken := veth(t, a, "net1")
	if err := a.ChangeLink(ctx, nil, taken.Index, LinkChange{To: pod}); err != nil {
		t.Fatal(err)
	}
	l := veth(t, a, "vf0")
	err := a.ChangeLink(ctx, nil, l.Index, LinkChange{To: pod, Name: "net1"})
	if !errors.Is(err, unix.EEXIST) {
		t.Fatalf("move to a taken name: %v", err)
	}
	if _, err = a.Link(pod, "vf0"); err != nil {
		t.Errorf("the link is not in the pod under its old name: %v", err)
	}

	l = veth(t, a, "vf1")
	if err = library(t, a).LinkAddAltName(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: l.Index}}, "net1"); err != nil {
		t.Fatal(err)
	}
	if l, err = a.Link(nil, "vf1"); err != nil || !slices.Equal(l.AltNames, []string{"net1"}) {
		t.Fatalf("%+v, %v", l, err)
	}
	if err := a.ChangeLink(ctx, nil, l.Index, LinkChange{To: pod, Name: "net2"}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("move with a taken alternative name: %v", err)
	}
	if err := a.DeleteAltName(nil, l.Index, "net1"); err != nil {
		t.Fatal(err)
	}
	if err := a.ChangeLink(ctx, nil, l.Index, LinkChange{To: pod, Name: "net2"}); err != nil {
		t.Errorf("move without it: %v", err)
	}
}

func TestAddressesAndRoutes(t *testing.T) {
	ctx := context.Background()
	a, pod := twoNetns(t)
	l := veth(t, a, "vf0")
	if err := a.ChangeLink(ctx, nil, l.Index, LinkChange{To: pod, Name: "net1", State: SetUp}); err != nil {
		t.Fatal(err)
	}
	if l, _ = a.Link(pod, "net1"); l.Name == "" {
		t.Fatal("no link")
	}
	if err := a.PrepareIPv6(pod, "net1"); err != nil {
		t.Fatal(err)
	}
	cidr := func(s string) net.IPNet {
		ip, n, err := net.ParseCIDR(s)
		if err != nil {
			t.Fatal(err)
		}
		n.IP = ip
		return *n
	}
	addresses := []net.IPNet{cidr("10.7.0.5/24"), cidr("fd07::5/64")}
	for _, address := range addresses {
		if err := a.AddAddress(pod, l.Index, address, false); err != nil {
			t.Fatal(err)
		}
		if err := a.AddAddress(pod, l.Index, address, false); !errors.Is(err, unix.EEXIST) {
			t.Errorf("the same address again: %v", err)
		}
	}
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := a.WaitIPv6(wait, pod, l.Index); err != nil || wait.Err() != nil {
		t.Fatalf("wait for IPv6: %v, %v", err, wait.Err())
	}
	link := unix.RT_SCOPE_LINK
	routes := []Route{
		{Dst: cidr("0.0.0.0/0"), Gateway: net.ParseIP("10.7.0.1")},
		{Dst: cidr("10.8.0.0/16"), Gateway: net.ParseIP("10.7.0.1"), MTU: 1300, Table: 100},
		{Dst: cidr("10.9.0.0/16"), Scope: &link},
		{Dst: cidr("::/0"), Gateway: net.ParseIP("fd07::1")},
		{Dst: cidr("fd09::/64")},
	}
	for _, r := range routes {
		if has, err := a.HasRoute(pod, l.Index, r); has || err != nil {
			t.Errorf("%v is there before: %v", r, err)
		}
		if err := a.AddRoute(pod, l.Index, r); err != nil {
			t.Error(err)
		}
		if has, err := a.HasRoute(pod, l.Index, r); !has || err != nil {
			t.Errorf("%v is not there: %v", r, err)
		}
	}
	got, err := a.Addresses(pod, l.Index)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range addresses {
		if !slices.ContainsFunc(got, func(n net.IPNet) bool { return n.String() == want.String() }) {
			t.Errorf("%s is not in %v", want.String(), got)
		}
	}

	// The peer, which stayed, hears the announcements.
	heard := make(chan []byte, 16)
	if err := a.HostNetns().Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(uint16(unix.ETH_P_ALL)<<8|unix.ETH_P_ALL>>8))
		if err != nil {
			return err
		}
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2})
		go func() {
			defer close(heard)
			defer unix.Close(fd)
			for range 32 {
				b := make([]byte, 256)
				n, _, err := unix.Recvfrom(fd, b, 0)
				if err != nil {
					return
				}
				heard <- b[:n]
			}
		}()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := a.Announce(ctx, pod, "net1", addresses); err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{string(announcement(l.MAC, addresses[0].IP)): true, string(announcement(l.MAC, addresses[1].IP)): true}
	for frame := range heard {
		if delete(want, string(frame)); len(want) == 0 {
			break
		}
	}
	if len(want) > 0 {
		t.Errorf("%d announcements were not heard", len(want))
	}
}

// A VF's number is the same by its address and by the PF's list, and what the kernel
// tells of offsets is believed only where the list agrees.
func TestVFIndex(t *testing.T) {
	tr := newTree(t)
	const pf = "0000:3b:00.0"
	tr.pf(pf, 16, 16)
	device := filepath.Join(tr.host().sysfs, "bus/pci/devices", pf)
	for _, told := range []struct{ offset, stride string }{{"", ""}, {"128", "1"}, {"129", "2"}, {"127", "1"}, {"128", "0"}} {
		if told.offset != "" {
			tr.write(dev(pf)+"/sriov_offset", told.offset+"\n")
			tr.write(dev(pf)+"/sriov_stride", told.stride+"\n")
		}
		for i := range 16 {
			vf := fmt.Sprintf("0000:3b:%02x.%d", 0x10+i/8, i%8)
			if n, err := (&Attacher{}).vfIndex(device, pf, vf); n != i || err != nil {
				t.Errorf("offset %s, stride %s: %s has number %d, %v, want %d", told.offset, told.stride, vf, n, err, i)
			}
		}
		if n, err := (&Attacher{}).vfIndex(device, pf, "0000:3b:1f.0"); n != -1 || err != nil {
			t.Errorf("a VF that the PF does not have: %d, %v", n, err)
		}
	}
}

// TestSetDefaultRoutes takes the default routes of one link away for another's.
func TestSetDefaultRoutes(t *testing.T) {
	a, pod := twoNetns(t)
	links := map[string]Netdev{}
	for i, name := range []string{"eth0", "net1"} {
		l := veth(t, a, "vf"+name)
		if err := a.ChangeLink(t.Context(), nil, l.Index, LinkChange{To: pod, Name: name, State: SetUp}); err != nil {
			t.Fatal(err)
		}
		l, err := a.Link(pod, name)
		if err != nil {
			t.Fatal(err)
		}
		links[name] = l
		for _, n := range []net.IPNet{
			{IP: net.IPv4(10, 7, byte(i), 5), Mask: net.CIDRMask(24, 32)}, {IP: net.ParseIP(fmt.Sprintf("fd07:%d::5", i)), Mask: net.CIDRMask(64, 128)},
		} {
			if err := a.AddAddress(pod, l.Index, n, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	v4, v6 := net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	for _, r := range []Route{{Dst: v4, Gateway: net.IPv4(10, 7, 0, 1)}, {Dst: v6, Gateway: net.ParseIP("fd07:0::1")}} {
		if err := a.AddRoute(pod, links["eth0"].Index, r); err != nil {
			t.Fatal(err)
		}
	}
	has := func(link string, dst net.IPNet) bool {
		t.Helper()
		has, err := a.HasRoute(pod, links[link].Index, Route{Dst: dst})
		if err != nil {
			t.Fatal(err)
		}
		return has
	}
	for range 2 { // it can be repeated
		if err := a.SetDefaultRoutes(pod, "net1", []netip.Addr{netip.MustParseAddr("10.7.1.1")}); err != nil {
			t.Fatal(err)
		}
		if has("eth0", v4) || !has("net1", v4) || !has("eth0", v6) || has("net1", v6) {
			t.Error("the IPv4 default route is not net1's, or IPv6 was touched")
		}
	}
	if err := a.SetDefaultRoutes(pod, "net1", []netip.Addr{netip.MustParseAddr("fd07:1::1")}); err != nil {
		t.Fatal(err)
	}
	if has("eth0", v6) || !has("net1", v6) || !has("net1", v4) {
		t.Error("the IPv6 default route is not net1's, or IPv4 was touched")
	}
	if err := a.SetDefaultRoutes(pod, "net1", []netip.Addr{netip.MustParseAddr("10.9.0.1")}); err == nil || !strings.Contains(err.Error(), "10.9.0.1") {
		t.Errorf("a gateway that cannot be reached: %v", err)
	}
}

func TestNetnsIdentity(t *testing.T) {
	_, pod := twoNetns(t)
	path := fmt.Sprintf("/proc/self/fd/%d", pod.fd)
	same, err := OpenNetns(path)
	if err != nil || same.ID != pod.ID {
		t.Fatalf("%v, %v", same, err)
	}
	same.Close()
	file := filepath.Join(t.TempDir(), "was-a-netns")
	if _, err := OpenNetns(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, "/proc/self/ns/mnt", t.TempDir()} {
		if _, err := OpenNetns(path); !errors.Is(err, ErrNotNetns) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestDoNeverLeaksAThread runs in namespaces from many goroutines; all other
// goroutines stay in the host's.
func TestDoNeverLeaksAThread(t *testing.T) {
	_, pod := twoNetns(t)
	home, err := OpenNetns("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	id := func() NetnsID {
		ns, err := OpenNetns("/proc/thread-self/ns/net")
		if err != nil {
			t.Error(err)
			return NetnsID{}
		}
		defer ns.Close()
		return ns.ID
	}
	done := make(chan bool)
	for range 8 {
		go func() {
			for range 50 {
				if err := pod.Do(func() error {
					if id() != pod.ID {
						return errors.New("not inside")
					}
					return nil
				}); err != nil {
					t.Error(err)
				}
				if id() != home.ID {
					t.Error("a goroutine is in the pod's namespace")
				}
			}
			done <- true
		}()
	}
	for range 8 {
		<-done
	}
}

func TestOwnAddresses(t *testing.T) {
	a, _ := twoNetns(t)
	l := veth(t, a, "own0")
	if err := a.ChangeLink(t.Context(), nil, l.Index, LinkChange{State: SetUp}); err != nil {
		t.Fatal(err)
	}
	for _, cidr := range []string{"10.7.0.5/24", "fd07::5/64", "fe80::7/64", "127.0.0.7/8"} {
		ip, n, err := net.ParseCIDR(cidr)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.AddAddress(nil, l.Index, net.IPNet{IP: ip, Mask: n.Mask}, true); err != nil {
			t.Fatal(err)
		}
	}
	own, err := a.OwnAddresses()
	if err != nil || !slices.Equal(own, []netip.Addr{netip.MustParseAddr("10.7.0.5"), netip.MustParseAddr("fd07::5")}) {
		t.Errorf("%v, %v", own, err)
	}
}
