package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
)

// statusGap is how long verdicts are gathered before the status of policies is written:
// thousands of nodes that become ready within a moment are one write per policy.
const statusGap = 200 * time.Millisecond

// tally remembers what became of the policies on each node, and which policies' status
// may have changed by that. Whoever judges a node tells it; it is safe for concurrent use.
type tally struct {
	mu    sync.Mutex
	nodes map[string]map[policyKey]judged
	dirty map[policyKey]bool
	wake  func() // called without the lock when something became dirty
}

func newTally() *tally {
	return &tally{nodes: map[string]map[policyKey]judged{}, dirty: map[policyKey]bool{}}
}

// set takes down the verdicts of a node; nil when there is nothing to judge there.
func (t *tally) set(node string, verdicts map[policyKey]judged) {
	t.mu.Lock()
	changed := false
	before := t.nodes[node]
	mark := func(k policyKey) { changed, t.dirty[k] = true, true }
	for k, v := range verdicts {
		if old, ok := before[k]; !ok || old != v {
			mark(k)
		}
	}
	for k := range before {
		if _, ok := verdicts[k]; !ok {
			mark(k)
		}
	}
	if verdicts == nil {
		delete(t.nodes, node)
	} else {
		t.nodes[node] = verdicts
	}
	wake := t.wake
	t.mu.Unlock()
	if changed && wake != nil {
		wake()
	}
}

// mark makes a policy's status be looked at.
func (t *tally) mark(k policyKey) {
	t.mu.Lock()
	t.dirty[k] = true
	wake := t.wake
	t.mu.Unlock()
	if wake != nil {
		wake()
	}
}

// keep leaves a policy to be looked at with whatever comes next: its failure is tried
// again by who failed, ever later, and must not be hurried.
func (t *tally) keep(k policyKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dirty[k] = true
}

// takeDirty returns what became dirty since it was last called, sorted.
func (t *tally) takeDirty() []policyKey {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := slices.SortedFunc(maps.Keys(t.dirty), func(a, b policyKey) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.name, b.name))
	})
	clear(t.dirty)
	return all
}

// of returns the verdicts of a policy by node, of those nodes that it is said to select.
// It is not complete while one of them has not been judged with this generation of it.
func (t *tally) of(k policyKey, generation int64, selected []string) (verdicts map[string]verdict, complete bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	verdicts = make(map[string]verdict, len(selected))
	for _, node := range selected {
		j, ok := t.nodes[node][k]
		if !ok || j.generation != generation {
			return nil, false
		}
		verdicts[node] = j.verdict
	}
	return verdicts, true
}

// policyStatus writes into policies what became of them on all nodes. It computes that
// from the objects alone, so that a new leader says the same as the old one did.
type policyStatus struct {
	client.Client
	namespace string
	events    events.EventRecorder
	tally     *tally
}

func (r *policyStatus) setup(mgr ctrl.Manager) error {
	one := reconcile.Request{NamespacedName: client.ObjectKey{Name: "dirty"}}
	mark := func(kind string) handler.EventHandler {
		return handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			r.tally.mark(policyKey{kind, o.GetName()})
			return nil // mark wakes us
		})
	}
	return ctrl.NewControllerManagedBy(mgr).
		Named("policystatus").
		Watches(&sriovv1.SriovNetworkNodePolicy{}, mark(kindPolicy), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&sluicev1.MacvlanNodePolicy{}, mark(kindMacvlanPolicy), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WatchesRawSource(source.Func(func(_ context.Context, queue workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
			r.tally.mu.Lock()
			defer r.tally.mu.Unlock()
			r.tally.wake = func() { queue.AddAfter(one, statusGap) }
			r.tally.wake() // for what was judged before
			return nil
		})).
		Complete(r)
}

// policyView is what the status of a policy needs to know of it.
type policyView struct {
	object     client.Object
	selector   map[string]string
	conditions []metav1.Condition
	status     policyCounts
}

// policyCounts are the status of both kinds of policies but for its conditions.
type policyCounts struct {
	Conditions         []metav1.Condition `json:"conditions,omitempty"`
	ObservedGeneration int64              `json:"observedGeneration,omitempty"`
	MatchedNodeCount   int                `json:"matchedNodeCount"`
	ReadyNodeCount     int                `json:"readyNodeCount"`
}

// view reads a policy; nil when it is gone or going.
func (r *policyStatus) view(ctx context.Context, k policyKey) (*policyView, error) {
	key := client.ObjectKey{Namespace: r.namespace, Name: k.name}
	var v *policyView
	var err error
	if k.kind == kindMacvlanPolicy {
		p := &sluicev1.MacvlanNodePolicy{}
		err = r.Get(ctx, key, p)
		v = &policyView{p, p.Spec.NodeSelector, p.Status.Conditions, policyCounts{nil, p.Status.ObservedGeneration, p.Status.MatchedNodeCount, p.Status.ReadyNodeCount}}
	} else {
		p := &sriovv1.SriovNetworkNodePolicy{}
		err = r.Get(ctx, key, p)
		v = &policyView{p, p.Spec.NodeSelector, p.Status.Conditions, policyCounts{nil, p.Status.ObservedGeneration, p.Status.MatchedNodeCount, p.Status.ReadyNodeCount}}
	}
	if err != nil {
		return nil, client.IgnoreNotFound(fmt.Errorf("read %s %s: %w", k.kind, k.name, err))
	}
	if v.object.GetDeletionTimestamp() != nil {
		return nil, nil
	}
	return v, nil
}

// Reconcile writes the status of the policies of which something was said since.
func (r *policyStatus) Reconcile(ctx context.Context, _ ctrl.Request) (ctrl.Result, error) {
	dirty := r.tally.takeDirty()
	if len(dirty) == 0 {
		return ctrl.Result{}, nil
	}
	nodes, err := listNodes(ctx, r)
	if err != nil {
		for _, k := range dirty {
			r.tally.keep(k)
		}
		return ctrl.Result{}, err
	}
	var failed []error
	for _, k := range dirty {
		complete, err := r.write(ctx, k, nodes)
		switch {
		case err != nil:
			r.tally.keep(k)
			failed = append(failed, err)
		case !complete:
			r.tally.mark(k)
		}
	}
	return ctrl.Result{}, errors.Join(failed...)
}

// write writes the status of one policy, if it changed. It is not complete while nodes
// that the policy selects have not been judged.
func (r *policyStatus) write(ctx context.Context, k policyKey, nodes []metav1.PartialObjectMetadata) (complete bool, err error) {
	view, err := r.view(ctx, k)
	if err != nil || view == nil {
		return true, err
	}
	var selected []string
	for i := range nodes {
		if runsLinux(&nodes[i]) && plan.SelectsNode(view.selector, nodes[i].Labels) {
			selected = append(selected, nodes[i].Name)
		}
	}
	verdicts, complete := r.tally.of(k, view.object.GetGeneration(), selected)
	if !complete {
		return false, nil
	}
	status := summarise(view.object.GetGeneration(), verdicts)
	all, own := merge(view.conditions, status.Conditions)
	status.Conditions = nil
	if equality.Semantic.DeepEqual(all, view.conditions) && equality.Semantic.DeepEqual(status, view.status) {
		return true, nil
	}
	status.Conditions = own
	if err := writeStatus(ctx, r, kindOfPolicy(k.kind), client.ObjectKeyFromObject(view.object), &status); err != nil {
		return true, client.IgnoreNotFound(err)
	}
	reportTransition(r.events, view.object, view.conditions, all)
	return true, nil
}

func kindOfPolicy(kind string) schema.GroupVersionKind {
	if kind == kindMacvlanPolicy {
		return sluicev1.SchemeGroupVersion.WithKind(kind)
	}
	return sriovv1.SchemeGroupVersion.WithKind(kind)
}

// summarise makes a policy's status from what became of it on every node that it selects.
// Nodes without an agent, or without anything that it selects, are no fault of a policy
// that is in effect on others.
func summarise(generation int64, verdicts map[string]verdict) policyCounts {
	status := policyCounts{ObservedGeneration: generation}
	bare, agentless := 0, 0
	open, passed := map[verdict][]string{}, map[verdict][]string{}
	for node, v := range verdicts {
		switch {
		case v.reason == reasonNoAgent:
			agentless++
			continue
		case v.ready:
			status.ReadyNodeCount++
			if v.message != "" {
				passed[v] = append(passed[v], node)
			}
		case v.reason == string(plan.NoNICSelected):
			bare++
			open[v] = append(open[v], node)
		default:
			open[v] = append(open[v], node)
		}
		status.MatchedNodeCount++
	}
	if bare < status.MatchedNodeCount {
		maps.DeleteFunc(open, func(v verdict, _ []string) bool { return v.reason == string(plan.NoNICSelected) })
	}
	text := fmt.Sprintf("in effect on %d of %d selected nodes", status.ReadyNodeCount, status.MatchedNodeCount)
	if bare > 0 {
		text += fmt.Sprintf("; %d have no NIC that the selector selects", bare)
	}
	if agentless > 0 {
		text += fmt.Sprintf("; %d more get no agent: see configDaemonNodeSelector of SriovOperatorConfig default", agentless)
	}
	if len(passed) > 0 {
		text += "; " + tell(passed).message
	}
	fine := why{reasonAllNodesReady, text}
	var unready, progressing, degraded why
	switch {
	case status.MatchedNodeCount == 0 && agentless > 0:
		unready = why{reasonNoAgent, fmt.Sprintf("nodeSelector selects %d nodes, and none of them gets an agent: see configDaemonNodeSelector of SriovOperatorConfig default", agentless)}
	case status.MatchedNodeCount == 0:
		unready = why{reasonNoNodeSelected, "nodeSelector selects no Linux node: compare it with kubectl get nodes --show-labels"}
	case len(open) > 0:
		unready = tell(open)
	}
	for v := range open {
		if v.progress {
			progressing = unready
		}
		if v.degraded {
			degraded = unready
		}
	}
	status.Conditions = conditions(generation, unready, progressing, degraded, fine)
	return status
}

// tell puts what is open on the nodes into a reason and a message: faults first, and
// nodes with the same one together.
func tell(open map[verdict][]string) why {
	verdicts := slices.SortedFunc(maps.Keys(open), func(a, b verdict) int {
		if a.degraded != b.degraded {
			if a.degraded {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(len(open[b]), len(open[a])), cmp.Compare(a.message, b.message))
	})
	var parts []string
	for i, v := range verdicts {
		const most = 4
		if i == most {
			parts = append(parts, fmt.Sprintf("and %d more findings on other nodes", len(verdicts)-most))
			break
		}
		names := open[v]
		slices.Sort(names)
		who := "node " + names[0]
		if n := len(names); n > 3 {
			who = fmt.Sprintf("%d nodes (%s, ...)", n, strings.Join(names[:3], ", "))
		} else if n > 1 {
			who = "nodes " + strings.Join(names, ", ")
		}
		parts = append(parts, who+": "+v.message)
	}
	return why{verdicts[0].reason, strings.Join(parts, "; ")}
}
