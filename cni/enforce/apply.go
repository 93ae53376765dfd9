package enforce

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/util/workqueue"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/enforce/nft"
	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// work does what is in the queue, again where it fails, until the queue ends.
func work[T comparable](ctx context.Context, queue workqueue.TypedRateLimitingInterface[T], do func(context.Context, T) error) {
	for {
		item, end := queue.Get()
		if end {
			return
		}
		if err := do(ctx, item); err != nil {
			queue.AddRateLimited(item)
		} else {
			queue.Forget(item)
		}
		queue.Done(item)
	}
}

// follow brings an interface to what policy says now.
func (e *Enforcer) follow(_ context.Context, key attach.Key) error {
	e.mu.Lock()
	f := e.faces[key]
	if f == nil || !f.ready || !e.synced {
		e.mu.Unlock()
		return nil
	}
	e.resolve(f)
	i, known := f.Interface, e.stateOf(f) != [2]*policy.State{}
	e.mu.Unlock()
	if !known {
		return nil // the pod is gone, and what is in force stays until the interface is
	}
	ns, err := e.OpenNetns(i.NetnsPath)
	if err == nil && ns.ID != i.Netns {
		ns.Close()
		err = fmt.Errorf("%s is another namespace's path by now", i.NetnsPath)
	}
	if err != nil {
		return nil //nolint:nilerr // the attachment is ended by whoever sees that the namespace is gone
	}
	defer ns.Close()
	err = e.apply(f, ns)
	if err != nil {
		e.Log.Error(err, "Cannot enforce policy; it is tried again", "pod", i.Pod, "interface", i.IfName)
	}
	return err
}

// apply puts in force on an interface what policy says now.
func (e *Enforcer) apply(f *face, ns *host.Netns) error {
	f.work.Lock()
	defer f.work.Unlock()
	e.mu.Lock()
	states, i, since, before := e.stateOf(f), f.Interface, f.changed, f.status
	cut := e.cut[i.Definition]
	f.changed = time.Time{}
	gone := e.faces[f.Key] != f || !f.ready
	e.mu.Unlock()
	if gone || f.applied == states {
		return nil
	}
	f.applied = [2]*policy.State{}
	if f.rules && !slices.Equal(before.policies(), policies(states)) {
		e.count(f, i) // for those that were in force
	}
	worked := f.rules || f.cut || isolated(states) || held(states, i)
	status, err := e.force(f, i, ns, states, cut, before)
	if err == nil {
		f.applied = states
	}
	e.mu.Lock()
	first := !f.told
	f.status, f.told = status, true
	if err != nil && f.changed.IsZero() {
		f.changed = since // still waits
	}
	shown, id := e.faces[f.Key] == f, f.id
	e.mu.Unlock()
	if worked {
		e.metrics.applied(err, since)
	}
	if shown && (first || !status.equal(before)) {
		e.tell(id, before, status)
		e.pods.Add(i.Pod)
		if len(before.problems())+len(status.problems()) > 0 {
			e.changed()
		}
	}
	if err != nil {
		return fmt.Errorf("enforce %s: %w", cmp.Or(strings.Join(policies(states), ", "), "its own addresses only"), err)
	}
	return nil
}

// force puts the states in force on an interface, in the way that it can be done, and says
// what came of it. f.work is held.
func (e *Enforcer) force(f *face, i attach.Interface, ns *host.Netns, states [2]*policy.State, cut bool, before InterfaceStatus) (status InterfaceStatus, err error) {
	f.cut = f.cut || f.loaded && i.Bypass != "" // an earlier agent may have
	status = InterfaceStatus{Network: i.Definition, Ingress: direction(states[policy.Ingress]), Egress: direction(states[policy.Egress])}
	holds := held(states, i)
	if s := states[policy.Egress]; s != nil && s.Held && (!holds || isolated(states)) {
		status.Egress = nil // nothing beside what is told of the other direction
	}
	switch {
	case !isolated(states) && !holds:
		if err = e.open(f, i, ns); err != nil {
			status.Ingress, status.Egress = before.Ingress, before.Egress
		}
	case i.Bypass != "":
		f.cut = true
		engine, problem := EngineLink, "nothing passes either way: the VF's link is taken, because nobody can filter it: "+i.Bypass
		if err = e.Engine.Cut(i, true); err != nil {
			engine, problem = EngineNone, fmt.Sprintf("not enforced, because nobody can filter it: %s; and the VF's link cannot be taken: %v", i.Bypass, err)
		}
		status.each(func(d *DirectionStatus) { d.Engine, d.Problem = engine, problem })
	default:
		verdicts := [2]*policy.Verdicts{{}, {}}
		for d, s := range states {
			if s != nil {
				verdicts[d] = s.Verdicts
			}
		}
		err = e.put(f, i, ns, verdicts, cut, &status, before)
	}
	return status, err
}

// open takes back whatever keeps packets from the interface.
func (e *Enforcer) open(f *face, i attach.Interface, ns *host.Netns) error {
	if f.rules {
		if err := e.Engine.Remove(i, ns); err != nil {
			return err
		}
		f.rules, f.counted = false, nft.Counted{}
	}
	if f.cut {
		if err := e.Engine.Cut(i, false); err != nil {
			return err
		}
		f.cut = false
	}
	f.loaded = false // nothing is left of an earlier agent's
	return nil
}

// put makes a new generation of the interface's rules and says in status what came of it.
func (e *Enforcer) put(f *face, i attach.Interface, ns *host.Netns, verdicts [2]*policy.Verdicts, cut bool, status *InterfaceStatus, before InterfaceStatus) error {
	had, kept := f.rules, before.isolated()
	f.rules = true
	var err error
	if f.loaded { // its generations go on from the earlier agent's
		before.Generation, had, err = e.Engine.Generation(i, ns)
		kept = e.toldIsolated(i)
		f.loaded = err != nil
	}
	if err == nil {
		err = e.Engine.Apply(i, ns, verdicts, cut, before.Generation+1)
	}
	if err == nil {
		status.Generation = before.Generation + 1
		status.each(func(d *DirectionStatus) { d.Engine = engineOf(i) })
		return nil
	}
	status.Generation = before.Generation
	problem, engine := fmt.Sprintf("closed, because the rules cannot be made: %v", err), engineOf(i)
	isolates := verdicts[policy.Ingress].Isolated || verdicts[policy.Egress].Isolated
	switch {
	case had && (kept || !isolates):
		problem = fmt.Sprintf("what was in force before stays so, because the rules cannot be made: %v", err)
	case !isolates:
		problem, engine = fmt.Sprintf("it may send from others' addresses, because the rules cannot be made: %v", err), EngineNone
		f.rules = e.Engine.Remove(i, ns) != nil
	default:
		if closed := e.Engine.DenyAll(i, ns); closed != nil {
			err = errors.Join(err, closed)
			problem, engine = fmt.Sprintf("not enforced, because the rules cannot be made: %v", err), EngineNone
		}
	}
	status.each(func(d *DirectionStatus) { d.Engine, d.Problem = engine, problem })
	return err
}

// toldIsolated says whether an earlier agent told that it had isolated the interface.
func (e *Enforcer) toldIsolated(i attach.Interface) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	p := e.own[i.Pod]
	if p == nil {
		return false
	}
	told := ReadStatus(p.Annotations)[i.IfName]
	return told.isolated()
}

// resolve finds out what an interface from before this agent lacks. mu is held.
func (e *Enforcer) resolve(f *face) {
	p := e.own[f.Pod]
	if p == nil || !p.Is(f.PodUID) || f.id.UID == p.UID && f.id.Network != "" {
		return
	}
	if f.Definition == "" {
		f.Definition, _ = definition(p, f.IfName)
	}
	if f.id.UID, f.id.Network = p.UID, f.Definition; f.Definition != "" {
		e.setPod(p)
		e.take()
	}
}
