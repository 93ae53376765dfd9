// Package ovstest runs a real Open vSwitch for tests, from Debian's packages in the
// directory SLUICE_OVS, in a directory of its own.
package ovstest
