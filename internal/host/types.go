package host

import "net"

// PF is one SR-IOV physical function as the kernel shows it now.
type PF struct {
	PCIAddress string   // domain:bus:device.function, e.g. "0000:3b:00.0"
	Name       string   // netdev name; empty when the PF has no netdev in the host's namespace
	AltNames   []string // kernel alternative names
	IfIndex    int      // 0 without a netdev
	Driver     string
	Vendor     string // PCI vendor, four hex digits, e.g. "8086"
	DeviceID   string // PCI device, four hex digits
	VFDeviceID string // PCI device of its VFs, four hex digits (sriov_vf_device)
	MAC        net.HardwareAddr
	PermMAC    net.HardwareAddr // burned in; nil when the NIC has none
	MTU        int              // bytes
	LinkSpeed  int              // Mb/s; 0 when unknown
	LinkType   LinkType
	AdminUp    bool
	Carrier    bool
	Eswitch    EswitchMode // empty when the driver has no devlink eswitch
	NUMANode   int         // -1 when the machine has none
	TotalVFs   int         // what the device can make (sriov_totalvfs)
	NumVFs     int         // what exists (sriov_numvfs)
	// AutoprobeOff tells that the kernel leaves new VFs without driver
	// (sriov_drivers_autoprobe).
	AutoprobeOff bool
	VFs          []VF // sorted by Index
}

// VF is one SR-IOV virtual function.
type VF struct {
	Index      int // position below the PF, as in virtfn<Index>
	PCIAddress string
	Vendor     string
	DeviceID   string
	Driver     string // empty when no driver is bound
	Name       string // netdev name in the host's namespace; empty when it is elsewhere or there is none
	IfIndex    int
	MTU        int              // of the netdev; 0 without one in this namespace
	MAC        net.HardwareAddr // of the netdev; nil without one in this namespace
	NUMANode   int
	IOMMUGroup string // number as text, empty without an IOMMU

	Representor string           // netdev that stands for it in switchdev mode; empty without one in this namespace
	RDMADevice  string           // empty without one
	GUID        net.HardwareAddr // node GUID of its RDMA device, eight bytes; nil without one
	VDPA        string           // virtio, vhost, or the driver of its vDPA device; none without driver; empty without device

	Admin VFSettings
}

// VFSettings are what the PF's driver holds for one VF (IFLA_VFINFO_LIST).
type VFSettings struct {
	MAC       net.HardwareAddr // all zero: the VF chooses
	VLAN      int              // 0: none; 1..4094
	VLANQoS   int              // 0..7
	VLANProto VLANProto
	SpoofChk  bool
	Trust     bool
	LinkState LinkState
	MinTxRate int // Mb/s, 0: none
	MaxTxRate int // Mb/s, 0: none

	// InfiniBand, eight bytes; nil when the driver does not tell (ndo_get_vf_guid).
	NodeGUID, PortGUID net.HardwareAddr
}

// LinkType is the kind of network a PF is on.
type LinkType string

// The link types.
const (
	Ethernet   LinkType = "ETH"
	InfiniBand LinkType = "IB"
)

// EswitchMode is the mode of a PF's embedded switch, as devlink names it.
type EswitchMode string

// The eswitch modes.
const (
	Legacy    EswitchMode = "legacy"
	Switchdev EswitchMode = "switchdev"
)

// VLANProto is the ethertype of the tag the NIC puts on a VF's frames.
type VLANProto uint16

// The VLAN protocols.
const (
	Dot1Q  VLANProto = 0x8100 // IEEE 802.1Q
	Dot1AD VLANProto = 0x88a8 // IEEE 802.1ad, "Q-in-Q"
)

// LinkState is the link a VF is shown, IFLA_VF_LINK_STATE_*.
type LinkState uint32

// The VF link states.
const (
	LinkAuto    LinkState = 0 // follows the PF
	LinkEnable  LinkState = 1
	LinkDisable LinkState = 2
)
