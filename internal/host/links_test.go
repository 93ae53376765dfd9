package host

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// physical makes a NIC and its entry in class/net.
func (tr *tree) physical(address, name string, index int) *netlink.LinkAttrs {
	if _, err := os.Stat(filepath.Join(tr.root, dev(address))); err != nil {
		tr.pf(address, 8, 0)
	}
	tr.netdev(address, name, index, "")
	tr.link("../../../"+dev(address), "class/net/"+name+"/device")
	return tr.links[len(tr.links)-1].Attrs()
}

func (tr *tree) virtual(index int, name string, l netlink.Link) *netlink.LinkAttrs {
	a := l.Attrs()
	*a = netlink.NewLinkAttrs()
	a.Name, a.Index, a.MTU, a.EncapType, a.RawFlags = name, index, 1500, "ether", unix.IFF_UP
	tr.links = append(tr.links, l)
	return a
}

func TestLinks(t *testing.T) {
	tr := newTree(t)
	tr.physical("0000:3b:00.0", "ens1f0", 2).NetNsID = -1
	tr.physical("0000:3b:00.1", "ens1f1", 3)
	tr.physical("0000:5e:00.0", "ens2f0", 4)
	tr.write(dev("0000:5e:00.0")+"/numa_node", "0\n")
	rep := tr.physical("0000:5e:00.0", "eth7", 5) // a representor has its PF's device
	rep.NetNsID = -1
	tr.write("class/net/eth7/phys_port_name", "pf0vf7\n")
	vf := tr.vf("0000:3b:00.0", 3)
	tr.physical(vf, "ens1f0v3", 6)

	// virtio-net is one bus further, or two, a platform NIC has no PCI function, and what has no
	// device at all is no NIC.
	tr.write(dev("0000:00:05.0")+"/class", "0x020000\n")
	tr.write(dev("0000:00:05.0")+"/vendor", "0x1af4\n")
	tr.write(dev("0000:00:05.0")+"/device", "0x1041\n")
	tr.write(dev("0000:00:05.0")+"/virtio0/status", "")
	tr.link("../../../"+dev("0000:00:05.0")+"/virtio0", "class/net/enp0s5/device")
	with := tr.vf("0000:3b:00.0", 4)
	tr.write(dev(with)+"/vdpa0/virtio1/status", "")
	tr.link("../../../../../bus/vdpa", dev(with)+"/vdpa0/subsystem")
	tr.link("../../../"+dev(with)+"/vdpa0/virtio1", "class/net/eth9/device")
	tr.write("devices/platform/soc/numa_node", "1\n")
	tr.link("../../../devices/platform/soc", "class/net/end0/device")
	for i, name := range []string{"enp0s5", "end0", "nodevice", "eth9"} {
		tr.virtual(20+i, name, &netlink.Device{})
	}
	tr.virtual(30, "lo", &netlink.Device{}).RawFlags |= unix.IFF_LOOPBACK
	tr.virtual(31, "ib0", &netlink.Device{}).EncapType = "infiniband"
	tr.virtual(32, "veth1", &netlink.Veth{})
	tr.virtual(33, "tap0", &netlink.Tuntap{})
	tr.virtual(34, "mv0", &netlink.Macvlan{})

	bond := tr.virtual(40, "bond0", &netlink.Bond{})
	for _, i := range []int{1, 0} { // ens1f0 and ens1f1
		tr.links[i].Attrs().MasterIndex = bond.Index
	}
	mixed := tr.virtual(41, "bond1", &netlink.Bond{})
	tr.virtual(42, "eth8", &netlink.Veth{}).MasterIndex = mixed.Index
	tr.links[2].Attrs().MasterIndex = mixed.Index // ens2f0
	tr.virtual(43, "br0", &netlink.Bridge{}).AltNames = []string{"z", "a"}
	vrf := tr.virtual(44, "vrf0", &netlink.Vrf{})
	tr.virtual(45, "vxlan5", &netlink.Vxlan{}).MasterIndex = vrf.Index
	vlan := tr.virtual(46, "bond0.100", &netlink.Vlan{VlanId: 100, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q})
	vlan.ParentIndex, vlan.Group = bond.Index, managedGroup
	tr.virtual(47, "qinq", &netlink.Vlan{VlanId: 100, VlanProtocol: netlink.VLAN_PROTOCOL_8021AD}).ParentIndex = bond.Index
	away := tr.virtual(48, "v7", &netlink.Vlan{VlanId: 7, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q})
	away.ParentIndex, away.NetNsID = bond.Index, 3
	tr.virtual(49, "odd", &netlink.Vlan{VlanId: 8, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q}).MasterIndex = 999

	links, err := tr.host().Links(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range links {
		got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s numa%d pci=%s %s:%s pf=%s master=%s lower=%s vlan=%d managed=%t",
			l.Name, l.Kind, l.NUMANode, l.PCIAddress, l.Vendor, l.DeviceID, l.PFAddress, l.Master, l.Lower, l.VLAN, l.Managed)))
	}
	want := []string{
		"bond0 bond numa1 pci= : pf= master= lower= vlan=0 managed=false",
		"bond0.100 vlan numa1 pci= : pf= master= lower=bond0 vlan=100 managed=true",
		"bond1 bond numa-1 pci= : pf= master= lower= vlan=0 managed=false",
		"br0 bridge numa-1 pci= : pf= master= lower= vlan=0 managed=false",
		"end0 physical numa1 pci= : pf= master= lower= vlan=0 managed=false",
		"enp0s5 physical numa-1 pci=0000:00:05.0 1af4:1041 pf= master= lower= vlan=0 managed=false",
		"ens1f0 physical numa1 pci=0000:3b:00.0 8086:1572 pf= master=bond0 lower= vlan=0 managed=false",
		"ens1f0v3 physical numa-1 pci=0000:3b:10.3 8086:154c pf=0000:3b:00.0 master= lower= vlan=0 managed=false",
		"ens1f1 physical numa1 pci=0000:3b:00.1 8086:1572 pf= master=bond0 lower= vlan=0 managed=false",
		"ens2f0 physical numa0 pci=0000:5e:00.0 8086:1572 pf= master=bond1 lower= vlan=0 managed=false",
		"eth9 physical numa-1 pci=0000:3b:10.4 8086:154c pf=0000:3b:00.0 master= lower= vlan=0 managed=false",
		"odd vlan numa-1 pci= : pf= master=if999 lower= vlan=8 managed=false",
		"qinq vlan numa1 pci= : pf= master= lower=bond0 vlan=0 managed=false",
		"v7 vlan numa-1 pci= : pf= master= lower= vlan=7 managed=false",
		"vxlan5 vxlan numa-1 pci= : pf= master= lower= vlan=0 managed=false",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	first := links[slices.IndexFunc(links, func(l ParentLink) bool { return l.Name == "ens1f0" })]
	if d := cmp.Diff(ParentLink{
		Name: "ens1f0", IfIndex: 2, Kind: PhysicalLink, AltNames: []string{"ens1f0alt"}, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, MTU: 1500, AdminUp: true,
		Master: "bond0", PCIAddress: "0000:3b:00.0", Vendor: "8086", DeviceID: "1572", NUMANode: 1,
	}, first); d != "" {
		t.Error(d)
	}
}

func TestLinksThatCannotBeRead(t *testing.T) {
	tr := newTree(t)
	tr.physical("0000:3b:00.0", "ens1f0", 2)
	tr.physical("0000:5e:00.0", "ens2f0", 3)
	tr.write(dev("0000:3b:00.0")+"/vendor", "garbage\n")
	links, err := tr.host().Links(t.Context())
	if len(links) != 1 || links[0].Name != "ens2f0" {
		t.Errorf("the healthy NIC is missing: %+v", links)
	}
	if err == nil || !strings.Contains(err.Error(), "read NIC ens1f0") {
		t.Errorf("the error %v does not name the other", err)
	}
	h := tr.host()
	h.links = func() ([]netlink.Link, error) { return nil, unix.ENOBUFS }
	if _, err := h.Links(t.Context()); !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("got %v", err)
	}
}

func TestSlotID(t *testing.T) {
	for parent, want := range map[string]string{
		"ens1f0": "ens1f0-7", "ens1f0.100": "ens1f0.100-7", "br-ex": "br-ex-7", "a--b": "a--b-7",
		"br_ex": "x62725f6578-7", "Eth0": "x45746830-7", "x6162": "x7836313632-7", "x616": "x616-7", "a-": "x612d-7", "-a": "x2d61-7", "a.-b": "x612e2d62-7",
	} {
		if got := SlotID(parent, 7); got != want {
			t.Errorf("%s: %s, want %s", parent, got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.OneOf(rapid.StringMatching(`[a-z0-9.x_@A-Z-]{1,15}`), rapid.StringMatching(`x([0-9a-f]{2}){1,7}`)).Draw(t, "link")
		n := rapid.IntRange(0, MaxSlots-1).Draw(t, "slot")
		id := SlotID(name, n)
		if !plainName.MatchString(id) || len(id) > 63 || ValidPCIAddress(id) {
			t.Fatalf("%s is no DNS name", id)
		}
		if gotName, gotN, err := ParseSlotID(id); err != nil || gotName != name || gotN != n {
			t.Fatalf("%s comes back as %s, %d, %v", id, gotName, gotN, err)
		}
	})
}

func FuzzParseSlotID(f *testing.F) {
	for _, s := range []string{"ens1f0-0", "x6162-1", "-1", "a-", "a-01", "a-+1", "a-4096", "0000:01:00.1", "xzz-1", "x-1", "x61-1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if parent, n, err := ParseSlotID(s); err == nil && SlotID(parent, n) != s {
			t.Errorf("%q is taken for slot %d of %q", s, n, parent)
		}
	})
}
