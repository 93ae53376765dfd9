// Package attach makes a VF, or a MacVLAN sub-interface, an interface of a pod and
// takes it back.
//
// Parse reads a network configuration, strictly: nothing it accepts is ignored
// by accident, and nothing is changed before all of it is valid. Attacher.Add
// writes what it is about to do to a journal before it does it, so that a
// failure is undone at once, and an agent that dies is succeeded by one that
// knows what to undo. Undoing is always the same idempotent procedure: a VF comes
// home and gets its baseline, a sub-interface is deleted. Only that, and how they
// are made, is different for the two (type kind); the rest is the same.
//
// A VF or slot has at most one owner: the record of the journal that holds it.
// What arrives late for an earlier owner concerns that owner's record and
// addresses only, never the device.
//
// In a pod a VF is found by its PCI address, whatever its name is there: the
// kernel tells that since Linux 5.14 (IFLA_PARENT_DEV_NAME).
package attach
