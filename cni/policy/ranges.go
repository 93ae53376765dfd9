package policy

import (
	"net/netip"
	"slices"
)

// addrRange is the addresses first to last, of one family.
type addrRange struct{ first, last netip.Addr }

func (r addrRange) contains(a netip.Addr) bool {
	return r.first.Compare(a) <= 0 && a.Compare(r.last) <= 0
}

func anyContains(ranges []addrRange, a netip.Addr) bool {
	return slices.ContainsFunc(ranges, func(r addrRange) bool { return r.contains(a) })
}

var allAddrs = []addrRange{rangeOf(netip.MustParsePrefix("0.0.0.0/0")), rangeOf(netip.MustParsePrefix("::/0"))}

// rangeOf takes a masked prefix.
func rangeOf(p netip.Prefix) addrRange {
	last := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(last)*8; bit++ {
		last[bit/8] |= 0x80 >> (bit % 8)
	}
	addr, _ := netip.AddrFromSlice(last)
	return addrRange{p.Addr(), addr}
}

// subtract is whole without the parts of it.
func subtract(whole addrRange, parts []addrRange) []addrRange {
	slices.SortFunc(parts, func(a, b addrRange) int { return a.first.Compare(b.first) })
	var rest []addrRange
	next := whole.first // the first address not yet decided on; the zero Addr after the family's last
	for _, p := range parts {
		if next.IsValid() && next.Less(p.first) {
			rest = append(rest, addrRange{next, p.first.Prev()})
		}
		if next.IsValid() && !p.last.Less(next) {
			next = p.last.Next()
		}
	}
	if next.IsValid() && !whole.last.Less(next) {
		rest = append(rest, addrRange{next, whole.last})
	}
	return rest
}

// span is what one source allows with a range of addresses.
type span struct {
	addrRange
	ports *Ports // interned
}

// edge is where a span begins or ends.
type edge struct {
	at   netip.Addr // from here on
	id   int32      // of its set of ports
	step int32      // 1 or -1
}

// scratch is room that is used again for the next map.
type scratch struct {
	spans []span
	edges []edge
	peers []PeerRange
}

// unite makes the list of peers of all that the scratch's spans allow.
func (s *scratch) unite(in interner) []PeerRange {
	// The sets that are open at an address are a bit set. Each such is united once.
	ids := map[*Ports]int32{}
	var sets []*Ports
	edges := s.edges[:0]
	for _, s := range s.spans {
		id, known := ids[s.ports]
		if !known {
			id = int32(len(sets))
			ids[s.ports] = id
			sets = append(sets, s.ports)
		}
		edges = append(edges, edge{s.first, id, 1})
		if after := next(s.last); after.IsValid() {
			edges = append(edges, edge{after, id, -1})
		}
	}
	slices.SortFunc(edges, func(a, b edge) int { return a.at.Compare(b.at) })

	count := make([]int32, len(sets))
	open := make([]byte, (len(sets)+7)/8)
	united := map[string]*Ports{}
	union := func() *Ports {
		u, known := united[string(open)]
		if !known {
			var some []*Ports
			for id, n := range count {
				if n > 0 {
					some = append(some, sets[id])
				}
			}
			u = in.union(some)
			united[string(open)] = u
		}
		return u
	}
	peers := s.peers[:0]
	for i := 0; i < len(edges); {
		at := edges[i].at
		for ; i < len(edges) && edges[i].at == at; i++ {
			e := edges[i]
			if count[e.id] += e.step; count[e.id] > 0 {
				open[e.id/8] |= 1 << (e.id % 8)
			} else {
				open[e.id/8] &^= 1 << (e.id % 8)
			}
		}
		ports := union()
		if ports == nil {
			continue
		}
		last := lastIPv6
		if i < len(edges) {
			last = previous(edges[i].at)
		}
		peers = add(peers, PeerRange{at, last, ports})
	}
	s.edges, s.peers = edges, peers
	return slices.Clone(peers)
}

var (
	lastIPv4  = allAddrs[0].last
	firstIPv6 = allAddrs[1].first
	lastIPv6  = allAddrs[1].last
)

// next and previous go from the last address of IPv4 to the first of IPv6 and back.
func next(a netip.Addr) netip.Addr {
	if a == lastIPv4 {
		return firstIPv6
	}
	return a.Next()
}

func previous(a netip.Addr) netip.Addr {
	if a == firstIPv6 {
		return lastIPv4
	}
	return a.Prev()
}

// add appends r, or makes the last range longer where r continues it.
func add(peers []PeerRange, r PeerRange) []PeerRange {
	if n := len(peers); n > 0 && peers[n-1].Ports == r.Ports && peers[n-1].Last.Next() == r.First {
		peers[n-1].Last = r.Last
		return peers
	}
	return append(peers, r)
}

// put changes what is allowed with one address, in place; nil is nothing.
func put(peers []PeerRange, a netip.Addr, ports *Ports) []PeerRange {
	i, found := find(peers, a)
	from, to := i, i
	pieces := make([]PeerRange, 0, 5)
	if from > 0 {
		from--
		pieces = append(pieces, peers[from])
	}
	var old PeerRange
	if found {
		old = peers[i]
		to++
		if old.First.Less(a) {
			pieces = append(pieces, PeerRange{old.First, a.Prev(), old.Ports})
		}
	}
	if ports != nil {
		pieces = add(pieces, PeerRange{a, a, ports})
	}
	if found && a.Less(old.Last) {
		pieces = add(pieces, PeerRange{a.Next(), old.Last, old.Ports})
	}
	if to < len(peers) {
		pieces = add(pieces, peers[to])
		to++
	}
	return slices.Replace(peers, from, to, pieces...)
}
