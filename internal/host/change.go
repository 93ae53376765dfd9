package host

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// DefaultDriver asks BindDriver for the kernel's own choice.
const DefaultDriver = ""

// Link is a netdev of this namespace. The index decides, never the name: a
// name seen a moment ago may belong to another netdev now.
type Link struct {
	Index      int
	Name       string // for messages
	PCIAddress string // for messages
}

// Link returns the PF's netdev.
func (p *PF) Link() Link { return Link{p.IfIndex, p.Name, p.PCIAddress} }

// Link returns the VF's netdev.
func (v *VF) Link() Link { return Link{v.IfIndex, v.Name, v.PCIAddress} }

func (l Link) device() netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: l.Index, Name: l.Name}}
}

// change does one rtnetlink request on the link.
func (l Link) change(ctx context.Context, op string, hints []hint, do func(netlink.Link) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if l.Index <= 0 {
		return &KernelError{Op: op, Object: objectName(l.PCIAddress, l.Name), Err: unix.ENODEV,
			Hint: "the device has no netdev in the node's network namespace"}
	}
	if err := do(l.device()); err != nil {
		return &KernelError{Op: op, Object: objectName(l.PCIAddress, l.Name), Err: err, Hint: hintFor(err, hints)}
	}
	return nil
}

// SetMTU sets the link's MTU, in bytes.
func (h *Host) SetMTU(ctx context.Context, l Link, mtu int) error {
	return l.change(ctx, fmt.Sprintf("set MTU %d", mtu), mtuHints, func(d netlink.Link) error {
		return h.rt.LinkSetMTU(d, mtu)
	})
}

// SetLinkUp sets the link administratively up.
func (h *Host) SetLinkUp(ctx context.Context, l Link) error {
	return l.change(ctx, "set the link up", nil, h.rt.LinkSetUp)
}

// Rename gives the link another name.
func (h *Host) Rename(ctx context.Context, l Link, name string) error {
	return l.change(ctx, "rename to "+name, renameHints, func(d netlink.Link) error {
		return h.rt.LinkSetName(d, name)
	})
}

// SetVFMAC sets the address that the PF assigns to the VF of the given index
// (IFLA_VF_MAC). A VF that is probed later takes it; one that has a netdev
// already mostly does not, see SetMAC.
func (h *Host) SetVFMAC(ctx context.Context, pf Link, index int, mac net.HardwareAddr) error {
	return pf.change(ctx, fmt.Sprintf("set the MAC of VF %d to %s", index, mac), macHints, func(d netlink.Link) error {
		return h.rt.LinkSetVfHardwareAddr(d, index, mac)
	})
}

// SetMAC sets the own address of a link that nobody uses. Some drivers change it
// only while the link is down, and some VFs take the address that their PF has
// just given them only by a reset, which they do when the link goes down
// (igbvf): for them the link goes up and down, and stays down.
func (h *Host) SetMAC(ctx context.Context, l Link, mac net.HardwareAddr) error {
	return l.change(ctx, fmt.Sprintf("set the MAC to %s", mac), macHints, func(d netlink.Link) error {
		refused := h.rt.LinkSetHardwareAddr(d, mac)
		if !errors.Is(refused, unix.EBUSY) && !errors.Is(refused, unix.EADDRNOTAVAIL) {
			return refused
		}
		if err := cmp.Or(h.rt.LinkSetUp(d), h.rt.LinkSetDown(d)); err != nil {
			return errors.Join(refused, err)
		}
		now, err := h.rt.LinkByIndex(l.Index)
		if err != nil {
			return err
		}
		if bytes.Equal(now.Attrs().HardwareAddr, mac) {
			return nil
		}
		return h.rt.LinkSetHardwareAddr(d, mac)
	})
}

// ResetVFSettings sets the attributes of the VF, which has the settings have, back
// to the baseline, each by itself. It returns those that the driver cannot set,
// which a pod can neither.
func (h *Host) ResetVFSettings(ctx context.Context, pf Link, index int, have VFSettings, attrs VFAttrs) (unsupported VFAttrs, err error) {
	for _, attr := range vfAttrs {
		if attrs&attr.bit == 0 {
			continue
		}
		op := fmt.Sprintf("set %s of VF %d from %s to %s", attr.name, index, attr.value(have), attr.value(Baseline()))
		err := pf.change(ctx, op, vfHints, func(netlink.Link) error {
			return h.vf.setVF(ctx, pf.Index, "", index, Baseline(), attr)
		})
		if errors.Is(err, unix.EOPNOTSUPP) {
			unsupported |= attr.bit
		} else if err != nil {
			return unsupported, err
		}
	}
	return unsupported, nil
}

// SetNumVFs makes the PF have exactly n VFs. The kernel changes the number only
// through 0, so all VFs of the PF are destroyed when there are some and n
// differs; nothing happens when n is there already.
//
// The new VFs have no driver, so that each can get its address first and is
// then probed once, by the driver meant for it: see SetVFMAC and BindDriver.
// They exist when SetNumVFs returns: sriov_numvfs answers after the kernel has
// added them.
func (h *Host) SetNumVFs(ctx context.Context, pciAddress string, n int) error {
	device, err := h.device(pciAddress)
	if err != nil {
		return err
	}
	if err = ctx.Err(); err != nil {
		return err
	}
	op := fmt.Sprintf("create %d VFs", n)
	if n == 0 {
		op = "remove all VFs"
	}
	fail := func(err error) error {
		return &KernelError{Op: op, Object: pciAddress, Err: pathless(err), Hint: hintFor(err, numVFsHints)}
	}
	file := filepath.Join(device, "sriov_numvfs")
	have, err := readInt(file)
	if err != nil {
		return fail(err)
	}
	if have == n {
		return nil
	}
	if have > 0 {
		if err = writeSysfs(file, "0"); err != nil {
			return fail(fmt.Errorf("remove the %d VFs there are: %w", have, pathless(err)))
		}
	}
	if n == 0 {
		return nil
	}
	if err = setAutoprobe(device, false); err != nil {
		return fail(err)
	}
	err = writeSysfs(file, strconv.Itoa(n))
	// Left off, it would keep BindDriver, and people, from binding a driver.
	if restore := setAutoprobe(device, true); err == nil {
		err = restore
	}
	if err != nil {
		return fail(err)
	}
	if have, err = readInt(file); err != nil {
		return fail(err)
	}
	if have != n {
		return fail(fmt.Errorf("the driver made only %d", have))
	}
	return nil
}

// UnbindDriver takes the VF from its driver, if it has one.
func (h *Host) UnbindDriver(ctx context.Context, vfAddress string) error {
	device, err := h.device(vfAddress)
	if err != nil {
		return err
	}
	if err = ctx.Err(); err != nil {
		return err
	}
	err = writeSysfs(filepath.Join(device, "driver/unbind"), vfAddress)
	if err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return &KernelError{Op: "unbind the driver", Object: vfAddress, Err: pathless(err), Hint: hintFor(err, bindHints)}
}

// BindDriver binds a VF to the named driver, or to the one the kernel chooses
// (DefaultDriver), and leaves driver_override so that a later probe chooses the
// same. A VF that has the named driver already is not touched. Drivers that no device
// asks for are loaded, see SystemBus.
func (h *Host) BindDriver(ctx context.Context, vfAddress, driver string) error {
	device, err := h.device(vfAddress)
	if err != nil {
		return err
	}
	if err = ctx.Err(); err != nil {
		return err
	}
	op := "bind driver " + driver
	if driver == DefaultDriver {
		op = "bind the default driver"
	}
	fail := func(err error) error {
		return &KernelError{Op: op, Object: vfAddress, Err: pathless(err), Hint: hintFor(err, bindHints)}
	}
	if filepath.Base(driver) != driver && driver != DefaultDriver {
		return fail(fmt.Errorf("%q is not the name of a driver", driver))
	}
	have, err := linkBase(filepath.Join(device, "driver"))
	if err != nil {
		return fail(err)
	}
	if driver != DefaultDriver && have == driver {
		return nil
	}
	bind := filepath.Join(h.sysfs, "bus/pci/drivers", driver, "bind")
	if driver != DefaultDriver {
		// Looked at first, so that the VF does not leave the driver it has for nothing.
		if err = h.loadDriver(ctx, "pci", driver); err != nil {
			return fail(err)
		}
	}
	// A line end alone clears it (driver_set_override in drivers/base/driver.c).
	if err = writeSysfs(filepath.Join(device, "driver_override"), driver+"\n"); err != nil {
		return fail(err)
	}
	if err = h.UnbindDriver(ctx, vfAddress); err != nil {
		return err
	}
	if driver != DefaultDriver {
		if err = writeSysfs(bind, vfAddress); err != nil {
			return fail(err)
		}
		return nil
	}
	// With autoprobe off, pci_device_can_probe refuses a VF without an override.
	if err = setAutoprobe(filepath.Join(device, "physfn"), true); err != nil {
		return fail(err)
	}
	if err = writeSysfs(filepath.Join(h.sysfs, "bus/pci/drivers_probe"), vfAddress); err != nil {
		return fail(err)
	}
	if have, err = linkBase(filepath.Join(device, "driver")); err != nil {
		return fail(err)
	}
	if have == "" {
		return h.whyUnbound(op, vfAddress, device)
	}
	return nil
}

// whyUnbound tells why the kernel's own choice left the VF without a driver.
// drivers_probe reports success when no driver matched, and when one matched
// and failed; a driver's bind file gives the errno of the failure, and ENODEV
// when the driver is not for the device.
func (h *Host) whyUnbound(op, vfAddress, device string) error {
	drivers, err := os.ReadDir(filepath.Join(h.sysfs, "bus/pci/drivers"))
	if err != nil {
		return &KernelError{Op: op, Object: vfAddress, Err: pathless(err)}
	}
	for _, d := range drivers {
		switch err := writeSysfs(filepath.Join(h.sysfs, "bus/pci/drivers", d.Name(), "bind"), vfAddress); {
		case err == nil:
			return nil // it works now
		case errors.Is(err, unix.ENODEV), errors.Is(err, fs.ErrNotExist):
		default:
			return &KernelError{Op: op, Object: vfAddress, Err: fmt.Errorf("driver %s: %w", d.Name(), pathless(err)),
				Hint: "the driver could not start the VF: see the kernel log of the node"}
		}
	}
	vendor, _ := readPCIID(filepath.Join(device, "vendor"))
	id, _ := readPCIID(filepath.Join(device, "device"))
	return &KernelError{Op: op, Object: vfAddress, Err: errors.New("no driver took the VF"),
		Hint: fmt.Sprintf("load the VF driver for PCI device %s:%s on the node", vendor, id)}
}

// setAutoprobe sets whether the PF's new VFs are probed. Kernels before 4.12
// have no such file and always probe.
func setAutoprobe(pf string, on bool) error {
	value := "0"
	if on {
		value = "1"
	}
	err := writeSysfs(filepath.Join(pf, "sriov_drivers_autoprobe"), value)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// writeSysfs writes one attribute. It never creates a file.
func writeSysfs(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return cmp.Or(err, f.Close())
}

// pathless takes the path out of a file error: messages name the PCI address,
// and the path says it a second time.
func pathless(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}
