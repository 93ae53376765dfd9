package cluster

import (
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
)

// fleet is a cluster of n nodes with one PF of 100 VFs each, as the policies want it.
func fleet(n int, policies []sriovv1.SriovNetworkNodePolicy) ([]metav1.PartialObjectMetadata, []sriovv1.SriovNetworkNodeState) {
	var nodes []metav1.PartialObjectMetadata
	var states []sriovv1.SriovNetworkNodeState
	for i := range n {
		node := metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("n%04d", i), Labels: map[string]string{"kubernetes.io/os": "linux"}}}
		state := sriovv1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Name: node.Name, Generation: 1}}
		pf := sriovv1.InterfaceExt{Name: "ens1f0", PciAddress: "0000:01:00.0", TotalVfs: 128}
		for vf := range 100 {
			pf.VFs = append(pf.VFs, sriovv1.VirtualFunction{VfID: vf, PciAddress: fmt.Sprintf("0000:01:%02x.%d", 1+vf/8, vf%8)})
		}
		state.Status = sriovv1.SriovNetworkNodeStateStatus{Interfaces: []sriovv1.InterfaceExt{pf}, ObservedGeneration: 1, Conditions: []metav1.Condition{condition(sriovv1.ConditionReady, metav1.ConditionTrue)}}
		state.Spec, _ = plan.Desired(policies, node.Labels, state.Status.Interfaces, state.Spec)
		nodes, states = append(nodes, node), append(states, state)
	}
	return nodes, states
}

func ten() []sriovv1.SriovNetworkNodePolicy {
	var policies []sriovv1.SriovNetworkNodePolicy
	for i := range 10 {
		p := sriovv1.SriovNetworkNodePolicy{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("p%d", i), Generation: 1}}
		p.Spec.NumVfs, p.Spec.ResourceName = 100, p.Name
		p.Spec.NicSelector.PfNames = []sriovv1.PfName{sriovv1.PfName(fmt.Sprintf("ens1f0#%d-%d", 10*i, 10*i+9))}
		policies = append(policies, p)
	}
	return policies
}

// A thousand nodes and ten policies are planned and summarised well within a second.
func TestSummariseAThousandNodes(t *testing.T) {
	policies := ten()
	start := time.Now()
	nodes, states := fleet(1000, policies)
	r := &policyStatus{}
	var status sriovv1.SriovNetworkNodePolicyStatus
	for i := range policies {
		status = summarise(&policies[i], r.judgeAll(policies, nodes, states))
	}
	t.Logf("planned and summarised in %v", time.Since(start))
	if status.MatchedNodeCount != 1000 || status.ReadyNodeCount != 1000 {
		t.Errorf("the status is %+v", status)
	}
}

// Many nodes with one trouble make one finding, and many troubles a bounded message.
func TestSummariseGroupsFindings(t *testing.T) {
	policies := ten()[:1]
	nodes, states := fleet(6, policies)
	for i := range states {
		states[i].Status.Conditions = []metav1.Condition{condition(sriovv1.ConditionReady, metav1.ConditionFalse)}
		states[i].Status.Interfaces[0].Message = "no memory"
		if i == 5 {
			states[i].Status.Interfaces[0].Message = ""
			states[i].Status.Interfaces[0].VFs[3].Message = "busy"
		}
	}
	status := summarise(&policies[0], (&policyStatus{}).judgeAll(policies, nodes, states))
	const want = "5 nodes (n0000, n0001, n0002, ...): PF ens1f0: no memory; node n0005: VF 3 of PF ens1f0: busy"
	if got := status.Conditions[0].Message; got != want {
		t.Errorf("the message is %q, want %q", got, want)
	}

	// Trouble on VFs of other policies is none of this one's.
	states[5].Status.Interfaces[0].VFs[3].Message = ""
	states[5].Status.Interfaces[0].VFs[50].Message = "busy"
	if got := summarise(&policies[0], (&policyStatus{}).judgeAll(policies, nodes, states)).ReadyNodeCount; got != 1 {
		t.Errorf("%d nodes are ready, want 1", got)
	}
}

// BenchmarkOneNodeReports is the work that one report among a thousand nodes makes.
func BenchmarkOneNodeReports(b *testing.B) {
	policies := ten()
	nodes, states := fleet(1000, policies)
	r := &policyStatus{}
	for i := 0; b.Loop(); i++ {
		states[7].ResourceVersion = fmt.Sprint(i)
		for p := range policies {
			summarise(&policies[p], r.judgeAll(policies, nodes, states))
		}
	}
}
