package policy

import (
	"net/netip"

	"k8s.io/apimachinery/pkg/labels"
)

// Answer is what holds for a new connection, at both of its ends.
type Answer struct {
	Allowed bool
	// Itself says that a pod talks with itself, which no policy is about.
	Itself bool
	// Egress is of the interfaces that have the source address, and Ingress of those
	// with the destination address; of the Index's own pods, so that it is judged
	// nowhere else what other nodes judge.
	Egress, Ingress []Reason
}

// Reason is what holds for a connection at one interface, and why.
type Reason struct {
	ID    ID
	State *State
	// Allowed is State.Verdicts' word.
	Allowed bool
	// By are the rules that allow it: all of them. It is empty when the interface is
	// not isolated, when nothing allows it, and when NodeItself.
	By []Rule
	// NodeItself says that the peer is the node.
	NodeItself bool
}

// Rule names a rule of a policy by its place in its list, which begins with 0.
type Rule struct {
	Policy    string
	Direction Direction
	Index     int
}

// Verdict answers for a new connection on a network, from the same verdict maps that are
// enforced: the policies that isolate an end are in the Reason's State, the rules that
// allow it in By. Flush comes before it. Of an IP protocol without ports the port does not
// matter.
func (x *Index) Verdict(network string, source, destination netip.Addr, protocol uint8, port uint16) Answer {
	source, destination = source.Unmap(), destination.Unmap()
	a := Answer{Allowed: true}
	for _, from := range x.owners[address{network, source}] {
		for _, to := range x.owners[address{network, destination}] {
			if from == to {
				return Answer{Allowed: true, Itself: true}
			}
		}
	}
	judge := func(own, peer netip.Addr, d Direction) (reasons []Reason) {
		for _, e := range x.owners[address{network, own}] {
			for _, id := range e.ids {
				state, told := x.State(id, d)
				if !told || !e.has(id, own) {
					continue
				}
				r := Reason{ID: id, State: state, Allowed: state.Verdicts.Allows(peer, protocol, port)}
				if p := x.sides[id][d].profile; p != nil {
					r.By, r.NodeItself = x.by(p, peer, protocol, port), x.isNode(peer)
				}
				a.Allowed = a.Allowed && r.Allowed
				reasons = append(reasons, r)
			}
		}
		return reasons
	}
	a.Egress = judge(source, destination, Egress)
	a.Ingress = judge(destination, source, Ingress)
	return a
}

func (e *pod) has(id ID, a netip.Addr) bool {
	for _, i := range e.Interfaces {
		if i.Network == id.Network && i.Name == id.Interface {
			for _, ip := range i.IPs {
				if ip == a {
					return true
				}
			}
		}
	}
	return false
}

// by is the rules that allow a connection with a peer. It asks the selectors, and not the
// groups, so that it bears out the verdict map.
func (x *Index) by(p *profile, peer netip.Addr, protocol uint8, port uint16) []Rule {
	var rules []Rule
	peers := x.owners[address{p.network, peer}]
	for _, n := range p.policies {
		for i := range n.rules[p.direction] {
			r := &n.rules[p.direction][i]
			if x.allows(r, n.Namespace, p, nil, peer, protocol, port) {
				rules = append(rules, Rule{n.String(), p.direction, i})
				continue
			}
			for _, e := range peers {
				if x.allows(r, n.Namespace, p, e, peer, protocol, port) {
					rules = append(rules, Rule{n.String(), p.direction, i})
					break
				}
			}
		}
	}
	return rules
}

// allows says whether the rule allows it with the pod at that address, or nil for the
// address itself.
func (x *Index) allows(r *rule, namespace string, p *profile, e *pod, peer netip.Addr, protocol uint8, port uint16) bool {
	ports := r.ports
	switch {
	case p.direction == Ingress:
		ports = ports.with(r.named, p.ports)
	case e != nil:
		ports = ports.with(r.named, e.Ports)
	}
	if !ports.allow(protocol, port) {
		return false
	}
	if r.anyone || anyContains(r.blocks, peer) {
		return true
	}
	if e == nil {
		return false
	}
	for _, s := range r.pods {
		inside := s.namespaces == nil && e.Namespace == namespace || s.namespaces != nil && e.ns.known && s.namespaces.Matches(labels.Set(e.ns.labels))
		if inside && s.pods.Matches(labels.Set(e.Labels)) {
			return true
		}
	}
	return false
}
