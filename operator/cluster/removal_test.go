package cluster

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

func makeConfig(t *testing.T) *sriovv1.SriovOperatorConfig {
	t.Helper()
	config := &sriovv1.SriovOperatorConfig{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "default"}}
	eventually(t, func() error {
		config.ResourceVersion = ""
		return api.Create(t.Context(), config)
	})
	return config
}

// Deleting a configuration with onRemoval Restore takes all VFs back before the agents go,
// and says what it waits for.
func TestRestore(t *testing.T) {
	needAPI(t)
	for _, name := range []string{"rs-1", "rs-2"} {
		makeNode(t, name, map[string]string{"test": "rs"})
	}
	policy := makePolicy(t, "rs", "rs", 4)
	for _, name := range []string{"rs-1", "rs-2"} {
		agentReports(t, name, func(*sriovv1.SriovNetworkNodeState) {})
		wantGroups(t, name, "ens1f0 4 rs=0-3")
	}
	config := getConfig(t)
	change(t, config, func(c *sriovv1.SriovOperatorConfig) {
		c.Spec.OnRemoval = sriovv1.OnRemovalRestore
		c.Spec.ConfigDaemonNodeSelector = map[string]string{"test": "rs"} // other tests' nodes have no agents that would answer
	})
	eventually(t, func() error {
		if !controllerutil.ContainsFinalizer(getConfig(t), sriovv1.FinalizerOperatorConfig) {
			return errors.New("there is no finalizer")
		}
		list := &sriovv1.SriovNetworkNodeStateList{}
		if err := api.List(t.Context(), list); err != nil || len(list.Items) != 2 {
			return fmt.Errorf("%d nodes have a state: %w", len(list.Items), errors.Join(err))
		}
		return nil
	})
	if err := api.Delete(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"rs-1", "rs-2"} {
		wantGroups(t, name, "")
		eventually(t, func() error {
			state, err := getState(t, name)
			if err == nil && state.Annotations[sriovv1.AnnotationRemoval] != "true" {
				err = errors.New("the agent is not told that it goes")
			}
			return err
		})
	}
	wantCondition(t, policy, func() []metav1.Condition { return policy.Status.Conditions }, sriovv1.ConditionProgressing, metav1.ConditionTrue, "Restoring", "its NICs are given back")
	removed := func(s *sriovv1.SriovNetworkNodeState) {
		c := condition(sriovv1.ConditionReady, metav1.ConditionTrue)
		c.Reason = reasonRemoved
		meta.SetStatusCondition(&s.Status.Conditions, c)
	}
	agentReports(t, "rs-1", removed)
	pod := makePod(t, "rs-2", "rs-pod")
	waitsFor(t, "rs-2", pod)
	wantTerminating(t, pod)
	wantCondition(t, config, func() []metav1.Condition { return config.Status.Conditions }, sriovv1.ConditionProgressing, metav1.ConditionTrue, "Restoring",
		"the NICs of 1 of 2 nodes are given back; waiting for node rs-2: SetNumVFs 2 on 0000:01:00.0 waits for pods that were evicted: default/rs-pod")
	end(t, pod)
	agentReports(t, "rs-2", removed)
	wantGone(t, config)
	for _, name := range []string{"rs-1", "rs-2"} {
		wantGone(t, &sriovv1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: name}})
	}
	makeConfig(t)
	wantGroups(t, "rs-1", "")
	if state, err := getState(t, "rs-1"); err != nil || state.Annotations[sriovv1.AnnotationRemoval] != "" {
		t.Errorf("its annotations are %v: %v", state.Annotations, err)
	}
}

// A removal can be made to leave the NICs, and finalizers of others hold nothing.
func TestRemovalToldToKeep(t *testing.T) {
	needAPI(t)
	makeNode(t, "rk-1", nil)
	eventually(t, func() error { _, err := getState(t, "rk-1"); return err })
	config := getConfig(t)
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.OnRemoval = sriovv1.OnRemovalRestore })
	eventually(t, func() error {
		if !controllerutil.ContainsFinalizer(getConfig(t), sriovv1.FinalizerOperatorConfig) {
			return errors.New("there is no finalizer")
		}
		return nil
	})
	if err := api.Delete(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	wantCondition(t, config, func() []metav1.Condition { return config.Status.Conditions }, sriovv1.ConditionReady, metav1.ConditionFalse, "Restoring", "set onRemoval to Keep")
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.OnRemoval = sriovv1.OnRemovalKeep })
	wantGone(t, config)
	makeConfig(t)
	eventually(t, func() error { _, err := getState(t, "rk-1"); return err })

	// The finalizer that the SR-IOV network operator left comes off.
	config = getConfig(t)
	change(t, config, func(c *sriovv1.SriovOperatorConfig) {
		c.Finalizers = append(c.Finalizers, sriovv1.FinalizerOperatorConfig)
	})
	eventually(t, func() error {
		if controllerutil.ContainsFinalizer(getConfig(t), sriovv1.FinalizerOperatorConfig) {
			return errors.New("there is a finalizer")
		}
		return nil
	})
}

// While NICs are to be given back first, nothing that takes is deleted before.
func TestRemovalInTheWrongOrder(t *testing.T) {
	needAPI(t)
	config := getConfig(t)
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.OnRemoval = sriovv1.OnRemovalRestore })
	parts := [][]string{
		{"namespace", operatorNamespace}, {"crd", "sriovoperatorconfigs.sriovnetwork.openshift.io"}, {"crd", "macvlannetworks.sluice.dev"},
		{"clusterrolebinding", "sluice-operator"}, {"-n", operatorNamespace, "role", "sluice-agent"}, {"-n", operatorNamespace, "deployment", "sluice-operator"},
	}
	try := func(part []string) (string, error) {
		out, err := kubectl(t.Context(), append([]string{"delete", "--dry-run=server"}, part...)...)
		return string(out), err
	}
	for _, part := range parts {
		eventually(t, func() error { // the API server takes a moment to see the finalizer
			out, err := try(part)
			if err == nil || !strings.Contains(out, "SriovOperatorConfig default has onRemoval Restore, and without the operator nobody gives back the NICs: delete the SriovOperatorConfig first") {
				return fmt.Errorf("kubectl delete %s says %s: %w", part, out, errors.Join(err))
			}
			return nil
		})
	}
	if out, err := try([]string{"clusterrole", "view"}); err != nil {
		t.Errorf("what is not ours cannot be deleted: %s", out)
	}
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.OnRemoval = sriovv1.OnRemovalKeep })
	for _, part := range parts {
		eventually(t, func() error {
			out, err := try(part)
			if err != nil {
				err = fmt.Errorf("kubectl delete %s says %s: %w", part, out, err)
			}
			return err
		})
	}
}

func TestIsLost(t *testing.T) {
	needAPI(t)
	r := &operatorConfig{live: api}
	node := makeNode(t, "rl-1", nil)
	for _, c := range []struct {
		name           string
		status         corev1.ConditionStatus
		notReady, told time.Duration // ago
		lost           bool
	}{
		{"ready", corev1.ConditionTrue, time.Hour, time.Hour, false},
		{"not ready for long", corev1.ConditionUnknown, time.Hour, giveUpAfter + time.Minute, true},
		{"not ready, and the removal has just begun", corev1.ConditionUnknown, time.Hour, time.Minute, false},
		{"not ready since a moment", corev1.ConditionFalse, time.Minute, time.Hour, false},
	} {
		node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: c.status, LastTransitionTime: metav1.NewTime(time.Now().Add(-c.notReady))}}
		if err := api.Status().Update(t.Context(), node); err != nil {
			t.Fatal(err)
		}
		if lost, err := r.isLost(t.Context(), node.Name, time.Now().Add(-c.told)); err != nil || lost != c.lost {
			t.Errorf("%s: lost is %t: %v", c.name, lost, err)
		}
	}
	if lost, err := r.isLost(t.Context(), "no-such-node", time.Now()); err != nil || !lost {
		t.Errorf("a node that is gone: %t %v", lost, err)
	}
}
