package node

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"github.com/sluice-network/sluice/internal/host"
)

// tampered notes what somebody else changed of VFs that pods hold, where the
// agent does not put it right: that would be one more change under the pod.
func (p *pass) tampered(ctx context.Context, r *report) error {
	n := p.nics[r.have.PCIAddress]
	now := p.differing(r.have)
	if !maps.Equal(now, n.drift) && !p.fresh[r.have.PCIAddress] {
		// A pod that was just attached differs from settings read before it was: its
		// event is on the way.
		n.suspect = true
		if err := p.readSettings(ctx, r); err != nil {
			return err
		}
		if now = p.differing(r.have); n.suspect {
			now = n.drift // it is not their turn to be read
		}
	}
	before := n.drift
	n.drift = now
	r.drift = map[int]trouble{}
	for _, vf := range r.have.VFs {
		what, was := now[vf.PCIAddress], before[vf.PCIAddress]
		if what != "" {
			pod, _ := p.Usage.Holder(vf.PCIAddress)
			r.drift[vf.Index] = trouble{ReasonDrifted, fmt.Sprintf(
				"somebody else changed it while pod %s holds it: %s; set it back, or delete the pod: it is put right when the pod gives it back", pod, what)}
		}
		if p.Tell == nil || what == was {
			continue
		}
		name := fmt.Sprintf("VF %d of %s (%s)", vf.Index, r.have.Name, vf.PCIAddress)
		if what != "" {
			p.Tell(vf.PCIAddress, true, ReasonDrifted, fmt.Sprintf("somebody else changed %s: %s; set it back, or delete the pod", name, what))
		} else { // it concerns nobody when it is no pod's any more
			p.Tell(vf.PCIAddress, false, "AsAttached", name+" is as it was attached again")
		}
	}
	return nil
}

// differing tells, by PCI address, how attached VFs differ from what their pods
// were given.
func (p *pass) differing(pf host.PF) map[string]string {
	all := map[string]string{}
	for _, vf := range pf.VFs {
		given, attached := p.Attached(vf.PCIAddress)
		if given.Trust {
			given.MAC = nil // the pod's own to change, as a bond does that has one MAC for all its links
		}
		switch {
		case !attached:
		case vf.Driver == "":
			all[vf.PCIAddress] = "it was unbound from its driver"
		case len(vf.Admin.MAC) > 0: // else they could not be read
			if diff := host.DiffVFSettings(vf.Admin, given); len(diff) > 0 {
				all[vf.PCIAddress] = strings.Join(diff, ", ")
			}
		}
	}
	return all
}
