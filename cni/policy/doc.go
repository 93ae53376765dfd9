// Package policy compiles network policies into verdict maps: for an interface and a
// direction, which peer addresses may be talked to, by which protocols and ports.
//
// Three kinds of policy hold: Kubernetes' NetworkPolicy, on networks that opt in;
// MultiNetworkPolicy, on the networks that its annotation lists; and the default deny of
// a namespace's old annotation. What peers they select is resolved to the addresses that
// these pods have on the network of the interface, and on no other.
//
// An Index is told what pods, namespaces, networks and policies there are, and keeps the
// verdict maps of the interfaces that are its own. What an event costs is in proportion to
// what it changes: selectors are found by the labels they ask for, pods by the labels they
// have, and a verdict map is patched where a peer came or went. Interfaces that the same
// policies select share one map.
//
// A verdict map says of what it allows which policies do, so that they can be told apart
// where it is enforced.
//
// A verdict is about a new connection. Replies, ARP, neighbour discovery and the like are
// the business of whoever enforces it. A policy that is not valid allows nothing, and
// isolates whatever it may have meant; State.Faults says why.
//
// The package is pure: no client, no kernel, no clock.
package policy
