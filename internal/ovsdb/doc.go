// Package ovsdb makes bridges in Open vSwitch, through the management protocol of its
// database (RFC 7047) on the unix socket of the node's ovsdb-server.
//
// A bridge that this package made carries Mark in its external_ids: what was set there,
// as JSON. It tells what is ours, also after a crash, and which keys of its maps: what
// others add beside them is left alone. Each change is one transaction.
package ovsdb
