package policy

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// cpuTime is what this process has used until now, the garbage collector included.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

const (
	benchNamespaces = 500
	podsEach        = 100
	policiesEach    = 20
)

// benchPod is one of 50,000: an address of each family, six labels. One in 500 is here.
func benchPod(ns, n int) Pod {
	i := ns*podsEach + n
	node := "there"
	if n == 0 && ns%5 == 0 {
		node = "here"
	}
	return Pod{
		Namespace: fmt.Sprintf("ns-%d", ns), Name: fmt.Sprintf("pod-%d", n), UID: fmt.Sprintf("uid-%d", i), Node: node,
		Labels:     map[string]string{"app": fmt.Sprint("app-", n%10), "tier": fmt.Sprint("tier-", n%3), "version": fmt.Sprint(n % 2), "team": fmt.Sprint(ns % 50), "pod-template-hash": fmt.Sprint("hash-", ns, n%10), "name": fmt.Sprint("pod-", i)},
		Ports:      []NamedPort{{"http", TCP, uint16(8080 + n%2)}},
		Interfaces: []Interface{{Network: "default/net", Name: "net1", IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(ns >> 4), byte(ns<<4) | byte(n>>6), byte(n << 2)}), netip.MustParseAddr(fmt.Sprintf("fd00::%x:%x", ns, n))}}},
	}
}

// benchPolicy is one of 10,000: ten pods of its namespace, the 1,000 pods of a team's
// namespaces, or for one in 20 the 5,000 of five teams, blocks with excepts, ranges and
// names of ports. Two of them select each own pod, one of these that of five teams.
func benchPolicy(ns, n int) *networkingv1.NetworkPolicy {
	number := func(i int32) *intstr.IntOrString { p := intstr.FromInt32(i); return &p }
	name, udp, end := intstr.FromString("http"), corev1.ProtocolUDP, int32(9100)
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprintf("ns-%d", ns), Name: fmt.Sprintf("policy-%d", n)}}
	p.Spec.PodSelector.MatchLabels = map[string]string{"app": fmt.Sprint("app-", n%10)}
	p.Spec.PolicyTypes = []networkingv1.PolicyType{"Ingress", "Egress"}
	teams := []string{fmt.Sprint((ns + n) % 50)}
	for i := 1; n == 10 && i < 5; i++ {
		teams = append(teams, fmt.Sprint((ns+n+i)%50))
	}
	team := &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "team", Operator: "In", Values: teams}}}
	p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{
		{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint("app-", (n+1)%10)}}}}},
		{From: []networkingv1.NetworkPolicyPeer{{NamespaceSelector: team, PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"tier": fmt.Sprint("tier-", n%3)}, MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "version", Operator: "NotIn", Values: []string{"2"}}}}}}, Ports: []networkingv1.NetworkPolicyPort{{Port: &name}, {Port: number(9090), EndPort: &end}}},
	}
	p.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{
		{To: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "0.0.0.0/0", Except: []string{"10.0.0.0/8", fmt.Sprintf("192.168.%d.0/24", n)}}}}},
		{To: []networkingv1.NetworkPolicyPeer{{NamespaceSelector: team}}, Ports: []networkingv1.NetworkPolicyPort{{Protocol: &udp, Port: number(53)}, {Port: &name}}},
	}
	return p
}

// BenchmarkPolicyCold is an agent that starts in a cluster of 50,000 pods, 100 of them its
// own, with 10,000 policies: all verdict maps from nothing. The floor is the way without an
// index: one look at each pod of the cluster for each peer of each policy that selects an
// own pod, without making any map of it. Memory is what the Index adds to its inputs.
func BenchmarkPolicyCold(b *testing.B) {
	var pods []Pod
	var policies []*networkingv1.NetworkPolicy
	var namespaces []Namespace
	for ns := range benchNamespaces {
		namespaces = append(namespaces, Namespace{Name: fmt.Sprintf("ns-%d", ns), Labels: map[string]string{"team": fmt.Sprint(ns % 50)}})
		for n := range podsEach {
			pods = append(pods, benchPod(ns, n))
		}
		for n := range policiesEach {
			policies = append(policies, benchPolicy(ns, n))
		}
	}
	var spent time.Duration
	var memory uint64
	var peers int
	for b.Loop() {
		before, start := heap(), cpuTime(b)
		x := NewIndex(here)
		x.SetNetwork(Network{Name: "default/net", Enforcement: EnforceAll})
		for _, n := range namespaces {
			x.SetNamespace(n)
		}
		for _, p := range policies {
			x.SetPolicy(ReadNetworkPolicy(p))
		}
		for _, p := range pods {
			x.SetPod(p)
		}
		changes := x.Flush()
		spent += cpuTime(b) - start
		memory = heap() - before
		peers = 0
		for _, c := range changes {
			peers += len(c.State.Verdicts.Peers)
		}
		if len(changes) != 200 || peers < 10000 {
			b.Fatalf("%d changes with %d peers", len(changes), peers)
		}
		runtime.KeepAlive(x)
	}
	cold := spent / time.Duration(b.N)
	start, found := cpuTime(b), 0
	for i := range pods {
		if !here(pods[i]) {
			continue
		}
		for _, p := range policies {
			if p.Namespace != pods[i].Namespace || p.Spec.PodSelector.MatchLabels["app"] != pods[i].Labels["app"] {
				continue
			}
			read := ReadNetworkPolicy(p)
			for _, rule := range append(read.rules[Ingress], read.rules[Egress]...) {
				for _, peer := range rule.pods {
					for j := range pods {
						if peer.pods.Matches(labels.Set(pods[j].Labels)) {
							found++
						}
					}
				}
			}
		}
	}
	scan := cpuTime(b) - start
	if found == 0 {
		b.Fatal("no peers")
	}
	b.ReportMetric(cold.Seconds(), "cpu-s/op")
	b.ReportMetric(cold.Seconds()/scan.Seconds(), "of-scan")
	b.ReportMetric(float64(memory)/1e6, "MB")
	b.ReportMetric(float64(peers), "peers")
	if cold > 2*time.Second || memory > 300e6 {
		b.Errorf("takes %v of CPU and %d MB, at most 2s and 300 MB", cold, memory/1e6)
	}
}

// BenchmarkPolicyEvent is one of 5,000 peers that goes away or comes, until the verdict map
// of those it concerns is another. The floor is copying that map's list of peers once, as it
// must be for readers of the old one to keep it.
func BenchmarkPolicyEvent(b *testing.B) {
	for _, c := range []struct {
		name string
		own  int // interfaces that share the map
		edit func(*Pod, bool)
		want int // changes
	}{
		{"peer", 1, func(p *Pod, out bool) { p.Ended = out }, 1},
		{"peer-of-100", 100, func(p *Pod, out bool) { p.Ended = out }, 100},
		{"other-label", 1, func(p *Pod, out bool) { p.Labels = map[string]string{"app": "peer", "other": fmt.Sprint(out)} }, 0},
	} {
		b.Run(c.name, func(b *testing.B) {
			x := NewIndex(here)
			x.SetNetwork(Network{Name: "default/net", Enforcement: EnforceAll})
			x.SetPolicy(ReadNetworkPolicy(&networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "ns-0", Name: "p"}, Spec: networkingv1.NetworkPolicySpec{
				PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "own"}},
				Ingress:     []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "peer"}}}}, Ports: []networkingv1.NetworkPolicyPort{{}}}},
			}}))
			var peers []Pod
			for i := range 5000 + c.own {
				p := benchPod(i/podsEach, i%podsEach)
				p.Namespace, p.Name, p.Node, p.Labels = "ns-0", fmt.Sprint("pod-", i), "there", map[string]string{"app": "peer"}
				p.Interfaces[0].IPs = p.Interfaces[0].IPs[:1]
				if i >= 5000 {
					p.Node, p.Labels = "here", map[string]string{"app": "own"}
				}
				x.SetPod(p)
				peers = append(peers, p)
			}
			changes := x.Flush()
			list := changes[0].State.Verdicts.Peers
			if len(list) != 5000 {
				b.Fatalf("%d peers", len(list))
			}
			start, n, out := cpuTime(b), 0, false
			for b.Loop() {
				i := n / 2 * 7919 % 5000 // each goes and comes
				n++
				out = !out
				p := peers[i]
				c.edit(&p, out)
				x.SetPod(p)
				if changes := x.Flush(); len(changes) != c.want {
					b.Fatalf("%d changes, want %d", len(changes), c.want)
				}
			}
			event := (cpuTime(b) - start) / time.Duration(n)
			var kept []PeerRange
			start = cpuTime(b)
			const copies = 2000
			for range copies {
				kept = slices.Clone(list)
			}
			floor := (cpuTime(b) - start) / copies
			runtime.KeepAlive(kept)
			b.ReportMetric(float64(event.Nanoseconds())/1e3, "cpu-us/op")
			b.ReportMetric(float64(event)/float64(floor), "of-copy")
			if event > time.Millisecond {
				b.Errorf("takes %v of CPU, at most 1ms", event)
			}
		})
	}
}
