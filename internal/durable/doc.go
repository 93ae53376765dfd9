// Package durable writes files that survive a loss of power: whole or not at
// all. It is part of the CNI shim and imports nothing that would make it start
// slowly.
package durable
