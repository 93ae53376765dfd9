package ipam

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	"github.com/sluice-network/sluice/cni/attach"
)

const (
	// window is how many addresses of a family are made ready with one write.
	window = 128
	// spare is the most addresses of a family that are free before another block is claimed.
	spare = 64

	tick       = 15 * time.Second
	auditEvery = 5 * time.Minute // to compare the claims with the API server's
	idleBlock  = 5 * time.Minute
	idleShare  = time.Minute
	tellEvery  = 2 * time.Minute
	// backOff is how long nothing is claimed ahead, and STATUS says so, after a pool had
	// nothing or the API server was away.
	backOff = 10 * time.Second
	// patience is how long one look at the API server may take when nobody waits for it.
	patience = 20 * time.Second
)

// Key names the attachment that an address is for.
type Key = attach.Key

// Options are what a Node stands on.
type Options struct {
	Name   string // of the node
	Dir    string // of the journal
	Claims Claims
	// Boot tells this boot from others, Now is the time since it, suspended or not.
	Boot string
	Now  func() (time.Duration, error)
	Log  logr.Logger
}

// Node gives out the addresses of one node. It is safe for concurrent use.
type Node struct {
	Options
	journal journal
	leases  func() []attach.Lease
	poke    chan struct{}
	// tending is held by who claims or writes the journal, before mu.
	tending chan struct{}
	audited time.Duration

	mu      sync.Mutex
	stores  map[string]*store // by pool
	pending map[Key]bool      // attachments of an earlier agent that are being undone
	loaded  bool
	closed  bool
	// all: more is due than addresses to be ready.
	all bool
}

// store is what the node knows of one pool.
type store struct {
	*ledger
	name string
	spec *v1alpha1.IPPoolSpec // nil when there is no such pool
	pool *v1alpha1.Pool       // nil when the spec is not valid, which bad says
	bad  error
	// empty is why nothing could be claimed lately, and until when that counts.
	empty      error
	emptyUntil time.Duration
}

// Ask is what an interface needs.
type Ask struct {
	Key
	Pool, Namespace, Pod string
	MAC                  net.HardwareAddr
	IPs                  []netip.Prefix // asked for by the pod; /0 leaves the length to the pool
}

// Grant is what it gets.
type Grant struct {
	Pool      *v1alpha1.Pool
	Spec      *v1alpha1.IPPoolSpec
	Addresses []netip.Addr
}

// New makes a Node. Load should follow before any request.
func New(o Options) *Node {
	return &Node{Options: o, journal: journal(o.Dir), poke: make(chan struct{}, 1), tending: make(chan struct{}, 1), stores: map[string]*store{}, pending: map[Key]bool{}}
}

// now is the time since boot. A clock that cannot be read stands still, and nothing that
// rests is over.
func (n *Node) now() time.Duration {
	t, err := n.Now()
	if err != nil {
		n.Log.Error(err, "Cannot read the clock")
	}
	return t
}

// Load reads the journal and compares it with the attachments that there are, which it
// will do again from time to time.
func (n *Node) Load(leases func() []attach.Lease) error {
	images, aside, err := n.journal.read()
	if err != nil {
		return err
	}
	for _, path := range aside {
		n.Log.Error(nil, "A file of the journal of addresses could not be read and was set aside; the addresses of its pool rest first", "file", path)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.leases, n.loaded = leases, true
	live, half := map[string]map[Key]*lease{}, map[string]map[Key]string{}
	for _, l := range leases() {
		if !l.Done {
			n.pending[l.Key] = true
			if half[l.Pool] == nil {
				half[l.Pool] = map[Key]string{}
			}
			half[l.Pool][l.Key] = l.Namespace
			continue
		}
		if live[l.Pool] == nil {
			live[l.Pool] = map[Key]*lease{}
		}
		live[l.Pool][l.Key] = &lease{l.Namespace, l.Addresses}
	}
	for _, pool := range slices.Concat(slices.Collect(maps.Keys(live)), slices.Collect(maps.Keys(half))) {
		if images[pool] == nil {
			images[pool] = &image{}
		}
	}
	for pool, im := range images {
		if live[pool] == nil {
			live[pool] = map[Key]*lease{}
		}
		s := &store{name: pool, ledger: restore(im, live[pool], n.Boot, n.now())}
		s.pending = len(n.pending) > 0
		maps.Copy(s.half, half[pool])
		s.set(im.Spec)
		n.stores[pool] = s
	}
	return nil
}

// set takes a pool's spec, nil when there is no such pool.
func (s *store) set(spec *v1alpha1.IPPoolSpec) {
	s.spec, s.pool, s.bad, s.empty = spec, nil, nil, nil
	if spec == nil {
		s.bad = errors.New("there is no such IPPool in the operator's namespace: make it, or name another in ipam.pool")
		return
	}
	pool, errs := spec.Parse()
	if len(errs) > 0 {
		s.bad = fmt.Errorf("the IPPool is not valid: %w", errs.ToAggregate())
		return
	}
	s.pool = pool
}

// SetPool takes what a pool is now, nil when it is gone.
func (n *Node) SetPool(name string, spec *v1alpha1.IPPoolSpec) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.stores[name]
	if s == nil {
		if spec == nil {
			return
		}
		s = &store{name: name, ledger: newLedger()}
		s.pending = len(n.pending) > 0
		n.stores[name] = s
	}
	s.set(spec)
	s.changed, n.all = true, true
	n.wake()
}

func (n *Node) wake() {
	select {
	case n.poke <- struct{}{}:
	default:
	}
}

// lack is what an ADD cannot go on without.
type lack struct {
	v4       bool
	address  netip.Addr // that very one; not valid for any
	reserved bool
	share    bool
	limit    int
}

func again(format string, args ...any) error {
	return types.NewError(types.ErrTryAgainLater, fmt.Sprintf(format, args...), "")
}

func refuse(format string, args ...any) error {
	return types.NewError(attach.CodeIPAM, fmt.Sprintf(format, args...), "")
}

// Add gives an interface its addresses. An interface that has some gets the same.
func (n *Node) Add(ctx context.Context, ask Ask) (*Grant, error) {
	for {
		g, _, err := n.give(ask)
		if g != nil || err != nil {
			return g, err
		}
		if err := n.lockTending(ctx); err != nil {
			return nil, again("pool %q: wait for a claim: %v", ask.Pool, err)
		}
		// Somebody may have brought it meanwhile.
		var l *lack
		if g, l, err = n.give(ask); g == nil && err == nil {
			err = n.supply(ctx, ask, l)
		}
		<-n.tending
		if g != nil {
			return g, nil
		}
		if err != nil {
			var cni *types.Error
			if !errors.As(err, &cni) {
				err = again("pool %q: %v", ask.Pool, err)
			}
			return nil, err
		}
	}
}

func (n *Node) lockTending(ctx context.Context) error {
	select {
	case n.tending <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// give gives what is ready, or tells what is lacking.
func (n *Node) give(ask Ask) (*Grant, *lack, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed || !n.loaded {
		return nil, nil, again("pool %q: the agent is starting or ending", ask.Pool)
	}
	s := n.stores[ask.Pool]
	if s == nil {
		return nil, nil, refuse("pool %q: there is no such IPPool in the operator's namespace, or it is not known yet: make it, or name another in ipam.pool", ask.Pool)
	}
	if s.bad != nil {
		return nil, nil, refuse("pool %q: %v", ask.Pool, s.bad)
	}
	if has := s.leases[ask.Key]; has != nil {
		return &Grant{s.pool, s.spec, has.addresses}, nil, nil
	}
	p := s.pool
	if !p.Lets(ask.Namespace) {
		return nil, nil, refuse("pool %q: it is not for pods of namespace %q: add it to spec.namespaces, or use another pool", ask.Pool, ask.Namespace)
	}
	if limit, limited := p.Quota(ask.Namespace); limited {
		may, has := s.shares(ask.Namespace, limit)
		if has >= limit {
			return nil, nil, again("pool %q: namespace %s has its quota of %d interfaces", ask.Pool, ask.Namespace, limit)
		}
		if has >= may {
			return nil, &lack{share: true, limit: limit}, nil
		}
	}
	wanted, err := s.wanted(ask, n.now())
	if err != nil {
		return nil, nil, err
	}
	var addresses []netip.Addr
	for i := range p.Ranges {
		v4 := p.Ranges[i].Start.Is4()
		if want := wanted[v4]; want.IsValid() {
			if l := s.exact(want); l != nil {
				return nil, l, nil
			}
			addresses = append(addresses, want)
			continue
		}
		a, ok := s.peek(p, v4)
		if !ok {
			return nil, &lack{v4: v4}, nil
		}
		addresses = append(addresses, a)
	}
	s.take(ask.Key, ask.Namespace, addresses)
	for i := range p.Ranges {
		r := &p.Ranges[i]
		// Not with each address: who gets the next one would wait for the look at all.
		if left := len(s.queue[r.Start.Is4()]); left < enough(r) && (enough(r) < 8 || left%4 == 3) {
			n.wake()
		}
	}
	return &Grant{p, s.spec, addresses}, nil, nil
}

// wanted is the very addresses that an interface shall have: what the pod asks for, else
// what is reserved for it.
func (s *store) wanted(ask Ask, now time.Duration) (map[bool]netip.Addr, error) {
	wanted := map[bool]netip.Addr{}
	for _, ip := range ask.IPs {
		a := ip.Addr()
		if err := s.mayHave(ask, ip); err != nil {
			return nil, err
		}
		if wanted[a.Is4()].IsValid() {
			return nil, refuse("pool %q: %s and %s are asked for, and an interface gets one address of a family", s.name, wanted[a.Is4()], a)
		}
		if err := s.isFree(a, now); err != nil {
			return nil, err
		}
		wanted[a.Is4()] = a
	}
	reserved := map[bool]netip.Addr{}
	for a, r := range s.pool.Reservations {
		u := s.units[a]
		if u != nil && u.block.kind == v1alpha1.BlockReserved && u.state == inUse || !r.For(ask.Namespace, ask.Pod, ask.MAC) {
			continue
		}
		if first := reserved[a.Is4()]; !first.IsValid() || a.Less(first) {
			reserved[a.Is4()] = a
		}
	}
	for v4, a := range reserved {
		if !wanted[v4].IsValid() {
			wanted[v4] = a
		}
	}
	return wanted, nil
}

// mayHave tells whether a pod may ask for an address.
func (s *store) mayHave(ask Ask, ip netip.Prefix) error {
	a := ip.Addr()
	r := s.pool.Family(a.Is4())
	mine, reserved := s.pool.Reservations[a]
	switch {
	case r == nil || !r.Subnet.Contains(a):
		return refuse("pool %q: address %s is asked for, and is not of the pool's subnets", s.name, a)
	case ip.Bits() > 0 && ip.Bits() != r.Subnet.Bits() && ip.Bits() != a.BitLen():
		return refuse("pool %q: address %s is asked for, and the subnet is %s: leave the length out", s.name, ip, r.Subnet)
	case reserved && !mine.For(ask.Namespace, ask.Pod, ask.MAC):
		return refuse("pool %q: address %s is asked for, and reserved for somebody else", s.name, a)
	case !reserved && !r.Usable(a):
		return refuse("pool %q: address %s is asked for, and the pool does not give it out: it is the gateway, excluded or outside of start and end", s.name, a)
	}
	return nil
}

// isFree tells whether nobody of this node has the address.
func (s *store) isFree(a netip.Addr, now time.Duration) error {
	_, reserved := s.pool.Reservations[a]
	b := s.blockOf(a)
	switch u := s.units[a]; {
	case u != nil && u.state == inUse:
		return again("pool %q: address %s is asked for, and %s has it", s.name, a, s.owner(a))
	case u != nil && (u.state == held || u.state == resting && now-u.since < s.pool.Rest):
		return again("pool %q: address %s is asked for, and rests: its last interface went a short time ago", s.name, a)
	case b != nil && b.quiet && now-b.since < s.pool.Rest:
		return again("pool %q: address %s is asked for, and rests: who had it before is not known", s.name, a)
	case b != nil && !reserved && b.excluded[a]:
		return again("pool %q: address %s is asked for, and was reserved until lately: it is free again when this node has no pods on the pool", s.name, a)
	}
	return nil
}

func (s *store) owner(a netip.Addr) string {
	for key, l := range s.leases {
		if slices.Contains(l.addresses, a) {
			return key.String()
		}
	}
	return "another interface"
}

// exact is what is lacking for a very address to be ready.
func (s *store) exact(a netip.Addr) *lack {
	_, reserved := s.pool.Reservations[a]
	u := s.units[a]
	if u != nil && u.state == ready && (u.block.kind == v1alpha1.BlockReserved) == reserved {
		return nil
	}
	return &lack{v4: a.Is4(), address: a, reserved: reserved}
}

// supply brings what is lacking. The caller holds tending.
func (n *Node) supply(ctx context.Context, ask Ask, l *lack) error {
	n.mu.Lock()
	s, now := n.stores[ask.Pool], n.now()
	s.rested(s.rest(), now)
	p := s.pool
	var have *block
	if l.address.IsValid() {
		have = s.blockOf(l.address)
	}
	n.mu.Unlock()
	switch {
	case p == nil:
		return s.bad
	case l.share:
		return n.claimShare(ctx, s, ask.Namespace, l.limit)
	case l.reserved:
		if have == nil || have.kind != v1alpha1.BlockReserved {
			if err := n.claimReserved(ctx, s, p, l.address); err != nil {
				return err
			}
		}
		return n.ready(s, l.address)
	case l.address.IsValid():
		if have == nil {
			if err := n.claimBlock(ctx, s, p, l.v4, l.address); errors.Is(err, errNone) {
				return again("pool %q: address %s is asked for, and is in a block of another node", s.name, l.address)
			} else if err != nil {
				return err
			}
		}
		return n.ready(s, l.address)
	}
	chosen, err := n.fill(s, p, l.v4)
	if err != nil || chosen > 0 {
		return err
	}
	if err := n.claimBlock(ctx, s, p, l.v4, netip.Addr{}); err != nil {
		n.mu.Lock()
		s.empty, s.emptyUntil = err, now+backOff
		n.mu.Unlock()
		if errors.Is(err, errNone) {
			return again("pool %q: no %s address is left: on this node all are in use or rest, and other nodes have claimed the rest", s.name, family(l.v4))
		}
		return err
	}
	if chosen, err = n.fill(s, p, l.v4); err == nil && chosen == 0 {
		// A claim whose answer was lost is this node's again, and rests.
		err = again("pool %q: the %s addresses of this node rest", s.name, family(l.v4))
	}
	return err
}

func family(v4 bool) string {
	if v4 {
		return "IPv4"
	}
	return "IPv6"
}

func (s *store) rest() time.Duration {
	if s.pool == nil {
		return 24 * time.Hour // the most there is
	}
	return s.pool.Rest
}

// ready makes one address of ours ready.
func (n *Node) ready(s *store, a netip.Addr) error {
	n.mu.Lock()
	ok := s.markOne(a)
	n.mu.Unlock()
	if !ok {
		return again("pool %q: address %s is in use, or rests", s.name, a)
	}
	return n.written(s, []netip.Addr{a})
}

// fill makes free addresses of a family ready, and tells how many.
func (n *Node) fill(s *store, p *v1alpha1.Pool, v4 bool) (int, error) {
	n.mu.Lock()
	chosen := s.mark(p, v4, window-len(s.queue[v4]))
	n.mu.Unlock()
	if len(chosen) == 0 {
		return 0, nil
	}
	return len(chosen), n.written(s, chosen)
}

func (n *Node) written(s *store, chosen []netip.Addr) error {
	err := n.write(s)
	n.mu.Lock()
	defer n.mu.Unlock()
	s.marked(chosen, err == nil)
	return err
}

// write writes the journal of a pool. The caller holds tending, and not mu: who gets or
// gives back an address does not wait for the disk.
func (n *Node) write(s *store) error {
	n.mu.Lock()
	im := s.image(n.Boot, s.spec, n.closed)
	s.changed = false
	n.mu.Unlock()
	err := n.journal.write(s.name, im)
	if err != nil {
		n.mu.Lock()
		s.changed = true
		n.mu.Unlock()
	}
	return err
}

// Del lets the addresses of an interface rest. The interface must be gone.
func (n *Node) Del(key Key) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.stores {
		lease := s.leases[key]
		if !s.release(key, n.now()) {
			continue
		}
		for _, a := range lease.addresses {
			if u := s.units[a]; u != nil && u.block.kind == v1alpha1.BlockReserved {
				n.all = true // its pod may be awaited elsewhere
				n.wake()
			}
		}
	}
	n.undone(key)
}

// undone is told that an attachment of an earlier agent is no more.
func (n *Node) undone(key Key) {
	if !n.pending[key] {
		return
	}
	delete(n.pending, key)
	for _, s := range n.stores {
		delete(s.half, key)
		s.pending = len(n.pending) > 0
	}
	n.all = true
	n.wake()
}

// Check tells whether the interface has addresses.
func (n *Node) Check(key Key, pool string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.stores[pool]; s == nil || s.leases[key] == nil {
		return types.NewError(attach.CodeCheckFailed, fmt.Sprintf("pool %q: %s has no address of it", pool, key), "")
	}
	return nil
}

// Status tells whether an ADD could have an address, as far as the node knows.
func (n *Node) Status(pool string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.stores[pool]
	why := errors.New("there is no such IPPool")
	if s != nil {
		why = s.bad
	}
	if why == nil && s.empty != nil && n.now() < s.emptyUntil {
		for i := range s.pool.Ranges {
			if s.available(s.pool, s.pool.Ranges[i].Start.Is4(), 1) == 0 {
				why = s.empty
			}
		}
	}
	if why != nil {
		return types.NewError(types.ErrPluginNotAvailable, fmt.Sprintf("pool %q: %v", pool, why), "")
	}
	return nil
}

// Run keeps addresses in store until ctx ends, and then writes what is known.
func (n *Node) Run(ctx context.Context) error {
	timer := time.NewTicker(tick)
	defer timer.Stop()
	all := true
	for {
		n.tend(ctx, all)
		select {
		case <-ctx.Done():
			return nil
		case <-n.poke:
			n.mu.Lock()
			all, n.all = n.all, false
			n.mu.Unlock()
		case <-timer.C:
			all = true
		}
	}
}

// Close ends the giving of addresses. What was ready is free for the next agent at once.
func (n *Node) Close() error {
	n.tending <- struct{}{}
	defer func() { <-n.tending }()
	n.mu.Lock()
	n.closed = true
	stores := slices.Collect(maps.Values(n.stores))
	n.mu.Unlock()
	var errs []error
	for _, s := range stores {
		if len(s.blocks) > 0 { // nobody changes them any more
			errs = append(errs, n.write(s))
		}
	}
	return errors.Join(errs...)
}

// Leave gives back all that this node has, for an agent that does not come back. It fails
// while something is in use or rests.
func (n *Node) Leave(ctx context.Context) error {
	if err := n.lockTending(ctx); err != nil {
		return err
	}
	defer func() { <-n.tending }()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	n.mu.Lock()
	stores := slices.Collect(maps.Values(n.stores))
	n.mu.Unlock()
	var errs []error
	for _, s := range stores {
		n.mu.Lock()
		s.rested(s.rest(), n.now())
		counts := s.counts()
		blocks := slices.Collect(maps.Values(s.blocks))
		n.mu.Unlock()
		for _, b := range blocks {
			if b.quiet || counts[b] != (v1alpha1.IPBlockStatus{}) {
				errs = append(errs, fmt.Errorf("addresses of IPBlock %s are in use or rest", b.name))
			} else {
				errs = append(errs, n.giveBack(ctx, s, b))
			}
		}
	}
	return errors.Join(errs...)
}

// Tend does what is due: addresses are made ready, blocks claimed ahead and given back,
// claims compared with the API server's and attachments with the journal's.
func (n *Node) Tend(ctx context.Context) { n.tend(ctx, true) }

// tend does all, or only has addresses ready and claims ahead.
func (n *Node) tend(ctx context.Context, all bool) {
	if n.lockTending(ctx) != nil {
		return
	}
	defer func() { <-n.tending }()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if all {
		n.reconcile()
	}
	n.mu.Lock()
	closed, now := n.closed || !n.loaded, n.now()
	stores := slices.SortedFunc(maps.Values(n.stores), func(a, b *store) int { return bytes.Compare([]byte(a.name), []byte(b.name)) })
	for _, s := range stores {
		if all {
			s.rested(s.rest(), now)
		}
	}
	n.mu.Unlock()
	if closed {
		return
	}
	// What needs no API server comes first.
	for _, s := range stores {
		if err := n.refill(s); err != nil {
			n.Log.Error(err, "Cannot make addresses ready")
		}
	}
	if all && (n.audited == 0 || now-n.audited >= auditEvery) {
		if err := n.audit(ctx); err != nil {
			n.Log.Error(err, "Cannot compare the blocks of this node with the API server's")
		} else {
			n.audited = max(now, 1)
		}
	}
	for _, s := range stores {
		err := n.ahead(ctx, s)
		if all {
			err = errors.Join(err, n.keep(ctx, s))
		}
		if err != nil {
			n.mu.Lock()
			s.empty, s.emptyUntil = err, n.now()+backOff
			n.mu.Unlock()
			if !errors.Is(err, errNone) {
				n.Log.Error(err, "Cannot claim or give back addresses", "pool", s.name)
			}
		}
	}
}

// reconcile releases addresses whose attachment is not in the journal of attachments,
// which has one from before its address is asked for until after it is given back.
func (n *Node) reconcile() {
	if n.leases == nil {
		return
	}
	n.mu.Lock()
	had := map[Key]*lease{}
	for _, s := range n.stores {
		maps.Copy(had, s.leases)
	}
	n.mu.Unlock()
	recorded, half := map[Key]bool{}, map[Key]bool{}
	for _, l := range n.leases() {
		recorded[l.Key], half[l.Key] = true, !l.Done
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.stores {
		for key, l := range s.leases {
			if had[key] == l && !recorded[key] {
				n.Log.Info("Gave back the addresses of an attachment that is no more", "attachment", key, "addresses", l.addresses)
				s.release(key, n.now())
			}
		}
	}
	for key := range n.pending {
		if !half[key] {
			n.undone(key)
		}
	}
}

// refill makes addresses ready and writes the journal when that makes less of it.
func (n *Node) refill(s *store) error {
	n.mu.Lock()
	p, changed := s.pool, s.changed && len(s.blocks) > 0
	low := map[bool]bool{}
	for _, b := range s.blocks {
		if b.kind == v1alpha1.BlockAddresses {
			low[b.first.Is4()] = len(s.queue[b.first.Is4()]) <= window/2
		}
	}
	n.mu.Unlock()
	for v4, is := range low {
		if p == nil || !is {
			continue
		}
		chosen, err := n.fill(s, p, v4)
		if err != nil {
			return err
		}
		changed = changed && chosen == 0
	}
	if changed {
		return n.write(s)
	}
	return nil
}

// audit takes up claims of this node that its ledger does not have, and makes those anew
// that somebody deleted.
func (n *Node) audit(ctx context.Context) error {
	own, err := n.Claims.Own(ctx, n.Name)
	if err != nil {
		return fmt.Errorf("list the IPBlocks of this node: %w", err)
	}
	at := map[string]*v1alpha1.IPBlock{}
	n.mu.Lock()
	for i := range own {
		o := &own[i]
		at[o.Name] = o
		if n.stores[o.Spec.Pool] == nil {
			s := &store{name: o.Spec.Pool, ledger: newLedger()}
			s.pending = len(n.pending) > 0
			s.set(nil)
			n.stores[o.Spec.Pool] = s
		}
	}
	stores := slices.Collect(maps.Values(n.stores))
	n.mu.Unlock()
	var errs []error
	for _, s := range stores {
		unknown := false
		for _, o := range at {
			unknown = unknown || o.Spec.Pool == s.name && !n.knows(s, o)
		}
		if unknown {
			if _, _, err := n.others(ctx, s, ""); err != nil {
				errs = append(errs, err)
			}
		}
		n.mu.Lock()
		var gone []*block
		for _, b := range s.blocks {
			if at[b.name] == nil && !b.leaving {
				b.lost = true
				gone = append(gone, b)
			}
		}
		n.mu.Unlock()
		for _, b := range gone {
			if err := n.reclaim(ctx, s, b); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// reclaim makes a claim anew that was deleted. It may have been another node's meanwhile.
func (n *Node) reclaim(ctx context.Context, s *store, b *block) error {
	n.mu.Lock()
	s.forget(b)
	used := s.used(b)
	n.mu.Unlock()
	n.Log.Info("The claim of this node to a block was deleted by somebody", "block", b.name, "used", used)
	if !used {
		return nil
	}
	o := v1alpha1.NewBlock(s.name, n.Name, b.kind, b.first, b.size)
	for a := range b.excluded {
		o.Spec.Excluded = append(o.Spec.Excluded, a.String())
	}
	err := n.Claims.Create(ctx, o)
	if apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("IPBlock %s was deleted while interfaces of this node have addresses of it, and another node has it now: delete the pods that have them", b.name)
	}
	if err != nil {
		return fmt.Errorf("claim IPBlock %s again: %w", b.name, err)
	}
	_, _, err = n.others(ctx, s, "")
	return err
}

// keep leaves reserved addresses to their owners, gives back what is idle, and tells how
// much is used.
func (n *Node) keep(ctx context.Context, s *store) error {
	n.mu.Lock()
	p := s.pool
	back, yield, report := s.due(n.now())
	n.mu.Unlock()
	var errs []error
	for _, b := range back {
		errs = append(errs, n.giveBack(ctx, s, b))
	}
	for _, a := range yield {
		errs = append(errs, n.giveUp(ctx, s, a))
	}
	for b, status := range report {
		if err := n.Claims.Report(ctx, b.name, status); err != nil {
			errs = append(errs, fmt.Errorf("report on IPBlock %s: %w", b.name, err))
			continue
		}
		b.told, b.toldAt = status, n.now() // nobody else looks at these
	}
	if p != nil {
		errs = append(errs, n.homeless(ctx, s, p))
	} else {
		errs = append(errs, n.leave(s))
	}
	return errors.Join(errs...)
}

// due are the blocks to give back, the reserved addresses to give up, and the blocks to
// report on.
func (s *store) due(now time.Duration) (back []*block, yield []netip.Addr, report map[*block]v1alpha1.IPBlockStatus) {
	report = map[*block]v1alpha1.IPBlockStatus{}
	counts := s.counts()
	shares := map[string]int{} // that the node could do without
	going := false             // one block of addresses at a time, for what is spare is so by the others
	for _, name := range slices.Sorted(maps.Keys(s.blocks)) {
		b := s.blocks[name]
		status := counts[b]
		used := status != v1alpha1.IPBlockStatus{} || b.quiet
		if used {
			b.idle = unknown
		} else if b.idle == unknown {
			b.idle = now
		}
		idle := now - b.idle
		switch {
		case b.leaving: // the API server did not answer
			back = append(back, b)
		case b.kind == v1alpha1.BlockReserved:
			if u := s.units[b.first]; !used && (u == nil || u.state == ready) {
				back = append(back, b)
			}
		case b.kind == v1alpha1.BlockQuota:
			if s.shareIdle(b, idle, shares) {
				back = append(back, b)
			}
		case !used && (!going || len(s.leases) == 0) && (s.pool == nil || idle >= idleBlock && s.spareWithout(b)):
			going = true
			back = append(back, b)
		case status != b.told && now-b.toldAt >= tellEvery:
			report[b] = status
		}
		yield = append(yield, s.reservedIn(b)...)
	}
	return back, yield, report
}

// shareIdle tells whether a share of a quota could go. shares is what else could.
func (s *store) shareIdle(b *block, idle time.Duration, shares map[string]int) bool {
	limit, limited := 0, false
	if s.pool != nil {
		limit, limited = s.pool.Quota(b.namespace)
	}
	if _, known := shares[b.namespace]; !known {
		may, has := s.shares(b.namespace, limit)
		shares[b.namespace] = may - has
	}
	worth := b.worth(limit)
	if worth > shares[b.namespace] {
		b.idle = unknown // in use
	}
	if limited && (worth > shares[b.namespace] || idle < idleShare) {
		return false
	}
	shares[b.namespace] -= worth
	return true
}

// reservedIn are the addresses of a block that are reserved and nobody has: whoever they
// are for can claim them when this node has given them up.
func (s *store) reservedIn(b *block) (out []netip.Addr) {
	if s.pool == nil || b.kind != v1alpha1.BlockAddresses || b.quiet || b.leaving {
		return nil
	}
	for a := range s.pool.Reservations {
		if u := s.units[a]; b.has(a) && !b.excluded[a] && (u == nil || u.state == ready) {
			out = append(out, a)
		}
	}
	return out
}

// enough is how many free addresses make another block needless.
func enough(r *v1alpha1.AddressRange) int { return min(max(r.BlockSize/2, 1), spare) }

// spareWithout tells whether a block could go: the pool is not used, or there is enough in
// the others.
func (s *store) spareWithout(b *block) bool {
	if len(s.leases) == 0 {
		return true
	}
	b.leaving = true
	defer func() { b.leaving = false }()
	free := 0
	for _, a := range s.queue[b.first.Is4()] {
		if s.units[a].block == b {
			free--
		}
	}
	r := s.pool.Family(b.first.Is4())
	return r == nil || free+s.available(s.pool, b.first.Is4(), enough(r)-free) >= enough(r)
}

// ahead claims a block of each family that runs low and is in use on this node.
func (n *Node) ahead(ctx context.Context, s *store) error {
	n.mu.Lock()
	p := s.pool
	n.mu.Unlock()
	if p == nil {
		return nil
	}
	for i := range p.Ranges {
		r := &p.Ranges[i]
		v4 := r.Start.Is4()
		n.mu.Lock()
		due := len(s.leases) > 0 && n.now() >= s.emptyUntil && s.available(p, v4, enough(r)) < enough(r)
		n.mu.Unlock()
		if !due {
			continue
		}
		if err := n.claimBlock(ctx, s, p, v4, netip.Addr{}); err != nil {
			return err
		}
		if _, err := n.fill(s, p, v4); err != nil {
			return err
		}
	}
	return nil
}

// homeless claims the blocks of addresses that interfaces have and this node does not
// hold: the journal was lost, or an earlier agent's claim.
func (n *Node) homeless(ctx context.Context, s *store, p *v1alpha1.Pool) error {
	n.mu.Lock()
	var without []netip.Addr
	for _, l := range s.leases {
		for _, a := range l.addresses {
			if s.units[a] == nil && p.Family(a.Is4()) != nil {
				without = append(without, a)
			}
		}
	}
	n.mu.Unlock()
	for _, a := range without {
		var err error
		if _, reserved := p.Reservations[a]; reserved {
			err = n.claimReserved(ctx, s, p, a)
		} else {
			err = n.claimBlock(ctx, s, p, a.Is4(), a)
		}
		if err != nil {
			return fmt.Errorf("an interface of this node has %s: %w", a, err)
		}
	}
	return nil
}

// leave forgets a pool that is gone and of which nothing is left here.
func (n *Node) leave(s *store) error {
	n.mu.Lock()
	if s.spec != nil || len(s.blocks) > 0 || len(s.leases) > 0 {
		n.mu.Unlock()
		return nil
	}
	delete(n.stores, s.name)
	n.mu.Unlock()
	return n.journal.remove(s.name)
}
