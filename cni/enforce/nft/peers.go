package nft

import (
	"net/netip"
	"slices"

	"github.com/sluice-network/sluice/cni/policy"
)

// peer is an element of a map of peers: addresses First to Last, and the chain that
// judges the rest of their packets.
type peer struct {
	first, last netip.Addr
	chain       string
}

func (p peer) element() element {
	v := jump(p.chain)
	return element{key: bytesOf(p.first), last: bytesOf(p.last), verdict: &v}
}

func bytesOf(a netip.Addr) string { return string(a.AsSlice()) }

// sides are the maps of one direction and family, each sorted. No address is in two.
type sides [3][]peer

// The sides: a hash of single addresses, as nearly all peers are, and the interval maps.
const (
	single = iota
	intervalA
	intervalB
)

// next is the side for a peer whose addresses the side was has, or none (-1).
func (p peer) next(was int) int {
	switch {
	case was != single && p.first == p.last:
		return single
	case was == intervalA:
		return intervalB
	}
	return intervalA
}

// change is what is to be done to one of the maps.
type change struct{ del, add []peer }

// diff makes of the peers in the maps those wanted, which are sorted. A peer that stays
// as it is stays where it is; of another one, what remains goes to another map, where
// nothing can be in its place.
func (s sides) diff(want []peer) (next sides, changes [len(sides{})]change) {
	type held struct {
		peer
		side int
	}
	var have []held
	for rest := s; ; {
		least := -1
		for side, peers := range rest {
			if len(peers) > 0 && (least < 0 || peers[0].first.Less(rest[least][0].first)) {
				least = side
			}
		}
		if least < 0 {
			break
		}
		have, rest[least] = append(have, held{rest[least][0], least}), rest[least][1:]
	}
	put := func(p peer, was int) {
		side := p.next(was)
		changes[side].add = append(changes[side].add, p)
		next[side] = append(next[side], p)
	}
	i, want := 0, slices.Clone(want)
	for _, h := range have {
		for i < len(want) && want[i].last.Less(h.first) {
			put(want[i], -1)
			i++
		}
		if i < len(want) && want[i] == h.peer {
			next[h.side] = append(next[h.side], h.peer)
			i++
			continue
		}
		// Pieces of it, and before each the part of what is wanted that nothing had.
		var pieces []peer
		for i < len(want) && !h.last.Less(want[i].first) {
			w := want[i]
			if w.first.Less(h.first) {
				put(peer{w.first, h.first.Prev(), w.chain}, -1)
				w.first = h.first
			}
			if h.last.Less(w.last) {
				pieces = append(pieces, peer{w.first, h.last, w.chain})
				want[i].first = h.last.Next()
				break
			}
			pieces = append(pieces, w)
			i++
		}
		if len(pieces) == 1 && pieces[0] == h.peer {
			next[h.side] = append(next[h.side], h.peer)
			continue
		}
		changes[h.side].del = append(changes[h.side].del, h.peer)
		for _, p := range pieces {
			put(p, h.side)
		}
	}
	for ; i < len(want); i++ {
		put(want[i], -1)
	}
	return next, changes
}

// allowed is what a packet of a direction may be: new at some ports, or an answer from
// ports that the other direction allows. Either may be nil.
type allowed struct{ new, replies *policy.Ports }

// byFamily are the peers, IPv4 and IPv6, each with the chain of what it is allowed; with
// answers to the peers of the other direction. Both are sorted.
func byFamily(own, answered []policy.PeerRange, chainOf func(allowed) string) [2][]peer {
	var families [2][]peer
	put := func(first, last netip.Addr, a allowed) {
		f := 0
		if first.Is6() {
			f = 1
		}
		chain, to := chainOf(a), &families[f]
		if n := len(*to); n > 0 && (*to)[n-1].chain == chain && (*to)[n-1].last.Next() == first {
			(*to)[n-1].last = last // other policies allow the same
			return
		}
		*to = append(*to, peer{first, last, chain})
	}
	own, answered = slices.Clone(own), slices.Clone(answered)
	for len(own)+len(answered) > 0 {
		switch {
		case len(answered) == 0 || len(own) > 0 && own[0].Last.Less(answered[0].First):
			put(own[0].First, own[0].Last, allowed{new: own[0].Ports})
			own = own[1:]
		case len(own) == 0 || answered[0].Last.Less(own[0].First):
			put(answered[0].First, answered[0].Last, allowed{replies: answered[0].Ports})
			answered = answered[1:]
		case own[0].First.Less(answered[0].First):
			put(own[0].First, answered[0].First.Prev(), allowed{new: own[0].Ports})
			own[0].First = answered[0].First
		case answered[0].First.Less(own[0].First):
			put(answered[0].First, own[0].First.Prev(), allowed{replies: answered[0].Ports})
			answered[0].First = own[0].First
		default:
			o, a := &own[0], &answered[0]
			last := o.Last
			if a.Last.Less(last) {
				last = a.Last
			}
			put(o.First, last, allowed{o.Ports, a.Ports})
			if o.First = last.Next(); o.Last == last {
				own = own[1:]
			}
			if a.First = last.Next(); a.Last == last {
				answered = answered[1:]
			}
		}
	}
	return families
}
