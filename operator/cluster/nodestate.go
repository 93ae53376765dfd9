package cluster

import (
	"context"
	"fmt"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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
		WatchesMetadata(nodeMetadata(), handler.EnqueueRequestsFromMapFunc(r.ofNode), builder.WithPredicates(predicate.LabelChangedPredicate{})).
		// On an update the old and the new policy are both mapped, so that nodes it no
		// longer selects are seen to as well.
		Watches(&sriovv1.SriovNetworkNodePolicy{}, handler.EnqueueRequestsFromMapFunc(r.ofPolicy), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Complete(r)
}

func (r *nodeState) ofNode(_ context.Context, node client.Object) []reconcile.Request {
	return []reconcile.Request{{NamespacedName: client.ObjectKey{Namespace: r.namespace, Name: node.GetName()}}}
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
	if err != nil || !runsLinux(node) {
		if missing {
			return ctrl.Result{}, nil
		}
		uid := state.UID
		if err = r.Delete(ctx, state, client.Preconditions{UID: &uid}); client.IgnoreNotFound(err) != nil {
			return ctrl.Result{}, fmt.Errorf("delete the SriovNetworkNodeState of node %s, which is gone: %w", request.Name, err)
		}
		return ctrl.Result{}, nil
	}
	policies := &sriovv1.SriovNetworkNodePolicyList{}
	if err = r.List(ctx, policies, client.InNamespace(r.namespace)); err != nil {
		return ctrl.Result{}, fmt.Errorf("list policies: %w", err)
	}
	spec, _ := plan.Desired(inEffect(policies.Items), node.Labels, state.Status.Interfaces, state.Spec)
	if !missing && equality.Semantic.DeepEqual(spec, state.Spec) {
		return ctrl.Result{}, nil
	}
	// Interfaces are always given, if only as an empty list: what is left out of an apply
	// stays when somebody else has written it too. The rest of the spec is not ours.
	desired, err := applyPart("SriovNetworkNodeState", request.NamespacedName, "spec", &struct {
		Interfaces []sriovv1.Interface `json:"interfaces"`
	}{append([]sriovv1.Interface{}, spec.Interfaces...)})
	if err != nil {
		return ctrl.Result{}, err
	}
	if err = r.Apply(ctx, desired, fieldOwner, client.ForceOwnership); err != nil {
		return ctrl.Result{}, fmt.Errorf("apply the spec of SriovNetworkNodeState %s: %w", request.Name, err)
	}
	ctrl.LoggerFrom(ctx).Info("Applied the node's spec", "node", request.Name, "interfaces", len(spec.Interfaces))
	if missing {
		return ctrl.Result{}, r.awaitAgent(ctx, request.NamespacedName)
	}
	return ctrl.Result{}, nil
}

// awaitAgent says in a new state what to look at should nothing else ever be said there.
func (r *nodeState) awaitAgent(ctx context.Context, key client.ObjectKey) error {
	status, err := applyPart("SriovNetworkNodeState", key, "status", &struct {
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
