package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
)

func refusedWith(err error, want string) error {
	if err == nil || !strings.Contains(err.Error(), want) {
		return fmt.Errorf("the error is %w, want %q", errors.Join(err), want)
	}
	return nil
}

// makeNode makes a Linux node; labels are added.
func makeNode(t *testing.T, name string, labels map[string]string) *corev1.Node {
	t.Helper()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelOSStable: "linux"}}}
	for k, v := range labels {
		node.Labels[k] = v
	}
	if err := api.Create(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = api.Delete(t.Context(), node) })
	return node
}

// makePolicy makes a policy for ens1f0 of the nodes that carry the label test=<name>.
func makePolicy(t *testing.T, name, test string, numVfs int, edit ...func(*sriovv1.SriovNetworkNodePolicy)) *sriovv1.SriovNetworkNodePolicy {
	t.Helper()
	p := &sriovv1.SriovNetworkNodePolicy{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: name}}
	p.Spec.ResourceName, p.Spec.NumVfs, p.Spec.NodeSelector = name, numVfs, map[string]string{"test": test}
	p.Spec.NicSelector.PfNames = []sriovv1.PfName{"ens1f0"}
	for _, e := range edit {
		e(p)
	}
	if err := api.Create(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = api.Delete(t.Context(), p) })
	return p
}

// change edits an object, whoever else writes to it meanwhile.
func change[T client.Object](t *testing.T, object T, edit func(T)) {
	t.Helper()
	eventually(t, func() error {
		if err := api.Get(t.Context(), client.ObjectKeyFromObject(object), object); err != nil {
			return err
		}
		edit(object)
		return api.Update(t.Context(), object)
	})
}

func getState(t *testing.T, node string) (*sriovv1.SriovNetworkNodeState, error) {
	state := &sriovv1.SriovNetworkNodeState{}
	return state, api.Get(t.Context(), client.ObjectKey{Namespace: operatorNamespace, Name: node}, state)
}

// agentReports writes a node's status as its agent would, for the spec's generation.
func agentReports(t *testing.T, node string, edit func(*sriovv1.SriovNetworkNodeState)) {
	t.Helper()
	eventually(t, func() error {
		state, err := getState(t, node)
		if err != nil {
			return err
		}
		state.Status.ObservedGeneration = state.Generation
		state.Status.Interfaces = []sriovv1.InterfaceExt{{Name: "ens1f0", PciAddress: "0000:01:00.0", TotalVfs: 7, Mtu: 1500, LinkType: "ETH"}}
		edit(state)
		return api.Status().Update(t.Context(), state)
	})
}

func condition(kind string, status metav1.ConditionStatus) metav1.Condition {
	return metav1.Condition{Type: kind, Status: status, Reason: "Test", LastTransitionTime: metav1.Now()}
}

// groups writes what a node's spec has, in short.
func groups(t *testing.T, node string) (string, error) {
	state, err := getState(t, node)
	var all []string
	for _, i := range state.Spec.Interfaces {
		for _, g := range i.VfGroups {
			all = append(all, fmt.Sprintf("%s %d %s=%s", i.Name, i.NumVfs, g.PolicyName, g.VfRange))
		}
	}
	return strings.Join(all, ", "), err
}

func wantGroups(t *testing.T, node, want string) {
	t.Helper()
	eventually(t, func() error {
		got, err := groups(t, node)
		if err == nil && got != want {
			err = fmt.Errorf("the spec of %s is %q, want %q", node, got, want)
		}
		return err
	})
}

func wantCondition(t *testing.T, object client.Object, conditions func() []metav1.Condition, kind string, status metav1.ConditionStatus, reason, message string) {
	t.Helper()
	eventually(t, func() error {
		if err := api.Get(t.Context(), client.ObjectKeyFromObject(object), object); err != nil {
			return err
		}
		c := meta.FindStatusCondition(conditions(), kind)
		if c == nil || c.Status != status || c.Reason != reason || !strings.Contains(c.Message, message) || c.ObservedGeneration != object.GetGeneration() {
			return fmt.Errorf("condition %s is %+v, want %s %s %q", kind, c, status, reason, message)
		}
		return nil
	})
}

// What the SR-IOV network operator made by itself, and refused to be rid of, is taken as it
// is, and does nothing; the same under another name is refused.
func TestPolicyNamedDefault(t *testing.T) {
	needAPI(t)
	makeNode(t, "pd-1", nil)
	const spec = "nodeSelector: {}\nnicSelector: {}\nnumVfs: 0\nresourceName: ''"
	o := object(t, "SriovNetworkNodePolicy", "default", spec)
	eventually(t, func() error { return api.Create(t.Context(), o) }) // the API server takes a moment to act on an admission policy
	defer func() { _ = api.Delete(t.Context(), o) }()
	p := &sriovv1.SriovNetworkNodePolicy{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "default"}}
	conditions := func() []metav1.Condition { return p.Status.Conditions }
	const why = "a policy named default has no effect, as in the SR-IOV network operator: to make VFs, give it another name"
	wantCondition(t, p, conditions, sriovv1.ConditionReady, metav1.ConditionFalse, "PolicyIgnored", why)
	wantCondition(t, p, conditions, sriovv1.ConditionDegraded, metav1.ConditionFalse, "PolicyIgnored", why)

	change(t, p, func(p *sriovv1.SriovNetworkNodePolicy) {
		p.Spec.NumVfs, p.Spec.ResourceName, p.Spec.NicSelector.PfNames = 4, "r", []sriovv1.PfName{"ens1f0"}
	})
	agentReports(t, "pd-1", func(*sriovv1.SriovNetworkNodeState) {})
	wantCondition(t, p, conditions, sriovv1.ConditionReady, metav1.ConditionFalse, "PolicyIgnored", why)
	wantGroups(t, "pd-1", "")

	err := api.Create(t.Context(), object(t, "SriovNetworkNodePolicy", "other", spec), client.DryRunAll)
	for _, field := range []string{"spec.resourceName: ", "spec.numVfs: "} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("under another name the error is %v, and lacks %s", err, field)
		}
	}
}

func TestNodeState(t *testing.T) {
	needAPI(t)
	node := makeNode(t, "ns-1", map[string]string{"test": "ns"})
	makeNode(t, "ns-windows", map[string]string{"test": "ns", corev1.LabelOSStable: "windows"})
	wantGroups(t, "ns-1", "")
	state := &sriovv1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "ns-1"}}
	eventually(t, func() error {
		if err := api.Get(t.Context(), client.ObjectKeyFromObject(state), state); err != nil {
			return err
		}
		if ready := meta.FindStatusCondition(state.Status.Conditions, sriovv1.ConditionReady); ready == nil || ready.Reason != "AgentPending" {
			return fmt.Errorf("a new state says %+v", state.Status.Conditions)
		}
		return nil
	})
	policy := makePolicy(t, "ns-a", "ns", 4)
	agentReports(t, "ns-1", func(*sriovv1.SriovNetworkNodeState) {})
	wantGroups(t, "ns-1", "ens1f0 4 ns-a=0-3")

	// Nothing that changes nothing is written.
	var before *sriovv1.SriovNetworkNodeState
	eventually(t, func() (err error) {
		if before, err = getState(t, "ns-1"); err == nil && before.Annotations[sriovv1.AnnotationCurrentState] == "" {
			err = errors.New("nothing is said of evictions yet, which is written once")
		}
		return err
	})
	for i := range 3 {
		patch := client.MergeFrom(node.DeepCopy())
		node.Labels["other"] = fmt.Sprint(i)
		if err := api.Patch(t.Context(), node, patch); err != nil {
			t.Fatal(err)
		}
	}
	unrelated := makePolicy(t, "ns-b", "ns", 4, func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NicSelector.PfNames = []sriovv1.PfName{"eth9"} })
	wantCondition(t, unrelated, func() []metav1.Condition { return unrelated.Status.Conditions }, sriovv1.ConditionReady, metav1.ConditionFalse, "NoNICSelected", "not PF ens1f0 (0000:01:00.0): its name is not among nicSelector.pfNames eth9")
	time.Sleep(time.Second)
	after, err := getState(t, "ns-1")
	if err != nil {
		t.Fatal(err)
	}
	if after.ResourceVersion != before.ResourceVersion {
		t.Errorf("the node's state was written without a change: resourceVersion %s is now %s", before.ResourceVersion, after.ResourceVersion)
	}

	// What a hand changes is put right.
	change(t, after, func(s *sriovv1.SriovNetworkNodeState) { s.Spec.Interfaces[0].NumVfs = 1 })
	wantGroups(t, "ns-1", "ens1f0 4 ns-a=0-3")

	// A policy that no longer selects the node, and one that is gone, leave it.
	change(t, policy, func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NodeSelector["test"] = "other" })
	wantGroups(t, "ns-1", "")
	change(t, policy, func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NodeSelector["test"] = "ns" })
	wantGroups(t, "ns-1", "ens1f0 4 ns-a=0-3")
	if err := api.Delete(t.Context(), policy); err != nil {
		t.Fatal(err)
	}
	wantGroups(t, "ns-1", "")

	if _, err := getState(t, "ns-windows"); !apierrors.IsNotFound(err) {
		t.Errorf("a Windows node has a state: %v", err)
	}
	if err := api.Delete(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if _, err := getState(t, "ns-1"); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the state of a node that is gone is there: %w", errors.Join(err))
		}
		return nil
	})
}

func TestPolicyStatus(t *testing.T) {
	needAPI(t)
	policy := makePolicy(t, "ps-a", "ps", 4)
	conditions := func() []metav1.Condition { return policy.Status.Conditions }
	ready := func(status metav1.ConditionStatus, reason, message string) {
		t.Helper()
		wantCondition(t, policy, conditions, sriovv1.ConditionReady, status, reason, message)
	}
	ready(metav1.ConditionFalse, "NoNodeSelected", "nodeSelector selects no Linux node")

	makeNode(t, "ps-1", map[string]string{"test": "ps"})
	ready(metav1.ConditionFalse, "InventoryPending", "node ps-1: the node has not reported any SR-IOV NIC")
	agentReports(t, "ps-1", func(*sriovv1.SriovNetworkNodeState) {})
	ready(metav1.ConditionFalse, "NodesInProgress", "node ps-1: the node's agent has yet to act on the spec")
	wantCondition(t, policy, conditions, sriovv1.ConditionProgressing, metav1.ConditionTrue, "NodesInProgress", "")
	wantGroups(t, "ps-1", "ens1f0 4 ps-a=0-3")

	agentReports(t, "ps-1", func(s *sriovv1.SriovNetworkNodeState) {
		s.Status.Interfaces[0].Message = "write sriov_numvfs: cannot allocate memory: boot with pci=realloc"
		s.Status.Conditions = []metav1.Condition{condition(sriovv1.ConditionReady, metav1.ConditionFalse), condition(sriovv1.ConditionProgressing, metav1.ConditionFalse)}
	})
	ready(metav1.ConditionFalse, "NodeFailed", "node ps-1: PF ens1f0: write sriov_numvfs: cannot allocate memory: boot with pci=realloc")
	wantCondition(t, policy, conditions, sriovv1.ConditionDegraded, metav1.ConditionTrue, "NodeFailed", "")

	works := func(s *sriovv1.SriovNetworkNodeState) {
		s.Status.Conditions = []metav1.Condition{condition(sriovv1.ConditionReady, metav1.ConditionTrue)}
	}
	agentReports(t, "ps-1", works)
	ready(metav1.ConditionTrue, "AllNodesReady", "in effect on 1 of 1 selected nodes")
	if policy.Status.MatchedNodeCount != 1 || policy.Status.ReadyNodeCount != 1 || policy.Status.ObservedGeneration != policy.Generation {
		t.Errorf("the status is %+v", policy.Status)
	}
	version := policy.ResourceVersion
	agentReports(t, "ps-1", works) // the times differ, what they say does not
	time.Sleep(500 * time.Millisecond)
	if err := api.Get(t.Context(), client.ObjectKeyFromObject(policy), policy); err != nil || policy.ResourceVersion != version {
		t.Errorf("the status was written without a change: %v", err)
	}

	// An edit that cannot be right takes nothing away.
	change(t, policy, func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NumVfs = 8 })
	ready(metav1.ConditionFalse, "TotalVFsExceeded", "node ps-1: numVfs 8 is above the 7 VFs (totalvfs) that PF ens1f0 (0000:01:00.0) can have: set numVfs to 7 or less; until then it keeps the VFs it had")
	wantGroups(t, "ps-1", "ens1f0 4 ps-a=0-3")

	// Two policies over the same VFs: the second is told.
	change(t, policy, func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NumVfs = 4 })
	ready(metav1.ConditionTrue, "AllNodesReady", "")
	second := makePolicy(t, "ps-b", "ps", 4)
	wantCondition(t, second, func() []metav1.Condition { return second.Status.Conditions }, sriovv1.ConditionReady, metav1.ConditionFalse, "Conflict",
		"node ps-1: VFs 0-3 of PF ens1f0 (0000:01:00.0) stay with policy ps-a (resourceName ps-a, not ps-b): policies ps-a and ps-b have the same priority 99 and ps-a was there first")
	ready(metav1.ConditionTrue, "AllNodesReady", "")

	eventually(t, func() error {
		list := &eventsv1.EventList{}
		if err := api.List(t.Context(), list, client.InNamespace(operatorNamespace)); err != nil {
			return err
		}
		seen := map[string]string{}
		for _, e := range list.Items {
			if e.Regarding.Name == "ps-a" {
				seen[e.Reason] = e.Type
			}
		}
		if seen["TotalVFsExceeded"] != corev1.EventTypeWarning || seen["AllNodesReady"] != corev1.EventTypeNormal {
			return fmt.Errorf("the events are %v", seen)
		}
		return nil
	})
}

// MacVLAN policies are planned, told and taken back as policies for VFs are.
func TestMacvlanPolicy(t *testing.T) {
	needAPI(t)
	makeNode(t, "mv-1", map[string]string{"test": "mv"})
	p := &sluicev1.MacvlanNodePolicy{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "mv"}}
	p.Spec.ResourceName, p.Spec.Slots, p.Spec.NodeSelector = "slots", 8, map[string]string{"test": "mv"}
	p.Spec.ParentSelector.PfNames = []string{"bond0"}
	if err := api.Create(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	ready := func(status metav1.ConditionStatus, reason, message string) {
		t.Helper()
		wantCondition(t, p, func() []metav1.Condition { return p.Status.Conditions }, sriovv1.ConditionReady, status, reason, message)
	}
	ready(metav1.ConditionFalse, "InventoryPending", "node mv-1: ")
	link := func(s *sriovv1.SriovNetworkNodeState) {
		s.Status.Links = []sriovv1.Link{{Name: "bond0", Kind: "bond", Mtu: 1500}}
	}
	agentReports(t, "mv-1", link)
	eventually(t, func() error {
		state, err := getState(t, "mv-1")
		if err == nil && (len(state.Spec.Macvlans) != 1 || state.Spec.Macvlans[0].Link != "bond0" || state.Spec.Macvlans[0].Slots != 8) {
			err = fmt.Errorf("the spec is %+v", state.Spec)
		}
		return err
	})
	ready(metav1.ConditionFalse, "NodesInProgress", "node mv-1: the node's agent has yet to act on the spec")
	agentReports(t, "mv-1", func(s *sriovv1.SriovNetworkNodeState) {
		link(s)
		s.Status.Macvlans = []sriovv1.MacvlanParentStatus{{PolicyName: "mv", ResourceName: "slots", Link: "bond0", Parent: "bond0", Ready: true, Slots: 8}}
	})
	ready(metav1.ConditionTrue, "AllNodesReady", "in effect on 1 of 1 selected nodes")
	if err := api.Delete(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		state, err := getState(t, "mv-1")
		if err == nil && len(state.Spec.Macvlans) != 0 {
			err = fmt.Errorf("the spec is %+v", state.Spec)
		}
		return err
	})
}

// A bridge comes and goes with its feature gate, and nobody else has a say in it.
func TestBridges(t *testing.T) {
	needAPI(t)
	config := getConfig(t)
	gate := func(on bool) {
		change(t, config, func(c *sriovv1.SriovOperatorConfig) {
			c.Spec.FeatureGates = map[string]bool{plan.GateBridges: on}
		})
	}
	defer change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.FeatureGates, c.Spec.LogLevel = nil, 0 })
	makeNode(t, "br-1", map[string]string{"test": "br"})
	report := func() {
		agentReports(t, "br-1", func(s *sriovv1.SriovNetworkNodeState) {
			s.Status.Interfaces[0].EswitchMode = "switchdev"
			meta.SetStatusCondition(&s.Status.Conditions, condition(sriovv1.ConditionReady, metav1.ConditionTrue))
		})
	}
	report()
	policy := makePolicy(t, "br-a", "br", 4, func(p *sriovv1.SriovNetworkNodePolicy) {
		p.Spec.EswitchMode, p.Spec.Bridge.OVS = sriovv1.EswitchModeSwitchdev, &sriovv1.OVSConfig{Bridge: sriovv1.OVSBridgeConfig{FailMode: "secure"}}
	})
	conditions := func() []metav1.Condition { return policy.Status.Conditions }
	const why = "bridge.ovs needs the feature gate manageSoftwareBridges: set featureGates manageSoftwareBridges to true in SriovOperatorConfig default"
	wantCondition(t, policy, conditions, sriovv1.ConditionDegraded, metav1.ConditionTrue, "UnsupportedByNode", why)
	bridges := func(want ...string) {
		t.Helper()
		eventually(t, func() error {
			state, err := getState(t, "br-1")
			var got []string
			for _, b := range state.Spec.Bridges.OVS {
				got = append(got, fmt.Sprintf("%s %s %s", b.Name, b.Bridge.FailMode, b.Uplinks[0].Name))
			}
			if err == nil && !slices.Equal(got, want) {
				err = fmt.Errorf("the bridges are %q, want %q", got, want)
			}
			return err
		})
	}
	wantGroups(t, "br-1", "")
	reaches := func(want bool) {
		t.Helper()
		eventually(t, func() error {
			agent := getAgents(t).Spec.Template.Spec.Containers[0]
			mounted := slices.ContainsFunc(agent.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/var/run/openvswitch" })
			overrides := slices.Contains(agent.SecurityContext.Capabilities.Add, "DAC_OVERRIDE")
			if mounted != want || overrides != want {
				return fmt.Errorf("Open vSwitch's directory mounted: %t, DAC_OVERRIDE: %t, want %t", mounted, overrides, want)
			}
			return nil
		})
	}
	reaches(false)
	gate(true)
	reaches(true)
	const bridge = "br-0000_01_00.0 secure ens1f0"
	bridges(bridge)
	wantGroups(t, "br-1", "ens1f0 4 br-a=0-3")
	report()
	wantCondition(t, policy, conditions, sriovv1.ConditionDegraded, metav1.ConditionFalse, "AllNodesReady", "")

	state, err := getState(t, "br-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := api.Patch(t.Context(), state, client.RawPatch(types.MergePatchType, []byte(`{"spec":{"bridges":{"ovs":[{"name":"br-x","uplinks":[{"pciAddress":"0000:01:00.0"}]}]}}}`)), client.FieldOwner("other")); err != nil {
		t.Fatal(err)
	}
	bridges(bridge)
	gate(false)
	bridges()
	wantGroups(t, "br-1", "ens1f0 4 br-a=0-3")
	wantCondition(t, policy, conditions, sriovv1.ConditionDegraded, metav1.ConditionTrue, "UnsupportedByNode", why)

	// Agents can reach Open vSwitch until all bridges are gone.
	states := &sriovv1.SriovNetworkNodeStateList{}
	if err := api.List(t.Context(), states, client.InNamespace(operatorNamespace)); err != nil {
		t.Fatal(err)
	}
	for _, s := range states.Items {
		agentReports(t, s.Name, func(s *sriovv1.SriovNetworkNodeState) {
			if s.Name == "br-1" {
				s.Status.Bridges.OVS = []sriovv1.OVSConfigExt{{Name: "br-0000_01_00.0"}}
			}
		})
	}
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.LogLevel = 1 })
	eventually(t, func() error {
		if args := getAgents(t).Spec.Template.Spec.Containers[0].Args; args[0] != "--v=1" {
			return fmt.Errorf("the arguments are %v", args)
		}
		return nil
	})
	reaches(true)
	agentReports(t, "br-1", func(s *sriovv1.SriovNetworkNodeState) { s.Status.Bridges.OVS = nil })
	reaches(false)
}
