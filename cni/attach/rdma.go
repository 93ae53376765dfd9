package attach

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/internal/host"
)

// rdmaDevice returns the RDMA device that has to go to the pod with the VF: none when
// the network does not ask for it, or when all namespaces see all of them.
func (a vfs) rdmaDevice(cfg *Config) (string, error) {
	if !cfg.RDMA {
		return "", nil
	}
	name, err := a.Kernel.RDMADevice(cfg.DeviceID)
	if err != nil {
		return "", refusal(cfg, CodeKernel, "%w", err)
	}
	if name == "" {
		return "", refusal(cfg, CodeUnusable, "rdma true: the VF has no RDMA device in the host's network namespace: use a pool with isRdma, or remove rdma")
	}
	exclusive, err := a.Kernel.RDMAExclusive()
	if err != nil {
		return "", refusal(cfg, CodeKernel, "%w", err)
	}
	if !exclusive {
		return "", nil
	}
	return name, nil
}

// bringRDMAHome makes sure that the record's RDMA device is in the host's namespace.
// The kernel gives it back by itself when the pod's ends.
func (a vfs) bringRDMAHome(ctx context.Context, r Record, ns *host.Netns) error {
	if r.RDMA == "" {
		return nil
	}
	a.step("del: bring RDMA device home")
	pods, done := a.namespaces(r, ns)
	defer done()
	ctx, cancel := context.WithTimeout(ctx, homeTimeout)
	defer cancel()
	for {
		if name, err := a.Kernel.RDMADevice(r.Device); err != nil || name != "" {
			return err
		}
		if _, err := a.Kernel.VF(r.Device); errors.Is(err, host.ErrNoVF) {
			return nil
		} else if err != nil {
			return err
		}
		found := false
		for _, pod := range pods {
			switch err := a.Kernel.MoveRDMA(pod, r.RDMA, nil); {
			case err == nil:
				found = true
			case !errors.Is(err, unix.ENODEV):
				return err
			}
		}
		if found {
			continue
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("RDMA device %s is neither in the host's network namespace nor in the pod's (%s): %w", r.RDMA, r.NetnsPath, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
