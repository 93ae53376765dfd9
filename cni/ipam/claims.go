package ipam

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/sluice-network/sluice/apis/sluice/v1alpha1"
)

// Claims are the IPBlocks at the API server. What is read is what was last written, by
// whomever. Errors are those of the API server.
type Claims interface {
	// Of are all of a pool, Own all of a node.
	Of(ctx context.Context, pool string) ([]v1alpha1.IPBlock, error)
	Own(ctx context.Context, node string) ([]v1alpha1.IPBlock, error)
	Get(ctx context.Context, name string) (*v1alpha1.IPBlock, error)
	// Create fills in what the API server adds.
	Create(ctx context.Context, block *v1alpha1.IPBlock) error
	// Update writes the spec of the very object that was read.
	Update(ctx context.Context, block *v1alpha1.IPBlock) error
	// Delete deletes the object with this UID. It is no error that there is none.
	Delete(ctx context.Context, name, uid string) error
	// Report writes the status.
	Report(ctx context.Context, name string, status v1alpha1.IPBlockStatus) error
}

// errNone is that a pool has no block, address or share left that this node could claim.
var errNone = errors.New("nothing is left")

func blockFrom(o *v1alpha1.IPBlock) (*block, error) {
	b := &block{
		name: o.Name, uid: string(o.UID), kind: o.Spec.Kind, size: o.Spec.Size, namespace: o.Spec.Namespace, index: o.Spec.Index,
		excluded: map[netip.Addr]bool{},
	}
	if b.kind == v1alpha1.BlockQuota {
		return b, nil
	}
	var err error
	if b.first, err = netip.ParseAddr(o.Spec.First); err != nil {
		return nil, fmt.Errorf("IPBlock %s: spec.first: %w", o.Name, err)
	}
	for _, text := range o.Spec.Excluded {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, fmt.Errorf("IPBlock %s: spec.excluded: %w", o.Name, err)
		}
		b.excluded[a] = true
	}
	return b, nil
}

// overlaps tells whether two blocks have an address in common.
func overlaps(a, b *block) bool {
	return b.kind != v1alpha1.BlockQuota && a.kind != v1alpha1.BlockQuota && (a.has(b.first) || b.has(a.first))
}

// others reads the blocks of a pool. Those of this node that the ledger does not have,
// because an answer was lost or a journal was, it takes up, but for one.
func (n *Node) others(ctx context.Context, s *store, but string) (all []*block, owner map[string]string, err error) {
	list, err := n.Claims.Of(ctx, s.name)
	if err != nil {
		return nil, nil, fmt.Errorf("list the IPBlocks of pool %s: %w", s.name, err)
	}
	owner = map[string]string{}
	for i := range list {
		b, err := blockFrom(&list[i])
		if err != nil {
			return nil, nil, err
		}
		all, owner[b.name] = append(all, b), list[i].Spec.Node
	}
	for i := range list {
		if o := &list[i]; o.Spec.Node == n.Name && o.Name != but && !n.knows(s, o) {
			if err := n.takeUp(ctx, s, o, all[i], all, owner); err != nil {
				return nil, nil, err
			}
		}
	}
	return all, owner, nil
}

func (n *Node) knows(s *store, o *v1alpha1.IPBlock) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	b := s.blocks[o.Name]
	return b != nil && b.uid == string(o.UID)
}

// takeUp adopts a claim of this node that the ledger does not have, or gives it back.
func (n *Node) takeUp(ctx context.Context, s *store, o *v1alpha1.IPBlock, b *block, all []*block, owner map[string]string) error {
	n.mu.Lock()
	if old := s.blocks[b.name]; old != nil {
		s.forget(old)
	}
	used := s.used(b)
	n.mu.Unlock()
	if b.kind == v1alpha1.BlockReserved && !used {
		// Whether the address may be used has not been looked at.
		if err := n.Claims.Delete(ctx, b.name, b.uid); err != nil {
			return fmt.Errorf("give back IPBlock %s: %w", b.name, err)
		}
		return nil
	}
	return n.settle(ctx, s, o, b, false, all, owner)
}

// claimBlock claims a block of a family: the one an address is in, or any, when the
// address is not valid. Where the search begins depends on the node, so that not all try
// for the same ones.
func (n *Node) claimBlock(ctx context.Context, s *store, p *v1alpha1.Pool, v4 bool, want netip.Addr) error {
	r := p.Family(v4)
	all, _, err := n.others(ctx, s, "")
	if err != nil {
		return err
	}
	const most = 1 << 20 // blocks looked at in turn
	h := fnv.New32a()
	h.Write([]byte(n.Name))
	begin, count := uint64(h.Sum32())%min(r.Blocks(), 4096), min(r.Blocks(), most)
	for i := range count {
		first := r.Nth((begin + i) % r.Blocks())
		if want.IsValid() {
			first = r.Block(want)
			if i > 0 {
				break
			}
		}
		o := v1alpha1.NewBlock(s.name, n.Name, v1alpha1.BlockAddresses, first, r.BlockSize)
		b, err := blockFrom(o)
		if err != nil {
			return err
		}
		if free, reserved := room(p, r, b); !free || taken(all, b) {
			continue
		} else if len(reserved) > 0 {
			for _, a := range reserved {
				b.excluded[a] = true
				o.Spec.Excluded = append(o.Spec.Excluded, a.String())
			}
		}
		err = n.Claims.Create(ctx, o)
		if apierrors.IsAlreadyExists(err) {
			all = append(all, b) // somebody was faster
			continue
		}
		if err != nil {
			return fmt.Errorf("claim IPBlock %s: %w", o.Name, err)
		}
		b.uid = string(o.UID)
		now, owner, err := n.others(ctx, s, b.name)
		if err != nil {
			return err
		}
		return n.settle(ctx, s, o, b, true, now, owner)
	}
	return errNone
}

// room tells whether a block has an address to give out, and which are reserved.
func room(p *v1alpha1.Pool, r *v1alpha1.AddressRange, b *block) (free bool, reserved []netip.Addr) {
	for a := range p.Reservations {
		if b.has(a) {
			reserved = append(reserved, a)
		}
	}
	for i := range b.size {
		a := plus(b.first, i)
		if _, is := p.Reservations[a]; !is && r.Usable(a) {
			return true, reserved
		}
	}
	return false, reserved
}

func taken(all []*block, b *block) bool {
	for _, o := range all {
		if o.name == b.name || o.kind == v1alpha1.BlockAddresses && overlaps(o, b) {
			return true
		}
	}
	return false
}

// settle adopts a block of ours, after looking at what was claimed by the time that it was
// there: a reserved address is left to its owner; to another block, of a former pool of
// this name, this one yields.
func (n *Node) settle(ctx context.Context, s *store, o *v1alpha1.IPBlock, b *block, fresh bool, all []*block, owner map[string]string) error {
	grown := false
	for _, other := range all {
		switch {
		case b.kind != v1alpha1.BlockAddresses || other.name == b.name || !overlaps(other, b):
		case other.kind == v1alpha1.BlockReserved && !b.excluded[other.first]:
			b.excluded[other.first], grown = true, true
			o.Spec.Excluded = append(o.Spec.Excluded, other.first.String())
		case other.kind == v1alpha1.BlockAddresses && owner[other.name] != n.Name:
			if err := n.Claims.Delete(ctx, b.name, b.uid); err != nil {
				return fmt.Errorf("give back IPBlock %s, which overlaps %s of node %s: %w", b.name, other.name, owner[other.name], err)
			}
			return fmt.Errorf("IPBlock %s overlaps %s of node %s, of an earlier pool of this name: it is free when that node has given it back", b.name, other.name, owner[other.name])
		}
	}
	if grown {
		if err := n.Claims.Update(ctx, o); err != nil {
			return fmt.Errorf("exclude reserved addresses from IPBlock %s: %w", b.name, err)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s.adopt(b, fresh, n.now())
	return nil
}

// claimReserved claims a reserved address.
func (n *Node) claimReserved(ctx context.Context, s *store, p *v1alpha1.Pool, a netip.Addr) error {
	o := v1alpha1.NewBlock(s.name, n.Name, v1alpha1.BlockReserved, a, 1)
	err := n.Claims.Create(ctx, o)
	if apierrors.IsAlreadyExists(err) {
		o, err = n.Claims.Get(ctx, o.Name)
		if err == nil && o.Spec.Node != n.Name {
			return fmt.Errorf("reserved address %s is still on node %s: it is free when the interface there is gone: %w", a, o.Spec.Node, errNone)
		}
	}
	if err != nil {
		return fmt.Errorf("claim reserved address %s: %w", a, err)
	}
	// Who has the block that the address is in must have said that it does not give it out.
	name := ""
	if r := p.Family(a.Is4()); r != nil {
		name = v1alpha1.NewBlock(s.name, n.Name, v1alpha1.BlockAddresses, r.Block(a), r.BlockSize).Name
	}
	around, err := n.Claims.Get(ctx, name)
	switch {
	case apierrors.IsNotFound(err):
	case err != nil:
		return fmt.Errorf("read IPBlock %s: %w", name, err)
	case !excludes(around, a):
		if around.Spec.Node != n.Name {
			return fmt.Errorf("reserved address %s is in block %s of node %s, which has not given it up yet: it may be in use there: %w", a, name, around.Spec.Node, errNone)
		}
		if err := n.giveUp(ctx, s, a); err != nil {
			return err
		}
	}
	b, err := blockFrom(o)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if have := s.blocks[b.name]; have == nil || have.uid != b.uid {
		s.adopt(b, !s.pending, n.now()) // its only owner needs no rest
	}
	return nil
}

func excludes(o *v1alpha1.IPBlock, a netip.Addr) bool {
	for _, text := range o.Spec.Excluded {
		if x, err := netip.ParseAddr(text); err == nil && x == a {
			return true
		}
	}
	return false
}

// giveUp excludes an address from the block of ours that it is in: first here, then in
// the journal, and then others are told.
func (n *Node) giveUp(ctx context.Context, s *store, a netip.Addr) error {
	n.mu.Lock()
	var b *block
	for _, o := range s.blocks {
		if o.kind == v1alpha1.BlockAddresses && o.has(a) {
			b = o
		}
	}
	if b == nil || !b.excluded[a] && !s.exclude(b, a) {
		n.mu.Unlock()
		return fmt.Errorf("reserved address %s is in use on this node, or rests: %w", a, errNone)
	}
	n.mu.Unlock()
	if err := n.write(s); err != nil {
		return err
	}
	o, err := n.Claims.Get(ctx, b.name)
	if err == nil && !excludes(o, a) {
		o.Spec.Excluded = append(o.Spec.Excluded, a.String())
		err = n.Claims.Update(ctx, o)
	}
	if err != nil {
		return fmt.Errorf("exclude %s from IPBlock %s: %w", a, b.name, err)
	}
	return nil
}

// claimShare claims a share of a namespace's quota.
func (n *Node) claimShare(ctx context.Context, s *store, namespace string, limit int) error {
	all, _, err := n.others(ctx, s, "")
	if err != nil {
		return err
	}
	names := map[string]bool{}
	for _, b := range all {
		names[b.name] = true
	}
	for i := 0; ; i++ {
		if first, _ := v1alpha1.Share(i); first >= limit {
			return fmt.Errorf("namespace %s has its quota of %d interfaces, or other nodes hold what is left of it: %w", namespace, limit, errNone)
		}
		o := v1alpha1.NewShare(s.name, n.Name, namespace, i)
		if names[o.Name] {
			continue
		}
		err := n.Claims.Create(ctx, o)
		if apierrors.IsAlreadyExists(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("claim share %s of the quota: %w", o.Name, err)
		}
		b, err := blockFrom(o)
		if err != nil {
			return err
		}
		n.mu.Lock()
		s.adopt(b, true, n.now())
		n.mu.Unlock()
		return nil
	}
}

// giveBack returns a block that is not used: first it is out of the journal.
func (n *Node) giveBack(ctx context.Context, s *store, b *block) error {
	n.mu.Lock()
	b.leaving, s.changed = true, true
	n.mu.Unlock()
	if err := n.write(s); err != nil {
		return err
	}
	if err := n.Claims.Delete(ctx, b.name, b.uid); err != nil {
		return fmt.Errorf("give back IPBlock %s: %w", b.name, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s.forget(b)
	return nil
}
