package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

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

// verdictsOf judges a policy on all nodes.
func verdictsOf(policies []sriovv1.SriovNetworkNodePolicy, policy string, nodes []metav1.PartialObjectMetadata, states []sriovv1.SriovNetworkNodeState) map[string]verdict {
	all := map[string]verdict{}
	for i := range nodes {
		_, findings := plan.Desired(policies, nodes[i].Labels, states[i].Status.Interfaces, states[i].Spec)
		if v, ok := judge(findings, &states[i], true, "", onPFs(&states[i]))[policy]; ok {
			all[nodes[i].Name] = v
		}
	}
	return all
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
	status := summarise(1, verdictsOf(policies, "p0", nodes, states))
	const want = "5 nodes (n0000, n0001, n0002, ...): PF ens1f0: no memory; node n0005: VF 3 of PF ens1f0: busy"
	if got := status.Conditions[0].Message; got != want {
		t.Errorf("the message is %q, want %q", got, want)
	}

	// Trouble on VFs of other policies is none of this one's.
	states[5].Status.Interfaces[0].VFs[3].Message = ""
	states[5].Status.Interfaces[0].VFs[50].Message = "busy"
	if got := summarise(1, verdictsOf(policies, "p0", nodes, states)).ReadyNodeCount; got != 1 {
		t.Errorf("%d nodes are ready, want 1", got)
	}
}

// A policy that is in effect tells of NICs that it names, and does not get by the rest of
// its selector; of others, which it leaves alone, it is silent.
func TestSummariseTellsWhatIsNamedAndNotSelected(t *testing.T) {
	policies := ten()[:1]
	policies[0].Spec.NicSelector.PfNames = []sriovv1.PfName{"ens1f0#0-9", "ens2f0"}
	policies[0].Spec.NicSelector.Vendor = "8086"
	nodes, states := fleet(2, policies)
	for i := range states {
		pf := &states[i].Status.Interfaces
		(*pf)[0].Vendor = "8086"
		*pf = append(*pf, sriovv1.InterfaceExt{Name: "ens2f0", PciAddress: "0000:02:00.0", Vendor: "15b3", TotalVfs: 8}, sriovv1.InterfaceExt{Name: "ens3f0", PciAddress: "0000:03:00.0", Vendor: "15b3", TotalVfs: 8})
	}
	ready := summarise(1, verdictsOf(policies, "p0", nodes, states)).Conditions[0]
	const want = "in effect on 2 of 2 selected nodes; nodes n0000, n0001: not PF ens2f0 (0000:02:00.0): its vendor is 15b3, nicSelector.vendor wants 8086"
	if ready.Status != metav1.ConditionTrue || ready.Message != want {
		t.Errorf("the condition is %+v, want %q", ready, want)
	}
}

// Two thousand nodes, each with a long trouble of its own, make a message of bounded length.
func TestSummariseIsBounded(t *testing.T) {
	verdicts := map[string]verdict{}
	for i := range 2000 {
		verdicts[fmt.Sprintf("n%04d", i)] = verdict{reason: reasonNodeFailed, message: fmt.Sprintf("%d: %s", i, strings.Repeat("x", maxVerdict-100)), degraded: true}
	}
	status := summarise(1, verdicts)
	if got := status.Conditions[0].Message; len(got) > 5*maxVerdict || !strings.HasSuffix(got, "and 1996 more findings on other nodes") {
		t.Errorf("the message has %d bytes and ends %q", len(got), got[len(got)-50:])
	}
}

func TestSummarise(t *testing.T) {
	bare := verdict{reason: string(plan.NoNICSelected), message: "no NIC", degraded: true}
	for _, c := range []struct {
		name           string
		verdicts       map[string]verdict
		reason         string
		ready          bool
		matched, count int
		message        string
	}{
		{"no node", nil, reasonNoNodeSelected, false, 0, 0, "nodeSelector selects no Linux node"},
		{"no agent anywhere", map[string]verdict{"a": {reason: reasonNoAgent}}, reasonNoAgent, false, 0, 0, "selects 1 nodes, and none of them gets an agent"},
		{"no agent somewhere", map[string]verdict{"a": {reason: reasonNoAgent}, "b": {ready: true}}, reasonAllNodesReady, true, 1, 1, "in effect on 1 of 1 selected nodes; 1 more get no agent"},
		{"no NIC anywhere", map[string]verdict{"a": bare}, string(plan.NoNICSelected), false, 1, 0, "node a: no NIC"},
		{"no NIC somewhere", map[string]verdict{"a": bare, "b": {ready: true}}, reasonAllNodesReady, true, 2, 1, "in effect on 1 of 2 selected nodes; 1 have no NIC"},
		{"faults come first", map[string]verdict{"a": {reason: reasonNodesInProgress, message: "m", progress: true}, "b": {reason: reasonNodeFailed, message: "f", degraded: true}}, reasonNodeFailed, false, 2, 0, "node b: f; node a: m"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := summarise(3, c.verdicts)
			ready := s.Conditions[0]
			if ready.Reason != c.reason || (ready.Status == metav1.ConditionTrue) != c.ready || !strings.Contains(ready.Message, c.message) ||
				s.MatchedNodeCount != c.matched || s.ReadyNodeCount != c.count || s.ObservedGeneration != 3 {
				t.Errorf("it is %+v", s)
			}
		})
	}
}

// What waits is told with what it waits for.
func TestWaiting(t *testing.T) {
	evict := sriovv1.PendingChange{PciAddress: "pf", Operation: "SetNumVFs 2 on pf", Cost: sriovv1.CostEvict, Reason: "pods hold VFs"}
	boot := sriovv1.PendingChange{Operation: "SetRdmaMode exclusive", Cost: sriovv1.CostReboot, Reason: "pods have namespaces"}
	blocked := condition(sriovv1.ConditionEvicting, metav1.ConditionTrue)
	blocked.Reason, blocked.Message = reasonBlocked, "the budget b"
	for _, c := range []struct {
		name       string
		pending    sriovv1.PendingChange
		conditions []metav1.Condition
		pf         string
		want       verdict
	}{
		{"another PF", evict, nil, "other", verdict{}},
		{"not looked at yet", evict, nil, "pf", verdict{reason: reasonNodesInProgress, message: "SetNumVFs 2 on pf waits: pods hold VFs", progress: true}},
		{"blocked", evict, []metav1.Condition{blocked}, "pf", verdict{reason: reasonNodesInProgress, message: "the budget b", progress: true}},
		{"a reboot that nobody allows", boot, nil, "pf", verdict{reason: reasonRebootRequired, degraded: true,
			message: "SetRdmaMode exclusive needs a reboot: pods have namespaces: reboot the node, or allow it by rebootPolicy WhenRequired in its SriovNetworkPoolConfig"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			state := &sriovv1.SriovNetworkNodeState{Status: sriovv1.SriovNetworkNodeStateStatus{Pending: []sriovv1.PendingChange{c.pending}, Conditions: c.conditions}}
			if got, _ := waiting(state, []string{c.pf}); got != c.want {
				t.Errorf("it is %+v", got)
			}
		})
	}
}

func TestOnLinks(t *testing.T) {
	state := &sriovv1.SriovNetworkNodeState{}
	state.Status.Macvlans = []sriovv1.MacvlanParentStatus{{PolicyName: "p", Link: "a", Ready: true}, {PolicyName: "p", Link: "b", Message: "no such link"}, {PolicyName: "q", Link: "c"}, {PolicyName: "q", Link: "d", Message: "no such link"}}
	for want, links := range map[verdict][]string{
		{ready: true}: {"a"},
		{reason: reasonNodeFailed, message: "link b: no such link", degraded: true}:             {"a", "b"},
		{reason: reasonNodesInProgress, message: "the node's agent is at work", progress: true}: {"c"},
		{reason: reasonNodeFailed, message: "link d: no such link", degraded: true}:             {"a", "d"},
	} {
		if got := onLinks([]plan.Finding{{Policy: "p", Link: "d", Owner: "q"}}, state)("p", links); got != want {
			t.Errorf("%v: %+v, want %+v", links, got, want)
		}
	}
}

// A policy's status is not written from half of its nodes, nor from what was said of an
// older generation of it.
func TestTally(t *testing.T) {
	woken := 0
	tl := newTally()
	tl.wake = func() { woken++ }
	k := policyKey{kindPolicy, "p"}
	tl.set("a", map[policyKey]judged{k: {verdict{ready: true}, 1}})
	if _, complete := tl.of(k, 1, []string{"a", "b"}); complete {
		t.Error("complete without node b")
	}
	tl.set("b", map[policyKey]judged{k: {verdict{ready: true}, 1}})
	if got, complete := tl.of(k, 1, []string{"a", "b"}); !complete || len(got) != 2 {
		t.Errorf("%v %t", got, complete)
	}
	if _, complete := tl.of(k, 2, []string{"a"}); complete {
		t.Error("complete with an older generation")
	}
	if got := tl.takeDirty(); len(got) != 1 || got[0] != k || len(tl.takeDirty()) != 0 || woken != 2 {
		t.Errorf("dirty is %v, woken %d times", got, woken)
	}
	tl.set("a", map[policyKey]judged{k: {verdict{ready: true}, 1}}) // nothing new
	if woken != 2 || len(tl.takeDirty()) != 0 {
		t.Error("woken without a change")
	}
	tl.set("b", nil)
	if _, complete := tl.of(k, 1, []string{"b"}); complete || len(tl.takeDirty()) != 1 {
		t.Error("a node that is gone is remembered")
	}
}

// unreadable is an API server that refuses to list nodes, or to show policies.
type unreadable struct {
	client.Client
	nodes bool
}

func (u unreadable) List(context.Context, client.ObjectList, ...client.ListOption) error {
	if u.nodes {
		return errors.New("no list today")
	}
	return nil
}

func (u unreadable) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return errors.New("nothing to see today")
}

// A status that cannot be written is tried again by the queue, which backs off, and by
// nobody else.
func TestFailedStatusIsNotHurried(t *testing.T) {
	for name, c := range map[string]client.Client{"nodes": unreadable{nodes: true}, "policy": unreadable{}} {
		woken := 0
		r := &policyStatus{Client: c, tally: newTally()}
		r.tally.wake = func() { woken++ }
		k := policyKey{kindPolicy, "p"}
		r.tally.mark(k)
		if _, err := r.Reconcile(t.Context(), ctrl.Request{}); err == nil {
			t.Errorf("%s: no error", name)
		}
		if woken != 1 {
			t.Errorf("%s: woken %d times by one change", name, woken)
		}
		if got := r.tally.takeDirty(); len(got) != 1 || got[0] != k {
			t.Errorf("%s: %v is to be tried again", name, got)
		}
	}
}
