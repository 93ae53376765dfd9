// Package node is the node's half of configuring NICs: it looks at the kernel,
// compares with the spec of its own SriovNetworkNodeState, does the operations
// that package plan derives, and writes what it saw into the status.
//
// Agent is a single worker, woken by changes of the spec, by kernel events and
// by holders that let go; it looks on its own only each few minutes. PFs are
// worked on side by side, and one that fails is tried again later without
// holding up the others. No record is kept: what is to do follows from what the
// kernel shows, so an agent killed at any moment goes on where it was.
//
// Pools of VFs go to an Advertiser. A VF is withdrawn before it is touched and
// advertised when it is ready; one that a pod holds is never touched. While a
// pod keeps a change from happening, its VFs are not given to new pods.
//
// The package declares what it needs of the rest of the agent as interfaces:
// Kernel, States, Advertiser and Usage.
package node
