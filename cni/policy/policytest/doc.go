// Package policytest is what NetworkPolicy and MultiNetworkPolicy mean, as a table: for
// each statement policies, and which connections may be and may not. The tests of
// package policy hold its verdicts to it, and those of enforcement the rules in the kernel
// and the packets.
package policytest
