package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ErrNoVF says that a PCI address names no VF of this machine.
var ErrNoVF = errors.New("no such VF")

// VFRef names one VF and says where it stands now.
type VFRef struct {
	PCIAddress string
	PF         string // PCI address of its PF
	PFName     string // netdev of its PF
	Index      int    // number below the PF
	Driver     string // empty when none is bound
	Name       string // netdev in the host's namespace; empty when it is elsewhere or there is none
	Userspace  bool   // bound to a driver that makes no netdev and hands the VF to a process

	Representor string // netdev that stands for it in switchdev mode; empty without one in this namespace
}

// userspaceDrivers hand a whole PCI function to a process.
var userspaceDrivers = map[string]bool{
	"vfio-pci": true, "mlx5_vfio_pci": true, "uio_pci_generic": true, "igb_uio": true,
}

// Attacher is the kernel side of attaching VFs to pods: VF settings through the
// PF, moves between network namespaces, addresses and routes. Methods that take
// a *Netns work in the host's namespace when it is nil.
type Attacher struct {
	sysfs string
	host  *Netns

	indexes sync.Map // numbers that VFs had below their PF, by their addresses

	vfLists, vfMessages, linkMessages atomic.Uint64
}

// Requests counts what the node pays for attachments while the kernel holds RTNL.
type Requests struct {
	VFLists      uint64 // reads of a PF's VF list, for which the driver is asked about each VF
	VFMessages   uint64 // messages that set a VF through its PF
	LinkMessages uint64 // messages that move or change a link
}

// Requests counts those of this Attacher since it was opened.
func (a *Attacher) Requests() Requests {
	return Requests{VFLists: a.vfLists.Load(), VFMessages: a.vfMessages.Load(), LinkMessages: a.linkMessages.Load()}
}

// OpenAttacher opens the kernel for attachments. The network namespace of the
// calling process is the host's; sysfs is where sysfs of that namespace is
// mounted, usually DefaultSysfs.
func OpenAttacher(sysfs string) (*Attacher, error) {
	ns, err := OpenNetns("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	// Many use the host's socket at a time, so it is open from the start.
	if _, err = ns.rtnl(); err != nil {
		ns.Close()
		return nil, err
	}
	return &Attacher{sysfs: sysfs, host: ns}, nil
}

// Close gives the sockets back.
func (a *Attacher) Close() { a.host.Close() }

// HostNetns is the host's network namespace, as the target of a move.
func (a *Attacher) HostNetns() *Netns { return a.host }

// OpenNetns opens the namespace bound at path, see the function OpenNetns.
func (a *Attacher) OpenNetns(path string) (*Netns, error) { return OpenNetns(path) }

// rtnl returns the sockets of ns, of the host's namespace when it is nil.
func (a *Attacher) rtnl(ns *Netns) (*rtnl, error) {
	if ns == nil {
		ns = a.host
	}
	return ns.rtnl()
}

// VF reads where a VF stands. The error wraps ErrNoVF when the address is not
// that of an existing VF.
func (a *Attacher) VF(pciAddress string) (VFRef, error) {
	ref := VFRef{PCIAddress: pciAddress, Index: -1}
	if !ValidPCIAddress(pciAddress) {
		return ref, fmt.Errorf("%w: %q is not a PCI address like 0000:3b:02.1", ErrNoVF, pciAddress)
	}
	device := filepath.Join(a.sysfs, "bus/pci/devices", pciAddress)
	pf, err := linkBase(filepath.Join(device, "physfn"))
	if err != nil {
		return ref, err
	}
	if pf == "" {
		if _, err := os.Stat(device); errors.Is(err, fs.ErrNotExist) {
			return ref, fmt.Errorf("%w: there is no PCI device %s on this node", ErrNoVF, pciAddress)
		} else if err != nil {
			return ref, err
		}
		return ref, fmt.Errorf("%w: PCI device %s is not a virtual function", ErrNoVF, pciAddress)
	}
	ref.PF = pf
	pfDevice := filepath.Join(a.sysfs, "bus/pci/devices", pf)
	if ref.Index, err = a.vfIndex(pfDevice, pf, pciAddress); err != nil {
		return ref, err
	}
	if ref.Index < 0 {
		return ref, fmt.Errorf("%w: PF %s does not list %s among its virtual functions", ErrNoVF, pf, pciAddress)
	}
	pfName, representors, err := netdevsOf(pfDevice)
	if err != nil {
		return ref, err
	}
	ref.PFName, ref.Representor = pfName, representors[ref.Index]
	if ref.PFName == "" {
		return ref, fmt.Errorf("PF %s of VF %s has no netdev in the host's network namespace", pf, pciAddress)
	}
	if ref.Driver, err = linkBase(filepath.Join(device, "driver")); err != nil {
		return ref, err
	}
	ref.Userspace = userspaceDrivers[ref.Driver]
	// Below a VF there is no representor: the first netdev is its own.
	netdevs, err := names(filepath.Join(device, "net"))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if len(netdevs) > 0 {
		ref.Name = netdevs[0]
	}
	return ref, err
}

// vfIndex returns the number of a VF below its PF, -1 when the PF does not list it. The
// number follows from the addresses (Single Root I/O Virtualization 1.1, 2.1.2); where a
// kernel does not tell the offsets, all VFs are looked at.
func (a *Attacher) vfIndex(pfDevice, pf, vf string) (index int, err error) {
	is := func(i int) bool {
		listed, _ := linkBase(filepath.Join(pfDevice, fmt.Sprintf("virtfn%d", i)))
		return listed == vf
	}
	if known, ok := a.indexes.Load(vf); ok && is(known.(int)) {
		return known.(int), nil
	}
	defer func() {
		if index >= 0 {
			a.indexes.Store(vf, index)
		}
	}()
	offset, errOffset := readInt(filepath.Join(pfDevice, "sriov_offset"))
	stride, errStride := readInt(filepath.Join(pfDevice, "sriov_stride"))
	if errOffset == nil && errStride == nil {
		if i := (routingID(vf) - routingID(pf) - offset) / max(stride, 1); i >= 0 && is(i) {
			return i, nil
		}
	}
	entries, err := os.ReadDir(pfDevice)
	if err != nil {
		return -1, fmt.Errorf("list VFs of %s: %w", pf, err)
	}
	for _, i := range vfIndexes(entries) {
		if is(i) {
			return i, nil
		}
	}
	return -1, nil
}

// routingID is a PCI address without its domain, as the bus has it.
func routingID(pciAddress string) int {
	var domain, bus, device, function int
	_, _ = fmt.Sscanf(pciAddress, "%x:%x:%x.%x", &domain, &bus, &device, &function) // valid, or it is on no bus
	return bus<<8 | device<<3 | function
}

// VFAttrs is a set of attributes of VFSettings.
type VFAttrs uint

// The attributes, in the order the kernel takes them from one message
// (do_setvfinfo in net/core/rtnetlink.c).
const (
	VFMAC VFAttrs = 1 << iota
	VFVLAN
	VFRate
	VFSpoofChk
	VFLinkState
	VFTrust
)

// vfAttr is how one attribute is named, compared and encoded.
type vfAttr struct {
	bit    VFAttrs
	name   string
	value  func(VFSettings) string
	encode func(info *nl.RtAttr, vf uint32, s VFSettings)
}

func onOff(b bool) (string, uint32) {
	if b {
		return "on", 1
	}
	return "off", 0
}

func u32(values ...uint32) []byte {
	var b []byte
	for _, v := range values {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b
}

var vfAttrs = []vfAttr{
	{VFMAC, "mac", func(s VFSettings) string { return s.MAC.String() }, func(info *nl.RtAttr, vf uint32, s VFSettings) {
		var mac [32]byte // MAX_ADDR_LEN
		copy(mac[:], s.MAC)
		info.AddRtAttr(nl.IFLA_VF_MAC, append(u32(vf), mac[:]...))
	}},
	{VFVLAN, "vlan", func(s VFSettings) string {
		if s.VLAN == 0 {
			return "0" // without a tag priority and protocol mean nothing
		}
		return fmt.Sprintf("%d qos %d proto 0x%04x", s.VLAN, s.VLANQoS, uint16(s.VLANProto))
	}, func(info *nl.RtAttr, vf uint32, s VFSettings) {
		proto := s.VLANProto
		if s.VLAN == 0 || proto == 0 {
			proto = Dot1Q
		}
		b := u32(vf, uint32(s.VLAN), uint32(s.VLANQoS))
		b = binary.BigEndian.AppendUint16(b, uint16(proto))
		info.AddRtAttr(nl.IFLA_VF_VLAN_LIST|unix.NLA_F_NESTED, nil).
			AddRtAttr(nl.IFLA_VF_VLAN_INFO, append(b, 0, 0))
	}},
	{VFRate, "min_tx_rate/max_tx_rate", func(s VFSettings) string { return fmt.Sprintf("%d/%d", s.MinTxRate, s.MaxTxRate) },
		func(info *nl.RtAttr, vf uint32, s VFSettings) {
			info.AddRtAttr(nl.IFLA_VF_RATE, u32(vf, uint32(s.MinTxRate), uint32(s.MaxTxRate)))
		}},
	{VFSpoofChk, "spoofchk", func(s VFSettings) string { v, _ := onOff(s.SpoofChk); return v },
		func(info *nl.RtAttr, vf uint32, s VFSettings) {
			_, v := onOff(s.SpoofChk)
			info.AddRtAttr(nl.IFLA_VF_SPOOFCHK, u32(vf, v))
		}},
	{VFLinkState, "link_state", func(s VFSettings) string { return [...]string{"auto", "enable", "disable"}[s.LinkState%3] },
		func(info *nl.RtAttr, vf uint32, s VFSettings) {
			info.AddRtAttr(nl.IFLA_VF_LINK_STATE, u32(vf, uint32(s.LinkState)))
		}},
	{VFTrust, "trust", func(s VFSettings) string { v, _ := onOff(s.Trust); return v },
		func(info *nl.RtAttr, vf uint32, s VFSettings) {
			_, v := onOff(s.Trust)
			info.AddRtAttr(nl.IFLA_VF_TRUST, u32(vf, v))
		}},
}

// SetVFSettings gives the VF all of want in one message through its PF. Drivers
// that refuse one attribute refuse the message; then the VF's settings are read
// once and only what differs is set, one attribute at a time. A driver that does
// not know an attribute is an error only when the attribute is in required: what
// a driver cannot change is not changed by a pod either. A want without MAC
// leaves the MAC as it is.
func (a *Attacher) SetVFSettings(ctx context.Context, vf VFRef, want VFSettings, required VFAttrs) error {
	attrs := vfAttrs
	if len(want.MAC) == 0 {
		attrs = attrs[1:]
	}
	if a.setVF(ctx, vf, want, attrs...) == nil {
		return nil
	}
	have, err := a.VFSettings(vf)
	if err != nil {
		return err
	}
	for _, attr := range attrs {
		if attr.value(have) == attr.value(want) {
			continue
		}
		err := a.setVF(ctx, vf, want, attr)
		if errors.Is(err, unix.EOPNOTSUPP) && required&attr.bit == 0 {
			continue
		}
		if err != nil {
			return fmt.Errorf("set %s of VF %d of %s (%s) to %s: %w",
				attr.name, vf.Index, vf.PFName, vf.PCIAddress, attr.value(want), err)
		}
	}
	return nil
}

// SetVFLinkState has the PF show the VF that link, and changes nothing else of it.
func (a *Attacher) SetVFLinkState(ctx context.Context, vf VFRef, state LinkState) error {
	at := slices.IndexFunc(vfAttrs, func(attr vfAttr) bool { return attr.bit == VFLinkState })
	if err := a.setVF(ctx, vf, VFSettings{LinkState: state}, vfAttrs[at]); err != nil {
		return fmt.Errorf("set link_state of VF %d of %s (%s): %w", vf.Index, vf.PFName, vf.PCIAddress, err)
	}
	return nil
}

// setVF sends the attributes in one message, again while the driver is busy.
func (a *Attacher) setVF(ctx context.Context, vf VFRef, want VFSettings, attrs ...vfAttr) error {
	conn, err := a.rtnl(nil)
	if err != nil {
		return err
	}
	a.vfMessages.Add(1)
	return conn.setVF(ctx, 0, vf.PFName, vf.Index, want, attrs...)
}

// setVF has the PF by its link's index, or by its name when that is 0.
func (r *rtnl) setVF(ctx context.Context, pf int, name string, vf int, want VFSettings, attrs ...vfAttr) error {
	return retry(ctx, func() error {
		list := nl.NewRtAttr(unix.IFLA_VFINFO_LIST|unix.NLA_F_NESTED, nil)
		info := list.AddRtAttr(nl.IFLA_VF_INFO|unix.NLA_F_NESTED, nil)
		for _, attr := range attrs {
			attr.encode(info, uint32(vf), want)
		}
		data := []*nl.RtAttr{list}
		if pf == 0 {
			data = append(data, nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
		}
		_, err := r.link(unix.RTM_SETLINK, pf, nil, data...)
		return err
	})
}

// retry repeats f while it fails with a temporary error, for two seconds.
func retry(ctx context.Context, f func() error) error {
	for deadline := time.Now().Add(2 * time.Second); ; {
		err := f()
		if err == nil || !temporary(err) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// VFSettings reads what the PF holds for the VF. The kernel asks the driver for
// all VFs of the PF, while it holds RTNL: not for the ordinary path of an ADD.
func (a *Attacher) VFSettings(vf VFRef) (VFSettings, error) {
	pf, err := a.pfIndex(vf)
	if err != nil {
		return VFSettings{}, err
	}
	conn, err := a.rtnl(nil)
	if err != nil {
		return VFSettings{}, err
	}
	a.vfLists.Add(1)
	all, err := conn.vfSettings(pf)
	if err != nil {
		return VFSettings{}, fmt.Errorf("read VFs of %s: %w", vf.PFName, err)
	}
	if settings, ok := all[vf.Index]; ok {
		return settings, nil
	}
	return VFSettings{}, fmt.Errorf("read VFs of %s: the driver tells nothing of VF %d", vf.PFName, vf.Index)
}

// vfSettings reads what the PF with the given link index holds for its VFs, by
// number.
func (r *rtnl) vfSettings(pf int) (map[int]VFSettings, error) {
	const filterVF, skipStats = 1 << 0, 1 << 3 // RTEXT_FILTER_VF, RTEXT_FILTER_SKIP_STATS
	msgs, err := r.link(unix.RTM_GETLINK, pf, nil, nl.NewRtAttr(unix.IFLA_EXT_MASK, u32(filterVF|skipStats)))
	if err != nil {
		return nil, err
	}
	all := map[int]VFSettings{}
	for _, m := range msgs {
		if err := parseVFInfo(m, all); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// parseVFInfo adds the VFs of an RTM_NEWLINK message to all. A VF's number is part
// of each attribute; the place in the list is not it, for the kernel leaves out
// VFs the driver gives no answer for.
func parseVFInfo(m []byte, all map[int]VFSettings) error {
	if len(m) < unix.SizeofIfInfomsg {
		return fmt.Errorf("short link message of %d bytes", len(m))
	}
	list, _ := attribute(m[unix.SizeofIfInfomsg:], unix.IFLA_VFINFO_LIST)
	for _, info := range eachAttribute(list) {
		s, n := VFSettings{VLANProto: Dot1Q}, -1
		for kind, value := range eachAttribute(info) {
			if vf, ok := parseVFField(&s, int(kind), value); ok {
				n = vf
			}
		}
		if n >= 0 {
			all[n] = s
		}
	}
	return nil
}

// parseVFField reads one attribute of a VF into s and returns the VF's number.
func parseVFField(s *VFSettings, kind int, b []byte) (vf int, ok bool) {
	const unknown = ^uint32(0) // what the kernel says for a setting the driver does not know
	word := func(i int) uint32 { return binary.NativeEndian.Uint32(b[4*i:]) }
	switch {
	case kind == nl.IFLA_VF_MAC && len(b) >= 10:
		s.MAC = net.HardwareAddr(bytes.Clone(b[4:10]))
	case kind == nl.IFLA_VF_VLAN && len(b) >= 12:
		s.VLAN, s.VLANQoS = int(word(1)), int(word(2))
	case kind == nl.IFLA_VF_VLAN_LIST:
		if info, ok := attribute(b, nl.IFLA_VF_VLAN_INFO); ok && len(info) >= 14 {
			if p := VLANProto(binary.BigEndian.Uint16(info[12:])); p != 0 {
				s.VLANProto = p
			}
		}
		return 0, false
	case kind == nl.IFLA_VF_RATE && len(b) >= 12:
		s.MinTxRate, s.MaxTxRate = int(word(1)), int(word(2))
	case kind == nl.IFLA_VF_SPOOFCHK && len(b) >= 8:
		s.SpoofChk = word(1) != 0 // unknown to the driver counts as on, which is the baseline
	case kind == nl.IFLA_VF_LINK_STATE && len(b) >= 8:
		s.LinkState = LinkState(word(1))
	case kind == nl.IFLA_VF_TRUST && len(b) >= 8:
		s.Trust = word(1) != 0 && word(1) != unknown
	case kind == nl.IFLA_VF_IB_NODE_GUID && len(b) >= nl.SizeofVfGUID:
		s.NodeGUID = binary.BigEndian.AppendUint64(nil, binary.NativeEndian.Uint64(b[8:]))
	case kind == nl.IFLA_VF_IB_PORT_GUID && len(b) >= nl.SizeofVfGUID:
		s.PortGUID = binary.BigEndian.AppendUint64(nil, binary.NativeEndian.Uint64(b[8:]))
	default:
		return 0, false
	}
	return int(word(0)), true
}

// pfIndex is the index of the PF's netdev.
func (a *Attacher) pfIndex(vf VFRef) (int, error) {
	if vf.PFName == "" || strings.ContainsRune(vf.PFName, '/') {
		return 0, fmt.Errorf("PF %s of VF %s has no netdev", vf.PF, vf.PCIAddress)
	}
	n, err := readInt(filepath.Join(a.sysfs, "class/net", vf.PFName, "ifindex"))
	if err != nil {
		return 0, fmt.Errorf("find PF %s of VF %s: %w", vf.PFName, vf.PCIAddress, err)
	}
	return n, nil
}

// DiffVFSettings names each attribute of have that is not as in want. A want
// without MAC agrees with every MAC.
func DiffVFSettings(have, want VFSettings) []string {
	var diff []string
	for _, attr := range vfAttrs {
		if attr.bit == VFMAC && len(want.MAC) == 0 {
			continue
		}
		if h, w := attr.value(have), attr.value(want); h != w {
			diff = append(diff, fmt.Sprintf("%s of the VF is %s, not %s", attr.name, h, w))
		}
	}
	return diff
}

// Baseline are the settings of a VF that no pod has, all but its MAC.
func Baseline() VFSettings {
	return VFSettings{VLANProto: Dot1Q, SpoofChk: true, LinkState: LinkAuto}
}

// Drift tells which settings, all but the MAC, are not the baseline's.
func (s VFSettings) Drift() VFAttrs {
	var drift VFAttrs
	for _, attr := range vfAttrs[1:] {
		if attr.value(s) != attr.value(Baseline()) {
			drift |= attr.bit
		}
	}
	return drift
}

// Text names the attributes with their values: "vlan 100 qos 0 proto 0x8100, trust on".
func (s VFSettings) Text(attrs VFAttrs) string {
	var all []string
	for _, attr := range vfAttrs {
		if attrs&attr.bit != 0 {
			all = append(all, attr.name+" "+attr.value(s))
		}
	}
	return strings.Join(all, ", ")
}
