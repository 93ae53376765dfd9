package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// RDMADevice returns the name of the RDMA device that a PCI function has in the host's
// network namespace, empty when it has none there.
func (a *Attacher) RDMADevice(pciAddress string) (string, error) {
	entries, err := os.ReadDir(filepath.Join(a.sysfs, "bus/pci/devices", filepath.Base(pciAddress), "infiniband"))
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("find the RDMA device of %s: %w", pciAddress, err)
	}
	return entries[0].Name(), nil
}

// RDMAExclusive tells whether each RDMA device is in one network namespace only, as
// against being seen in all.
func (a *Attacher) RDMAExclusive() (bool, error) {
	mode, err := netlink.RdmaSystemGetNetnsMode()
	if err != nil {
		return false, fmt.Errorf("ask for the RDMA network namespace mode: %w", err)
	}
	return mode == "exclusive", nil
}

// MoveRDMA moves an RDMA device to another namespace, which it can only in mode
// exclusive. nil is the host's namespace. The error wraps ENODEV when it is not in from.
func (a *Attacher) MoveRDMA(from *Netns, name string, to *Netns) error {
	if from == nil {
		from = a.host
	}
	if to == nil {
		to = a.host
	}
	err := from.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_RDMA)
		if err != nil {
			return err
		}
		defer h.Close()
		links, err := h.RdmaLinkList()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(links, func(l *netlink.RdmaLink) bool { return l.Attrs.Name == name })
		if i < 0 {
			return unix.ENODEV
		}
		return h.RdmaLinkSetNsFd(links[i], uint32(to.fd))
	})
	if err != nil {
		return fmt.Errorf("move RDMA device %s: %w", name, err)
	}
	return nil
}
