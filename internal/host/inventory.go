package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Inventory lists the network devices that can make VFs, sorted by PCI address,
// with their VFs but without VF settings (see ReadVFSettings): sysfs and one
// link dump. A device counts when its PCI class is "network" and sriov_totalvfs
// is above 0, whatever its vendor and driver, with or without a netdev here.
//
// A device that cannot be read does not hide the others: the result has those
// that could, and the error names those that could not.
func (h *Host) Inventory(ctx context.Context) ([]PF, error) {
	dir := filepath.Join(h.sysfs, "bus/pci/devices")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list PCI devices: %w", err)
	}
	list, err := h.links()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	byName := make(map[string]*netlink.LinkAttrs, len(list))
	for _, l := range list {
		byName[l.Attrs().Name] = l.Attrs()
	}
	links := func(name string) (*netlink.LinkAttrs, error) { return byName[name], nil }
	var pfs []PF
	var errs []error
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		pf, ok, err := h.readPF(e.Name(), links)
		switch {
		case err != nil && h.gone(e.Name()):
			// Unplugged while we looked; its event follows.
		case err != nil:
			errs = append(errs, fmt.Errorf("read NIC %s: %w", e.Name(), err))
		case ok:
			pfs = append(pfs, pf)
		}
	}
	slices.SortFunc(pfs, func(a, b PF) int { return strings.Compare(a.PCIAddress, b.PCIAddress) })
	return pfs, errors.Join(errs...)
}

// ReadPF reads one device as Inventory does, in sysfs and by one query for each
// netdev, whatever else there is on the machine; ok is false when it is not, or
// no longer, a device that can make VFs.
func (h *Host) ReadPF(_ context.Context, address string) (pf PF, ok bool, err error) {
	pf, ok, err = h.readPF(address, h.link)
	if err != nil {
		if h.gone(address) {
			return PF{}, false, nil
		}
		return PF{}, false, fmt.Errorf("read NIC %s: %w", address, err)
	}
	return pf, ok, nil
}

// lookup finds a netdev of this namespace by its name, nil when there is none.
type lookup func(name string) (*netlink.LinkAttrs, error)

// readPF reads one PCI device; ok is false when it is no SR-IOV NIC.
func (h *Host) readPF(address string, links lookup) (pf PF, ok bool, err error) {
	device, err := h.device(address)
	if err != nil {
		return PF{}, false, err
	}
	class, err := readText(filepath.Join(device, "class"))
	if err != nil {
		return PF{}, false, err
	}
	// PCI code and ID assignment: base class 02 is "network controller",
	// sub-class 07 InfiniBand.
	if !strings.HasPrefix(class, "0x02") {
		return PF{}, false, nil
	}
	total, err := readInt(filepath.Join(device, "sriov_totalvfs"))
	if errors.Is(err, fs.ErrNotExist) || err == nil && total <= 0 {
		return PF{}, false, nil
	}
	if err != nil {
		return PF{}, false, err
	}
	pf = PF{PCIAddress: address, TotalVFs: total, LinkType: Ethernet}
	if strings.HasPrefix(class, "0x0207") {
		pf.LinkType = InfiniBand
	}
	if pf.NumVFs, err = readInt(filepath.Join(device, "sriov_numvfs")); err != nil {
		return PF{}, false, err
	}
	if on, err := readInt(filepath.Join(device, "sriov_drivers_autoprobe")); err == nil { // since Linux 4.12
		pf.AutoprobeOff = on == 0
	}
	if pf.Vendor, err = readPCIID(filepath.Join(device, "vendor")); err != nil {
		return PF{}, false, err
	}
	if pf.DeviceID, err = readPCIID(filepath.Join(device, "device")); err != nil {
		return PF{}, false, err
	}
	if pf.VFDeviceID, err = readPCIID(filepath.Join(device, "sriov_vf_device")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return PF{}, false, err
	}
	if pf.Driver, err = linkBase(filepath.Join(device, "driver")); err != nil {
		return PF{}, false, err
	}
	pf.NUMANode = numaNode(device)
	name, representors, err := netdevsOf(device)
	if err != nil {
		return PF{}, false, err
	}
	l, err := links(name)
	if err != nil {
		return PF{}, false, err
	}
	if l != nil {
		pf.Name, pf.IfIndex, pf.AltNames = name, l.Index, l.AltNames
		pf.MAC, pf.PermMAC, pf.MTU = l.HardwareAddr, l.PermHWAddr, l.MTU
		pf.AdminUp = l.RawFlags&unix.IFF_UP != 0
		pf.Carrier = l.RawFlags&unix.IFF_LOWER_UP != 0
		pf.LinkSpeed = h.speed(name)
		if l.EncapType == "infiniband" {
			pf.LinkType = InfiniBand
		}
	}
	if pf.Eswitch, err = h.eswitch(address); err != nil {
		return PF{}, false, err
	}
	pf.VFs, err = h.readVFs(device, representors, links)
	return pf, err == nil, err
}

// readVFs reads the VFs of the PF with the given folder.
func (h *Host) readVFs(device string, representors map[int]string, links lookup) ([]VF, error) {
	entries, err := os.ReadDir(device)
	if err != nil {
		return nil, err
	}
	var vfs []VF
	for _, i := range vfIndexes(entries) {
		vf, err := h.readVF(device, i, links)
		if err != nil {
			if vf.PCIAddress == "" || h.gone(vf.PCIAddress) {
				continue // being destroyed; its event follows
			}
			return nil, fmt.Errorf("read VF %d: %w", i, err)
		}
		vf.Representor = representors[i]
		vfs = append(vfs, vf)
	}
	return vfs, nil
}

// gone tells whether the device is no longer there.
func (h *Host) gone(address string) bool {
	_, err := os.Stat(filepath.Join(h.sysfs, "bus/pci/devices", address))
	return errors.Is(err, fs.ErrNotExist)
}

// readVF reads one VF. On error, too, the result says which it was, if known.
func (h *Host) readVF(pf string, index int, links lookup) (vf VF, err error) {
	vf.Index = index
	if vf.PCIAddress, err = linkBase(filepath.Join(pf, fmt.Sprintf("virtfn%d", index))); err != nil {
		return vf, err
	}
	device, err := h.device(vf.PCIAddress)
	if err != nil {
		return vf, err
	}
	vf.NUMANode = numaNode(device)
	if vf.Vendor, err = readPCIID(filepath.Join(device, "vendor")); err != nil {
		return vf, err
	}
	if vf.DeviceID, err = readPCIID(filepath.Join(device, "device")); err != nil {
		return vf, err
	}
	if vf.Driver, err = linkBase(filepath.Join(device, "driver")); err != nil {
		return vf, err
	}
	if vf.IOMMUGroup, err = linkBase(filepath.Join(device, "iommu_group")); err != nil {
		return vf, err
	}
	name, err := netdevOf(device)
	if err != nil {
		return vf, err
	}
	l, err := links(name)
	if err != nil {
		return vf, err
	}
	if l != nil {
		vf.Name, vf.IfIndex, vf.MTU, vf.MAC = name, l.Index, l.MTU, l.HardwareAddr
	}
	vf.RDMADevice, vf.GUID = rdmaOf(device)
	vf.VDPA, err = h.vdpaOf(vf.PCIAddress)
	return vf, err
}

// numaNode is the device's NUMA node, -1 when there is none or it is not told.
func numaNode(device string) int {
	n, err := readInt(filepath.Join(device, "numa_node"))
	if err != nil || n < 0 {
		return -1
	}
	return n
}

// ReadVFSettings fills Admin of the PF's VFs by one query of the PF's link. Not
// for hot paths: the driver answers for all VFs under the kernel's RTNL lock. A
// PF without a netdev here, or without VFs, is left as it is.
func (h *Host) ReadVFSettings(_ context.Context, pf *PF) error {
	if pf.IfIndex == 0 || len(pf.VFs) == 0 {
		return nil
	}
	settings, err := h.vf.vfSettings(pf.IfIndex)
	if err != nil {
		return &KernelError{Op: "read the VF settings", Object: pf.object(), Err: err}
	}
	for i := range pf.VFs {
		pf.VFs[i].Admin = settings[pf.VFs[i].Index]
	}
	return nil
}

// object names the PF for messages: "0000:3b:00.0 (ens1f0)".
func (p *PF) object() string { return objectName(p.PCIAddress, p.Name) }

func objectName(address, link string) string {
	switch "" {
	case link:
		return address
	case address:
		return link
	}
	return address + " (" + link + ")"
}
