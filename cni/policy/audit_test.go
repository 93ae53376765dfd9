package policy

import (
	"net/netip"
	"slices"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// audit audits all networks.
func audit(x *Index) (wrong []Change) {
	for _, n := range x.Networks() {
		wrong = append(wrong, x.Snapshot(n).Audit()...)
	}
	return wrong
}

// The audit finds, on its network alone, what went wrong in the index, and an index made
// anew is right.
func TestAudit(t *testing.T) {
	x := NewIndex(func(p Pod) bool { return p.Node == "here" })
	pod := func(name, node, ip string) {
		x.SetPod(Pod{Namespace: "ns", Name: name, UID: name, Node: node, Labels: map[string]string{"app": "a"}, Interfaces: []Interface{
			{Network: "ns/red", Name: "net1", IPs: []netip.Addr{netip.MustParseAddr("10.0.0." + ip)}},
			{Network: "ns/blue", Name: "net2", IPs: []netip.Addr{netip.MustParseAddr("10.0.1." + ip)}},
		}})
	}
	pod("own", "here", "1")
	pod("peer", "there", "2")
	x.SetNamespace(Namespace{Name: "ns", Labels: map[string]string{"kubernetes.io/metadata.name": "ns"}})
	labels := metav1.LabelSelector{MatchLabels: map[string]string{"app": "a"}}
	x.SetNetwork(Network{Name: "ns/red", Enforcement: EnforceAll})
	x.SetNetwork(Network{Name: "ns/blue", Enforcement: EnforceAll})
	x.SetPolicy(ReadNetworkPolicy(&networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p"}, Spec: networkingv1.NetworkPolicySpec{
		PodSelector: labels, Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &labels}}}},
	}}))
	x.Flush()
	if got := x.Networks(); !slices.Equal(got, []string{"ns/blue", "ns/red"}) || len(audit(x)) > 0 {
		t.Fatalf("%v, found %v", got, audit(x))
	}
	for _, p := range x.profiles {
		if p.network == "ns/red" {
			for g := range p.groups {
				delete(p.groups[g].group.members, x.pods[podKey{"ns", "peer"}])
			}
			x.compile(p)
			for s := range p.sides {
				s.state = p.state
			}
		}
	}
	wrong := x.Snapshot("ns/red").Audit()
	if len(wrong) != 1 || wrong[0].ID.Interface != "net1" || wrong[0].Direction != Ingress || !wrong[0].State.Verdicts.Allows(netip.MustParseAddr("10.0.0.2"), 6, 80) {
		t.Errorf("found %+v", wrong)
	}
	if wrong := x.Snapshot("ns/blue").Audit(); len(wrong) > 0 {
		t.Errorf("another network: %+v", wrong)
	}
	y := x.Snapshot("").Anew()
	y.Flush()
	if wrong := audit(y); len(wrong) > 0 {
		t.Errorf("made anew: %+v", wrong)
	}
	if s, _ := y.State(wrong[0].ID, Ingress); !s.equal(wrong[0].State) {
		t.Errorf("made anew: %+v", s)
	}
}
