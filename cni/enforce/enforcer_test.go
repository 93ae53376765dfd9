package enforce

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/go-logr/logr/testr"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/enforce/cluster"
	"github.com/sluice-network/sluice/cni/enforce/nft"
	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// node is a node in memory: an API server, an engine, and the Enforcer between.
type node struct {
	t *testing.T
	*Enforcer

	mu          sync.Mutex
	unsynced    bool
	known       map[string]*cluster.Pod
	rules       map[attach.Key]string // in force: "denied", what may talk to it, or "held"
	refuse      map[string]error      // by method of Engine
	calls       []string
	annotations map[string]string
	counted     nft.Counted
	changes     int // of the condition
	events      []string
	tamper      func(attach.Interface, nft.Tampering)
}

func newNode(t *testing.T) *node {
	n := &node{t: t, known: map[string]*cluster.Pod{}, rules: map[attach.Key]string{}, refuse: map[string]error{}, annotations: map[string]string{}}
	n.Enforcer = New(Options{
		Node: "here", Cluster: n, Engine: n, API: n, Log: testr.New(t),
		OpenNetns: func(string) (*host.Netns, error) { return &host.Netns{}, nil },
		Addresses: func() ([]netip.Addr, error) { return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil },
		Changed: func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.changes++
		},
	})
	return n
}

// run starts the Enforcer.
func (n *node) run() *node {
	ctx, cancel := context.WithCancel(n.t.Context())
	done := make(chan error)
	go func() { done <- n.Run(ctx) }()
	n.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Error(err)
		}
	})
	return n
}

func (n *node) call(method string, key attach.Key, now string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls = append(n.calls, method)
	if err := n.refuse[method]; err != nil {
		return err
	}
	if now == "" {
		delete(n.rules, key)
	} else {
		n.rules[key] = now
	}
	return nil
}

func (n *node) DenyAll(i attach.Interface, _ *host.Netns) error {
	return n.call("DenyAll", i.Key, "denied")
}

func (n *node) Apply(i attach.Interface, _ *host.Netns, verdicts [2]*policy.Verdicts, cut bool, _ uint64) error {
	var all []string
	for d, v := range verdicts {
		text := "open"
		if v.Isolated {
			var from []string
			for _, p := range v.Peers {
				from = append(from, p.First.String())
			}
			text = strings.Join(from, " ")
		}
		all = append(all, policy.Direction(d).String()+": "+text)
	}
	if !verdicts[policy.Ingress].Isolated && !verdicts[policy.Egress].Isolated {
		all = []string{"held"}
	}
	if cut {
		all = append(all, "cut")
	}
	return n.call("Apply", i.Key, strings.Join(all, ", "))
}

func (n *node) Cut(i attach.Interface, cut bool) error {
	if cut {
		return n.call("Cut", i.Key, "no link")
	}
	return n.call("Join", i.Key, "")
}

func (n *node) Remove(i attach.Interface, _ *host.Netns) error {
	if i.Key == (attach.Key{}) {
		n.t.Error("remove from nothing")
	}
	return n.call("Remove", i.Key, "")
}

func (n *node) Generation(attach.Interface, *host.Netns) (uint64, bool, error) { return 7, true, nil }

func (n *node) Counted(attach.Interface) (nft.Counted, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.counted, nil
}

func (n *node) Sizes() map[string]nft.Size {
	return map[string]nft.Size{EnginePod: {Rules: 30, Elements: 4}}
}

func (n *node) Missing() error {
	if n.Synced() {
		return nil
	}
	return errors.New("the API server does not answer")
}

func (n *node) Close(attach.Interface) {}

func (n *node) Report(f func(attach.Interface, nft.Tampering)) { n.tamper = f }

func (n *node) Synced() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.unsynced
}

func (n *node) Known(namespace, name string) (*cluster.Pod, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, ok := n.known[namespace+"/"+name]
	return p, ok
}

func (n *node) Pod(_ context.Context, namespace, name, uid string, _ time.Duration) (*cluster.Pod, error) {
	if p, ok := n.Known(namespace, name); ok && p.Is(uid) {
		return p, nil
	}
	return nil, errors.New("there is no such pod")
}

// Annotate changes the pod, which the API server tells in its turn.
func (n *node) Annotate(_ context.Context, namespace, name, uid, value string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.annotations[namespace+"/"+name] = value
	p := *n.known[namespace+"/"+name]
	if p.UID != uid {
		n.t.Errorf("annotate %s, which is %s", uid, p.UID)
	}
	p.Annotations = maps.Clone(p.Annotations)
	p.Annotations[Annotation] = value
	n.known[namespace+"/"+name] = &p
	go n.SetPod(&p)
	return nil
}

func (n *node) Event(about corev1.ObjectReference, _ bool, reason, message string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, fmt.Sprintf("%s %s/%s %s: %s", about.Kind, about.Namespace, about.Name, reason, message))
}

// pod tells of a pod in namespace ns, with an address on ns/blue when ip is given.
func (n *node) pod(name, where, ip string, labels map[string]string) {
	p := &cluster.Pod{Pod: policy.Pod{Namespace: "ns", Name: name, UID: "uid-" + name, Node: where, Labels: labels}}
	if ip != "" {
		p.Interfaces = []policy.Interface{{Network: "ns/blue", Name: "net1", IPs: []netip.Addr{netip.MustParseAddr(ip)}}}
	}
	if where == n.Node {
		p.Annotations = map[string]string{nadv1.NetworkAttachmentAnnot: "blue"}
	}
	n.mu.Lock()
	n.known["ns/"+name] = p
	n.mu.Unlock()
	n.SetPod(p)
}

// policy tells of a NetworkPolicy that lets pods with label from=<name> talk to those with
// the label to=<name>.
func (n *node) policy(name string) {
	to, from := metav1.LabelSelector{MatchLabels: map[string]string{"to": name}}, &metav1.LabelSelector{MatchLabels: map[string]string{"from": name}}
	n.SetPolicy(cluster.Policy{Policy: policy.ReadNetworkPolicy(&networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name},
		Spec:       networkingv1.NetworkPolicySpec{PodSelector: to, Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: from}}}}},
	})})
}

func (n *node) unpolicy(name string) {
	n.DeletePolicy(cluster.Policy{Policy: &policy.Policy{Kind: "NetworkPolicy", Namespace: "ns", Name: name}})
}

// refusing makes the Engine's method fail, or work again.
func (n *node) refusing(method string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refuse[method] = err
}

func face1(pod string) attach.Interface {
	return attach.Interface{
		Key: attach.Key{Network: "blue", ContainerID: "c-" + pod, IfName: "net1"}, Generation: 1, Pod: "ns/" + pod, PodUID: "uid-" + pod,
		Device: "0000:01:10.0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, NetnsPath: "/tmp/" + pod,
	}
}

// add is what an ADD asks for, up to the first error.
func (n *node) add(i attach.Interface, ip string) (err error) {
	ctx, ns := n.t.Context(), &host.Netns{}
	if i.Definition, err = n.Definition(ctx, i.Pod, i.PodUID, i.IfName); err != nil {
		return err
	}
	if err = n.Deny(ctx, i, ns); err != nil {
		return errors.Join(err, n.Enforcer.Remove(ctx, i, ns))
	}
	i.IPs = []netip.Addr{netip.MustParseAddr(ip)}
	if err = n.Enforce(ctx, i, ns); err != nil {
		return errors.Join(err, n.Enforcer.Remove(ctx, i, ns))
	}
	return nil
}

func (n *node) force(pod string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.rules[face1(pod).Key]
}

func (n *node) becomes(what string, is func() string, want string) {
	n.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		got := is()
		if got == want {
			return
		}
		if time.Now().After(end) {
			n.t.Fatalf("%s is %q, not %q; calls %v", what, got, want, n.calls)
		}
	}
}

func (n *node) inForce(pod, want string) {
	n.t.Helper()
	n.becomes("rules of "+pod, func() string { return n.force(pod) }, want)
}

func (n *node) status(pod string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.annotations["ns/"+pod]
}

func codeOf(err error) uint {
	if err == nil {
		return 0
	}
	return attach.CNIError(err).Code
}

const optedIn = "ns/blue"

// TestLifeOfAnInterface follows an interface from its ADD over policies that come, change
// and go, to its DEL.
func TestLifeOfAnInterface(t *testing.T) {
	n := newNode(t).run()
	n.SetNamespace(policy.Namespace{Name: "ns"})
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", map[string]string{"to": "p"})
	if err := n.add(face1("a"), "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	if len(n.calls) > 0 || n.status("a") != "" {
		t.Errorf("an interface that no policy isolates cost %v, %q", n.calls, n.status("a"))
	}

	n.policy("p")
	n.inForce("a", "ingress: 192.0.2.1, egress: open")
	n.pod("b", "there", "10.0.0.2", map[string]string{"from": "p"})
	n.inForce("a", "ingress: 10.0.0.2 192.0.2.1, egress: open")
	n.becomes("annotation", func() string { return n.status("a") },
		`{"net1":{"network":"ns/blue","generation":2,"ingress":{"engine":"nft-pod","policies":["NetworkPolicy ns/p"]}}}`)
	n.pod("b", "there", "10.0.0.2", nil)
	n.inForce("a", "ingress: 192.0.2.1, egress: open")

	n.unpolicy("p")
	n.inForce("a", "")
	n.becomes("annotation", func() string { return n.status("a") }, "")

	n.policy("p")
	n.inForce("a", "ingress: 192.0.2.1, egress: open")
	i := face1("a")
	i.Definition = optedIn
	if err := n.Enforcer.Remove(t.Context(), i, nil); err != nil || n.force("a") != "" || len(n.faces) > 0 || len(n.of) > 0 {
		t.Errorf("%v, left %v, %v", err, n.rules, n.faces)
	}
	n.pod("b", "there", "10.0.0.2", map[string]string{"from": "p"})
	time.Sleep(20 * time.Millisecond)
	if n.force("a") != "" {
		t.Errorf("came again: %v", n.rules)
	}
}

// TestHeld: policies know peers by their addresses, so who is on a network that has any
// sends from its own ones only, though none isolates it.
func TestHeld(t *testing.T) {
	n := newNode(t).run()
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.SetNetwork(policy.Network{Name: "ns/red", Enforcement: policy.EnforceMulti})
	unchecked, bypass, elsewhere := face1("unchecked"), face1("bypass"), face1("elsewhere")
	unchecked.Unchecked, bypass.Bypass = true, "rdma is true"
	for i, f := range []attach.Interface{face1("a"), unchecked, bypass, elsewhere} {
		_, name, _ := strings.Cut(f.Pod, "/")
		n.pod(name, "here", "", nil)
		if name == "elsewhere" {
			n.known[f.Pod].Annotations[nadv1.NetworkAttachmentAnnot] = "red"
			n.SetPod(n.known[f.Pod])
		}
		if err := n.add(f, fmt.Sprintf("10.0.0.%d", i+1)); err != nil {
			t.Fatal(err)
		}
	}
	if len(n.calls) > 0 {
		t.Errorf("without policies: %v", n.calls)
	}

	n.refusing("Apply", errors.New("EOPNOTSUPP"))
	n.policy("p")
	n.becomes("annotation", func() string { return n.status("a") },
		`{"net1":{"network":"ns/blue","egress":{"engine":"none","problem":"it may send from others' addresses, because the rules cannot be made: EOPNOTSUPP","notes":["sends from its own addresses only, because its network has policies"]}}}`)
	if c := n.Condition(); c.Status != metav1.ConditionFalse || n.force("a") != "" {
		t.Errorf("condition %+v, rules %q", c, n.force("a"))
	}
	if err := n.add(face1("b"), "10.0.0.9"); err == nil || n.force("b") != "" {
		t.Errorf("a pod comes that cannot be held: %v, %q", err, n.force("b"))
	}
	n.refusing("Apply", nil)
	n.inForce("a", "held")
	n.becomes("annotation", func() string { return n.status("a") },
		`{"net1":{"network":"ns/blue","generation":1,"egress":{"engine":"nft-pod","notes":["sends from its own addresses only, because its network has policies"]}}}`)
	n.becomes("condition", func() string { return string(n.Condition().Status) }, "True")
	for _, pod := range []string{"unchecked", "bypass", "elsewhere"} {
		if n.force(pod) != "" || n.status(pod) != "" {
			t.Errorf("%s: %q, %s", pod, n.force(pod), n.status(pod))
		}
	}

	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.inForce("a", "ingress: 192.0.2.1, egress: open")
	n.becomes("annotation", func() string { return n.status("a") },
		`{"net1":{"network":"ns/blue","generation":2,"ingress":{"engine":"nft-pod","policies":["NetworkPolicy ns/p"]}}}`)
	n.pod("a", "here", "", nil)
	n.inForce("a", "held")
	n.unpolicy("p")
	n.inForce("a", "")
	n.becomes("annotation", func() string { return n.status("a") }, "")
}

// An interface that no NetworkAttachmentDefinition made is under no policy, also when it is
// from before this agent.
func TestNoDefinition(t *testing.T) {
	n := newNode(t)
	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.known["ns/a"].Annotations = nil
	i := face1("a")
	n.rules[i.Key] = "as it was"
	n.Load([]attach.Interface{i})
	n.SetPod(n.known["ns/a"])
	n.policy("p")
	n.run()
	n.becomes("known", func() string { return string(n.Condition().Status) }, "True")
	time.Sleep(50 * time.Millisecond)
	if n.force("a") != "as it was" || len(n.calls) > 0 {
		t.Errorf("%q, %v", n.force("a"), n.calls)
	}
}

// The interface is closed before it is in the pod, and what it is opened to is what policy
// says then, also of pods on this node whose annotation is not written yet.
func TestClosedFromTheFirstPacket(t *testing.T) {
	n := newNode(t)
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.pod("b", "here", "", map[string]string{"from": "p"})
	n.policy("p")
	if err := n.add(face1("b"), "10.0.0.2"); err != nil || !slices.Equal(n.calls, []string{"Apply"}) || n.force("b") != "held" {
		t.Fatalf("%v, %v, %s", err, n.calls, n.force("b"))
	}
	n.calls = nil
	if err := n.add(face1("a"), "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(n.calls, []string{"DenyAll", "Apply"}) || n.force("a") != "ingress: 10.0.0.2, egress: open" {
		t.Errorf("calls %v, in force %v", n.calls, n.rules)
	}
}

func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(*node, *attach.Interface)
		code    uint
		says    string
	}{
		"userspace driver": {func(_ *node, i *attach.Interface) { i.Bypass = "driver vfio-pci gives the VF to user space" }, attach.CodePolicy, "NetworkPolicy ns/p, and this cannot be enforced on net1, because driver vfio-pci"},
		"RDMA pool":        {func(_ *node, i *attach.Interface) { i.Bypass = "the VF is of a pool with isRdma" }, attach.CodePolicy, "isRdma: take the pod out of the policy"},
		"not known yet":    {func(n *node, _ *attach.Interface) { n.unsynced = true }, types.ErrTryAgainLater, "policies hold for pod ns/a is not known, because the API server does not answer"},
		"another pod":      {func(_ *node, i *attach.Interface) { i.PodUID = "other" }, types.ErrTryAgainLater, "no such pod"},
		"annotation": {func(n *node, _ *attach.Interface) {
			n.known["ns/a"].Annotations[nadv1.NetworkAttachmentAnnot] = "[{"
		}, attach.CodePolicy, "cannot be read"},
		"kernel, deny": {func(n *node, _ *attach.Interface) { n.refuse["DenyAll"] = errors.New("ENOMEM") }, types.ErrInternal, "ENOMEM"},
		"kernel":       {func(n *node, _ *attach.Interface) { n.refuse["Apply"] = errors.New("ENOMEM") }, types.ErrInternal, "enforce NetworkPolicy ns/p: ENOMEM"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
			n.pod("a", "here", "", map[string]string{"to": "p"})
			n.policy("p")
			i := face1("a")
			c.prepare(n, &i)
			err := n.add(i, "10.0.0.1")
			if codeOf(err) != c.code || !strings.Contains(err.Error(), c.says) {
				t.Errorf("code %d, %v", codeOf(err), err)
			}
			if len(n.rules)+len(n.faces)+len(n.of) > 0 {
				t.Errorf("left %v, %v", n.rules, n.faces)
			}
		})
	}
}

// What cannot be filtered and no policy isolates is attached as ever; a policy that comes
// later takes its link, and gives it back when it goes.
func TestPolicyThatComesToRDMA(t *testing.T) {
	n := newNode(t).run()
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", map[string]string{"to": "p"})
	i := face1("a")
	i.Bypass = "rdma is true"
	if err := n.add(i, "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	n.policy("p")
	n.becomes("annotation", func() string { return n.status("a") },
		`{"net1":{"network":"ns/blue","ingress":{"engine":"vf-link","policies":["NetworkPolicy ns/p"],"problem":"nothing passes either way: the VF's link is taken, because nobody can filter it: rdma is true"}}}`)
	n.becomes("events", func() string { n.mu.Lock(); defer n.mu.Unlock(); return strings.Join(n.events, "\n") },
		"Pod ns/a PolicyNotEnforced: interface net1: nothing passes either way: the VF's link is taken, because nobody can filter it: rdma is true")
	n.inForce("a", "no link")
	if !n.Enforcer.Cut(i) {
		t.Error("CHECK would miss the link")
	}
	n.refusing("Join", errors.New("EBUSY"))
	n.unpolicy("p")
	n.becomes("calls", func() string { n.mu.Lock(); defer n.mu.Unlock(); return n.calls[len(n.calls)-1] }, "Join")
	n.inForce("a", "no link")
	n.refusing("Join", nil)
	n.inForce("a", "")
	n.becomes("annotation", func() string { return n.status("a") }, "")
	n.refusing("Cut", errors.New("EOPNOTSUPP"))
	n.policy("p")
	n.becomes("annotation", func() string { return n.status("a") },
		`{"net1":{"network":"ns/blue","ingress":{"engine":"none","policies":["NetworkPolicy ns/p"],"problem":"not enforced, because nobody can filter it: rdma is true; and the VF's link cannot be taken: EOPNOTSUPP"}}}`)
}

// An agent that comes gives back a link that an earlier one took.
func TestLinkThatAnEarlierAgentTook(t *testing.T) {
	n := newNode(t)
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	i := face1("a")
	i.Bypass = "rdma is true"
	n.rules[i.Key] = "no link"
	n.Load([]attach.Interface{i})
	n.pod("a", "here", "", nil)
	n.run()
	n.inForce("a", "")
}

// A generation that the kernel refuses is tried again, and leaves the one before.
func TestRefusedGeneration(t *testing.T) {
	n := newNode(t).run()
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", map[string]string{"to": "p"})
	if err := n.add(face1("a"), "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	problem := func() string {
		var s PodStatus
		_ = json.Unmarshal([]byte(n.status("a")), &s)
		if d := s["net1"].Ingress; d != nil {
			return d.Engine + " " + d.Problem
		}
		return ""
	}
	n.refusing("Apply", errors.New("ENOMEM"))
	n.policy("p")
	n.inForce("a", "denied")
	n.becomes("problem", problem, "nft-pod closed, because the rules cannot be made: ENOMEM")
	n.refusing("Apply", nil)
	n.inForce("a", "ingress: 192.0.2.1, egress: open")
	n.becomes("problem", problem, "nft-pod ")

	n.refusing("Apply", errors.New("ENOMEM"))
	n.pod("b", "there", "10.0.0.2", map[string]string{"from": "p"})
	n.becomes("problem", problem, "nft-pod what was in force before stays so, because the rules cannot be made: ENOMEM")
	n.inForce("a", "ingress: 192.0.2.1, egress: open")
	n.refusing("Apply", nil)
	n.inForce("a", "ingress: 10.0.0.2 192.0.2.1, egress: open")
	n.becomes("problem", problem, "nft-pod ")
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.events) != 4 || !strings.Contains(n.events[0], "PolicyNotEnforced") || !strings.Contains(n.events[3], "PolicyEnforced") {
		t.Errorf("%q", n.events)
	}
}

// Rules that only hold an interface to its addresses keep nobody out: when the kernel refuses
// those of a policy that isolates it, it is closed, and stays as it is if it was isolated.
func TestRefusedGenerationOfWhatWasHeld(t *testing.T) {
	n := newNode(t).run()
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", nil)
	n.policy("p")
	if err := n.add(face1("a"), "10.0.0.1"); err != nil || n.force("a") != "held" {
		t.Fatal(err, n.force("a"))
	}
	n.refusing("Apply", errors.New("ENOMEM"))
	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.inForce("a", "denied")

	n.refusing("Apply", nil)
	n.pod("a", "here", "", nil)
	n.inForce("a", "held")
	n.refusing("Apply", errors.New("ENOMEM"))
	n.tamper(face1("a"), nft.Tampering{Err: errors.New("ENOMEM")})
	n.becomes("annotation", func() string { return n.status("a") },
		`{"net1":{"network":"ns/blue","generation":2,"egress":{"engine":"nft-pod","problem":"what was in force before stays so, because the rules cannot be made: ENOMEM","notes":["sends from its own addresses only, because its network has policies"]}}}`)
	n.inForce("a", "held")

	for told, want := range map[string]string{
		`{"net1":{"egress":{"engine":"nft-pod","notes":["sends from its own addresses only"]}}}`: "denied",
		`{"net1":{"ingress":{"engine":"nft-pod","policies":["NetworkPolicy ns/p"]}}}`:            "old",
		`{"net1":{"ingress":{"engine":"none","policies":["NetworkPolicy ns/p"]}}}`:               "denied",
		`{"net2":{"ingress":{"engine":"nft-pod","policies":["NetworkPolicy ns/p"]}}}`:            "denied",
		`{"net1":[]}`: "denied",
		``:            "denied",
	} {
		n := newNode(t)
		n.refusing("Apply", errors.New("ENOMEM"))
		i := face1("a")
		i.Definition, n.rules[i.Key] = optedIn, "old"
		n.Load([]attach.Interface{i})
		n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
		n.pod("a", "here", "", map[string]string{"to": "p"})
		n.known["ns/a"].Annotations[Annotation] = told
		n.SetPod(n.known["ns/a"])
		n.policy("p")
		n.run()
		n.becomes("problem", func() string { return string(n.Condition().Status) }, "False")
		if n.force("a") != want {
			t.Errorf("told %s: %q, not %q", told, n.force("a"), want)
		}
	}
}

// An agent that starts leaves what is in force until it knows all policies, and then
// brings it up to date.
func TestRestart(t *testing.T) {
	n := newNode(t)
	n.unsynced = true
	selected, free := face1("a"), face1("b")
	selected.Definition, free.Definition = "", optedIn // a record of an agent that knew of no policy
	n.rules[selected.Key], n.rules[free.Key] = "old", "old"
	selected.IPs = []netip.Addr{netip.MustParseAddr("10.0.0.1")}
	const told = `{"net1":{"network":"ns/blue","generation":7,"ingress":{"engine":"nft-pod","policies":["NetworkPolicy ns/p"]}}}`
	n.annotations["ns/a"] = told
	n.Load([]attach.Interface{selected, free})
	n.run()
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.pod("b", "here", "", nil)
	n.pod("c", "there", "10.0.0.3", map[string]string{"from": "p"})
	n.known["ns/a"].Annotations[Annotation] = told
	n.SetPod(n.known["ns/a"])
	time.Sleep(50 * time.Millisecond)
	if n.force("a") != "old" || n.force("b") != "old" || n.status("a") != told || n.Condition().Status != metav1.ConditionUnknown {
		t.Errorf("touched before all was known: %v, %s, %+v", n.rules, n.status("a"), n.Condition())
	}
	n.policy("p")
	n.mu.Lock()
	n.unsynced = false
	n.mu.Unlock()
	n.inForce("a", "ingress: 10.0.0.3 192.0.2.1, egress: open")
	n.inForce("b", "held")
	n.becomes("annotation", func() string { return n.status("a") },
		`{"net1":{"network":"ns/blue","generation":8,"ingress":{"engine":"nft-pod","policies":["NetworkPolicy ns/p"]}}}`)
}

// Whether connections are cut is what the network says when a generation is made.
func TestNetworksSayWhetherConnectionsAreCut(t *testing.T) {
	n := newNode(t).run()
	network := policy.Network{Name: optedIn, Enforcement: policy.EnforceAll, Cut: true}
	n.SetNetwork(network)
	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.policy("p")
	if err := n.add(face1("a"), "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	n.inForce("a", "ingress: 192.0.2.1, egress: open, cut")
	network.Cut = false
	n.SetNetwork(network)
	n.pod("b", "there", "10.0.0.2", map[string]string{"from": "p"})
	n.inForce("a", "ingress: 10.0.0.2 192.0.2.1, egress: open")
	network.Cut = true
	n.SetNetwork(network)
	n.pod("b", "there", "10.0.0.2", nil)
	n.inForce("a", "ingress: 192.0.2.1, egress: open, cut")
	n.DeleteNetwork(optedIn)
	n.pod("b", "there", "10.0.0.2", map[string]string{"from": "p"})
	n.inForce("a", "ingress: 10.0.0.2 192.0.2.1, egress: open")
}

func TestOptedOutIsShown(t *testing.T) {
	n := newNode(t).run()
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceNone})
	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.policy("p")
	if err := n.add(face1("a"), "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	n.becomes("annotation", func() string { return n.status("a") },
		`{"net1":{"network":"ns/blue","ingress":{"engine":"none","notes":["the network is annotated sluice.dev/network-policy=none"]},"egress":{"engine":"none","notes":["the network is annotated sluice.dev/network-policy=none"]}}}`)
	if len(n.calls) > 0 {
		t.Errorf("%v", n.calls)
	}
}

// A policy that is not valid isolates, and says so at itself and at the pod.
func TestPolicyThatIsNotValid(t *testing.T) {
	n := newNode(t).run()
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", nil)
	n.SetPolicy(cluster.Policy{Policy: policy.ReadNetworkPolicy(&networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "bad"}, Spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Sideways"}},
	})})
	if err := n.add(face1("a"), "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	n.inForce("a", "ingress: 192.0.2.1, egress: 192.0.2.1")
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.events) < 2 || !strings.Contains(n.events[0], `Pod ns/a PolicyNotValid: interface net1 is closed more than was meant: NetworkPolicy ns/bad: spec.policyTypes[0] is "Sideways"`) ||
		!strings.HasPrefix(n.events[1], "NetworkPolicy ns/bad PolicyNotValid: ") {
		t.Errorf("%q", n.events)
	}
}

// What a record did not say of the network is known when the interface goes, and what was
// told of a pod's policies by an earlier agent goes when none holds any more.
func TestRulesOfAnOldRecordAreRemoved(t *testing.T) {
	n := newNode(t)
	i := face1("a")
	i.PodUID = "" // as of one that sriov-cni attached
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "10.0.0.1", map[string]string{"to": "p"})
	n.known["ns/a"].Annotations[Annotation] = "{}"
	n.annotations["ns/a"] = "{}"
	n.SetPod(n.known["ns/a"])
	n.policy("p")
	n.run()
	n.Load([]attach.Interface{i}) // while all is known
	n.inForce("a", "ingress: 192.0.2.1, egress: open")
	n.unpolicy("p")
	n.becomes("annotation", func() string { return n.status("a") }, "")
	n.policy("p")
	n.inForce("a", "ingress: 192.0.2.1, egress: open")
	n.Leave(i)
	if err := n.Enforcer.Remove(t.Context(), i, &host.Netns{}); err != nil || n.force("a") != "" || len(n.faces) > 0 {
		t.Errorf("%v, left %v, %v", err, n.rules, n.faces)
	}
}

// The node's condition names whoever is refused, or is not enforced, as long as it is so.
func TestCondition(t *testing.T) {
	n := newNode(t).run()
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.pod("b", "here", "", map[string]string{"to": "q"})
	n.policy("p")
	condition := func() string {
		c := n.Condition()
		return fmt.Sprint(c.Type, " ", c.Status, " ", c.Reason, " ", c.Message)
	}
	const well = "NetworkPolicyEnforced True Enforced every policy is in force on the interfaces that it isolates"
	n.becomes("condition", condition, well)
	i := face1("a")
	i.Bypass = "driver vfio-pci gives the VF to user space"
	for range 2 {
		if err := n.add(i, "10.0.0.1"); codeOf(err) != attach.CodePolicy {
			t.Fatal(err)
		}
		n.becomes("condition", condition, "NetworkPolicyEnforced False NotEnforced pod ns/a is refused: ingress of the pod is isolated on network ns/blue by NetworkPolicy ns/p, and this cannot be enforced on net1, because driver vfio-pci gives the VF to user space: take the pod out of the policy, or annotate the network sluice.dev/network-policy=none")
	}
	n.pod("a", "here", "", nil)
	if err := n.add(i, "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	n.becomes("condition", condition, well)
	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.becomes("condition", condition, "NetworkPolicyEnforced False NotEnforced pod ns/a, interface net1: nothing passes either way: the VF's link is taken, because nobody can filter it: driver vfio-pci gives the VF to user space")
	if text := scrape(t, n); !strings.Contains(text, "sluice_policy_refused_total 2\n") || !strings.Contains(text, `sluice_policy_interfaces{direction="ingress",engine="vf-link",problem="yes"} 1`) {
		t.Error(text)
	}
	i.Definition = optedIn
	if err := n.Enforcer.Remove(t.Context(), i, nil); err != nil {
		t.Fatal(err)
	}
	n.becomes("condition", condition, well)
	i = face1("b")
	i.Bypass = "rdma is true"
	n.policy("q")
	if err := n.add(i, "10.0.0.2"); codeOf(err) != attach.CodePolicy {
		t.Fatal(err)
	}
	n.DeletePod("ns", "b")
	n.becomes("condition", condition, well)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.changes < 7 {
		t.Errorf("told %d times", n.changes)
	}
}

// scrape is what the metrics say.
func scrape(t *testing.T, n *node) string {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(n.Enforcer)
	all, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, family := range all {
		for _, m := range family.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			name := family.GetName()
			if len(labels) > 0 {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			fmt.Fprintln(&b, name, m.GetCounter().GetValue()+m.GetGauge().GetValue())
		}
	}
	return b.String()
}

// What the kernel dropped counts for the policies that were in force then, and what it let
// pass for those that allow it; also over rules that begin to count anew. It goes with the
// policy.
func TestHitsAndDropsAreCounted(t *testing.T) {
	n := newNode(t).run()
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.policy("p")
	if err := n.add(face1("a"), "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	const p, q = "NetworkPolicy ns/p", "NetworkPolicy ns/q"
	counted := func(d nft.Dropped, hits map[string]uint64) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.counted = nft.Counted{Dropped: d, Hits: map[string]uint64{}}
		for p, hits := range hits {
			n.counted.Hits[nft.HitsCounter(policy.Ingress, p)] = hits
		}
	}
	is := func(want ...string) {
		t.Helper()
		n.becomes("metrics that lack something", func() string { // an interface that is being changed is left out
			text := scrape(t, n)
			for _, w := range want {
				if !strings.Contains(text, w+"\n") {
					return "no " + w + " in\n" + text
				}
			}
			return ""
		}, "")
	}
	isOf := func(policy string, dropped, hits int) {
		t.Helper()
		is(fmt.Sprintf("sluice_policy_dropped_packets_total{direction=\"ingress\",policy=%q} %d", policy, dropped),
			fmt.Sprintf("sluice_policy_hits_total{direction=\"ingress\",policy=%q} %d", policy, hits))
	}
	isOf(p, 0, 0)
	counted(nft.Dropped{Ingress: 5, Egress: 2, Spoofed: 1}, map[string]uint64{p: 3, "NetworkPolicy ns/other": 9})
	isOf(p, 5, 3)
	is(`sluice_policy_interface_dropped_packets_total{direction="ingress",interface="net1",namespace="ns",pod="a",reason="policy"} 5`,
		`sluice_policy_interface_dropped_packets_total{direction="egress",interface="net1",namespace="ns",pod="a",reason="spoofed"} 1`,
		`sluice_policy_rules{engine="nft-pod"} 30`, `sluice_policy_elements{engine="nft-pod"} 4`)
	counted(nft.Dropped{Ingress: 7}, map[string]uint64{p: 4})
	isOf(p, 7, 4)
	counted(nft.Dropped{Ingress: 3}, map[string]uint64{p: 2})
	isOf(p, 10, 6)
	counted(nft.Dropped{Ingress: 4}, map[string]uint64{p: 3})
	n.pod("a", "here", "", map[string]string{"to": "p", "and": "q"})
	n.SetPolicy(cluster.Policy{Policy: policy.ReadNetworkPolicy(&networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "q"}, Spec: networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"and": "q"}}},
	})})
	n.becomes("annotation", func() string {
		return fmt.Sprint(strings.Contains(n.status("a"), `"policies":["NetworkPolicy ns/p","NetworkPolicy ns/q"]`))
	}, "true")
	counted(nft.Dropped{Ingress: 6}, map[string]uint64{p: 5, q: 1})
	isOf(p, 13, 9)
	isOf(q, 2, 1)
	// Rules that were removed count from nothing, if only from more than before.
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceNone})
	n.inForce("a", "")
	counted(nft.Dropped{Ingress: 7}, map[string]uint64{p: 6})
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", map[string]string{"to": "p"})
	isOf(p, 20, 15)
	counted(nft.Dropped{Ingress: 9}, map[string]uint64{p: 7})
	i := face1("a")
	i.Definition = optedIn
	n.Leave(i)
	if err := n.Enforcer.Remove(t.Context(), i, nil); err != nil {
		t.Fatal(err)
	}
	isOf(p, 22, 16)
	n.unpolicy("p")
	if text := scrape(t, n); strings.Contains(text, "ns/p") || strings.Contains(text, "sluice_policy_interface_dropped") {
		t.Error(text)
	}
	isOf(q, 2, 1)
}

// What the index has wrong is found when its network's turn comes, told, and put right.
func TestAudit(t *testing.T) {
	n := newNode(t).run()
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.SetNetwork(policy.Network{Name: "ns/red", Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.pod("b", "there", "10.0.0.2", map[string]string{"from": "p"})
	red := &cluster.Pod{Pod: policy.Pod{Namespace: "ns", Name: "c", UID: "c", Node: "here", Interfaces: []policy.Interface{{Network: "ns/red", Name: "net1", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.3")}}}}}
	n.SetPod(red)
	n.policy("p")
	if err := n.add(face1("a"), "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	n.inForce("a", "ingress: 10.0.0.2 192.0.2.1, egress: open")
	for range 3 { // ns/blue, ns/red, ns/blue
		n.audit()
	}
	if n.next != optedIn+"\x00" || strings.Contains(scrape(t, n), "differences_total 1") {
		t.Fatalf("next %q\n%s", n.next, scrape(t, n))
	}
	before := len(n.calls)
	n.mu.Lock()
	n.Enforcer.mu.Lock()
	state, _ := n.index.State(n.faces[face1("a").Key].id, policy.Ingress)
	state.Verdicts.Peers = slices.Clone(state.Verdicts.Peers)
	state.Verdicts.Peers[0].First = netip.MustParseAddr("10.0.0.1")
	n.Enforcer.mu.Unlock()
	n.rules[face1("a").Key] = "wrong"
	n.mu.Unlock()
	n.audit() // ns/red
	if len(n.calls) != before {
		t.Errorf("%v", n.calls[before:])
	}
	n.audit()
	n.inForce("a", "ingress: 10.0.0.2 192.0.2.1, egress: open")
	if text := scrape(t, n); !strings.Contains(text, "sluice_policy_audit_differences_total 1\n") {
		t.Error(text)
	}
	n.pod("b", "there", "10.0.0.4", map[string]string{"from": "p"})
	n.inForce("a", "ingress: 10.0.0.4 192.0.2.1, egress: open")
}

// Rules that somebody changes are told, and made again if the engine could not.
func TestTampering(t *testing.T) {
	n := newNode(t).run()
	n.SetNetwork(policy.Network{Name: optedIn, Enforcement: policy.EnforceAll})
	n.pod("a", "here", "", map[string]string{"to": "p"})
	n.policy("p")
	if err := n.add(face1("a"), "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	n.tamper(face1("a"), nft.Tampering{Process: "nft"})
	n.mu.Lock()
	n.rules[face1("a").Key] = "tampered"
	n.mu.Unlock()
	n.tamper(face1("a"), nft.Tampering{Err: errors.New("ENOMEM")})
	n.inForce("a", "ingress: 192.0.2.1, egress: open")
	n.mu.Lock()
	defer n.mu.Unlock()
	if want := []string{
		"Pod ns/a PolicyTampered: interface net1: nft changed the rules of network policy, and they were put right",
		"Pod ns/a PolicyTampered: interface net1: somebody changed the rules of network policy, and they cannot be put right: ENOMEM",
	}; !slices.Equal(n.events, want) {
		t.Errorf("%q", n.events)
	}
}
