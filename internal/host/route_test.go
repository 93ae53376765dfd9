package host

import (
	"errors"
	"net"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestLinksBelow(t *testing.T) {
	t.Parallel()
	at := func(index, parent, master int) netlink.LinkAttrs {
		return netlink.LinkAttrs{Index: index, ParentIndex: parent, MasterIndex: master, NetNsID: -1}
	}
	foreign := at(9, 1, 0)
	foreign.NetNsID = 3
	loopback := at(99, 0, 0)
	loopback.RawFlags = unix.IFF_LOOPBACK
	list := []netlink.Link{
		&netlink.Device{LinkAttrs: at(1, 0, 3)}, &netlink.Device{LinkAttrs: at(2, 0, 3)},
		&netlink.Bond{LinkAttrs: at(3, 0, 0)}, &netlink.Vlan{LinkAttrs: at(4, 3, 5)}, &netlink.Bridge{LinkAttrs: at(5, 0, 0)},
		&netlink.Veth{LinkAttrs: at(6, 2, 5)}, &netlink.Device{LinkAttrs: at(7, 0, 0)}, &netlink.Vxlan{LinkAttrs: at(8, 0, 0), VtepDevIndex: 7},
		&netlink.Macvlan{LinkAttrs: foreign},
		&netlink.GenericLink{LinkAttrs: at(10, 0, 0), LinkType: "openvswitch"}, &netlink.GenericLink{LinkAttrs: at(11, 0, 0), LinkType: "openvswitch"},
		&netlink.Device{LinkAttrs: at(12, 0, 10)}, &netlink.Device{LinkAttrs: loopback},
	}
	for _, c := range []struct{ top, want []int }{
		{nil, []int{}},
		{[]int{7}, []int{7}},
		{[]int{4}, []int{1, 2, 3, 4}},
		{[]int{5}, []int{1, 2, 3, 4, 5, 6}}, // not the peer of a pod's veth, but for the bond
		{[]int{8}, []int{7, 8}},
		{[]int{9}, []int{9}},
		{[]int{11}, []int{11, 12}}, // an internal port
		{[]int{99, 1234}, []int{}},
	} {
		if got := linksBelow(list, c.top); !slices.Equal(got, c.want) {
			t.Errorf("below %v: %v, want %v", c.top, got, c.want)
		}
	}
}

func TestPathLinks(t *testing.T) {
	inNetns(t)
	h := open(t)
	add := func(l netlink.Link) int {
		t.Helper()
		if err := h.rt.LinkAdd(l); err != nil {
			t.Fatal(err)
		}
		made, err := h.rt.LinkByName(l.Attrs().Name)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.rt.LinkSetUp(made); err != nil {
			t.Fatal(err)
		}
		return made.Attrs().Index
	}
	veth := add(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "nic0"}, PeerName: "wire0"})
	other := add(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "nic1"}, PeerName: "wire1"})
	bridge := add(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}})
	if err := h.rt.LinkSetMasterByIndex(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: veth}}, bridge); err != nil {
		t.Fatal(err)
	}
	address := func(link int, cidr string) {
		t.Helper()
		a, err := netlink.ParseAddr(cidr)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.rt.AddrAdd(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: link}}, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.rt.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: 1}}); err != nil { // loopback
		t.Fatal(err)
	}
	address(bridge, "192.0.2.7/24")
	address(other, "198.51.100.7/24")
	for _, c := range []struct {
		to          string
		want        []int
		unreachable bool
	}{
		{"192.0.2.1", []int{veth, bridge}, false},
		{"192.0.2.7", []int{veth, bridge}, false}, // the machine's own
		{"198.51.100.1", []int{other}, false},
		{"127.0.0.1", []int{}, false},
		{"203.0.113.1", []int{}, true},
	} {
		got, err := h.PathLinks(t.Context(), []net.IP{net.ParseIP(c.to)})
		slices.Sort(c.want)
		if !slices.Equal(got, c.want) || errors.Is(err, unix.ENETUNREACH) != c.unreachable || !c.unreachable && err != nil {
			t.Errorf("to %s: %v, %v; want %v", c.to, got, err, c.want)
		}
	}
}
