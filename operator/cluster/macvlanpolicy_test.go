package cluster

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// makeMacvlanPolicy makes a policy for links of the nodes that carry the label test=<name>.
func makeMacvlanPolicy(t *testing.T, name, test string, links []string, edit ...func(*sluicev1.MacvlanNodePolicy)) *sluicev1.MacvlanNodePolicy {
	t.Helper()
	p := &sluicev1.MacvlanNodePolicy{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: name}}
	p.Spec.ResourceName, p.Spec.NodeSelector, p.Spec.ParentSelector.PfNames = name, map[string]string{"test": test}, links
	for _, e := range edit {
		e(p)
	}
	if err := api.Create(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = api.Delete(t.Context(), p) })
	return p
}

// linksReported writes links into a node's status, and the parents of the spec as its
// agent would have made them; edit changes those.
func linksReported(t *testing.T, node string, edit func([]sriovv1.MacvlanParentStatus)) {
	t.Helper()
	agentReports(t, node, func(s *sriovv1.SriovNetworkNodeState) {
		s.Status.Links = []sriovv1.Link{
			{Name: "bond0", Kind: "bond", Mtu: 1500, LinkAdminState: "up"},
			{Name: "ens1f0", Kind: "physical", Mtu: 1500, LinkAdminState: "up", PciAddress: "0000:01:00.0", Vendor: "8086", DeviceID: "158b"},
			{Name: "ens2f0", Kind: "physical", Mtu: 1500, LinkAdminState: "up", Master: "bond0"},
		}
		s.Status.Macvlans = nil
		for _, p := range s.Spec.Macvlans {
			s.Status.Macvlans = append(s.Status.Macvlans, sriovv1.MacvlanParentStatus{
				PolicyName: p.PolicyName, ResourceName: p.ResourceName, Link: p.Link, Parent: p.Link, Ready: true, Slots: p.Slots,
			})
		}
		edit(s.Status.Macvlans)
	})
}

func allReady([]sriovv1.MacvlanParentStatus) {}

func wantParents(t *testing.T, node, want string) {
	t.Helper()
	eventually(t, func() error {
		state, err := getState(t, node)
		var all []string
		for _, p := range state.Spec.Macvlans {
			all = append(all, fmt.Sprintf("%s %s.%d*%d", p.PolicyName, p.Link, p.Vlan, p.Slots))
		}
		if got := strings.Join(all, ", "); err == nil && got != want {
			err = fmt.Errorf("the parents of %s are %q, want %q", node, got, want)
		}
		return err
	})
}

func TestMacvlanPolicyFromSpecToStatus(t *testing.T) {
	needAPI(t)
	policy := makeMacvlanPolicy(t, "mvs-a", "mvs", []string{"ens1f0", "bond0"}, func(p *sluicev1.MacvlanNodePolicy) { p.Spec.Vlan, p.Spec.Mtu = 100, 9000 })
	conditions := func() []metav1.Condition { return policy.Status.Conditions }
	is := func(kind string, status metav1.ConditionStatus, reason, message string) {
		t.Helper()
		wantCondition(t, policy, conditions, kind, status, reason, message)
	}
	is(sriovv1.ConditionReady, metav1.ConditionFalse, "NoNodeSelected", "nodeSelector selects no Linux node")
	makeNode(t, "mvs-1", map[string]string{"test": "mvs"})
	is(sriovv1.ConditionReady, metav1.ConditionFalse, "InventoryPending", "node mvs-1: the node has not reported any link")
	agentReports(t, "mvs-1", func(*sriovv1.SriovNetworkNodeState) {})
	is(sriovv1.ConditionDegraded, metav1.ConditionTrue, "NoNICSelected", "node mvs-1: the node has no link that can be a parent")

	linksReported(t, "mvs-1", allReady)
	wantParents(t, "mvs-1", "mvs-a bond0.100*64, mvs-a ens1f0.100*64")
	is(sriovv1.ConditionProgressing, metav1.ConditionTrue, "NodesInProgress", "node mvs-1: the node's agent has yet to act on the spec")
	linksReported(t, "mvs-1", func(parents []sriovv1.MacvlanParentStatus) { parents[0].Ready = false })
	is(sriovv1.ConditionReady, metav1.ConditionFalse, "NodesInProgress", "node mvs-1: no agent has reported from this node yet")
	linksReported(t, "mvs-1", func(parents []sriovv1.MacvlanParentStatus) {
		parents[0].Ready, parents[0].Message = false, "set MTU 9000 on bond0: invalid argument (EINVAL)"
	})
	is(sriovv1.ConditionDegraded, metav1.ConditionTrue, "NodeFailed", "node mvs-1: link bond0: set MTU 9000 on bond0: invalid argument (EINVAL)")
	linksReported(t, "mvs-1", allReady)
	is(sriovv1.ConditionReady, metav1.ConditionTrue, "AllNodesReady", "in effect on 1 of 1 selected nodes")
	is(sriovv1.ConditionDegraded, metav1.ConditionFalse, "AllNodesReady", "")
	if policy.Status.MatchedNodeCount != 1 || policy.Status.ReadyNodeCount != 1 || policy.Status.ObservedGeneration != policy.Generation {
		t.Errorf("%+v", policy.Status)
	}

	// A policy of VFs and one of slots see only their own trouble, and take no name from
	// each other.
	vfs := makePolicy(t, "mvs-vfs", "mvs", 4)
	wantGroups(t, "mvs-1", "ens1f0 4 mvs-vfs=0-3")
	linksReported(t, "mvs-1", func(parents []sriovv1.MacvlanParentStatus) { parents[1].Ready, parents[1].Message = false, "no" })
	agentReports(t, "mvs-1", func(s *sriovv1.SriovNetworkNodeState) {
		s.Status.LastSyncError = "MacVLAN parent ens1f0.100: no"
		s.Status.Conditions = []metav1.Condition{condition(sriovv1.ConditionReady, metav1.ConditionFalse)}
	})
	is(sriovv1.ConditionReady, metav1.ConditionFalse, "NodeFailed", "link ens1f0: no")
	wantCondition(t, vfs, func() []metav1.Condition { return vfs.Status.Conditions }, sriovv1.ConditionReady, metav1.ConditionTrue, "AllNodesReady", "")
	linksReported(t, "mvs-1", allReady)
	same := makeMacvlanPolicy(t, "mvs-c", "mvs", []string{"bond0"}, func(p *sluicev1.MacvlanNodePolicy) { p.Spec = policy.Spec })
	wantCondition(t, same, func() []metav1.Condition { return same.Status.Conditions }, sriovv1.ConditionReady, metav1.ConditionTrue, "AllNodesReady", "in effect on 1 of 1")
	if err := api.Delete(t.Context(), same); err != nil {
		t.Fatal(err)
	}
	wanting := makeMacvlanPolicy(t, "mvs-b", "mvs", []string{"ens2f0"})
	wantCondition(t, wanting, func() []metav1.Condition { return wanting.Status.Conditions }, sriovv1.ConditionDegraded, metav1.ConditionTrue, "NICMismatch", "link ens2f0 is a port of bond0")
	change(t, wanting, func(p *sluicev1.MacvlanNodePolicy) {
		p.Spec.ResourceName, p.Spec.ParentSelector.PfNames = "mvs-vfs", []string{"bond0"}
	})
	wantCondition(t, wanting, func() []metav1.Condition { return wanting.Status.Conditions }, sriovv1.ConditionDegraded, metav1.ConditionTrue, "Conflict", "resourceName mvs-vfs is that of SriovNetworkNodePolicy mvs-vfs")
	wantParents(t, "mvs-1", "mvs-a bond0.100*64, mvs-a ens1f0.100*64")

	// Nothing that changes nothing is written.
	before, err := getState(t, "mvs-1")
	if err != nil {
		t.Fatal(err)
	}
	change(t, wanting, func(p *sluicev1.MacvlanNodePolicy) { p.Spec.ParentSelector.PfNames = []string{"ens9"} })
	wantCondition(t, wanting, func() []metav1.Condition { return wanting.Status.Conditions }, sriovv1.ConditionReady, metav1.ConditionFalse, "Conflict", "")
	time.Sleep(time.Second)
	if after, err := getState(t, "mvs-1"); err != nil || after.ResourceVersion != before.ResourceVersion {
		t.Errorf("the node's state was written without a change: %v", errors.Join(err))
	}

	// What a hand changes is put right, and what no policy asks for goes.
	change(t, before, func(s *sriovv1.SriovNetworkNodeState) { s.Spec.Macvlans = s.Spec.Macvlans[:1] })
	wantParents(t, "mvs-1", "mvs-a bond0.100*64, mvs-a ens1f0.100*64")
	change(t, policy, func(p *sluicev1.MacvlanNodePolicy) { p.Spec.NodeSelector["test"] = "other" })
	wantParents(t, "mvs-1", "")
	change(t, policy, func(p *sluicev1.MacvlanNodePolicy) { p.Spec.NodeSelector["test"] = "mvs" })
	wantParents(t, "mvs-1", "mvs-a bond0.100*64, mvs-a ens1f0.100*64")
	if err := api.Delete(t.Context(), policy); err != nil {
		t.Fatal(err)
	}
	wantParents(t, "mvs-1", "")
	wantGroups(t, "mvs-1", "ens1f0 4 mvs-vfs=0-3")
}

// What people begin with is accepted as it stands.
func TestSamplesAreAccepted(t *testing.T) {
	needAPI(t)
	out, err := kubectl(t.Context(), "apply", "--dry-run=server", "--validate=strict", "-k", filepath.Join("..", "..", "config", "samples"))
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "Warning") && !strings.Contains(line, "install Multus") { // there is none here
			t.Error(line)
		}
	}
}
