package cluster

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
)

// Reasons of a policy's conditions, besides the plan's.
const (
	reasonAllNodesReady   = "AllNodesReady"
	reasonNoNodeSelected  = "NoNodeSelected"
	reasonNodesInProgress = "NodesInProgress"
	reasonNodeFailed      = "NodeFailed"
	reasonNoAgent         = "NoAgent"
	reasonRebootRequired  = "RebootRequired"
)

// Kinds of policies.
const (
	kindPolicy        = "SriovNetworkNodePolicy"
	kindMacvlanPolicy = "MacvlanNodePolicy"
)

// policyKey names a policy of either kind.
type policyKey struct{ kind, name string }

// verdict is what became of a policy on one node.
type verdict struct {
	reason   string
	message  string // of one that is ready: what it names and does not select; may be empty
	ready    bool   // in effect on all that it selects
	progress bool   // the agent has yet to finish
	degraded bool   // somebody has to mend something
}

// judged is a verdict with the generation of the policy that it speaks of.
type judged struct {
	verdict
	generation int64
}

// maxVerdict keeps what is remembered of each node, and what is read of four, small.
const maxVerdict = 2000

// judge says what became of the policies of one kind that have findings on a node. bare
// is what a node without anything to select from is said to have; onNode says how far the
// agent is with what a policy has there, once it has acted on the spec.
func judge(findings []plan.Finding, state *sriovv1.SriovNetworkNodeState, acted bool, bare string, onNode func(policy string, places []string) verdict) map[string]verdict {
	verdicts := map[string]verdict{}
	places := map[string][]string{} // PFs or links that have what a policy asks
	passed := map[string][]string{} // why not those that its selector names
	for _, f := range findings {
		if _, settled := verdicts[f.Policy]; settled {
			continue
		}
		v := verdict{reason: string(f.Reason), message: shorten(f.String(), maxVerdict)}
		switch {
		case f.Refused():
			v.degraded = f.Reason != plan.Overridden
		case f.Reason == plan.NotSelected && f.Named:
			passed[f.Policy] = append(passed[f.Policy], f.Message)
			continue
		case f.Reason == plan.Configured:
			places[f.Policy] = append(places[f.Policy], cmp.Or(f.PCIAddress, f.Link))
			continue
		case f.Reason == plan.InventoryPending && state.Status.ObservedGeneration > 0:
			v = verdict{reason: string(plan.NoNICSelected), message: bare, degraded: true}
		case f.Reason == plan.InventoryPending:
			v.progress = true
		case f.Reason == plan.NoNICSelected:
			v.degraded = true
		case f.Reason == plan.PolicyIgnored: // nothing is missing
		default:
			continue
		}
		verdicts[f.Policy] = v
	}
	for policy, where := range places {
		if _, refused := verdicts[policy]; refused {
			continue
		}
		v := verdict{reason: reasonNodesInProgress, message: "the node's agent has yet to act on the spec", progress: true}
		if acted {
			if v = onNode(policy, where); v.ready {
				v.message = strings.Join(passed[policy], "; ")
			}
			v.message = shorten(v.message, maxVerdict)
		}
		verdicts[policy] = v
	}
	return verdicts
}

// onPFs says how far the agent is with a policy's PFs. Trouble on other PFs of the node is
// not the policy's.
func onPFs(state *sriovv1.SriovNetworkNodeState) func(string, []string) verdict {
	return func(policy string, pfs []string) verdict {
		if meta.IsStatusConditionTrue(state.Status.Conditions, sriovv1.ConditionReady) {
			return verdict{ready: true}
		}
		if v, waits := waiting(state, pfs); waits {
			return v
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
}

// waiting says for which pods, or for what else, changes of the PFs or of the whole node
// wait.
func waiting(state *sriovv1.SriovNetworkNodeState, pfs []string) (verdict, bool) {
	for _, change := range state.Status.Pending {
		if change.PciAddress != "" && !slices.Contains(pfs, change.PciAddress) {
			continue
		}
		evicting := meta.FindStatusCondition(state.Status.Conditions, sriovv1.ConditionEvicting)
		switch {
		case evicting != nil && evicting.Reason != reasonIdle:
			return verdict{reason: reasonNodesInProgress, message: evicting.Message, progress: true}, true
		case change.Cost == sriovv1.CostReboot:
			return verdict{
				reason: reasonRebootRequired, degraded: true,
				message: fmt.Sprintf("%s needs a reboot: %s: reboot the node, or allow it by rebootPolicy WhenRequired in its SriovNetworkPoolConfig", change.Operation, change.Reason),
			}, true
		}
		return verdict{reason: reasonNodesInProgress, message: fmt.Sprintf("%s waits: %s", change.Operation, change.Reason), progress: true}, true
	}
	return verdict{}, false
}

// onLinks says how far the agent is with the MacVLAN parents of a policy, which another
// may have that wants the very same.
func onLinks(findings []plan.Finding, state *sriovv1.SriovNetworkNodeState) func(string, []string) verdict {
	type place struct{ policy, link string }
	owners := map[place]string{}
	for _, f := range findings {
		owners[place{f.Policy, f.Link}] = f.Owner
	}
	return func(policy string, links []string) verdict {
		done := 0
		var troubles []string
		for _, parent := range state.Status.Macvlans {
			if parent.PolicyName != cmp.Or(owners[place{policy, parent.Link}], policy) || !slices.Contains(links, parent.Link) {
				continue
			}
			if parent.Ready {
				done++
			} else if parent.Message != "" {
				troubles = append(troubles, fmt.Sprintf("link %s: %s", parent.Link, parent.Message))
			}
		}
		switch {
		case done >= len(links):
			return verdict{ready: true}
		case len(troubles) > 0:
			return verdict{reason: reasonNodeFailed, message: strings.Join(troubles, "; "), degraded: true}
		}
		return verdict{reason: reasonNodesInProgress, message: cmp.Or(readyMessage(state), "the node's agent is at work"), progress: true}
	}
}

func readyMessage(state *sriovv1.SriovNetworkNodeState) string {
	if ready := meta.FindStatusCondition(state.Status.Conditions, sriovv1.ConditionReady); ready != nil {
		return ready.Message
	}
	return ""
}

func hasMessages(state *sriovv1.SriovNetworkNodeState) bool {
	return slices.ContainsFunc(state.Status.Macvlans, func(m sriovv1.MacvlanParentStatus) bool { return m.Message != "" }) || slices.ContainsFunc(state.Status.Interfaces, func(pf sriovv1.InterfaceExt) bool {
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
