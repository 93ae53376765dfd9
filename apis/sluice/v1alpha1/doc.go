// Package v1alpha1 holds the kinds of the API group sluice.dev/v1alpha1: what Sluice has
// beyond the SR-IOV kinds of sriovnetwork.openshift.io.
//
// MacvlanNodePolicy offers slots for MacVLAN sub-interfaces on links of some nodes, as a
// resource that pods ask for; MacvlanNetwork makes the NetworkAttachmentDefinition
// through which they get one. What a node has and shall have of them is in its
// SriovNetworkNodeState.
//
// +kubebuilder:object:generate=true
// +groupName=sluice.dev
package v1alpha1
