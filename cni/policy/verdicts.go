package policy

import (
	"net/netip"
	"slices"
)

// Direction of traffic, as the pod sees it.
type Direction uint8

// The directions.
const (
	Ingress Direction = iota
	Egress
)

func (d Direction) String() string {
	return [...]string{"ingress", "egress"}[d]
}

// PortRange is the ports First to Last, both included.
type PortRange struct{ First, Last uint16 }

// Ports are the cells (protocol, port) that are allowed with a peer. Ranges are sorted
// and neither overlap nor touch, so equal sets are equal values.
type Ports struct {
	// All is every protocol, those without ports included; the rest is empty then.
	All            bool
	TCP, UDP, SCTP []PortRange
	// By is which policies allow which part of it: of those in Verdicts.Policies, in
	// their order. What only the node's own addresses may is nobody's.
	By []Share
}

// Share is the part of some Ports that one policy allows.
type Share struct {
	Policy string
	Ports  *Ports // not empty, and with no By
}

// PeerRange is the addresses First to Last, of one family, and what is allowed with
// each of them.
type PeerRange struct {
	First, Last netip.Addr
	Ports       *Ports // never changed; equal sets of one Verdicts are the same pointer
}

// Verdicts is what policy says of one interface and direction: its verdict map.
type Verdicts struct {
	// Isolated says that some policy isolates the interface in this direction. If
	// not, everything is allowed and there are no Peers.
	Isolated bool
	// Policies are those that isolate it, sorted.
	Policies []string
	// Peers are the only ones allowed: sorted, IPv4 before IPv6, not overlapping,
	// and neighbours with equal ports are one range.
	Peers []PeerRange
}

// IP protocol numbers that have ports here, as IANA assigned them.
const (
	TCP  = 6
	UDP  = 17
	SCTP = 132
)

// Allows says whether a new connection with the peer may be: of the IP protocol, and
// to the port of whoever is its destination. The port of another protocol than TCP,
// UDP and SCTP is not looked at.
func (v *Verdicts) Allows(peer netip.Addr, protocol uint8, port uint16) bool {
	if !v.Isolated {
		return true
	}
	i, found := find(v.Peers, peer)
	return found && v.Peers[i].Ports.allow(protocol, port)
}

// find is where the range with the address is, or would be.
func find(peers []PeerRange, a netip.Addr) (int, bool) {
	return slices.BinarySearchFunc(peers, a, func(r PeerRange, a netip.Addr) int {
		switch {
		case r.Last.Less(a):
			return -1
		case a.Less(r.First):
			return 1
		}
		return 0
	})
}

// Equal says whether both allow the same, by the same policies.
func (v *Verdicts) Equal(o *Verdicts) bool {
	return v == o || v.Isolated == o.Isolated && slices.Equal(v.Policies, o.Policies) && slices.EqualFunc(v.Peers, o.Peers, func(a, b PeerRange) bool {
		return a.First == b.First && a.Last == b.Last && a.Ports.equal(b.Ports)
	})
}

func (p *Ports) equal(o *Ports) bool {
	return p == o || p.All == o.All && slices.Equal(p.TCP, o.TCP) && slices.Equal(p.UDP, o.UDP) && slices.Equal(p.SCTP, o.SCTP) &&
		slices.EqualFunc(p.By, o.By, func(a, b Share) bool { return a.Policy == b.Policy && a.Ports.equal(b.Ports) })
}

func (p *Ports) allow(protocol uint8, port uint16) bool {
	ranges := p.of(protocol)
	return p.All || ranges != nil && slices.ContainsFunc(*ranges, func(r PortRange) bool { return r.First <= port && port <= r.Last })
}
