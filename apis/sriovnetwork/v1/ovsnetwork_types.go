package v1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// OVSNetworkSpec is a network that pods join with a VF whose representor is a port of
// an Open vSwitch bridge.
type OVSNetworkSpec struct {
	// networkNamespace is where the NetworkAttachmentDefinition is made; empty means the
	// network's own namespace. Only networks in the operator's namespace may name another.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || self.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$')",messageExpression="'networkNamespace \"' + self + '\" is not a namespace name: use 1 to 63 lower-case letters, digits and -'"
	NetworkNamespace string `json:"networkNamespace,omitempty"`
	// resourceName is the resource the VFs come from, without prefix: that of a
	// SriovNetworkNodePolicy.
	// +required
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-zA-Z0-9]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?$')",messageExpression="'resourceName \"' + self + '\" is not a resource name: use 1 to 63 letters, digits, _ and -, with a letter or digit at both ends'"
	ResourceName string `json:"resourceName"`
	// capabilities is a JSON object of what the pod's annotation may set, such as
	// {"mac": true, "ips": true}.
	// +optional
	Capabilities string `json:"capabilities,omitempty"`
	// ipam is the configuration of the IPAM plugin, a JSON object. Empty means none.
	// +optional
	IPAM string `json:"ipam,omitempty"`
	// bridge is the bridge's name; empty means the one that the VF's PF is in.
	// +optional
	Bridge string `json:"bridge,omitempty"`
	// vlan is the VLAN of the port, 0 for none.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 4095",message="not a VLAN ID: set vlan to 1 to 4095, or to 0 for no VLAN"
	Vlan uint `json:"vlan,omitempty"`
	// mtu of the pod's interface in bytes, 0 for the VF's own.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self == 0 || (self >= 68 && self <= 65535)",message="not an MTU: set mtu to 68 to 65535 bytes, or to 0 for the VF's own"
	MTU uint `json:"mtu,omitempty"`
	// trunk lists the VLANs that a trunk port passes.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=4096
	Trunk []*TrunkConfig `json:"trunk,omitempty"`
	// interfaceType is OVSDB Interface.type of the port.
	// +optional
	InterfaceType string `json:"interfaceType,omitempty"`
	// metaPlugins are CNI plugins to run after the VF's own: JSON objects with commas
	// between them.
	// +optional
	MetaPluginsConfig string `json:"metaPlugins,omitempty"`
}

// TrunkConfig is one VLAN, or a range of VLANs, of a trunk.
//
// +kubebuilder:validation:XValidation:rule="has(self.id) || has(self.minID) || has(self.maxID)",message="an empty trunk entry passes nothing: give id, or minID and maxID"
// +kubebuilder:validation:XValidation:rule="has(self.minID) == has(self.maxID)",message="a trunk range needs both ends: give minID and maxID"
// +kubebuilder:validation:XValidation:rule="!has(self.minID) || !has(self.maxID) || self.minID <= self.maxID",message="the trunk range runs backwards: minID must not be above maxID"
type TrunkConfig struct {
	// minID is the first VLAN of a range.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 4095",message="not a VLAN ID: use 0 to 4095"
	MinID *uint `json:"minID,omitempty"`
	// maxID is the last VLAN of a range.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 4095",message="not a VLAN ID: use 0 to 4095"
	MaxID *uint `json:"maxID,omitempty"`
	// id is one VLAN.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 4095",message="not a VLAN ID: use 0 to 4095"
	ID *uint `json:"id,omitempty"`
}

// OVSNetwork makes a NetworkAttachmentDefinition for the ovs CNI plugin.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Resource",type=string,JSONPath=`.spec.resourceName`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
type OVSNetwork struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitzero"`
	// spec is what is asked for.
	// +required
	Spec OVSNetworkSpec `json:"spec"`
	// status is what became of it.
	// +optional
	Status NetworkStatus `json:"status,omitzero"`
}

// OVSNetworkList is a list of networks.
//
// +kubebuilder:object:root=true
type OVSNetworkList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitzero"`
	Items           []OVSNetwork `json:"items"`
}
