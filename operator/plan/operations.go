package plan

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// PF is one physical function as its node sees it, as far as planning goes.
type PF struct {
	PCIAddress string
	Name       string // netdev in the host's namespace; empty without one
	Ethernet   bool   // on other networks VFs have no MAC that we could set
	MTU        int    // bytes; 0 without a netdev
	Up         bool
	TotalVFs   int
	NumVFs     int
	VFs        []VF // sorted by Index
}

// VF is one virtual function as its node sees it.
type VF struct {
	Index      int
	PCIAddress string
	Driver     string // empty when none is bound
	Name       string // netdev in the host's namespace; empty without one
	HostName   string // the name it shall have there; empty when any will do
	MTU        int    // of the netdev; 0 without one
	MAC        string // of the netdev; empty without one
	AdminMAC   string // what the PF assigns; empty when it cannot be read
	StableMAC  string // what the PF shall assign, see StableMAC
	Held       bool   // by a pod: it is not touched
	Holder     string // the pod, "namespace/name"
}

// Kind is what an Operation does.
type Kind string

// The operations, in the order they are done on one PF. New VFs have no driver
// until BindDriver: they get their address first and are probed once.
const (
	RaisePFMTU    Kind = "RaisePFMTU"    // Number: bytes
	SetPFUp       Kind = "SetPFUp"       //
	SetNumVFs     Kind = "SetNumVFs"     // Number: how many; destroys those there are
	SetVFAdminMAC Kind = "SetVFAdminMAC" // Value: the MAC the PF assigns
	BindVFDriver  Kind = "BindVFDriver"  // Value: driver, empty for the kernel's choice
	RenameVF      Kind = "RenameVF"      // Value: the name
	SetVFMAC      Kind = "SetVFMAC"      // Value: the MAC of the netdev itself
	SetVFMTU      Kind = "SetVFMTU"      // Number: bytes
)

// Operation is one change of one function.
type Operation struct {
	Kind       Kind
	PCIAddress string // the function: the PF's or the VF's
	VF         int    // index below the PF; -1 for the PF
	Value      string
	Number     int
}

// String reads "SetVFMTU 9000 on VF 3 (0000:3b:02.3)".
func (o Operation) String() string {
	s := string(o.Kind)
	switch o.Kind {
	case RaisePFMTU, SetNumVFs, SetVFMTU:
		s += " " + strconv.Itoa(o.Number)
	case BindVFDriver:
		s += " " + strings.TrimSpace(cmp.Or(o.Value, "default"))
	case SetVFAdminMAC, RenameVF, SetVFMAC:
		s += " " + o.Value
	case SetPFUp:
	}
	if o.VF < 0 {
		return s + " on " + o.PCIAddress
	}
	return fmt.Sprintf("%s on VF %d (%s)", s, o.VF, o.PCIAddress)
}

// Blocked is a change that must wait because a pod holds a VF it would destroy
// or take away.
type Blocked struct {
	Operation Operation
	VFs       []VF // those in use
}

// String names what waits, for whom, and the mend.
func (b Blocked) String() string {
	pods := make([]string, len(b.VFs))
	for i, vf := range b.VFs {
		pods[i] = fmt.Sprintf("%s (VF %d)", cmp.Or(vf.Holder, "an unknown pod"), vf.Index)
	}
	return fmt.Sprintf("%s waits for the pods that hold its VFs: %s; delete them or take the change back", b.Operation, strings.Join(pods, ", "))
}

// Operations plans what turns the PF as it is into the PF as want says, and
// only that: a function that is right already is not in the plan, and neither
// is a VF that a pod holds. VFs get numbers and addresses only when they exist,
// so after SetNumVFs, and after BindVFDriver, the caller looks again and plans
// again until nothing is left.
//
// An error says which field of want cannot be had; nothing is planned then.
func Operations(want v1.Interface, have PF) ([]Operation, []Blocked, error) {
	groups, err := Groups(want)
	if err != nil {
		return nil, nil, err
	}
	if err := possible(want, have); err != nil {
		return nil, nil, err
	}
	var ops []Operation
	var blocked []Blocked
	pf := Operation{PCIAddress: have.PCIAddress, VF: -1}
	if !want.ExternallyManaged && want.NumVfs > 0 {
		if want.Mtu > have.MTU {
			pf.Kind, pf.Number = RaisePFMTU, want.Mtu
			ops = append(ops, pf)
		}
		if !have.Up {
			pf.Kind, pf.Number = SetPFUp, 0
			ops = append(ops, pf)
		}
	}
	if !want.ExternallyManaged && want.NumVfs != have.NumVFs {
		pf.Kind, pf.Number = SetNumVFs, want.NumVfs
		held := slices.DeleteFunc(slices.Clone(have.VFs), func(vf VF) bool { return !vf.Held })
		if len(held) == 0 {
			return append(ops, pf), nil, nil
		}
		blocked = append(blocked, Blocked{Operation: pf, VFs: held})
	}
	for _, vf := range have.VFs {
		if vf.Index >= want.NumVfs {
			continue
		}
		vfOps := vfOperations(want, groups.of(vf.Index), have, vf)
		if !vf.Held {
			ops = append(ops, vfOps...)
			continue
		}
		// The rest comes right when the pod gives the VF back.
		for _, op := range vfOps {
			if op.Kind == BindVFDriver {
				blocked = append(blocked, Blocked{Operation: op, VFs: []VF{vf}})
			}
		}
	}
	return ops, blocked, nil
}

// Ours tells whether this project made the PF's VFs: one has the address that
// only StableMAC gives. It tells after any restart and needs no record.
func Ours(have PF) bool {
	return slices.ContainsFunc(have.VFs, func(vf VF) bool {
		return vf.StableMAC != "" && vf.AdminMAC == vf.StableMAC
	})
}

// possible checks want against what the PF can do at all.
func possible(want v1.Interface, have PF) error {
	field := func(name, format string, args ...any) error {
		return fmt.Errorf("interface %s (%s): %s: %s", want.PciAddress, cmp.Or(have.Name, want.Name), name, fmt.Sprintf(format, args...))
	}
	switch {
	case want.NumVfs < 0:
		return field("numVfs", "%d is negative: use 0 or more", want.NumVfs)
	case want.NumVfs > have.TotalVFs:
		return field("numVfs", "%d is more than the %d VFs the device can make: use %d or less, or raise the limit in its firmware", want.NumVfs, have.TotalVFs, have.TotalVFs)
	case want.ExternallyManaged && want.NumVfs > have.NumVFs:
		return field("numVfs", "%d VFs are asked of an externally managed PF that has %d: create them, or ask for %d or less", want.NumVfs, have.NumVFs, have.NumVFs)
	case want.ExternallyManaged && want.Mtu > have.MTU:
		return field("mtu", "%d is more than the %d of the externally managed PF: raise the PF's, or ask for %d or less", want.Mtu, have.MTU, have.MTU)
	case want.EswitchMode == v1.EswitchModeSwitchdev:
		return field("eSwitchMode", "switchdev is not supported by this version of the agent: use legacy")
	}
	return nil
}

// userspace are drivers that give a device to user space: no netdev.
var userspace = []string{"vfio-pci", "uio_pci_generic", "igb_uio"}

func vfOperations(want v1.Interface, group v1.VfGroup, pf PF, vf VF) []Operation {
	var ops []Operation
	add := func(kind Kind, value string, number int) {
		ops = append(ops, Operation{Kind: kind, PCIAddress: vf.PCIAddress, VF: vf.Index, Value: value, Number: number})
	}
	mac := pf.Ethernet && !want.ExternallyManaged && vf.StableMAC != ""
	if mac && vf.AdminMAC != vf.StableMAC {
		add(SetVFAdminMAC, vf.StableMAC, 0)
	}
	if group.DeviceType == v1.DeviceTypeVfioPci {
		if vf.Driver != v1.DeviceTypeVfioPci {
			add(BindVFDriver, v1.DeviceTypeVfioPci, 0)
		}
		return ops
	}
	if vf.Driver == "" || slices.Contains(userspace, vf.Driver) {
		add(BindVFDriver, "", 0)
		return ops
	}
	if vf.Name == "" {
		return ops // its event brings us back
	}
	if vf.HostName != "" && vf.Name != vf.HostName {
		add(RenameVF, vf.HostName, 0)
	}
	if mac && vf.MAC != vf.StableMAC {
		add(SetVFMAC, vf.StableMAC, 0)
	}
	if group.Mtu > 0 && vf.MTU != group.Mtu {
		add(SetVFMTU, "", group.Mtu)
	}
	return ops
}

// VFGroups are the groups of one PF with their ranges read.
type VFGroups []VFGroup

// VFGroup is what the VFs First to Last, both included, are for.
type VFGroup struct {
	v1.VfGroup
	First, Last int
}

// Of returns the group the VF is in; ok is false when it is in none.
func (g VFGroups) Of(index int) (VFGroup, bool) {
	for _, group := range g {
		if group.First <= index && index <= group.Last {
			return group, true
		}
	}
	return VFGroup{}, false
}

func (g VFGroups) of(index int) v1.VfGroup {
	group, _ := g.Of(index)
	return group.VfGroup
}

// Groups reads the ranges of the interface's VF groups. It refuses ranges that
// are malformed, overlap, or reach beyond numVfs.
func Groups(want v1.Interface) (VFGroups, error) {
	groups := make(VFGroups, 0, len(want.VfGroups))
	for i, g := range want.VfGroups {
		fail := func(why string) error {
			return fmt.Errorf("interface %s: vfGroups[%d] (policy %s): vfRange %q %s", want.PciAddress, i, g.PolicyName, g.VfRange, why)
		}
		first, last, err := ParseVfRange(g.VfRange)
		if err != nil {
			return nil, fmt.Errorf("interface %s: vfGroups[%d] (policy %s): %w", want.PciAddress, i, g.PolicyName, err)
		}
		if last >= want.NumVfs {
			return nil, fail(fmt.Sprintf("reaches beyond the last of numVfs %d VFs, %d", want.NumVfs, want.NumVfs-1))
		}
		for _, other := range groups {
			if first <= other.Last && other.First <= last {
				return nil, fail(fmt.Sprintf("overlaps %q of policy %s: give the policies different VFs", other.VfRange, other.PolicyName))
			}
		}
		groups = append(groups, VFGroup{VfGroup: g, First: first, Last: last})
	}
	return groups, nil
}

// StableMAC is the address a PF assigns to one of its VFs while no pod asks for
// another: unicast, locally administered (IEEE 802, the second bit of the first
// octet), and the same at each call, so that it survives restarts of the agent
// and of the node and needs no record.
//
// It comes from the node's name, the PF's permanent address (which keeps two
// clusters with equal node names apart; empty when the NIC has none), the PF's
// PCI address and the VF's index, by 46 bits of SHA-256.
func StableMAC(node string, permanent net.HardwareAddr, pfAddress string, index int) net.HardwareAddr {
	sum := sha256.Sum256(fmt.Appendf(nil, "sluice VF %q %s %s %d", node, permanent, pfAddress, index))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^0x01 | 0x02
	return mac
}
