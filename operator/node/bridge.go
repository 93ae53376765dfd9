package node

import (
	"context"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/ovsdb"
	"github.com/sluice-network/sluice/operator/plan"
)

// bridge is what is known of the Open vSwitch bridge that a PF is the uplink of.
type bridge struct {
	want    *v1.OVSConfigExt // nil when none is asked for
	is      *v1.OVSConfigExt // ours, as last read; nil when there is none
	foreign bool             // there is one of somebody else
	adopt   bool             // there is one that the SR-IOV network operator made
	opened  bool             // ovs-vswitchd has the PF
	failure string           // why it cannot open it
	unknown string           // why it could not be read
	made    bool             // while it is unknown: one was made
	read    bool             // nothing has changed since
}

// bridgeOf is the bridge that the spec wants of the PF, with the name that the PF has now.
func bridgeOf(spec *v1.SriovNetworkNodeStateSpec, pf host.PF) *v1.OVSConfigExt {
	for i := range spec.Bridges.OVS {
		if b := &spec.Bridges.OVS[i]; len(b.Uplinks) == 1 && b.Uplinks[0].PciAddress == pf.PCIAddress {
			b = b.DeepCopy()
			b.Uplinks[0].Name = pf.Name
			return b
		}
	}
	return nil
}

// ready tells whether the PF has the bridge it shall have.
func (b *bridge) ready() bool {
	is := plan.Bridge{Is: b.is}
	return b.want == nil || is.As(b.want) && b.opened
}

// bridges is what the status has of the PF's bridge: of one that was made and cannot be read
// now, its name.
func (r *report) bridges() []v1.OVSConfigExt {
	switch b := &r.bridge; {
	case b.is != nil:
		return []v1.OVSConfigExt{*b.is}
	case b.made:
		return []v1.OVSConfigExt{{Name: plan.BridgeName(r.have.PCIAddress)}}
	}
	return nil
}

// why says why it is not ready.
func (b *bridge) why(pf string) string {
	switch {
	case b.unknown != "":
		return b.unknown
	case b.failure != "":
		return b.trouble(pf).message
	}
	return fmt.Sprintf("waits for bridge %s: ovs-vswitchd has yet to open %s", b.want.Name, pf)
}

// trouble is what Open vSwitch says against the uplink.
func (b *bridge) trouble(pf string) trouble {
	if b.want == nil || b.is == nil || b.failure == "" {
		return trouble{}
	}
	return trouble{ReasonNoUplink, fmt.Sprintf("bridge %s: ovs-vswitchd says of %s: %s: see bridge.ovs of its policy, and ovs-vswitchd's log", b.want.Name, pf, b.failure)}
}

// plan is what is to be done on the PF, seen so.
func (r *report) plan(seen plan.PF) ([]plan.Operation, []plan.Blocked, error) {
	ops, blocked, err := plan.Operations(*r.want, seen)
	if err == nil {
		ops, blocked = plan.WithBridge(r.bridge.want, seen, ops, blocked)
	}
	return ops, blocked, err
}

// same tells whether the failure was of what is wanted now.
func (again *retry) same(r *report) bool {
	var want v1.Interface
	if r.want != nil {
		want = *r.want
	}
	return sameWant(again.want, want) && equality.Semantic.DeepEqual(again.bridge, r.bridge.want)
}

// bridgesChanged notes that bridges may be others. What failed because Open vSwitch did
// not answer is tried at once.
func (a *Agent) bridgesChanged() {
	for _, n := range a.nics {
		n.bridge.read = false
	}
	for _, again := range a.retries {
		if again.report.bridge.unknown != "" {
			again.at = time.Now()
		}
	}
}

// readBridge reads the PF's bridge where one is wanted, or was, unless nothing has changed.
// On other nodes Open vSwitch is not looked for.
func (p *pass) readBridge(ctx context.Context, r *report) {
	n := p.nics[r.have.PCIAddress]
	if was, _ := p.records.get(r.have.PCIAddress); r.bridge.want == nil && !was.Bridge {
		r.bridge, n.bridge = bridge{}, bridge{}
		return
	}
	if p.switched == nil {
		p.switched = p.Switch.Watch(ctx)
	}
	if n.bridge.read {
		return
	}
	p.reread(ctx, r)
	if now := &r.bridge; now.want == nil && now.is == nil && now.unknown == "" {
		if err := p.records.change(r.have.PCIAddress, func(one *pfRecord) { one.Bridge = false }); err != nil {
			r.trouble = trouble{ReasonNoState, err.Error()}
		}
	}
}

// reread reads the PF's bridge. While it cannot be read, it is taken to be what it was.
func (p *pass) reread(ctx context.Context, r *report) {
	was, _ := p.records.get(r.have.PCIAddress)
	if r.bridge.want == nil && !was.Bridge {
		return
	}
	found, err := p.Switch.ReadBridge(ctx, plan.BridgeName(r.have.PCIAddress))
	p.mu.Lock()
	defer p.mu.Unlock()
	now := bridge{want: r.bridge.want, read: true}
	if now.want != nil {
		now.want.Uplinks[0].Name = r.have.Name // it may be another now
	}
	if err != nil {
		now = r.bridge
		now.unknown, now.made, now.read = err.Error(), was.Bridge, false
	} else if found != nil {
		now.opened, now.failure = found.Opened, found.Error
		now.adopt = found.Foreign && p.records.bridgeOfUpstream(found.Name)
		now.foreign = found.Foreign && !now.adopt
		if !found.Foreign {
			now.is = fromSwitch(found.Bridge, r.have.PCIAddress)
		}
	}
	r.bridge, p.nics[r.have.PCIAddress].bridge = now, now
}

// toSwitch is the bridge as Open vSwitch's client has it.
func toSwitch(b *v1.OVSConfigExt) ovsdb.Bridge {
	up := &b.Uplinks[0]
	return ovsdb.Bridge{
		Name: b.Name, DatapathType: b.Bridge.DatapathType, FailMode: b.Bridge.FailMode, ExternalIDs: b.Bridge.ExternalIDs, OtherConfig: b.Bridge.OtherConfig,
		Uplink: ovsdb.Interface{
			Name: up.Name, Type: up.Interface.Type, Options: up.Interface.Options, ExternalIDs: up.Interface.ExternalIDs,
			OtherConfig: up.Interface.OtherConfig, MTURequest: up.Interface.MTURequest,
		},
	}
}

// fromSwitch is the reverse.
func fromSwitch(b ovsdb.Bridge, pciAddress string) *v1.OVSConfigExt {
	is := &v1.OVSConfigExt{Name: b.Name, Bridge: v1.OVSBridgeConfig{DatapathType: b.DatapathType, FailMode: b.FailMode, ExternalIDs: b.ExternalIDs, OtherConfig: b.OtherConfig}}
	if up := b.Uplink; up.Name != "" {
		is.Uplinks = []v1.OVSUplinkConfigExt{{PciAddress: pciAddress, Name: up.Name, Interface: v1.OVSInterfaceConfig{
			Type: up.Type, Options: up.Options, ExternalIDs: up.ExternalIDs, OtherConfig: up.OtherConfig, MTURequest: up.MTURequest,
		}}}
	}
	return is
}
