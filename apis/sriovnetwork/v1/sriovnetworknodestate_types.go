package v1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// SriovNetworkNodeStateSpec is what a node shall have. The operator renders it from the
// policies; people do not write it.
type SriovNetworkNodeStateSpec struct {
	// interfaces are the PFs to configure, sorted by PCI address.
	// +optional
	Interfaces []Interface `json:"interfaces,omitempty"`
	// bridges are the software bridges to make.
	// +optional
	Bridges Bridges `json:"bridges,omitzero"`
	// system holds settings of the whole node.
	// +optional
	System System `json:"system,omitzero"`
	// macvlans are the links that pods get MacVLAN sub-interfaces of, sorted by resource
	// and link. Added.
	// +optional
	// +listType=atomic
	Macvlans []MacvlanParent `json:"macvlans,omitempty"`
}

// MacvlanParent is a link that pods get MacVLAN sub-interfaces of.
type MacvlanParent struct {
	// policyName is the MacvlanNodePolicy that asked for it.
	// +required
	PolicyName string `json:"policyName"`
	// resourceName is the resource the slots are advertised as, without prefix.
	// +required
	ResourceName string `json:"resourceName"`
	// link is the name of the selected link when the spec was rendered.
	// +required
	Link string `json:"link"`
	// vlan is the VLAN sub-interface of the link that is the parent; 0 for the link itself.
	// +optional
	Vlan int `json:"vlan,omitempty"`
	// mtu the parent must at least have, in bytes; 0 leaves it.
	// +optional
	Mtu int `json:"mtu,omitempty"`
	// slots is how many sub-interfaces it may have at a time.
	// +required
	Slots int `json:"slots"`
	// excludeTopology leaves its NUMA node out of what kubelet is told.
	// +optional
	ExcludeTopology bool `json:"excludeTopology,omitempty"`
}

// Interface is what one PF shall have.
type Interface struct {
	// pciAddress of the PF, such as 0000:3b:00.0.
	// +required
	PciAddress string `json:"pciAddress"`
	// numVfs is the number of VFs to make.
	// +optional
	NumVfs int `json:"numVfs,omitempty"`
	// mtu the PF must at least have, in bytes; 0 leaves it.
	// +optional
	Mtu int `json:"mtu,omitempty"`
	// name of the PF's network device when the spec was rendered.
	// +optional
	Name string `json:"name,omitempty"`
	// linkType as the policy spells it.
	// +optional
	LinkType string `json:"linkType,omitempty"`
	// eSwitchMode of the PF; empty means legacy.
	// +optional
	EswitchMode string `json:"eSwitchMode,omitempty"`
	// vfGroups say what the VFs are for. Their ranges do not overlap.
	// +optional
	VfGroups []VfGroup `json:"vfGroups,omitempty"`
	// externallyManaged leaves the PF and its VFs as someone else made them.
	// +optional
	ExternallyManaged bool `json:"externallyManaged,omitempty"`
}

// VfGroup is what a run of neighbouring VFs of a PF is for.
type VfGroup struct {
	// resourceName is the resource the VFs are advertised as, without prefix.
	// +optional
	ResourceName string `json:"resourceName,omitempty"`
	// deviceType is the driver the VFs are bound to.
	// +optional
	DeviceType string `json:"deviceType,omitempty"`
	// vfRange is "first-last", both included, counted from 0.
	// +optional
	VfRange string `json:"vfRange,omitempty"`
	// policyName is the policy that asked for them.
	// +optional
	PolicyName string `json:"policyName,omitempty"`
	// mtu of the VFs in bytes; 0 leaves it.
	// +optional
	Mtu int `json:"mtu,omitempty"`
	// isRdma gives pods the VF's RDMA character devices.
	// +optional
	IsRdma bool `json:"isRdma,omitempty"`
	// vdpaType is the vDPA driver of the VFs.
	// +optional
	VdpaType string `json:"vdpaType,omitempty"`
	// needVhostNet gives pods /dev/vhost-net and /dev/net/tun. Added.
	// +optional
	NeedVhostNet bool `json:"needVhostNet,omitempty"`
	// excludeTopology leaves the VFs' NUMA node out of what kubelet is told. Added.
	// +optional
	ExcludeTopology bool `json:"excludeTopology,omitempty"`
	// allocation is Spread when a pod's VFs are taken from different PFs. Added.
	// +optional
	Allocation string `json:"allocation,omitempty"`
	// requireCarrier takes the VFs off offer while the PF has no carrier. Added.
	// +optional
	RequireCarrier bool `json:"requireCarrier,omitempty"`
}

// Bridges are software bridges.
type Bridges struct {
	// ovs are Open vSwitch bridges, sorted by name.
	// +optional
	OVS []OVSConfigExt `json:"ovs,omitempty"`
}

// OVSConfigExt is one Open vSwitch bridge.
type OVSConfigExt struct {
	// name of the bridge.
	// +required
	Name string `json:"name"`
	// bridge configures it.
	// +optional
	Bridge OVSBridgeConfig `json:"bridge,omitzero"`
	// uplinks are the PFs in it; exactly one is supported.
	// +optional
	Uplinks []OVSUplinkConfigExt `json:"uplinks,omitempty"`
}

// OVSUplinkConfigExt is a PF in a bridge.
type OVSUplinkConfigExt struct {
	// pciAddress of the PF.
	// +required
	PciAddress string `json:"pciAddress"`
	// name of the PF's network device.
	// +optional
	Name string `json:"name,omitempty"`
	// interface configures its port.
	// +optional
	Interface OVSInterfaceConfig `json:"interface,omitzero"`
}

// System holds settings of a whole node.
type System struct {
	// rdmaMode is the RDMA subsystem's network namespace mode.
	// +optional
	// +kubebuilder:validation:Enum=shared;exclusive
	RdmaMode string `json:"rdmaMode,omitempty"`
}

// SriovNetworkNodeStateStatus is what a node has, and what its agent is doing about the
// spec. The node's agent writes it.
type SriovNetworkNodeStateStatus struct {
	// interfaces are the node's SR-IOV PFs, sorted by PCI address.
	// +optional
	Interfaces []InterfaceExt `json:"interfaces,omitempty"`
	// bridges are the software bridges found.
	// +optional
	Bridges Bridges `json:"bridges,omitzero"`
	// system holds the settings found.
	// +optional
	System System `json:"system,omitzero"`
	// syncStatus is InProgress, Succeeded or Failed: the Ready, Progressing and Degraded
	// conditions in one word.
	// +optional
	SyncStatus string `json:"syncStatus,omitempty"`
	// lastSyncError is the message of the Degraded condition while that is true.
	// +optional
	LastSyncError string `json:"lastSyncError,omitempty"`
	// conditions are Ready, Progressing and Degraded. Added.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// observedGeneration is the generation of the spec this status speaks of. Added.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// vfs counts the VFs that are as the spec asks, and those it asks for, as "8/8". Added.
	// +optional
	VFs string `json:"vfs,omitempty"`
	// pending are the changes that wait because pods, or the whole node, must be disturbed
	// for them. Added.
	// +optional
	// +listType=atomic
	Pending []PendingChange `json:"pending,omitempty"`
	// links are the links that can be parents of MacVLAN sub-interfaces, sorted by name. Added.
	// +optional
	// +listType=atomic
	Links []Link `json:"links,omitempty"`
	// macvlans are the parents the spec asks for, as they are. Added.
	// +optional
	// +listType=atomic
	Macvlans []MacvlanParentStatus `json:"macvlans,omitempty"`
	// pools are the resources offered to kubelet, sorted by name. Added.
	// +optional
	// +listType=atomic
	Pools []DevicePool `json:"pools,omitempty"`
}

// DevicePool is a resource of VFs or MacVLAN slots that kubelet is offered.
type DevicePool struct {
	// resourceName with its prefix.
	// +required
	ResourceName string `json:"resourceName"`
	// devices is how many there are.
	// +required
	Devices int `json:"devices"`
	// healthy is how many of them are offered, or with pods.
	// +required
	Healthy int `json:"healthy"`
	// message is why kubelet is not told of them now. Empty when it is.
	// +optional
	Message string `json:"message,omitempty"`
	// unhealthy are devices that are not offered, sorted.
	// +optional
	// +listType=atomic
	Unhealthy []UnhealthyDevice `json:"unhealthy,omitempty"`
	// held are devices that pods have, or are about to have, sorted.
	// +optional
	// +listType=atomic
	Held []HeldDevice `json:"held,omitempty"`
}

// UnhealthyDevice is a device that is not offered.
type UnhealthyDevice struct {
	// device is the PCI address of a VF, or a MacVLAN slot.
	// +required
	Device string `json:"device"`
	// reason why.
	// +optional
	Reason string `json:"reason,omitempty"`
}

// HeldDevice is a device in a pod's hand.
type HeldDevice struct {
	// device is the PCI address of a VF, or a MacVLAN slot.
	// +required
	Device string `json:"device"`
	// phase is Allocated when kubelet gave it away, Attached when it is an interface of the
	// pod, Returned when it is not any more and kubelet still counts it as the pod's.
	// +required
	Phase string `json:"phase"`
	// pod that has it, as namespace/name; empty while that is not known.
	// +optional
	Pod string `json:"pod,omitempty"`
	// generation of this hand, greater than those of all hands before it on the node.
	// +optional
	Generation int64 `json:"generation,omitempty"`
}

// Costs of a PendingChange.
const (
	CostEvict  = "Evict"
	CostReboot = "Reboot"
)

// PendingChange is a change of the node that waits for consent.
type PendingChange struct {
	// pciAddress of the PF it is about; empty when it is about the whole node.
	// +optional
	PciAddress string `json:"pciAddress,omitempty"`
	// operation says what is to be done, such as "SetNumVFs 4 on 0000:3b:00.0".
	// +required
	Operation string `json:"operation"`
	// cost is Evict, when the pods named must go first, or Reboot.
	// +required
	// +kubebuilder:validation:Enum=Evict;Reboot
	Cost string `json:"cost"`
	// reason says why it costs that.
	// +optional
	Reason string `json:"reason,omitempty"`
	// pods are the pods that hold what the change needs, sorted.
	// +optional
	// +listType=atomic
	Pods []PodReference `json:"pods,omitempty"`
}

// PodReference names a pod on the node: by its name, or where the kubelet tells no more
// by its UID.
type PodReference struct {
	// namespace of the pod.
	// +optional
	Namespace string `json:"namespace,omitempty"`
	// name of the pod.
	// +optional
	Name string `json:"name,omitempty"`
	// uid of the pod, when its name is not known. That of a static pod is not its
	// object's, but the one in the annotation kubernetes.io/config.mirror.
	// +optional
	UID types.UID `json:"uid,omitempty"`
	// device it holds: the PCI address of a VF.
	// +optional
	Device string `json:"device,omitempty"`
}

// Link is a link that can be the parent of MacVLAN sub-interfaces.
type Link struct {
	// name of the link.
	// +required
	Name string `json:"name"`
	// kind is physical, bond, bridge, vlan or vxlan.
	// +required
	Kind string `json:"kind"`
	// altNames are the kernel's alternative names of the link.
	// +optional
	AltNames []string `json:"altNames,omitempty"`
	// mac is its hardware address. That of a bridge, which changes with its ports, is not told.
	// +optional
	Mac string `json:"mac,omitempty"`
	// mtu in bytes.
	// +optional
	Mtu int `json:"mtu,omitempty"`
	// linkAdminState is up or down.
	// +optional
	LinkAdminState string `json:"linkAdminState,omitempty"`
	// master is the bond or bridge it belongs to.
	// +optional
	Master string `json:"master,omitempty"`
	// lower is the link a VLAN device is on.
	// +optional
	Lower string `json:"lower,omitempty"`
	// vlan is the VLAN of a VLAN device; 0 when that is not an IEEE 802.1Q one.
	// +optional
	Vlan int `json:"vlan,omitempty"`
	// managed tells that the agent made it, for the vlan of a MacvlanNodePolicy.
	// +optional
	Managed bool `json:"managed,omitempty"`
	// pciAddress of a physical NIC.
	// +optional
	PciAddress string `json:"pciAddress,omitempty"`
	// vendor is the PCI vendor of a physical NIC, four hex digits.
	// +optional
	Vendor string `json:"vendor,omitempty"`
	// deviceID is the PCI device of a physical NIC, four hex digits.
	// +optional
	DeviceID string `json:"deviceID,omitempty"`
}

// MacvlanParentStatus is a parent that the spec asks for, as it is.
type MacvlanParentStatus struct {
	// policyName is the MacvlanNodePolicy that asked for it.
	// +required
	PolicyName string `json:"policyName"`
	// resourceName is the resource its slots are advertised as, without prefix.
	// +required
	ResourceName string `json:"resourceName"`
	// link as in the spec.
	// +required
	Link string `json:"link"`
	// parent is the link that sub-interfaces are made on: link, or its VLAN sub-interface.
	// +optional
	Parent string `json:"parent,omitempty"`
	// ready tells that its slots are offered.
	// +optional
	Ready bool `json:"ready,omitempty"`
	// slots is how many there are.
	// +optional
	Slots int `json:"slots,omitempty"`
	// used is how many of them pods hold.
	// +optional
	Used int `json:"used,omitempty"`
	// message is what keeps it from being as the spec asks: the kernel's error and the
	// mend. Empty when nothing does.
	// +optional
	Message string `json:"message,omitempty"`
}

// InterfaceExt is one PF as it is.
type InterfaceExt struct {
	// name of its network device in the host's namespace; empty when it has none there.
	// +optional
	Name string `json:"name,omitempty"`
	// mac is its hardware address.
	// +optional
	Mac string `json:"mac,omitempty"`
	// driver bound to it.
	// +optional
	Driver string `json:"driver,omitempty"`
	// pciAddress, such as 0000:3b:00.0.
	// +required
	PciAddress string `json:"pciAddress"`
	// vendor is the PCI vendor, four hex digits.
	// +optional
	Vendor string `json:"vendor,omitempty"`
	// deviceID is the PCI device, four hex digits.
	// +optional
	DeviceID string `json:"deviceID,omitempty"`
	// netFilter is the network of a virtual machine's NIC.
	// +optional
	NetFilter string `json:"netFilter,omitempty"`
	// mtu in bytes.
	// +optional
	Mtu int `json:"mtu,omitempty"`
	// numVfs is the number of VFs it has.
	// +optional
	NumVfs int `json:"numVfs,omitempty"`
	// linkSpeed such as "25000 Mb/s".
	// +optional
	LinkSpeed string `json:"linkSpeed,omitempty"`
	// linkType is ETH or IB.
	// +optional
	LinkType string `json:"linkType,omitempty"`
	// linkAdminState is up or down.
	// +optional
	LinkAdminState string `json:"linkAdminState,omitempty"`
	// eSwitchMode is legacy or switchdev; empty when the driver has no switch.
	// +optional
	EswitchMode string `json:"eSwitchMode,omitempty"`
	// externallyManaged repeats the spec's.
	// +optional
	ExternallyManaged bool `json:"externallyManaged,omitempty"`
	// totalvfs is the most VFs it can have.
	// +optional
	TotalVfs int `json:"totalvfs,omitempty"`
	// Vfs are its VFs, sorted by vfID.
	// +optional
	VFs []VirtualFunction `json:"Vfs,omitempty"`
	// altNames are the kernel's alternative names of its network device.
	// +optional
	AltNames []string `json:"altNames,omitempty"`
	// message is what keeps the PF from being as the spec asks: the kernel's error and
	// the mend. Empty when nothing does. Added.
	// +optional
	Message string `json:"message,omitempty"`
}

// VirtualFunction is one VF as it is.
type VirtualFunction struct {
	// name of its network device in the host's namespace; empty when it has none there.
	// +optional
	Name string `json:"name,omitempty"`
	// mac is its hardware address.
	// +optional
	Mac string `json:"mac,omitempty"`
	// assigned names the pod that holds it, as namespace/name.
	// +optional
	Assigned string `json:"assigned,omitempty"`
	// driver bound to it.
	// +optional
	Driver string `json:"driver,omitempty"`
	// pciAddress, such as 0000:3b:02.0.
	// +required
	PciAddress string `json:"pciAddress"`
	// vendor is the PCI vendor, four hex digits.
	// +optional
	Vendor string `json:"vendor,omitempty"`
	// deviceID is the PCI device, four hex digits.
	// +optional
	DeviceID string `json:"deviceID,omitempty"`
	// Vlan is the VLAN the NIC puts it in, 0 for none.
	// +optional
	Vlan int `json:"Vlan,omitempty"`
	// mtu in bytes.
	// +optional
	Mtu int `json:"mtu,omitempty"`
	// vfID is its number below the PF, counted from 0.
	// +required
	VfID int `json:"vfID"`
	// vdpaType is its vDPA driver.
	// +optional
	VdpaType string `json:"vdpaType,omitempty"`
	// representorName is the network device that stands for it in switchdev mode.
	// +optional
	RepresentorName string `json:"representorName,omitempty"`
	// guid is its InfiniBand node GUID.
	// +optional
	GUID string `json:"guid,omitempty"`
	// message is what keeps the VF from being as the spec asks: the kernel's error and
	// the mend. Empty when nothing does. Added.
	// +optional
	Message string `json:"message,omitempty"`
}

// SriovNetworkNodeState shows the SR-IOV NICs of the node it is named after, what the
// policies ask of them, and whether they have it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Sync Status",type=string,JSONPath=`.status.syncStatus`
// +kubebuilder:printcolumn:name="Desired Sync State",type=string,JSONPath=`.metadata.annotations.sriovnetwork\.openshift\.io/desired-state`
// +kubebuilder:printcolumn:name="Current Sync State",type=string,JSONPath=`.metadata.annotations.sriovnetwork\.openshift\.io/current-state`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="VFs",type=string,JSONPath=`.status.vfs`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
type SriovNetworkNodeState struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitzero"`
	// spec is what the policies ask of the node.
	// +optional
	Spec SriovNetworkNodeStateSpec `json:"spec,omitzero"`
	// status is what the node has.
	// +optional
	Status SriovNetworkNodeStateStatus `json:"status,omitzero"`
}

// SriovNetworkNodeStateList is a list of node states.
//
// +kubebuilder:object:root=true
type SriovNetworkNodeStateList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitzero"`
	Items           []SriovNetworkNodeState `json:"items"`
}
