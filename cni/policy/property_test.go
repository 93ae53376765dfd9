package policy

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"
)

var (
	someNamespaces = []string{"a", "b", "c"}
	someNetworks   = []string{"a/one", "b/two"}
	someBlocks     = []string{"0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/29", "10.0.0.4/30", "10.0.0.5/32", "255.255.255.255/32", "128.0.0.0/1", "::/0", "fd00::/125", "fd00::4/126", "fd00::5/128", "8000::/1", "::/128"}
	someNames      = []string{"web", "dns"}
	someProtocols  = []corev1.Protocol{"TCP", "UDP", "SCTP"}
)

func one[T any](t *rapid.T, values ...T) T { return rapid.SampledFrom(values).Draw(t, "") }
func chance(t *rapid.T, in int) bool       { return rapid.IntRange(1, in).Draw(t, "") == 1 }
func many[T any](t *rapid.T, most int, make func(*rapid.T) T) (all []T) {
	for range rapid.IntRange(0, most).Draw(t, "") {
		all = append(all, make(t))
	}
	return all
}

func drawLabels(t *rapid.T) map[string]string {
	labels := map[string]string{}
	for _, k := range []string{"k", "l"} {
		if v := one(t, "", "1", "2", "3"); v != "" {
			labels[k] = v
		}
	}
	return labels
}

func drawSelector(t *rapid.T) *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	switch rapid.IntRange(0, 4).Draw(t, "") {
	case 0:
		s.MatchLabels = drawLabels(t)
	case 1, 2:
		s.MatchExpressions = many(t, 2, func(t *rapid.T) metav1.LabelSelectorRequirement {
			r := metav1.LabelSelectorRequirement{Key: one(t, "k", "l"), Operator: one[metav1.LabelSelectorOperator](t, "In", "NotIn", "Exists", "DoesNotExist")}
			if r.Operator == "In" || r.Operator == "NotIn" {
				r.Values = append(many(t, 2, func(t *rapid.T) string { return one(t, "1", "2", "3") }), "1")
			}
			return r
		})
	case 3:
		s.MatchLabels = map[string]string{"k": one(t, "1", "2")}
	}
	return s
}

func drawPort(t *rapid.T) networkingv1.NetworkPolicyPort {
	var p networkingv1.NetworkPolicyPort
	if !chance(t, 3) {
		protocol := one(t, someProtocols...)
		p.Protocol = &protocol
	}
	switch rapid.IntRange(0, 5).Draw(t, "") {
	case 0:
	case 1, 2:
		name := intstr.FromString(one(t, someNames...))
		p.Port = &name
	default:
		port := intstr.FromInt32(one[int32](t, 1, 79, 80, 81, 82, 65535))
		p.Port = &port
		if chance(t, 3) {
			end := min(65535, port.IntVal+one[int32](t, 0, 1, 3, 65535))
			p.EndPort = &end
		}
	}
	return p
}

func drawPeer(t *rapid.T) networkingv1.NetworkPolicyPeer {
	var p networkingv1.NetworkPolicyPeer
	switch rapid.IntRange(0, 3).Draw(t, "") {
	case 0:
		p.PodSelector = drawSelector(t)
	case 1:
		p.NamespaceSelector = drawSelector(t)
	case 2:
		p.PodSelector, p.NamespaceSelector = drawSelector(t), drawSelector(t)
	default:
		cidr := one(t, someBlocks...)
		var inside []string
		for _, b := range someBlocks {
			if outer, inner := netip.MustParsePrefix(cidr), netip.MustParsePrefix(b); outer.Bits() <= inner.Bits() && outer.Overlaps(inner) {
				inside = append(inside, b)
			}
		}
		p.IPBlock = &networkingv1.IPBlock{CIDR: cidr, Except: many(t, 2, func(t *rapid.T) string { return one(t, inside...) })}
	}
	return p
}

func drawPolicy(t *rapid.T) rawPolicy {
	p := rawPolicy{multi: rapid.Bool().Draw(t, ""), namespace: one(t, someNamespaces...), name: one(t, "p", "q", "r"), annotations: map[string]string{}}
	p.spec.PodSelector = *drawSelector(t)
	p.spec.PolicyTypes = one(t, nil, []networkingv1.PolicyType{"Ingress"}, []networkingv1.PolicyType{"Egress"}, []networkingv1.PolicyType{"Ingress", "Egress"})
	p.spec.Ingress = many(t, 2, func(t *rapid.T) networkingv1.NetworkPolicyIngressRule {
		return networkingv1.NetworkPolicyIngressRule{Ports: many(t, 2, drawPort), From: many(t, 3, drawPeer)}
	})
	p.spec.Egress = many(t, 2, func(t *rapid.T) networkingv1.NetworkPolicyEgressRule {
		return networkingv1.NetworkPolicyEgressRule{Ports: many(t, 2, drawPort), To: many(t, 3, drawPeer)}
	})
	if p.multi {
		p.annotations["k8s.v1.cni.cncf.io/policy-for"] = one(t, "a/one", "one", "two", "b/two,a/one", " a/one , b/two", "", "b/one")
	}
	if chance(t, 12) {
		p.spoil(t)
	}
	return p
}

// spoil makes a valid policy one that is not.
func (p *rawPolicy) spoil(t *rapid.T) {
	p.invalid = true
	bad := intstr.FromInt32(one[int32](t, -1, 0, 65536))
	end, protocol := int32(1), corev1.Protocol("ICMP")
	port := intstr.FromInt32(2)
	inRule := func(r networkingv1.NetworkPolicyEgressRule) { p.spec.Egress = append(p.spec.Egress, r) }
	switch rapid.IntRange(0, 8).Draw(t, "") {
	case 0:
		p.anyPod = true
		p.spec.PodSelector.MatchExpressions = append(p.spec.PodSelector.MatchExpressions, metav1.LabelSelectorRequirement{Key: "k", Operator: "Is"})
	case 1:
		p.bothWays = true
		p.spec.PolicyTypes = []networkingv1.PolicyType{"ingress"}
	case 2:
		if p.multi {
			p.anyNetwork = true
			p.annotations["k8s.v1.cni.cncf.io/policy-for"] += ",a/one/two"
		} else {
			p.bothWays = true
			p.spec.PolicyTypes = append(slices.Clone(p.spec.PolicyTypes), "")
		}
	case 3:
		inRule(networkingv1.NetworkPolicyEgressRule{Ports: []networkingv1.NetworkPolicyPort{{Port: &bad}}})
	case 4:
		inRule(networkingv1.NetworkPolicyEgressRule{Ports: []networkingv1.NetworkPolicyPort{{Port: &port, EndPort: &end}}})
	case 5:
		inRule(networkingv1.NetworkPolicyEgressRule{Ports: []networkingv1.NetworkPolicyPort{{Protocol: &protocol}}})
	case 6:
		inRule(networkingv1.NetworkPolicyEgressRule{To: []networkingv1.NetworkPolicyPeer{{}}})
	case 7:
		inRule(networkingv1.NetworkPolicyEgressRule{To: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/8", Except: []string{"11.0.0.0/9"}}}}})
	case 8:
		inRule(networkingv1.NetworkPolicyEgressRule{To: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}, IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/8"}}}})
	}
}

func drawPod(t *rapid.T) corev1.Pod {
	pod := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: one(t, someNamespaces...), Name: one(t, "x", "y", "z"), UID: types.UID(one(t, "u", "u", "u", "v")), Labels: drawLabels(t), Annotations: map[string]string{}}}
	pod.Spec.NodeName = one(t, "here", "here", "there")
	pod.Spec.HostNetwork = chance(t, 12)
	pod.Status.Phase = one[corev1.PodPhase](t, "Running", "Running", "Running", "Running", "Pending", "Succeeded", "Failed")
	container := func(t *rapid.T) corev1.Container {
		always := corev1.ContainerRestartPolicyAlways
		c := corev1.Container{RestartPolicy: one(t, nil, &always)}
		c.Ports = many(t, 2, func(t *rapid.T) corev1.ContainerPort {
			return corev1.ContainerPort{Name: one(t, someNames...), ContainerPort: one[int32](t, 80, 81, 443), Protocol: one[corev1.Protocol](t, "", "TCP", "UDP", "SCTP")}
		})
		return c
	}
	pod.Spec.Containers, pod.Spec.InitContainers = many(t, 2, container), many(t, 1, container)
	var status []map[string]any
	for n := range rapid.IntRange(0, 3).Draw(t, "") {
		status = append(status, map[string]any{"name": one(t, someNetworks...), "interface": fmt.Sprintf("net%d", n+1), "mac": "02:00:00:00:00:01", "ips": many(t, 2, func(t *rapid.T) string {
			return one(t, "10.0.0.", "fd00::") + one(t, "1", "2", "3", "4", "5", "6", "7", "8")
		})})
	}
	if len(status) > 0 {
		text, _ := json.Marshal(status)
		pod.Annotations["k8s.v1.cni.cncf.io/network-status"] = string(text)
	}
	return pod
}

func here(p Pod) bool { return p.Node == "here" }

// change adds, changes or removes one object of the world, and tells the index.
func (w *world) change(t *rapid.T, x *Index) {
	remove := chance(t, 4)
	switch rapid.IntRange(0, 9).Draw(t, "") {
	case 0:
		n := corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: one(t, someNamespaces...), Labels: drawLabels(t)}}
		if chance(t, 4) {
			n.Annotations = map[string]string{"net.beta.kubernetes.io/network-policy": one(t, `{"ingress":{"isolation":"DefaultDeny"}}`, `{"ingress":`, `{"egress":{}}`)}
		}
		if remove {
			delete(w.namespaces, n.Name)
			x.RemoveNamespace(n.Name)
			return
		}
		w.namespaces[n.Name] = n
		x.SetNamespace(ReadNamespace(&n))
	case 1:
		name := one(t, someNetworks...)
		nad := nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Namespace: name[:1], Name: name[2:], Annotations: map[string]string{"sluice.dev/network-policy": one(t, "all", "all", "multi", "", "none")}}}
		if remove {
			delete(w.networks, name)
			x.RemoveNetwork(name)
			return
		}
		w.networks[name] = nad
		n, err := ReadNetwork(&nad)
		if err != nil {
			t.Fatal(err)
		}
		x.SetNetwork(n)
	case 2:
		w.node = many(t, 1, func(t *rapid.T) netip.Addr { return netip.MustParseAddr(one(t, "10.0.0.8", "fd00::8")) })
		x.SetNode(w.node)
	case 3, 4, 5:
		p := drawPolicy(t)
		if remove {
			delete(w.policies, p.key())
			x.RemovePolicy(p.read().Kind, p.namespace, p.name)
			return
		}
		w.policies[p.key()] = p
		read := p.read()
		if (len(read.Faults) > 0) != p.invalid {
			t.Fatalf("%+v has the faults %q", p, read.Faults)
		}
		x.SetPolicy(read)
	default:
		pod := drawPod(t)
		key := pod.Namespace + "/" + pod.Name
		if remove {
			delete(w.pods, key)
			delete(w.interfaces, key)
			x.RemovePod(pod.Namespace, pod.Name)
			return
		}
		w.pods[key], w.interfaces[key] = pod, rawInterfaces(&pod)
		p, err := ReadPod(&pod)
		if err != nil {
			t.Fatal(err)
		}
		x.SetPod(p)
	}
}

func newWorld() *world {
	return &world{namespaces: map[string]corev1.Namespace{}, pods: map[string]corev1.Pod{}, interfaces: map[string][]rawInterface{}, networks: map[string]nadv1.NetworkAttachmentDefinition{}, policies: map[string]rawPolicy{}}
}

var probes = func() (addrs []netip.Addr) {
	for _, text := range []string{"0.0.0.0", "10.0.0.0", "10.0.0.9", "10.255.255.255", "11.0.0.0", "127.255.255.255", "128.0.0.0", "255.255.255.254", "255.255.255.255", "::", "::1", "fd00::", "fd00::9", "7fff::", "8000::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"} {
		addrs = append(addrs, netip.MustParseAddr(text))
	}
	for i := range 8 {
		addrs = append(addrs, netip.MustParseAddr(fmt.Sprintf("10.0.0.%d", i+1)), netip.MustParseAddr(fmt.Sprintf("fd00::%d", i+1)))
	}
	return addrs
}()

// compare judges packets at all interfaces, by the index and by the world.
func (w *world) compare(t *rapid.T, x *Index) {
	seen := 0
	for _, pod := range w.pods {
		if pod.Spec.HostNetwork || pod.Spec.NodeName != "here" {
			continue
		}
		for _, i := range w.interfaces[pod.Namespace+"/"+pod.Name] {
			id := ID{pod.Namespace, pod.Name, string(pod.UID), i.network, i.name}
			for d := range 2 {
				state, told := x.State(id, Direction(d))
				if !told {
					t.Fatalf("%v is not known", id)
				}
				seen++
				wantCanonical(t, state.Verdicts)
				if v := state.Verdicts; v.Isolated != (len(v.Policies) > 0) || !slices.IsSorted(v.Policies) {
					t.Fatalf("%v %v is isolated %v by %q", id, Direction(d), v.Isolated, v.Policies)
				}
				if held := d == int(Egress) && !state.Verdicts.Isolated && w.policed(i.network); state.Held != held {
					t.Fatalf("%v %v is held %v, want %v\n%s", id, Direction(d), state.Held, held, w)
				}
				for n, peer := range probes {
					for protocol, number := range map[corev1.Protocol]uint8{"TCP": TCP, "UDP": UDP, "SCTP": SCTP, "ICMP": 1} {
						ports := []int32{80, 81, 443, 1, 82, 85, 65535, 0, 79}
						for _, port := range []int32{ports[n%3], ports[n%len(ports)]} {
							want, by := w.allowed(&pod, i.network, d == int(Egress), peer, protocol, port)
							got := state.Verdicts.Allows(peer, number, uint16(port))
							if got != want {
								t.Fatalf("%v %v with %s %s/%d: %v, want %v\n%s", id, Direction(d), peer, protocol, port, got, want, w)
							}
							if shares := sharers(state.Verdicts, peer, number, uint16(port)); !slices.Equal(shares, by) {
								t.Fatalf("%v %v with %s %s/%d: shares of %q, want %q\n%s", id, Direction(d), peer, protocol, port, shares, by, w)
							}
							if p := x.sides[id][d].profile; p != nil {
								var said []string
								for _, r := range x.by(p, peer, number, uint16(port)) {
									said = append(said, r.Policy)
								}
								if said = slices.Compact(said); !slices.Equal(said, by) {
									t.Fatalf("%v %v with %s %s/%d: said to be allowed by %q, want %q\n%s", id, Direction(d), peer, protocol, port, said, by, w)
								}
							}
						}
					}
				}
			}
		}
	}
	if seen != 2*len(x.sides) {
		t.Fatalf("%d sides are known, want %d", 2*len(x.sides), seen)
	}
}

// sharers are the policies whose share of the verdicts has the cell.
func sharers(v *Verdicts, peer netip.Addr, protocol uint8, port uint16) (all []string) {
	i, found := find(v.Peers, peer)
	if !found {
		return nil
	}
	for _, s := range v.Peers[i].Ports.By {
		if s.Ports.allow(protocol, port) {
			all = append(all, s.Policy)
		}
	}
	return all
}

func (w *world) String() string {
	text, err := json.MarshalIndent([]any{w.namespaces, w.networks, slices.Collect(maps.Values(w.policies)), w.node}, "", " ")
	for _, p := range w.pods {
		text = fmt.Appendf(text, "\n%s/%s %v %v", p.Namespace, p.Name, p.Labels, p.Annotations)
	}
	return string(text) + fmt.Sprint(err)
}

// wantCanonical holds what Verdicts promises of its form.
func wantCanonical(t interface{ Fatalf(string, ...any) }, v *Verdicts) {
	if !v.Isolated && len(v.Peers) > 0 {
		t.Fatalf("%v is not isolated and has peers", v)
	}
	var sets []*Ports
	for i, r := range v.Peers {
		if r.First.Is4() != r.Last.Is4() || r.Last.Less(r.First) || r.Ports.empty() {
			t.Fatalf("%v is no range", r)
		}
		if i > 0 {
			before := v.Peers[i-1]
			if !before.Last.Less(r.First) || before.Last.Next() == r.First && before.Ports == r.Ports {
				t.Fatalf("%v and %v overlap, or are one", before, r)
			}
		}
		if slices.Contains(sets, r.Ports) {
			continue
		}
		for _, s := range sets {
			if s.equal(r.Ports) {
				t.Fatalf("%v is there twice", r.Ports)
			}
		}
		sets = append(sets, r.Ports)
		shares := []*Ports{r.Ports}
		for j, s := range r.Ports.By {
			if !slices.Contains(v.Policies, s.Policy) || j > 0 && s.Policy <= r.Ports.By[j-1].Policy || s.Ports.empty() || s.Ports.By != nil {
				t.Fatalf("%v of %v is no share", s, r.Ports)
			}
			shares = append(shares, s.Ports)
		}
		for _, set := range shares {
			for _, list := range [][]PortRange{set.TCP, set.UDP, set.SCTP} {
				for j, p := range list {
					if set.All || p.Last < p.First || j > 0 && int(list[j-1].Last)+1 >= int(p.First) {
						t.Fatalf("%v is not canonical", set)
					}
				}
			}
		}
	}
}

// rounds is how often a property is tried, in hundreds: SLUICE_POLICY_SETS over 100.
func rounds(t *testing.T, sets int) int {
	n, err := strconv.Atoi(cmp.Or(os.Getenv("SLUICE_POLICY_SETS"), strconv.Itoa(sets)))
	if err != nil || n < 100 {
		t.Fatalf("SLUICE_POLICY_SETS=%q: write a number from 100 on", os.Getenv("SLUICE_POLICY_SETS"))
	}
	return n / 100
}

func TestVerdictsAreThoseOfTheSpecification(t *testing.T) {
	for range rounds(t, 3000) {
		rapid.Check(t, func(t *rapid.T) {
			w, x := newWorld(), NewIndex(here)
			for range rapid.IntRange(10, 30).Draw(t, "objects") {
				w.change(t, x)
			}
			x.Flush()
			w.compare(t, x)
		})
	}
}

func TestEventsLeadWhereAFreshIndexIs(t *testing.T) {
	for range rounds(t, 500) {
		rapid.Check(t, func(t *rapid.T) {
			w, x := newWorld(), NewIndex(here)
			type side struct {
				ID
				Direction
			}
			told := map[side]*State{}
			for range rapid.IntRange(1, 12).Draw(t, "flushes") {
				for range rapid.IntRange(1, 6).Draw(t, "events") {
					w.change(t, x)
				}
				for _, c := range x.Flush() {
					if told[side{c.ID, c.Direction}].equal(c.State) {
						t.Fatalf("%v did not change", c)
					}
					if told[side{c.ID, c.Direction}] = c.State; c.State == nil {
						delete(told, side{c.ID, c.Direction})
					}
				}
				if wrong := audit(x); len(wrong) > 0 {
					t.Fatalf("the audit found %v\n%s", wrong, w)
				}
				for s, state := range told {
					if now, _ := x.State(s.ID, s.Direction); now != state {
						t.Fatalf("%v is not as Flush told it", s)
					}
				}
				if len(told) != 2*len(x.sides) {
					t.Fatalf("Flush told of %d sides, there are %d", len(told), 2*len(x.sides))
				}
			}
			w.compare(t, x)
			w.clear(x)
			if left := len(x.pods) + len(x.namespaces) + len(x.scopes) + len(x.labelled) + len(x.owners) + len(x.profiles) + len(x.sides) + len(x.selecting.byLabel) + len(x.selecting.rest); left > 0 {
				t.Fatalf("%d things are left when nothing is there: %+v", left, x)
			}
		})
	}
}

// clear removes all.
func (w *world) clear(x *Index) {
	for _, p := range w.pods {
		x.RemovePod(p.Namespace, p.Name)
	}
	for _, p := range w.policies {
		x.RemovePolicy(p.read().Kind, p.namespace, p.name)
	}
	for name := range w.namespaces {
		x.RemoveNamespace(name)
	}
	for name := range w.networks {
		x.RemoveNetwork(name)
	}
	x.Flush()
}
