package host

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
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

// SetEswitchMode switches the PF's embedded switch (DEVLINK_CMD_ESWITCH_SET), and in
// switchdev mode lets the PF take the rules of tc into the NIC. Most drivers make the PF's
// netdev and its representors anew: no VF may be in use, and what was known of the PF's
// links is outdated afterwards.
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
	if mode != Switchdev {
		return nil
	}
	if err := h.offloadFlows(ctx, pciAddress); err != nil {
		back := h.rt.DevLinkSetEswitchMode(device, string(Legacy))
		return errors.Join(&KernelError{Op: "turn on hw-tc-offload", Object: pciAddress, Err: err}, back)
	}
	return nil
}

// offloadFlows turns on the feature hw-tc-offload of the PF's netdev, without which rules
// of tc stay in software: of uplinks it is off by default (mlx5, ice). The kernel leaves it
// off where the driver does not have it. Kernels before 5.6 cannot be asked by netlink.
func (h *Host) offloadFlows(ctx context.Context, pciAddress string) error {
	pf, ok, err := h.ReadPF(ctx, pciAddress)
	if err != nil || !ok || pf.IfIndex == 0 {
		return err
	}
	family, err := h.rt.GenlFamilyGet(unix.ETHTOOL_GENL_NAME)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ask for the ethtool interface: %w", err)
	}
	request := nl.NewNetlinkRequest(int(family.ID), unix.NLM_F_ACK)
	request.AddData(&nl.Genlmsg{Command: unix.ETHTOOL_MSG_FEATURES_SET, Version: unix.ETHTOOL_GENL_VERSION})
	header := nl.NewRtAttr(unix.ETHTOOL_A_FEATURES_HEADER|unix.NLA_F_NESTED, nil)
	header.AddRtAttr(unix.ETHTOOL_A_HEADER_DEV_INDEX, nl.Uint32Attr(uint32(pf.IfIndex)))
	header.AddRtAttr(unix.ETHTOOL_A_HEADER_FLAGS, nl.Uint32Attr(unix.ETHTOOL_FLAG_OMIT_REPLY))
	wanted := nl.NewRtAttr(unix.ETHTOOL_A_FEATURES_WANTED|unix.NLA_F_NESTED, nil)
	bit := wanted.AddRtAttr(unix.ETHTOOL_A_BITSET_BITS|unix.NLA_F_NESTED, nil).AddRtAttr(unix.ETHTOOL_A_BITSET_BITS_BIT|unix.NLA_F_NESTED, nil)
	bit.AddRtAttr(unix.ETHTOOL_A_BITSET_BIT_NAME, nl.ZeroTerminated("hw-tc-offload"))
	bit.AddRtAttr(unix.ETHTOOL_A_BITSET_BIT_VALUE, nil)
	request.AddData(header)
	request.AddData(wanted)
	_, err = request.Execute(unix.NETLINK_GENERIC, 0)
	return err
}
