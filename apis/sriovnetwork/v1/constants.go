package v1

// DefaultPriority is the priority of a policy that gives none. A lower number is
// stronger.
const DefaultPriority = 99

// Device types of a policy: what driver its VFs are bound to.
const (
	DeviceTypeNetDevice = "netdevice" // the VF's kernel network driver
	DeviceTypeVfioPci   = "vfio-pci"  // user space (DPDK, virtual machines)
)

// Values of a policy's allocation.
const (
	AllocationPack   = "Pack"
	AllocationSpread = "Spread"
)

// Modes of a PF's embedded switch.
const (
	EswitchModeLegacy    = "legacy"
	EswitchModeSwitchdev = "switchdev"
)

// Link types as the status spells them. A policy may use lower case too.
const (
	LinkTypeETH = "ETH"
	LinkTypeIB  = "IB"
)

// Values of SriovNetworkNodeState.status.syncStatus.
const (
	SyncStatusInProgress = "InProgress"
	SyncStatusSucceeded  = "Succeeded"
	SyncStatusFailed     = "Failed"
)

// Condition types. Ready is true when everything asked for is in effect, Progressing
// while work goes on, Degraded when something asked for cannot be done as it stands.
const (
	ConditionReady       = "Ready"
	ConditionProgressing = "Progressing"
	ConditionDegraded    = "Degraded"
	// ConditionWebhookReady is on a SriovOperatorConfig: whether admission by webhook is on
	// and works.
	ConditionWebhookReady = "WebhookReady"
	// ConditionInjectorReady is on a SriovOperatorConfig: whether pods are given, by webhook,
	// what their networks need.
	ConditionInjectorReady = "InjectorReady"
)

// ConditionEvicting of a node state is true while pods are being evicted, for a change of
// the node. The operator sets it; what the reason Blocked says names each blocker.
const ConditionEvicting = "Evicting"

// ConditionRebootRequired of a node state is true while a change waits for the node to
// be booted anew.
const ConditionRebootRequired = "RebootRequired"

// Reasons of the Ready condition of a network.
const (
	ReasonNetworkReady      = "NetworkReady"
	ReasonNADNotFound       = "NetworkAttachmentDefinitionNotFound"
	ReasonNADInvalid        = "NetworkAttachmentDefinitionInvalid"
	ReasonNamespaceNotFound = "NamespaceNotFound"
)

// Annotations and finalizers on objects of this group and on what is made from them.
const (
	// AnnotationDesiredState and AnnotationCurrentState carry the drain state machine on
	// a SriovNetworkNodeState.
	AnnotationDesiredState = "sriovnetwork.openshift.io/desired-state"
	AnnotationCurrentState = "sriovnetwork.openshift.io/current-state"
	// AnnotationNodeState on a Node is what the SR-IOV network operator was doing with it:
	// Idle, Drain_Required or Reboot_Required.
	AnnotationNodeState = "sriovnetwork.openshift.io/state"
	// AnnotationForceManagementNIC on a SriovNetworkNodeState, "true", lets the agent make
	// changes that may cut its node's path to the API server.
	AnnotationForceManagementNIC = "sluice.dev/force-management-nic"
	// AnnotationRebootAllowed on a SriovNetworkNodeState is the operator's consent to a
	// reboot for the goal of the generation it names; no pod of the node is evicted after.
	AnnotationRebootAllowed = "sluice.dev/reboot-allowed"
	// AnnotationRemoval on a SriovNetworkNodeState, "true", tells the agent that it is
	// about to be removed: with an empty spec in effect, and no VF in a pod, it takes its
	// files off the node and is Ready with reason Removed.
	AnnotationRemoval = "sluice.dev/removal"
	// AnnotationReadOnlyEtc on a SriovOperatorConfig, "true", says that nothing can be made
	// in /etc of the nodes, as on Talos: agents do without what they use there.
	AnnotationReadOnlyEtc = "sluice.dev/read-only-etc"
	// AnnotationOwnerRef names the network a NetworkAttachmentDefinition was made from,
	// as <Kind>.<group>/<namespace>/<name>.
	AnnotationOwnerRef = "sriovnetwork.openshift.io/owner-ref"
	// AnnotationOwnerUID is the UID of that network. A NetworkAttachmentDefinition is
	// deleted only for the very network that made it.
	AnnotationOwnerUID = "sluice.dev/owner-uid"
	// AnnotationResourceName names the device plugin resource that a
	// NetworkAttachmentDefinition draws from, as <prefix>/<resourceName>.
	AnnotationResourceName = "k8s.v1.cni.cncf.io/resourceName"
	// FinalizerNetAttDef is on networks that the SR-IOV network operator made a
	// NetworkAttachmentDefinition for in another namespace. It is taken off.
	FinalizerNetAttDef = "netattdef.finalizers.sriovnetwork.openshift.io"
	// FinalizerOperatorConfig holds a SriovOperatorConfig with onRemoval Restore until the
	// nodes have given back their NICs.
	FinalizerOperatorConfig = "operatorconfig.finalizers.sriovnetwork.openshift.io"
)
