package policy

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"
)

// profile is a verdict map and what it is made from. It is that of all interfaces on a
// network that the same policies isolate in a direction, and whose names of ports mean
// the same.
type profile struct {
	key       string
	network   string
	direction Direction
	policies  []*numbered
	names     []string    // of the policies
	ports     []NamedPort // of the pods themselves, for the names in ingress rules

	fixed    []source
	groups   []source
	state    *State
	sets     interner
	compiled int // sets after the map was made anew
	sides    map[*side]struct{}

	anew  bool
	dirty map[netip.Addr]struct{} // else: what to patch
}

// source is one of the things that allow something: blocks of addresses, or the pods of a
// group, as far as their addresses are within blocks, if there are any.
type source struct {
	blocks []addrRange
	group  *group
	ports  *Ports
	named  []policyNames // resolved by each member
}

// policyNames are names of ports at which a policy allows something.
type policyNames struct {
	policy string
	ports  []namedPort
}

// patchLimit is the number of addresses from which on it is cheaper to make a map anew.
const patchLimit = 64

// side is an interface and a direction.
type side struct {
	id        ID
	direction Direction
	there     bool
	profile   *profile // nil when not isolated
	optedOut  bool
	held      bool   // see State
	state     *State // as the last Flush told it
}

// State is what the last Flush told of an interface and direction.
func (x *Index) State(id ID, d Direction) (*State, bool) {
	sides := x.sides[id]
	if sides == nil || sides[d].state == nil {
		return nil, false
	}
	return sides[d].state, true
}

// Flush brings all States up to date with what was told since the last Flush, and returns
// those that are others now, sorted by ID.
func (x *Index) Flush() []Change {
	for _, gone := range []bool{true, false} { // a pod that was deleted may have come again
		for e := range x.reselect {
			if (len(e.Interfaces) == 0) == gone {
				x.choose(e)
			}
		}
	}
	clear(x.reselect)
	for p := range x.stale {
		if len(p.sides) > 0 && x.refresh(p) {
			for s := range p.sides {
				x.pending[s] = struct{}{}
			}
		}
	}
	clear(x.stale)
	for p := range x.unused {
		if len(p.sides) == 0 {
			delete(x.profiles, p.key)
			for _, s := range p.groups {
				x.release(s.group, p)
			}
		}
	}
	clear(x.unused)

	var changes []Change
	type pair struct{ was, is *State }
	same := map[pair]bool{} // many sides have the same
	for s := range x.pending {
		now := s.now()
		if now == nil {
			delete(x.sides, s.id)
		}
		equal, known := same[pair{s.state, now}]
		if !known {
			equal = s.state.equal(now)
			same[pair{s.state, now}] = equal
		}
		if equal {
			continue
		}
		s.state = now
		changes = append(changes, Change{s.id, s.direction, now})
	}
	clear(x.pending)
	slices.SortFunc(changes, func(a, b Change) int {
		if c := a.ID.compare(b.ID); c != 0 {
			return c
		}
		return int(a.Direction) - int(b.Direction)
	})
	return changes
}

var (
	notIsolated = &State{Verdicts: &Verdicts{}}
	optedOut    = &State{Verdicts: &Verdicts{}, OptedOut: true}
	held        = &State{Verdicts: &Verdicts{}, Held: true}
)

func (s *side) now() *State {
	switch {
	case !s.there:
		return nil
	case s.optedOut:
		return optedOut
	case s.profile == nil && s.held:
		return held
	case s.profile == nil:
		return notIsolated
	}
	return s.profile.state
}

// choose finds the policies of an own pod's interfaces, or takes from a pod that is not
// one any more its interfaces.
func (x *Index) choose(e *pod) {
	before := e.ids
	e.ids = nil
	if e.own {
		for _, i := range e.Interfaces {
			id := ID{e.Namespace, e.Name, e.UID, i.Network, i.Name}
			e.ids = append(e.ids, id)
			sides := x.sides[id]
			if sides == nil {
				sides = &[2]side{{id: id, direction: Ingress}, {id: id, direction: Egress}}
				x.sides[id] = sides
			}
			policies := x.covering(e, i.Network)
			for d := range sides {
				sides[d].there, sides[d].optedOut = true, x.enforcement(i.Network) == EnforceNone
				sides[d].held = Direction(d) == Egress && x.policed(i.Network)
				x.assign(&sides[d], x.profile(i.Network, Direction(d), policies, e.Ports))
			}
		}
	}
	for _, id := range before {
		if slices.Contains(e.ids, id) {
			continue
		}
		sides := x.sides[id]
		for d := range sides {
			sides[d].there = false
			x.assign(&sides[d], nil)
		}
	}
}

func (x *Index) assign(s *side, p *profile) {
	x.pending[s] = struct{}{}
	if s.profile == p {
		return
	}
	if s.profile != nil {
		delete(s.profile.sides, s)
		x.unused[s.profile] = struct{}{}
	}
	if s.profile = p; p != nil {
		p.sides[s] = struct{}{}
	}
}

// covering is the policies that select the pod on a network, sorted.
func (x *Index) covering(e *pod, network string) []*numbered {
	var all []*numbered
	enforcement := x.enforcement(network)
	for p := range e.ns.policies.candidates(e.Labels) {
		if p.covers(network, enforcement) && p.selector.Matches(labels.Set(e.Labels)) {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b *numbered) int { return strings.Compare(a.String(), b.String()) })
	return all
}

// profile finds or makes the profile of an interface; nil when it is not isolated.
func (x *Index) profile(network string, d Direction, policies []*numbered, ports []NamedPort) *profile {
	p := &profile{network: network, direction: d, sides: map[*side]struct{}{}, anew: true, dirty: map[netip.Addr]struct{}{}}
	key := binary.BigEndian.AppendUint16([]byte(network), uint16(d))
	byName := false
	for _, n := range policies {
		if n.isolates[d] {
			p.policies = append(p.policies, n)
			key = binary.BigEndian.AppendUint64(key, n.number)
			byName = byName || slices.ContainsFunc(n.rules[d], func(r rule) bool { return len(r.named) > 0 })
		}
	}
	if len(p.policies) == 0 {
		return nil
	}
	if byName && d == Ingress {
		p.ports = ports
		for _, port := range ports {
			key = append(key, port.Name...)
			key = append(key, 0, port.Protocol, byte(port.Port>>8), byte(port.Port))
		}
	}
	p.key = string(key)
	if same := x.profiles[p.key]; same != nil {
		return same
	}
	x.profiles[p.key] = p
	for _, n := range p.policies {
		p.names = append(p.names, n.String())
		for i := range n.rules[d] {
			x.use(p, n.Policy, &n.rules[d][i])
		}
	}
	x.stale[p] = struct{}{}
	x.unused[p] = struct{}{} // until a side has it
	return p
}

// use makes the sources of a policy's rule the profile's.
func (x *Index) use(p *profile, of *Policy, r *rule) {
	ports, by := r.ports, of.String()
	var named []policyNames
	if p.direction == Ingress {
		ports = ports.with(r.named, p.ports)
	} else if len(r.named) > 0 {
		named = []policyNames{{by, r.named}}
	}
	ports = ports.grantedBy(by)
	blocks := r.blocks
	if r.anyone {
		blocks = allAddrs
	}
	if len(blocks) > 0 && !ports.empty() {
		p.fixed = append(p.fixed, source{blocks: blocks, ports: ports})
	}
	if len(blocks) > 0 && len(named) > 0 { // the pods among those that have the addresses
		g := x.group(p.network, allNamespaces, "", nil, everything, p)
		p.groups = append(p.groups, source{blocks: blocks, group: g, ports: &Ports{}, named: named})
	}
	for _, peer := range r.pods {
		key, name := oneNamespace(of.Namespace), of.Namespace
		if peer.namespaces != nil {
			key, name = "~"+peer.namespaces.String(), ""
		}
		g := x.group(p.network, key, name, peer.namespaces, peer.pods, p)
		i := slices.IndexFunc(p.groups, func(s source) bool { return s.group == g && s.blocks == nil })
		if i < 0 {
			i = len(p.groups)
			p.groups = append(p.groups, source{group: g, ports: &Ports{}})
		}
		s := &p.groups[i]
		s.ports, s.named = s.ports.and(ports), append(slices.Clip(s.named), named...)
	}
}

// with is what the source allows with a pod of its group that has these ports.
func (s *source) with(ports []NamedPort) *Ports {
	all := s.ports
	for _, n := range s.named {
		all = all.and((&Ports{}).with(n.ports, ports).grantedBy(n.policy))
	}
	return all
}

// appendMeaning appends a key of what the names mean at a pod that has these ports.
func (s *source) appendMeaning(key []byte, ports []NamedPort) []byte {
	for _, n := range s.named {
		for port := range meanings(n.ports, ports) {
			key = append(key, port.Protocol, byte(port.Port>>8), byte(port.Port))
		}
		key = append(key, 0) // no protocol: the policy's end
	}
	return key
}

// refresh brings the verdict map up to date and says whether it is another.
func (x *Index) refresh(p *profile) bool {
	// A map that was patched for long has sets of ports that nobody has any more.
	if p.anew || len(p.sets) > 2*p.compiled+patchLimit {
		x.compile(p)
		p.anew = false
		clear(p.dirty)
		return true
	}
	peers, copied := p.state.Verdicts.Peers, false
	for a := range p.dirty {
		ports := x.at(p, a)
		i, found := find(peers, a)
		if found && peers[i].Ports == ports || !found && ports == nil {
			continue
		}
		if !copied {
			peers, copied = append(make([]PeerRange, 0, len(peers)+2*len(p.dirty)), peers...), true
		}
		peers = put(peers, a, ports)
	}
	clear(p.dirty)
	if copied {
		p.show(peers)
	}
	return copied
}

// compile makes the verdict map from its sources.
func (x *Index) compile(p *profile) {
	p.sets = interner{}
	spans := x.scratch.spans[:0]
	for _, a := range x.node {
		spans = append(spans, span{addrRange{a, a}, p.sets.intern(everyPort)})
	}
	for _, s := range p.fixed {
		for _, b := range s.blocks {
			spans = append(spans, span{b, p.sets.intern(s.ports)})
		}
	}
	var meaning []byte
	for i := range p.groups {
		s := &p.groups[i]
		base := p.sets.intern(s.ports)
		byMeaning := map[string]*Ports{} // few are different
		for e := range s.group.members {
			ports := base
			if len(s.named) > 0 {
				var known bool
				meaning = s.appendMeaning(meaning[:0], e.Ports)
				if ports, known = byMeaning[string(meaning)]; !known {
					ports = p.sets.intern(s.with(e.Ports))
					byMeaning[string(meaning)] = ports
				}
			}
			if ports == nil {
				continue
			}
			for _, i := range e.Interfaces {
				if i.Network != p.network {
					continue
				}
				for _, ip := range i.IPs {
					if s.within(ip) {
						spans = append(spans, span{addrRange{ip, ip}, ports})
					}
				}
			}
		}
	}
	x.scratch.spans = spans
	p.show(x.scratch.unite(p.sets))
	p.compiled = len(p.sets)
}

func (p *profile) show(peers []PeerRange) {
	p.state = &State{Verdicts: &Verdicts{Isolated: true, Policies: p.names, Peers: peers}}
	for _, n := range p.policies {
		p.state.Faults = append(p.state.Faults, n.Faults...)
	}
}

var everyPort = &Ports{All: true}

func (s *source) within(a netip.Addr) bool { return s.blocks == nil || anyContains(s.blocks, a) }

// at is what the sources allow with one address.
func (x *Index) at(p *profile, a netip.Addr) *Ports {
	var sets []*Ports
	if x.isNode(a) {
		sets = append(sets, p.sets.intern(everyPort))
	}
	for i := range p.fixed {
		if p.fixed[i].within(a) {
			sets = append(sets, p.sets.intern(p.fixed[i].ports))
		}
	}
	for _, e := range x.owners[address{p.network, a}] {
		for i := range p.groups {
			s := &p.groups[i]
			if _, in := s.group.members[e]; in && s.within(a) {
				if ports := p.sets.intern(s.with(e.Ports)); ports != nil {
					sets = append(sets, ports)
				}
			}
		}
	}
	return p.sets.union(sets)
}

func (x *Index) isNode(a netip.Addr) bool { return slices.Contains(x.node, a) }
