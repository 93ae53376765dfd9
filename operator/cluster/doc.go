// Package cluster is the half of the operator that talks to the API server. It turns
// what people wrote into what nodes and pods read, through the pure packages plan and
// render:
//
//   - OperatorConfig: the SriovOperatorConfig into the agents' DaemonSet, and its removal.
//   - NodeState: policies and a node's inventory into that node's SriovNetworkNodeState
//     spec; one reconcile key per node, so that one node never waits for another.
//   - PolicyStatus: the plan's findings and the nodes' reports into a policy's status.
//   - Pool: which nodes a SriovNetworkPoolConfig has, and how many of them are disturbed.
//   - Eviction: what waits on the nodes into evictions of exactly the pods in the way, as
//     many nodes at a time as their pools allow.
//   - Network: networks of every kind into NetworkAttachmentDefinitions.
//
// All writes are server-side applies of only what differs: when nothing changed,
// nothing is written.
package cluster
