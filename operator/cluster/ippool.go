package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	"github.com/sluice-network/sluice/operator/cluster/admission"
)

const (
	byPool = "spec.pool" // index of IPBlocks, and their field at the API server
	// poolPause is the least time between two statuses of a pool that tell numbers: agents
	// of all nodes are told of each.
	poolPause = 10 * time.Second
	// poolNodes is how many nodes and namespaces a status tells of.
	poolNodes = 100
)

// ipPool tells in each IPPool how much of it is used, and frees what nodes had that are
// gone.
type ipPool struct {
	client.Client
	live      client.Reader // not cached: before a block is freed
	namespace string
	events    events.EventRecorder
	now       func() time.Time
	// Of one worker alone: when a status was written, by pool, and since when the node of a
	// block has been gone. An operator that comes later waits anew.
	wrote map[string]time.Time
	gone  map[types.UID]time.Time
}

func (r *ipPool) setup(mgr ctrl.Manager) error {
	r.now, r.wrote, r.gone = time.Now, map[string]time.Time{}, map[types.UID]time.Time{}
	err := mgr.GetFieldIndexer().IndexField(context.Background(), &sluicev1.IPBlock{}, byPool, func(o client.Object) []string {
		return []string{o.(*sluicev1.IPBlock).Spec.Pool}
	})
	if err != nil {
		return fmt.Errorf("index IPBlocks: %w", err)
	}
	comesOrGoes := predicate.Funcs{UpdateFunc: func(event.UpdateEvent) bool { return false }}
	b := ctrl.NewControllerManagedBy(mgr).Named("ippool").
		For(&sluicev1.IPPool{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&sluicev1.IPBlock{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			return []reconcile.Request{{NamespacedName: client.ObjectKey{Namespace: o.GetNamespace(), Name: o.(*sluicev1.IPBlock).Spec.Pool}}}
		})).
		WatchesMetadata(nodeMetadata(), handler.EnqueueRequestsFromMapFunc(r.ofNode), builder.WithPredicates(comesOrGoes))
	return watchRanges(mgr, b, everyAfter(everyPool)).Complete(r)
}

// ofNode are the pools that a node has blocks of.
func (r *ipPool) ofNode(ctx context.Context, node client.Object) []reconcile.Request {
	list := &sluicev1.IPBlockList{}
	if err := r.List(ctx, list, client.InNamespace(r.namespace), client.UnsafeDisableDeepCopy); err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "Lost an event", "node", node.GetName())
	}
	pools := map[string]bool{}
	for i := range list.Items {
		if list.Items[i].Spec.Node == node.GetName() {
			pools[list.Items[i].Spec.Pool] = true
		}
	}
	var out []reconcile.Request
	for name := range pools {
		out = append(out, reconcile.Request{NamespacedName: client.ObjectKey{Namespace: r.namespace, Name: name}})
	}
	return out
}

// everyPool stands for all pools, when the cluster uses other addresses than before.
var everyPool reconcile.Request

// Reconcile frees blocks of nodes that are gone and writes the status of one pool.
func (r *ipPool) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	if request == everyPool {
		return r.reconcileAll(ctx)
	}
	list := &sluicev1.IPBlockList{}
	// They are only read.
	if err := r.List(ctx, list, client.InNamespace(r.namespace), client.MatchingFields{byPool: request.Name}, client.UnsafeDisableDeepCopy); err != nil {
		return ctrl.Result{}, fmt.Errorf("list the IPBlocks of pool %s: %w", request.Name, err)
	}
	pool := &sluicev1.IPPool{}
	err := r.Get(ctx, request.NamespacedName, pool)
	if client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("read IPPool %s: %w", request.Name, err)
	}
	is := err == nil
	rest := time.Minute
	parsed, errs := pool.Spec.Parse()
	if parsed != nil {
		rest = parsed.Rest
	}
	orphans, again, err := r.free(ctx, list.Items, rest)
	if !is {
		delete(r.wrote, request.Name)
		return ctrl.Result{RequeueAfter: again}, err
	}
	status, unready, degraded, fine := usage(pool, parsed, list.Items, orphans)
	if len(errs) == 0 {
		var bad error
		if errs, bad = admission.PoolOverlaps(ctx, r, pool); bad != nil {
			return ctrl.Result{}, bad
		}
	}
	if len(errs) > 0 {
		unready = why{"PoolInvalid", errs.ToAggregate().Error()}
		degraded = unready
	}
	next, bad := r.report(ctx, pool, status, unready, degraded, fine)
	if next > 0 && (again == 0 || next < again) {
		again = next
	}
	return ctrl.Result{RequeueAfter: again}, errors.Join(err, bad)
}

func (r *ipPool) reconcileAll(ctx context.Context) (all ctrl.Result, err error) {
	pools := &sluicev1.IPPoolList{}
	if err := r.List(ctx, pools, client.InNamespace(r.namespace), client.UnsafeDisableDeepCopy); err != nil {
		return ctrl.Result{}, fmt.Errorf("list IPPools: %w", err)
	}
	for i := range pools.Items {
		one, bad := r.Reconcile(ctx, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&pools.Items[i])})
		err = errors.Join(err, bad)
		if one.RequeueAfter > 0 && (all.RequeueAfter == 0 || one.RequeueAfter < all.RequeueAfter) {
			all = one
		}
	}
	return all, err
}

// free deletes the claims of nodes that are gone, and have been for the rest: whoever
// deletes a Node says that nothing runs there any more. It tells of which nodes there are
// still some, and when to look again.
func (r *ipPool) free(ctx context.Context, blocks []sluicev1.IPBlock, rest time.Duration) (orphans []string, again time.Duration, err error) {
	nodes := map[string]bool{}
	for i := range blocks {
		b := &blocks[i]
		there, known := nodes[b.Spec.Node]
		if !known {
			bad := r.Get(ctx, client.ObjectKey{Name: b.Spec.Node}, nodeMetadata())
			if client.IgnoreNotFound(bad) != nil {
				return nil, 0, fmt.Errorf("read node %s: %w", b.Spec.Node, bad)
			}
			there = bad == nil
			nodes[b.Spec.Node] = there
			if !there {
				orphans = append(orphans, b.Spec.Node)
			}
		}
		if there {
			delete(r.gone, b.UID)
			continue
		}
		since, waits := r.gone[b.UID]
		if !waits {
			since = r.now()
			r.gone[b.UID] = since
		}
		if left := rest - r.now().Sub(since); left > 0 {
			if left = max(left, time.Second); again == 0 || left < again {
				again = left
			}
			continue
		}
		// The cache may not have a node yet that has just come.
		if bad := r.live.Get(ctx, client.ObjectKey{Name: b.Spec.Node}, nodeMetadata()); !apierrors.IsNotFound(bad) {
			err = errors.Join(err, bad)
			continue
		}
		bad := r.Delete(ctx, b.DeepCopy(), client.Preconditions{UID: &b.UID})
		if client.IgnoreNotFound(bad) != nil {
			err = errors.Join(err, fmt.Errorf("delete IPBlock %s of node %s, which is gone: %w", b.Name, b.Spec.Node, bad))
			continue
		}
		delete(r.gone, b.UID)
		ctrl.LoggerFrom(ctx).Info("Freed what a node had that is gone", "block", b.Name, "node", b.Spec.Node)
	}
	return orphans, again, err
}

// usage adds up what nodes hold of a pool, whose spec may not be valid.
func usage(pool *sluicev1.IPPool, parsed *sluicev1.Pool, blocks []sluicev1.IPBlock, orphans []string) (s sluicev1.IPPoolStatus, unready, degraded, fine why) {
	s = sluicev1.IPPoolStatus{ObservedGeneration: pool.Generation, Claims: len(blocks)}
	nodes, quotas := map[string]*sluicev1.IPNodeUsage{}, map[string]*sluicev1.IPQuotaUsage{}
	families := map[bool]*sluicev1.IPUsage{}
	made := map[bool]uint64{} // blocks of addresses
	spent := map[bool]int64{} // of total: in use or resting, and not reserved
	if parsed != nil {
		for i := range parsed.Ranges {
			total := parsed.Ranges[i].Count()
			u := &sluicev1.IPUsage{}
			for a := range parsed.Reservations {
				if a.BitLen() == parsed.Ranges[i].Start.BitLen() {
					u.Reserved++
				}
				if parsed.Ranges[i].Usable(a) {
					total--
				}
			}
			u.Total = clamp(total)
			families[parsed.Ranges[i].Start.Is4()] = u
		}
		s.IPv4, s.IPv6 = families[true], families[false]
	}
	for i := range blocks {
		b := &blocks[i].Spec
		used := &blocks[i].Status
		if b.Kind == sluicev1.BlockQuota {
			if parsed == nil {
				continue
			}
			limit, _ := parsed.Quota(b.Namespace)
			if quotas[b.Namespace] == nil {
				quotas[b.Namespace] = &sluicev1.IPQuotaUsage{Namespace: b.Namespace, Interfaces: limit}
			}
			first, size := sluicev1.Share(b.Index)
			quotas[b.Namespace].Claimed += min(max(limit-first, 0), size)
			continue
		}
		n := nodes[b.Node]
		if n == nil {
			n = &sluicev1.IPNodeUsage{Name: b.Node}
			nodes[b.Node] = n
		}
		n.Blocks++
		n.Allocated += int64(used.Allocated)
		first, err := netip.ParseAddr(b.First)
		if err != nil || families[first.Is4()] == nil {
			continue
		}
		u := families[first.Is4()]
		u.Allocated += int64(used.Allocated)
		u.Resting += int64(used.Resting)
		if b.Kind == sluicev1.BlockAddresses {
			made[first.Is4()]++
			spent[first.Is4()] += int64(used.Allocated) + int64(used.Resting)
			u.Claimed = clamp(uint64(u.Claimed) + usable(parsed.Family(first.Is4()), first, b))
		}
	}
	for _, n := range slices.SortedFunc(maps.Values(nodes), func(a, b *sluicev1.IPNodeUsage) int {
		return cmp.Or(cmp.Compare(b.Blocks, a.Blocks), strings.Compare(a.Name, b.Name))
	}) {
		s.Nodes = append(s.Nodes, *n)
	}
	for _, q := range slices.SortedFunc(maps.Values(quotas), func(a, b *sluicev1.IPQuotaUsage) int { return strings.Compare(a.Namespace, b.Namespace) }) {
		s.Quotas = append(s.Quotas, *q)
	}
	fine = why{"PoolReady", fmt.Sprintf("%d nodes hold blocks", len(s.Nodes))}
	s.Nodes, s.Quotas = s.Nodes[:min(len(s.Nodes), poolNodes)], s.Quotas[:min(len(s.Quotas), poolNodes)]
	for _, v4 := range []bool{true, false} {
		u := families[v4]
		if u == nil {
			continue
		}
		switch name := map[bool]string{true: "IPv4", false: "IPv6"}[v4]; {
		case u.Total > 0 && spent[v4] >= u.Total: // a pool may have reservations alone
			unready = why{"PoolExhausted", fmt.Sprintf("all %d %s addresses are in use or rest: delete pods, or make another pool for some networks", u.Total, name)}
			degraded = unready
		case made[v4] >= parsed.Family(v4).Blocks() && degraded == why{}:
			degraded = why{"AllBlocksClaimed", fmt.Sprintf("nodes have claimed all %d %s blocks: a node without free addresses gets none until another gives a block back, which takes 5 minutes after its last address went; a pool with a smaller blockSize is shared better", made[v4], name)}
		}
	}
	if slices.Sort(orphans); len(orphans) > 0 && degraded == (why{}) {
		degraded = why{"NodesGone", fmt.Sprintf("nodes %s are gone and held blocks, which are free after a rest", abbreviate(orphans))}
	}
	return s, unready, degraded, fine
}

// usable counts the addresses of a block that are given out.
func usable(r *sluicev1.AddressRange, first netip.Addr, b *sluicev1.IPBlockSpec) uint64 {
	n := r.CountIn(first, b.Size)
	for _, text := range b.Excluded {
		// What is reserved may be none of them anyway: exclude and start leave it out.
		if a, err := netip.ParseAddr(text); err == nil && r.Usable(a) && n > 0 {
			n--
		}
	}
	return n
}

func clamp(n uint64) int64 { return int64(min(n, math.MaxInt64)) }

// report writes the status. Numbers alone are told no more often than every poolPause; what
// else changed is told at once, also that the pool is in use, as then it cannot be deleted.
func (r *ipPool) report(ctx context.Context, pool *sluicev1.IPPool, s sluicev1.IPPoolStatus, unready, degraded, fine why) (next time.Duration, err error) {
	all, own := merge(pool.Status.Conditions, conditions(pool.Generation, unready, why{}, degraded, fine))
	s.Conditions = all
	if equality.Semantic.DeepEqual(s, pool.Status) {
		return 0, nil
	}
	told := (s.Claims > 0) == (pool.Status.Claims > 0) && s.ObservedGeneration == pool.Status.ObservedGeneration &&
		slices.EqualFunc(all, pool.Status.Conditions, func(a, b metav1.Condition) bool { return a.Status == b.Status && a.Reason == b.Reason })
	if left := poolPause - r.now().Sub(r.wrote[pool.Name]); told && left > 0 {
		return left, nil
	}
	s.Conditions = own
	if err := writeStatus(ctx, r, sluicev1.SchemeGroupVersion.WithKind("IPPool"), client.ObjectKeyFromObject(pool), &s); err != nil {
		return 0, client.IgnoreNotFound(err)
	}
	r.wrote[pool.Name] = r.now()
	reportTransition(r.events, pool, pool.Status.Conditions, all)
	return 0, nil
}
