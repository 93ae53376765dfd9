package host

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var rdmaHints = []hint{
	{unix.EBUSY, "the kernel changes it only while there is no network namespace but the first, so before the first pod starts: boot with ib_core.netns_mode=0 for exclusive or 1 for shared"},
	{unix.EPERM, "the agent lacks CAP_NET_ADMIN"},
	{unix.EINVAL, "this kernel's RDMA subsystem has no network namespace mode"},
}

// RDMAMode is how the RDMA subsystem treats network namespaces: shared or
// exclusive; empty when the kernel has no RDMA.
func (h *Host) RDMAMode(ctx context.Context) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	mode, err := netlink.RdmaSystemGetNetnsMode()
	switch {
	case err == nil:
		return mode, nil
	// Without ib_core there is no such netlink family; before Linux 5.2 no such request.
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ECONNREFUSED):
		return "", nil
	}
	return "", fmt.Errorf("ask for the RDMA network namespace mode: %w", err)
}

// SetRDMAMode sets it. The kernel answers EBUSY while any other network
// namespace exists (rdma_compatdev_set in drivers/infiniband/core/device.c).
func (h *Host) SetRDMAMode(ctx context.Context, mode string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := netlink.RdmaSystemSetNetnsMode(mode); err != nil {
		return &KernelError{Op: "set RDMA network namespace mode " + mode, Object: "the node", Err: err, Hint: hintFor(err, rdmaHints)}
	}
	return nil
}
