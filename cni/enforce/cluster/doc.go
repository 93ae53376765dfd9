// Package cluster follows, at the API server, what network policy depends on: pods,
// namespaces, NetworkPolicies, and of the Network Plumbing Working Group's kinds
// NetworkAttachmentDefinitions and MultiNetworkPolicies, while these are installed.
//
// Of a pod it keeps what policy needs and no more: every node follows all pods of the
// cluster, for each may be a peer.
package cluster
