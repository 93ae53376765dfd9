package host

import (
	"bytes"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestProbes(t *testing.T) {
	own, other := net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2}
	v4, v6 := net.ParseIP("10.0.0.5"), net.ParseIP("fd00::5")
	arp := probe(own, v4)
	if want := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1,
		2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 5}; !bytes.Equal(arp, want) {
		t.Errorf("ARP probe is % x", arp)
	}
	ns := probe(own, v6)
	if len(ns) != 14+40+24 || !bytes.Equal(ns[:6], []byte{0x33, 0x33, 0xff, 0, 0, 5}) || net.IP(ns[38:54]).String() != "ff02::1:ff00:5" || checksum(ns[22:38], ns[38:54], ns[54:]) != 0 {
		t.Errorf("neighbour solicitation is % x", ns)
	}
	for name, c := range map[string]struct {
		frame []byte
		ip    net.IP
		says  net.HardwareAddr
	}{
		"announcement":               {announcement(other, v4), v4, other},
		"probe of another station":   {probe(other, v4), v4, other},
		"of another address":         {announcement(other, net.ParseIP("10.0.0.6")), v4, nil},
		"advertisement":              {announcement(other, v6), v6, other},
		"detection of another":       {probe(other, v6), v6, other},
		"advertisement of another":   {announcement(other, net.ParseIP("fd00::6")), v6, nil},
		"IPv4 does not answer IPv6":  {announcement(other, v4), v6, nil},
		"short":                      {announcement(other, v6)[:60], v6, nil},
		"a question of a neighbour":  {question(other, v4), v4, nil},
		"answer to another protocol": {[]byte("hello, this is no ARP"), v4, nil},
	} {
		if got := claimant(c.frame, c.ip); !bytes.Equal(got, c.says) {
			t.Errorf("%s: %s has it, want %s", name, got, c.says)
		}
	}
}

// question is an ARP request of a station that has an address itself.
func question(mac net.HardwareAddr, ip net.IP) []byte {
	frame := probe(mac, ip)
	copy(frame[28:], []byte{10, 0, 0, 9})
	return frame
}

func FuzzClaimant(f *testing.F) {
	for _, ip := range []string{"10.0.0.5", "fd00::5"} {
		f.Add(announcement(net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.ParseIP(ip)), ip)
	}
	f.Fuzz(func(t *testing.T, frame []byte, ip string) {
		parsed := net.ParseIP(ip)
		if parsed == nil {
			return
		}
		if mac := claimant(frame, parsed); mac != nil && (len(mac) != 6 || !bytes.Contains(frame, mac)) {
			t.Errorf("%s is claimed by %s", ip, mac)
		}
	})
}

// The settings, rules and routes of an interface on this machine's kernel: what is
// set is read back, and what is undone is not.
func TestRoutingOfALink(t *testing.T) {
	a, pod := twoNetns(t)
	l := veth(t, a, "x0")
	if err := a.ChangeLink(t.Context(), nil, l.Index, LinkChange{To: pod, Name: "net1", State: SetUp}); err != nil {
		t.Fatal(err)
	}
	link, err := a.Link(pod, "net1")
	if err != nil {
		t.Fatal(err)
	}
	if keeps, err := a.KeepsToOwnAddresses(pod, link.Index); err != nil || keeps {
		t.Errorf("a new link keeps to its addresses: %v, %v", keeps, err)
	}
	if err := a.KeepToOwnAddresses(pod, link.Index); err != nil {
		t.Fatal(err)
	}
	if keeps, err := a.KeepsToOwnAddresses(pod, link.Index); err != nil || !keeps {
		t.Errorf("not set: %v, %v", keeps, err)
	}
	for name, want := range map[string]string{"arp_ignore": "1", "arp_announce": "2", "rp_filter": "2"} {
		if err := pod.Do(func() error {
			got, err := readText("/proc/sys/net/ipv4/conf/net1/" + name)
			if got != want {
				t.Errorf("%s is %s", name, got)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	const table = 1 << 30
	ips := []net.IP{net.ParseIP("10.0.0.5"), net.ParseIP("fd00::5")}
	for _, ip := range ips {
		if err := a.AddSourceRule(pod, ip, table); err != nil {
			t.Fatal(err)
		}
		if has, err := a.HasSourceRule(pod, ip, table); err != nil || !has {
			t.Errorf("no rule from %s: %v", ip, err)
		}
		if has, _ := a.HasSourceRule(pod, ip, table+1); has {
			t.Errorf("a rule from %s to another table", ip)
		}
	}
	for range 2 {
		if err := a.DeleteSourceRules(pod, table); err != nil {
			t.Fatal(err)
		}
	}
	for _, ip := range ips {
		if has, err := a.HasSourceRule(pod, ip, table); err != nil || has {
			t.Errorf("the rule from %s is left: %v", ip, err)
		}
	}
	if err := a.AddAddress(pod, link.Index, net.IPNet{IP: net.IPv4(10, 0, 0, 5).To4(), Mask: net.CIDRMask(24, 32)}, false); err != nil {
		t.Fatal(err)
	}
	other := Route{Dst: net.IPNet{IP: net.IPv4(10, 9, 0, 0).To4(), Mask: net.CIDRMask(16, 32)}, Gateway: net.IPv4(10, 0, 0, 1), OnLink: true, Table: table}
	if err := a.AddRoute(pod, link.Index, other); err != nil {
		t.Fatal(err)
	}
	for in, want := range map[int]bool{table: true, 0: false} {
		other.Table = in
		if has, err := a.HasRoute(pod, link.Index, other); err != nil || has != want {
			t.Errorf("route in table %d: %v, %v", in, has, err)
		}
	}
}

// TestMacvlanOfALink makes sub-interfaces on this machine's kernel.
func TestMacvlanOfALink(t *testing.T) {
	a, pod := twoNetns(t)
	parent := veth(t, a, "x0")
	if err := a.ChangeLink(t.Context(), nil, parent.Index, LinkChange{State: SetUp}); err != nil {
		t.Fatal(err)
	}
	m := Macvlan{Name: "x0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 9}, MTU: 1400, Mode: MacvlanVEPA, Group: 1<<30 | 7, BroadcastQueue: 2000}
	// The host has a link of this name.
	if err := a.AddMacvlan(t.Context(), pod, parent, false, m); err != nil {
		t.Fatal(err)
	}
	l, err := a.Link(pod, "x0")
	if err != nil || l.Kind != "macvlan" || l.Mode != MacvlanVEPA || l.MTU != 1400 || l.Group != m.Group || !bytes.Equal(l.MAC, m.MAC) || !l.Up {
		t.Errorf("made %+v, %v", l, err)
	}
	if err := a.AddMacvlan(t.Context(), pod, parent, false, m); !errors.Is(err, unix.EEXIST) {
		t.Errorf("a second of the name: %v", err)
	}
	all, err := a.Links(pod)
	if err != nil || len(all) > 1 && !onlyVirtual(all) {
		t.Errorf("the pod has %+v, %v", all, err)
	}
	// On the sub-interface, in the pod.
	m.Name, m.MAC, m.Mode, m.Group = "sub", net.HardwareAddr{2, 0, 0, 0, 0, 10}, MacvlanBridge, 1<<30|8
	if err := a.AddMacvlan(t.Context(), pod, l, true, m); err != nil {
		t.Fatal(err)
	}
	sub, err := a.Link(pod, "sub")
	if err != nil || sub.Kind != "macvlan" {
		t.Errorf("made %+v, %v", sub, err)
	}
	for range 2 {
		if err := errors.Join(a.DeleteLink(pod, sub.Index), a.DeleteLink(pod, l.Index)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.Link(pod, "x0"); !errors.Is(err, unix.ENODEV) {
		t.Errorf("after deletion: %v", err)
	}
}

// onlyVirtual tells whether no link has a name that AddMacvlan may leave behind.
func onlyVirtual(links []Netdev) bool {
	for _, l := range links {
		if len(l.Name) > 3 && l.Name[:3] == "slu" {
			return false
		}
	}
	return true
}

// TestProbeOfALink asks a station on this machine's kernel.
func TestProbeOfALink(t *testing.T) {
	a, pod := twoNetns(t)
	l := veth(t, a, "x0")
	handle := library(t, a)
	station, err := handle.LinkByName("x0p")
	if err != nil {
		t.Fatal(err)
	}
	taken := []net.IPNet{{IP: net.ParseIP("10.0.0.5").To4(), Mask: net.CIDRMask(24, 32)}, {IP: net.ParseIP("fd00::5"), Mask: net.CIDRMask(64, 128)}}
	for _, address := range taken {
		if err := handle.AddrAdd(station, &netlink.Addr{IPNet: &address, Flags: unix.IFA_F_NODAD}); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.ChangeLink(t.Context(), nil, l.Index, LinkChange{To: pod, Name: "net1", State: SetUp}); err != nil {
		t.Fatal(err)
	}
	free := net.IPNet{IP: net.ParseIP("10.0.0.6").To4(), Mask: net.CIDRMask(24, 32)}
	if asked, err := a.Probe(t.Context(), pod, "net1", []net.IPNet{free}, 40*time.Millisecond); err != nil || !asked {
		t.Errorf("free address: %v, %v", asked, err)
	}
	for _, address := range taken {
		_, err := a.Probe(t.Context(), pod, "net1", []net.IPNet{free, address}, 5*time.Second)
		conflict := (*AddressConflictError)(nil)
		if !errors.As(err, &conflict) || !conflict.IP.Equal(address.IP) || !bytes.Equal(conflict.MAC, station.Attrs().HardwareAddr) {
			t.Errorf("%s: %v, station is %s", address.IP, err, station.Attrs().HardwareAddr)
		}
	}
}
