package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
)

// pass is one round of looking and working.
type pass struct {
	*Agent
	unreadable error
	looked     map[string]bool // PFs that were read in this pass
	fresh      map[string]bool // PFs whose VF settings were, too
	soon       time.Duration   // the next pass is due by then; 0 when nothing waits for one
	mu         sync.Mutex      // guards the reports while PFs are worked on
	reports    []*report
}

// collect makes a report of each NIC.
func (p *pass) collect() {
	p.unread++
	if p.unreadable == nil {
		p.unread = 0
	} else {
		p.Log.Error(p.unreadable, "NICs could not be read")
	}
	for _, address := range slices.Sorted(maps.Keys(p.nics)) {
		n := p.nics[address]
		p.reports = append(p.reports, &report{have: n.pf, bridge: n.bridge, network: p.networks.network(n.pf), stale: n.stale, carries: carriersOf(n.pf, p.path).vfs, vfTrouble: map[int]trouble{}, touched: map[string]bool{}})
	}
}

// assign gives each PF what the spec wants of it, and adds a report for each
// interface of the spec that the node has not.
func (p *pass) assign() {
	if p.state == nil {
		return
	}
	for _, r := range p.reports {
		r.bridge.want = nil
	}
	for i := range p.state.Spec.Interfaces {
		want := &p.state.Spec.Interfaces[i]
		at := slices.IndexFunc(p.reports, func(r *report) bool { return r.have.PCIAddress == want.PciAddress })
		if at >= 0 {
			p.reports[at].want, p.reports[at].asked = want, true
			p.reports[at].bridge.want = bridgeOf(&p.state.Spec, p.reports[at].have)
			continue
		}
		p.reports = append(p.reports, &report{want: want, asked: true, trouble: trouble{ReasonNotFound,
			fmt.Sprintf("interface %s (%s): this node has no such SR-IOV NIC now: check the card, its firmware's SR-IOV setting and its BIOS setting", want.PciAddress, want.Name)}})
	}
}

// examine reads the rest of the PF and tells whether there is work to do on it.
func (p *pass) examine(ctx context.Context, r *report) bool {
	switch {
	case r.have.PCIAddress == "":
		return false
	case r.stale:
		p.view(r)
		return false
	}
	err := p.readSettings(ctx, r)
	if err == nil {
		err = p.tampered(ctx, r)
	}
	p.readBridge(ctx, r)
	seen := p.view(r)
	if err != nil {
		return p.inTheWay(r, ReasonUnreadable, err)
	}
	ours := plan.Ours(seen) || seen.Original != nil
	if r.want == nil && p.mayGiveUp() && ours {
		// No policy asks for a PF that we changed: it goes back to what it was.
		r.want = &v1.Interface{PciAddress: r.have.PCIAddress}
	}
	if r.want == nil {
		if ours {
			p.learn(r)
		}
		delete(p.retries, r.have.PCIAddress)
		return false
	}
	if err := p.records.want(r.have, *r.want, plan.Ours(seen) && !seen.TakenOver); err != nil {
		return p.inTheWay(r, ReasonNoState, err)
	}
	return p.propose(ctx, r, seen)
}

// inTheWay is the end of a look at a PF that must be tried again.
func (p *pass) inTheWay(r *report, reason string, err error) bool {
	r.trouble = trouble{reason, err.Error()}
	p.failed(r)
	return false
}

// propose plans, and tells whether there is work to do now.
func (p *pass) propose(ctx context.Context, r *report, seen plan.PF) bool {
	address := r.have.PCIAddress
	again := p.retries[address]
	early := again != nil && again.same(r) && time.Now().Before(again.at)
	ops, blocked, err := r.plan(seen)
	if len(ops) > 0 && !early && !p.fresh[address] {
		// Only what is so at this moment is acted upon.
		if readErr := p.readNow(ctx, r); readErr != nil {
			return p.inTheWay(r, ReasonUnreadable, readErr)
		}
		ops, blocked, err = r.plan(p.view(r))
	}
	p.learn(r)
	if err != nil {
		r.trouble = trouble{ReasonInvalidSpec, err.Error()}
		delete(p.retries, address)
		return false
	}
	if early && (len(ops) > 0 || !r.asked) {
		// Its own failure caused events; that is no reason to hurry.
		r.block(blocked)
		r.trouble, r.vfTrouble = again.report.trouble, again.report.vfTrouble
		return false
	}
	if ops = p.guard(r, ops); len(ops) > 0 {
		r.touch(ops)
		return true
	}
	guarded := r.failed()
	if guarded {
		r.block(blocked)
	} else {
		p.settle(ctx, r, blocked)
	}
	if !guarded && !r.asked && r.failed() {
		p.failed(r)
	} else {
		delete(p.retries, address)
	}
	return false
}

// settle ends the work on a PF of which nothing is left to do. One that no
// policy asks for has no VFs then, and its MTU and mode are what they were: what
// somebody else had made comes back, and it is forgotten.
func (p *pass) settle(ctx context.Context, r *report, blocked []plan.Blocked) {
	p.mu.Lock()
	r.block(blocked)
	p.mu.Unlock()
	address := r.have.PCIAddress
	was, ok := p.records.get(address)
	if r.asked || len(blocked) > 0 || !ok {
		return
	}
	if was.NumVFs != r.have.NumVFs || was.AutoprobeNo != r.have.AutoprobeOff {
		if err := p.Kernel.RestoreVFs(ctx, address, was.NumVFs, !was.AutoprobeNo); err != nil {
			p.note(r, -1, trouble{ReasonRefused, err.Error()})
			return
		}
	}
	if err := p.records.end(address); err != nil {
		p.note(r, -1, trouble{ReasonNoState, err.Error()})
	}
}

// mayGiveUp tells whether a PF that the spec does not name may be emptied. The
// spec of a new object is empty until the operator has rendered it, which needs
// our inventory: that asks for nothing yet.
func (p *pass) mayGiveUp() bool {
	return p.state != nil && p.state.Generation > 1 || p.leaving()
}

// block notes the changes that must wait, and those that cannot be.
func (r *report) block(blocked []plan.Blocked) {
	r.blocked = nil
	for _, b := range blocked {
		switch t := (trouble{ReasonUnsupported, b.String()}); {
		case b.Operation.Cost != plan.Refused:
			r.blocked = append(r.blocked, b)
		case b.Operation.VF < 0:
			r.trouble = t
		case r.vfTrouble[b.Operation.VF].message == "":
			r.vfTrouble[b.Operation.VF] = t
		}
	}
}

// touch notes the VFs that the operations change.
func (r *report) touch(ops []plan.Operation) {
	r.touched = map[string]bool{}
	for _, op := range ops {
		for _, vf := range r.have.VFs {
			if op.TouchesVF(vf.Index) {
				r.touched[vf.PCIAddress] = true
			}
		}
	}
}

// do works on the PFs side by side and tells of each when it is done.
func (p *pass) do(ctx context.Context, work []*report) {
	done := make(chan *report)
	go func() {
		defer close(done)
		var group errgroup.Group
		group.SetLimit(pfsAtOnce)
		for _, r := range work {
			group.Go(func() error {
				p.bring(ctx, r)
				done <- r
				return nil
			})
		}
		_ = group.Wait()
	}()
	left := len(work)
	for r := range done {
		p.mu.Lock()
		r.working, r.touched = false, map[string]bool{}
		if r.failed() {
			p.failed(r)
		} else {
			delete(p.retries, r.have.PCIAddress)
		}
		p.nics[r.have.PCIAddress].pf = r.have
		p.nics[r.have.PCIAddress].suspect = r.failed()
		p.learn(r)
		p.mu.Unlock()
		if left--; left > 0 && ctx.Err() == nil {
			p.publish(ctx)
		}
	}
}

// failed makes the PF wait before it is tried again.
func (p *pass) failed(r *report) {
	again := p.retries[r.have.PCIAddress]
	var want v1.Interface
	if r.want != nil {
		want = *r.want
	}
	if again == nil || !again.same(r) {
		again = &retry{want: want, bridge: r.bridge.want}
		p.retries[r.have.PCIAddress] = again
	}
	again.failures++
	again.at = time.Now().Add(backoff(again.failures))
	again.report = r
	var why []string
	for _, t := range r.troubles() {
		why = append(why, t.message)
	}
	p.Log.Info("A NIC is not as asked", "nic", r.have.PCIAddress, "why", why, "next try", again.at)
}

// bring turns one PF into what the spec asks: plan, do, look, until nothing is
// left or something is in the way.
func (p *pass) bring(ctx context.Context, r *report) {
	failed := map[int]bool{}
	var last []plan.Operation
	for ctx.Err() == nil {
		p.mu.Lock()
		ops, blocked, err := r.plan(p.view(r))
		ops = p.guard(r, ops)
		p.mu.Unlock()
		ops = slices.DeleteFunc(ops, func(op plan.Operation) bool { return failed[op.VF] })
		stuck := len(ops) > 0 && slices.Equal(ops, last)
		switch {
		case err != nil:
			p.note(r, -1, trouble{ReasonInvalidSpec, err.Error()})
			return
		case stuck:
			for _, op := range ops {
				p.note(r, op.VF, trouble{ReasonRefused, fmt.Sprintf("%s: the kernel reported success and nothing changed: the driver may not support it, or somebody else sets it back", op)})
			}
			return
		case len(ops) == 0:
			p.settle(ctx, r, blocked)
			return
		}
		last = ops
		if err = p.withdraw(ctx, r, ops); err != nil {
			p.note(r, -1, trouble{ReasonUnreadable, err.Error()})
			return
		}
		whole := true // no operation on the PF itself failed
		for _, op := range ops {
			if failed[op.VF] || !whole {
				continue
			}
			if err = p.records.before(r.have.PCIAddress, op); err != nil {
				p.note(r, -1, trouble{ReasonNoState, err.Error()})
				return
			}
			err = p.lifted(ctx, r, op, func() error { return p.apply(ctx, r, op) })
			var guarded *guardError
			switch {
			case errors.As(err, &guarded):
				p.note(r, -1, guarded.trouble)
				whole = false
			case errors.Is(err, errTaken):
				// A pod was faster than the withdrawal; the next plan says so.
			case err != nil && op.VF < 0:
				p.note(r, -1, trouble{ReasonRefused, err.Error()})
				whole = false
			case err != nil:
				p.note(r, op.VF, trouble{ReasonRefused, err.Error()})
				failed[op.VF] = true
			default:
				p.Log.Info("Done", "operation", op.String())
			}
		}
		if !p.again(ctx, r) {
			return
		}
		if !whole {
			if slices.ContainsFunc(ops, func(op plan.Operation) bool { return op.Kind == plan.SetEswitchMode }) {
				p.rebind(ctx, r)
			}
			return
		}
	}
}

// again looks at the PF after it was worked on.
func (p *pass) again(ctx context.Context, r *report) bool {
	now, err := p.observe(ctx, r.have.PCIAddress)
	if err != nil {
		p.note(r, -1, trouble{ReasonUnreadable, err.Error()})
		return false
	}
	p.mu.Lock()
	r.have = now
	p.mu.Unlock()
	p.reread(ctx, r)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.view(r)
	return true
}

// rebind gives the VFs that left their driver for another mode of the eswitch, which
// the PF has not got, a driver again, as the spec asks for them but for the mode.
func (p *pass) rebind(ctx context.Context, r *report) {
	stays := *r.want
	stays.EswitchMode = string(r.have.Eswitch)
	p.mu.Lock()
	ops, _, _ := plan.Operations(stays, p.view(r)) // what is wrong with the spec was told
	p.mu.Unlock()
	failed := map[int]bool{}
	for _, op := range ops {
		if op.VF < 0 || failed[op.VF] {
			continue
		}
		if err := p.apply(ctx, r, op); err != nil && !errors.Is(err, errTaken) {
			p.note(r, op.VF, trouble{ReasonRefused, err.Error()})
			failed[op.VF] = true
		}
	}
	p.again(ctx, r)
}

// note keeps the first trouble of the VF, or with -1 of the PF.
func (p *pass) note(r *report, vf int, t trouble) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case vf < 0 && r.trouble.message == "":
		r.trouble = t
	case vf >= 0 && r.vfTrouble[vf].message == "":
		r.vfTrouble[vf] = t
	}
}

// withdraw takes the VFs that the operations change away from new pods.
func (p *pass) withdraw(ctx context.Context, r *report, ops []plan.Operation) error {
	p.offers.Lock()
	defer p.offers.Unlock()
	p.mu.Lock()
	r.touch(ops)
	var addresses []string
	for address := range r.touched {
		if p.offered[address] {
			addresses = append(addresses, address)
		}
	}
	p.mu.Unlock()
	if len(addresses) == 0 {
		return nil
	}
	slices.Sort(addresses)
	if err := p.Advertiser.Withdraw(ctx, addresses); err != nil {
		return fmt.Errorf("withdraw %d VFs from the kubelet before they change: %w", len(addresses), err)
	}
	for _, address := range addresses {
		delete(p.offered, address)
	}
	return nil
}

// publish advertises the pools and writes the status, as things are now.
func (p *pass) publish(ctx context.Context) {
	if p.state == nil {
		return // nothing is known of what is wanted
	}
	p.advertise(ctx)
	p.mu.Lock()
	now := metav1.NewTime(time.Now().Truncate(time.Second))
	s := status(p.reports, &p.parents, p.unreadable, p.state.Generation, p.conditions, now)
	p.mu.Unlock()
	s.System.RdmaMode, s.Pools = p.rdmaMode, p.Advertiser.Pools()
	for _, c := range p.Conditions() {
		c.ObservedGeneration, c.LastTransitionTime = s.ObservedGeneration, now
		meta.SetStatusCondition(&s.Conditions, c)
	}
	p.leave(&s)
	p.tell(s)
}

func (p *pass) advertise(ctx context.Context) {
	p.offers.Lock()
	defer p.offers.Unlock()
	p.mu.Lock()
	all := pools(p.reports)
	if p.Others != nil {
		all = append(all, p.Others(candidates(p.reports, all))...)
	}
	all = append(all, p.parents.pools()...)
	p.mu.Unlock()
	// Also when it fails: a part may have reached the kubelet. A device that is
	// no longer healthy counts until it is withdrawn, which waits for the kubelet.
	for _, pool := range all {
		for _, d := range pool.Devices {
			if d.Healthy && d.Slot == "" {
				p.offered[d.PCIAddress] = true
			}
		}
	}
	if err := p.Advertiser.Advertise(ctx, all); err != nil {
		if ctx.Err() == nil {
			p.unsold++
			p.Log.Error(err, "Not all pools could be advertised; it is tried again")
		}
		return
	}
	p.unsold = 0
}

// next is when to look again without being woken.
func (p *pass) next() time.Duration {
	next := p.nextParent()
	if failures := max(p.unsold, p.unread); failures > 0 {
		next = min(next, backoff(failures))
	}
	if p.soon > 0 {
		next = min(next, p.soon)
	}
	if slices.ContainsFunc(p.reports, func(r *report) bool { return r.bridge.unknown != "" }) {
		next = min(next, lastRetry) // an event tells when Open vSwitch comes, not when it is merely slow
	}
	for _, again := range p.retries {
		wait := time.Until(again.at)
		if wait <= 0 {
			wait = firstRetry // it was not due when looked at, or could not be
		}
		next = min(next, wait)
	}
	return next
}
