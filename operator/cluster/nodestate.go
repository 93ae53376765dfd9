package cluster

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
)

// nodeState keeps the spec of one node's SriovNetworkNodeState as the policies want it.
type nodeState struct {
	client.Client
	namespace string
}

func (r *nodeState) setup(mgr ctrl.Manager) error {
	return ctrl.NewControllerManagedBy(mgr).
		Named("nodestate").
		For(&sriovv1.SriovNetworkNodeState{}).
		// Nodes with an agent have a state.
		Watches(&sriovv1.SriovOperatorConfig{}, handler.EnqueueRequestsFromMapFunc(r.ofAll), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&sriovv1.SriovNetworkPoolConfig{}, handler.EnqueueRequestsFromMapFunc(r.ofAll), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&appsv1.DaemonSet{}, handler.EnqueueRequestsFromMapFunc(r.ofAll), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WatchesMetadata(nodeMetadata(), handler.EnqueueRequestsFromMapFunc(r.ofNode), builder.WithPredicates(predicate.LabelChangedPredicate{})).
		// On an update the old and the new policy are both mapped, so that nodes it no
		// longer selects are seen to as well.
		Watches(&sriovv1.SriovNetworkNodePolicy{}, handler.EnqueueRequestsFromMapFunc(r.ofPolicy), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Complete(r)
}

func (r *nodeState) ofNode(_ context.Context, node client.Object) []reconcile.Request {
	return []reconcile.Request{{NamespacedName: client.ObjectKey{Namespace: r.namespace, Name: node.GetName()}}}
}

func (r *nodeState) ofAll(ctx context.Context, _ client.Object) []reconcile.Request {
	nodes, err := listNodes(ctx, r)
	if err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "Lost an event of the agents' DaemonSet")
		return nil
	}
	var requests []reconcile.Request
	for i := range nodes {
		requests = append(requests, r.ofNode(ctx, &nodes[i])...)
	}
	return requests
}

func (r *nodeState) ofPolicy(ctx context.Context, object client.Object) []reconcile.Request {
	nodes, err := listNodes(ctx, r)
	if err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "Lost an event of a policy", "policy", object.GetName())
		return nil
	}
	var requests []reconcile.Request
	for i := range nodes {
		if plan.SelectsNode(object.(*sriovv1.SriovNetworkNodePolicy), nodes[i].Labels) {
			requests = append(requests, r.ofNode(ctx, &nodes[i])...)
		}
	}
	return requests
}

// Reconcile brings one node's spec up to date, and writes nothing when it is.
func (r *nodeState) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	state := &sriovv1.SriovNetworkNodeState{}
	missing := false
	if err := r.Get(ctx, request.NamespacedName, state); apierrors.IsNotFound(err) {
		missing = true
	} else if err != nil {
		return ctrl.Result{}, fmt.Errorf("read SriovNetworkNodeState %s: %w", request.Name, err)
	}
	node := nodeMetadata()
	err := r.Get(ctx, client.ObjectKey{Name: request.Name}, node)
	if client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("read node %s: %w", request.Name, err)
	}
	if err != nil { // the node is gone
		if missing {
			return ctrl.Result{}, nil
		}
		uid := state.UID
		if err = r.Delete(ctx, state, client.Preconditions{UID: &uid}); client.IgnoreNotFound(err) != nil {
			return ctrl.Result{}, fmt.Errorf("delete the SriovNetworkNodeState of node %s, which is gone: %w", request.Name, err)
		}
		return ctrl.Result{}, nil
	}
	config, agents := &sriovv1.SriovOperatorConfig{}, &appsv1.DaemonSet{}
	err = r.Get(ctx, client.ObjectKey{Namespace: r.namespace, Name: sriovv1.DefaultOperatorConfigName}, config)
	if client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("read SriovOperatorConfig %s: %w", sriovv1.DefaultOperatorConfigName, err)
	}
	unwanted := err != nil
	if !unwanted {
		err = r.Get(ctx, client.ObjectKey{Namespace: r.namespace, Name: agentName}, agents, client.UnsafeDisableDeepCopy)
		if apierrors.IsNotFound(err) {
			return ctrl.Result{}, nil // it is about to be made, which wakes us
		}
		if err != nil {
			return ctrl.Result{}, fmt.Errorf("read DaemonSet %s: %w", agentName, err)
		}
	}
	if unwanted || !selects(agents.Spec.Template.Spec.NodeSelector, node.Labels) {
		if missing {
			return ctrl.Result{}, nil
		}
		return ctrl.Result{}, deleteOfConfig(ctx, r, state)
	}
	policies := &sriovv1.SriovNetworkNodePolicyList{}
	if err = r.List(ctx, policies, client.InNamespace(r.namespace)); err != nil {
		return ctrl.Result{}, fmt.Errorf("list policies: %w", err)
	}
	pools := &sriovv1.SriovNetworkPoolConfigList{}
	if err = r.List(ctx, pools, client.InNamespace(r.namespace), client.UnsafeDisableDeepCopy); err != nil {
		return ctrl.Result{}, fmt.Errorf("list pools: %w", err)
	}
	spec, _ := plan.Desired(inEffect(policies.Items), node.Labels, state.Status.Interfaces, state.Spec)
	spec.System.RdmaMode = plan.RdmaMode(plan.NewPools(pools.Items).Of(node.Labels), state.Spec.System.RdmaMode)
	if !missing && equality.Semantic.DeepEqual(spec, state.Spec) && metav1.IsControlledBy(state, config) {
		return ctrl.Result{}, nil
	}
	if err = r.apply(ctx, request.NamespacedName, config, &spec); err != nil {
		return ctrl.Result{}, err
	}
	ctrl.LoggerFrom(ctx).Info("Applied the node's spec", "node", request.Name, "interfaces", len(spec.Interfaces))
	if missing {
		return ctrl.Result{}, r.awaitAgent(ctx, request.NamespacedName)
	}
	return ctrl.Result{}, nil
}

// apply writes the spec.
func (r *nodeState) apply(ctx context.Context, key client.ObjectKey, config *sriovv1.SriovOperatorConfig, spec *sriovv1.SriovNetworkNodeStateSpec) error {
	// Interfaces are always given, if only as an empty list: what is left out of an apply
	// stays when somebody else has written it too. The rest of the spec is not ours.
	part, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&struct {
		Interfaces []sriovv1.Interface `json:"interfaces"`
		System     sriovv1.System      `json:"system,omitzero"`
	}{append([]sriovv1.Interface{}, spec.Interfaces...), spec.System})
	if err != nil {
		return fmt.Errorf("convert the spec of SriovNetworkNodeState %s: %w", key.Name, err)
	}
	desired := &unstructured.Unstructured{Object: map[string]any{"spec": part}}
	desired.SetGroupVersionKind(sriovv1.SchemeGroupVersion.WithKind("SriovNetworkNodeState"))
	desired.SetNamespace(key.Namespace)
	desired.SetName(key.Name)
	desired.SetOwnerReferences([]metav1.OwnerReference{ownedBy(config)})
	if err := r.Apply(ctx, client.ApplyConfigurationFromUnstructured(desired), fieldOwner, client.ForceOwnership); err != nil {
		return fmt.Errorf("apply the spec of SriovNetworkNodeState %s: %w", key.Name, err)
	}
	return nil
}

// awaitAgent says in a new state what to look at should nothing else ever be said there.
func (r *nodeState) awaitAgent(ctx context.Context, key client.ObjectKey) error {
	status, err := applyStatus("SriovNetworkNodeState", key, &struct {
		Conditions []metav1.Condition `json:"conditions"`
	}{[]metav1.Condition{{
		Type: sriovv1.ConditionReady, Status: metav1.ConditionUnknown, Reason: "AgentPending", LastTransitionTime: metav1.Now(),
		Message: "no agent has reported from this node yet: see that its sluice-agent pod runs (kubectl get pods -o wide)",
	}}})
	if err != nil {
		return err
	}
	// Not forced: if the agent was faster, its word stands.
	if err := r.Status().Apply(ctx, status, fieldOwner); err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
		return fmt.Errorf("apply the first status of SriovNetworkNodeState %s: %w", key.Name, err)
	}
	return nil
}

// inEffect leaves out policies that are being deleted.
func inEffect(policies []sriovv1.SriovNetworkNodePolicy) []sriovv1.SriovNetworkNodePolicy {
	var kept []sriovv1.SriovNetworkNodePolicy
	for _, p := range policies {
		if p.DeletionTimestamp == nil {
			kept = append(kept, p)
		}
	}
	return kept
}
