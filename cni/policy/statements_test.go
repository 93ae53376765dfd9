package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-network/sluice/cni/policy/policytest"
)

// park is that of policytest; all its pods are own ones.
func park() *Index { return indexOf(policytest.Park()) }

func indexOf(w *policytest.World) *Index {
	x := NewIndex(func(p Pod) bool { return p.Node != "there" })
	x.SetNode(w.Node)
	for i := range w.Networks {
		x.SetNetwork(must(ReadNetwork(&w.Networks[i])))
	}
	for i := range w.Namespaces {
		x.SetNamespace(ReadNamespace(&w.Namespaces[i]))
	}
	for i := range w.Pods {
		x.SetPod(must(ReadPod(&w.Pods[i])))
	}
	x.Flush()
	return x
}

func parkPod(n int, name string) Pod { return must(ReadPod(policytest.Pod(n, name))) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// set tells of the policies in the YAML, of either kind.
func set(t *testing.T, x *Index, text string) []*Policy {
	t.Helper()
	var documents []string
	for one := range strings.SplitSeq(text, "\n---\n") {
		if strings.TrimSpace(one) != "" {
			documents = append(documents, one)
		}
	}
	plain, multi, err := policytest.Read(documents...)
	if err != nil {
		t.Fatal(err)
	}
	var policies []*Policy
	for _, p := range plain {
		policies = append(policies, ReadNetworkPolicy(p))
	}
	for _, object := range multi {
		policies = append(policies, must(ReadMultiNetworkPolicy(object)))
	}
	for _, p := range policies {
		x.SetPolicy(p)
	}
	x.Flush()
	return policies
}

var np, mnp = policytest.NP, policytest.MNP

// want checks lines like those of policytest.Case, of the pods as the index has them.
func want(t *testing.T, x *Index, lines ...string) {
	t.Helper()
	for _, line := range lines {
		for _, p := range policytest.Probes(line, func(network, who string) []netip.Addr { return addrsOf(t, x, network, who) }) {
			if a := x.Verdict(p.Network, p.From, p.To, p.Protocol, p.Port); a.Allowed != p.Allow {
				t.Errorf("%s (%s to %s): %+v", line, p.From, p.To, a)
			}
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

const denyIngress, denyEgress = policytest.DenyIngress, policytest.DenyEgress

func TestStatements(t *testing.T) {
	covered := map[string]bool{}
	for _, c := range policytest.Cases {
		statement, _, _ := strings.Cut(c.Name, " ")
		covered[statement] = true
		t.Run(c.Name, func(t *testing.T) {
			world := policytest.Park()
			for _, lines := range [][]string{c.Want, c.Then} {
				x := indexOf(world)
				for _, p := range set(t, x, strings.Join(c.Policies, "\n---\n")) {
					if valid := statement != "MNP-06" || !strings.Contains(c.Name, "not valid"); valid != (len(p.Faults) == 0) {
						t.Fatal(p.Faults)
					}
				}
				want(t, x, lines...)
				if wrong := audit(x); len(wrong) > 0 {
					t.Errorf("the audit found %v", wrong)
				}
				if c.Change == nil {
					break
				}
				c.Change(world)
			}
		})
	}
	for statement, test := range map[string]func(*testing.T){
		"NP-42": TestNP42NP43NewConnectionsByTheAddressAtTheInterface, "NP-43": TestNP42NP43NewConnectionsByTheAddressAtTheInterface,
		"MNP-07": TestMNP07ANetworkWithoutAddresses,
	} {
		covered[statement] = test != nil
	}
	for _, s := range policytest.Statements {
		if !covered[s] {
			t.Errorf("%s has no test", s)
		}
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
	x.SetNetwork(Network{Name: "x/net", Enforcement: EnforceNone})
	set(t, x, mnp("p", "aux,a/b/c", "{podSelector: {}, ingress: [{}], policyTypes: [Ingres]}"))
	want(t, x, "aux x/a y/a tcp/1 deny", "aux y/a x/a tcp/1 deny", "y/a x/a tcp/1 allow")
	x.SetNetwork(Network{Name: "x/net", Enforcement: EnforceMulti})
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
	x.SetNetwork(Network{Name: "x/net", Enforcement: EnforceMulti})
	step("y/a x/a tcp/1 allow", "aux y/a x/a tcp/1 deny")
	x.SetNetwork(Network{Name: "x/aux", Enforcement: EnforceNone})
	step("aux y/a x/a tcp/1 allow")
	if s := state(t, x, "x", "a", "x/aux", Ingress); !s.OptedOut || s.Verdicts.Isolated {
		t.Errorf("%+v", s)
	}
	// One that nobody knows may have opted in.
	x.RemoveNetwork("x/net")
	x.RemoveNetwork("x/aux")
	step("y/a x/a tcp/1 deny", "aux y/a x/a tcp/1 deny")
	x.SetNetwork(Network{Name: "x/net", Enforcement: EnforceMulti})
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
		if by := a.Ingress[0].State.Verdicts.Policies; !slices.Equal(by, []string{"MultiNetworkPolicy x/r", "NetworkPolicy x/p", "NetworkPolicy x/q"}) {
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
