// Package cluster is the half of the operator that talks to the API server. It turns
// what people wrote into what nodes and pods read, through the pure packages plan and
// render:
//
//   - NodeState: policies and a node's inventory into that node's SriovNetworkNodeState
//     spec; one reconcile key per node, so that one node never waits for another.
//   - PolicyStatus: the plan's findings and the nodes' reports into a policy's status.
//   - Network: networks of every kind into NetworkAttachmentDefinitions.
//
// All writes are server-side applies of only what differs: when nothing changed,
// nothing is written.
package cluster
