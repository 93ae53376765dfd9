package cluster

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// writes counts requests that change something, by method and kind of object. The leader's
// lease is not counted, which is renewed whatever happens.
type writes struct {
	mu sync.Mutex
	by map[string]int
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func (w *writes) count(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		if r.Method != http.MethodGet && !strings.Contains(r.URL.Path, "/leases") {
			parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
			what := r.Method + " " + r.URL.Path
			for i, p := range parts {
				if p == "namespaces" && len(parts) > i+2 {
					what = strings.Join(append([]string{r.Method}, append(parts[i+2:i+3], parts[min(i+4, len(parts)):]...)...), " ")
				}
			}
			w.mu.Lock()
			if w.by == nil {
				w.by = map[string]int{}
			}
			w.by[what]++
			w.mu.Unlock()
		}
		return next.RoundTrip(r)
	})
}

// take returns what was counted since it was last called.
func (w *writes) take() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	by := w.by
	w.by = nil
	return by
}

// quiet waits until nothing has been written for two seconds.
func (w *writes) quiet(tb testing.TB) {
	tb.Helper()
	last := time.Now()
	for end := last.Add(5 * time.Minute); time.Since(last) < 2*time.Second; time.Sleep(50 * time.Millisecond) {
		if len(w.take()) > 0 {
			last = time.Now()
		}
		if time.Now().After(end) {
			tb.Fatal("the operator does not stop writing")
		}
	}
}

// Of the fleet: racks of nodes with 4 PFs of 16 VFs each, and a policy per rack and PF.
const racks, pfsPerNode, vfsPerPF = 50, 4, 16

// park makes a cluster of n nodes in 50 racks, and 200 policies that are all in effect:
// each on one PF of all nodes of its rack.
func park(tb testing.TB, n int) []*sriovv1.SriovNetworkNodePolicy {
	tb.Helper()
	ctx := tb.Context()
	each := func(n int, do func(i int) error) {
		tb.Helper()
		var group errgroup.Group
		group.SetLimit(16)
		for i := range n {
			group.Go(func() error { return do(i) })
		}
		if err := group.Wait(); err != nil {
			tb.Fatal(err)
		}
	}
	nodes := make([]*corev1.Node, n)
	each(n, func(i int) error {
		nodes[i] = &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("park-%04d", i), Labels: map[string]string{corev1.LabelOSStable: "linux", "rack": fmt.Sprint(i % racks)}}}
		return api.Create(ctx, nodes[i])
	})
	policies := make([]*sriovv1.SriovNetworkNodePolicy, racks*pfsPerNode)
	each(len(policies), func(i int) error {
		p := &sriovv1.SriovNetworkNodePolicy{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: fmt.Sprintf("park-%03d", i)}}
		p.Spec.ResourceName, p.Spec.NumVfs = fmt.Sprintf("r%d", i), vfsPerPF
		p.Spec.NodeSelector = map[string]string{"rack": fmt.Sprint(i / pfsPerNode)}
		p.Spec.NicSelector.PfNames = []sriovv1.PfName{sriovv1.PfName(fmt.Sprintf("ens%df0", i%pfsPerNode))}
		policies[i] = p
		return api.Create(ctx, p)
	})
	tb.Cleanup(func() {
		ctx := context.Background()
		each(len(policies), func(i int) error { return client.IgnoreNotFound(api.Delete(ctx, policies[i])) })
		each(n, func(i int) error { return client.IgnoreNotFound(api.Delete(ctx, nodes[i])) })
		each(n, func(i int) error { // their states follow
			key := client.ObjectKey{Namespace: operatorNamespace, Name: nodes[i].Name}
			for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
				if err := api.Get(ctx, key, &sriovv1.SriovNetworkNodeState{}); apierrors.IsNotFound(err) || time.Now().After(end) {
					return client.IgnoreNotFound(err)
				}
			}
		})
	})
	parkReports(tb, n, each)
	return policies
}

// parkReports lets all agents report what they have, and that they have what is asked,
// until all that is asked is there.
func parkReports(tb testing.TB, n int, each func(int, func(int) error)) {
	tb.Helper()
	states := make([]*sriovv1.SriovNetworkNodeState, n)
	until := time.Now().Add(10 * time.Minute)
	report := func(i int, done func(*sriovv1.SriovNetworkNodeState) bool) error {
		for {
			state := &sriovv1.SriovNetworkNodeState{}
			err := api.Get(tb.Context(), client.ObjectKey{Namespace: operatorNamespace, Name: fmt.Sprintf("park-%04d", i)}, state)
			if err == nil && done(state) {
				states[i] = state
				state.Status = parkStatus(state)
				if err = api.Status().Update(tb.Context(), state); err == nil {
					return nil
				}
			}
			if time.Now().After(until) {
				return fmt.Errorf("node park-%04d is not as asked: %w", i, err)
			}
			time.Sleep(200 * time.Millisecond)
		}
	}
	each(n, func(i int) error { return report(i, func(*sriovv1.SriovNetworkNodeState) bool { return true }) })
	each(n, func(i int) error {
		return report(i, func(s *sriovv1.SriovNetworkNodeState) bool { return len(s.Spec.Interfaces) == pfsPerNode })
	})
}

func parkStatus(state *sriovv1.SriovNetworkNodeState) sriovv1.SriovNetworkNodeStateStatus {
	status := sriovv1.SriovNetworkNodeStateStatus{
		ObservedGeneration: state.Generation, SyncStatus: sriovv1.SyncStatusSucceeded, VFs: "64/64",
		Conditions: state.Status.Conditions,
	}
	meta.SetStatusCondition(&status.Conditions, condition(sriovv1.ConditionReady, metav1.ConditionTrue))
	for pf := range pfsPerNode {
		nic := sriovv1.InterfaceExt{
			Name: fmt.Sprintf("ens%df0", pf), PciAddress: fmt.Sprintf("0000:%02x:00.0", pf+1), Driver: "ice", Vendor: "8086", DeviceID: "1592",
			Mac: "02:00:00:00:00:01", Mtu: 1500, LinkType: "ETH", LinkSpeed: "100000 Mb/s", LinkAdminState: "up", EswitchMode: "legacy", TotalVfs: 64, NumVfs: vfsPerPF,
		}
		for vf := range vfsPerPF {
			nic.VFs = append(nic.VFs, sriovv1.VirtualFunction{
				VfID: vf, Name: fmt.Sprintf("ens%df0v%d", pf, vf), PciAddress: fmt.Sprintf("0000:%02x:%02x.%d", pf+1, 1+vf/8, vf%8),
				Driver: "iavf", Vendor: "8086", DeviceID: "1889", Mac: "02:00:00:00:01:01", Mtu: 1500,
			})
		}
		status.Interfaces = append(status.Interfaces, nic)
	}
	return status
}

// wantPoliciesReady waits until every policy says that it is in effect on all its nodes.
func wantPoliciesReady(tb testing.TB, policies []*sriovv1.SriovNetworkNodePolicy, nodes int) {
	tb.Helper()
	var err error
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		err = nil
		for _, p := range policies {
			if err = api.Get(tb.Context(), client.ObjectKeyFromObject(p), p); err != nil {
				break
			}
			if p.Status.ReadyNodeCount != nodes || p.Status.MatchedNodeCount != nodes || !meta.IsStatusConditionTrue(p.Status.Conditions, sriovv1.ConditionReady) {
				err = fmt.Errorf("policy %s is %+v, want it on %d nodes", p.Name, p.Status, nodes)
				break
			}
		}
		if err == nil {
			return
		}
	}
	tb.Fatal(err)
}

// rerender looks at every node and every policy as a leader does that has just taken over,
// with nothing remembered.
func rerender(tb testing.TB, n int) {
	tb.Helper()
	c, verdicts := operator.GetClient(), newTally()
	recorder := operator.GetEventRecorder("test")
	nodes := &nodeState{Client: c, namespace: operatorNamespace, tally: verdicts}
	for i := range n {
		request := ctrl.Request{NamespacedName: client.ObjectKey{Namespace: operatorNamespace, Name: fmt.Sprintf("park-%04d", i)}}
		if _, err := nodes.Reconcile(tb.Context(), request); err != nil {
			tb.Fatal(err)
		}
	}
	for _, r := range []interface {
		Reconcile(context.Context, ctrl.Request) (ctrl.Result, error)
	}{
		&policyStatus{Client: c, namespace: operatorNamespace, events: recorder, tally: verdicts},
		&pool{Client: c, namespace: operatorNamespace, events: recorder},
		&eviction{Client: c, live: operator.GetAPIReader(), namespace: operatorNamespace, events: recorder},
	} {
		if _, err := r.Reconcile(tb.Context(), ctrl.Request{}); err != nil {
			tb.Fatal(err)
		}
	}
}

// wantFewWrites checks that nothing is written when nothing changed, and that one changed
// policy writes the specs of the nodes it selects and no other.
func wantFewWrites(tb testing.TB, n int, policies []*sriovv1.SriovNetworkNodePolicy) {
	tb.Helper()
	wrote.quiet(tb)
	rerender(tb, n)
	if got := wrote.take(); len(got) > 0 {
		tb.Fatalf("nothing changed, and was written: %v", got)
	}
	p := policies[1]
	if err := api.Get(tb.Context(), client.ObjectKeyFromObject(p), p); err != nil {
		tb.Fatal(err)
	}
	p.Spec.NumVfs--
	if err := api.Update(tb.Context(), p); err != nil {
		tb.Fatal(err)
	}
	total := map[string]int{}
	for quiet := time.Now(); time.Since(quiet) < 2*time.Second; time.Sleep(50 * time.Millisecond) {
		got := wrote.take()
		for what, n := range got {
			total[what] += n
			quiet = time.Now()
		}
	}
	specs := total["PATCH sriovnetworknodestates"]
	rest := maps.Clone(total)
	delete(rest, "PATCH sriovnetworknodestates")
	delete(rest, "PATCH sriovnetworknodepolicies status")
	delete(rest, "POST events")
	if specs != n/racks || len(rest) > 0 || total["PATCH sriovnetworknodepolicies status"] > 20 {
		tb.Errorf("one policy of %d nodes changed, and was written: %v", n/racks, total)
	}
}

func TestNothingChangedNothingWritten(t *testing.T) {
	needAPI(t)
	policies := park(t, 2*racks)
	wantPoliciesReady(t, policies, 2)
	wantFewWrites(t, 2*racks, policies)
}

// BenchmarkRender2000Nodes is a full look at 2,000 nodes with 4 PFs of 16 VFs each and 200
// policies, all of them objects of a real API server: CPU time of the operator's process.
func BenchmarkRender2000Nodes(b *testing.B) {
	if api == nil {
		b.Fatal("KUBEBUILDER_ASSETS is not set: point it at a directory with kube-apiserver, etcd and kubectl")
	}
	const nodes = 2000
	policies := park(b, nodes)
	wantPoliciesReady(b, policies, nodes/racks)
	wrote.quiet(b)
	var spent time.Duration
	for b.Loop() {
		before := cpuTime(b)
		rerender(b, nodes)
		spent += cpuTime(b) - before
	}
	if got := wrote.take(); len(got) > 0 {
		b.Fatalf("nothing changed, and was written: %v", got)
	}
	each := spent / time.Duration(b.N)
	b.ReportMetric(each.Seconds(), "cpu-s/op")
	if each > 5*time.Second {
		b.Errorf("a full look takes %v of CPU, at most 5s", each)
	}
	wantFewWrites(b, nodes, policies)
}

// cpuTime is what this process has used until now, in user and kernel mode.
func cpuTime(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
