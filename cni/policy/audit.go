package policy

import (
	"maps"
	"net/netip"
	"slices"
)

// Snapshot is what an Index was told, and the States that it made of it. It holds nothing of the Index, which may change meanwhile.
type Snapshot struct {
	own        func(Pod) bool
	node       []netip.Addr
	networks   map[string]Enforcement
	namespaces []Namespace
	pods       []Pod
	policies   []*Policy
	states     map[ID][2]*State
}

// Networks are those that own pods are on, sorted: all that have States.
func (x *Index) Networks() []string {
	networks := map[string]struct{}{}
	for id := range x.sides {
		networks[id.Network] = struct{}{}
	}
	return slices.Sorted(maps.Keys(networks))
}

// Snapshot takes what is known that matters on a network, or on all where that is empty.
// Flush comes before it.
func (x *Index) Snapshot(network string) *Snapshot {
	s := &Snapshot{own: x.own, node: x.node, networks: maps.Clone(x.networks), states: map[ID][2]*State{}}
	elsewhere := func(i Interface) bool { return network != "" && i.Network != network }
	for _, ns := range x.namespaces {
		if ns.known {
			s.namespaces = append(s.namespaces, Namespace{Name: ns.name, Labels: ns.labels})
		}
	}
	for _, e := range x.pods {
		p := e.Pod
		if slices.ContainsFunc(p.Interfaces, elsewhere) {
			p.Interfaces = slices.DeleteFunc(slices.Clone(p.Interfaces), elsewhere)
		}
		if len(p.Interfaces) > 0 {
			s.pods = append(s.pods, p)
		}
	}
	for _, p := range x.policies {
		s.policies = append(s.policies, p.Policy)
	}
	for id, sides := range x.sides {
		if network == "" || id.Network == network {
			s.states[id] = [2]*State{sides[Ingress].state, sides[Egress].state}
		}
	}
	return s
}

// Anew is an Index that was told the same, and has worked out nothing of it yet.
func (s *Snapshot) Anew() *Index {
	fresh := NewIndex(s.own)
	fresh.SetNode(s.node)
	for name, e := range s.networks {
		fresh.SetNetwork(Network{Name: name, Enforcement: e})
	}
	for _, n := range s.namespaces {
		fresh.SetNamespace(n)
	}
	for _, p := range s.pods {
		fresh.SetPod(p)
	}
	for _, p := range s.policies {
		fresh.SetPolicy(p)
	}
	return fresh
}

// Audit makes the States from nothing, and returns what they should be where they are not
// that: nowhere, unless this package is wrong.
func (s *Snapshot) Audit() (wrong []Change) {
	fresh := s.Anew()
	fresh.Flush()
	for id := range s.states {
		if fresh.sides[id] == nil {
			fresh.sides[id] = &[2]side{}
		}
	}
	for id, sides := range fresh.sides {
		for d := range sides {
			if is := sides[d].state; !s.states[id][d].equal(is) {
				wrong = append(wrong, Change{id, Direction(d), is})
			}
		}
	}
	return wrong
}
