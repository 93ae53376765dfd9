package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/operator/plan"
)

var errTaken = errors.New("a pod holds the VF")

// apply does one operation on the PF as it was seen.
func (p *pass) apply(ctx context.Context, r *report, op plan.Operation) error {
	pf := r.have
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
		case plan.SetEswitchMode:
			return p.Kernel.SetEswitchMode(ctx, pf.PCIAddress, host.EswitchMode(op.Value))
		case plan.SetBridge:
			return p.Switch.SetBridge(ctx, toSwitch(r.bridge.want), r.bridge.adopt)
		case plan.DetachUplink:
			return p.Switch.DetachUplink(ctx, op.Value)
		case plan.RemoveBridge:
			return p.Switch.RemoveBridge(ctx, op.Value)
		}
		return fmt.Errorf("operation %s is not known", op)
	}
	i := slices.IndexFunc(pf.VFs, func(vf host.VF) bool { return vf.PCIAddress == op.PCIAddress })
	if i < 0 {
		return fmt.Errorf("%s: the VF is no longer there", op)
	}
	vf := pf.VFs[i]
	switch op.Kind {
	case plan.SetVFAdminMAC, plan.SetVFMAC, plan.SetVFGUID:
		address, err := net.ParseMAC(op.Value)
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", op, err)
		case op.Kind == plan.SetVFAdminMAC:
			return p.Kernel.SetVFMAC(ctx, pf.Link(), vf.Index, address)
		case op.Kind == plan.SetVFGUID:
			return p.Kernel.SetVFGUID(ctx, pf.Link(), vf.Index, address)
		}
		return p.Kernel.SetMAC(ctx, vf.Link(), address)
	case plan.ResetVFSettings:
		return p.resetSettings(ctx, pf, vf)
	case plan.UnbindVFDriver:
		return p.Kernel.UnbindDriver(ctx, vf.PCIAddress)
	case plan.BindVFDriver:
		return p.Kernel.BindDriver(ctx, vf.PCIAddress, op.Value)
	case plan.SetVFVDPA:
		return p.Kernel.SetVDPA(ctx, vf.PCIAddress, op.Value)
	case plan.RenameVF:
		return p.Kernel.Rename(ctx, vf.Link(), op.Value)
	case plan.SetVFMTU:
		return p.Kernel.SetMTU(ctx, vf.Link(), op.Number)
	}
	return fmt.Errorf("operation %s is not known", op)
}

// drift tells which settings of the VF at its PF are not the baseline, of those
// that the PF's driver can set.
func (a *Agent) drift(pf host.PF, vf host.VF) host.VFAttrs {
	if len(vf.Admin.MAC) == 0 {
		return 0 // they could not be read
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return vf.Admin.Drift() &^ a.unsettable[pf.PCIAddress]
}

// resetSettings sets the VF back to the baseline, and remembers what the driver
// cannot set.
func (p *pass) resetSettings(ctx context.Context, pf host.PF, vf host.VF) error {
	drift := p.drift(pf, vf)
	unsupported, err := p.Kernel.ResetVFSettings(ctx, pf.Link(), vf.Index, vf.Admin, drift)
	if unsupported != 0 {
		p.Log.Info("The driver cannot set VFs to the baseline; they stay as they are", "nic", pf.PCIAddress, "driver", pf.Driver, "settings", vf.Admin.Text(unsupported))
		p.Agent.mu.Lock()
		defer p.Agent.mu.Unlock()
		p.unsettable[pf.PCIAddress] |= unsupported
	}
	return err
}

// guids gives the GUIDs of an InfiniBand PF's VFs, or why one has none: those that
// the administrator has set aside, see plan.ParseGUIDs, or stable ones.
func (a *Agent) guids(pf host.PF) func(index int) (guid, why string) {
	if pf.LinkType != host.InfiniBand {
		return func(int) (string, string) { return "", "" }
	}
	path := filepath.Join(a.UpstreamDir, "infiniband", "guids")
	var aside plan.GUIDs
	file, err := os.ReadFile(path)
	if err == nil {
		aside, err = plan.ParseGUIDs(file)
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return func(int) (string, string) { return "", fmt.Sprintf("%v: mend %s on the node", err, path) }
	}
	return func(index int) (string, string) {
		guid, err := aside.Of(pf.PCIAddress, pf.MAC, index)
		switch {
		case err != nil:
			return "", fmt.Sprintf("%v to %s on the node", err, path)
		case guid == nil:
			guid = plan.StableGUID(a.Node, pf.PermMAC, pf.PCIAddress, index)
		}
		return guid.String(), ""
	}
}

// guidOf is the VF's node GUID: what its PF assigns, or when the PF says that it
// assigns none, what the VF's own device has.
func guidOf(vf host.VF) string {
	return cmp.Or(macText(vf.Admin.NodeGUID), macText(vf.GUID))
}

// system brings the node's own settings to what the spec asks. What keeps it from
// that is told by a report of no NIC.
func (p *pass) system(ctx context.Context) {
	if again := p.retries[""]; again != nil && time.Now().Before(again.at) {
		p.reports = append(p.reports, again.report)
		return
	}
	r := &report{}
	blocked := p.setSystem(ctx, r)
	if r.block(blocked); len(blocked) > 0 || r.trouble.message != "" {
		p.reports = append(p.reports, r)
	}
	if len(blocked) == 0 && r.trouble.message != "" {
		p.failed(r)
	} else {
		delete(p.retries, "")
	}
}

func (p *pass) setSystem(ctx context.Context, r *report) []plan.Blocked {
	var err error
	if p.rdmaMode, err = p.Kernel.RDMAMode(ctx); err != nil {
		r.trouble = trouble{ReasonUnreadable, err.Error()}
		return nil
	}
	if p.state == nil {
		return nil
	}
	have := plan.System{RDMAMode: p.rdmaMode, RDMABusy: time.Since(p.rdmaBusy) < resync}
	ops, blocked := plan.SystemOperations(p.state.Spec.System, have)
	for _, op := range ops {
		switch err := p.Kernel.SetRDMAMode(ctx, op.Value); {
		case errors.Is(err, unix.EBUSY):
			p.rdmaBusy, have.RDMABusy = time.Now(), true
			_, blocked = plan.SystemOperations(p.state.Spec.System, have)
		case err != nil:
			r.trouble = trouble{ReasonRefused, err.Error()}
		default:
			p.rdmaMode = op.Value
			p.Log.Info("Done", "operation", op.String())
		}
	}
	return blocked
}
