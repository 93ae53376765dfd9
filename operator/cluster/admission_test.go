package cluster

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/standalone"
)

// An unknown key beside a known one would, if it were dropped, select more NICs.
func TestUnknownSelectorKeyIsRefused(t *testing.T) {
	needAPI(t)
	const want = "spec.nicSelector.pfName: unknown field: use vendor, deviceID, rootDevices, pfNames or netFilter"
	p := object(t, "SriovNetworkNodePolicy", "unknown-key", "nodeSelector: {a: b}\nresourceName: r\nnumVfs: 4\nnicSelector: {vendor: '8086', pfName: [ens1f0]}")
	// The API server takes a moment to act on an admission policy.
	eventually(t, func() error { return refusedWith(api.Create(t.Context(), p.DeepCopy(), client.DryRunAll), want) })

	for selector, want := range map[string]string{
		"{pfName: [ens1f0]}":           want,
		"{}":                           "spec.nicSelector: it selects nothing: give at least one of vendor, deviceID, rootDevices, pfNames, netFilter",
		"{vendor: '', pfNames: []}":    "spec.nicSelector: it selects nothing",
		"{pfNames: [ens1f0], x: null}": "spec.nicSelector.x: unknown field",
	} {
		p := object(t, "SriovNetworkNodePolicy", "selector", "nodeSelector: {a: b}\nresourceName: r\nnumVfs: 4\nnicSelector: "+selector)
		if err := refusedWith(api.Create(t.Context(), p, client.DryRunAll), want); err != nil {
			t.Errorf("%s: %v", selector, err)
		}
	}

	file := filepath.Join(t.TempDir(), "policy.json")
	data, err := p.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, validate := range []string{"strict", "ignore"} {
		out, err := kubectl(t.Context(), "apply", "-f", file, "--validate="+validate)
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("kubectl apply --validate=%s says %s", validate, out)
		}
	}
}

// An empty parentSelector would select every link of a node.
func TestUnknownParentKeyIsRefused(t *testing.T) {
	needAPI(t)
	for selector, want := range map[string]string{
		"{pfNames: [bond0], pfName: x}": "spec.parentSelector.pfName: unknown field: use vendor, deviceID, rootDevices, pfNames or kinds",
		"{kinds: [bond], netFilter: x}": "spec.parentSelector.netFilter: unknown field",
		"{}":                            "spec.parentSelector: it selects every link: give at least one of vendor, deviceID, rootDevices, pfNames, kinds",
		"{vendor: '', kinds: []}":       "spec.parentSelector: it selects every link",
	} {
		p := object(t, "MacvlanNodePolicy", "unknown-key", "nodeSelector: {}\nresourceName: r\nparentSelector: "+selector)
		eventually(t, func() error { return refusedWith(api.Create(t.Context(), p.DeepCopy(), client.DryRunAll), want) })
	}
}

// The operator must see the key too, in case the admission policy is not installed.
func TestUnknownSelectorKeyIsSeen(t *testing.T) {
	var s sriovv1.SriovNetworkNicSelector
	if err := s.UnmarshalJSON([]byte(`{"vendor": "8086", "pfName": ["x"], "a": 1}`)); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(s.UnknownKeys, " "); got != "a pfName" || s.Vendor != "8086" {
		t.Errorf("the selector is %+v", s)
	}
	var p sluicev1.ParentSelector
	if err := p.UnmarshalJSON([]byte(`{"vendor": "8086", "pfName": ["x"], "netFilter": ""}`)); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(p.UnknownKeys, " "); got != "netFilter pfName" || p.Vendor != "8086" {
		t.Errorf("the selector is %+v", p)
	}
}

func TestAgentWritesOnlyItsOwnNodesState(t *testing.T) {
	needAPI(t)
	for _, name := range []string{"adm-1", "adm-2"} {
		makeNode(t, name, nil)
		eventually(t, func() error {
			return api.Get(t.Context(), client.ObjectKey{Namespace: operatorNamespace, Name: name}, &sriovv1.SriovNetworkNodeState{})
		})
	}
	agent, err := client.New(as("sluice-agent", map[string][]string{"authentication.kubernetes.io/node-name": {"adm-1"}}), client.Options{Scheme: api.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	unbound, err := client.New(as("sluice-agent", nil), client.Options{Scheme: api.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	status := sriovv1.SriovNetworkNodeStateStatus{SyncStatus: sriovv1.SyncStatusSucceeded}
	write := func(c client.Client, node string) error {
		patch, err := applyStatus(sriovv1.SchemeGroupVersion.WithKind("SriovNetworkNodeState"), client.ObjectKey{Namespace: operatorNamespace, Name: node}, &status)
		if err != nil {
			return err
		}
		return c.Status().Apply(t.Context(), patch, client.FieldOwner("sluice-agent"), client.ForceOwnership)
	}
	eventually(t, func() error {
		return refusedWith(write(agent, "adm-2"), "SriovNetworkNodeState adm-2: an agent writes the state of its own node only, and this one is on adm-1")
	})
	if err := refusedWith(write(unbound, "adm-1"), "this one is on no known node"); err != nil {
		t.Error(err)
	}
	if err := write(agent, "adm-1"); err != nil {
		t.Errorf("its own state: %v", err)
	}
	if err := agent.List(t.Context(), &sriovv1.SriovNetworkNodeStateList{}, client.InNamespace(operatorNamespace), client.MatchingFields{"metadata.name": "adm-1"}); err != nil {
		t.Errorf("read its own state: %v", err)
	}
	event := func(namespace, kind, name, host string) *corev1.Event {
		return &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{GenerateName: "e", Namespace: namespace},
			InvolvedObject: corev1.ObjectReference{Namespace: namespace, Kind: kind, Name: name},
			Source:         corev1.EventSource{Component: "sluice-agent", Host: host},
		}
	}
	for _, e := range []*corev1.Event{event(operatorNamespace, "SriovNetworkNodeState", "adm-1", ""), event("default", "Pod", "p", "adm-1"), event("default", "MultiNetworkPolicy", "p", "adm-1")} {
		if err := agent.Create(t.Context(), e); err != nil {
			t.Errorf("make an event about %s %s: %v", e.InvolvedObject.Kind, e.InvolvedObject.Name, err)
			continue
		}
		again := e.DeepCopy()
		again.Count = 2
		if err := agent.Patch(t.Context(), again, client.MergeFrom(e)); err != nil {
			t.Errorf("count an event about %s %s: %v", e.InvolvedObject.Kind, e.InvolvedObject.Name, err)
		}
	}
	const only = "an agent makes events about its own node's SriovNetworkNodeState, and about pods and policies in its own node's name, and no others"
	for _, e := range []*corev1.Event{
		event(operatorNamespace, "SriovNetworkNodeState", "adm-2", "adm-1"), event(operatorNamespace, "SriovNetworkNodePolicy", "adm-1", "adm-1"),
		event("default", "Pod", "p", "adm-2"), event("default", "NetworkPolicy", "p", "adm-2"), event("default", "Pod", "p", ""), event("default", "Service", "s", "adm-1"),
	} {
		if err := refusedWith(agent.Create(t.Context(), e), only); err != nil {
			t.Errorf("an event about %s %s of %q: %v", e.InvolvedObject.Kind, e.InvolvedObject.Name, e.Source.Host, err)
		}
	}
	others := event("default", "Pod", "p", "adm-2")
	if err := api.Create(t.Context(), others); err != nil {
		t.Fatal(err)
	}
	taken := others.DeepCopy()
	taken.Source.Host = "adm-1"
	if err := refusedWith(agent.Patch(t.Context(), taken, client.MergeFrom(others)), only); err != nil {
		t.Errorf("another node's event: %v", err)
	}
}

// Even an agent that came to have all rights in its namespace writes nothing else of ours.
func TestAgentWritesNothingElse(t *testing.T) {
	needAPI(t)
	makeNode(t, "adm-3", nil)
	state := &sriovv1.SriovNetworkNodeState{}
	eventually(t, func() error {
		return api.Get(t.Context(), client.ObjectKey{Namespace: operatorNamespace, Name: "adm-3"}, state)
	})
	config := as("sluice-agent", map[string][]string{"authentication.kubernetes.io/node-name": {"adm-3"}})
	config.Impersonate.Groups = append(config.Impersonate.Groups, "system:masters")
	agent, err := client.New(config, client.Options{Scheme: api.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	policy := &sriovv1.SriovNetworkNodePolicy{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "adm"}}
	policy.Spec.ResourceName, policy.Spec.NumVfs, policy.Spec.NodeSelector = "r", 1, map[string]string{"no": "node"}
	policy.Spec.NicSelector.Vendor = "8086"
	pool := &sriovv1.SriovNetworkPoolConfig{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "adm"}}
	annotated := state.DeepCopy()
	annotated.Annotations = map[string]string{"sluice.dev/reboot-allowed": "x"}
	for name, err := range map[string]error{
		"make a policy":            agent.Create(t.Context(), policy),
		"make a pool":              agent.Create(t.Context(), pool),
		"annotate its own state":   agent.Patch(t.Context(), annotated, client.MergeFrom(state)),
		"delete its own state":     agent.Delete(t.Context(), state.DeepCopy()),
		"delete the configuration": agent.Delete(t.Context(), &sriovv1.SriovOperatorConfig{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "default"}}),
	} {
		if err := refusedWith(err, "an agent writes the status of its node's SriovNetworkNodeState, and IPBlocks, and nothing else"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Of pods an agent writes the network status, on its own node, even if it came to have
// all rights.
func TestAgentWritesOnlyTheNetworkStatusOfItsPods(t *testing.T) {
	needAPI(t)
	clientAs := func(all bool, node string) client.Client {
		t.Helper()
		config := as("sluice-agent", map[string][]string{"authentication.kubernetes.io/node-name": {node}})
		if all {
			config.Impersonate.Groups = append(config.Impersonate.Groups, "system:masters")
		}
		c, err := client.New(config, client.Options{Scheme: api.Scheme()})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "adm-pod", Annotations: map[string]string{"a": "1"}}}
	pod.Spec.NodeName = "adm-4"
	pod.Spec.Containers = []corev1.Container{{Name: "c", Image: "i"}}
	if err := api.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	const networkStatus = "k8s.v1.cni.cncf.io/network-status"
	write := func(c client.Client, change func(*corev1.Pod)) error {
		changed := pod.DeepCopy()
		change(changed)
		return c.Status().Patch(t.Context(), changed, client.MergeFrom(pod))
	}
	status := func(p *corev1.Pod) { p.Annotations[networkStatus] = "[]" }
	eventually(t, func() error {
		return refusedWith(write(clientAs(false, "adm-5"), status), "pod adm-pod: an agent writes the network status of pods of its own node only, and this one is on adm-5")
	})
	own, mighty := clientAs(false, "adm-4"), clientAs(true, "adm-4")
	if err := write(own, status); err != nil {
		t.Errorf("the network status of its own pod: %v", err)
	}
	if err := write(own, func(p *corev1.Pod) { p.Annotations["sluice.dev/enforcement"] = "{}" }); err != nil {
		t.Errorf("what policy is in force on its own pod: %v", err)
	}
	for name, change := range map[string]func(*corev1.Pod){
		"another annotation": func(p *corev1.Pod) { p.Annotations["b"] = "1" },
		"an annotation less": func(p *corev1.Pod) { delete(p.Annotations, "a") },
		"a label":            func(p *corev1.Pod) { p.Labels = map[string]string{"app": "other"} },
		"the status":         func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded },
	} {
		if err := refusedWith(write(own, change), "an agent writes the annotations "+networkStatus+" and sluice.dev/enforcement, and nothing else of a pod"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	labelled := pod.DeepCopy()
	labelled.Labels = map[string]string{"app": "other"}
	for name, err := range map[string]error{
		"patch a pod":  mighty.Patch(t.Context(), labelled, client.MergeFrom(pod)),
		"make a pod":   mighty.Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "adm-own"}, Spec: pod.Spec}),
		"delete a pod": mighty.Delete(t.Context(), pod.DeepCopy()),
	} {
		if err := refusedWith(err, "an agent writes the network status of pods, and nothing else"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := own.List(t.Context(), &corev1.SecretList{}); !apierrors.IsForbidden(err) {
		t.Errorf("list secrets: %v", err)
	}
}

// The agent's client of the API server, with the rights an agent has.
func TestAgentTellsPodsNetworks(t *testing.T) {
	needAPI(t)
	config := as("sluice-agent", map[string][]string{"authentication.kubernetes.io/node-name": {"adm-6"}})
	agent, err := standalone.NewServer(config)
	if err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "adm-net", Annotations: map[string]string{"a": "1"}}}
	pod.Spec.NodeName = "adm-6"
	pod.Spec.Containers = []corev1.Container{{Name: "c", Image: "i"}}
	if err := api.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	uid := string(pod.UID)
	if a, err := agent.Pod(t.Context(), pod.Namespace, pod.Name, uid); err != nil || a["a"] != "1" {
		t.Errorf("%v, %v", a, err)
	}
	if err := agent.SetStatus(t.Context(), pod.Namespace, pod.Name, uid, "[]"); err != nil {
		t.Error(err)
	}
	got := &corev1.Pod{}
	if err := api.Get(t.Context(), client.ObjectKeyFromObject(pod), got); err != nil || got.Annotations["k8s.v1.cni.cncf.io/network-status"] != "[]" || got.Annotations["a"] != "1" {
		t.Errorf("%v, %v", got.Annotations, err)
	}
	// A pod that took the name of the one that is meant is neither read nor written.
	if _, err := agent.Pod(t.Context(), pod.Namespace, pod.Name, "other"); attach.CNIError(err).Code != 11 {
		t.Errorf("another pod is read: %v", err)
	}
	if err := agent.SetStatus(t.Context(), pod.Namespace, pod.Name, "0b8f2b5e-0000-0000-0000-000000000000", "x"); attach.CNIError(err).Code != 11 {
		t.Errorf("another pod is written: %v", err)
	}
	if _, err := agent.Pod(t.Context(), pod.Namespace, "nosuch", uid); attach.CNIError(err).Code != 7 {
		t.Errorf("a pod that does not exist: %v", err)
	}
	if _, err := agent.Network(t.Context(), pod.Namespace, "nosuch"); attach.CNIError(err).Code != 7 || !strings.Contains(err.Error(), operatorNamespace+"/nosuch") {
		t.Errorf("a network that does not exist: %v", err)
	}
}
