package ipam

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/sluice-network/sluice/apis/sluice/v1alpha1"
)

// state is what an address of a block is. One that has none is free, and the journal
// says so.
type state int

const (
	marking state = iota // free, and will be ready when the journal says that it may be in use
	ready                // free, and the journal says that it may be in use
	inUse                // an interface's
	resting              // was an interface's
	held                 // may be an interface's: an attachment of an earlier agent is not undone yet
)

// unknown stands in the journal for the time since which an address rests: it may be in use.
const unknown time.Duration = -1

type unit struct {
	state state
	since time.Duration // resting: when that began, since boot
	block *block
}

// block is a part of the pool that this node has.
type block struct {
	name, uid string
	kind      v1alpha1.IPBlockKind
	first     netip.Addr
	size      int
	namespace string // of a share
	index     int    // of a share
	excluded  map[netip.Addr]bool
	// quiet: what is free rests, too, because what was before is not known; since then.
	quiet   bool
	since   time.Duration
	next    int // where to look for a free address
	leaving bool
	lost    bool // somebody deleted the claim
	idle    time.Duration
	told    v1alpha1.IPBlockStatus
	toldAt  time.Duration
}

func (b *block) has(a netip.Addr) bool {
	if b.kind == v1alpha1.BlockQuota || a.BitLen() != b.first.BitLen() || a.Less(b.first) {
		return false
	}
	last := plus(b.first, b.size-1)
	return !last.Less(a)
}

// plus is the address n after a, in the same block: blocks begin at multiples of their
// size, which is no more than 65536.
func plus(a netip.Addr, n int) netip.Addr {
	b := a.AsSlice()
	low := int(b[len(b)-2])<<8 + int(b[len(b)-1]) + n
	b[len(b)-2], b[len(b)-1] = byte(low>>8), byte(low)
	a, _ = netip.AddrFromSlice(b)
	return a
}

// lease is the addresses of one interface.
type lease struct {
	namespace string
	addresses []netip.Addr
}

// ledger is what a node has of one pool. It is not safe for concurrent use, and reads no
// clock: now is the time since boot.
type ledger struct {
	blocks map[string]*block
	units  map[netip.Addr]*unit
	queue  map[bool][]netip.Addr // ready, by being IPv4, the next one first
	leases map[Key]*lease
	// pending is set while attachments of an earlier agent are not undone, of any pool; half
	// are this pool's, with their namespaces.
	pending bool
	half    map[Key]string
	changed bool // the journal says more to be in use than is
}

func newLedger() *ledger {
	return &ledger{blocks: map[string]*block{}, units: map[netip.Addr]*unit{}, queue: map[bool][]netip.Addr{}, leases: map[Key]*lease{}, half: map[Key]string{}}
}

// blockOf is the node's block of addresses, or claim of a reserved one, that an address
// is in. The reserved one counts.
func (l *ledger) blockOf(a netip.Addr) *block {
	var found *block
	for _, b := range l.blocks {
		if b.has(a) && !b.leaving && (found == nil || b.kind == v1alpha1.BlockReserved) {
			found = b
		}
	}
	return found
}

// open tells whether an address may be given to anybody.
func (l *ledger) open(p *v1alpha1.Pool, b *block, a netip.Addr) bool {
	r := p.Family(a.Is4())
	_, reserved := p.Reservations[a]
	return b.kind == v1alpha1.BlockAddresses && !b.leaving && !b.lost && !b.excluded[a] && !reserved && r != nil && r.Usable(a)
}

// adopt takes a block that the API server says is this node's. A fresh one was nobody's
// before; of another nothing is known, and all of it rests.
func (l *ledger) adopt(b *block, fresh bool, now time.Duration) {
	b.quiet, b.since, b.idle, b.toldAt = !fresh, now, now, now
	l.blocks[b.name] = b
	for _, lease := range l.leases {
		for _, a := range lease.addresses {
			l.occupy(a)
		}
	}
	l.changed = true
}

// occupy makes a live attachment's address taken, if it is in a block of ours.
func (l *ledger) occupy(a netip.Addr) {
	if b := l.blockOf(a); b != nil {
		l.drop(a)
		l.units[a] = &unit{state: inUse, block: b}
	}
}

// used tells whether an interface has an address of a block.
func (l *ledger) used(b *block) bool {
	for _, lease := range l.leases {
		if slices.ContainsFunc(lease.addresses, b.has) {
			return true
		}
	}
	return false
}

// drop makes an address free.
func (l *ledger) drop(a netip.Addr) {
	if u := l.units[a]; u != nil && u.state == ready {
		l.queue[a.Is4()] = slices.DeleteFunc(l.queue[a.Is4()], func(q netip.Addr) bool { return q == a })
	}
	delete(l.units, a)
}

// rested drops what has rested.
func (l *ledger) rested(rest, now time.Duration) {
	for a, u := range l.units {
		if u.state == held && !l.pending {
			u.state, u.since = resting, now
		}
		if u.state == resting && (now-u.since >= rest || u.block.kind == v1alpha1.BlockReserved) {
			delete(l.units, a)
			l.changed = true
		}
	}
	for _, b := range l.blocks {
		switch {
		case !b.quiet:
		case l.pending:
			b.since = now
		case now-b.since >= rest || b.kind != v1alpha1.BlockAddresses:
			b.quiet, l.changed = false, true
		}
	}
}

// peek is the next address of a family that is ready.
func (l *ledger) peek(p *v1alpha1.Pool, v4 bool) (netip.Addr, bool) {
	for len(l.queue[v4]) > 0 {
		a := l.queue[v4][0]
		u := l.units[a]
		if l.open(p, u.block, a) {
			return a, true
		}
		l.drop(a)
	}
	return netip.Addr{}, false
}

// take gives addresses that are ready to an interface.
func (l *ledger) take(key Key, namespace string, addresses []netip.Addr) {
	for _, a := range addresses {
		u := l.units[a]
		if q := l.queue[a.Is4()]; len(q) > 0 && q[0] == a {
			l.queue[a.Is4()] = q[1:]
		} else {
			b := u.block
			l.drop(a)
			u = &unit{block: b}
			l.units[a] = u
		}
		u.state = inUse
		u.block.idle = unknown
	}
	l.leases[key] = &lease{namespace, addresses}
}

// release lets the addresses of an interface that is gone rest.
func (l *ledger) release(key Key, now time.Duration) bool {
	lease := l.leases[key]
	if lease == nil {
		return false
	}
	delete(l.leases, key)
	for _, a := range lease.addresses {
		if u := l.units[a]; u != nil {
			u.state, u.since = resting, now
		}
	}
	l.changed = true
	return true
}

// mark chooses free addresses of a family to become ready, up to n of them.
func (l *ledger) mark(p *v1alpha1.Pool, v4 bool, n int) (chosen []netip.Addr) {
	for _, name := range slices.Sorted(maps.Keys(l.blocks)) {
		b := l.blocks[name]
		if b.kind != v1alpha1.BlockAddresses || b.first.Is4() != v4 || b.quiet || b.leaving || b.lost {
			continue
		}
		for i := 0; i < b.size && len(chosen) < n; i++ {
			a := plus(b.first, b.next)
			b.next = (b.next + 1) % b.size
			if l.units[a] == nil && l.open(p, b, a) {
				l.units[a] = &unit{state: marking, block: b}
				chosen = append(chosen, a)
			}
		}
	}
	return chosen
}

// markOne chooses one address, which is in a block of ours.
func (l *ledger) markOne(a netip.Addr) bool {
	b := l.blockOf(a)
	if b == nil || b.quiet || b.lost || l.units[a] != nil {
		return false
	}
	l.units[a] = &unit{state: marking, block: b}
	return true
}

// marked makes chosen addresses ready, once they are in the journal, or free again.
func (l *ledger) marked(chosen []netip.Addr, written bool) {
	for _, a := range chosen {
		u := l.units[a]
		switch {
		case u == nil || u.state != marking:
		case !written:
			delete(l.units, a)
		default:
			u.state = ready
			if u.block.kind == v1alpha1.BlockAddresses {
				l.queue[a.Is4()] = append(l.queue[a.Is4()], a)
			}
		}
	}
}

// available counts the addresses of a family that can be had without another block, but
// counts no further than enough.
func (l *ledger) available(p *v1alpha1.Pool, v4 bool, enough int) (n int) {
	n = len(l.queue[v4])
	for _, b := range l.blocks {
		if b.kind != v1alpha1.BlockAddresses || b.first.Is4() != v4 || b.quiet || b.leaving || b.lost {
			continue
		}
		for i := 0; i < b.size && n < enough; i++ {
			a := plus(b.first, (b.next+i)%b.size)
			if u := l.units[a]; (u == nil || u.state == marking) && l.open(p, b, a) {
				n++
			}
		}
	}
	return n
}

// shares are how many interfaces of a namespace the node may have by its shares of the
// quota, and how many it has.
func (l *ledger) shares(namespace string, limit int) (may, has int) {
	for _, b := range l.blocks {
		if b.kind == v1alpha1.BlockQuota && b.namespace == namespace && !b.leaving && !b.lost {
			may += b.worth(limit)
		}
	}
	for _, lease := range l.leases {
		if lease.namespace == namespace {
			has++
		}
	}
	for _, of := range l.half {
		if of == namespace {
			has++
		}
	}
	return may, has
}

// worth is how much of a share the limit leaves.
func (b *block) worth(limit int) int {
	first, size := v1alpha1.Share(b.index)
	return min(max(limit-first, 0), size)
}

// exclude withdraws a free address of ours for whoever it is reserved for. It is not ok
// while an interface has it or it rests.
func (l *ledger) exclude(b *block, a netip.Addr) bool {
	if u := l.units[a]; b.quiet || u != nil && u.block == b && u.state != ready && u.state != marking {
		return false
	}
	if u := l.units[a]; u != nil && u.block == b {
		l.drop(a)
	}
	b.excluded[a] = true
	l.changed = true
	return true
}

// counts tells what the addresses of each block are.
func (l *ledger) counts() map[*block]v1alpha1.IPBlockStatus {
	all := make(map[*block]v1alpha1.IPBlockStatus, len(l.blocks))
	for _, u := range l.units {
		s := all[u.block]
		switch u.state {
		case inUse:
			s.Allocated++
		case resting, held:
			s.Resting++
		}
		all[u.block] = s
	}
	return all
}

// forget takes a block out. Its addresses that interfaces have stay with these.
func (l *ledger) forget(b *block) {
	delete(l.blocks, b.name)
	for a, u := range l.units {
		if u.block == b {
			l.drop(a)
		}
	}
	l.changed = true
}
