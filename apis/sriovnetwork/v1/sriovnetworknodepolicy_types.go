package v1

import (
	"encoding/json"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// SriovNetworkNodePolicySpec asks for VFs on the NICs of some nodes.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.deviceType) && self.deviceType == 'vfio-pci' && has(self.isRdma) && self.isRdma)",fieldPath=".isRdma",message="isRdma true cannot go with deviceType vfio-pci, because RDMA needs the VF's kernel driver: set deviceType to netdevice or isRdma to false"
// +kubebuilder:validation:XValidation:rule="!has(self.vdpaType) || !has(self.deviceType) || self.deviceType == 'netdevice'",fieldPath=".vdpaType",messageExpression="'vdpaType ' + self.vdpaType + ' cannot go with deviceType ' + self.deviceType + ': set deviceType to netdevice or remove vdpaType'"
// +kubebuilder:validation:XValidation:rule="!has(self.vdpaType) || (has(self.eSwitchMode) && self.eSwitchMode == 'switchdev')",fieldPath=".vdpaType",messageExpression="'vdpaType ' + self.vdpaType + ' needs the NIC in switchdev mode: set eSwitchMode to switchdev or remove vdpaType'"
// +kubebuilder:validation:XValidation:rule="!(has(self.eSwitchMode) && self.eSwitchMode == 'switchdev' && has(self.linkType) && self.linkType in ['ib', 'IB'])",fieldPath=".eSwitchMode",messageExpression="'eSwitchMode switchdev cannot go with linkType ' + self.linkType + ': set linkType to eth or eSwitchMode to legacy'"
// +kubebuilder:validation:XValidation:rule="!has(self.nicSelector.netFilter) || size(self.nicSelector.netFilter) == 0 || !has(self.eSwitchMode)",fieldPath=".eSwitchMode",messageExpression="'eSwitchMode ' + self.eSwitchMode + ' cannot go with nicSelector.netFilter, which selects virtual NICs: remove eSwitchMode or netFilter'"
// +kubebuilder:validation:XValidation:rule="!has(self.nicSelector.netFilter) || size(self.nicSelector.netFilter) == 0 || !has(self.linkType) || self.linkType in ['eth', 'ETH']",fieldPath=".linkType",messageExpression="'linkType ' + self.linkType + ' cannot go with nicSelector.netFilter, which selects virtual NICs: set linkType to eth or remove netFilter'"
// +kubebuilder:validation:XValidation:rule="!has(self.bridge) || !has(self.bridge.ovs) || (has(self.eSwitchMode) && self.eSwitchMode == 'switchdev')",fieldPath=".bridge",message="bridge.ovs needs the NIC in switchdev mode: set eSwitchMode to switchdev or remove bridge"
// +kubebuilder:validation:XValidation:rule="!has(self.bridge) || !has(self.bridge.ovs) || !has(self.externallyManaged) || !self.externallyManaged",fieldPath=".bridge",message="bridge.ovs cannot go with externallyManaged true, which leaves the NIC alone: remove bridge or set externallyManaged to false"
// +kubebuilder:validation:XValidation:rule="!has(self.bridge) || !has(self.bridge.ovs) || !has(self.nicSelector.netFilter) || size(self.nicSelector.netFilter) == 0",fieldPath=".bridge",message="bridge.ovs cannot go with nicSelector.netFilter, which selects virtual NICs: remove bridge or netFilter"
// +kubebuilder:validation:XValidation:rule="!has(self.nicSelector.pfNames) || self.nicSelector.pfNames.all(n, !n.matches('#[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*$') || n.split('#')[1].split(',').all(r, r.split('-').all(i, int(i) < self.numVfs)))",fieldPath=".nicSelector.pfNames",messageExpression="'a VF range in ' + self.nicSelector.pfNames.join(' ') + ' reaches past the last VF: VFs are numbered from 0 to numVfs - 1, so end the range there or raise numVfs'"
type SriovNetworkNodePolicySpec struct {
	// resourceName is the resource the VFs are advertised as, after the prefix and a
	// slash. Several policies may share one.
	// +required
	// +kubebuilder:validation:MaxLength=253
	ResourceName string `json:"resourceName"`
	// nodeSelector selects nodes by labels that must all be equal. An empty one selects
	// every node.
	// +required
	NodeSelector map[string]string `json:"nodeSelector"`
	// priority decides which policy gets a VF that two policies claim: the one with the
	// lower number.
	// +optional
	// +kubebuilder:default=99
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 99",message="not a priority: set priority to 0, the strongest, to 99"
	Priority *int `json:"priority,omitempty"`
	// mtu of the VFs in bytes. The PF's MTU is raised to at least this. Unset leaves the
	// NIC's own.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 68 && self <= 65535",message="not an MTU: set mtu to 68 to 65535 bytes, or leave it out for the NIC's own"
	Mtu int `json:"mtu,omitempty"`
	// numVfs is the number of VFs to make on each selected PF.
	// +required
	NumVfs int `json:"numVfs"`
	// nicSelector selects the PFs. All fields given must match; in a list any entry may.
	//
	// Unknown keys are kept by the schema so that an admission policy, and the operator
	// if that is absent, can refuse them for every client: were a mistyped key pruned, the
	// rest of the selector would select more NICs than its author meant. An empty selector
	// is refused there too, and not by the schema, which would speak first and could not
	// name the key that was meant.
	// +required
	// +kubebuilder:pruning:PreserveUnknownFields
	NicSelector SriovNetworkNicSelector `json:"nicSelector"`
	// deviceType is the driver the VFs are bound to: netdevice for the kernel's network
	// driver, vfio-pci for user space.
	// +optional
	// +kubebuilder:default=netdevice
	// +kubebuilder:validation:Enum=netdevice;vfio-pci
	DeviceType string `json:"deviceType,omitempty"`
	// isRdma gives pods the VF's RDMA character devices.
	// +optional
	IsRdma bool `json:"isRdma,omitempty"`
	// needVhostNet gives pods /dev/vhost-net and /dev/net/tun.
	// +optional
	NeedVhostNet bool `json:"needVhostNet,omitempty"`
	// linkType is the link the PF must have.
	// +optional
	// +kubebuilder:validation:Enum=eth;ETH;ib;IB
	LinkType string `json:"linkType,omitempty"`
	// eSwitchMode is the mode of the PF's embedded switch. Unset means legacy, unless
	// another policy on the same PF asks for a mode.
	// +optional
	// +kubebuilder:validation:Enum=legacy;switchdev
	EswitchMode string `json:"eSwitchMode,omitempty"`
	// vdpaType is the vDPA driver of the VFs.
	// +optional
	// +kubebuilder:validation:Enum=virtio;vhost
	VdpaType string `json:"vdpaType,omitempty"`
	// excludeTopology leaves the VFs' NUMA node out of what kubelet is told.
	// +optional
	ExcludeTopology bool `json:"excludeTopology,omitempty"`
	// allocation says from which PFs a pod's VFs are taken, those of one NUMA node first:
	// Pack, which is the default, from as few and as used ones as possible, Spread from as many
	// and as free ones. Added.
	// +optional
	// +kubebuilder:validation:Enum=Pack;Spread
	Allocation string `json:"allocation,omitempty"`
	// requireCarrier takes VFs off offer while their PF has no carrier. Pods keep theirs. Added.
	// +optional
	RequireCarrier bool `json:"requireCarrier,omitempty"`
	// externallyManaged takes the PF and its VFs as someone else made them.
	// +optional
	ExternallyManaged bool `json:"externallyManaged,omitempty"`
	// bridge asks for a software bridge on the PF.
	// +optional
	Bridge Bridge `json:"bridge,omitzero"`
}

// SriovNetworkNicSelector selects PFs.
//
// +kubebuilder:validation:XValidation:rule="!has(self.netFilter) || size(self.netFilter) == 0 || !((has(self.vendor) && size(self.vendor) > 0) || (has(self.deviceID) && size(self.deviceID) > 0) || (has(self.rootDevices) && size(self.rootDevices) > 0) || (has(self.pfNames) && size(self.pfNames) > 0))",fieldPath=".netFilter",messageExpression="'netFilter ' + self.netFilter + ' must stand alone: remove it, or remove vendor, deviceID, rootDevices and pfNames'"
type SriovNetworkNicSelector struct {
	// vendor is the PCI vendor, four hex digits, such as 8086.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || self.matches('^[0-9a-fA-F]{4}$')",messageExpression="'vendor \"' + self + '\" is not a PCI vendor ID: write four hex digits, such as 8086'"
	Vendor string `json:"vendor,omitempty"`
	// deviceID is the PCI device of the PF, four hex digits, such as 158b.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || self.matches('^[0-9a-fA-F]{4}$')",messageExpression="'deviceID \"' + self + '\" is not a PCI device ID: write four hex digits, such as 158b'"
	DeviceID string `json:"deviceID,omitempty"`
	// rootDevices are PCI addresses of PFs, such as 0000:3b:00.0.
	// +optional
	// +kubebuilder:validation:MaxItems=128
	// +kubebuilder:validation:items:MaxLength=64
	// +kubebuilder:validation:items:XValidation:rule="self.matches('^[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}[.][0-7]$')",messageExpression="'\"' + self + '\" is not a PCI address: write, for example, 0000:3b:00.0'"
	RootDevices []string `json:"rootDevices,omitempty"`
	// pfNames are names or alternative names of PFs, each with an optional choice of its
	// VFs, counted from 0: ens1f0#0-3, ens1f0#3 or ens1f0#0-3,8.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	PfNames []PfName `json:"pfNames,omitempty"`
	// netFilter selects NICs of virtual machines by their network:
	// openstack/NetworkID:<uuid> or aws/NetworkID:<subnet>.
	// +optional
	// +kubebuilder:validation:MaxLength=256
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || self.matches('^ *[^ ]+ *: *[^ ]+')",messageExpression="'netFilter \"' + self + '\" is not of the form <platform>/NetworkID:<id>: write, for example, openstack/NetworkID:<uuid>'"
	NetFilter string `json:"netFilter,omitempty"`

	// UnknownKeys are the keys found in JSON that are none of the above, sorted. They
	// are never written. Whoever acts on a selector must refuse one that has any.
	UnknownKeys []string `json:"-"`
}

// PfName is the name of a PF with an optional choice of its VFs.
//
// +kubebuilder:validation:MaxLength=128
// +kubebuilder:validation:XValidation:rule="self.matches('^[^#]+(#.*)?$') && size(self.split('#')) <= 2",messageExpression="'\"' + self + '\" is not a PF name with an optional VF range: write a name, and at most one # before the VFs, as in ens1f0#0-3'"
// +kubebuilder:validation:XValidation:rule="!self.contains('#') || size(self.split('#')) != 2 || self.split('#')[1].matches('^[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*$')",messageExpression="'\"' + self.split('#')[1] + '\" is not a choice of VFs: write first-last, one number, or a list of these, as in ens1f0#0-3, ens1f0#3 or ens1f0#0-3,8'"
// +kubebuilder:validation:XValidation:rule="!self.matches('^[^#]+#[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*$') || self.split('#')[1].split(',').all(r, !r.contains('-') || int(r.split('-')[0]) <= int(r.split('-')[1]))",messageExpression="'\"' + self + '\" has a VF range that runs backwards: write the lower VF number first, as in ens1f0#2-5'"
type PfName string

// UnmarshalJSON also collects the keys the selector does not have.
func (s *SriovNetworkNicSelector) UnmarshalJSON(data []byte) error {
	type plain SriovNetworkNicSelector // without this method
	var p plain
	if err := json.Unmarshal(data, &p); err != nil {
		return err
	}
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(data, &keys); err != nil {
		return err
	}
	p.UnknownKeys = nil
	for key := range keys {
		switch key {
		case "vendor", "deviceID", "rootDevices", "pfNames", "netFilter":
		default:
			p.UnknownKeys = append(p.UnknownKeys, key)
		}
	}
	slices.Sort(p.UnknownKeys)
	*s = SriovNetworkNicSelector(p)
	return nil
}

// Bridge asks for a software bridge.
type Bridge struct {
	// ovs asks for an Open vSwitch bridge. {} takes its defaults.
	// +optional
	OVS *OVSConfig `json:"ovs,omitempty"`
}

// OVSConfig configures an Open vSwitch bridge and its uplink.
type OVSConfig struct {
	// bridge configures the bridge.
	// +optional
	Bridge OVSBridgeConfig `json:"bridge,omitzero"`
	// uplink configures the PF's port.
	// +optional
	Uplink OVSUplinkConfig `json:"uplink,omitzero"`
}

// OVSBridgeConfig is a row of the OVSDB table Bridge.
type OVSBridgeConfig struct {
	// datapathType is OVSDB Bridge.datapath_type.
	// +optional
	DatapathType string `json:"datapathType,omitempty"`
	// externalIDs is OVSDB Bridge.external_ids.
	// +optional
	ExternalIDs map[string]string `json:"externalIDs,omitempty"`
	// otherConfig is OVSDB Bridge.other_config.
	// +optional
	OtherConfig map[string]string `json:"otherConfig,omitempty"`
	// failMode is OVSDB Bridge.fail_mode.
	// +optional
	// +kubebuilder:validation:Enum=secure;standalone
	FailMode string `json:"failMode,omitempty"`
}

// OVSUplinkConfig configures the port of the PF.
type OVSUplinkConfig struct {
	// interface configures the PF's row of the OVSDB table Interface.
	// +optional
	Interface OVSInterfaceConfig `json:"interface,omitzero"`
}

// OVSInterfaceConfig is a row of the OVSDB table Interface.
type OVSInterfaceConfig struct {
	// type is OVSDB Interface.type.
	// +optional
	Type string `json:"type,omitempty"`
	// options is OVSDB Interface.options.
	// +optional
	Options map[string]string `json:"options,omitempty"`
	// externalIDs is OVSDB Interface.external_ids.
	// +optional
	ExternalIDs map[string]string `json:"externalIDs,omitempty"`
	// otherConfig is OVSDB Interface.other_config.
	// +optional
	OtherConfig map[string]string `json:"otherConfig,omitempty"`
	// mtuRequest is OVSDB Interface.mtu_request in bytes.
	// +optional
	MTURequest *int `json:"mtuRequest,omitempty"`
}

// SriovNetworkNodePolicyStatus says what became of a policy. Added.
type SriovNetworkNodePolicyStatus struct {
	// conditions are Ready, Progressing and Degraded.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// observedGeneration is the generation of the spec this status speaks of.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// matchedNodeCount is the number of nodes the nodeSelector selects.
	// +optional
	MatchedNodeCount int `json:"matchedNodeCount"`
	// readyNodeCount is the number of those nodes on which the policy is in effect.
	// +optional
	ReadyNodeCount int `json:"readyNodeCount"`
}

// SriovNetworkNodePolicy makes VFs on the NICs of some nodes and advertises them as a
// resource.
//
// The one named default has no effect, as in the SR-IOV network operator, which made it with
// an empty spec: rules that such a spec breaks are here, where the name is known.
//
// +kubebuilder:validation:XValidation:rule="self.metadata.name == 'default' || self.spec.resourceName.matches('^[a-zA-Z0-9]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?$')",fieldPath=".spec.resourceName",messageExpression="'resourceName \"' + self.spec.resourceName + '\" is not a resource name: use 1 to 63 letters, digits, _ and -, with a letter or digit at both ends'"
// +kubebuilder:validation:XValidation:rule="self.metadata.name == 'default' || self.spec.numVfs >= 1",fieldPath=".spec.numVfs",message="this makes no VFs: set numVfs to 1 or more; to take VFs away, delete the policy"
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Resource",type=string,JSONPath=`.spec.resourceName`
// +kubebuilder:printcolumn:name="NumVfs",type=integer,JSONPath=`.spec.numVfs`
// +kubebuilder:printcolumn:name="Priority",type=integer,JSONPath=`.spec.priority`
// +kubebuilder:printcolumn:name="Nodes",type=integer,JSONPath=`.status.matchedNodeCount`
// +kubebuilder:printcolumn:name="Ready Nodes",type=integer,JSONPath=`.status.readyNodeCount`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
type SriovNetworkNodePolicy struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitzero"`
	// spec is what is asked for.
	// +required
	Spec SriovNetworkNodePolicySpec `json:"spec"`
	// status is what became of it.
	// +optional
	Status SriovNetworkNodePolicyStatus `json:"status,omitzero"`
}

// SriovNetworkNodePolicyList is a list of policies.
//
// +kubebuilder:object:root=true
type SriovNetworkNodePolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitzero"`
	Items           []SriovNetworkNodePolicy `json:"items"`
}
