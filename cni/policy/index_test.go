package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// manyPods are pods of namespace y on other nodes that are on x/net.
func manyPods(n int) []Pod {
	pods := make([]Pod, n)
	for i := range pods {
		pods[i] = parkPod(1, "b")
		pods[i].Name, pods[i].Node = fmt.Sprint("many-", i), "there"
		pods[i].Interfaces = []Interface{{Network: "x/net", Name: "net1", IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 2, byte(i), 1})}}}
	}
	return pods
}

func TestManyPeersAtOnce(t *testing.T) {
	x := park()
	set(t, x, np("p", "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}, podSelector: {matchLabels: {pod: b}}}]}]}"))
	pods := manyPods(patchLimit + 10)
	for _, n := range []int{1, patchLimit, patchLimit + 1, len(pods)} { // patched, and made anew
		for _, step := range []struct {
			tell func(Pod)
			want int
		}{{x.SetPod, n}, {func(p Pod) { x.RemovePod(p.Namespace, p.Name) }, 0}} {
			for _, p := range pods[:n] {
				step.tell(p)
			}
			if changes := x.Flush(); len(changes) != 1 || len(changes[0].State.Verdicts.Peers) != step.want+2 {
				t.Errorf("%d pods at once, %d are to be there: %d changes", n, step.want, len(changes))
			}
			if wrong := audit(x); len(wrong) > 0 {
				t.Errorf("%d pods at once: the audit found %v", n, wrong)
			}
		}
	}
}

// A map that is patched without end keeps no sets of ports that nobody has any more.
func TestSetsOfPortsDoNotPileUp(t *testing.T) {
	x := park()
	set(t, x, np("p", "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}], ports: [{port: web}]}]}"))
	pod := manyPods(1)[0]
	for port := range uint16(1000) {
		pod.Ports = []NamedPort{{"web", TCP, 1000 + port}}
		x.SetPod(pod)
		x.Flush()
		want(t, x, fmt.Sprintf("x/a 10.2.0.1 tcp/%d allow", 1000+port), fmt.Sprintf("x/a 10.2.0.1 tcp/%d deny", 999+port))
	}
	for _, p := range x.profiles {
		if len(p.sets) > 2*p.compiled+patchLimit+1 {
			t.Errorf("%d sets of ports, %d in use", len(p.sets), p.compiled)
		}
	}
	if wrong := audit(x); len(wrong) > 0 {
		t.Errorf("the audit found %v", wrong)
	}
}

// Two policies that name ports allow the same by other names: each has its share, in maps
// made anew and patched. One that allows only what another does is a change all the same.
func TestSharesByNamesOfPorts(t *testing.T) {
	x := park()
	allow := func(policy, name string) {
		set(t, x, np(policy, "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}], ports: [{port: "+name+"}]}]}"))
	}
	pods := manyPods(3)
	for i, names := range [][]string{{"web"}, {"dns"}, {"web", "dns"}} {
		pods[i].Ports = nil
		for _, name := range names {
			pods[i].Ports = append(pods[i].Ports, NamedPort{name, TCP, 80})
		}
	}
	shares := func(want ...string) {
		t.Helper()
		v := state(t, x, "x", "a", "x/net", Egress).Verdicts
		for i, p := range pods {
			if got := sharers(v, p.Interfaces[0].IPs[0], TCP, 80); strings.Join(got, " ") != want[i] {
				t.Errorf("pod %d is allowed by %q, want %q", i, got, want[i])
			}
		}
	}
	each := func(tell func(Pod)) {
		for _, p := range pods {
			tell(p)
		}
		x.Flush()
	}
	each(x.SetPod)
	allow("p", "web")
	allow("q", "dns")
	for range 2 { // made anew, and patched
		shares("NetworkPolicy x/p", "NetworkPolicy x/q", "NetworkPolicy x/p NetworkPolicy x/q")
		each(func(p Pod) { x.RemovePod(p.Namespace, p.Name) })
		each(x.SetPod)
	}
	allow("r", "dns")
	shares("NetworkPolicy x/p", "NetworkPolicy x/q NetworkPolicy x/r", "NetworkPolicy x/p NetworkPolicy x/q NetworkPolicy x/r")
	if wrong := audit(x); len(wrong) > 0 {
		t.Errorf("the audit found %v", wrong)
	}
}

// What concerns nobody changes nothing, and leaves the snapshots as they are.
func TestWhatConcernsNobodyChangesNothing(t *testing.T) {
	x := park()
	policy := np("p", "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]}")
	set(t, x, policy)
	before := state(t, x, "x", "a", "x/net", Ingress)
	other := parkPod(0, "b")
	other.Labels = map[string]string{"pod": "b", "new": "label"}
	for what, tell := range map[string]func(){
		"the same policy":          func() { set(t, x, policy) },
		"the same pod":             func() { x.SetPod(parkPod(0, "b")) },
		"a label nobody asks for":  func() { x.SetPod(other) },
		"a peer's peer":            func() { x.SetPod(manyPods(1)[0]) },
		"a network nobody is on":   func() { x.SetNetwork(Network{Name: "x/new", Enforcement: EnforceAll}) },
		"labels of a namespace":    func() { x.SetNamespace(Namespace{Name: "y", Labels: map[string]string{"a": "b"}}) },
		"a policy of another":      func() { set(t, x, "metadata: {namespace: none, name: p}\nspec: {}") },
		"the node's own addresses": func() { x.SetNode(nil) },
	} {
		tell()
		for _, c := range x.Flush() {
			if c.ID.Pod == "a" && c.ID.Namespace == "x" {
				t.Errorf("%s: %+v", what, c)
			}
		}
		if after := state(t, x, "x", "a", "x/net", Ingress); after != before {
			t.Errorf("%s: another snapshot", what)
		}
	}
}
