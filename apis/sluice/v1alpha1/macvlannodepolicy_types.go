package v1alpha1

import (
	"encoding/json"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// MacvlanNodePolicySpec offers slots for MacVLAN sub-interfaces on links of some nodes.
type MacvlanNodePolicySpec struct {
	// resourceName is the resource the slots are advertised as, after the prefix and a
	// slash. It must not be that of a SriovNetworkNodePolicy.
	// +required
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-zA-Z0-9]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?$')",messageExpression="'resourceName \"' + self + '\" is not a resource name: use 1 to 63 letters, digits, _ and -, with a letter or digit at both ends'"
	ResourceName string `json:"resourceName"`
	// nodeSelector selects nodes by labels that must all be equal. An empty one selects
	// every node.
	// +required
	NodeSelector map[string]string `json:"nodeSelector"`
	// priority decides between two policies with the same resourceName, or that want
	// different things of the same link: the lower number wins.
	// +optional
	// +kubebuilder:default=99
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 99",message="not a priority: set priority to 0, the strongest, to 99"
	Priority *int `json:"priority,omitempty"`
	// parentSelector selects the links that sub-interfaces are made on. All fields given
	// must match; in a list any entry may.
	//
	// Unknown keys are kept by the schema so that an admission policy, and the operator if
	// that is absent, can refuse them, and an empty selector, for every client.
	// +required
	// +kubebuilder:pruning:PreserveUnknownFields
	ParentSelector ParentSelector `json:"parentSelector"`
	// vlan puts the slots on a VLAN sub-interface of each parent, which is made if it is
	// not there: 1 to 4094; 0 uses the parent itself.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 4094",message="not a VLAN ID: set vlan to 1 to 4094, or to 0 to use the parent itself"
	Vlan int `json:"vlan,omitempty"`
	// mtu in bytes that the parent must have at least; it is raised when it has less.
	// Unset leaves it.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 68 && self <= 65535",message="not an MTU: set mtu to 68 to 65535 bytes"
	Mtu int `json:"mtu,omitempty"`
	// slots is how many sub-interfaces each parent may have at a time.
	// +optional
	// +kubebuilder:default=64
	// +kubebuilder:validation:XValidation:rule="self >= 1 && self <= 4096",message="not a number of slots: set slots to 1 to 4096; to offer none, delete the policy"
	Slots int `json:"slots,omitempty"`
	// excludeTopology leaves the parent's NUMA node out of what kubelet is told.
	// +optional
	ExcludeTopology bool `json:"excludeTopology,omitempty"`
}

// ParentSelector selects links of a node's network namespace. All fields given must
// match; in a list any entry may.
//
// +kubebuilder:validation:XValidation:rule="!has(self.kinds) || size(self.kinds) == 0 || 'physical' in self.kinds || !((has(self.vendor) && size(self.vendor) > 0) || (has(self.deviceID) && size(self.deviceID) > 0) || (has(self.rootDevices) && size(self.rootDevices) > 0))",fieldPath=".kinds",messageExpression="'vendor, deviceID and rootDevices are of physical NICs, which kinds ' + self.kinds.join(' ') + ' leaves out: add physical to kinds, or remove vendor, deviceID and rootDevices'"
type ParentSelector struct {
	// vendor is the PCI vendor of a physical NIC, four hex digits, such as 8086.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || self.matches('^[0-9a-fA-F]{4}$')",messageExpression="'vendor \"' + self + '\" is not a PCI vendor ID: write four hex digits, such as 8086'"
	Vendor string `json:"vendor,omitempty"`
	// deviceID is the PCI device of a physical NIC, four hex digits, such as 158b.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || self.matches('^[0-9a-fA-F]{4}$')",messageExpression="'deviceID \"' + self + '\" is not a PCI device ID: write four hex digits, such as 158b'"
	DeviceID string `json:"deviceID,omitempty"`
	// rootDevices are PCI addresses of physical NICs, such as 0000:3b:00.0.
	// +optional
	// +kubebuilder:validation:MaxItems=128
	// +kubebuilder:validation:items:MaxLength=64
	// +kubebuilder:validation:items:XValidation:rule="self.matches('^[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}[.][0-7]$')",messageExpression="'\"' + self + '\" is not a PCI address: write, for example, 0000:3b:00.0'"
	RootDevices []string `json:"rootDevices,omitempty"`
	// pfNames are names or alternative names of links of any kind: physical NICs, bonds,
	// bridges, VLAN and VXLAN devices. No VF range may follow a name.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=128
	// +kubebuilder:validation:items:XValidation:rule="!self.contains('#')",messageExpression="'\"' + self + '\" has a VF range: MacVLAN parents are whole links, write the name alone'"
	PfNames []string `json:"pfNames,omitempty"`
	// kinds limits the links to some kinds.
	// +optional
	// +kubebuilder:validation:MaxItems=8
	// +listType=set
	Kinds []LinkKind `json:"kinds,omitempty"`

	// UnknownKeys are the keys found in JSON that are none of the above, sorted. They
	// are never written. Whoever acts on a selector must refuse one that has any.
	UnknownKeys []string `json:"-"`
}

// UnmarshalJSON also collects the keys the selector does not have.
func (s *ParentSelector) UnmarshalJSON(data []byte) error {
	type plain ParentSelector // without this method
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
		case "vendor", "deviceID", "rootDevices", "pfNames", "kinds":
		default:
			p.UnknownKeys = append(p.UnknownKeys, key)
		}
	}
	slices.Sort(p.UnknownKeys)
	*s = ParentSelector(p)
	return nil
}

// LinkKind is the kind of a link that can be a parent.
//
// +kubebuilder:validation:Enum=physical;bond;bridge;vlan;vxlan
type LinkKind string

// MacvlanNodePolicyStatus says what became of a policy.
type MacvlanNodePolicyStatus struct {
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

// MacvlanNodePolicy offers slots for MacVLAN sub-interfaces on links of some nodes, as a
// resource.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Resource",type=string,JSONPath=`.spec.resourceName`
// +kubebuilder:printcolumn:name="Slots",type=integer,JSONPath=`.spec.slots`
// +kubebuilder:printcolumn:name="Vlan",type=integer,JSONPath=`.spec.vlan`
// +kubebuilder:printcolumn:name="Nodes",type=integer,JSONPath=`.status.matchedNodeCount`
// +kubebuilder:printcolumn:name="Ready Nodes",type=integer,JSONPath=`.status.readyNodeCount`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
type MacvlanNodePolicy struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitzero"`
	// spec is what is asked for.
	// +required
	Spec MacvlanNodePolicySpec `json:"spec"`
	// status is what became of it.
	// +optional
	Status MacvlanNodePolicyStatus `json:"status,omitzero"`
}

// MacvlanNodePolicyList is a list of policies.
//
// +kubebuilder:object:root=true
type MacvlanNodePolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitzero"`
	Items           []MacvlanNodePolicy `json:"items"`
}
