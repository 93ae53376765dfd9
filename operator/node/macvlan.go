package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/operator/plan"
)

// parents is what the agent knows of MacVLAN parents from one pass to the next. It is
// the worker's alone.
type parents struct {
	links    []host.ParentLink // as last read
	changed  bool              // something may have changed since
	read     time.Time         // when that was
	unread   error             // why links is not all there is
	failures int               // in a row to read links
	budget   budget            // for reading links
	reports  []*parentReport   // of the last pass
	held     map[string]string // pods by slot, as last told
	retries  map[v1.MacvlanParent]*parentRetry
	left     map[string]trouble // VLAN devices that could not be removed, by name
	unmoved  int                // failures in a row to remove those
}

// parentRetry is when a parent that failed is tried again.
type parentRetry struct {
	failures int
	at       time.Time
	trouble  trouble // told until then
}

// parentReport is one MacVLAN parent as it is, and what is in its way.
type parentReport struct {
	want    v1.MacvlanParent
	parent  string // the link that sub-interfaces are made on; empty while there is none
	numa    int
	held    []int // slots that pods hold, sorted
	trouble trouble
}

// name is the parent's, also of one that has yet to be made.
func (r *parentReport) name() string {
	switch {
	case r.parent != "":
		return r.parent
	case r.want.Vlan != 0:
		return plan.VLANName(r.want.Link, r.want.Vlan)
	}
	return r.want.Link
}

func (r *parentReport) ready() bool { return r.parent != "" && r.trouble.message == "" }

// lookAtLinks reads the links if they may have changed. VFs do not wait for that: with
// work to do on them it comes after the work, but for the first time.
func (p *pass) lookAtLinks(ctx context.Context, work bool) {
	start := time.Now()
	first, due := p.parents.read.IsZero(), p.parents.changed || start.Sub(p.parents.read) >= resync
	if p.state == nil || work && !first || !due {
		return
	}
	if wait := p.parents.budget.wait(start); wait > 0 {
		p.within(wait)
		return
	}
	p.readLinks(ctx)
	p.parents.budget.spend(time.Since(start))
}

// lookAtParents brings the MacVLAN parents that the spec asks for into being: all that
// takes is Live, and soon done.
func (p *pass) lookAtParents(ctx context.Context) {
	if p.state == nil {
		return
	}
	p.parents.reports = nil
	for _, want := range p.state.Spec.Macvlans {
		r := &parentReport{want: want, numa: -1}
		if !p.waits(r) {
			p.bringParent(ctx, r)
			p.parentFailed(r)
		}
		if at := slices.IndexFunc(p.parents.links, func(l host.ParentLink) bool { return l.Name == r.parent }); at >= 0 {
			r.numa = p.parents.links[at].NUMANode
		}
		p.parents.reports = append(p.parents.reports, r)
	}
	maps.DeleteFunc(p.parents.retries, func(want v1.MacvlanParent, _ *parentRetry) bool {
		return !slices.Contains(p.state.Spec.Macvlans, want)
	})
	p.readHeld()
}

// waits tells whether the parent failed, has still something to be done, and is not yet
// due to be tried again.
func (p *pass) waits(r *parentReport) bool {
	again := p.parents.retries[r.want]
	if again == nil || !time.Now().Before(again.at) {
		return false
	}
	parent, ops, err := plan.MacvlanOperations(r.want, statusLinks(p.parents.links, nil))
	if err != nil || len(ops) == 0 {
		return false
	}
	r.parent, r.trouble = parent, again.trouble
	return true
}

func (p *pass) readLinks(ctx context.Context) {
	links, err := p.Kernel.Links(ctx)
	if err != nil && ctx.Err() == nil {
		p.Log.Error(err, "Links could not be read")
	}
	p.parents.changed, p.parents.read = err != nil, time.Now()
	if p.parents.unread = err; links != nil || err == nil {
		p.parents.links = links
	}
	if p.parents.failures++; err == nil {
		p.parents.failures = 0
	}
}

// readHeld notes who holds which slots. While nobody can tell, what was told last stands.
func (p *pass) readHeld() {
	if len(p.parents.reports) == 0 {
		return
	}
	if held, err := p.Usage.Held(); err == nil {
		p.parents.held = held
	}
	slots := map[string][]int{} // held, by parent
	for id := range p.parents.held {
		if parent, n, err := host.ParseSlotID(id); err == nil {
			slots[parent] = append(slots[parent], n)
		}
	}
	for _, r := range p.parents.reports {
		r.held = slices.Sorted(slices.Values(slots[r.name()]))
	}
}

// bringParent makes the parent as the spec asks: plan, do, look, until nothing is left
// or something is in the way.
func (p *pass) bringParent(ctx context.Context, r *parentReport) {
	var last []plan.LinkOperation
	for ctx.Err() == nil {
		parent, ops, err := plan.MacvlanOperations(r.want, statusLinks(p.parents.links, nil))
		r.parent = parent
		switch {
		case err != nil:
			r.trouble = trouble{ReasonNoParent, err.Error()} // an event brings us back
			return
		case len(ops) == 0:
			return
		case p.parents.changed: // only what is so at this moment is acted upon
			if p.readLinks(ctx); p.parents.changed {
				r.trouble = trouble{ReasonUnreadable, p.parents.unread.Error()}
				return
			}
			continue
		case slices.Equal(ops, last):
			r.trouble = trouble{ReasonRefused, fmt.Sprintf("%s: the kernel reported success and nothing changed: the driver may not support it, or somebody else sets it back", ops[0])}
			return
		}
		last = ops
		for _, op := range ops {
			if err := p.applyToLink(ctx, op); err != nil {
				r.trouble = trouble{ReasonRefused, err.Error()}
				return
			}
			p.Log.Info("Done", "operation", op.String())
		}
		p.readLinks(ctx)
	}
}

// parentFailed makes a parent that the kernel refused wait before it is tried again.
func (p *pass) parentFailed(r *parentReport) {
	if r.trouble.reason != ReasonRefused {
		delete(p.parents.retries, r.want)
		return
	}
	again := p.parents.retries[r.want]
	if again == nil {
		again = &parentRetry{}
		p.parents.retries[r.want] = again
	}
	again.failures++
	again.at, again.trouble = time.Now().Add(backoff(again.failures)), r.trouble
	p.Log.Info("A MacVLAN parent is not as asked", "parent", r.name(), "why", r.trouble.message, "next try", again.at)
}

// applyToLink does one operation on a link as it was last seen.
func (p *pass) applyToLink(ctx context.Context, op plan.LinkOperation) error {
	at := slices.IndexFunc(p.parents.links, func(l host.ParentLink) bool { return l.Name == op.Link })
	if at < 0 {
		return fmt.Errorf("%s: the link is no longer there", op)
	}
	link := p.parents.links[at].Link()
	switch op.Kind {
	case plan.RaiseLinkMTU:
		return p.Kernel.SetMTU(ctx, link, op.Number)
	case plan.SetLinkUp:
		return p.Kernel.SetLinkUp(ctx, link)
	case plan.AddVLAN:
		return p.Kernel.AddVLAN(ctx, link, op.Value, op.Number)
	case plan.RemoveVLAN:
		return p.Kernel.RemoveVLAN(ctx, link)
	}
	return fmt.Errorf("operation %s is not known", op)
}

// parentMTU is what the MacVLAN parents need of a link's MTU at least: of a parent, of
// what a VLAN device is on, of a bond's or bridge's ports. Lowered below that, the kernel
// would lower the sub-interfaces in the pods with it.
func (a *Agent) parentMTU(link string) int {
	if a.state == nil {
		return 0
	}
	links := a.parents.links
	needs := func(name string) bool {
		for range links { // as deep as VLAN devices can be stacked
			at := slices.IndexFunc(links, func(l host.ParentLink) bool { return l.Name == name || slices.Contains(l.AltNames, name) })
			if at < 0 {
				return false
			}
			if is := links[at].Name; is == link || slices.ContainsFunc(links, func(l host.ParentLink) bool { return l.Name == link && l.Master == is }) {
				return true
			}
			name = links[at].Lower
		}
		return false
	}
	mtu := 0
	for _, want := range a.state.Spec.Macvlans {
		if needs(want.Link) {
			mtu = max(mtu, want.Mtu)
		}
	}
	return mtu
}

// removeVLANs removes the VLAN devices made for policies that are no more. Their slots
// must not be on offer any longer. It tells whether there is news for the status.
//
// Nothing is removed from under a pod: neither while the kubelet says that a slot is
// held, or nothing, nor while the kernel shows that something stands on the device.
func (p *pass) removeVLANs(ctx context.Context) bool {
	if !p.mayGiveUp() || p.parents.unread != nil || p.unsold > 0 {
		return false
	}
	before := p.parents.left
	p.parents.left = map[string]trouble{}
	for _, op := range plan.UnusedVLANs(p.state.Spec.Macvlans, statusLinks(p.parents.links, nil)) {
		if p.mayBeHeld(op.Link) {
			continue
		}
		switch err := p.applyToLink(ctx, op); {
		case errors.Is(err, host.ErrLinkInUse):
			p.Log.V(1).Info("Left for now", "operation", op.String(), "why", err.Error())
		case err != nil && ctx.Err() == nil:
			p.parents.left[op.Link] = trouble{ReasonRefused, fmt.Sprintf("VLAN device %s, which no policy asks for any more: %v", op.Link, err)}
		default:
			p.Log.Info("Done", "operation", op.String())
		}
	}
	if p.parents.unmoved++; len(p.parents.left) == 0 {
		p.parents.unmoved = 0
	}
	return !maps.Equal(before, p.parents.left)
}

// mayBeHeld tells whether a pod has a slot of the parent, as far as anybody knows.
func (p *pass) mayBeHeld(parent string) bool {
	held, err := p.Usage.Held()
	if err != nil {
		return true
	}
	for id := range held {
		if of, _, err := host.ParseSlotID(id); err == nil && of == parent {
			return true
		}
	}
	return false
}

// nextParent is when to look again for a parent's sake.
func (p *pass) nextParent() time.Duration {
	next := resync
	if failures := max(p.parents.failures, p.parents.unmoved); failures > 0 {
		next = backoff(failures)
	}
	for _, again := range p.parents.retries {
		next = min(next, max(time.Until(again.at), 0))
	}
	return next
}

// troubles of the parents, each naming its object.
func (m *parents) troubles() []trouble {
	var all []trouble
	if m.unread != nil {
		all = append(all, trouble{ReasonUnreadable, m.unread.Error()})
	}
	for _, r := range m.reports {
		if r.trouble.message != "" {
			all = append(all, trouble{r.trouble.reason, fmt.Sprintf("MacVLAN parent %s (policy %s): %s", r.name(), r.want.PolicyName, r.trouble.message)})
		}
	}
	for _, link := range slices.Sorted(maps.Keys(m.left)) {
		all = append(all, m.left[link])
	}
	return all
}

// status of the parents that the spec asks for.
func (m *parents) status() []v1.MacvlanParentStatus {
	var all []v1.MacvlanParentStatus
	for _, r := range m.reports {
		all = append(all, v1.MacvlanParentStatus{
			PolicyName: r.want.PolicyName, ResourceName: r.want.ResourceName, Link: r.want.Link, Parent: r.parent,
			Ready: r.ready(), Slots: r.want.Slots, Used: len(r.held), Message: r.trouble.message,
		})
	}
	return all
}

// pools are the slots of the parents, one pool for each resource name.
func (m *parents) pools() []Pool {
	var all []Pool
	for _, r := range m.reports {
		at := slices.IndexFunc(all, func(p Pool) bool { return p.Resource == r.want.ResourceName })
		if at < 0 {
			all = append(all, Pool{Resource: r.want.ResourceName, ExcludeTopology: r.want.ExcludeTopology})
			at = len(all) - 1
		}
		add := func(n int, healthy bool, why string) {
			all[at].Devices = append(all[at].Devices, Device{
				Slot: host.SlotID(r.name(), n), Parent: r.name(), NUMANode: r.numa, Healthy: healthy, Reason: why,
			})
		}
		why := r.trouble.message
		for n := range min(r.want.Slots, host.MaxSlots) {
			add(n, r.ready(), why)
		}
		for _, n := range r.held {
			if n >= r.want.Slots {
				add(n, false, fmt.Sprintf("there are only %d slots now: it goes when its pod does", r.want.Slots))
			}
		}
	}
	return all
}

// statusLinks are the links as the status, and planning, have them, but for those VFs.
func statusLinks(links []host.ParentLink, without map[string]bool) []v1.Link {
	var all []v1.Link
	for _, l := range links {
		if without[l.PCIAddress] {
			continue
		}
		s := v1.Link{
			Name: l.Name, Kind: string(l.Kind), AltNames: l.AltNames, Mac: macText(l.MAC), Mtu: l.MTU, LinkAdminState: "down",
			Master: l.Master, Lower: l.Lower, Vlan: l.VLAN, Managed: l.Managed, PciAddress: l.PCIAddress, Vendor: l.Vendor, DeviceID: l.DeviceID,
		}
		if l.AdminUp {
			s.LinkAdminState = "up"
		}
		all = append(all, s)
	}
	return all
}

// pooled are the VFs that are in a pool: they go to pods whole, and are no parents.
func pooled(reports []*report) map[string]bool {
	vfs := map[string]bool{}
	for _, pool := range pools(reports) {
		for _, d := range pool.Devices {
			vfs[d.PCIAddress] = true
		}
	}
	return vfs
}
