package v1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// DefaultOperatorConfigName is the name of the one SriovOperatorConfig that counts, in
// the operator's namespace.
const DefaultOperatorConfigName = "default"

// Values of SriovOperatorConfig.spec.configurationMode.
const (
	ConfigurationModeDaemon  = "daemon"
	ConfigurationModeSystemd = "systemd"
)

// Values of SriovOperatorConfig.spec.onRemoval.
const (
	OnRemovalKeep    = "Keep"
	OnRemovalRestore = "Restore"
)

// SriovOperatorConfigSpec configures Sluice itself.
type SriovOperatorConfigSpec struct {
	// configDaemonNodeSelector selects, by labels that must all be equal, the nodes that
	// get an agent. Empty means Linux nodes with the label
	// node-role.kubernetes.io/worker="", or all Linux nodes when no node has it.
	// +optional
	ConfigDaemonNodeSelector map[string]string `json:"configDaemonNodeSelector,omitempty"`
	// enableInjector turns on the webhook that gives pods what the networks in their
	// annotation need: the resource requests that they lack, node selectors, and the volume
	// podnetinfo. It is true in the object that the operator makes.
	// +optional
	EnableInjector bool `json:"enableInjector,omitempty"`
	// enableOperatorWebhook turns on admission by webhook for what the schemas cannot
	// decide. What it refuses is refused by the operator without it too, in status.
	// +optional
	EnableOperatorWebhook bool `json:"enableOperatorWebhook,omitempty"`
	// logLevel of operator and agents: 0 for what people act on, 1 and 2 for more.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self >= 0 && self <= 2",message="not a log level: set logLevel to 0, 1 or 2"
	LogLevel int `json:"logLevel,omitempty"`
	// disableDrain evicts no pods: a change that needs VFs which pods hold waits for them.
	// +optional
	DisableDrain bool `json:"disableDrain,omitempty"`
	// enableOvsOffload has no effect, as in the operator it comes from; a condition says so.
	// +optional
	EnableOvsOffload bool `json:"enableOvsOffload,omitempty"`
	// configurationMode: daemon is how Sluice works; systemd is reported as not supported.
	// +optional
	// +kubebuilder:validation:Enum=daemon;systemd
	ConfigurationMode string `json:"configurationMode,omitempty"`
	// useCDI gives pods their device nodes by the Container Device Interface, which the
	// runtime must have turned on.
	// +optional
	UseCDI bool `json:"useCDI,omitempty"`
	// disablePlugins turns vendor plugins off. Sluice has none; the field is accepted.
	// +optional
	DisablePlugins []PluginName `json:"disablePlugins,omitempty"`
	// featureGates turn features on or off by name. Unknown ones are reported by a
	// condition.
	// +optional
	FeatureGates map[string]bool `json:"featureGates,omitempty"`
	// configDaemonEnvVars are further environment variables of the agents.
	// +optional
	// +kubebuilder:validation:MaxProperties=64
	// +kubebuilder:validation:XValidation:rule="self.all(k, k.matches('^[-._a-zA-Z][-._a-zA-Z0-9]*$'))",messageExpression="self.filter(k, !k.matches('^[-._a-zA-Z][-._a-zA-Z0-9]*$'))[0] + ' is not the name of an environment variable: use letters, digits, _, - and ., and no digit first'"
	ConfigDaemonEnvVars map[string]string `json:"configDaemonEnvVars,omitempty"`
	// tolerations of the agents. Empty tolerates every taint. Added.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:XValidation:rule="!has(self.operator) || self.operator in ['', 'Exists', 'Equal', 'Lt', 'Gt']",fieldPath=".operator",messageExpression="'operator ' + self.operator + ' is none: use Exists or Equal'"
	// +kubebuilder:validation:items:XValidation:rule="!has(self.effect) || self.effect in ['', 'NoSchedule', 'PreferNoSchedule', 'NoExecute']",fieldPath=".effect",messageExpression="'effect ' + self.effect + ' is none: use NoSchedule, PreferNoSchedule or NoExecute, or leave it out for all'"
	// +kubebuilder:validation:items:XValidation:rule="(has(self.key) && size(self.key) > 0) || (has(self.operator) && self.operator == 'Exists')",fieldPath=".operator",message="a toleration without a key is one of every taint: set operator to Exists, or give a key"
	// +kubebuilder:validation:items:XValidation:rule="!has(self.operator) || self.operator != 'Exists' || !has(self.value) || size(self.value) == 0",fieldPath=".value",message="operator Exists looks at no value: remove value, or set operator to Equal"
	Tolerations []corev1.Toleration `json:"tolerations,omitempty"`
	// onRemoval says what becomes of the NICs when this object is deleted: Keep leaves
	// them as they are; Restore removes the VFs that Sluice made and gives the PFs back
	// the settings they had, before the agents go. Added.
	// +optional
	// +kubebuilder:default=Keep
	// +kubebuilder:validation:Enum=Keep;Restore
	OnRemoval string `json:"onRemoval,omitempty"`
}

// PluginName is the name of a vendor plugin.
//
// +kubebuilder:validation:Enum=mellanox
type PluginName string

// SriovOperatorConfigStatus says what became of the configuration.
type SriovOperatorConfigStatus struct {
	// injector is declared for compatibility and never set.
	// +optional
	Injector string `json:"injector,omitempty"`
	// operatorWebhook is declared for compatibility and never set.
	// +optional
	OperatorWebhook string `json:"operatorWebhook,omitempty"`
	// conditions are Ready, Progressing and Degraded.
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// observedGeneration is the generation of the spec this status speaks of. Added.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// matchedNodeCount is the number of nodes that shall have an agent. Added.
	// +optional
	MatchedNodeCount int `json:"matchedNodeCount"`
	// readyNodeCount is the number of those whose agent is ready. Added.
	// +optional
	ReadyNodeCount int `json:"readyNodeCount"`
}

// SriovOperatorConfig configures Sluice itself. Only the one named default in the
// operator's namespace counts.
//
// +kubebuilder:validation:XValidation:rule="oldSelf.hasValue() || self.metadata.name == 'default'",optionalOldSelf=true,messageExpression="'metadata.name: ' + self.metadata.name + ' would have no effect, because only the SriovOperatorConfig named default counts: name it default'"
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Nodes",type=integer,JSONPath=`.status.matchedNodeCount`
// +kubebuilder:printcolumn:name="Ready Nodes",type=integer,JSONPath=`.status.readyNodeCount`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
type SriovOperatorConfig struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitzero"`
	// spec is what is asked for.
	// +optional
	Spec SriovOperatorConfigSpec `json:"spec,omitzero"`
	// status is what became of it.
	// +optional
	Status SriovOperatorConfigStatus `json:"status,omitzero"`
}

// SriovOperatorConfigList is a list of configurations.
//
// +kubebuilder:object:root=true
type SriovOperatorConfigList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitzero"`
	Items           []SriovOperatorConfig `json:"items"`
}
