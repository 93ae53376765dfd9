// Package plan decides, without touching anything, what a node shall have.
//
// Desired is a pure function of the policies, one node's labels, the NICs it has and
// what it was told before. It gives the spec of the node's SriovNetworkNodeState and,
// for every policy, findings: in effect on which PF, or not and why, with the mend.
// The result does not depend on the order of its inputs.
//
// How policies combine on one PF: the strongest policy (lowest priority number, then
// earliest created, then first by name) claims its VFs first. A weaker one that claims
// any of them gets none on that PF: it is Overridden if its priority number is higher,
// and in Conflict if the numbers are equal and the two want different things; equal
// wants are merged. NumVfs and MTU of the PF are the largest of the policies in effect;
// its eswitch mode, link type and bridge are those of the strongest policy that gives one.
//
// A policy refused for a value that cannot be right (more VFs than the NIC has, say)
// keeps what it had on the PF before: a typing error must not take VFs from pods.
//
// Policies are compiled once and then planned for any number of nodes: Policies.Spec
// is Desired without the findings.
//
// Operations and SystemOperations turn what is into what is wanted, by the fewest steps,
// each with its Cost. What would disturb a pod or the node, and what cannot be at all, is
// Blocked and says why. They are planned again after each look, so that an agent that was
// stopped anywhere goes on from there. WithBridge adds what a PF's Open vSwitch bridge needs.
//
// DesiredMacvlan does what Desired does for MacVLAN parents, where a policy claims links, or
// VLANs of links, and MacvlanOperations and UnusedVLANs for what is to be done to them.
package plan
