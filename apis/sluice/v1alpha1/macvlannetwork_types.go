package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// MacvlanNetworkSpec is a network that pods join with a MacVLAN sub-interface.
//
// +kubebuilder:validation:XValidation:rule="(has(self.resourceName) && size(self.resourceName) > 0) || (has(self.master) && size(self.master) > 0)",message="nothing says on which link: give resourceName, that of a MacvlanNodePolicy, or master, the link's name on every node"
// +kubebuilder:validation:XValidation:rule="!has(self.hostInterface) || (has(self.ipam) && size(self.ipam) > 0)",message="hostInterface leads to the pod's addresses: set ipam, too"
type MacvlanNetworkSpec struct {
	// networkNamespace is where the NetworkAttachmentDefinition is made; empty means the
	// network's own namespace. Only networks in the operator's namespace may name another.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || self.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$')",messageExpression="'networkNamespace \"' + self + '\" is not a namespace name: use 1 to 63 lower-case letters, digits and -'"
	NetworkNamespace string `json:"networkNamespace,omitempty"`
	// resourceName is the resource the slots come from, without prefix: that of a
	// MacvlanNodePolicy. The slot that kubelet allocates decides on the parent.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || self.matches('^[a-zA-Z0-9]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?$')",messageExpression="'resourceName \"' + self + '\" is not a resource name: use 1 to 63 letters, digits, _ and -, with a letter or digit at both ends'"
	ResourceName string `json:"resourceName,omitempty"`
	// master is the name of the parent on every node, for networks without a resource.
	// With resourceName, the parent of the slot must be this one.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:XValidation:rule="size(self) == 0 || self.matches('^[^/:[:space:]]{1,15}$') && !(self in ['.', '..'])",messageExpression="'master \"' + self + '\" is not the name of a link: write 1 to 15 characters without /, : and spaces, such as bond0'"
	Master string `json:"master,omitempty"`
	// mode of the sub-interface: bridge lets those of one parent talk to each other,
	// private does not, vepa sends all traffic to the switch, passthru gives the parent to
	// one pod alone.
	// +optional
	// +kubebuilder:default=bridge
	// +kubebuilder:validation:Enum=bridge;private;vepa;passthru
	Mode string `json:"mode,omitempty"`
	// mtu of the sub-interface in bytes; unset takes the parent's.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 68 && self <= 65535",message="not an MTU: set mtu to 68 to 65535 bytes"
	Mtu int `json:"mtu,omitempty"`
	// ipam is the configuration of the IPAM plugin, a JSON object. Empty means none.
	// +optional
	IPAM string `json:"ipam,omitempty"`
	// capabilities is a JSON object of what the pod's annotation may set, such as
	// {"mac": true, "ips": true}.
	// +optional
	Capabilities string `json:"capabilities,omitempty"`
	// conflictProbe is how many milliseconds to listen for other stations that have the
	// pod's addresses, before these are used; 0 does not ask. Unset means 50.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 10000",message="not a time to listen: set conflictProbe to 0 to 10000 milliseconds"
	ConflictProbe *int `json:"conflictProbe,omitempty"`
	// hostInterface, when set, gives the pods a second, private interface to their node.
	// It is for pods whose only network this is: kubelet's probes reach them by it, and
	// they reach their node, and the networks in routes.
	// +optional
	HostInterface *HostInterface `json:"hostInterface,omitempty"`
	// metaPlugins are CNI plugins to run after the sub-interface's own: JSON objects with
	// commas between them.
	// +optional
	MetaPlugins string `json:"metaPlugins,omitempty"`
}

// HostInterface is a pair of links between a pod and its node.
type HostInterface struct {
	// routes are the networks that the pod reaches by its node, such as those of
	// Services and of a node-local DNS.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=43
	// +kubebuilder:validation:items:XValidation:rule="isCIDR(self) && cidr(self).masked() == cidr(self)",messageExpression="'\"' + self + '\" is not a network such as 10.96.0.0/12'"
	Routes []string `json:"routes,omitempty"`
}

// MacvlanNetwork makes a NetworkAttachmentDefinition through which pods get a MacVLAN
// sub-interface.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Resource",type=string,JSONPath=`.spec.resourceName`
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
type MacvlanNetwork struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitzero"`
	// spec is what is asked for.
	// +required
	Spec MacvlanNetworkSpec `json:"spec"`
	// status is what became of it.
	// +optional
	Status sriovv1.NetworkStatus `json:"status,omitzero"`
}

// MacvlanNetworkList is a list of networks.
//
// +kubebuilder:object:root=true
type MacvlanNetworkList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitzero"`
	Items           []MacvlanNetwork `json:"items"`
}
