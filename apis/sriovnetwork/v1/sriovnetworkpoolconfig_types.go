package v1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Values of SriovNetworkPoolConfig.spec.rdmaMode.
const (
	RdmaModeShared    = "shared"
	RdmaModeExclusive = "exclusive"
)

// Values of SriovNetworkPoolConfig.spec.rebootPolicy.
const (
	RebootNever        = "Never"
	RebootWhenRequired = "WhenRequired"
)

// SriovNetworkPoolConfigSpec says how the nodes of a pool may be disturbed, and what
// they have in common.
//
// +kubebuilder:validation:XValidation:rule="!has(self.ovsHardwareOffloadConfig) || !has(self.ovsHardwareOffloadConfig.name) || size(self.ovsHardwareOffloadConfig.name) == 0 || (!has(self.maxUnavailable) && !has(self.nodeSelector))",fieldPath=".ovsHardwareOffloadConfig",message="ovsHardwareOffloadConfig cannot go with maxUnavailable or nodeSelector: make two SriovNetworkPoolConfigs"
type SriovNetworkPoolConfigSpec struct {
	// ovsHardwareOffloadConfig names an OpenShift machine config pool. Elsewhere it has no
	// effect, which a condition says.
	// +optional
	OvsHardwareOffloadConfig OvsHardwareOffloadConfig `json:"ovsHardwareOffloadConfig,omitzero"`
	// nodeSelector selects the nodes of the pool; empty selects all. A node in two pools
	// is in neither, which a condition on both says.
	// +optional
	// +kubebuilder:validation:XValidation:rule="!has(self.matchExpressions) || self.matchExpressions.all(e, e.operator in ['In', 'NotIn', 'Exists', 'DoesNotExist'])",fieldPath=".matchExpressions",message="an operator is none of In, NotIn, Exists and DoesNotExist: write one of these"
	// +kubebuilder:validation:XValidation:rule="!has(self.matchExpressions) || self.matchExpressions.all(e, (e.operator in ['In', 'NotIn']) == (has(e.values) && size(e.values) > 0))",fieldPath=".matchExpressions",message="In and NotIn need values, Exists and DoesNotExist take none: add or remove values"
	NodeSelector *metav1.LabelSelector `json:"nodeSelector,omitempty"`
	// maxUnavailable is how many nodes of the pool, as a number or "N%", may have pods
	// evicted or be rebooted at the same time. A percentage is rounded down, but not below
	// 1; unset is no limit. Nodes in no pool are taken one at a time.
	// +optional
	// +kubebuilder:validation:XValidation:rule="type(self) == int ? self >= 0 : self.matches('^([1-9][0-9]?|100)%$')",message="maxUnavailable is not a number of nodes or a percentage: write 0 or more, or 1% to 100%"
	MaxUnavailable *intstr.IntOrString `json:"maxUnavailable,omitempty"`
	// rdmaMode is the RDMA subsystem's network namespace mode on the nodes of the pool.
	// +optional
	// +kubebuilder:validation:Enum=shared;exclusive
	RdmaMode string `json:"rdmaMode,omitempty"`
	// rebootPolicy allows nodes of the pool to be rebooted when a change cannot be had
	// otherwise: Never, or WhenRequired. Added.
	// +optional
	// +kubebuilder:default=Never
	// +kubebuilder:validation:Enum=Never;WhenRequired
	RebootPolicy string `json:"rebootPolicy,omitempty"`
}

// OvsHardwareOffloadConfig asks for Open vSwitch hardware offload.
type OvsHardwareOffloadConfig struct {
	// name of the OpenShift machine config pool.
	// +optional
	Name string `json:"name,omitempty"`
}

// SriovNetworkPoolConfigStatus says what became of the pool.
type SriovNetworkPoolConfigStatus struct {
	// conditions are Ready, Progressing and Degraded.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// observedGeneration is the generation of the spec this status speaks of. Added.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// matchedNodeCount is the number of nodes in the pool. Added.
	// +optional
	MatchedNodeCount int `json:"matchedNodeCount"`
	// readyNodeCount is the number of those that have all that is asked of them. Added.
	// +optional
	ReadyNodeCount int `json:"readyNodeCount"`
	// disturbedNodeCount is the number of nodes in the pool whose pods are being evicted, or that are
	// being rebooted. Added.
	// +optional
	DisturbedNodeCount int `json:"disturbedNodeCount"`
}

// SriovNetworkPoolConfig is a pool of nodes.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Max Unavailable",type=string,JSONPath=`.spec.maxUnavailable`
// +kubebuilder:printcolumn:name="Nodes",type=integer,JSONPath=`.status.matchedNodeCount`
// +kubebuilder:printcolumn:name="Ready Nodes",type=integer,JSONPath=`.status.readyNodeCount`
// +kubebuilder:printcolumn:name="Disturbed",type=integer,JSONPath=`.status.disturbedNodeCount`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
type SriovNetworkPoolConfig struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitzero"`
	// spec is what is asked for.
	// +optional
	Spec SriovNetworkPoolConfigSpec `json:"spec,omitzero"`
	// status is what became of it.
	// +optional
	Status SriovNetworkPoolConfigStatus `json:"status,omitzero"`
}

// SriovNetworkPoolConfigList is a list of pools.
//
// +kubebuilder:object:root=true
type SriovNetworkPoolConfigList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitzero"`
	Items           []SriovNetworkPoolConfig `json:"items"`
}
