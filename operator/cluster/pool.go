package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
)

// finalizerPool is put on pools by the SR-IOV network operator. Nobody else would take it
// off a pool that is deleted after the move to Sluice.
const finalizerPool = "poolconfig.finalizers.sriovnetwork.openshift.io"

// pool writes into each SriovNetworkPoolConfig which nodes it has and how many of them
// are ready, or disturbed.
type pool struct {
	client.Client
	namespace string
	events    events.EventRecorder
}

func (r *pool) setup(mgr ctrl.Manager) error {
	all := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return []reconcile.Request{{NamespacedName: client.ObjectKey{Name: "all"}}}
	})
	return ctrl.NewControllerManagedBy(mgr).
		Named("pool").
		// What nodes a pool has depends on the other pools.
		Watches(&sriovv1.SriovNetworkPoolConfig{}, all, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&sriovv1.SriovNetworkNodeState{}, all, builder.WithPredicates(predicate.Or(predicate.AnnotationChangedPredicate{}, predicate.Funcs{
			UpdateFunc: func(e event.UpdateEvent) bool { return isReady(e.ObjectOld) != isReady(e.ObjectNew) },
		}))).
		WatchesMetadata(nodeMetadata(), all, builder.WithPredicates(predicate.LabelChangedPredicate{})).
		Complete(r)
}

// members are a pool's nodes.
type members struct {
	all, ready, disturbed int
	shared                []string        // nodes that other pools select, too
	with                  map[string]bool // those pools
}

func isReady(state client.Object) bool {
	return meta.IsStatusConditionTrue(state.(*sriovv1.SriovNetworkNodeState).Status.Conditions, sriovv1.ConditionReady)
}

// Reconcile writes the status of all pools that changed.
func (r *pool) Reconcile(ctx context.Context, _ ctrl.Request) (ctrl.Result, error) {
	list := &sriovv1.SriovNetworkPoolConfigList{}
	if err := r.List(ctx, list, client.InNamespace(r.namespace)); err != nil {
		return ctrl.Result{}, fmt.Errorf("list pools: %w", err)
	}
	if len(list.Items) == 0 {
		return ctrl.Result{}, nil
	}
	nodes, err := listNodes(ctx, r)
	if err != nil {
		return ctrl.Result{}, err
	}
	states := &sriovv1.SriovNetworkNodeStateList{}
	if err := r.List(ctx, states, client.InNamespace(r.namespace), client.UnsafeDisableDeepCopy); err != nil {
		return ctrl.Result{}, fmt.Errorf("list node states: %w", err)
	}
	byName := map[string]*sriovv1.SriovNetworkNodeState{}
	for i := range states.Items {
		byName[states.Items[i].Name] = &states.Items[i]
	}
	pools := plan.NewPools(list.Items)
	of := sortIntoPools(pools, nodes, byName)
	var failed []error
	for i := range list.Items {
		p := &list.Items[i]
		if p.DeletionTimestamp != nil {
			failed = append(failed, r.letGo(ctx, p))
			continue
		}
		failed = append(failed, r.report(ctx, p, pools.Invalid(p.Name), of[p.Name]))
	}
	return ctrl.Result{}, errors.Join(failed...)
}

func sortIntoPools(pools *plan.Pools, nodes []metav1.PartialObjectMetadata, states map[string]*sriovv1.SriovNetworkNodeState) map[string]members {
	of := map[string]members{}
	for i := range nodes {
		state := states[nodes[i].Name]
		if state == nil { // it has no agent
			continue
		}
		in := pools.Of(nodes[i].Labels)
		for _, p := range in {
			m := of[p.Name]
			if len(in) == 1 {
				m.all++
				if isReady(state) {
					m.ready++
				}
				if isDisturbed(state) {
					m.disturbed++
				}
			} else {
				m.shared = append(m.shared, nodes[i].Name)
				if m.with == nil {
					m.with = map[string]bool{}
				}
				for _, other := range in {
					m.with[other.Name] = true
				}
			}
			of[p.Name] = m
		}
	}
	return of
}

// letGo takes off a finalizer that nobody else would.
func (r *pool) letGo(ctx context.Context, p *sriovv1.SriovNetworkPoolConfig) error {
	before := client.MergeFromWithOptions(p.DeepCopy(), client.MergeFromWithOptimisticLock{})
	if !controllerutil.RemoveFinalizer(p, finalizerPool) {
		return nil
	}
	if err := r.Patch(ctx, p, before, fieldOwner); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("take the finalizer off SriovNetworkPoolConfig %s: %w", p.Name, err)
	}
	return nil
}

// judgePool says what is to be said of a pool.
func judgePool(p *sriovv1.SriovNetworkPoolConfig, invalid error, m members) (unready, progressing, degraded, fine why) {
	fine = why{"PoolReady", fmt.Sprintf("%d nodes are in the pool, %d of them ready", m.all, m.ready)}
	switch {
	case p.Spec.OvsHardwareOffloadConfig.Name != "":
		unready = why{reasonUnsupported, fmt.Sprintf("ovsHardwareOffloadConfig.name %s has no effect: it is about OpenShift machine configurations; set other_config:hw-offload of Open vSwitch by the means you configure nodes with, and remove this pool", p.Spec.OvsHardwareOffloadConfig.Name)}
		degraded = unready
	case invalid != nil:
		unready = why{"PoolInvalid", invalid.Error() + "; until then no node of it is disturbed"}
		degraded = unready
	case len(m.shared) > 0:
		slices.Sort(m.shared)
		var others []string
		for name := range m.with {
			if name != p.Name {
				others = append(others, name)
			}
		}
		slices.Sort(others)
		unready = why{"NodeInTwoPools", fmt.Sprintf("%d nodes (%s) are also selected by %s: they are in no pool and are not disturbed: let only one nodeSelector select a node", len(m.shared), abbreviate(m.shared), strings.Join(others, ", "))}
		degraded = unready
	case m.all == 0:
		unready = why{reasonNoNodeSelected, "nodeSelector selects no node that has an agent: compare it with kubectl get nodes --show-labels"}
	}
	if m.disturbed > 0 {
		progressing = why{"Disturbing", fmt.Sprintf("%d of %d nodes are being disturbed: see the condition Evicting of their SriovNetworkNodeStates", m.disturbed, m.all)}
	}
	return unready, progressing, degraded, fine
}

func (r *pool) report(ctx context.Context, p *sriovv1.SriovNetworkPoolConfig, invalid error, m members) error {
	unready, progressing, degraded, fine := judgePool(p, invalid, m)
	all, own := merge(p.Status.Conditions, conditions(p.Generation, unready, progressing, degraded, fine))
	status := sriovv1.SriovNetworkPoolConfigStatus{Conditions: own, ObservedGeneration: p.Generation, MatchedNodeCount: m.all, ReadyNodeCount: m.ready, DisturbedNodeCount: m.disturbed}
	after := status
	if after.Conditions = all; equality.Semantic.DeepEqual(after, p.Status) {
		return nil
	}
	if err := writeStatus(ctx, r, sriovv1.SchemeGroupVersion.WithKind("SriovNetworkPoolConfig"), client.ObjectKeyFromObject(p), &status); err != nil {
		return client.IgnoreNotFound(err)
	}
	reportTransition(r.events, p, p.Status.Conditions, all)
	return nil
}
