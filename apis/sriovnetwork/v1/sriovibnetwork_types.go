package v1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// SriovIBNetworkSpec is an InfiniBand network that pods join with a VF.
type SriovIBNetworkSpec struct {
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
	// {"infinibandGUID": true}.
	// +optional
	Capabilities string `json:"capabilities,omitempty"`
	// ipam is the configuration of the IPAM plugin, a JSON object. Empty means none.
	// +optional
	IPAM string `json:"ipam,omitempty"`
	// linkState is the link the VF is shown: the PF's, always up, or always down.
	// +optional
	// +kubebuilder:validation:Enum={"auto","enable","disable"}
	LinkState string `json:"linkState,omitempty"`
	// metaPlugins are CNI plugins to run after the VF's own: JSON objects with commas
	// between them.
	// +optional
	MetaPluginsConfig string `json:"metaPlugins,omitempty"`
}

// SriovIBNetwork makes a NetworkAttachmentDefinition through which pods get an
// InfiniBand VF.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Resource",type=string,JSONPath=`.spec.resourceName`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
type SriovIBNetwork struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitzero"`
	// spec is what is asked for.
	// +required
	Spec SriovIBNetworkSpec `json:"spec"`
	// status is what became of it.
	// +optional
	Status NetworkStatus `json:"status,omitzero"`
}

// SriovIBNetworkList is a list of networks.
//
// +kubebuilder:object:root=true
type SriovIBNetworkList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitzero"`
	Items           []SriovIBNetwork `json:"items"`
}
