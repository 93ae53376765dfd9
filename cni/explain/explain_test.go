package explain

import (
	"net/netip"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/sluice-network/sluice/cni/enforce"
	"github.com/sluice-network/sluice/cni/enforce/cluster"
	"github.com/sluice-network/sluice/cni/policy"
)

func TestExplain(t *testing.T) {
	c := NewCluster()
	c.SetNamespace(policy.Namespace{Name: "ns"})
	c.SetNetwork(policy.Network{Name: "ns/blue", Enforcement: policy.EnforceAll})
	for name, ip := range map[string]string{"db": "10.0.0.1", "web": "10.0.0.2", "other": "10.0.0.3", "lonely": ""} {
		p := &cluster.Pod{Pod: policy.Pod{Namespace: "ns", Name: name, UID: name, Labels: map[string]string{"app": name}}}
		if ip != "" {
			p.Interfaces = []policy.Interface{{Network: "ns/blue", Name: "net1", IPs: []netip.Addr{netip.MustParseAddr(ip)}}}
		}
		if name == "db" {
			p.Annotations = map[string]string{enforce.Annotation: `{"net1":{"generation":3,"ingress":{"engine":"nft-pod","policies":["NetworkPolicy ns/p"]}}}`}
		}
		c.SetPod(p)
	}
	port := intstr.FromInt32(5432)
	selects := func(app string) metav1.LabelSelector {
		return metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
	}
	web := selects("web")
	c.SetPolicy(cluster.Policy{Policy: policy.ReadNetworkPolicy(&networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p"},
		Spec: networkingv1.NetworkPolicySpec{PodSelector: selects("db"), Ingress: []networkingv1.NetworkPolicyIngressRule{
			{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &web}}, Ports: []networkingv1.NetworkPolicyPort{{Port: &port}}},
		}},
	})})
	c.index.Flush()
	for name, x := range map[string]struct {
		q    Question
		want []string
	}{
		"allowed": {Question{Namespace: "ns", Pod: "db", Peer: "web", From: true, Protocol: policy.TCP, Port: 5432}, []string{
			"ns/blue: 10.0.0.2 to 10.0.0.1, protocol 6, port 5432: allowed\n", "ingress of pod ns/db, net1: allowed, by NetworkPolicy ns/p, spec.ingress[0]\n    in force: engine nft-pod, generation 3\n",
			"egress of pod ns/web, net1: allowed, no policy isolates it\n"}},
		"another port": {Question{Namespace: "ns", Pod: "db", Peer: "ns/web", From: true, Protocol: policy.TCP, Port: 80}, []string{
			"port 80: denied\n", "denied, isolated by NetworkPolicy ns/p, none of which allows it"}},
		"the other way":   {Question{Namespace: "ns", Pod: "db", Peer: "10.0.0.3", Network: "blue", Protocol: policy.UDP, Port: 53}, []string{"10.0.0.1 to 10.0.0.3, protocol 17, port 53: allowed"}},
		"from an address": {Question{Namespace: "ns", Pod: "db", Peer: "192.0.2.1", From: true, Protocol: policy.TCP, Port: 5432}, []string{"192.0.2.1 to 10.0.0.1, protocol 6, port 5432: denied"}},
	} {
		got, err := c.Explain(x.q)
		for _, want := range x.want {
			if err != nil || !strings.Contains(got, want) {
				t.Errorf("%s: no %q in\n%s%v", name, want, got, err)
			}
		}
	}
	for name, x := range map[string]struct {
		q    Question
		want string
	}{
		"no pod":       {Question{Namespace: "ns", Pod: "nosuch", Peer: "web"}, "there is no pod ns/nosuch"},
		"no interface": {Question{Namespace: "ns", Pod: "lonely", Peer: "web"}, "no interface besides"},
		"no peer":      {Question{Namespace: "ns", Pod: "db", Peer: "nosuch"}, "nosuch is neither"},
		"no network":   {Question{Namespace: "ns", Pod: "db", Peer: "web", Network: "red"}, "share no network"},
		"other family": {Question{Namespace: "ns", Pod: "db", Peer: "fd00::1"}, "of one family"},
	} {
		if got, err := c.Explain(x.q); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
}
