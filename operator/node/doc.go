// Package node is the node's half of configuring NICs: it looks at the kernel,
// compares with the spec of its own SriovNetworkNodeState, does the operations
// that package plan derives, and writes what it saw into the status.
//
// Agent is a single worker, woken by changes of the spec, by kernel events and
// by holders that let go; it looks on its own only each few minutes. PFs are
// worked on side by side, and one that fails is tried again later without
// holding up the others. What is to do follows from what the kernel shows, so an
// agent killed at any moment goes on where it was. Records are kept only of what
// the kernel cannot show: what a PF was before its first change, which goal cut the
// node off, what the node was rebooted for.
//
// An event names a device, and only its NIC is looked at, at once but within a
// budget of time (look.go). What would cut the way to the API server is refused,
// and what may is checked and taken back (guard.go).
//
// The Open vSwitch bridge of a PF in switchdev mode is made and removed with the rest of
// the work on the PF, see bridge.go.
//
// MacVLAN parents are made and kept the same way, see macvlan.go: that disturbs no
// pod, so nothing waits there but the removal of what is still in use.
//
// Pools of VFs and slots go to an Advertiser. A VF is withdrawn before it is touched and
// advertised when it is ready; one that a pod holds is never touched. While a
// pod keeps a change from happening, its VFs are not given to new pods.
//
// The package declares what it needs of the rest of the agent as interfaces:
// Kernel, Switch, States, Advertiser, Usage and Lifeline.
package node
