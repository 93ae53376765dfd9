package host

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// readEswitch asks devlink for the mode of the device's eswitch. A kernel,
// driver or device without one is not an error.
func (h *Host) readEswitch(pciAddress string) (EswitchMode, error) {
	dev, err := h.rt.DevLinkGetDeviceByName("pci", pciAddress)
	switch {
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("ask devlink for pci/%s: %w", pciAddress, err)
	}
	switch dev.Attrs.Eswitch.Mode {
	case "legacy":
		return Legacy, nil
	case "switchdev":
		return Switchdev, nil
	}
	return "", nil
}

var eswitchHints = []hint{
	{unix.EOPNOTSUPP, "the driver or the firmware does not have this mode, or not while there are VFs, or while there are none: see the kernel log of the node"},
	{unix.EBUSY, "something still uses the eswitch or a VF: see the kernel log of the node"},
	{unix.EINVAL, "the driver does not take this mode now: see the kernel log of the node"},
	{unix.EPERM, "the driver changes the mode only with VFs, or only without: see the kernel log of the node"},
	{unix.ENODEV, "the driver has no devlink instance for the device"},
	{unix.ENOMEM, "the NIC's firmware has too few resources for representors: ask for fewer VFs"},
}

// SetEswitchMode switches the PF's embedded switch (DEVLINK_CMD_ESWITCH_SET). Most
// drivers make the PF's netdev and its representors anew: no VF may be in use,
// and what was known of the PF's links is outdated afterwards.
func (h *Host) SetEswitchMode(ctx context.Context, pciAddress string, mode EswitchMode) error {
	if !ValidPCIAddress(pciAddress) {
		return fmt.Errorf("%q is not a PCI address like 0000:3b:00.0", pciAddress)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	device := &netlink.DevlinkDevice{BusName: "pci", DeviceName: pciAddress}
	if err := h.rt.DevLinkSetEswitchMode(device, string(mode)); err != nil {
		return &KernelError{Op: "set eswitch mode " + string(mode), Object: pciAddress, Err: err, Hint: hintFor(err, eswitchHints)}
	}
	return nil
}
