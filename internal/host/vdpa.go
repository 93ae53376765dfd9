package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The types of a VF's vDPA device, after the driver that uses it.
const (
	VDPAVirtio = "virtio" // a virtio netdev of the node
	VDPAVhost  = "vhost"  // a vhost device for user space
)

var vdpaDrivers = map[string]string{VDPAVirtio: "virtio_vdpa", VDPAVhost: "vhost_vdpa"}

// vdpaPairs is how many pairs of virtqueues a device gets where the driver lets one
// choose and has as many: hardware offload shares the VF's queues among them.
const vdpaPairs = 32

var vdpaHints = []hint{
	{unix.ENODEV, "the VF's driver makes no vDPA devices: load its vDPA module (mlx5_vdpa), and set eSwitchMode to switchdev"},
	{unix.ENOENT, "the kernel has no vDPA: load module vdpa on the node"},
	{unix.EOPNOTSUPP, "the VF's driver or firmware does not have vDPA"},
	{unix.ENOSPC, "the VF has its vDPA device already, or no resources for one"},
	{unix.EBUSY, "the vDPA device is in use"},
}

func vdpaName(vfAddress string) string { return "vdpa:" + vfAddress }

// vdpaOf is the type of the VF's vDPA device: virtio, vhost, another driver's
// name, or none when it has no driver; empty without a device.
func (h *Host) vdpaOf(vfAddress string) (string, error) {
	device := filepath.Join(h.sysfs, "bus/vdpa/devices", vdpaName(vfAddress))
	if _, err := os.Stat(device); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	driver, err := linkBase(filepath.Join(device, "driver"))
	for kind, d := range vdpaDrivers {
		if d == driver {
			return kind, err
		}
	}
	return cmp.Or(driver, "none"), err
}

// SetVDPA gives the VF one vDPA device of the type, VDPAVirtio or VDPAVhost, or
// with an empty type takes it away. When the device cannot get its driver it is
// removed again.
func (h *Host) SetVDPA(ctx context.Context, vfAddress, kind string) error {
	if !ValidPCIAddress(vfAddress) {
		return fmt.Errorf("%q is not a PCI address like 0000:3b:00.0", vfAddress)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	name := vdpaName(vfAddress)
	if kind == "" {
		err := h.rt.VDPADelDev(name)
		if err == nil || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		return &KernelError{Op: "remove the vDPA device", Object: vfAddress, Err: err, Hint: hintFor(err, vdpaHints)}
	}
	fail := func(err error) error {
		return &KernelError{Op: "make a vDPA device for vdpaType " + kind, Object: vfAddress, Err: pathless(err), Hint: hintFor(err, vdpaHints)}
	}
	driver := vdpaDrivers[kind]
	if driver == "" {
		return fail(fmt.Errorf("type %q is not known: use %s or %s", kind, VDPAVirtio, VDPAVhost))
	}
	pairs, err := h.vdpaPairs(vfAddress)
	if err != nil {
		return fail(err)
	}
	err = h.rt.VDPANewDev(name, "pci", vfAddress, netlink.VDPANewDevParams{MaxVQP: pairs})
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = h.rt.VDPANewDev(name, "pci", vfAddress, netlink.VDPANewDevParams{})
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fail(err)
	}
	if err = h.bindVDPA(ctx, name, driver); err != nil {
		return errors.Join(fail(err), h.rt.VDPADelDev(name))
	}
	return nil
}

// vdpaPairs is how many pairs of virtqueues the VF's vDPA device can have. Drivers
// refuse more than they have with EINVAL (mlx5_vdpa_dev_add).
func (h *Host) vdpaPairs(vfAddress string) (uint16, error) {
	mgmt, err := h.rt.VDPAGetMGMTDevByBusAndName("pci", vfAddress)
	switch {
	case err != nil:
		return 0, err
	case mgmt.MaxVQS < 2: // it does not tell
		return vdpaPairs, nil
	}
	return uint16(min(vdpaPairs, mgmt.MaxVQS/2)), nil
}

// bindVDPA binds a vDPA device, which the kernel may have given to another driver.
func (h *Host) bindVDPA(ctx context.Context, name, driver string) error {
	if err := h.loadDriver(ctx, "vdpa", driver); err != nil {
		return err
	}
	device := filepath.Join(h.sysfs, "bus/vdpa/devices", name)
	have, err := linkBase(filepath.Join(device, "driver"))
	if err != nil || have == driver {
		return err
	}
	if err = writeSysfs(filepath.Join(device, "driver_override"), driver+"\n"); err != nil {
		return err
	}
	if have != "" {
		if err = writeSysfs(filepath.Join(device, "driver/unbind"), name); err != nil {
			return err
		}
	}
	return writeSysfs(filepath.Join(h.sysfs, "bus/vdpa/drivers", driver, "bind"), name)
}
