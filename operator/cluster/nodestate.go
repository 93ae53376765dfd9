package cluster

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
)

// nodeState keeps the spec of one node's SriovNetworkNodeState as the policies want it.
type nodeState struct {
	client.Client
	namespace string
	tally     *tally

	prepared atomic.Pointer[policies]
	edition  atomic.Int64
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
		Watches(&sluicev1.MacvlanNodePolicy{}, handler.EnqueueRequestsFromMapFunc(r.ofPolicy), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		// Each works on another node; most of their time is the API server's.
		WithOptions(controller.Options{MaxConcurrentReconciles: 8}).
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
	r.edition.Add(1) // the cache has it already
	nodes, err := listNodes(ctx, r)
	if err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "Lost an event of a policy", "policy", object.GetName())
		return nil
	}
	selector := map[string]string{}
	switch p := object.(type) {
	case *sriovv1.SriovNetworkNodePolicy:
		selector = p.Spec.NodeSelector
	case *sluicev1.MacvlanNodePolicy:
		selector = p.Spec.NodeSelector
	}
	var requests []reconcile.Request
	for i := range nodes {
		if plan.SelectsNode(selector, nodes[i].Labels) {
			requests = append(requests, r.ofNode(ctx, &nodes[i])...)
		}
	}
	return requests
}

// Reconcile brings one node's spec up to date, writes nothing when it is, and says what
// became of each policy there.
func (r *nodeState) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	// What the cache has is only read here: with thousands of nodes, copies would cost more
	// than all the rest.
	state, missing := &sriovv1.SriovNetworkNodeState{}, false
	if err := r.Get(ctx, request.NamespacedName, state, client.UnsafeDisableDeepCopy); apierrors.IsNotFound(err) {
		missing = true
	} else if err != nil {
		return ctrl.Result{}, fmt.Errorf("read SriovNetworkNodeState %s: %w", request.Name, err)
	}
	node := nodeMetadata()
	err := r.Get(ctx, client.ObjectKey{Name: request.Name}, node, client.UnsafeDisableDeepCopy)
	if client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("read node %s: %w", request.Name, err)
	}
	if err != nil {
		return ctrl.Result{}, r.forget(ctx, request.Name, state, missing)
	}
	config, hasAgent, err := r.hasAgent(ctx, node)
	if err != nil {
		return ctrl.Result{}, err
	}
	policies, err := r.policies(ctx, config != nil && config.Spec.FeatureGates[plan.GateBridges])
	if err != nil {
		return ctrl.Result{}, err
	}
	if !hasAgent {
		r.tally.set(request.Name, policies.selecting(node, verdict{reason: reasonNoAgent}))
		if missing || config == nil {
			return ctrl.Result{}, nil
		}
		return ctrl.Result{}, deleteOfConfig(ctx, r, state.DeepCopy())
	}
	pools := &sriovv1.SriovNetworkPoolConfigList{}
	if err = r.List(ctx, pools, client.InNamespace(r.namespace), client.UnsafeDisableDeepCopy); err != nil {
		return ctrl.Result{}, fmt.Errorf("list pools: %w", err)
	}
	spec, verdicts := renderNode(policies, plan.NewPools(pools.Items), config, node, state, missing)
	r.tally.set(request.Name, verdicts)
	if !missing && upToDate(state, &spec, config) && metav1.IsControlledBy(state, config) {
		renders.WithLabelValues("unchanged").Inc()
		return ctrl.Result{}, nil
	}
	if err = r.apply(ctx, state, request.NamespacedName, config, &spec); err != nil {
		return ctrl.Result{}, err
	}
	renders.WithLabelValues("written").Inc()
	ctrl.LoggerFrom(ctx).Info("Applied the node's spec", "node", request.Name, "interfaces", len(spec.Interfaces))
	if missing {
		return ctrl.Result{}, r.awaitAgent(ctx, request.NamespacedName)
	}
	return ctrl.Result{}, nil
}

// forget removes the state of a node that is gone.
func (r *nodeState) forget(ctx context.Context, node string, state *sriovv1.SriovNetworkNodeState, missing bool) error {
	r.tally.set(node, nil)
	if missing {
		return nil
	}
	uid := state.UID
	if err := r.Delete(ctx, state.DeepCopy(), client.Preconditions{UID: &uid}); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete the SriovNetworkNodeState of node %s, which is gone: %w", node, err)
	}
	return nil
}

// renderNode gives the spec that a node shall have, and what became of each policy there.
func renderNode(policies *policies, pools *plan.Pools, config *sriovv1.SriovOperatorConfig, node *metav1.PartialObjectMetadata,
	state *sriovv1.SriovNetworkNodeState, missing bool,
) (sriovv1.SriovNetworkNodeStateSpec, map[policyKey]judged) {
	if isRestoring(config) {
		return sriovv1.SriovNetworkNodeStateSpec{}, policies.selecting(node,
			verdict{reason: reasonRestoring, message: "its NICs are given back, because SriovOperatorConfig default is being deleted", progress: true})
	}
	spec, findings := policies.compiled.Desired(node.Labels, state.Status.Interfaces, state.Spec)
	var macvlanFindings []plan.Finding
	spec.Macvlans, macvlanFindings = plan.DesiredMacvlan(policies.macvlans, node.Labels, state.Status.Links, spec)
	spec.System.RdmaMode = plan.RdmaMode(pools.Of(node.Labels), state.Spec.System.RdmaMode)
	if missing {
		return spec, policies.selecting(node, verdict{reason: reasonNodesInProgress, message: "its SriovNetworkNodeState is being made", progress: true})
	}
	acted := upToDate(state, &spec, config) && state.Status.ObservedGeneration == state.Generation
	return spec, policies.judged(
		judge(findings, state, acted, "the node has no SR-IOV NIC", onPFs(state)),
		judge(macvlanFindings, state, acted, "the node has no link that can be a parent", onLinks(macvlanFindings, state)))
}

// upToDate tells whether a state asks of its agent what it should.
func upToDate(state *sriovv1.SriovNetworkNodeState, spec *sriovv1.SriovNetworkNodeStateSpec, config *sriovv1.SriovOperatorConfig) bool {
	return (state.Annotations[sriovv1.AnnotationRemoval] != "") == isRestoring(config) && equality.Semantic.DeepEqual(*spec, state.Spec)
}

// hasAgent tells whether the node gets an agent. The configuration is nil while that is
// not to be acted on: there is no DaemonSet that would say.
func (r *nodeState) hasAgent(ctx context.Context, node *metav1.PartialObjectMetadata) (*sriovv1.SriovOperatorConfig, bool, error) {
	config, agents := &sriovv1.SriovOperatorConfig{}, &appsv1.DaemonSet{}
	err := r.Get(ctx, client.ObjectKey{Namespace: r.namespace, Name: sriovv1.DefaultOperatorConfigName}, config, client.UnsafeDisableDeepCopy)
	if apierrors.IsNotFound(err) {
		return config, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("read SriovOperatorConfig %s: %w", sriovv1.DefaultOperatorConfigName, err)
	}
	err = r.Get(ctx, client.ObjectKey{Namespace: r.namespace, Name: agentName}, agents, client.UnsafeDisableDeepCopy)
	if apierrors.IsNotFound(err) {
		return nil, false, nil // it is about to be made, which wakes us
	}
	if err != nil {
		return nil, false, fmt.Errorf("read DaemonSet %s: %w", agentName, err)
	}
	return config, plan.SelectsNode(agents.Spec.Template.Spec.NodeSelector, node.Labels), nil
}

// policies are all that are in effect, of the cache, made ready for planning.
type policies struct {
	vfs      []sriovv1.SriovNetworkNodePolicy
	macvlans []sluicev1.MacvlanNodePolicy
	compiled *plan.Policies
	edition  int64 // how many events of policies there had been
	bridges  bool  // the feature gate
}

// policies reads the policies, and prepares them for all nodes, once after each event.
func (r *nodeState) policies(ctx context.Context, bridges bool) (*policies, error) {
	edition := r.edition.Load() // before they are read: what comes later is of the next
	if last := r.prepared.Load(); last != nil && last.edition == edition && last.bridges == bridges {
		return last, nil
	}
	vfs, macvlans := &sriovv1.SriovNetworkNodePolicyList{}, &sluicev1.MacvlanNodePolicyList{}
	if err := r.List(ctx, vfs, client.InNamespace(r.namespace), client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list policies: %w", err)
	}
	if err := r.List(ctx, macvlans, client.InNamespace(r.namespace), client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list MacVLAN policies: %w", err)
	}
	p := &policies{
		vfs:      slices.DeleteFunc(vfs.Items, func(p sriovv1.SriovNetworkNodePolicy) bool { return p.DeletionTimestamp != nil }),
		macvlans: slices.DeleteFunc(macvlans.Items, func(p sluicev1.MacvlanNodePolicy) bool { return p.DeletionTimestamp != nil }),
		edition:  edition,
		bridges:  bridges,
	}
	p.compiled = plan.Compile(p.vfs, bridges)
	r.prepared.Store(p)
	return p, nil
}

// selecting gives the same verdict to all policies that select the node.
func (p *policies) selecting(node *metav1.PartialObjectMetadata, v verdict) map[policyKey]judged {
	all := map[policyKey]judged{}
	if !runsLinux(node) {
		return all
	}
	for i := range p.vfs {
		if o := &p.vfs[i]; plan.SelectsNode(o.Spec.NodeSelector, node.Labels) {
			all[policyKey{kindPolicy, o.Name}] = judged{v, o.Generation}
		}
	}
	for i := range p.macvlans {
		if o := &p.macvlans[i]; plan.SelectsNode(o.Spec.NodeSelector, node.Labels) {
			all[policyKey{kindMacvlanPolicy, o.Name}] = judged{v, o.Generation}
		}
	}
	return all
}

// judged adds to verdicts the generations of the policies that they are about.
func (p *policies) judged(vfs, macvlans map[string]verdict) map[policyKey]judged {
	all := make(map[policyKey]judged, len(vfs)+len(macvlans))
	for i := range p.vfs {
		if v, ok := vfs[p.vfs[i].Name]; ok {
			all[policyKey{kindPolicy, p.vfs[i].Name}] = judged{v, p.vfs[i].Generation}
		}
	}
	for i := range p.macvlans {
		if v, ok := macvlans[p.macvlans[i].Name]; ok {
			all[policyKey{kindMacvlanPolicy, p.macvlans[i].Name}] = judged{v, p.macvlans[i].Generation}
		}
	}
	return all
}

// ovsBridges are Bridges with a list that is given also when it is empty.
type ovsBridges struct {
	OVS []sriovv1.OVSConfigExt `json:"ovs"`
}

// apply writes the spec over that of a state, which is empty where there is none yet.
func (r *nodeState) apply(ctx context.Context, state *sriovv1.SriovNetworkNodeState, key client.ObjectKey, config *sriovv1.SriovOperatorConfig, spec *sriovv1.SriovNetworkNodeStateSpec) error {
	if state.Spec.System.RdmaMode != "" && spec.System.RdmaMode == "" {
		// What another operator wrote stays when an apply leaves it out.
		clearing := client.RawPatch(types.MergePatchType, []byte(`{"spec":{"system":{"rdmaMode":null}}}`))
		if err := r.Patch(ctx, state.DeepCopy(), clearing, fieldOwner); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("clear rdmaMode of SriovNetworkNodeState %s: %w", key.Name, err)
		}
	}
	// Lists are always given, if only as empty ones: what is left out of an apply stays
	// when somebody else has written it too.
	part, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&struct {
		Interfaces []sriovv1.Interface     `json:"interfaces"`
		Bridges    ovsBridges              `json:"bridges"`
		Macvlans   []sriovv1.MacvlanParent `json:"macvlans"`
		System     sriovv1.System          `json:"system,omitzero"`
	}{append([]sriovv1.Interface{}, spec.Interfaces...), ovsBridges{append([]sriovv1.OVSConfigExt{}, spec.Bridges.OVS...)}, append([]sriovv1.MacvlanParent{}, spec.Macvlans...), spec.System})
	if err != nil {
		return fmt.Errorf("convert the spec of SriovNetworkNodeState %s: %w", key.Name, err)
	}
	desired := &unstructured.Unstructured{Object: map[string]any{"spec": part}}
	desired.SetGroupVersionKind(sriovv1.SchemeGroupVersion.WithKind("SriovNetworkNodeState"))
	desired.SetNamespace(key.Namespace)
	desired.SetName(key.Name)
	desired.SetOwnerReferences([]metav1.OwnerReference{ownedBy(config)})
	if isRestoring(config) {
		desired.SetAnnotations(map[string]string{sriovv1.AnnotationRemoval: "true"})
	}
	if err := r.Apply(ctx, client.ApplyConfigurationFromUnstructured(desired), fieldOwner, client.ForceOwnership); err != nil {
		return fmt.Errorf("apply the spec of SriovNetworkNodeState %s: %w", key.Name, err)
	}
	return nil
}

// awaitAgent says in a new state what to look at should nothing else ever be said there.
func (r *nodeState) awaitAgent(ctx context.Context, key client.ObjectKey) error {
	status, err := applyStatus(sriovv1.SchemeGroupVersion.WithKind("SriovNetworkNodeState"), key, &struct {
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
