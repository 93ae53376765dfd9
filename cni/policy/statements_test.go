package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"
)

// park is namespaces x (team: red), y (team: blue) and z, each with pods a, b and c
// (labels pod and, but for c, tier: front). Each is on x/net, on which NetworkPolicy
// holds, as 10.0.N.M and fd00::N:M: N is 1 for x, 2 for y, 3 for z, M is 1 for a, ... All a
// and b are on x/aux too, on which only MultiNetworkPolicy holds, as 10.1.N.M and fd01::N:M.
// All are own pods. Each serves web at TCP 80 plus N and at UDP 80, and c serves alt at TCP 8080.
func park() *Index {
	x := NewIndex(func(p Pod) bool { return p.Node != "there" })
	x.SetNetwork(Network{"x/net", EnforceAll})
	x.SetNetwork(Network{"x/aux", EnforceMulti})
	for n, ns := range []string{"x", "y", "z"} {
		labels := map[string]string{"kubernetes.io/metadata.name": ns}
		if team := []string{"red", "blue", ""}[n]; team != "" {
			labels["team"] = team
		}
		x.SetNamespace(Namespace{Name: ns, Labels: labels})
		for _, name := range []string{"a", "b", "c"} {
			x.SetPod(parkPod(n, name))
		}
	}
	x.Flush()
	return x
}

func parkPod(n int, name string) Pod {
	m := int(name[0]-'a') + 1
	p := Pod{Namespace: []string{"x", "y", "z"}[n], Name: name, UID: name, Labels: map[string]string{"pod": name, "tier": "front"}}
	p.Ports = []NamedPort{{"web", TCP, uint16(81 + n)}, {"web", UDP, 80}}
	addrs := func(net int) []netip.Addr {
		return []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.%d.%d.%d", net, n+1, m)), netip.MustParseAddr(fmt.Sprintf("fd0%d::%d:%d", net, n+1, m))}
	}
	p.Interfaces = []Interface{{Network: "x/net", Name: "net1", IPs: addrs(0)}}
	if name == "c" {
		delete(p.Labels, "tier")
		p.Ports = append(p.Ports, NamedPort{"alt", TCP, 8080})
	} else {
		p.Interfaces = append(p.Interfaces, Interface{Network: "x/aux", Name: "net2", IPs: addrs(1)})
	}
	return p
}

// set tells of the policies in the YAML, of either kind.
func set(t *testing.T, x *Index, text string) []*Policy {
	t.Helper()
	var policies []*Policy
	for one := range strings.SplitSeq(text, "\n---\n") {
		if strings.TrimSpace(one) == "" {
			continue
		}
		var p *Policy
		if strings.Contains(one, "kind: MultiNetworkPolicy") {
			object, err := yaml.YAMLToJSON([]byte(one))
			if err != nil {
				t.Fatal(err)
			}
			if p, err = ReadMultiNetworkPolicy(object); err != nil {
				t.Fatal(err)
			}
		} else {
			var np networkingv1.NetworkPolicy
			if err := yaml.UnmarshalStrict([]byte(one), &np); err != nil {
				t.Fatal(err)
			}
			p = ReadNetworkPolicy(&np)
		}
		x.SetPolicy(p)
		policies = append(policies, p)
	}
	x.Flush()
	return policies
}

// np and mnp are policies of namespace x.
func np(name, spec string) string {
	return "metadata: {namespace: x, name: " + name + "}\nspec: " + spec
}

func mnp(name, networks, spec string) string {
	return "apiVersion: k8s.cni.cncf.io/v1beta1\nkind: MultiNetworkPolicy\nmetadata: {namespace: x, name: " + name + ", annotations: {k8s.v1.cni.cncf.io/policy-for: \"" + networks + "\"}}\nspec: " + spec
}

// want checks lines like
//
//	x/a y/b tcp/80 allow
//	aux x/a 10.9.9.9 icmp/0 deny
//
// Between pods both families are asked.
func want(t *testing.T, x *Index, lines ...string) {
	t.Helper()
	for _, line := range lines {
		f := strings.Fields(line)
		network := "x/net"
		if len(f) == 5 {
			network = "x/" + f[0]
			f = f[1:]
		}
		protocol, number, _ := strings.Cut(f[2], "/")
		port, err := strconv.ParseUint(number, 10, 16)
		protocols := map[string]uint8{"tcp": TCP, "udp": UDP, "sctp": SCTP, "icmp": 1}
		if err != nil || protocols[protocol] == 0 || f[3] != "allow" && f[3] != "deny" {
			t.Fatalf("%q is not understood", line)
		}
		from, to := addrsOf(t, x, network, f[0]), addrsOf(t, x, network, f[1])
		asked := 0
		for _, source := range from {
			for _, destination := range to {
				if source.Is4() != destination.Is4() {
					continue
				}
				asked++
				if a := x.Verdict(network, source, destination, protocols[protocol], uint16(port)); a.Allowed != (f[3] == "allow") {
					t.Errorf("%s (%s to %s): %+v", line, source, destination, a)
				}
			}
		}
		if asked == 0 {
			t.Fatalf("%q asks nothing", line)
		}
	}
}

func addrsOf(t *testing.T, x *Index, network, who string) []netip.Addr {
	if a, err := netip.ParseAddr(who); err == nil {
		return []netip.Addr{a}
	}
	namespace, name, _ := strings.Cut(who, "/")
	e := x.pods[podKey{namespace, name}]
	if e == nil {
		t.Fatalf("there is no pod %s", who)
	}
	for _, i := range e.Interfaces {
		if i.Network == network {
			return i.IPs
		}
	}
	t.Fatalf("pod %s is not on %s", who, network)
	return nil
}

const denyIngress, denyEgress = "{podSelector: {}, policyTypes: [Ingress]}", "{podSelector: {}, policyTypes: [Egress]}"

func TestStatements(t *testing.T) {
	for _, c := range []struct {
		name     string
		policies []string
		want     []string
	}{
		{"NP-01 no policy, everything allowed", nil, []string{"x/a x/b tcp/1 allow", "9.9.9.9 x/a udp/1 allow", "x/a 2001:db8::1 icmp/0 allow"}},
		{"NP-01 a policy that selects others", []string{np("p", "{podSelector: {matchLabels: {pod: a}}}")}, []string{"x/a x/b tcp/1 allow", "y/a x/a tcp/1 deny", "y/b y/a tcp/1 allow"}},
		{"NP-02 isolated by a policy of the own namespace only", []string{np("p", denyIngress)}, []string{"y/a x/a tcp/1 deny", "x/b x/a tcp/1 deny", "x/a y/a tcp/1 allow", "y/b y/a tcp/1 allow"}},
		{"NP-02 egress by itself", []string{np("p", denyEgress)}, []string{"x/a y/a tcp/1 deny", "y/a x/a tcp/1 allow"}},
		{"NP-03 the union of policies and rules", []string{
			np("p", denyIngress),
			np("q", "{podSelector: {}, ingress: [{ports: [{port: 80}]}, {from: [{podSelector: {matchLabels: {pod: b}}}], ports: [{port: 81}]}]}"),
			np("r", "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}], ports: [{port: 82}]}]}"),
		}, []string{"z/a x/a tcp/80 allow", "x/b x/a tcp/81 allow", "x/c x/a tcp/81 deny", "y/c x/a tcp/82 allow", "z/c x/a tcp/82 deny", "y/c x/b tcp/82 deny", "x/b x/a tcp/83 deny"}},
		{"NP-04 both ends must allow", []string{np("p", "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{ports: [{port: 80}, {port: 81}]}]}"), np("q", "{podSelector: {matchLabels: {pod: b}}, ingress: [{ports: [{port: 81}, {port: 82}]}]}")},
			[]string{"x/a x/b tcp/80 deny", "x/a x/b tcp/81 allow", "x/a x/b tcp/82 deny", "x/c x/b tcp/82 allow", "x/a x/c tcp/80 allow"}},
		{"NP-05 a verdict is about who begins: the server may not begin, the client may not be begun with", []string{np("p", "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress]}"), np("q", "{podSelector: {matchLabels: {pod: b}}, policyTypes: [Ingress]}")},
			[]string{"x/b x/a tcp/80 allow", "x/b x/a udp/80 allow", "x/b x/a sctp/80 allow", "x/a x/b tcp/80 deny"}},
		{"NP-06 a pod reaches itself", []string{np("p", denyIngress), np("q", denyEgress)}, []string{"x/a x/a tcp/80 allow", "x/a x/b tcp/80 deny"}},

		{"NP-10 policyTypes left out, no egress", []string{np("p", "{podSelector: {}, ingress: [{}]}")}, []string{"x/a y/a tcp/1 allow", "y/a x/a tcp/1 allow"}},
		{"NP-10 policyTypes left out, only egress", []string{np("p", "{podSelector: {}, egress: [{}]}")}, []string{"x/a y/a tcp/1 allow", "y/a x/a tcp/1 deny"}},
		{"NP-11 egress without rules", []string{np("p", "{podSelector: {}, policyTypes: [Egress]}")}, []string{"x/a y/a tcp/1 deny", "x/a 9.9.9.9 icmp/0 deny", "y/a x/a tcp/1 allow"}},
		{"NP-11 egress rules without Egress", []string{np("p", "{podSelector: {}, policyTypes: [Ingress], egress: [{ports: [{port: 1}]}]}")}, []string{"x/a y/a tcp/2 allow", "y/a x/a tcp/1 deny"}},
		{"NP-12 the empty podSelector", []string{np("p", "{podSelector: {}}")}, []string{"y/a x/a tcp/1 deny", "y/a x/b tcp/1 deny", "y/a x/c tcp/1 deny"}},
		{"NP-12 no podSelector", []string{np("p", "{policyTypes: [Ingress]}")}, []string{"y/a x/a tcp/1 deny", "y/a x/c tcp/1 deny"}},
		{"NP-13 ingress null", []string{np("p", "{podSelector: {}, ingress: null}")}, []string{"y/a x/a tcp/1 deny"}},
		{"NP-13 ingress empty", []string{np("p", "{podSelector: {}, ingress: []}")}, []string{"y/a x/a tcp/1 deny"}},
		{"NP-13 ingress with an empty rule", []string{np("p", "{podSelector: {}, ingress: [{}]}")}, []string{"y/a x/a tcp/1 allow", "9.9.9.9 x/a icmp/0 allow"}},
		{"NP-14 a rule without from", []string{np("p", "{podSelector: {}, ingress: [{ports: [{port: 80}]}]}")}, []string{"z/a x/a tcp/80 allow", "9.9.9.9 x/a tcp/80 allow", "2001:db8::1 x/a tcp/80 allow", "z/a x/a tcp/81 deny"}},
		{"NP-14 a rule with an empty from", []string{np("p", "{podSelector: {}, ingress: [{from: [], ports: [{port: 80}]}]}")}, []string{"9.9.9.9 x/a tcp/80 allow", "9.9.9.9 x/a tcp/81 deny"}},
		{"NP-15 a rule without ports", []string{np("p", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}")}, []string{"x/b x/a tcp/0 allow", "x/b x/a udp/65535 allow", "x/b x/a sctp/7 allow", "x/b x/a icmp/0 allow", "y/b x/a icmp/0 deny"}},
		{"NP-15 a rule with empty ports", []string{np("p", "{podSelector: {}, ingress: [{from: [{podSelector: {}}], ports: []}]}")}, []string{"x/b x/a udp/1 allow", "x/b x/a icmp/0 allow"}},
		{"NP-16 no protocol is TCP", []string{np("p", "{podSelector: {}, ingress: [{ports: [{port: 80}]}]}")}, []string{"y/a x/a tcp/80 allow", "y/a x/a udp/80 deny", "y/a x/a sctp/80 deny", "y/a x/a icmp/80 deny"}},
		{"NP-17 no port is all of the protocol", []string{np("p", "{podSelector: {}, ingress: [{ports: [{protocol: UDP}]}]}")}, []string{"y/a x/a udp/1 allow", "y/a x/a udp/65535 allow", "y/a x/a tcp/1 deny"}},
		{"NP-17 a protocol beside its numbered ports", []string{np("p", "{podSelector: {}, ingress: [{ports: [{port: 80}, {protocol: TCP}, {port: 90, endPort: 95}]}]}")}, []string{"y/a x/a tcp/80 allow", "y/a x/a tcp/1 allow", "y/a x/a tcp/65535 allow"}},

		{"NP-20 podSelector: of the policy's namespace", []string{np("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]}")}, []string{"x/b x/a tcp/1 allow", "y/b x/a tcp/1 deny", "x/c x/a tcp/1 deny"}},
		{"NP-20 namespaceSelector: all pods", []string{np("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}]}]}")}, []string{"y/a x/a tcp/1 allow", "y/c x/a tcp/1 allow", "x/b x/a tcp/1 deny"}},
		{"NP-20 both in one entry are and", []string{np("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}, podSelector: {matchLabels: {pod: b}}}]}]}")}, []string{"y/b x/a tcp/1 allow", "y/a x/a tcp/1 deny", "x/b x/a tcp/1 deny"}},
		{"NP-20 two entries are or", []string{np("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}, {podSelector: {matchLabels: {pod: b}}}]}]}")}, []string{"y/b x/a tcp/1 allow", "y/a x/a tcp/1 allow", "x/b x/a tcp/1 allow", "x/c x/a tcp/1 deny", "z/b x/a tcp/1 deny"}},
		{"NP-21 In", []string{np("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: pod, operator: In, values: [a, b]}]}}]}]}")}, []string{"x/b x/a tcp/1 allow", "x/c x/a tcp/1 deny"}},
		{"NP-21 NotIn, without the label too", []string{np("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: tier, operator: NotIn, values: [front]}]}}]}]}")}, []string{"x/b x/a tcp/1 deny", "x/c x/a tcp/1 allow"}},
		{"NP-21 Exists", []string{np("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: tier, operator: Exists}]}}]}]}")}, []string{"x/b x/a tcp/1 allow", "x/c x/a tcp/1 deny"}},
		{"NP-21 DoesNotExist", []string{np("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: tier, operator: DoesNotExist}]}}]}]}")}, []string{"x/b x/a tcp/1 deny", "x/c x/a tcp/1 allow"}},
		{"NP-21 all requirements at once", []string{np("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}, matchExpressions: [{key: tier, operator: DoesNotExist}]}}]}]}")}, []string{"x/b x/a tcp/1 deny", "x/c x/a tcp/1 deny"}},
		{"NP-21 the empty namespaceSelector", []string{np("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}")}, []string{"z/c x/a tcp/1 allow", "x/b x/a tcp/1 allow", "9.9.9.9 x/a tcp/1 deny"}},
		{"NP-21 namespaces without the label", []string{np("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: NotIn, values: [red]}]}}]}]}")}, []string{"z/c x/a tcp/1 allow", "y/c x/a tcp/1 allow", "x/b x/a tcp/1 deny"}},
		{"NP-21 of the pods that a policy is for", []string{np("p", "{podSelector: {matchExpressions: [{key: tier, operator: DoesNotExist}]}}")}, []string{"y/a x/c tcp/1 deny", "y/a x/a tcp/1 allow"}},
		{"NP-22 kubernetes.io/metadata.name", []string{np("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: z}}}]}]}")}, []string{"z/a x/a tcp/1 allow", "y/a x/a tcp/1 deny"}},
		{"NP-23 a peer that selects nobody", []string{np("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: none}}}], ports: [{port: 80}]}]}")}, []string{"x/b x/a tcp/80 deny", "9.9.9.9 x/a tcp/80 deny"}},
		{"NP-25 ipBlock matches pods", []string{np("p", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.2.0/24}}]}]}")}, []string{"10.0.2.1 x/a tcp/1 allow", "10.0.2.200 x/a tcp/1 allow", "10.0.3.1 x/a tcp/1 deny", "fd00::2:1 x/a tcp/1 deny"}},
		{"NP-26 except takes from its own cidr only", []string{
			np("p", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.2.0/24]}}, {ipBlock: {cidr: 10.0.2.2/32}}], ports: [{port: 80}]}]}"),
			np("q", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}], ports: [{port: 81}]}]}"),
		}, []string{"10.0.2.1 x/a tcp/80 deny", "10.0.2.2 x/a tcp/80 allow", "10.0.3.1 x/a tcp/80 allow", "10.0.1.255 x/a tcp/80 allow", "10.0.2.1 x/a tcp/81 allow", "10.0.3.1 x/a tcp/81 deny"}},
		{"NP-26 excepts of two blocks of one rule", []string{np("p", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.2.0/24]}}, {ipBlock: {cidr: 10.0.2.0/23, except: [10.0.3.0/24]}}]}]}")}, []string{"10.0.2.1 x/a tcp/1 allow", "10.0.3.1 x/a tcp/1 allow"}},
		{"NP-27 blocks of both families in a rule", []string{np("p", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: 'fd00::2:0/112', except: ['fd00::2:2/128']}}]}]}")}, []string{"9.9.9.9 x/a tcp/1 allow", "255.255.255.255 x/a tcp/1 allow", "fd00::2:1 x/a tcp/1 allow", "fd00::2:2 x/a tcp/1 deny", "fd00::3:1 x/a tcp/1 deny"}},
		{"NP-27 an except of all", []string{np("p", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [0.0.0.0/0]}}]}]}")}, []string{"0.0.0.0 x/a tcp/1 deny", "255.255.255.255 x/a tcp/1 deny"}},
		{"NP-28 all addresses of a pod", []string{np("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]}")}, []string{"10.0.1.2 x/a tcp/1 allow", "fd00::1:2 x/a tcp/1 allow", "fd00::1:3 x/a tcp/1 deny"}},

		{"NP-30 a named port of ingress is the pod's own", []string{np("p", "{podSelector: {}, ingress: [{ports: [{port: web}]}]}")}, []string{"y/a x/a tcp/81 allow", "y/a x/a tcp/82 deny", "y/a x/a udp/80 deny", "9.9.9.9 x/a tcp/81 allow"}},
		{"NP-30 a named port of egress is each destination's", []string{np("p", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}], ports: [{port: web}]}]}")}, []string{"x/a y/a tcp/82 allow", "x/a z/a tcp/83 allow", "x/a z/a tcp/82 deny", "x/a y/a tcp/81 deny", "x/a y/a udp/80 deny"}},
		{"NP-30 a named port of egress to anyone means pods", []string{np("p", "{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: web}]}]}")}, []string{"x/a y/a tcp/82 allow", "x/a z/a tcp/83 allow", "x/a 9.9.9.9 tcp/82 deny"}},
		{"NP-30 a named port of egress to an ipBlock means the pods in it", []string{np("p", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.0.2.0/24}}], ports: [{port: web}, {port: 99}]}]}")}, []string{"x/a 10.0.2.1 tcp/82 allow", "x/a 10.0.2.99 tcp/82 deny", "x/a 10.0.2.99 tcp/99 allow", "x/a 10.0.3.1 tcp/83 deny"}},
		{"NP-30 name and protocol", []string{np("p", "{podSelector: {}, ingress: [{ports: [{port: web, protocol: UDP}]}]}")}, []string{"y/a x/a udp/80 allow", "y/a x/a tcp/81 deny"}},
		{"NP-31 a named port that nobody serves", []string{np("p", "{podSelector: {}, ingress: [{ports: [{port: none}, {port: web, protocol: SCTP}, {port: 99}]}]}")}, []string{"y/a x/a tcp/99 allow", "y/a x/a tcp/81 deny", "y/a x/a sctp/80 deny"}},
		{"NP-31 a named port that some serve", []string{np("p", "{podSelector: {}, ingress: [{ports: [{port: alt}]}]}")}, []string{"y/a x/c tcp/8080 allow", "y/a x/a tcp/8080 deny"}},
		{"NP-32 endPort", []string{np("p", "{podSelector: {}, ingress: [{ports: [{port: 80, endPort: 82}, {port: 90, endPort: 90}]}]}")}, []string{"y/a x/a tcp/79 deny", "y/a x/a tcp/80 allow", "y/a x/a tcp/82 allow", "y/a x/a tcp/83 deny", "y/a x/a tcp/90 allow", "y/a x/a tcp/91 deny"}},
		{"NP-33 SCTP", []string{np("p", "{podSelector: {}, ingress: [{ports: [{protocol: SCTP, port: 80}]}]}")}, []string{"y/a x/a sctp/80 allow", "y/a x/a tcp/80 deny", "y/a x/a sctp/81 deny"}},
		{"NP-41 other protocols only by rules without ports", []string{np("p", "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: TCP}, {protocol: UDP}, {protocol: SCTP}]}]}"), np("q", "{podSelector: {matchLabels: {pod: b}}, ingress: [{}]}")}, []string{"y/a x/a icmp/0 deny", "y/a x/b icmp/0 allow"}},

		{"MNP-01 a name without namespace, and blanks", []string{mnp("p", " net , x/aux ", denyIngress)}, []string{"y/a x/a tcp/1 deny", "aux y/a x/a tcp/1 deny"}},
		{"MNP-01 a network of another namespace", []string{strings.ReplaceAll(mnp("p", "x/net, aux", denyIngress), "namespace: x", `namespace: "y"`)}, []string{"x/a y/a tcp/1 deny", "aux x/a y/a tcp/1 allow", "y/a x/a tcp/1 allow"}},
		{"MNP-02 no networks", []string{mnp("p", "", denyIngress), mnp("q", " , ", denyIngress)}, []string{"y/a x/a tcp/1 allow", "aux y/a x/a tcp/1 allow"}},
		{"MNP-03 only interfaces on the network", []string{mnp("p", "aux", denyIngress)}, []string{"y/a x/a tcp/1 allow", "aux y/a x/a tcp/1 deny"}},
		{"MNP-04 peers are those on the network", []string{mnp("p", "net,aux", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}")}, []string{"10.0.2.1 x/a tcp/1 allow", "10.1.2.1 x/a tcp/1 deny", "aux 10.1.2.1 x/a tcp/1 allow", "aux 10.0.2.1 x/a tcp/1 deny", "aux 10.0.2.3 x/a tcp/1 deny", "aux 10.1.2.3 x/a tcp/1 deny"}},
		{"MNP-05 NetworkPolicy only where the network opts in", []string{np("p", denyIngress)}, []string{"y/a x/a tcp/1 deny", "aux y/a x/a tcp/1 allow"}},
		{"MNP-06 defaults are those of NetworkPolicy", []string{mnp("p", "aux", "{podSelector: {}, ingress: [{ports: [{port: 80}]}], egress: [{ports: [{port: 80, endPort: 81}]}]}")}, []string{"aux y/a x/a tcp/80 allow", "aux y/a x/a udp/80 deny", "aux x/a y/a tcp/81 allow", "aux x/a y/a tcp/82 deny"}},
		{"MNP-09 the spec of a NetworkPolicy", []string{mnp("p", "net", "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.2.0/24]}}], ports: [{protocol: SCTP, port: 80, endPort: 81}]}], egress: [{to: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: b}}}]}]}")},
			[]string{"10.0.3.1 x/a sctp/81 allow", "10.0.2.1 x/a sctp/81 deny", "10.0.3.1 x/a tcp/81 deny", "x/a y/b udp/1 allow", "x/a y/a udp/1 deny"}},
		{"MNP-10 named ports on any network", []string{mnp("p", "aux", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}], ports: [{port: web}]}]}")}, []string{"aux x/a y/a tcp/82 allow", "aux x/a z/a tcp/83 allow", "aux x/a z/a tcp/82 deny"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := park()
			for _, p := range set(t, x, strings.Join(c.policies, "\n---\n")) {
				if len(p.Faults) > 0 {
					t.Fatal(p.Faults)
				}
			}
			want(t, x, c.want...)
			if wrong := x.Audit(); len(wrong) > 0 {
				t.Errorf("the audit found %v", wrong)
			}
		})
	}
}

func TestNP07TheNodeItself(t *testing.T) {
	x := park()
	set(t, x, np("p", "{podSelector: {}, policyTypes: [Ingress, Egress]}"))
	want(t, x, "10.0.9.1 x/a tcp/80 deny")
	x.SetNode([]netip.Addr{netip.MustParseAddr("fd00::9"), netip.MustParseAddr("::ffff:10.0.9.1")})
	x.Flush()
	want(t, x, "10.0.9.1 x/a tcp/80 allow", "x/a 10.0.9.1 icmp/0 allow", "fd00::9 x/a sctp/1 allow", "10.0.9.2 x/a tcp/80 deny")
	if a := x.Verdict("x/net", netip.MustParseAddr("10.0.9.1"), netip.MustParseAddr("10.0.1.1"), TCP, 80); !a.Ingress[0].NodeItself || len(a.Ingress[0].By) > 0 {
		t.Errorf("%+v", a)
	}
	x.SetNode(nil)
	x.Flush()
	want(t, x, "10.0.9.1 x/a tcp/80 deny")
}

func TestNP24ChangesTakeEffect(t *testing.T) {
	x := park()
	set(t, x, np("p", "{podSelector: {matchLabels: {tier: front}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}, podSelector: {matchLabels: {pod: a}}}]}]}"))
	step := func(lines ...string) {
		t.Helper()
		x.Flush()
		want(t, x, lines...)
	}
	pod := parkPod(1, "b")
	step("y/b x/a tcp/1 deny", "y/a x/c tcp/1 allow", "y/b x/c tcp/1 allow")
	pod.Labels = map[string]string{"pod": "a"}
	pod.UID = "b2"
	x.SetPod(pod)
	step("y/b x/a tcp/1 allow")
	pod.Interfaces = []Interface{{Network: "x/net", Name: "net1", IPs: []netip.Addr{netip.MustParseAddr("10.0.2.77")}}}
	x.SetPod(pod)
	step("10.0.2.77 x/a tcp/1 allow", "10.0.2.2 x/a tcp/1 deny")
	x.RemovePod("y", "b")
	step("10.0.2.77 x/a tcp/1 deny")
	x.SetNamespace(Namespace{Name: "y"})
	step("y/a x/a tcp/1 deny")
	x.SetNamespace(Namespace{Name: "z", Labels: map[string]string{"team": "blue"}})
	step("z/a x/a tcp/1 allow", "z/b x/a tcp/1 deny")
	x.RemoveNamespace("z")
	step("z/a x/a tcp/1 deny")
	own := parkPod(0, "c")
	own.Labels = map[string]string{"tier": "front"}
	x.SetPod(own)
	step("y/a x/c tcp/1 deny")
	x.RemovePolicy("NetworkPolicy", "x", "p")
	step("y/a x/c tcp/1 allow", "z/b x/a tcp/1 allow")
}

func TestNP30PodsComeIntoABlockAndGo(t *testing.T) {
	x := park()
	set(t, x, np("p", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.0.2.0/24}}], ports: [{port: web}]}]}"))
	for _, step := range []struct{ address, verdict string }{{"10.0.2.9", "allow"}, {"10.0.9.9", "deny"}, {"10.0.2.10", "allow"}} {
		pod := parkPod(1, "b")
		pod.Interfaces[0].IPs = []netip.Addr{netip.MustParseAddr(step.address)}
		x.SetPod(pod)
		x.Flush()
		want(t, x, "x/a "+step.address+" tcp/82 "+step.verdict, "x/a 10.0.2.2 tcp/82 deny", "x/a 10.0.2.1 tcp/82 allow")
	}
}

func TestNP40PodsOfTheHostNetwork(t *testing.T) {
	x := park()
	host := parkPod(1, "b")
	host.HostNetwork = true
	x.SetPod(host)
	set(t, x, np("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}], ports: [{port: 80}]}, {from: [{ipBlock: {cidr: 10.0.2.2/32}}], ports: [{port: 81}]}]}"))
	want(t, x, "y/a x/a tcp/80 allow", "10.0.2.2 x/a tcp/80 deny", "10.0.2.2 x/a tcp/81 allow")
	set(t, x, "metadata: {namespace: 'y', name: q}\nspec: "+denyIngress)
	want(t, x, "x/a 10.0.2.2 tcp/80 allow", "x/a y/a tcp/80 deny")
}

// NP-42 is for whoever enforces; for NP-43 addresses are those at the interface.
func TestNP42NP43NewConnectionsByTheAddressAtTheInterface(t *testing.T) {
	x := park()
	before := state(t, x, "x", "a", "x/net", Ingress)
	set(t, x, np("p", denyIngress))
	if after := state(t, x, "x", "a", "x/net", Ingress); before.Verdicts.Isolated || !after.Verdicts.Isolated {
		t.Errorf("%+v became %+v: a snapshot is never changed", before, after)
	}
	want(t, x, "y/a x/a tcp/1 deny")
}

func state(t *testing.T, x *Index, namespace, pod, network string, d Direction) *State {
	t.Helper()
	e := x.pods[podKey{namespace, pod}]
	for _, i := range e.Interfaces {
		if s, told := x.State(ID{namespace, pod, e.UID, network, i.Name}, d); told {
			return s
		}
	}
	t.Fatalf("pod %s/%s has no state on %s", namespace, pod, network)
	return nil
}

func TestNP44EndedPods(t *testing.T) {
	x := park()
	set(t, x, np("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}]}]}"))
	want(t, x, "10.0.2.2 x/a tcp/1 allow")
	ended := parkPod(1, "b")
	ended.Ended = true
	x.SetPod(ended)
	x.Flush()
	want(t, x, "10.0.2.2 x/a tcp/1 deny", "y/a x/a tcp/1 allow")
	// What an ended pod still has stays isolated, and what a new pod brings is isolated
	// from its first Flush on.
	own := parkPod(0, "a")
	own.Ended = true
	x.SetPod(own)
	young := parkPod(0, "b")
	young.UID = "young"
	x.SetPod(young)
	var told bool
	for _, c := range x.Flush() {
		told = told || c.ID.UID == "young" && c.ID.Network == "x/net" && c.Direction == Ingress && c.State.Verdicts.Isolated
	}
	if !told || !state(t, x, "x", "a", "x/net", Ingress).Verdicts.Isolated {
		t.Errorf("a new pod and an ended pod are not both isolated")
	}
}

func TestMNP03TwoInterfacesOnOneNetwork(t *testing.T) {
	x := park()
	pod := parkPod(0, "a")
	pod.Interfaces = append(pod.Interfaces, Interface{Network: "x/aux", Name: "net3", IPs: []netip.Addr{netip.MustParseAddr("10.1.1.99")}})
	x.SetPod(pod)
	set(t, x, mnp("p", "aux", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: a}}}]}]}"))
	want(t, x, "aux y/a x/a tcp/1 deny", "aux y/a 10.1.1.99 tcp/1 deny", "aux x/a x/b tcp/1 allow", "aux 10.1.1.99 x/b tcp/1 allow")
}

func TestMNP06NotValid(t *testing.T) {
	for spec, fault := range map[string]string{
		"{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0}}]}]}":                                               `spec.ingress[0].from[0].ipBlock.cidr is "10.0.0.0": write an address block`,
		"{ingress: [{from: [{ipBlock: {cidr: '::ffff:10.0.0.0/104'}}]}]}":                                  `ipBlock.cidr is "::ffff:10.0.0.0/104"`,
		"{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/8]}}]}]}":                       "spec.ingress[0].from[0].ipBlock.except[0] 11.0.0.0/8 is not inside cidr 10.0.0.0/8",
		"{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/7]}}]}]}":                       "except[0] 10.0.0.0/7 is not inside",
		"{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: ['fd00::/8']}}]}]}":                       "except[0] fd00::/8 is not inside",
		"{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [x]}}]}]}":                                `except[0] is "x"`,
		"{ingress: [{ports: [{port: 80, endPort: 79}]}]}":                                                  "spec.ingress[0].ports[0].endPort is 79: it is 80 (the port) to 65535",
		"{ingress: [{ports: [{port: web, endPort: 79}]}]}":                                                 `endPort is 79, and the port "web" has a name`,
		"{ingress: [{ports: [{endPort: 79}]}]}":                                                            "endPort is 79, without a port",
		"{ingress: [{ports: [{port: 0}]}]}":                                                                "port is 0: ports are 1-65535",
		"{ingress: [{ports: [{port: '80'}]}]}":                                                             `port is "80", which is neither a port's number nor a name`,
		"{ingress: [{ports: [{protocol: tcp}]}]}":                                                          `protocol is "tcp": write TCP, UDP or SCTP`,
		"{ingress: [{ports: [{protocol: ''}]}]}":                                                           `protocol is "": write TCP, UDP or SCTP`,
		"{ingress: [{from: [{}]}]}":                                                                        "spec.ingress[0].from[0] is empty",
		"{ingress: [{from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}":                            "has an ipBlock and a selector",
		"{ingress: [{from: [{podSelector: {matchExpressions: [{key: a, operator: Is}]}}]}]}":               `spec.ingress[0].from[0].podSelector: "Is" is not a valid label selector operator`,
		"{ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: a, operator: In}]}}]}]}":         "spec.ingress[0].from[0].namespaceSelector: ",
		"{podSelector: {matchExpressions: [{key: pod, operator: Is}]}}":                                    "spec.podSelector, and so it selects all pods of the namespace",
		"{policyTypes: [Ingress, ingress]}":                                                                `spec.policyTypes[1] is "ingress", and so it isolates both ways`,
		"{podSelector: {matchLabels: {pod: a}}, ingres: [{}]}":                                             `spec: unknown field "ingres": write it as that of a NetworkPolicy`,
		"{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{ipBlock: {cidr: 1, except: []}}]}]}":    "cannot unmarshal number",
		"{ingress: [{from: [{podSelector: {}}]}, {ports: [{port: 70000}]}], policyTypes: [Ingress]}":       "spec.ingress[1].ports[0].port is 70000",
		"{policyTypes: [Ingress], egress: [{to: [{ipBlock: {cidr: 1.2.3.4/33}}]}], ingress: [{from: []}]}": "spec.egress[0].to[0].ipBlock.cidr",
	} {
		x := park()
		p := set(t, x, mnp("p", "aux", spec))[0]
		if len(p.Faults) != 1 || !strings.HasPrefix(p.Faults[0], "MultiNetworkPolicy x/p: ") || !strings.Contains(p.Faults[0], fault) {
			t.Errorf("%s: %q, want %q", spec, p.Faults, fault)
		}
		want(t, x, "aux x/a x/b tcp/80 deny", "aux y/a x/a tcp/80 deny", "x/a x/b tcp/80 allow", "aux x/b y/b tcp/80 "+map[bool]string{true: "deny", false: "allow"}[p.isolates[Egress]])
		if s := state(t, x, "x", "b", "x/aux", Ingress); !slices.Equal(s.Faults, p.Faults) {
			t.Errorf("%s: the reason at the interface is %q", spec, s.Faults)
		}
	}
	// What cannot be read of the direction is both, of the networks all but those opted out.
	x := park()
	x.SetNetwork(Network{"x/net", EnforceNone})
	set(t, x, mnp("p", "aux,a/b/c", "{podSelector: {}, ingress: [{}], policyTypes: [Ingres]}"))
	want(t, x, "aux x/a y/a tcp/1 deny", "aux y/a x/a tcp/1 deny", "y/a x/a tcp/1 allow")
	x.SetNetwork(Network{"x/net", EnforceMulti})
	x.Flush()
	want(t, x, "y/a x/a tcp/1 deny")
	// A policy that is not valid takes nothing from another.
	set(t, x, mnp("q", "aux", "{podSelector: {}, ingress: [{ports: [{port: 80}]}]}"))
	want(t, x, "aux y/a x/a tcp/80 allow", "aux y/a x/a tcp/81 deny")
}

func TestMNP07ANetworkWithoutAddresses(t *testing.T) {
	x := park()
	for n, name := range []string{"a", "b"} {
		p := parkPod(0, name)
		p.Interfaces = []Interface{{Network: "x/l2", Name: "net1", MAC: fmt.Sprintf("02:00:00:00:00:0%d", n)}}
		x.SetPod(p)
	}
	set(t, x, mnp("p", "l2", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}, {from: [{ipBlock: {cidr: 192.0.2.0/24}}], ports: [{port: 80}]}]}"))
	v := state(t, x, "x", "a", "x/l2", Ingress).Verdicts
	if len(v.Peers) != 1 || !v.Allows(netip.MustParseAddr("192.0.2.7"), TCP, 80) || v.Allows(netip.MustParseAddr("192.0.2.7"), TCP, 81) {
		t.Errorf("%+v", v)
	}
}

func TestMNP08NetworksChange(t *testing.T) {
	x := park()
	set(t, x, np("p", denyIngress)+"\n---\n"+mnp("q", "aux", denyIngress))
	want(t, x, "y/a x/a tcp/1 deny", "aux y/a x/a tcp/1 deny")
	step := func(lines ...string) {
		t.Helper()
		if len(x.Flush()) == 0 {
			t.Error("nothing changed")
		}
		want(t, x, lines...)
	}
	x.SetNetwork(Network{"x/net", EnforceMulti})
	step("y/a x/a tcp/1 allow", "aux y/a x/a tcp/1 deny")
	x.SetNetwork(Network{"x/aux", EnforceNone})
	step("aux y/a x/a tcp/1 allow")
	if s := state(t, x, "x", "a", "x/aux", Ingress); !s.OptedOut || s.Verdicts.Isolated {
		t.Errorf("%+v", s)
	}
	// One that nobody knows may have opted in.
	x.RemoveNetwork("x/net")
	x.RemoveNetwork("x/aux")
	step("y/a x/a tcp/1 deny", "aux y/a x/a tcp/1 deny")
	x.SetNetwork(Network{"x/net", EnforceMulti})
	step("y/a x/a tcp/1 allow")
}

func TestNamespaceAnnotation(t *testing.T) {
	for annotation, c := range map[string]struct{ verdict, fault string }{
		"":                 {"allow", ""},
		"{}":               {"allow", ""},
		`{"ingress":{}}`:   {"allow", ""},
		`{"ingress":null}`: {"allow", ""},
		`{"ingress":{"isolation":"DefaultDeny"}}`:            {"deny", ""},
		`{"ingress":{"isolation":"Deny"}}`:                   {"deny", `annotation net.beta.kubernetes.io/network-policy of Namespace x: isolation is "Deny"`},
		`{"ingress":{"isolation":"DefaultDeny"},"egress":1}`: {"deny", `unknown field "egress"`},
		"DefaultDeny": {"deny", "invalid character"},
	} {
		x := park()
		x.SetNamespace(Namespace{Name: "x", Isolation: annotation})
		x.Flush()
		want(t, x, "y/a x/a tcp/1 "+c.verdict, "x/a y/a tcp/1 allow", "aux y/a x/a tcp/1 allow")
		if s := state(t, x, "x", "a", "x/net", Ingress); (c.fault == "") != (len(s.Faults) == 0) || c.fault != "" && !strings.Contains(s.Faults[0], c.fault) {
			t.Errorf("%s: %q, want %q", annotation, s.Faults, c.fault)
		}
		set(t, x, np("p", "{podSelector: {}, ingress: [{ports: [{port: 80}]}]}"))
		want(t, x, "y/a x/a tcp/80 allow")
		x.RemovePolicy("NetworkPolicy", "x", "p")
		x.SetNamespace(Namespace{Name: "x"})
		x.Flush()
		want(t, x, "y/a x/a tcp/1 allow")
	}
}

func TestVerdictNamesPolicyAndRule(t *testing.T) {
	x := park()
	set(t, x, strings.Join([]string{
		np("p", denyIngress),
		np("q", "{podSelector: {}, ingress: [{ports: [{port: 1}]}, {from: [{podSelector: {matchLabels: {pod: b}}}]}]}"),
		mnp("r", "net", "{podSelector: {}, ingress: [{ports: [{port: 1}, {port: web}]}]}"),
		np("e", "{podSelector: {matchLabels: {pod: b}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {pod: a}}}], ports: [{port: web}]}]}"),
	}, "\n---\n"))
	from, to := netip.MustParseAddr("10.0.1.2"), netip.MustParseAddr("10.0.1.1")
	for port, c := range map[uint16]struct {
		allowed         bool
		egress, ingress []Rule
	}{
		1:  {false, nil, []Rule{{"MultiNetworkPolicy x/r", Ingress, 0}, {"NetworkPolicy x/q", Ingress, 0}, {"NetworkPolicy x/q", Ingress, 1}}},
		81: {true, []Rule{{"NetworkPolicy x/e", Egress, 0}}, []Rule{{"MultiNetworkPolicy x/r", Ingress, 0}, {"NetworkPolicy x/q", Ingress, 1}}},
		82: {false, nil, []Rule{{"NetworkPolicy x/q", Ingress, 1}}},
	} {
		a := x.Verdict("x/net", from, to, TCP, port)
		if a.Allowed != c.allowed || a.Itself || len(a.Egress) != 1 || len(a.Ingress) != 1 || !slices.Equal(a.Egress[0].By, c.egress) || !slices.Equal(a.Ingress[0].By, c.ingress) {
			t.Errorf("port %d: %+v", port, a)
			continue
		}
		if id := a.Ingress[0].ID; id != (ID{"x", "a", "a", "x/net", "net1"}) {
			t.Errorf("the destination is %v", id)
		}
		if by := a.Ingress[0].State.Policies; !slices.Equal(by, []string{"MultiNetworkPolicy x/r", "NetworkPolicy x/p", "NetworkPolicy x/q"}) {
			t.Errorf("it is isolated by %q", by)
		}
	}
	if a := x.Verdict("x/net", to, to, TCP, 9); !a.Allowed || !a.Itself {
		t.Errorf("%+v", a)
	}
	if a := x.Verdict("x/net", netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("9.9.9.8"), TCP, 9); !a.Allowed || len(a.Egress)+len(a.Ingress) > 0 {
		t.Errorf("%+v", a)
	}
}
