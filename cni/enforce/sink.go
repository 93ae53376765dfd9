package enforce

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/sluice-network/sluice/cni/enforce/cluster"
	"github.com/sluice-network/sluice/cni/policy"
)

// What cluster.Sink is told goes to the index at once, and what that changes is worked out
// by Run: events that come together are worked out together.

// SetPod implements cluster.Sink.
func (e *Enforcer) SetPod(p *cluster.Pod) {
	e.change(func() { e.setPod(p) })
	if p.Node == e.Node && p.Annotations[Annotation] != "" {
		e.pods.Add(p.Namespace + "/" + p.Name) // which may say what is no more
	}
}

// DeletePod implements cluster.Sink.
func (e *Enforcer) DeletePod(namespace, name string) {
	e.change(func() {
		delete(e.own, namespace+"/"+name)
		e.index.RemovePod(namespace, name)
	})
	e.admit(namespace + "/" + name)
}

// SetNamespace implements cluster.Sink.
func (e *Enforcer) SetNamespace(n policy.Namespace) { e.change(func() { e.index.SetNamespace(n) }) }

// DeleteNamespace implements cluster.Sink.
func (e *Enforcer) DeleteNamespace(name string) { e.change(func() { e.index.RemoveNamespace(name) }) }

// SetNetwork implements cluster.Sink.
func (e *Enforcer) SetNetwork(n policy.Network) {
	e.change(func() {
		if delete(e.cut, n.Name); n.Cut {
			e.cut[n.Name] = true
		}
		e.index.SetNetwork(n)
	})
}

// DeleteNetwork implements cluster.Sink.
func (e *Enforcer) DeleteNetwork(name string) {
	e.change(func() {
		delete(e.cut, name)
		e.index.RemoveNetwork(name)
	})
}

// SetPolicy implements cluster.Sink.
func (e *Enforcer) SetPolicy(p cluster.Policy) {
	e.change(func() {
		if delete(e.faulty, p.String()); len(p.Faults) > 0 {
			e.faulty[p.String()] = faulty{p.Object(), p.Faults}
		}
		e.index.SetPolicy(p.Policy)
	})
}

// DeletePolicy implements cluster.Sink.
func (e *Enforcer) DeletePolicy(p cluster.Policy) {
	e.change(func() {
		delete(e.faulty, p.String())
		e.index.RemovePolicy(p.Kind, p.Namespace, p.Name)
	})
}

func (e *Enforcer) change(f func()) {
	e.mu.Lock()
	f()
	if e.since.IsZero() {
		e.since = time.Now()
	}
	e.mu.Unlock()
	select {
	case e.flush <- struct{}{}:
	default:
	}
}

// setPod tells the index of a pod. What attachments say of an own pod's interfaces goes
// before the pod's annotation, which is written when they are all made. mu is held.
func (e *Enforcer) setPod(p *cluster.Pod) {
	read := p.Pod
	if p.Node == e.Node {
		key := p.Namespace + "/" + p.Name
		e.own[key] = p
		read.Interfaces = slices.Clone(read.Interfaces)
		for _, f := range e.of[key] { // the newest last
			if f.id.UID != p.UID || f.Definition == "" { // no policy is for it
				continue
			}
			read.Interfaces = slices.DeleteFunc(read.Interfaces, func(i policy.Interface) bool { return i.Name == f.IfName })
			read.Interfaces = append(read.Interfaces, policy.Interface{Network: f.Definition, Name: f.IfName, MAC: f.MAC.String(), IPs: f.IPs})
		}
	}
	e.index.SetPod(read)
}

// take works out what has changed. mu is held.
func (e *Enforcer) take() {
	since := e.since
	e.since = time.Time{}
	if !e.synced {
		return // what is not known yet would open or close what it should not
	}
	for _, c := range e.index.Flush() {
		for _, f := range e.of[c.ID.Namespace+"/"+c.ID.Pod] {
			if f.id != c.ID || !f.ready || c.State == nil {
				continue
			}
			if f.changed.IsZero() {
				f.changed = since
			}
			e.queue.Add(f.Key)
		}
	}
}

// await waits until all policies are known, for as long as limit, or for ever if it is
// negative. It tells whether they are.
func (e *Enforcer) await(ctx context.Context, limit time.Duration) bool {
	for end := time.Now().Add(limit); ; {
		e.mu.Lock()
		if !e.synced && e.Cluster.Synced() {
			e.synced = true
			e.changed()
			e.take()
			for f := range maps.Values(e.faces) {
				if f.ready {
					e.queue.Add(f.Key)
				}
			}
		}
		synced := e.synced
		e.mu.Unlock()
		if synced || limit >= 0 && time.Now().After(end) {
			return synced
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// setNode tells the index which addresses are the node's own.
func (e *Enforcer) setNode() {
	addresses, err := e.Addresses()
	if err != nil {
		e.Log.Error(err, "Cannot read the node's own addresses; those it had are taken for its own")
		return
	}
	e.change(func() { e.index.SetNode(addresses) })
}
