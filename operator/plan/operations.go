package plan

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"net"
	"slices"
	"strings"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// PF is one physical function as its node sees it, as far as planning goes.
type PF struct {
	PCIAddress string
	Name       string // netdev in the host's namespace; empty without one
	Driver     string
	Ethernet   bool // on other networks VFs have GUIDs instead of MACs
	MTU        int  // bytes; 0 without a netdev
	Up         bool
	Eswitch    string // legacy or switchdev; empty when the driver has no devlink eswitch
	TotalVFs   int
	NumVFs     int
	VFs        []VF // sorted by Index

	// Original is what was recorded of the PF before it was first changed, nil
	// when nothing was.
	Original *Original
	// TakenOver tells that the VFs are those the upstream operator made: its
	// file of the PF is in /etc/sriov-operator/pci, it was not externally managed,
	// and SetNumVFs has not been done since. Such VFs keep their addresses.
	TakenOver bool

	Bridge Bridge // see WithBridge
}

// Original is what a PF had before it was first changed, and what it was given.
type Original struct {
	MTU       int    // bytes
	RaisedMTU int    // bytes, as last set by SetPFMTU; 0 when it was not
	Eswitch   string // as in PF
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
	GUID       string // InfiniBand: its node GUID; empty when it cannot be read
	StableGUID string // what the PF shall assign, see StableGUID and GUIDs.Of
	NoGUID     string // why there is no StableGUID; empty where none is needed
	Drift      string // settings at the PF that are not the baseline, for people; empty when all are
	VDPA       string // driver of its vDPA device: virtio, vhost or another word; empty without a device
	IOMMU      bool   // it is in an IOMMU group
	RDMA       bool   // it has an RDMA device
	Held       bool   // by a pod: it is not touched
	Holder     string // the pod, for messages and the status
}

// Operations plans what turns the PF as it is into the PF as want says, and
// only that: a function that is right already is not in the plan, and neither
// is a VF that a pod holds. VFs get numbers and addresses only when they exist,
// so after SetNumVFs, SetEswitchMode and BindVFDriver the caller looks again and
// plans again until nothing is left.
//
// What a pod's VF lacks only while nobody holds it (addresses, names, MTU) comes
// right when the pod gives it back, and is not Blocked: an attached interface
// keeps the MTU it was attached with.
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
	p := pfWork{want: want, have: have}
	for _, vf := range have.VFs {
		if vf.Held {
			p.held = append(p.held, vf)
		}
	}
	if !want.ExternallyManaged {
		p.link()
		if p.shape() {
			return p.ops, nil, nil
		}
	}
	for _, vf := range have.VFs {
		if vf.Index < want.NumVfs {
			vfWork{&p, groups.of(vf.Index), vf}.all()
		}
	}
	return p.ops, p.blocked, nil
}

// pfWork is a plan in the making.
type pfWork struct {
	want    v1.Interface
	have    PF
	held    []VF
	ops     []Operation
	blocked []Blocked
}

func (p *pfWork) add(op Operation) {
	op.PCIAddress, op.VF = p.have.PCIAddress, -1
	p.ops = append(p.ops, op)
}

// link plans for the PF's own netdev.
func (p *pfWork) link() {
	mtu := p.want.Mtu
	o := p.have.Original
	switch {
	case mtu > p.have.MTU && p.want.NumVfs > 0:
		p.add(Operation{Kind: SetPFMTU, Number: mtu})
	// Lowered only when the MTU is the one that it was raised to here, for others
	// may need what they set; and while no pod may rely on it: some NICs drop what
	// is longer than the PF's MTU on VFs too.
	case o != nil && o.MTU > 0 && o.RaisedMTU == p.have.MTU && max(mtu, o.MTU) < p.have.MTU && len(p.held) == 0:
		p.add(Operation{Kind: SetPFMTU, Number: max(mtu, o.MTU)})
	}
	if !p.have.Up && p.want.NumVfs > 0 {
		p.add(Operation{Kind: SetPFUp})
	}
}

// modeFirst are the drivers that change the mode of their eswitch only while
// they have no VFs (ice_eswitch_mode_set in drivers/net/ethernet/intel/ice). The
// others make representors for the VFs there are, and older ones need to have some.
var modeFirst = []string{"ice"}

// EswitchMode is the mode that want asks of a PF with an eswitch, itself or, with VFs
// and no mode, by default; empty when any will do.
func EswitchMode(want v1.Interface) string {
	if want.NumVfs > 0 {
		return cmp.Or(want.EswitchMode, v1.EswitchModeLegacy)
	}
	return want.EswitchMode
}

// eswitch is the mode the PF shall have; empty when any will do.
func (p *pfWork) eswitch() string {
	switch mode := EswitchMode(p.want); {
	case p.have.Eswitch == "":
		return "" // possible has refused switchdev
	case mode == "" && p.have.Original != nil:
		return p.have.Original.Eswitch
	default:
		return mode
	}
}

// shape plans for the number of VFs and the mode of the eswitch. It tells
// whether the VFs are others afterwards, or without driver, so that nothing can
// be planned for them now.
func (p *pfWork) shape() bool {
	var op Operation
	var why string
	unbind := false
	mode := p.eswitch()
	count := p.want.NumVfs != p.have.NumVFs
	switch {
	case mode == p.have.Eswitch || mode == "":
		if !count {
			return false
		}
		op = Operation{Kind: SetNumVFs, Number: p.want.NumVfs}
	case slices.Contains(modeFirst, p.have.Driver) && p.have.NumVFs > 0:
		op = Operation{Kind: SetNumVFs, Number: 0}
		why = fmt.Sprintf("driver %s changes the eswitch mode to %s only while there are no VFs: ", p.have.Driver, mode)
	case count && !slices.Contains(modeFirst, p.have.Driver):
		op = Operation{Kind: SetNumVFs, Number: p.want.NumVfs}
	default:
		op, unbind = Operation{Kind: SetEswitchMode, Value: mode}, true
	}
	if n := len(p.have.VFs); n > 0 {
		op.Cost = VFReset
		switch {
		case unbind:
			op.Reason = fmt.Sprintf("the eswitch mode changes only while nothing uses the VFs: all %d VFs of the PF leave their driver", n)
		default:
			op.Reason = cmp.Or(why, "the kernel changes the number of VFs only through 0: ") + fmt.Sprintf("all %d VFs of the PF are made anew", n)
		}
	}
	if len(p.held) > 0 {
		op.PCIAddress, op.VF, op.Cost = p.have.PCIAddress, -1, Evict
		p.blocked = append(p.blocked, Blocked{Operation: op, VFs: p.held})
		return false
	}
	if unbind {
		for _, vf := range p.have.VFs {
			if vf.Driver != "" {
				p.ops = append(p.ops, Operation{Kind: UnbindVFDriver, PCIAddress: vf.PCIAddress, VF: vf.Index, Cost: VFReset, Reason: op.Reason})
			}
		}
	}
	p.add(op)
	return true
}

// Ours tells whether the PF's VFs are this project's to remove: it made them,
// and one has the address that only StableMAC gives, or it took them over. It
// tells after any restart and needs no record of its own.
func Ours(have PF) bool {
	return have.TakenOver || slices.ContainsFunc(have.VFs, func(vf VF) bool {
		return vf.StableMAC != "" && vf.AdminMAC == vf.StableMAC || vf.StableGUID != "" && vf.GUID == vf.StableGUID
	})
}

// HomeMAC is the address the PF shall assign to the VF while no pod asks for
// another: StableMAC, or of a VF that was taken over the one it has.
func (have PF) HomeMAC(vf VF) string {
	if have.TakenOver && !vf.Held && isSet(vf.AdminMAC) {
		return vf.AdminMAC
	}
	return vf.StableMAC
}

// isSet tells an address from none and from the all-zero one.
func isSet(address string) bool { return strings.Trim(address, "0:") != "" }

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
	case want.EswitchMode == v1.EswitchModeSwitchdev && have.Eswitch == "":
		return field("eSwitchMode", "switchdev: driver %s has no eswitch that devlink can switch: use legacy, or another NIC", have.Driver)
	case want.ExternallyManaged && want.EswitchMode != "" && have.Eswitch != "" && want.EswitchMode != have.Eswitch:
		return field("eSwitchMode", "%s is asked of an externally managed PF that is in %s: change it there, or ask for %s", want.EswitchMode, have.Eswitch, have.Eswitch)
	}
	return nil
}

// userspace are drivers that give a device to user space: no netdev.
var userspace = []string{v1.DeviceTypeVfioPci, "mlx5_vfio_pci", "uio_pci_generic", "igb_uio"}

// vfWork is the part of a plan for one VF.
type vfWork struct {
	*pfWork
	group v1.VfGroup
	vf    VF
}

// do plans an operation. On a VF that a pod holds it waits if it would disturb the
// pod, and otherwise for the VF to come back.
func (w vfWork) do(op Operation) {
	op.PCIAddress, op.VF = w.vf.PCIAddress, w.vf.Index
	if !w.vf.Held {
		w.ops = append(w.ops, op)
	} else if op.Cost > Live {
		op.Cost = Evict
		w.blocked = append(w.blocked, Blocked{Operation: op, VFs: []VF{w.vf}})
	}
}

func (w vfWork) refuse(kind Kind, value, reason string) {
	op := Operation{Kind: kind, PCIAddress: w.vf.PCIAddress, VF: w.vf.Index, Value: value, Cost: Refused, Reason: reason}
	w.blocked = append(w.blocked, Blocked{Operation: op})
}

func (w vfWork) bind(driver string) {
	op := Operation{Kind: BindVFDriver, Value: driver}
	if w.vf.Driver != "" {
		op.Cost, op.Reason = VFReset, fmt.Sprintf("the VF must leave driver %s", w.vf.Driver)
	}
	w.do(op)
}

// all plans for the VF: first what its PF holds for it, then its driver, and then,
// when it has the right one, what the driver made.
func (w vfWork) all() {
	rebind := false
	switch {
	case w.want.ExternallyManaged:
	case w.have.Ethernet:
		w.settings()
	default:
		rebind = w.guid()
	}
	if w.vf.VDPA != "" && w.vf.VDPA != w.group.VdpaType {
		w.do(Operation{Kind: SetVFVDPA, Cost: VFReset, Reason: "the VF's vDPA device is removed"})
	}
	switch userspace := slices.Contains(userspace, w.vf.Driver); {
	case w.group.DeviceType == v1.DeviceTypeVfioPci:
		w.vfio()
	case w.vf.Driver == "" || userspace || rebind:
		w.bind("")
	default:
		w.made()
	}
}

// settings plans for what an Ethernet PF holds for the VF.
func (w vfWork) settings() {
	if mac := w.have.HomeMAC(w.vf); mac != "" && w.vf.AdminMAC != mac {
		w.do(Operation{Kind: SetVFAdminMAC, Value: mac})
	}
	// In switchdev mode the rules of the switch say all this, and drivers take
	// none of it.
	if w.vf.Drift != "" && w.have.Eswitch != v1.EswitchModeSwitchdev {
		w.do(Operation{Kind: ResetVFSettings, Value: w.vf.Drift})
	}
}

// guid plans for the GUID of an InfiniBand VF, which its driver reads when it
// starts, and tells whether it must start again.
func (w vfWork) guid() (rebind bool) {
	vf := w.vf
	switch {
	case vf.NoGUID != "" && !vf.Held:
		w.refuse(SetVFGUID, "", vf.NoGUID)
		return false
	case vf.StableGUID == "", vf.GUID == vf.StableGUID, w.have.TakenOver && isSet(vf.GUID):
		return false
	case vf.GUID == "" && vf.Driver != "":
		return false // it cannot be read, so nobody knows that it is wrong
	}
	op := Operation{Kind: SetVFGUID, Value: vf.StableGUID}
	bound := vf.Driver != "" && !slices.Contains(userspace, vf.Driver)
	if bound {
		op.Cost, op.Reason = VFReset, "the VF's driver reads the GUID only when it starts"
	}
	w.do(op)
	return bound
}

func (w vfWork) vfio() {
	switch {
	case w.vf.Driver == v1.DeviceTypeVfioPci:
	case !w.vf.IOMMU:
		// Without one vfio can only be had in its unsafe mode, in which a pod reads
		// and writes all memory of the node.
		w.refuse(BindVFDriver, v1.DeviceTypeVfioPci, "deviceType vfio-pci needs an IOMMU and the VF is in no IOMMU group: turn VT-d or AMD-Vi on in the BIOS and boot with intel_iommu=on or amd_iommu=on, and iommu=pt")
	default:
		w.bind(v1.DeviceTypeVfioPci)
	}
}

// made plans for what the VF's kernel driver has made.
func (w vfWork) made() {
	// Before the mode is the one asked for, the driver has no vDPA.
	if w.group.VdpaType != "" && w.vf.VDPA == "" && w.have.Eswitch == w.want.EswitchMode {
		w.do(Operation{Kind: SetVFVDPA, Value: w.group.VdpaType})
	}
	if w.vf.Name == "" {
		return // its event brings us back
	}
	if w.vf.HostName != "" && w.vf.Name != w.vf.HostName {
		w.do(Operation{Kind: RenameVF, Value: w.vf.HostName})
	}
	mac := w.have.HomeMAC(w.vf)
	if w.have.Ethernet && !w.want.ExternallyManaged && !w.have.TakenOver && mac != "" && w.vf.MAC != mac {
		w.do(Operation{Kind: SetVFMAC, Value: mac})
	}
	if w.group.Mtu > 0 && w.vf.MTU != w.group.Mtu {
		w.do(Operation{Kind: SetVFMTU, Number: w.group.Mtu})
	}
	if w.group.IsRdma && !w.vf.RDMA && !w.vf.Held {
		w.refuse(RequireRDMA, "", fmt.Sprintf("isRdma is asked for and driver %s has made no RDMA device for the VF: load its RDMA module on the node, or set isRdma to false", w.vf.Driver))
	}
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
