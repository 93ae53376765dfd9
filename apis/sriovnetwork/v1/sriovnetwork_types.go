package v1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// SriovNetworkSpec is a network that pods join with a VF.
//
// +kubebuilder:validation:XValidation:rule="!has(self.minTxRate) || !has(self.maxTxRate) || self.maxTxRate == 0 || self.minTxRate <= self.maxTxRate",fieldPath=".minTxRate",message="minTxRate is above maxTxRate: lower minTxRate or raise maxTxRate (Mb/s)"
// +kubebuilder:validation:XValidation:rule="!has(self.vlanQoS) || self.vlanQoS == 0 || (has(self.vlan) && self.vlan != 0)",fieldPath=".vlanQoS",message="vlanQoS is the priority in a VLAN tag: set vlan, or set vlanQoS to 0"
// +kubebuilder:validation:XValidation:rule="!has(self.vlanProto) || !(self.vlanProto in ['802.1ad', '802.1AD']) || (has(self.vlan) && self.vlan != 0)",fieldPath=".vlanProto",messageExpression="'vlanProto ' + self.vlanProto + ' is the kind of a VLAN tag: set vlan, or remove vlanProto'"
type SriovNetworkSpec struct {
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
	// vlan the VF is put in, 1 to 4094; 0 for none.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 4094",message="not a VLAN ID: set vlan to 1 to 4094, or to 0 for no VLAN"
	Vlan int `json:"vlan,omitempty"`
	// vlanQoS is the 802.1p priority of the VF's frames, 0 to 7. It needs a vlan.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 7",message="not an 802.1p priority: set vlanQoS to 0 to 7"
	VlanQoS int `json:"vlanQoS,omitempty"`
	// vlanProto is the VLAN protocol; empty means 802.1q.
	// +optional
	// +kubebuilder:validation:Enum="802.1q";"802.1Q";"802.1ad";"802.1AD"
	VlanProto string `json:"vlanProto,omitempty"`
	// spoofChk drops frames whose source is not the VF's own address.
	// +optional
	// +kubebuilder:validation:Enum={"on","off"}
	SpoofChk string `json:"spoofChk,omitempty"`
	// trust lets the VF change its address and enter promiscuous mode.
	// +optional
	// +kubebuilder:validation:Enum={"on","off"}
	Trust string `json:"trust,omitempty"`
	// linkState is the link the VF is shown: the PF's, always up, or always down.
	// +optional
	// +kubebuilder:validation:Enum={"auto","enable","disable"}
	LinkState string `json:"linkState,omitempty"`
	// minTxRate is the bandwidth the VF is promised, in Mb/s.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 0",message="a rate cannot be negative: give minTxRate in Mb/s, or 0 for none"
	MinTxRate *int `json:"minTxRate,omitempty"`
	// maxTxRate is the bandwidth the VF is held to, in Mb/s; 0 for no limit.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 0",message="a rate cannot be negative: give maxTxRate in Mb/s, or 0 for no limit"
	MaxTxRate *int `json:"maxTxRate,omitempty"`
	// metaPlugins are CNI plugins to run after the VF's own: JSON objects with commas
	// between them.
	// +optional
	MetaPluginsConfig string `json:"metaPlugins,omitempty"`
	// logLevel of the CNI plugin. Sluice's agent logs each call as SriovOperatorConfig's
	// logLevel says; that this one has no effect is in the condition Ready.
	// +optional
	// +kubebuilder:default=info
	// +kubebuilder:validation:Enum={"panic","error","warning","info","debug",""}
	LogLevel string `json:"logLevel,omitempty"`
	// logFile of the CNI plugin, a path on the node. Only networks in the operator's
	// namespace may name one. Sluice's agent logs to its own log; that this one has no effect
	// is in the condition Ready.
	// +optional
	LogFile string `json:"logFile,omitempty"`
}

// NetworkStatus says what became of a network.
type NetworkStatus struct {
	// conditions are Ready, Progressing and Degraded.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// observedGeneration is the generation of the spec this status speaks of. Added.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
}

// SriovNetwork makes a NetworkAttachmentDefinition through which pods get a VF.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Resource",type=string,JSONPath=`.spec.resourceName`
// +kubebuilder:printcolumn:name="Vlan",type=integer,JSONPath=`.spec.vlan`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
type SriovNetwork struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitzero"`
	// spec is what is asked for.
	// +required
	Spec SriovNetworkSpec `json:"spec"`
	// status is what became of it.
	// +optional
	Status NetworkStatus `json:"status,omitzero"`
}

// SriovNetworkList is a list of networks.
//
// +kubebuilder:object:root=true
type SriovNetworkList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitzero"`
	Items           []SriovNetwork `json:"items"`
}
