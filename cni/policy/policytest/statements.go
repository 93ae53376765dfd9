package policytest

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// Statements are the names of all of them, NP those of NetworkPolicy and MNP those of
// MultiNetworkPolicy.
var Statements = []string{
	"NP-01", "NP-02", "NP-03", "NP-04", "NP-05", "NP-06", "NP-07",
	"NP-10", "NP-11", "NP-12", "NP-13", "NP-14", "NP-15", "NP-16", "NP-17",
	"NP-20", "NP-21", "NP-22", "NP-23", "NP-24", "NP-25", "NP-26", "NP-27", "NP-28",
	"NP-30", "NP-31", "NP-32", "NP-33", "NP-40", "NP-41", "NP-42", "NP-43", "NP-44",
	"MNP-01", "MNP-02", "MNP-03", "MNP-04", "MNP-05", "MNP-06", "MNP-07", "MNP-08", "MNP-09", "MNP-10",
}

// Case is an example of a statement, whose name begins its own.
type Case struct {
	Name     string
	Policies []string // YAML, of either kind
	// Want are lines like
	//
	//	x/a y/b tcp/80 allow
	//	aux x/a 10.9.9.9 icmp/0 deny
	//
	// of the network net, or of the one that comes first.
	Want []string
	// Change, if there is one, is what happens in the world then, and Then what is wanted
	// after it.
	Change func(*World)
	Then   []string
}

// World is what there is besides policies.
type World struct {
	Node       []netip.Addr
	Namespaces []corev1.Namespace
	Networks   []nadv1.NetworkAttachmentDefinition
	Pods       []corev1.Pod
}

// Park is namespaces x (team: red), y (team: blue) and z, each with pods a, b and c
// (labels pod and, but for c, tier: front). Each is on x/net, on which NetworkPolicy
// holds, as 10.0.N.M and fd00::N:M: N is 1 for x, 2 for y, 3 for z, M is 1 for a, ... All a
// and b are on x/aux too, on which only MultiNetworkPolicy holds, as 10.1.N.M and fd01::N:M.
// Each serves web at TCP 80 plus N and at UDP 80, and c serves alt at TCP 8080.
func Park() *World {
	network := func(name, policies string) nadv1.NetworkAttachmentDefinition {
		return nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: name, Annotations: map[string]string{"sluice.dev/network-policy": policies}}}
	}
	w := &World{Networks: []nadv1.NetworkAttachmentDefinition{network("net", "all"), network("aux", "multi")}}
	for n, name := range []string{"x", "y", "z"} {
		labels := map[string]string{"kubernetes.io/metadata.name": name}
		if team := []string{"red", "blue", ""}[n]; team != "" {
			labels["team"] = team
		}
		w.Namespaces = append(w.Namespaces, corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}})
		for _, pod := range []string{"a", "b", "c"} {
			w.Pods = append(w.Pods, *Pod(n, pod))
		}
	}
	return w
}

// Pod is the one of the park in its namespace number n, from 0.
func Pod(n int, name string) *corev1.Pod {
	m := int(name[0]-'a') + 1
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: []string{"x", "y", "z"}[n], Name: name, UID: types.UID(name), Labels: map[string]string{"pod": name, "tier": "front"}}}
	ports := []corev1.ContainerPort{{Name: "web", Protocol: corev1.ProtocolTCP, ContainerPort: int32(81 + n)}, {Name: "web", Protocol: corev1.ProtocolUDP, ContainerPort: 80}}
	on := func(net int) nadv1.NetworkStatus {
		return nadv1.NetworkStatus{Name: []string{"x/net", "x/aux"}[net], Interface: []string{"net1", "net2"}[net], IPs: []string{fmt.Sprintf("10.%d.%d.%d", net, n+1, m), fmt.Sprintf("fd0%d::%d:%d", net, n+1, m)}}
	}
	interfaces := []nadv1.NetworkStatus{on(0)}
	if name == "c" {
		delete(p.Labels, "tier")
		ports = append(ports, corev1.ContainerPort{Name: "alt", Protocol: corev1.ProtocolTCP, ContainerPort: 8080})
	} else {
		interfaces = append(interfaces, on(1))
	}
	p.Spec.Containers = []corev1.Container{{Name: "c", Ports: ports}}
	Attach(p, interfaces...)
	return p
}

// Attach says that these are the pod's interfaces.
func Attach(p *corev1.Pod, interfaces ...nadv1.NetworkStatus) {
	status, err := json.Marshal(interfaces)
	if err != nil {
		panic(err)
	}
	p.Annotations = map[string]string{nadv1.NetworkStatusAnnot: string(status)}
}

// Pod is one of the world's, by namespace/name.
func (w *World) Pod(name string) *corev1.Pod {
	i := slices.IndexFunc(w.Pods, func(p corev1.Pod) bool { return p.Namespace+"/"+p.Name == name })
	if i < 0 {
		panic("there is no pod " + name)
	}
	return &w.Pods[i]
}

// Read reads policies: those of Kubernetes, and MultiNetworkPolicies as JSON.
func Read(documents ...string) (policies []*networkingv1.NetworkPolicy, multi [][]byte, err error) {
	for _, one := range documents {
		if strings.Contains(one, "kind: MultiNetworkPolicy") {
			object, err := yaml.YAMLToJSON([]byte(one))
			if err != nil {
				return nil, nil, err
			}
			multi = append(multi, object)
			continue
		}
		var p networkingv1.NetworkPolicy
		if err := yaml.UnmarshalStrict([]byte(one), &p); err != nil {
			return nil, nil, err
		}
		policies = append(policies, &p)
	}
	return policies, multi, nil
}

// Probe is a connection that somebody tries.
type Probe struct {
	Network  string
	From, To netip.Addr
	Protocol uint8
	Port     uint16
	Allow    bool
}

// Probes are what a line wants in the world, between pods one for each family.
func (w *World) Probes(line string) []Probe { return Probes(line, w.addresses) }

// Probes are what a line wants, of the addresses that somebody has on a network.
func Probes(line string, addresses func(network, who string) []netip.Addr) []Probe {
	f := strings.Fields(line)
	network := "x/net"
	if len(f) == 5 {
		network, f = "x/"+f[0], f[1:]
	}
	protocol, number, _ := strings.Cut(f[2], "/")
	port, err := strconv.ParseUint(number, 10, 16)
	protocols := map[string]uint8{"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1}
	if err != nil || protocols[protocol] == 0 || f[3] != "allow" && f[3] != "deny" {
		panic(fmt.Sprintf("%q is not understood", line))
	}
	var probes []Probe
	for _, source := range addresses(network, f[0]) {
		for _, destination := range addresses(network, f[1]) {
			if source.Is4() == destination.Is4() {
				probes = append(probes, Probe{network, source, destination, protocols[protocol], uint16(port), f[3] == "allow"})
			}
		}
	}
	if len(probes) == 0 {
		panic(fmt.Sprintf("%q asks nothing", line))
	}
	return probes
}

// addresses are those of a pod on the network, or the one that is written.
func (w *World) addresses(network, who string) (all []netip.Addr) {
	if a, err := netip.ParseAddr(who); err == nil {
		return []netip.Addr{a}
	}
	var interfaces []nadv1.NetworkStatus
	if err := json.Unmarshal([]byte(w.Pod(who).Annotations[nadv1.NetworkStatusAnnot]), &interfaces); err != nil {
		panic(err)
	}
	for _, i := range interfaces {
		if i.Name == network {
			for _, ip := range i.IPs {
				all = append(all, netip.MustParseAddr(ip))
			}
			break
		}
	}
	return all
}

// NP is a NetworkPolicy of namespace x.
func NP(name, spec string) string {
	return "metadata: {namespace: x, name: " + name + "}\nspec: " + spec
}

// MNP is a MultiNetworkPolicy of namespace x.
func MNP(name, networks, spec string) string {
	return "apiVersion: k8s.cni.cncf.io/v1beta1\nkind: MultiNetworkPolicy\nmetadata: {namespace: x, name: " + name + ", annotations: {k8s.v1.cni.cncf.io/policy-for: \"" + networks + "\"}}\nspec: " + spec
}

// Specs that isolate all pods of the namespace and allow nothing.
const (
	DenyIngress = "{podSelector: {}, policyTypes: [Ingress]}"
	DenyEgress  = "{podSelector: {}, policyTypes: [Egress]}"
)

// Cases are examples of the statements.
var Cases = []Case{
	{"NP-01 no policy, everything allowed", nil, []string{"x/a x/b tcp/1 allow", "9.9.9.9 x/a udp/1 allow", "x/a 2001:db8::1 icmp/0 allow"}, nil, nil},
	{"NP-01 a policy that selects others", []string{NP("p", "{podSelector: {matchLabels: {pod: a}}}")}, []string{"x/a x/b tcp/1 allow", "y/a x/a tcp/1 deny", "y/b y/a tcp/1 allow"}, nil, nil},
	{"NP-02 isolated by a policy of the own namespace only", []string{NP("p", DenyIngress)}, []string{"y/a x/a tcp/1 deny", "x/b x/a tcp/1 deny", "x/a y/a tcp/1 allow", "y/b y/a tcp/1 allow"}, nil, nil},
	{"NP-02 egress by itself", []string{NP("p", DenyEgress)}, []string{"x/a y/a tcp/1 deny", "y/a x/a tcp/1 allow"}, nil, nil},
	{"NP-03 the union of policies and rules", []string{
		NP("p", DenyIngress),
		NP("q", "{podSelector: {}, ingress: [{ports: [{port: 80}]}, {from: [{podSelector: {matchLabels: {pod: b}}}], ports: [{port: 81}]}]}"),
		NP("r", "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}], ports: [{port: 82}]}]}"),
	}, []string{"z/a x/a tcp/80 allow", "x/b x/a tcp/81 allow", "x/c x/a tcp/81 deny", "y/c x/a tcp/82 allow", "z/c x/a tcp/82 deny", "y/c x/b tcp/82 deny", "x/b x/a tcp/83 deny"}, nil, nil},
	{"NP-04 both ends must allow", []string{NP("p", "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{ports: [{port: 80}, {port: 81}]}]}"), NP("q", "{podSelector: {matchLabels: {pod: b}}, ingress: [{ports: [{port: 81}, {port: 82}]}]}")},
		[]string{"x/a x/b tcp/80 deny", "x/a x/b tcp/81 allow", "x/a x/b tcp/82 deny", "x/c x/b tcp/82 allow", "x/a x/c tcp/80 allow"}, nil, nil},
	{"NP-05 a verdict is about who begins: the server may not begin, the client may not be begun with", []string{NP("p", "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress]}"), NP("q", "{podSelector: {matchLabels: {pod: b}}, policyTypes: [Ingress]}")},
		[]string{"x/b x/a tcp/80 allow", "x/b x/a udp/80 allow", "x/b x/a sctp/80 allow", "x/a x/b tcp/80 deny"}, nil, nil},
	{"NP-06 a pod reaches itself", []string{NP("p", DenyIngress), NP("q", DenyEgress)}, []string{"x/a x/a tcp/80 allow", "x/a x/b tcp/80 deny"}, nil, nil},

	{"NP-10 policyTypes left out, no egress", []string{NP("p", "{podSelector: {}, ingress: [{}]}")}, []string{"x/a y/a tcp/1 allow", "y/a x/a tcp/1 allow"}, nil, nil},
	{"NP-10 policyTypes left out, only egress", []string{NP("p", "{podSelector: {}, egress: [{}]}")}, []string{"x/a y/a tcp/1 allow", "y/a x/a tcp/1 deny"}, nil, nil},
	{"NP-11 egress without rules", []string{NP("p", "{podSelector: {}, policyTypes: [Egress]}")}, []string{"x/a y/a tcp/1 deny", "x/a 9.9.9.9 icmp/0 deny", "y/a x/a tcp/1 allow"}, nil, nil},
	{"NP-11 egress rules without Egress", []string{NP("p", "{podSelector: {}, policyTypes: [Ingress], egress: [{ports: [{port: 1}]}]}")}, []string{"x/a y/a tcp/2 allow", "y/a x/a tcp/1 deny"}, nil, nil},
	{"NP-12 the empty podSelector", []string{NP("p", "{podSelector: {}}")}, []string{"y/a x/a tcp/1 deny", "y/a x/b tcp/1 deny", "y/a x/c tcp/1 deny"}, nil, nil},
	{"NP-12 no podSelector", []string{NP("p", "{policyTypes: [Ingress]}")}, []string{"y/a x/a tcp/1 deny", "y/a x/c tcp/1 deny"}, nil, nil},
	{"NP-13 ingress null", []string{NP("p", "{podSelector: {}, ingress: null}")}, []string{"y/a x/a tcp/1 deny"}, nil, nil},
	{"NP-13 ingress empty", []string{NP("p", "{podSelector: {}, ingress: []}")}, []string{"y/a x/a tcp/1 deny"}, nil, nil},
	{"NP-13 ingress with an empty rule", []string{NP("p", "{podSelector: {}, ingress: [{}]}")}, []string{"y/a x/a tcp/1 allow", "9.9.9.9 x/a icmp/0 allow"}, nil, nil},
	{"NP-14 a rule without from", []string{NP("p", "{podSelector: {}, ingress: [{ports: [{port: 80}]}]}")}, []string{"z/a x/a tcp/80 allow", "9.9.9.9 x/a tcp/80 allow", "2001:db8::1 x/a tcp/80 allow", "z/a x/a tcp/81 deny"}, nil, nil},
	{"NP-14 a rule with an empty from", []string{NP("p", "{podSelector: {}, ingress: [{from: [], ports: [{port: 80}]}]}")}, []string{"9.9.9.9 x/a tcp/80 allow", "9.9.9.9 x/a tcp/81 deny"}, nil, nil},
	{"NP-15 a rule without ports", []string{NP("p", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}")}, []string{"x/b x/a tcp/0 allow", "x/b x/a udp/65535 allow", "x/b x/a sctp/7 allow", "x/b x/a icmp/0 allow", "y/b x/a icmp/0 deny"}, nil, nil},
	{"NP-15 a rule with empty ports", []string{NP("p", "{podSelector: {}, ingress: [{from: [{podSelector: {}}], ports: []}]}")}, []string{"x/b x/a udp/1 allow", "x/b x/a icmp/0 allow"}, nil, nil},
	{"NP-16 no protocol is TCP", []string{NP("p", "{podSelector: {}, ingress: [{ports: [{port: 80}]}]}")}, []string{"y/a x/a tcp/80 allow", "y/a x/a udp/80 deny", "y/a x/a sctp/80 deny", "y/a x/a icmp/80 deny"}, nil, nil},
	{"NP-17 no port is all of the protocol", []string{NP("p", "{podSelector: {}, ingress: [{ports: [{protocol: UDP}]}]}")}, []string{"y/a x/a udp/1 allow", "y/a x/a udp/65535 allow", "y/a x/a tcp/1 deny"}, nil, nil},
	{"NP-17 a protocol beside its numbered ports", []string{NP("p", "{podSelector: {}, ingress: [{ports: [{port: 80}, {protocol: TCP}, {port: 90, endPort: 95}]}]}")}, []string{"y/a x/a tcp/80 allow", "y/a x/a tcp/1 allow", "y/a x/a tcp/65535 allow"}, nil, nil},

	{"NP-20 podSelector: of the policy's namespace", []string{NP("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]}")}, []string{"x/b x/a tcp/1 allow", "y/b x/a tcp/1 deny", "x/c x/a tcp/1 deny"}, nil, nil},
	{"NP-20 namespaceSelector: all pods", []string{NP("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}]}]}")}, []string{"y/a x/a tcp/1 allow", "y/c x/a tcp/1 allow", "x/b x/a tcp/1 deny"}, nil, nil},
	{"NP-20 both in one entry are and", []string{NP("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}, podSelector: {matchLabels: {pod: b}}}]}]}")}, []string{"y/b x/a tcp/1 allow", "y/a x/a tcp/1 deny", "x/b x/a tcp/1 deny"}, nil, nil},
	{"NP-20 two entries are or", []string{NP("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}, {podSelector: {matchLabels: {pod: b}}}]}]}")}, []string{"y/b x/a tcp/1 allow", "y/a x/a tcp/1 allow", "x/b x/a tcp/1 allow", "x/c x/a tcp/1 deny", "z/b x/a tcp/1 deny"}, nil, nil},
	{"NP-21 In", []string{NP("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: pod, operator: In, values: [a, b]}]}}]}]}")}, []string{"x/b x/a tcp/1 allow", "x/c x/a tcp/1 deny"}, nil, nil},
	{"NP-21 NotIn, without the label too", []string{NP("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: tier, operator: NotIn, values: [front]}]}}]}]}")}, []string{"x/b x/a tcp/1 deny", "x/c x/a tcp/1 allow"}, nil, nil},
	{"NP-21 Exists", []string{NP("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: tier, operator: Exists}]}}]}]}")}, []string{"x/b x/a tcp/1 allow", "x/c x/a tcp/1 deny"}, nil, nil},
	{"NP-21 DoesNotExist", []string{NP("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: tier, operator: DoesNotExist}]}}]}]}")}, []string{"x/b x/a tcp/1 deny", "x/c x/a tcp/1 allow"}, nil, nil},
	{"NP-21 all requirements at once", []string{NP("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}, matchExpressions: [{key: tier, operator: DoesNotExist}]}}]}]}")}, []string{"x/b x/a tcp/1 deny", "x/c x/a tcp/1 deny"}, nil, nil},
	{"NP-21 the empty namespaceSelector", []string{NP("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}")}, []string{"z/c x/a tcp/1 allow", "x/b x/a tcp/1 allow", "9.9.9.9 x/a tcp/1 deny"}, nil, nil},
	{"NP-21 namespaces without the label", []string{NP("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: NotIn, values: [red]}]}}]}]}")}, []string{"z/c x/a tcp/1 allow", "y/c x/a tcp/1 allow", "x/b x/a tcp/1 deny"}, nil, nil},
	{"NP-21 of the pods that a policy is for", []string{NP("p", "{podSelector: {matchExpressions: [{key: tier, operator: DoesNotExist}]}}")}, []string{"y/a x/c tcp/1 deny", "y/a x/a tcp/1 allow"}, nil, nil},
	{"NP-22 kubernetes.io/metadata.name", []string{NP("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: z}}}]}]}")}, []string{"z/a x/a tcp/1 allow", "y/a x/a tcp/1 deny"}, nil, nil},
	{"NP-23 a peer that selects nobody", []string{NP("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: none}}}], ports: [{port: 80}]}]}")}, []string{"x/b x/a tcp/80 deny", "9.9.9.9 x/a tcp/80 deny"}, nil, nil},
	{"NP-25 ipBlock matches pods", []string{NP("p", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.2.0/24}}]}]}")}, []string{"10.0.2.1 x/a tcp/1 allow", "10.0.2.200 x/a tcp/1 allow", "10.0.3.1 x/a tcp/1 deny", "fd00::2:1 x/a tcp/1 deny"}, nil, nil},
	{"NP-26 except takes from its own cidr only", []string{
		NP("p", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.2.0/24]}}, {ipBlock: {cidr: 10.0.2.2/32}}], ports: [{port: 80}]}]}"),
		NP("q", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}], ports: [{port: 81}]}]}"),
	}, []string{"10.0.2.1 x/a tcp/80 deny", "10.0.2.2 x/a tcp/80 allow", "10.0.3.1 x/a tcp/80 allow", "10.0.1.255 x/a tcp/80 allow", "10.0.2.1 x/a tcp/81 allow", "10.0.3.1 x/a tcp/81 deny"}, nil, nil},
	{"NP-26 excepts of two blocks of one rule", []string{NP("p", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.2.0/24]}}, {ipBlock: {cidr: 10.0.2.0/23, except: [10.0.3.0/24]}}]}]}")}, []string{"10.0.2.1 x/a tcp/1 allow", "10.0.3.1 x/a tcp/1 allow"}, nil, nil},
	{"NP-27 blocks of both families in a rule", []string{NP("p", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: 'fd00::2:0/112', except: ['fd00::2:2/128']}}]}]}")}, []string{"9.9.9.9 x/a tcp/1 allow", "255.255.255.255 x/a tcp/1 allow", "fd00::2:1 x/a tcp/1 allow", "fd00::2:2 x/a tcp/1 deny", "fd00::3:1 x/a tcp/1 deny"}, nil, nil},
	{"NP-27 an except of all", []string{NP("p", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [0.0.0.0/0]}}]}]}")}, []string{"0.0.0.0 x/a tcp/1 deny", "255.255.255.255 x/a tcp/1 deny"}, nil, nil},
	{"NP-28 all addresses of a pod", []string{NP("p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]}")}, []string{"10.0.1.2 x/a tcp/1 allow", "fd00::1:2 x/a tcp/1 allow", "fd00::1:3 x/a tcp/1 deny"}, nil, nil},

	{"NP-30 a named port of ingress is the pod's own", []string{NP("p", "{podSelector: {}, ingress: [{ports: [{port: web}]}]}")}, []string{"y/a x/a tcp/81 allow", "y/a x/a tcp/82 deny", "y/a x/a udp/80 deny", "9.9.9.9 x/a tcp/81 allow"}, nil, nil},
	{"NP-30 a named port of egress is each destination's", []string{NP("p", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}], ports: [{port: web}]}]}")}, []string{"x/a y/a tcp/82 allow", "x/a z/a tcp/83 allow", "x/a z/a tcp/82 deny", "x/a y/a tcp/81 deny", "x/a y/a udp/80 deny"}, nil, nil},
	{"NP-30 a named port of egress to anyone means pods", []string{NP("p", "{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: web}]}]}")}, []string{"x/a y/a tcp/82 allow", "x/a z/a tcp/83 allow", "x/a 9.9.9.9 tcp/82 deny"}, nil, nil},
	{"NP-30 a named port of egress to an ipBlock means the pods in it", []string{NP("p", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.0.2.0/24}}], ports: [{port: web}, {port: 99}]}]}")}, []string{"x/a 10.0.2.1 tcp/82 allow", "x/a 10.0.2.99 tcp/82 deny", "x/a 10.0.2.99 tcp/99 allow", "x/a 10.0.3.1 tcp/83 deny"}, nil, nil},
	{"NP-30 name and protocol", []string{NP("p", "{podSelector: {}, ingress: [{ports: [{port: web, protocol: UDP}]}]}")}, []string{"y/a x/a udp/80 allow", "y/a x/a tcp/81 deny"}, nil, nil},
	{"NP-31 a named port that nobody serves", []string{NP("p", "{podSelector: {}, ingress: [{ports: [{port: none}, {port: web, protocol: SCTP}, {port: 99}]}]}")}, []string{"y/a x/a tcp/99 allow", "y/a x/a tcp/81 deny", "y/a x/a sctp/80 deny"}, nil, nil},
	{"NP-31 a named port that some serve", []string{NP("p", "{podSelector: {}, ingress: [{ports: [{port: alt}]}]}")}, []string{"y/a x/c tcp/8080 allow", "y/a x/a tcp/8080 deny"}, nil, nil},
	{"NP-32 endPort", []string{NP("p", "{podSelector: {}, ingress: [{ports: [{port: 80, endPort: 82}, {port: 90, endPort: 90}]}]}")}, []string{"y/a x/a tcp/79 deny", "y/a x/a tcp/80 allow", "y/a x/a tcp/82 allow", "y/a x/a tcp/83 deny", "y/a x/a tcp/90 allow", "y/a x/a tcp/91 deny"}, nil, nil},
	{"NP-33 SCTP", []string{NP("p", "{podSelector: {}, ingress: [{ports: [{protocol: SCTP, port: 80}]}]}")}, []string{"y/a x/a sctp/80 allow", "y/a x/a tcp/80 deny", "y/a x/a sctp/81 deny"}, nil, nil},
	{"NP-41 other protocols only by rules without ports", []string{NP("p", "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: TCP}, {protocol: UDP}, {protocol: SCTP}]}]}"), NP("q", "{podSelector: {matchLabels: {pod: b}}, ingress: [{}]}")}, []string{"y/a x/a icmp/0 deny", "y/a x/b icmp/0 allow"}, nil, nil},

	{"MNP-01 a name without namespace, and blanks", []string{MNP("p", " net , x/aux ", DenyIngress)}, []string{"y/a x/a tcp/1 deny", "aux y/a x/a tcp/1 deny"}, nil, nil},
	{"MNP-01 a network of another namespace", []string{strings.ReplaceAll(MNP("p", "x/net, aux", DenyIngress), "namespace: x", `namespace: "y"`)}, []string{"x/a y/a tcp/1 deny", "aux x/a y/a tcp/1 allow", "y/a x/a tcp/1 allow"}, nil, nil},
	{"MNP-02 no networks", []string{MNP("p", "", DenyIngress), MNP("q", " , ", DenyIngress)}, []string{"y/a x/a tcp/1 allow", "aux y/a x/a tcp/1 allow"}, nil, nil},
	{"MNP-03 only interfaces on the network", []string{MNP("p", "aux", DenyIngress)}, []string{"y/a x/a tcp/1 allow", "aux y/a x/a tcp/1 deny"}, nil, nil},
	{"MNP-04 peers are those on the network", []string{MNP("p", "net,aux", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}")}, []string{"10.0.2.1 x/a tcp/1 allow", "10.1.2.1 x/a tcp/1 deny", "aux 10.1.2.1 x/a tcp/1 allow", "aux 10.0.2.1 x/a tcp/1 deny", "aux 10.0.2.3 x/a tcp/1 deny", "aux 10.1.2.3 x/a tcp/1 deny"}, nil, nil},
	{"MNP-05 NetworkPolicy only where the network opts in", []string{NP("p", DenyIngress)}, []string{"y/a x/a tcp/1 deny", "aux y/a x/a tcp/1 allow"}, nil, nil},
	{"MNP-06 defaults are those of NetworkPolicy", []string{MNP("p", "aux", "{podSelector: {}, ingress: [{ports: [{port: 80}]}], egress: [{ports: [{port: 80, endPort: 81}]}]}")}, []string{"aux y/a x/a tcp/80 allow", "aux y/a x/a udp/80 deny", "aux x/a y/a tcp/81 allow", "aux x/a y/a tcp/82 deny"}, nil, nil},
	{"MNP-09 the spec of a NetworkPolicy", []string{MNP("p", "net", "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.2.0/24]}}], ports: [{protocol: SCTP, port: 80, endPort: 81}]}], egress: [{to: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: b}}}]}]}")},
		[]string{"10.0.3.1 x/a sctp/81 allow", "10.0.2.1 x/a sctp/81 deny", "10.0.3.1 x/a tcp/81 deny", "x/a y/b udp/1 allow", "x/a y/a udp/1 deny"}, nil, nil},
	{"MNP-10 named ports on any network", []string{MNP("p", "aux", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}], ports: [{port: web}]}]}")}, []string{"aux x/a y/a tcp/82 allow", "aux x/a z/a tcp/83 allow", "aux x/a z/a tcp/82 deny"}, nil, nil},
	{
		"NP-07 the node itself", []string{NP("p", "{podSelector: {}, policyTypes: [Ingress, Egress]}")}, []string{"10.0.9.1 x/a tcp/80 deny"},
		func(w *World) { w.Node = []netip.Addr{netip.MustParseAddr("fd00::9"), netip.MustParseAddr("10.0.9.1")} },
		[]string{"10.0.9.1 x/a tcp/80 allow", "x/a 10.0.9.1 icmp/0 allow", "fd00::9 x/a sctp/1 allow", "10.0.9.2 x/a tcp/80 deny"},
	},
	{
		"NP-24 labels of a pod", []string{NP("p", "{podSelector: {matchLabels: {tier: front}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}, podSelector: {matchLabels: {pod: a}}}]}]}")}, []string{"y/b x/a tcp/1 deny", "y/a x/a tcp/1 allow", "y/b x/c tcp/1 allow"},
		func(w *World) {
			w.Pod("y/b").Labels["pod"] = "a"
			w.Pod("y/a").Labels = nil
			w.Pod("x/c").Labels["tier"] = "front"
		},
		[]string{"y/b x/a tcp/1 allow", "y/a x/a tcp/1 deny", "y/a x/c tcp/1 deny", "y/b x/c tcp/1 allow"},
	},
	{
		"NP-24 labels of namespaces, and addresses", []string{NP("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}]}]}")}, []string{"y/a x/a tcp/1 allow", "z/a x/a tcp/1 deny"},
		func(w *World) {
			w.Namespaces[1].Labels, w.Namespaces[2].Labels = nil, map[string]string{"team": "blue"}
			Attach(w.Pod("z/c"), nadv1.NetworkStatus{Name: "x/net", Interface: "net1", IPs: []string{"10.0.3.77"}})
		},
		[]string{"y/a x/a tcp/1 deny", "z/a x/a tcp/1 allow", "10.0.3.77 x/a tcp/1 allow", "10.0.3.3 x/a tcp/1 deny"},
	},
	{
		"NP-40 pods of the host network", []string{NP("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}], ports: [{port: 80}]}, {from: [{ipBlock: {cidr: 10.0.2.2/32}}], ports: [{port: 81}]}]}")}, []string{"10.0.2.2 x/a tcp/80 allow"},
		func(w *World) { w.Pod("y/b").Spec.HostNetwork = true },
		[]string{"y/a x/a tcp/80 allow", "10.0.2.2 x/a tcp/80 deny", "10.0.2.2 x/a tcp/81 allow"},
	},
	{
		"NP-44 an ended pod's address is no peer", []string{NP("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}]}]}")}, []string{"10.0.2.2 x/a tcp/1 allow"},
		func(w *World) { w.Pod("y/b").Status.Phase = corev1.PodSucceeded },
		[]string{"10.0.2.2 x/a tcp/1 deny", "y/a x/a tcp/1 allow"},
	},
	{
		"MNP-03 two interfaces on one network", []string{MNP("p", "aux", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {pod: a}}}]}]}")}, []string{"aux y/a x/a tcp/1 deny", "aux x/a x/b tcp/1 allow", "y/a x/a tcp/1 allow"},
		func(w *World) {
			Attach(w.Pod("x/a"), nadv1.NetworkStatus{Name: "x/aux", Interface: "net2", IPs: []string{"10.1.1.1"}}, nadv1.NetworkStatus{Name: "x/aux", Interface: "net3", IPs: []string{"10.1.1.99"}})
		},
		[]string{"aux 10.1.2.1 x/a tcp/1 deny", "aux 10.1.2.1 10.1.1.99 tcp/1 deny", "aux x/a x/b tcp/1 allow", "aux 10.1.1.99 x/b tcp/1 allow"},
	},
	{
		"MNP-06 a policy that is not valid allows nothing", []string{MNP("p", "aux", "{ingress: [{from: [{podSelector: {}}]}, {ports: [{port: 80, endPort: 79}]}]}")}, []string{"aux x/b x/a tcp/80 deny", "aux y/a x/a tcp/80 deny", "y/a x/a tcp/80 allow", "aux x/a y/a tcp/80 allow"},
		nil, nil,
	},
	{
		"MNP-08 a network that has changed", []string{NP("p", DenyIngress), MNP("q", "aux", DenyIngress)}, []string{"y/a x/a tcp/1 deny", "aux y/a x/a tcp/1 deny"},
		func(w *World) {
			w.Networks[0].Annotations, w.Networks[1].Annotations = nil, map[string]string{"sluice.dev/network-policy": "none"}
		},
		[]string{"y/a x/a tcp/1 allow", "aux y/a x/a tcp/1 allow"},
	},
	{
		"MNP-08 a network that is gone", []string{NP("p", DenyIngress), MNP("q", "aux", DenyIngress)}, []string{"y/a x/a tcp/1 deny"},
		func(w *World) { w.Networks = nil },
		[]string{"y/a x/a tcp/1 deny", "aux y/a x/a tcp/1 deny", "aux x/a y/a tcp/1 allow"},
	},
}
