package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// LinkKind is the kind of a link that MacVLAN sub-interfaces can be made on.
type LinkKind string

// The kinds.
const (
	PhysicalLink LinkKind = "physical" // a NIC's, of whatever bus
	BondLink     LinkKind = "bond"
	BridgeLink   LinkKind = "bridge"
	VLANLink     LinkKind = "vlan"
	VXLANLink    LinkKind = "vxlan"
)

// managedGroup is the link group (IFLA_GROUP) of the VLAN devices that AddVLAN makes:
// "slui" in ASCII. The kernel takes it in the request that makes the device, which it
// does not do with an alias or an alternative name, so a device of ours is never
// without the mark, and keeps it as long as the device lives.
const managedGroup = 0x736c7569

// ParentLink is a link of this network namespace that MacVLAN sub-interfaces can be
// made on.
type ParentLink struct {
	Name       string
	IfIndex    int
	Kind       LinkKind
	AltNames   []string
	MAC        net.HardwareAddr // nil for a bridge
	MTU        int              // bytes
	AdminUp    bool
	Master     string // bond, bridge or the like that takes its packets: the kernel makes no sub-interface on it (EBUSY)
	Lower      string // the link that a VLAN device is on; empty when it is in another namespace
	VLAN       int    // ID of an IEEE 802.1Q VLAN device; 0 for other links
	Managed    bool   // made by AddVLAN
	PCIAddress string // of a physical NIC; empty when it is on another bus
	Vendor     string // PCI vendor, four hex digits
	DeviceID   string // PCI device, four hex digits
	PFAddress  string // PCI address of its PF when it is a VF
	NUMANode   int    // of the NIC below it; -1 when there is none or there are several
}

// Link returns the link for changes.
func (p *ParentLink) Link() Link { return Link{p.IfIndex, p.Name, p.PCIAddress} }

// Links lists the links that MacVLAN sub-interfaces can be made on, sorted by name:
// Ethernet links of the kinds above. Interfaces of pods and representors are left out.
//
// A NIC that cannot be read does not hide the other links: the result has those that
// could be read, and the error names those that could not.
func (h *Host) Links(ctx context.Context) ([]ParentLink, error) {
	list, err := h.links()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	byIndex := make(map[int]netlink.Link, len(list))
	for _, l := range list {
		byIndex[l.Attrs().Index] = l
	}
	nodes := numaNodes{}
	var links []ParentLink
	var errs []error
	for _, l := range list {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		kind, ok := kindOf(l)
		if !ok {
			continue
		}
		a := l.Attrs()
		p := ParentLink{
			Name: a.Name, IfIndex: a.Index, Kind: kind, AltNames: slices.Sorted(slices.Values(a.AltNames)), MAC: a.HardwareAddr, MTU: a.MTU,
			AdminUp: a.RawFlags&unix.IFF_UP != 0, Master: takenBy(a, byIndex), NUMANode: -1,
		}
		if kind == BridgeLink {
			p.MAC = nil // that of a port, often: another with each pod that comes
		}
		if vlan, ok := l.(*netlink.Vlan); ok {
			p.Managed = a.Group == managedGroup
			if vlan.VlanProtocol == netlink.VLAN_PROTOCOL_8021Q {
				p.VLAN = vlan.VlanId
			}
			// A link of another namespace may have the index of one here.
			if lower := byIndex[a.ParentIndex]; lower != nil && a.NetNsID < 0 {
				p.Lower = lower.Attrs().Name
			}
		}
		if kind == PhysicalLink {
			ok, err := h.readDevice(&p)
			if err != nil {
				errs = append(errs, fmt.Errorf("read NIC %s: %w", p.Name, err))
			}
			if err != nil || !ok {
				continue
			}
			nodes[p.IfIndex] = p.NUMANode
		}
		links = append(links, p)
	}
	for i := range links {
		links[i].NUMANode = nodes.of(byIndex[links[i].IfIndex], list, byIndex)
	}
	slices.SortFunc(links, func(a, b ParentLink) int { return strings.Compare(a.Name, b.Name) })
	return links, errors.Join(errs...)
}

// kindOf tells the kind of a link that can be a parent. MacVLAN stands on Ethernet
// only, and not on loopback (macvlan_port_create in drivers/net/macvlan.c).
func kindOf(l netlink.Link) (LinkKind, bool) {
	if a := l.Attrs(); a.EncapType != "ether" || a.RawFlags&unix.IFF_LOOPBACK != 0 {
		return "", false
	}
	switch l.Type() {
	case "device": // what netlink calls a link without IFLA_INFO_KIND
		return PhysicalLink, true
	case "bond", "bridge", "vlan", "vxlan":
		return LinkKind(l.Type()), true
	}
	return "", false
}

// takenBy names the master that takes the link's packets before a sub-interface could.
// A VRF, too, is a master, and takes none.
func takenBy(a *netlink.LinkAttrs, byIndex map[int]netlink.Link) string {
	master := byIndex[a.MasterIndex]
	switch {
	case a.MasterIndex == 0 || master != nil && master.Type() == "vrf":
		return ""
	case master == nil:
		return fmt.Sprintf("if%d", a.MasterIndex)
	}
	return master.Attrs().Name
}

// readDevice reads what sysfs says of a physical link. It is not ok for links that have
// no device, representors, and links that went away.
func (h *Host) readDevice(p *ParentLink) (ok bool, err error) {
	dir := filepath.Join(h.sysfs, "class/net", p.Name)
	device, err := filepath.EvalSymlinks(filepath.Join(dir, "device"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	// Unreadable for a driver without port names (EOPNOTSUPP).
	if port, _ := readText(filepath.Join(dir, "phys_port_name")); representorPort.MatchString(port) {
		return false, nil
	}
	if strings.HasPrefix(filepath.Base(device), "virtio") {
		device = filepath.Dir(device) // virtio is a bus on top of the PCI function
		if bus, _ := linkBase(filepath.Join(device, "subsystem")); bus == "vdpa" {
			device = filepath.Dir(device) // or of a vDPA device of that
		}
	}
	p.NUMANode = numaNode(device)
	if !ValidPCIAddress(filepath.Base(device)) {
		return true, nil
	}
	p.PCIAddress = filepath.Base(device)
	if p.Vendor, err = readPCIID(filepath.Join(device, "vendor")); err == nil {
		p.DeviceID, err = readPCIID(filepath.Join(device, "device"))
	}
	if err == nil {
		p.PFAddress, err = linkBase(filepath.Join(device, "physfn"))
	}
	if _, gone := os.Stat(dir); errors.Is(gone, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// numaNodes are the NUMA nodes of physical links, by index.
type numaNodes map[int]int

// of finds the NUMA node of a link: that of the NIC below a VLAN device, or of all
// ports of a bond if they agree.
func (n numaNodes) of(l netlink.Link, list []netlink.Link, byIndex map[int]netlink.Link) int {
	if l == nil {
		return -1
	}
	a := l.Attrs()
	if node, physical := n[a.Index]; physical {
		return node
	}
	switch l.Type() {
	case "vlan":
		if a.NetNsID < 0 {
			return n.of(byIndex[a.ParentIndex], list, byIndex)
		}
	case "bond":
		common, ports := -1, 0
		for _, port := range list {
			if port.Attrs().MasterIndex != a.Index {
				continue
			}
			node := n.of(port, list, byIndex)
			if ports++; ports > 1 && node != common {
				return -1
			}
			common = node
		}
		return common
	}
	return -1
}

// AddVLAN makes an IEEE 802.1Q VLAN device on lower, up, and marked as ours. lower must
// be up.
func (h *Host) AddVLAN(ctx context.Context, lower Link, name string, id int) error {
	return lower.change(ctx, fmt.Sprintf("make VLAN device %s", name), vlanHints, func(netlink.Link) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.ParentIndex, attrs.Group, attrs.Flags = name, lower.Index, managedGroup, net.FlagUp
		return h.rt.LinkAdd(&netlink.Vlan{LinkAttrs: attrs, VlanId: id, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q})
	})
}

// ErrLinkInUse is why RemoveVLAN leaves a device.
var ErrLinkInUse = errors.New("it is in use")

// RemoveVLAN removes a VLAN device that AddVLAN made. One that something stands on is
// left, with ErrLinkInUse: the kernel would remove that too, in whatever pod it is.
func (h *Host) RemoveVLAN(ctx context.Context, l Link) error {
	return l.change(ctx, "remove the VLAN device", nil, func(d netlink.Link) error {
		list, err := h.links()
		if err != nil {
			return err
		}
		at := slices.IndexFunc(list, func(o netlink.Link) bool { return o.Attrs().Index == l.Index })
		if at < 0 {
			return nil
		}
		if list[at].Type() != "vlan" || list[at].Attrs().Group != managedGroup {
			return errors.New("it was not made by Sluice")
		}
		user, err := h.userOf(list[at].Attrs(), list)
		if err != nil {
			return err
		}
		if user != "" {
			return fmt.Errorf("%w: %s", ErrLinkInUse, user)
		}
		return h.rt.LinkDel(d)
	})
}

// userOf tells what stands on a link, empty for nothing. Sub-interfaces that are in
// pods cannot be listed from here, but each leaves a trace on its parent while it is
// up: a unicast address to receive (macvlan_open, dev_uc_add), or promiscuity.
func (h *Host) userOf(a *netlink.LinkAttrs, list []netlink.Link) (string, error) {
	for _, o := range list {
		if b := o.Attrs(); b.MasterIndex == a.Index || b.ParentIndex == a.Index && b.NetNsID < 0 && b.Index != a.Index {
			return "link " + b.Name + " is on it", nil
		}
	}
	if a.MasterIndex != 0 {
		return "it is a port of another link", nil
	}
	if a.Promisc > 0 {
		return "it is promiscuous, as for a sub-interface in passthru mode", nil
	}
	addresses, err := h.rt.NeighListExecute(netlink.Ndmsg{Family: unix.AF_BRIDGE, Index: uint32(a.Index)})
	if err != nil {
		return "", fmt.Errorf("list the addresses it receives: %w", err)
	}
	for _, n := range addresses {
		if len(n.HardwareAddr) > 0 && n.HardwareAddr[0]&1 == 0 {
			return "it receives for " + n.HardwareAddr.String() + ", as for a sub-interface", nil
		}
	}
	ips, err := h.rt.AddrList(&netlink.Device{LinkAttrs: *a}, netlink.FAMILY_ALL)
	if err != nil {
		return "", fmt.Errorf("list its addresses: %w", err)
	}
	for _, ip := range ips {
		// What a router's advertisement brought nobody asked for (addrconf_prefix_rcv).
		advertised := ip.Flags&unix.IFA_F_PERMANENT == 0 && ip.Flags&(unix.IFA_F_MANAGETEMPADDR|unix.IFA_F_TEMPORARY) != 0 && ip.IP.To4() == nil
		if ip.Scope == unix.RT_SCOPE_UNIVERSE && !advertised {
			return "it has address " + ip.IPNet.String(), nil
		}
	}
	return "", nil
}

// CheckParent tells whether MacVLAN sub-interfaces can be made on the named link now.
func (h *Host) CheckParent(name string) error {
	l, err := h.rt.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if l.Attrs().RawFlags&unix.IFF_UP == 0 {
		return fmt.Errorf("link %s is down", name)
	}
	return nil
}
