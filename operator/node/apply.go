package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/operator/plan"
)

var errTaken = errors.New("a pod holds the VF")

// apply does one operation on the PF as it was seen.
func (p *pass) apply(ctx context.Context, pf host.PF, op plan.Operation) error {
	// Asked again at the last moment: the plan may be older than a pod's claim.
	for _, vf := range pf.VFs {
		if op.TouchesVF(vf.Index) {
			if _, held := p.Usage.Holder(vf.PCIAddress); held {
				return errTaken
			}
		}
	}
	if op.VF < 0 {
		switch op.Kind {
		case plan.SetPFMTU:
			return p.Kernel.SetMTU(ctx, pf.Link(), op.Number)
		case plan.SetPFUp:
			return p.Kernel.SetLinkUp(ctx, pf.Link())
		case plan.SetNumVFs:
			p.forget(pf.VFs)
			return p.Kernel.SetNumVFs(ctx, pf.PCIAddress, op.Number)
		}
		return fmt.Errorf("operation %s is not known", op)
	}
	i := slices.IndexFunc(pf.VFs, func(vf host.VF) bool { return vf.PCIAddress == op.PCIAddress })
	if i < 0 {
		return fmt.Errorf("%s: the VF is no longer there", op)
	}
	vf := pf.VFs[i]
	switch op.Kind {
	case plan.SetVFAdminMAC, plan.SetVFMAC:
		mac, err := net.ParseMAC(op.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
		if op.Kind == plan.SetVFAdminMAC {
			return p.Kernel.SetVFMAC(ctx, pf.Link(), vf.Index, mac)
		}
		return p.Kernel.SetMAC(ctx, vf.Link(), mac)
	case plan.BindVFDriver:
		return p.Kernel.BindDriver(ctx, vf.PCIAddress, op.Value)
	case plan.RenameVF:
		return p.Kernel.Rename(ctx, vf.Link(), op.Value)
	case plan.SetVFMTU:
		return p.Kernel.SetMTU(ctx, vf.Link(), op.Number)
	}
	return fmt.Errorf("operation %s is not known", op)
}
