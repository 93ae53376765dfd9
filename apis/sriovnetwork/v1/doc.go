// Package v1 holds the kinds of the API group sriovnetwork.openshift.io/v1: what people
// write to get SR-IOV virtual functions (VFs) on their nodes, and what they read to
// learn what became of it.
//
// The group, kinds, JSON names (odd ones such as totalvfs, Vfs, Vlan and metaPlugins
// included), defaults and enums are those the SR-IOV network operator introduced, so
// that its users' YAML applies unchanged. Fields it does not have are additions only
// and are marked "Added" in their comments.
//
// Rules that can be decided from one object alone are CEL rules in the schema. Rules
// that need the node's inventory are decided by the operator and reported in status.
//
// +kubebuilder:object:generate=true
// +groupName=sriovnetwork.openshift.io
package v1
