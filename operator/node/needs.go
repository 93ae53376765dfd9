package node

import (
	"context"
	"net"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/ovsdb"
)

// Kernel is what the agent does with the node's NICs; host.Host is the real one.
type Kernel interface {
	Inventory(ctx context.Context) ([]host.PF, error)
	ReadPF(ctx context.Context, pciAddress string) (pf host.PF, ok bool, err error)
	ReadVFSettings(ctx context.Context, pf *host.PF) error
	SetNumVFs(ctx context.Context, pciAddress string, n int) error
	RestoreVFs(ctx context.Context, pciAddress string, n int, autoprobe bool) error
	BindDriver(ctx context.Context, vfAddress, driver string) error
	SetVFMAC(ctx context.Context, pf host.Link, index int, mac net.HardwareAddr) error
	SetMAC(ctx context.Context, l host.Link, mac net.HardwareAddr) error
	SetMTU(ctx context.Context, l host.Link, mtu int) error
	SetLinkUp(ctx context.Context, l host.Link) error
	Rename(ctx context.Context, l host.Link, name string) error
	UnbindDriver(ctx context.Context, vfAddress string) error
	SetEswitchMode(ctx context.Context, pciAddress string, mode host.EswitchMode) error
	SetVFGUID(ctx context.Context, pf host.Link, index int, guid net.HardwareAddr) error
	ResetVFSettings(ctx context.Context, pf host.Link, index int, have host.VFSettings, attrs host.VFAttrs) (unsupported host.VFAttrs, err error)
	SetVDPA(ctx context.Context, vfAddress, kind string) error
	RDMAMode(ctx context.Context) (string, error)
	SetRDMAMode(ctx context.Context, mode string) error
	Links(ctx context.Context) ([]host.ParentLink, error)
	AddVLAN(ctx context.Context, lower host.Link, name string, id int) error
	RemoveVLAN(ctx context.Context, l host.Link) error
	PathLinks(ctx context.Context, addresses []net.IP) ([]int, error)
	Watch(ctx context.Context) (<-chan host.Changes, error)
}

// Switch is the node's Open vSwitch; ovsdb.Client is the real one.
type Switch interface {
	ReadBridge(ctx context.Context, name string) (*ovsdb.Found, error)
	SetBridge(ctx context.Context, want ovsdb.Bridge, adopt bool) error
	DetachUplink(ctx context.Context, bridge string) error
	RemoveBridge(ctx context.Context, name string) error
	Watch(ctx context.Context) <-chan struct{}
}

// States is the node's own SriovNetworkNodeState at the API server; Server is
// the real one.
type States interface {
	// Watch sends the object as it is and each time it changes, nil when it is
	// deleted. The channel holds the newest only and closes with ctx.
	Watch(ctx context.Context) <-chan *v1.SriovNetworkNodeState
	// ApplyStatus makes status the object's.
	ApplyStatus(ctx context.Context, status *v1.SriovNetworkNodeStateStatus) error
	// Event tells people about a transition of the object; eventType is Normal
	// or Warning.
	Event(state *v1.SriovNetworkNodeState, eventType, reason, message string)
}

// Advertiser offers VFs and MacVLAN slots to pods.
type Advertiser interface {
	// Withdraw returns when no new pod can get the devices any more.
	Withdraw(ctx context.Context, pciAddresses []string) error
	// Advertise replaces the whole set of pools.
	Advertise(ctx context.Context, pools []Pool) error
	// Pools tells of what is advertised, and of who has it.
	Pools() []v1.DevicePool
}

// Pool is a set of interchangeable devices, offered under one resource name.
type Pool struct {
	Prefix          string // of the resource's name; empty for the agent's
	Resource        string // without prefix
	ExcludeTopology bool   // kubelet is not told the NUMA nodes
	RDMA            bool   // pods get the RDMA character devices
	VhostNet        bool   // pods get /dev/vhost-net and /dev/net/tun
	Spread          bool   // take a pod's VFs from different PFs
	DeviceType      string // netdevice or vfio-pci; empty when the driver of each VF says it
	// Info is told to containers of a device besides the rest, by its ID, or by "*" for all.
	Info    map[string]map[string]string
	Devices []Device
}

// Candidate is a VF of the node, for pools that are not made of policies.
type Candidate struct {
	Device                  // as it would be offered
	Vendor, DeviceID string // PCI, four hex digits
	RDMA             bool   // it has an RDMA device
	Carrier          bool   // its PF has one
	Resource         string // that a policy gives it to; empty for none
}

// Device is one VF of a pool, or one MacVLAN slot.
type Device struct {
	PCIAddress string // of a VF
	Slot       string // of a MacVLAN slot, host.SlotID
	Parent     string // of a MacVLAN slot: its link; besides these NUMANode and the health are given
	PFAddress  string
	PFName     string
	VFIndex    int
	Driver     string
	NUMANode   int    // -1 when the machine has none
	IOMMUGroup string // number as text, empty without an IOMMU
	LinkType   host.LinkType
	VDPA       string // virtio or vhost when the VF has such a vDPA device
	// Representor is the VF's netdev in the PF's switch; empty in legacy mode.
	Representor string
	Healthy     bool
	Reason      string // why it is not
}

// Usage tells which pod holds a VF or a MacVLAN slot now: as package
// holder names it, or nothing when it is not known. Agent.HolderChanged must be called after
// each change.
type Usage interface {
	Holder(pciAddress string) (pod string, held bool)
	// Held gives the pods of all devices that are held, by ID; an error means that
	// nobody knows.
	Held() (map[string]string, error)
}
