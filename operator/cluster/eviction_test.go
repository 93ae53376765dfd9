package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// makePod makes a pod that runs on the node.
func makePod(t *testing.T, node, name string, edit ...func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
	pod.Labels = map[string]string{"app": name}
	pod.Spec.NodeName = node
	pod.Spec.Containers = []corev1.Container{{Name: "c", Image: "i"}}
	for _, e := range edit {
		e(pod)
	}
	if err := api.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	pod.Status.Phase = corev1.PodRunning
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	if err := api.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	return pod
}

// end does what kubelet does when a pod's containers have ended.
func end(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	if err := api.Delete(t.Context(), pod, client.GracePeriodSeconds(0)); client.IgnoreNotFound(err) != nil {
		t.Fatal(err)
	}
}

func isTerminating(t *testing.T, pod *corev1.Pod) bool {
	t.Helper()
	if err := api.Get(t.Context(), client.ObjectKeyFromObject(pod), pod); err != nil {
		t.Fatal(err)
	}
	return pod.DeletionTimestamp != nil
}

func wantTerminating(t *testing.T, pods ...*corev1.Pod) {
	t.Helper()
	for _, pod := range pods {
		eventually(t, func() error {
			if !isTerminating(t, pod) {
				return fmt.Errorf("pod %s was not evicted", pod.Name)
			}
			return nil
		})
	}
}

// waitsFor reports that a change of the node waits for the pods.
func waitsFor(t *testing.T, node string, pods ...*corev1.Pod) {
	t.Helper()
	agentReports(t, node, func(s *sriovv1.SriovNetworkNodeState) {
		s.Status.Pending = nil
		change := sriovv1.PendingChange{PciAddress: "0000:01:00.0", Operation: "SetNumVFs 2 on 0000:01:00.0", Cost: sriovv1.CostEvict}
		for _, p := range pods {
			change.Pods = append(change.Pods, sriovv1.PodReference{Namespace: p.Namespace, Name: p.Name, Device: "0000:01:00.1"})
			if p.Name == "" {
				change.Pods[len(change.Pods)-1].UID = p.UID
			}
		}
		if pods != nil {
			s.Status.Pending = []sriovv1.PendingChange{change}
		}
	})
}

func wantEvicting(t *testing.T, node string, status metav1.ConditionStatus, reason, message, annotations string) {
	t.Helper()
	eventually(t, func() error {
		state, err := getState(t, node)
		if err != nil {
			return err
		}
		c := meta.FindStatusCondition(state.Status.Conditions, sriovv1.ConditionEvicting)
		if c == nil || c.Status != status || c.Reason != reason || !strings.Contains(c.Message, message) {
			return fmt.Errorf("Evicting of %s is %+v, want %s %s %q", node, c, status, reason, message)
		}
		if got := state.Annotations[sriovv1.AnnotationDesiredState] + " " + state.Annotations[sriovv1.AnnotationCurrentState]; got != annotations {
			return fmt.Errorf("the annotations of %s are %s, want %s", node, got, annotations)
		}
		return nil
	})
}

func makePool(t *testing.T, name, test string, edit func(*sriovv1.SriovNetworkPoolConfigSpec)) *sriovv1.SriovNetworkPoolConfig {
	t.Helper()
	p := &sriovv1.SriovNetworkPoolConfig{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: name}}
	p.Spec.NodeSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"test": test}}
	edit(&p.Spec)
	if err := api.Create(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestEviction(t *testing.T) {
	needAPI(t)
	makePool(t, "ev", "ev", func(s *sriovv1.SriovNetworkPoolConfigSpec) { s.MaxUnavailable = new(intstr.FromString("50%")) })
	makeNode(t, "ev-1", map[string]string{"test": "ev"})
	makeNode(t, "ev-2", map[string]string{"test": "ev"})
	one, two := makePod(t, "ev-1", "ev-one"), makePod(t, "ev-2", "ev-two")
	bystander := makePod(t, "ev-1", "ev-bystander")

	// Exactly the pods named go, and one node of the two at a time.
	waitsFor(t, "ev-1", one)
	wantTerminating(t, one)
	wantEvicting(t, "ev-1", metav1.ConditionTrue, "Evicting", "SetNumVFs 2 on 0000:01:00.0 waits for pods that were evicted: default/ev-one", "Drain_Required Draining")
	waitsFor(t, "ev-2", two)
	wantEvicting(t, "ev-2", metav1.ConditionFalse, "WaitingForPool", "SriovNetworkPoolConfig ev lets 1 nodes be disturbed at the same time, and it is the turn of ev-1", "Drain_Required Idle")

	// A new leader knows whose turn it is.
	successor := &eviction{Client: api, live: api, namespace: operatorNamespace}
	if err := successor.recall(t.Context()); err != nil || successor.disturbed["ev-1"] == nil || successor.disturbed["ev-2"] != nil {
		t.Errorf("a new leader takes %v for disturbed: %v", successor.disturbed, err)
	}

	// The pod is gone and the agent at work: still not the next node's turn.
	end(t, one)
	agentReports(t, "ev-1", func(s *sriovv1.SriovNetworkNodeState) {
		s.Status.Pending = nil
		s.Status.Conditions = append(s.Status.Conditions, condition(sriovv1.ConditionProgressing, metav1.ConditionTrue))
	})
	wantEvicting(t, "ev-1", metav1.ConditionTrue, "Evicting", "the agent is at work", "Idle DrainComplete")
	if isTerminating(t, two) || isTerminating(t, bystander) {
		t.Error("a pod was evicted that should not be")
	}
	agentReports(t, "ev-1", func(s *sriovv1.SriovNetworkNodeState) {
		meta.SetStatusCondition(&s.Status.Conditions, condition(sriovv1.ConditionProgressing, metav1.ConditionFalse))
	})
	wantEvicting(t, "ev-1", metav1.ConditionFalse, "Idle", "nothing waits for pods to go", "Idle Idle")
	wantTerminating(t, two)
	end(t, two)
	waitsFor(t, "ev-2")
	wantEvicting(t, "ev-2", metav1.ConditionFalse, "Idle", "", "Idle Idle")
	node := &corev1.Node{}
	if err := api.Get(t.Context(), client.ObjectKey{Name: "ev-1"}, node); err != nil || node.Spec.Unschedulable {
		t.Errorf("the node was cordoned: %v", err)
	}
}

// Of a pod that holds a VF only by an init container the agent knows the UID.
func TestEvictionByUID(t *testing.T) {
	needAPI(t)
	makePool(t, "eu", "eu", func(*sriovv1.SriovNetworkPoolConfigSpec) {})
	makeNode(t, "eu-1", map[string]string{"test": "eu"})
	one := makePod(t, "eu-1", "eu-one")
	static := makePod(t, "eu-1", "eu-static", func(p *corev1.Pod) {
		p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "5f6e1b2a0c"}
	})
	elsewhere := makePod(t, "eu-2", "eu-elsewhere")
	makePod(t, "eu-1", "eu-bystander")
	r := &eviction{Client: api, live: api, namespace: operatorNamespace}
	n := &evictee{state: &sriovv1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Name: "eu-1"}}, evict: []sriovv1.PendingChange{{
		Pods: []sriovv1.PodReference{{UID: one.UID}, {UID: "5f6e1b2a0c"}, {UID: elsewhere.UID}, {UID: "of-nobody"}, {Device: "0000:01:00.1"}},
	}}}
	got, err := r.inTheWay(t.Context(), n)
	want := []sriovv1.PodReference{{Namespace: "default", Name: one.Name}, {Namespace: "default", Name: static.Name}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("in the way are %v, %v; want %v", got, err, want)
	}
	if c := r.say(n, nil, true, nil, nil); !strings.Contains(c.Message, "with UID "+string(one.UID)) {
		t.Errorf("says %q", c.Message)
	}

	waitsFor(t, "eu-1", &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: one.UID}})
	wantTerminating(t, one)
	end(t, one)
	waitsFor(t, "eu-1")
	wantEvicting(t, "eu-1", metav1.ConditionFalse, "Idle", "nothing waits", "Idle Idle")
}

func TestEvictionBlocked(t *testing.T) {
	needAPI(t)
	makePool(t, "eb", "eb", func(*sriovv1.SriovNetworkPoolConfigSpec) {})
	makeNode(t, "eb-1", map[string]string{"test": "eb"})
	guarded := makePod(t, "eb-1", "eb-guarded")
	static := makePod(t, "eb-1", "eb-static", func(p *corev1.Pod) {
		p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"}
		controller := true
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: "eb-1", UID: "u", Controller: &controller}}
	})
	elsewhere := makePod(t, "eb-2", "eb-elsewhere")
	done := makePod(t, "eb-1", "eb-done")
	done.Status.Phase = corev1.PodSucceeded
	if err := api.Status().Update(t.Context(), done); err != nil {
		t.Fatal(err)
	}
	pdb := &policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "eb-budget"}}
	pdb.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": "eb-guarded"}}
	pdb.Spec.MinAvailable = new(intstr.FromInt32(1))
	if err := api.Create(t.Context(), pdb); err != nil {
		t.Fatal(err)
	}
	allow := func(n int32) {
		t.Helper()
		eventually(t, func() error {
			if err := api.Get(t.Context(), client.ObjectKeyFromObject(pdb), pdb); err != nil {
				return err
			}
			pdb.Status = policyv1.PodDisruptionBudgetStatus{ObservedGeneration: pdb.Generation, CurrentHealthy: 1, DesiredHealthy: 1, ExpectedPods: 1, DisruptionsAllowed: n}
			return api.Status().Update(t.Context(), pdb)
		})
	}
	allow(0)
	waitsFor(t, "eb-1", guarded, static, elsewhere, done)
	wantEvicting(t, "eb-1", metav1.ConditionTrue, "Blocked", "pod default/eb-guarded: The disruption budget eb-budget needs 1 healthy pods and has 1 currently: run more replicas, change the budget, or delete the pod", "Drain_Required Draining")
	wantEvicting(t, "eb-1", metav1.ConditionTrue, "Blocked", "pod default/eb-static is static and cannot be evicted: take its manifest off the node", "Drain_Required Draining")
	allow(1)
	wantTerminating(t, guarded)
	for _, p := range []*corev1.Pod{static, elsewhere, done} {
		if isTerminating(t, p) {
			t.Errorf("pod %s was evicted", p.Name)
		}
	}
	waitsFor(t, "eb-1")
	wantEvicting(t, "eb-1", metav1.ConditionFalse, "Idle", "", "Idle Idle")
}

// A pod of the same name that came after the one that was evicted is none the agent, whose
// report is older, has spoken of.
func TestANamesakeIsNotEvicted(t *testing.T) {
	needAPI(t)
	makePool(t, "es", "es", func(*sriovv1.SriovNetworkPoolConfigSpec) {})
	makeNode(t, "es-1", map[string]string{"test": "es"})
	eventually(t, func() error { _, err := getState(t, "es-1"); return err })
	r := &eviction{Client: api, live: api, namespace: operatorNamespace}
	state := &sriovv1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Name: "es-1", ResourceVersion: "7"}}
	first := makePod(t, "es-1", "es-db-0")
	ref, d, n := sriovv1.PodReference{Namespace: "default", Name: "es-db-0"}, newDisturbance(), &evictee{state: state}
	look := func() result {
		var res result
		r.evictOne(t.Context(), n, d, ref, true, &res)
		return res
	}
	if res := look(); len(res.going) != 1 || !isTerminating(t, first) {
		t.Fatalf("%+v", res)
	}
	end(t, first)
	second := makePod(t, "es-1", "es-db-0")
	if res := look(); len(res.going) != 0 || isTerminating(t, second) {
		t.Errorf("the namesake: %+v", res)
	}
	n.state = &sriovv1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Name: "es-1", ResourceVersion: "8"}} // it is named again
	if res := look(); len(res.going) != 1 || !isTerminating(t, second) {
		t.Errorf("named again: %+v", res)
	}
}

func TestEvictionDisabled(t *testing.T) {
	needAPI(t)
	config := getConfig(t)
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.DisableDrain = true })
	defer change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.DisableDrain = false })
	makePool(t, "ed", "ed", func(*sriovv1.SriovNetworkPoolConfigSpec) {})
	makeNode(t, "ed-1", map[string]string{"test": "ed"})
	pod := makePod(t, "ed-1", "ed-pod")
	waitsFor(t, "ed-1", pod)
	wantEvicting(t, "ed-1", metav1.ConditionFalse, "Disabled", "waits until pods default/ed-pod go by themselves, because SriovOperatorConfig default has disableDrain true", "Drain_Required Idle")
	if isTerminating(t, pod) {
		t.Error("a pod was evicted")
	}
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.DisableDrain = false })
	wantTerminating(t, pod)
}

func TestPoolStatus(t *testing.T) {
	needAPI(t)
	first := makePool(t, "po-a", "po", func(s *sriovv1.SriovNetworkPoolConfigSpec) { s.RdmaMode = sriovv1.RdmaModeExclusive })
	ready := func(p *sriovv1.SriovNetworkPoolConfig, status metav1.ConditionStatus, reason, message string) {
		t.Helper()
		wantCondition(t, p, func() []metav1.Condition { return p.Status.Conditions }, sriovv1.ConditionReady, status, reason, message)
	}
	ready(first, metav1.ConditionFalse, "NoNodeSelected", "nodeSelector selects no node that has an agent")
	makeNode(t, "po-1", map[string]string{"test": "po"})
	ready(first, metav1.ConditionTrue, "PoolReady", "1 nodes are in the pool")
	rdma := func(want string) {
		t.Helper()
		eventually(t, func() error {
			state, err := getState(t, "po-1")
			if err == nil && state.Spec.System.RdmaMode != want {
				err = fmt.Errorf("the RDMA mode is %q, want %q", state.Spec.System.RdmaMode, want)
			}
			return err
		})
	}
	rdma("exclusive")

	// A node in two pools: both say so, it keeps its mode and is left in peace.
	second := makePool(t, "po-b", "po", func(s *sriovv1.SriovNetworkPoolConfigSpec) { s.RdmaMode = sriovv1.RdmaModeShared })
	ready(first, metav1.ConditionFalse, "NodeInTwoPools", "1 nodes (po-1) are also selected by po-b")
	ready(second, metav1.ConditionFalse, "NodeInTwoPools", "1 nodes (po-1) are also selected by po-a")
	pod := makePod(t, "po-1", "po-pod")
	waitsFor(t, "po-1", pod)
	wantEvicting(t, "po-1", metav1.ConditionFalse, "WaitingForPool", "the node is in SriovNetworkPoolConfigs po-a, po-b at once", "Drain_Required Idle")
	rdma("exclusive")
	if isTerminating(t, pod) {
		t.Error("a pod of a node in two pools was evicted")
	}
	if err := api.Delete(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	ready(second, metav1.ConditionTrue, "PoolReady", "")
	rdma("shared")
	wantTerminating(t, pod)
	wantCondition(t, second, func() []metav1.Condition { return second.Status.Conditions }, sriovv1.ConditionProgressing, metav1.ConditionTrue, "Disturbing", "1 of 1 nodes are being disturbed")
	if second.Status.MatchedNodeCount != 1 || second.Status.DisturbedNodeCount != 1 || second.Status.ReadyNodeCount != 0 {
		t.Errorf("the status is %+v", second.Status)
	}
	agentReports(t, "po-1", func(s *sriovv1.SriovNetworkNodeState) {
		s.Status.Conditions = append(s.Status.Conditions, condition(sriovv1.ConditionReady, metav1.ConditionTrue))
	})
	eventually(t, func() error {
		if err := api.Get(t.Context(), client.ObjectKeyFromObject(second), second); err != nil || second.Status.ReadyNodeCount != 1 {
			return fmt.Errorf("%d nodes are ready: %w", second.Status.ReadyNodeCount, errors.Join(err))
		}
		return nil
	})
	waitsFor(t, "po-1", pod)

	// Who wrote the mode does not matter when no pool asks for one any more.
	if state, err := getState(t, "po-1"); err != nil {
		t.Fatal(err)
	} else if err := api.Patch(t.Context(), state, client.RawPatch(types.MergePatchType, []byte(`{"spec":{"system":{"rdmaMode":"shared"}}}`)), client.FieldOwner("other")); err != nil {
		t.Fatal(err)
	}
	change(t, second, func(p *sriovv1.SriovNetworkPoolConfig) { p.Spec.RdmaMode = "" })
	rdma("")

	// A limit of none lets none, and says so.
	end(t, pod)
	waitsFor(t, "po-1")
	wantEvicting(t, "po-1", metav1.ConditionFalse, "Idle", "", "Idle Idle")
	change(t, second, func(p *sriovv1.SriovNetworkPoolConfig) { p.Spec.MaxUnavailable = new(intstr.FromInt32(0)) })
	pod = makePod(t, "po-1", "po-pod")
	waitsFor(t, "po-1", pod)
	wantEvicting(t, "po-1", metav1.ConditionFalse, "WaitingForPool", "SriovNetworkPoolConfig po-b has maxUnavailable 0, which lets no node be disturbed: raise it", "Drain_Required Idle")

	ovs := &sriovv1.SriovNetworkPoolConfig{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "po-ovs", Finalizers: []string{finalizerPool}}}
	ovs.Spec.OvsHardwareOffloadConfig.Name = "worker"
	if err := api.Create(t.Context(), ovs); err != nil {
		t.Fatal(err)
	}
	ready(ovs, metav1.ConditionFalse, "UnsupportedConfiguration", "ovsHardwareOffloadConfig.name worker has no effect")
	if err := api.Delete(t.Context(), ovs); err != nil {
		t.Fatal(err)
	}
	wantGone(t, ovs) // the finalizer it had from elsewhere does not hold it
}

func TestReboot(t *testing.T) {
	needAPI(t)
	pool := makePool(t, "re", "re", func(s *sriovv1.SriovNetworkPoolConfigSpec) { s.MaxUnavailable = new(intstr.FromInt32(1)) })
	makeNode(t, "re-1", map[string]string{"test": "re"})
	unschedulable := func(want bool) {
		t.Helper()
		eventually(t, func() error {
			node := &corev1.Node{}
			if err := api.Get(t.Context(), client.ObjectKey{Name: "re-1"}, node); err != nil || node.Spec.Unschedulable != want {
				return fmt.Errorf("the node is unschedulable %t: %w", node.Spec.Unschedulable, errors.Join(err))
			}
			return nil
		})
	}
	controlled := func(kind string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			controller := true
			p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: kind, Name: "x", UID: "u", Controller: &controller}}
		}
	}
	pod, daemon := makePod(t, "re-1", "re-pod", controlled("ReplicaSet")), makePod(t, "re-1", "re-daemon", controlled("DaemonSet"))
	agentReports(t, "re-1", func(s *sriovv1.SriovNetworkNodeState) {
		s.Status.Pending = []sriovv1.PendingChange{{Operation: "SetRdmaMode exclusive", Cost: sriovv1.CostReboot, Reason: "pods have RDMA devices"}}
	})
	time.Sleep(500 * time.Millisecond)
	unschedulable(false) // the pool has not allowed it
	if state, err := getState(t, "re-1"); err != nil || state.Annotations[sriovv1.AnnotationRebootAllowed] != "" {
		t.Errorf("a reboot is allowed: %v", err)
	}

	change(t, pool, func(p *sriovv1.SriovNetworkPoolConfig) { p.Spec.RebootPolicy = sriovv1.RebootWhenRequired })
	wantTerminating(t, pod)
	unschedulable(true)
	wantEvicting(t, "re-1", metav1.ConditionTrue, "Evicting", "SetRdmaMode exclusive waits for pods that were evicted: default/re-pod", "Reboot_Required Draining")
	if isTerminating(t, daemon) {
		t.Error("a DaemonSet's pod was evicted")
	}
	if state, err := getState(t, "re-1"); err != nil || state.Annotations[sriovv1.AnnotationRebootAllowed] != "" {
		t.Errorf("a reboot is allowed while a pod is there: %v", err)
	}
	// Told to disturb nobody while it was at it, it leaves the node schedulable.
	config := getConfig(t)
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.DisableDrain = true })
	unschedulable(false)
	wantEvicting(t, "re-1", metav1.ConditionFalse, "Disabled", "SetRdmaMode exclusive", "Reboot_Required Idle")
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.DisableDrain = false })
	unschedulable(true)
	end(t, pod)
	eventually(t, func() error {
		state, err := getState(t, "re-1")
		if want := fmt.Sprint(state.Generation); err == nil && state.Annotations[sriovv1.AnnotationRebootAllowed] != want {
			err = fmt.Errorf("the reboot is allowed for %q, want %s", state.Annotations[sriovv1.AnnotationRebootAllowed], want)
		}
		return err
	})
	wantEvicting(t, "re-1", metav1.ConditionTrue, "Evicting", "the node may reboot", "Reboot_Required DrainComplete")

	// It has booted: all is as before.
	agentReports(t, "re-1", func(s *sriovv1.SriovNetworkNodeState) { s.Status.Pending = nil })
	unschedulable(false)
	wantEvicting(t, "re-1", metav1.ConditionFalse, "Idle", "", "Idle Idle")
	state, err := getState(t, "re-1")
	if err != nil || state.Annotations[sriovv1.AnnotationRebootAllowed] != "" || state.Annotations[annotationCordoned] != "" {
		t.Errorf("its annotations are %v: %v", state.Annotations, err)
	}
}

// A node that was rebooted in vain is not kept empty for another reboot that never comes.
// A node that the SR-IOV network operator was draining when it was removed is schedulable
// again; one that people cordoned is not.
func TestCordonOfUpstream(t *testing.T) {
	needAPI(t)
	for name, state := range map[string]string{"up-1": "Drain_Required", "up-2": reasonIdle} {
		node := makeNode(t, name, nil)
		change(t, node, func(n *corev1.Node) {
			n.Spec.Unschedulable, n.Annotations = true, map[string]string{sriovv1.AnnotationNodeState: state}
		})
	}
	eventually(t, func() error {
		r := &eviction{Client: operator.GetClient(), live: operator.GetAPIReader(), namespace: operatorNamespace} // as in a new leader
		if err := r.recall(t.Context()); err != nil {
			return err
		}
		for name, unschedulable := range map[string]bool{"up-1": false, "up-2": true} {
			node := &corev1.Node{}
			if err := api.Get(t.Context(), client.ObjectKey{Name: name}, node); err != nil {
				return err
			}
			if node.Spec.Unschedulable != unschedulable || node.Annotations[sriovv1.AnnotationNodeState] != reasonIdle {
				return fmt.Errorf("node %s is unschedulable %t, annotated %v", name, node.Spec.Unschedulable, node.Annotations)
			}
		}
		return nil
	})
}

func TestRebootInVain(t *testing.T) {
	needAPI(t)
	makePool(t, "rv", "rv", func(s *sriovv1.SriovNetworkPoolConfigSpec) { s.RebootPolicy = sriovv1.RebootWhenRequired })
	makeNode(t, "rv-1", map[string]string{"test": "rv"})
	pending := func(reason string) {
		t.Helper()
		agentReports(t, "rv-1", func(s *sriovv1.SriovNetworkNodeState) {
			s.Status.Pending = []sriovv1.PendingChange{{Operation: "SetRdmaMode exclusive", Cost: sriovv1.CostReboot}}
			c := condition(sriovv1.ConditionDegraded, metav1.ConditionTrue)
			c.Reason = reason
			meta.SetStatusCondition(&s.Status.Conditions, c)
		})
	}
	pending("NeedsReboot")
	wantEvicting(t, "rv-1", metav1.ConditionTrue, "Evicting", "the node may reboot", "Reboot_Required DrainComplete")
	pending(reasonNoHelp)
	wantEvicting(t, "rv-1", metav1.ConditionFalse, "Idle", "", "Idle Idle")
	node := &corev1.Node{}
	if err := api.Get(t.Context(), client.ObjectKey{Name: "rv-1"}, node); err != nil || node.Spec.Unschedulable {
		t.Errorf("the node stays unschedulable: %v", err)
	}
}

func TestContend(t *testing.T) {
	pool := func(name string, n int32) *sriovv1.SriovNetworkPoolConfig {
		p := &sriovv1.SriovNetworkPoolConfig{ObjectMeta: metav1.ObjectMeta{Name: name}}
		p.Spec.MaxUnavailable = new(intstr.FromInt32(n))
		return p
	}
	a, b := pool("a", 2), pool("b", 1)
	waiting := []sriovv1.PendingChange{{Cost: sriovv1.CostEvict}}
	node := func(pending []sriovv1.PendingChange, pools ...*sriovv1.SriovNetworkPoolConfig) *evictee {
		return newEvictee(&sriovv1.SriovNetworkNodeState{Status: sriovv1.SriovNetworkNodeStateStatus{Pending: pending}}, pools)
	}
	nodes := map[string]*evictee{"n1": node(waiting, a), "n2": node(nil, a), "n3": node(waiting, a, b), "n4": node(waiting)}
	contenders, limits := contend(nodes, map[string]*disturbance{"n2": newDisturbance()}, false)
	var got []string
	for _, c := range contenders {
		got = append(got, fmt.Sprintf("%s %q disturbed %t waits %t", c.Node, c.Pool, c.Disturbed, c.Waits))
	}
	slices.Sort(got)
	want := []string{`n1 "a" disturbed false waits true`, `n2 "a" disturbed true waits false`, `n3 "" disturbed false waits false`, `n4 "" disturbed false waits true`}
	if !slices.Equal(got, want) || limits["a"] != 2 || limits[""] != 1 {
		t.Errorf("they are %v with limits %v", got, limits)
	}
	contenders, _ = contend(nodes, nil, true)
	for _, c := range contenders {
		if c.Waits {
			t.Errorf("%s contends though eviction is disabled", c.Node)
		}
	}
}

func TestRefusalOfEviction(t *testing.T) {
	budget := apierrors.NewTooManyRequests("x", 1)
	budget.ErrStatus.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: policyv1.DisruptionBudgetCause, Message: "The disruption budget b needs 2 healthy pods and has 2 currently"}}}
	if got := refusalOfEviction(fmt.Errorf("x: %w", budget)); !strings.HasPrefix(got, "The disruption budget b needs 2") {
		t.Error(got)
	}
	if got := refusalOfEviction(errors.New("two budgets")); got != "two budgets" {
		t.Error(got)
	}
}
