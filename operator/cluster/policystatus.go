package cluster

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
)

// Reasons of a policy's conditions, besides the plan's.
const (
	reasonAllNodesReady   = "AllNodesReady"
	reasonNoNodeSelected  = "NoNodeSelected"
	reasonNodesInProgress = "NodesInProgress"
	reasonNodeFailed      = "NodeFailed"
)

// policyStatus writes into a policy what became of it on all nodes. It computes that
// from the objects alone, so that a new leader says the same as the old one did.
type policyStatus struct {
	client.Client
	namespace string
	events    events.EventRecorder

	// judged remembers the verdicts of nodes that have not changed since, because a report
	// of one node wakes all policies. Only one worker runs, so nothing guards it.
	judged map[string]judgement
}

// judgement is what became of all policies on one node, and the versions of the objects
// that says so of.
type judgement struct {
	node, state, policies string
	verdicts              map[string]verdict // by policy; only those that select the node
}

func (r *policyStatus) setup(mgr ctrl.Manager) error {
	all := handler.EnqueueRequestsFromMapFunc(r.allPolicies)
	return ctrl.NewControllerManagedBy(mgr).
		Named("policystatus").
		// What becomes of one policy depends on the others.
		Watches(&sriovv1.SriovNetworkNodePolicy{}, all, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&sriovv1.SriovNetworkNodeState{}, all).
		WatchesMetadata(nodeMetadata(), all, builder.WithPredicates(predicate.LabelChangedPredicate{})).
		Complete(r)
}

func (r *policyStatus) allPolicies(ctx context.Context, _ client.Object) []reconcile.Request {
	policies := &sriovv1.SriovNetworkNodePolicyList{}
	if err := r.List(ctx, policies, client.InNamespace(r.namespace)); err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "Lost an event: the policies could not be listed")
		return nil
	}
	var requests []reconcile.Request
	for i := range policies.Items {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&policies.Items[i])})
	}
	return requests
}

// Reconcile writes one policy's status, if it changed.
func (r *policyStatus) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	policy := &sriovv1.SriovNetworkNodePolicy{}
	if err := r.Get(ctx, request.NamespacedName, policy); err != nil || policy.DeletionTimestamp != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	policies := &sriovv1.SriovNetworkNodePolicyList{}
	if err := r.List(ctx, policies, client.InNamespace(r.namespace)); err != nil {
		return ctrl.Result{}, fmt.Errorf("list policies: %w", err)
	}
	states := &sriovv1.SriovNetworkNodeStateList{}
	if err := r.List(ctx, states, client.InNamespace(r.namespace)); err != nil {
		return ctrl.Result{}, fmt.Errorf("list node states: %w", err)
	}
	nodes, err := listNodes(ctx, r)
	if err != nil {
		return ctrl.Result{}, err
	}
	status := summarise(policy, r.judgeAll(inEffect(policies.Items), nodes, states.Items))
	if equality.Semantic.DeepEqual(status, policy.Status) {
		return ctrl.Result{}, nil
	}
	desired, err := applyStatus("SriovNetworkNodePolicy", request.NamespacedName, &status)
	if err != nil {
		return ctrl.Result{}, err
	}
	if err := r.Status().Apply(ctx, desired, fieldOwner, client.ForceOwnership); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(fmt.Errorf("apply the status of SriovNetworkNodePolicy %s: %w", request.Name, err))
	}
	reportTransition(r.events, policy, policy.Status.Conditions, status.Conditions)
	return ctrl.Result{}, nil
}

// verdict is what became of a policy on one node.
type verdict struct {
	reason   string
	message  string
	ready    bool // in effect on all PFs that it selects
	progress bool // the agent has yet to finish
	degraded bool // somebody has to mend something
}

// judgeAll gives the judgements of all Linux nodes, by node.
func (r *policyStatus) judgeAll(policies []sriovv1.SriovNetworkNodePolicy, nodes []metav1.PartialObjectMetadata,
	states []sriovv1.SriovNetworkNodeState,
) map[string]judgement {
	var versions strings.Builder
	for _, p := range policies {
		fmt.Fprintf(&versions, "%s/%d ", p.UID, p.Generation)
	}
	byName := map[string]*sriovv1.SriovNetworkNodeState{}
	for i := range states {
		byName[states[i].Name] = &states[i]
	}
	all := make(map[string]judgement, len(nodes))
	for i := range nodes {
		node, state := &nodes[i], byName[nodes[i].Name]
		if !runsLinux(node) {
			continue
		}
		j := judgement{node: string(node.UID) + node.ResourceVersion, policies: versions.String()}
		if state != nil {
			j.state = string(state.UID) + state.ResourceVersion
		}
		if old := r.judged[node.Name]; old.node == j.node && old.state == j.state && old.policies == j.policies {
			j.verdicts = old.verdicts
		} else {
			j.verdicts = judge(policies, node, state)
		}
		all[node.Name] = j
	}
	r.judged = all
	return all
}

// summarise makes a policy's status from what became of it on every node.
func summarise(policy *sriovv1.SriovNetworkNodePolicy, nodes map[string]judgement) sriovv1.SriovNetworkNodePolicyStatus {
	status := *policy.Status.DeepCopy()
	status.ObservedGeneration = policy.Generation
	status.MatchedNodeCount, status.ReadyNodeCount = 0, 0
	bare := 0 // nodes without a PF for it, which is no fault where others have one
	open := map[verdict][]string{}
	for node, j := range nodes {
		v, selected := j.verdicts[policy.Name]
		if !selected {
			continue
		}
		status.MatchedNodeCount++
		switch {
		case v.ready:
			status.ReadyNodeCount++
		case v.reason == string(plan.NoNICSelected):
			bare++
			open[v] = append(open[v], node)
		default:
			open[v] = append(open[v], node)
		}
	}
	if bare < status.MatchedNodeCount {
		maps.DeleteFunc(open, func(v verdict, _ []string) bool { return v.reason == string(plan.NoNICSelected) })
	}

	ready := metav1.Condition{Type: sriovv1.ConditionReady, Status: metav1.ConditionFalse}
	progressing := metav1.Condition{Type: sriovv1.ConditionProgressing, Status: metav1.ConditionFalse}
	degraded := metav1.Condition{Type: sriovv1.ConditionDegraded, Status: metav1.ConditionFalse}
	switch {
	case status.MatchedNodeCount == 0:
		ready.Reason, ready.Message = reasonNoNodeSelected, "nodeSelector selects no Linux node: compare it with kubectl get nodes --show-labels"
	case len(open) == 0:
		ready.Status, ready.Reason = metav1.ConditionTrue, reasonAllNodesReady
		ready.Message = fmt.Sprintf("in effect on %d of %d selected nodes", status.ReadyNodeCount, status.MatchedNodeCount)
		if bare > 0 {
			ready.Message += fmt.Sprintf("; %d have no NIC that nicSelector selects", bare)
		}
	default:
		ready.Reason, ready.Message = tell(open)
	}
	for v := range open {
		if v.progress {
			progressing.Status = metav1.ConditionTrue
		}
		if v.degraded {
			degraded.Status = metav1.ConditionTrue
		}
	}
	for _, c := range []metav1.Condition{ready, progressing, degraded} {
		c.ObservedGeneration = policy.Generation
		c.Reason, c.Message = cmp.Or(c.Reason, ready.Reason), cmp.Or(c.Message, ready.Message)
		meta.SetStatusCondition(&status.Conditions, c)
	}
	return status
}

// tell puts what is open on the nodes into a reason and a message: faults first, and
// nodes with the same one together.
func tell(open map[verdict][]string) (reason, message string) {
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
	return verdicts[0].reason, shorten(strings.Join(parts, "; "), 32768) // the API's limit for messages
}

// judge says what became of each policy that selects the node.
func judge(policies []sriovv1.SriovNetworkNodePolicy, node *metav1.PartialObjectMetadata, state *sriovv1.SriovNetworkNodeState) map[string]verdict {
	verdicts := map[string]verdict{}
	if state == nil {
		for i := range policies {
			if plan.SelectsNode(&policies[i], node.Labels) {
				verdicts[policies[i].Name] = verdict{reason: reasonNodesInProgress, message: "its SriovNetworkNodeState is being made", progress: true}
			}
		}
		return verdicts
	}
	spec, findings := plan.Desired(policies, node.Labels, state.Status.Interfaces, state.Spec)
	acted := equality.Semantic.DeepEqual(spec, state.Spec) && state.Status.ObservedGeneration == state.Generation
	pfs := map[string][]string{} // PFs that have a policy's VFs
	for _, f := range findings {
		if _, settled := verdicts[f.Policy]; settled {
			continue
		}
		switch {
		case f.Refused():
			verdicts[f.Policy] = verdict{reason: string(f.Reason), message: f.Message, degraded: f.Reason != plan.Overridden}
		case f.Reason == plan.Configured:
			pfs[f.Policy] = append(pfs[f.Policy], f.PCIAddress)
		case f.Reason == plan.InventoryPending && state.Status.ObservedGeneration > 0:
			verdicts[f.Policy] = verdict{reason: string(plan.NoNICSelected), message: "the node has no SR-IOV NIC", degraded: true}
		case f.Reason == plan.InventoryPending:
			verdicts[f.Policy] = verdict{reason: string(f.Reason), message: f.Message, progress: true}
		case f.Reason == plan.NoNICSelected, f.Reason == plan.PolicyIgnored:
			verdicts[f.Policy] = verdict{reason: string(f.Reason), message: f.Message, degraded: true}
		}
	}
	for policy, configured := range pfs {
		if _, refused := verdicts[policy]; refused {
			continue
		}
		if acted {
			verdicts[policy] = onNode(policy, configured, state)
		} else {
			verdicts[policy] = verdict{reason: reasonNodesInProgress, message: "the node's agent has yet to act on the spec", progress: true}
		}
	}
	return verdicts
}

// onNode says how far the agent is with the policy's PFs. Trouble on other PFs of the
// node is not the policy's.
func onNode(policy string, pfs []string, state *sriovv1.SriovNetworkNodeState) verdict {
	if meta.IsStatusConditionTrue(state.Status.Conditions, sriovv1.ConditionReady) {
		return verdict{ready: true}
	}
	var troubles []string
	for i := range state.Status.Interfaces {
		pf := &state.Status.Interfaces[i]
		if !slices.Contains(pfs, pf.PciAddress) {
			continue
		}
		if pf.Message != "" {
			troubles = append(troubles, fmt.Sprintf("PF %s: %s", cmp.Or(pf.Name, pf.PciAddress), pf.Message))
		}
		for _, vf := range pf.VFs {
			if vf.Message != "" && isOf(policy, state, pf.PciAddress, vf.VfID) {
				troubles = append(troubles, fmt.Sprintf("VF %d of PF %s: %s", vf.VfID, cmp.Or(pf.Name, pf.PciAddress), vf.Message))
			}
		}
	}
	switch progressing := meta.IsStatusConditionTrue(state.Status.Conditions, sriovv1.ConditionProgressing); {
	case len(troubles) > 0:
		return verdict{reason: reasonNodeFailed, message: strings.Join(troubles, "; "), progress: progressing, degraded: true}
	case progressing || len(state.Status.Conditions) == 0:
		return verdict{reason: reasonNodesInProgress, message: cmp.Or(readyMessage(state), "the node's agent is at work"), progress: true}
	case state.Status.LastSyncError != "" && !hasMessages(state):
		// The agent failed as a whole and blames no PF.
		return verdict{reason: reasonNodeFailed, message: state.Status.LastSyncError, degraded: true}
	}
	return verdict{ready: true}
}

func readyMessage(state *sriovv1.SriovNetworkNodeState) string {
	if ready := meta.FindStatusCondition(state.Status.Conditions, sriovv1.ConditionReady); ready != nil {
		return ready.Message
	}
	return ""
}

func hasMessages(state *sriovv1.SriovNetworkNodeState) bool {
	return slices.ContainsFunc(state.Status.Interfaces, func(pf sriovv1.InterfaceExt) bool {
		return pf.Message != "" || slices.ContainsFunc(pf.VFs, func(vf sriovv1.VirtualFunction) bool { return vf.Message != "" })
	})
}

// isOf tells whether the spec gives a VF to the policy.
func isOf(policy string, state *sriovv1.SriovNetworkNodeState, pf string, vf int) bool {
	for _, iface := range state.Spec.Interfaces {
		for _, group := range iface.VfGroups {
			first, last, err := plan.ParseVfRange(group.VfRange)
			if err == nil && iface.PciAddress == pf && group.PolicyName == policy && first <= vf && vf <= last {
				return true
			}
		}
	}
	return false
}
