package cluster

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
)

func makeIPPool(t *testing.T, name string, spec sluicev1.IPPoolSpec) *sluicev1.IPPool {
	t.Helper()
	pool := &sluicev1.IPPool{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: name}, Spec: spec}
	if err := api.Create(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	return pool
}

func makeBlock(t *testing.T, b *sluicev1.IPBlock, status sluicev1.IPBlockStatus) *sluicev1.IPBlock {
	t.Helper()
	b.Namespace = operatorNamespace
	if err := api.Create(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	patch := fmt.Appendf(nil, `{"status":{"allocated":%d,"resting":%d}}`, status.Allocated, status.Resting)
	if err := api.Status().Patch(t.Context(), b, client.RawPatch(types.MergePatchType, patch)); err != nil {
		t.Fatal(err)
	}
	return b
}

// poolSays waits for a pool's status.
func poolSays(t *testing.T, pool *sluicev1.IPPool, check func(s sluicev1.IPPoolStatus, ready, degraded string) error) {
	t.Helper()
	eventually(t, func() error {
		if err := api.Get(t.Context(), client.ObjectKeyFromObject(pool), pool); err != nil {
			return err
		}
		reason := func(kind string) string {
			if c := meta.FindStatusCondition(pool.Status.Conditions, kind); c != nil {
				return string(c.Status) + " " + c.Reason + ": " + c.Message
			}
			return "none"
		}
		return check(pool.Status, reason("Ready"), reason("Degraded"))
	})
}

func TestPoolTellsItsUse(t *testing.T) {
	needAPI(t)
	for _, name := range []string{"ipam-1", "ipam-2"} {
		makeNode(t, name, nil)
	}
	pool := makeIPPool(t, "used", sluicev1.IPPoolSpec{
		IPv4:         &sluicev1.IPRange{CIDR: "10.1.0.0/28", Gateway: "10.1.0.1", BlockSize: 8},
		IPv6:         &sluicev1.IPRange{CIDR: "fd00::/64"},
		Reservations: []sluicev1.IPReservation{{Address: "10.1.0.5", Namespace: "a", Pod: "p"}},
		Quotas:       []sluicev1.IPQuota{{Namespace: "a", Interfaces: 3}},
	})
	poolSays(t, pool, func(s sluicev1.IPPoolStatus, ready, degraded string) error {
		if s.IPv4 == nil || s.IPv4.Total != 12 || s.IPv4.Reserved != 1 || s.IPv6.Total != 1<<63-1 || !strings.HasPrefix(ready, "True PoolReady") {
			return fmt.Errorf("of an unused pool it says %+v %+v, Ready %s", s.IPv4, s.IPv6, ready)
		}
		return nil
	})
	first := sluicev1.NewBlock("used", "ipam-1", sluicev1.BlockAddresses, netip.MustParseAddr("10.1.0.0"), 8)
	first.Spec.Excluded = []string{"10.1.0.5"}
	blocks := []*sluicev1.IPBlock{
		makeBlock(t, first, sluicev1.IPBlockStatus{Allocated: 4, Resting: 1}),
		makeBlock(t, sluicev1.NewBlock("used", "ipam-2", sluicev1.BlockReserved, netip.MustParseAddr("10.1.0.5"), 1), sluicev1.IPBlockStatus{}),
		makeBlock(t, sluicev1.NewShare("used", "ipam-2", "a", 2), sluicev1.IPBlockStatus{}),
	}
	poolSays(t, pool, func(s sluicev1.IPPoolStatus, ready, _ string) error {
		want := sluicev1.IPUsage{Total: 12, Claimed: 5, Allocated: 4, Resting: 1, Reserved: 1}
		if s.Claims != 3 || *s.IPv4 != want || len(s.Nodes) != 2 || s.Nodes[0] != (sluicev1.IPNodeUsage{Name: "ipam-1", Blocks: 1, Allocated: 4}) ||
			len(s.Quotas) != 1 || s.Quotas[0] != (sluicev1.IPQuotaUsage{Namespace: "a", Interfaces: 3, Claimed: 1}) {
			return fmt.Errorf("it says %d claims, %+v, nodes %+v, quotas %+v", s.Claims, *s.IPv4, s.Nodes, s.Quotas)
		}
		return nil
	})
	// Pods have its addresses: it stays.
	if err := refusedWith(api.Delete(t.Context(), pool), "IPPool used is in use: nodes hold 3 blocks of it"); err != nil {
		t.Error(err)
	}
	blocks = append(blocks, makeBlock(t, sluicev1.NewBlock("used", "ipam-2", sluicev1.BlockAddresses, netip.MustParseAddr("10.1.0.8"), 8), sluicev1.IPBlockStatus{Allocated: 7}))
	poolSays(t, pool, func(_ sluicev1.IPPoolStatus, ready, degraded string) error {
		if !strings.HasPrefix(ready, "False PoolExhausted: all 12 IPv4 addresses are in use or rest") || !strings.HasPrefix(degraded, "True PoolExhausted") {
			return fmt.Errorf("Ready is %s, Degraded %s", ready, degraded)
		}
		return nil
	})
	eventually(t, func() error { return hasEvent(t, "IPPool", "used", "PoolExhausted") })
	for _, b := range blocks {
		if err := api.Delete(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	poolSays(t, pool, func(s sluicev1.IPPoolStatus, ready, _ string) error {
		if s.Claims > 0 || !strings.HasPrefix(ready, "True") {
			return fmt.Errorf("%d claims, Ready %s", s.Claims, ready)
		}
		return nil
	})
	if err := api.Delete(t.Context(), pool); err != nil {
		t.Errorf("a pool that is not used: %v", err)
	}
}

// Reserved addresses, which may lie where none is given out otherwise, are no part of those that
// are claimed or spent.
func TestReservedAddressesAreNotAmongTheOthers(t *testing.T) {
	pool := &sluicev1.IPPool{Spec: sluicev1.IPPoolSpec{IPv4: &sluicev1.IPRange{CIDR: "10.1.0.0/28", Exclude: []string{"10.1.0.0/29"}, BlockSize: 8}}}
	for _, a := range []string{"10.1.0.1", "10.1.0.2", "10.1.0.9"} {
		pool.Spec.Reservations = append(pool.Spec.Reservations, sluicev1.IPReservation{Address: a, Namespace: "a", Pod: "p" + a})
	}
	block := func(kind sluicev1.IPBlockKind, first string, size, allocated int, excluded ...string) sluicev1.IPBlock {
		b := sluicev1.NewBlock("p", "n", kind, netip.MustParseAddr(first), size)
		b.Spec.Excluded, b.Status.Allocated = excluded, allocated
		return *b
	}
	low, high := block(sluicev1.BlockAddresses, "10.1.0.0", 8, 0, "10.1.0.1", "10.1.0.2"), block(sluicev1.BlockAddresses, "10.1.0.8", 8, 5, "10.1.0.9")
	reserved := block(sluicev1.BlockReserved, "10.1.0.1", 1, 1)
	for name, c := range map[string]struct {
		blocks []sluicev1.IPBlock
		want   sluicev1.IPUsage
		ready  bool
	}{
		"a block of excluded ones alone": {[]sluicev1.IPBlock{low}, sluicev1.IPUsage{Total: 6, Reserved: 3}, true},
		"one address is left":            {[]sluicev1.IPBlock{low, high, reserved}, sluicev1.IPUsage{Total: 6, Claimed: 6, Allocated: 6, Reserved: 3}, true},
		"none is left":                   {[]sluicev1.IPBlock{block(sluicev1.BlockAddresses, "10.1.0.8", 8, 6, "10.1.0.9")}, sluicev1.IPUsage{Total: 6, Claimed: 6, Allocated: 6, Reserved: 3}, false},
	} {
		parsed, errs := pool.Spec.Parse()
		if len(errs) > 0 {
			t.Fatal(errs)
		}
		s, unready, _, _ := usage(pool, parsed, c.blocks, nil)
		if *s.IPv4 != c.want || (unready == why{}) != c.ready {
			t.Errorf("%s: %+v, not %+v, and %q", name, *s.IPv4, c.want, unready)
		}
	}
}

// A pool that was there when the cluster comes to use its addresses tells so, until the cluster
// gives them up.
func TestPoolInTheClustersAddresses(t *testing.T) {
	needAPI(t)
	pool := makeIPPool(t, "overrun", sluicev1.IPPoolSpec{IPv4: &sluicev1.IPRange{CIDR: "198.18.0.0/24"}})
	defer func() { _ = api.Delete(t.Context(), pool) }()
	says := func(want string) {
		t.Helper()
		poolSays(t, pool, func(_ sluicev1.IPPoolStatus, ready, _ string) error {
			if !strings.HasPrefix(ready, want) {
				return fmt.Errorf("Ready is %s, want %s", ready, want)
			}
			return nil
		})
	}
	says("True PoolReady")
	for use, object := range map[string]client.Object{
		"the pods of node overrun":       &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "overrun"}, Spec: corev1.NodeSpec{PodCIDR: "198.18.0.64/26", PodCIDRs: []string{"198.18.0.64/26"}}},
		"Services (ServiceCIDR overrun)": &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "overrun"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"198.18.0.64/26"}}},
	} {
		if err := api.Create(t.Context(), object); err != nil {
			t.Fatal(err)
		}
		says(`False PoolInvalid: spec: Invalid value: "198.18.0.0/24": it overlaps 198.18.0.64/26, which the cluster uses for ` + use)
		if err := api.Delete(t.Context(), object); err != nil {
			t.Fatal(err)
		}
		// Nothing but its owner, which no test runs, takes off a finalizer of the API server's.
		if err := api.Patch(t.Context(), object, client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`))); client.IgnoreNotFound(err) != nil {
			t.Fatal(err)
		}
		says("True PoolReady")
	}
}

func hasEvent(t *testing.T, kind, name, reason string) error {
	list := &corev1.EventList{}
	if err := api.List(t.Context(), list); err != nil {
		return err
	}
	for _, e := range list.Items {
		if e.InvolvedObject.Kind == kind && e.InvolvedObject.Name == name && e.Reason == reason {
			return nil
		}
	}
	return fmt.Errorf("no event %s of %s %s", reason, kind, name)
}

func TestNamesOfPoolsAndBlocks(t *testing.T) {
	needAPI(t)
	pool := object(t, "IPPool", "a.b", "ipv4: {cidr: 10.1.0.0/24}")
	eventually(t, func() error {
		return refusedWith(api.Create(t.Context(), pool.DeepCopy(), client.DryRunAll), "metadata.name a.b: the name of an IPPool is 1 to 63 lower-case letters, digits and -")
	})
	for _, b := range []*sluicev1.IPBlock{
		sluicev1.NewBlock("a", "n", sluicev1.BlockAddresses, netip.MustParseAddr("10.1.0.0"), 8),
		sluicev1.NewBlock("a", "n", sluicev1.BlockReserved, netip.MustParseAddr("fd00::1"), 1),
		sluicev1.NewShare("a", "n", "b", 7),
	} {
		b.Namespace = operatorNamespace
		if err := api.Create(t.Context(), b.DeepCopy(), client.DryRunAll); err != nil {
			t.Error(err)
		}
		b.Name += "x"
		if err := refusedWith(api.Create(t.Context(), b, client.DryRunAll), "a block is named by its spec"); err != nil {
			t.Error(err)
		}
	}
}

// What cannot change, as nodes hold blocks of it, does not.
func TestPoolKeepsItsSubnet(t *testing.T) {
	needAPI(t)
	pool := makeIPPool(t, "kept", sluicev1.IPPoolSpec{IPv4: &sluicev1.IPRange{CIDR: "10.1.0.0/24"}})
	for want, change := range map[string]func(*sluicev1.IPPoolSpec){
		"cidr cannot change":                 func(s *sluicev1.IPPoolSpec) { s.IPv4.CIDR = "10.2.0.0/24" },
		"blockSize cannot change":            func(s *sluicev1.IPPoolSpec) { s.IPv4.BlockSize = 16 },
		"ipv4 cannot be taken out of a pool": func(s *sluicev1.IPPoolSpec) { s.IPv4, s.IPv6 = nil, &sluicev1.IPRange{CIDR: "fd00::/64"} },
	} {
		eventually(t, func() error { // the status is written meanwhile
			if err := api.Get(t.Context(), client.ObjectKeyFromObject(pool), pool); err != nil {
				return err
			}
			change(&pool.Spec)
			return refusedWith(api.Update(t.Context(), pool), want)
		})
	}
	eventually(t, func() error {
		if err := api.Get(t.Context(), client.ObjectKeyFromObject(pool), pool); err != nil {
			return err
		}
		pool.Spec.IPv4.Start, pool.Spec.IPv6 = "10.1.0.100", &sluicev1.IPRange{CIDR: "fd00::/64"}
		return api.Update(t.Context(), pool)
	})
}

// What a node had is free when its Node has been gone for the rest, and not before.
func TestBlocksOfNodesThatAreGoneAreFreed(t *testing.T) {
	needAPI(t)
	pool := makeIPPool(t, "orphans", sluicev1.IPPoolSpec{IPv4: &sluicev1.IPRange{CIDR: "10.1.0.0/24"}, RestSeconds: new(3600)})
	gone := makeBlock(t, sluicev1.NewBlock("orphans", "ipam-gone", sluicev1.BlockAddresses, netip.MustParseAddr("10.1.0.0"), 8), sluicev1.IPBlockStatus{})
	makeNode(t, "ipam-there", nil)
	there := makeBlock(t, sluicev1.NewBlock("orphans", "ipam-there", sluicev1.BlockAddresses, netip.MustParseAddr("10.1.0.8"), 8), sluicev1.IPBlockStatus{})
	poolSays(t, pool, func(_ sluicev1.IPPoolStatus, _, degraded string) error {
		if !strings.HasPrefix(degraded, "True NodesGone: nodes ipam-gone are gone") {
			return fmt.Errorf("Degraded is %s", degraded)
		}
		return nil
	})
	now := time.Now()
	r := &ipPool{Client: api, live: api, namespace: operatorNamespace, now: func() time.Time { return now }, gone: map[types.UID]time.Time{}}
	free := func() {
		t.Helper()
		for _, b := range []*sluicev1.IPBlock{gone, there} {
			if _, _, err := r.free(t.Context(), []sluicev1.IPBlock{*b}, time.Hour); err != nil {
				t.Fatal(err)
			}
		}
	}
	looks := func(want time.Duration) {
		t.Helper()
		later := *gone.DeepCopy()
		later.UID, later.Spec.Node = "later", "ipam-later"
		if _, again, err := r.free(t.Context(), []sluicev1.IPBlock{*gone, later}, time.Hour); again != want || err != nil {
			t.Errorf("looks again after %s, not %s, %v", again, want, err)
		}
	}
	exists := func(b *sluicev1.IPBlock, want bool) {
		t.Helper()
		if err := api.Get(t.Context(), client.ObjectKeyFromObject(b), &sluicev1.IPBlock{}); apierrors.IsNotFound(err) == want {
			t.Errorf("block %s of node %s: %v", b.Name, b.Spec.Node, err)
		}
	}
	free()
	now = now.Add(59 * time.Minute)
	free()
	exists(gone, true)
	looks(time.Minute) // when the first is due
	// A node that comes back keeps what it has, and another rest begins when it goes again.
	back := makeNode(t, "ipam-gone", nil)
	free()
	if err := api.Delete(t.Context(), back); err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * time.Minute)
	free()
	exists(gone, true)
	now = now.Add(time.Hour)
	free()
	exists(gone, false)
	exists(there, true)
}

func TestAgentClaimsForItsOwnNodeOnly(t *testing.T) {
	needAPI(t)
	agent, err := client.New(as("sluice-agent", map[string][]string{"authentication.kubernetes.io/node-name": {"claim-1"}}), client.Options{Scheme: api.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	block := func(node, first string) *sluicev1.IPBlock {
		b := sluicev1.NewBlock("claims", node, sluicev1.BlockAddresses, netip.MustParseAddr(first), 8)
		b.Namespace = operatorNamespace
		return b
	}
	const want = "an agent claims and gives back blocks of its own node only, and this one is on claim-1"
	eventually(t, func() error { return refusedWith(agent.Create(t.Context(), block("claim-2", "10.1.0.0")), want) })
	others := makeBlock(t, block("claim-2", "10.1.0.0"), sluicev1.IPBlockStatus{})
	if err := refusedWith(agent.Delete(t.Context(), others.DeepCopy()), want); err != nil {
		t.Error(err)
	}
	changed := others.DeepCopy()
	changed.Spec.Excluded = []string{"10.1.0.1"}
	if err := refusedWith(agent.Update(t.Context(), changed), want); err != nil {
		t.Error(err)
	}
	patch := client.RawPatch(types.MergePatchType, []byte(`{"status":{"allocated":1}}`))
	if err := refusedWith(agent.Status().Patch(t.Context(), others.DeepCopy(), patch), want); err != nil {
		t.Error(err)
	}
	if err := agent.Create(t.Context(), block("claim-1", "10.1.0.0")); !apierrors.IsAlreadyExists(err) {
		t.Errorf("a block that another node has: %v", err)
	}
	own := block("claim-1", "10.1.0.8")
	if err := agent.Create(t.Context(), own); err != nil {
		t.Fatal(err)
	}
	own.Spec.Excluded = []string{"10.1.0.9"}
	if err := agent.Update(t.Context(), own); err != nil {
		t.Error(err)
	}
	taken := own.DeepCopy()
	taken.Spec.Node = "claim-2"
	if err := refusedWith(agent.Update(t.Context(), taken), "a block stays what it is"); err != nil {
		t.Error(err)
	}
	if err := agent.Status().Patch(t.Context(), own, patch); err != nil {
		t.Error(err)
	}
	pool := &sluicev1.IPPool{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "agents"}, Spec: sluicev1.IPPoolSpec{IPv4: &sluicev1.IPRange{CIDR: "10.1.0.0/24"}}}
	if err := agent.Create(t.Context(), pool); !apierrors.IsForbidden(err) {
		t.Errorf("an agent makes a pool: %v", err)
	}
	if err := agent.List(t.Context(), &sluicev1.IPBlockList{}, client.InNamespace(operatorNamespace), client.MatchingFields{"spec.node": "claim-1"}); err != nil {
		t.Error(err)
	}
	for _, b := range []*sluicev1.IPBlock{own, others} {
		if err := api.Delete(t.Context(), b); err != nil {
			t.Error(err)
		}
	}
}
