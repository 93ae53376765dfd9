// Package policy compiles network policies into verdict maps: for an interface and a
// direction, which peer addresses may be talked to, by which protocols and ports.
//
// It is pure: no client, no kernel, no clock.
package policy
