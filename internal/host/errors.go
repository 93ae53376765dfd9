package host

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// KernelError is a change, or a query, that the kernel refused.
type KernelError struct {
	Op     string // what was tried, a verb phrase: "create 8 VFs"
	Object string // on what: "0000:3b:00.0 (ens1f0)"
	Hint   string // the mend, empty when the cause is not known
	Err    error  // wraps the errno, with the driver's words when it gave any
}

// Error reads "create 8 VFs on 0000:3b:00.0 (ens1f0): cannot allocate memory (ENOMEM); <mend>".
func (e *KernelError) Error() string {
	s := fmt.Sprintf("%s on %s: %v", e.Op, e.Object, e.Err)
	if name := e.ErrnoName(); name != "" {
		s += " (" + name + ")"
	}
	if e.Hint != "" {
		s += "; " + e.Hint
	}
	return s
}

// Unwrap gives the cause, so that errors.Is(err, unix.ENOMEM) works.
func (e *KernelError) Unwrap() error { return e.Err }

// ErrnoName is the symbol of the errno, "ENOMEM", or empty.
func (e *KernelError) ErrnoName() string {
	var errno unix.Errno
	if errors.As(e.Err, &errno) {
		return unix.ErrnoName(errno)
	}
	return ""
}

// hintFor returns the mend of the first errno that err is.
func hintFor(err error, hints []hint) string {
	for _, h := range hints {
		if errors.Is(err, h.errno) {
			return h.mend
		}
	}
	return ""
}

type hint struct {
	errno unix.Errno
	mend  string
}

// What sriov_numvfs answers: sriov_numvfs_store and sriov_enable in
// drivers/pci/iov.c, and what PF drivers return from sriov_configure.
var numVFsHints = []hint{
	{unix.ENOMEM, "the firmware gave the NIC too little MMIO space or too few bus numbers for so many VFs: boot with pci=realloc (and pci=assign-busses), enable SR-IOV and \"above 4G decoding\" in the BIOS, or ask for fewer VFs"},
	{unix.ERANGE, "ask for no more VFs than sriov_totalvfs says, or raise the limit in the NIC's firmware"},
	{unix.EBUSY, "VFs exist already and must be removed first, or something else is changing this NIC: see who writes sriov_numvfs"},
	{unix.EINVAL, "the device or its driver does not accept this number of VFs: see the kernel log of the node"},
	{unix.ENOSPC, "the NIC has too few queues or interrupt vectors left: ask for fewer VFs or free what other functions of the card use"},
	{unix.ENOENT, "the PF has no driver, or its driver cannot make VFs through sysfs: bind the vendor's PF driver"},
	{unix.EPERM, "the driver refuses while VFs are in use by a virtual machine, or in this mode of the NIC: see the kernel log of the node"},
	{unix.EACCES, "the agent may not write sysfs: mount the node's /sys writable"},
	{unix.EROFS, "the agent may not write sysfs: mount the node's /sys writable"},
	{unix.EAGAIN, "the NIC is being reset: it is tried again"},
	{unix.EIO, "the NIC's firmware refused: see the kernel log of the node"},
	{unix.EOPNOTSUPP, "the driver does not support this: see the kernel log of the node"},
}

var mtuHints = []hint{
	{unix.EINVAL, "the driver does not take this MTU: see minmtu and maxmtu in \"ip -d link show\", for a VF also the PF's MTU"},
	{unix.EBUSY, "the driver changes the MTU only while the link is down"},
	{unix.ERANGE, "the link below it has a smaller MTU: raise that first"},
	{unix.EPERM, "the PF's driver does not let this VF have a larger MTU than its own: raise the PF's MTU"},
}

var vlanHints = []hint{
	{unix.EEXIST, "a link of this name is there already and is not this VLAN's: rename or remove it"},
	{unix.EOPNOTSUPP, "the node's kernel lacks the module 8021q, or the link takes no VLANs: load the module, or select another link"},
	{unix.ENETDOWN, "the link is down and must come up first"},
	{unix.EINVAL, "the link does not take this VLAN: see the kernel log of the node"},
}

var macHints = []hint{
	{unix.EADDRNOTAVAIL, "the address is multicast or all zero, or the VF takes no other than its PF gave it: see the kernel log of the node"},
	{unix.EINVAL, "the driver does not take this address, or the VF is gone: see the kernel log of the node"},
	{unix.EPERM, "the PF gave the VF another address: the PF's setting must change first"},
	{unix.EBUSY, "the driver changes the address only while the link is down"},
	{unix.EAGAIN, "the VF is being reset: it is tried again"},
}

var vfHints = []hint{
	{unix.EINVAL, "the driver does not take this value, or the VF is gone: see the kernel log of the node"},
	{unix.EPERM, "the driver refuses in this mode of the NIC: see the kernel log of the node"},
	{unix.EBUSY, "the VF is being reset: it is tried again"},
	{unix.EAGAIN, "the VF is being reset: it is tried again"},
}

var renameHints = []hint{
	{unix.EEXIST, "another link has this name or alternative name: rename it"},
	{unix.EBUSY, "this kernel renames only links that are down"},
}

var bindHints = []hint{
	{unix.ENODEV, "the driver is not loaded or does not know this device: load its module on the node"},
	{unix.EINVAL, "the device has no IOMMU group: enable the IOMMU in the BIOS and boot with intel_iommu=on or amd_iommu=on"},
	{unix.EBUSY, "the device is in use"},
	{unix.EPERM, "the device shares its IOMMU group with others that are in use by the kernel"},
}
