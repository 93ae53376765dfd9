package nft

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/cni/policy/policytest"
)

// member is an interface of a pod on a network, and what policy says of it.
type member struct {
	network   string
	addresses []netip.Addr
	verdicts  [2]*policy.Verdicts
}

// compiled are the interfaces of a world with what the policies say of each; those of the
// host network are none.
func compiled(t testing.TB, w *policytest.World, documents []string) (members []member) {
	t.Helper()
	x := policy.NewIndex(func(policy.Pod) bool { return true })
	x.SetNode(w.Node)
	for i := range w.Networks {
		x.SetNetwork(must(policy.ReadNetwork(&w.Networks[i])))
	}
	for i := range w.Namespaces {
		x.SetNamespace(policy.ReadNamespace(&w.Namespaces[i]))
	}
	plain, multi, err := policytest.Read(documents...)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range plain {
		x.SetPolicy(policy.ReadNetworkPolicy(p))
	}
	for _, object := range multi {
		x.SetPolicy(must(policy.ReadMultiNetworkPolicy(object)))
	}
	var pods []policy.Pod
	for i := range w.Pods {
		p := must(policy.ReadPod(&w.Pods[i]))
		x.SetPod(p)
		pods = append(pods, p)
	}
	x.Flush()
	for _, p := range pods {
		for _, i := range p.Interfaces {
			m := member{network: i.Network, addresses: i.IPs}
			for d := range m.verdicts {
				m.verdicts[d] = openTo
				if s, told := x.State(policy.ID{Namespace: p.Namespace, Pod: p.Name, UID: p.UID, Network: i.Network, Interface: i.Name}, policy.Direction(d)); told {
					m.verdicts[d] = s.Verdicts
				}
			}
			members = append(members, m)
		}
	}
	return members
}

// stages calls f with what is wanted before and after the change of a case.
func stages(t testing.TB, c policytest.Case, f func(members []member, probes []policytest.Probe)) {
	t.Helper()
	w := policytest.Park()
	for _, lines := range [][]string{c.Want, c.Then} {
		var probes []policytest.Probe
		for _, line := range lines {
			probes = append(probes, w.Probes(line)...)
		}
		f(compiled(t, w, c.Policies), probes)
		if c.Change == nil {
			return
		}
		c.Change(w)
	}
}

// covers fails unless each statement has a case that was tried, a test of its own, or a
// reason why it needs none.
func covers(t *testing.T, tried map[string]int, own map[string]func(*testing.T), reasons map[string]string) {
	t.Helper()
	for _, s := range policytest.Statements {
		if tried[s] == 0 && own[s] == nil && reasons[s] == "" {
			t.Errorf("%s has no test", s)
		}
	}
}

func statementOf(c policytest.Case) string {
	name, _, _ := strings.Cut(c.Name, " ")
	return name
}

// Of each statement's examples the rules say what they should: those of both pods, and
// of their parent, walked by the model, for what begins a connection and its replies.
func TestStatementsAsRules(t *testing.T) {
	tried := map[string]int{}
	for _, c := range policytest.Cases {
		t.Run(c.Name, func(t *testing.T) {
			stages(t, c, func(members []member, probes []policytest.Probe) {
				rules := rulesOf(t, members)
				for _, p := range probes {
					tried[statementOf(c)]++
					begin := flow{source: p.From, destination: p.To, protocol: p.Protocol, sourcePort: 40000, destinationPort: p.Port, flags: 2}
					answer := flow{source: p.To, destination: p.From, protocol: p.Protocol, sourcePort: p.Port, destinationPort: 40000, flags: 0x12}
					switch p.Protocol {
					case policy.SCTP:
						begin.flags, answer.flags = 1, 2
					case icmpProtocol:
						begin.destinationPort, answer.destinationPort = 8, 0
						if p.From.Is6() {
							begin.protocol, answer.protocol = 58, 58
							begin.destinationPort, answer.destinationPort = 128, 129
						}
					}
					const isNew, isEstablished = 8, 2 // of conntrack
					if got, by := rules.pass(p.Network, begin, isNew); got != p.Allow {
						t.Errorf("%+v: passes %v (%s)", p, got, by)
					}
					if got, by := rules.pass(p.Network, answer, isEstablished); p.Allow && !got {
						t.Errorf("the answer to %+v is dropped (%s)", p, by)
					}
				}
			})
		})
	}
	covers(t, tried, map[string]func(*testing.T){
		"NP-42":  TestPodRulesSayWhatVerdictsSay, // what is established passes, whatever the verdicts
		"MNP-07": TestPodRulesSayWhatVerdictsSay, // verdicts are of addresses, whosever they are
	}, map[string]string{"NP-43": "nothing translates addresses on these networks"})
}

// ruleset is the rules of many pods and their parents, in the model.
type ruleset struct {
	pods    []Interface
	network []string
	inside  []kernel
	parents map[string]kernel
}

func rulesOf(t testing.TB, members []member) *ruleset {
	t.Helper()
	r := &ruleset{parents: map[string]kernel{}}
	for n, m := range members {
		i := Interface{Name: "net1", Index: 7, MAC: [6]byte{2, 0, 0, 0, 1, byte(n)}, Addresses: m.addresses}
		inside := kernel{}
		versions(t, inside, podRendering(i, m.verdicts, 1), m.verdicts)
		assert := r.parents[m.network] == nil
		if assert {
			r.parents[m.network] = kernel{}
		}
		versions(t, r.parents[m.network], parentRendering("p0", i, m.verdicts, 1, nil, assert), m.verdicts)
		r.pods, r.network, r.inside = append(r.pods, i), append(r.network, m.network), append(r.inside, inside)
	}
	return r
}

// find is the pod with an address on a network, -1 for somebody else.
func (r *ruleset) find(network string, a netip.Addr) int {
	return slices.IndexFunc(r.pods, func(i Interface) bool {
		return slices.Contains(i.Addresses, a) && r.network[slices.IndexFunc(r.pods, func(o Interface) bool { return o.MAC == i.MAC })] == network
	})
}

// pass says whether a packet passes all rules on its way, and which one it does not.
func (r *ruleset) pass(network string, f flow, state uint32) (bool, string) {
	from, to := r.find(network, f.source), r.find(network, f.destination)
	f.sourceMAC, f.destinationMAC = [6]byte{2, 9, 9, 9, 9, 1}, [6]byte{2, 9, 9, 9, 9, 2}
	if from >= 0 {
		f.sourceMAC = r.pods[from].MAC
	}
	if to >= 0 {
		f.destinationMAC = r.pods[to].MAC
	}
	p := f.packet()
	p.state = state
	index, name := 7, "net1"
	if from == to {
		index, name = 1, "lo"
	}
	own := table{unix.NFPROTO_INET, TablePrefix + "net1"}
	if from >= 0 {
		p.out, p.outName = index, name
		if ok, by := r.inside[from].walk(own, "output", p); !ok {
			return false, "the sender's " + by
		}
	}
	p.out, p.outName = 0, ""
	if from != to {
		if from >= 0 {
			if ok, by := r.inside[from].walk(table{unix.NFPROTO_NETDEV, own.name}, "egress", p); !ok {
				return false, "the sender's " + by
			}
		}
		for _, base := range []string{"senders", "receivers"} {
			if ok, by := r.parents[network].walk(table{unix.NFPROTO_NETDEV, TablePrefix + "p0"}, base, p); !ok {
				return false, "the parent's " + by
			}
		}
	}
	if to >= 0 {
		p.in, p.inName = index, name
		if ok, by := r.inside[to].walk(own, "input", p); !ok {
			return false, "the receiver's " + by
		}
	}
	return true, ""
}

// Of each statement's examples the packets do what they should, between MacVLAN pods
// with their own tables and their parent's.
func TestStatementsAsPackets(t *testing.T) {
	t.Parallel()
	parents := map[*world]*Parent{}
	statementsAsPackets(t, func(_ string, addresses map[string][]netip.Addr) *world {
		w := newWorldOf(t, addresses)
		parents[w] = openParent(t, w)
		return w
	}, 100, func(s *station, verdicts [2]*policy.Verdicts, generation uint64) error {
		return parents[s.world].Apply(s.iface(), verdicts[policy.Ingress], verdicts[policy.Egress], generation)
	})
}

// statementsAsPackets tries the examples of all statements, on a world for each network
// that build makes. So many interfaces have rules; the addresses of more, and of others,
// are the wire's. also is what is done besides the rules in the pods.
func statementsAsPackets(t *testing.T, build func(network string, addresses map[string][]netip.Addr) *world, most int, also func(*station, [2]*policy.Verdicts, uint64) error) {
	type end struct {
		network string
		address netip.Addr
	}
	// Who there ever is, and who answers at which ports.
	stations := map[string]map[string][]netip.Addr{} // by network and name
	ports := map[end][]uint16{}
	for _, c := range policytest.Cases {
		stages(t, c, func(members []member, probes []policytest.Probe) {
			for _, m := range members {
				if stations[m.network] == nil {
					stations[m.network] = map[string][]netip.Addr{}
				}
				stations[m.network][fmt.Sprint(m.addresses)] = m.addresses
			}
			for _, p := range probes {
				if !sendable(p) {
					continue
				}
				from, to := end{p.Network, p.From}, end{p.Network, p.To}
				for _, e := range []end{from, to} {
					if _, known := ports[e]; !known {
						ports[e] = nil
					}
				}
				if p.Port != 0 && !slices.Contains(ports[to], p.Port) {
					ports[to] = append(ports[to], p.Port)
				}
			}
		})
	}
	pods := map[*station]*Pod{}
	at := map[end]*station{}
	for network, all := range stations {
		maps.DeleteFunc(all, func(name string, addresses []netip.Addr) bool { // a part of another's
			for other, more := range all {
				if other != name && !slices.ContainsFunc(addresses, func(a netip.Addr) bool { return !slices.Contains(more, a) }) {
					return true
				}
			}
			return false
		})
		for _, name := range slices.Sorted(maps.Keys(all))[min(most, len(all)):] {
			delete(all, name)
		}
		held := slices.Concat(slices.Collect(maps.Values(all))...)
		all["wire"] = nil
		for e := range ports {
			if e.network == network && !slices.Contains(held, e.address) {
				all["wire"] = append(all["wire"], e.address)
			}
		}
		w := build(network, all)
		for name, s := range w.pods {
			if name != "wire" {
				pods[s] = openPod(t, s)
			}
			for _, a := range all[name] {
				at[end{network, a}] = s
				if p := ports[end{network, a}]; len(p) > 0 {
					s.serve(a, p)
				}
			}
		}
	}
	tried := map[string]int{}
	held := map[*station][2]*policy.Verdicts{}
	generation := uint64(0)
	for _, c := range policytest.Cases {
		t.Run(c.Name, func(t *testing.T) {
			stages(t, c, func(members []member, probes []policytest.Probe) {
				generation++
				now := map[*station][2]*policy.Verdicts{}
				for s := range pods {
					now[s] = [2]*policy.Verdicts{openTo, openTo}
				}
				free := map[end]bool{} // should have rules, and has none
				for _, m := range members {
					for _, a := range m.addresses {
						if s := at[end{m.network, a}]; pods[s] != nil {
							now[s] = m.verdicts
						} else if m.verdicts[0].Isolated || m.verdicts[1].Isolated {
							free[end{m.network, a}] = true
						}
					}
				}
				for s, v := range now {
					if was, known := held[s]; known && was[0].Equal(v[0]) && was[1].Equal(v[1]) {
						continue
					}
					if err := errors.Join(pods[s].Apply(s.iface(), v[0], v[1], generation), also(s, v, generation)); err != nil {
						t.Fatal(err)
					}
					held[s] = v
				}
				var wg sync.WaitGroup
				for _, p := range probes {
					if !sendable(p) || free[end{p.Network, p.From}] || free[end{p.Network, p.To}] || at[end{p.Network, p.From}] == at[end{p.Network, p.To}] && p.From != p.To {
						continue
					}
					tried[statementOf(c)]++
					wg.Go(func() {
						from := at[end{p.Network, p.From}]
						got := from.reachesFrom(p.From, p.To, p.Protocol, p.Port)
						for try := 0; p.Allow && !got && try < 20; try++ { // a busy machine is late
							got = from.reachesFrom(p.From, p.To, p.Protocol, p.Port)
						}
						if got != p.Allow {
							t.Errorf("%+v: passes %v", p, got)
						}
					})
				}
				wg.Wait()
			})
		})
	}
	total := 0
	for _, n := range tried {
		total += n
	}
	t.Logf("%d connections were tried", total)
	covers(t, tried, map[string]func(*testing.T){
		"NP-42": TestNP42EstablishedConnectionsGoOn, "MNP-07": TestMNP07PeersOfAnInterfaceWithoutKnownAddresses,
	}, map[string]string{"NP-43": "nothing translates addresses on these networks"})
}

// sendable says that there can be such a packet.
func sendable(p policytest.Probe) bool {
	return p.From.IsGlobalUnicast() && p.To.IsGlobalUnicast() && (p.Port != 0 || p.Protocol == icmpProtocol)
}

// NP-42: what is established goes on in the pod when policy tightens, and so it does on
// the parent as long as one direction is not isolated. What is new does not begin.
func TestNP42EstablishedConnectionsGoOn(t *testing.T) { eachHolder(t, np42) }

func np42(t *testing.T, w *world, h holder) {
	w.TB = t
	a, b := w.pods["a"], w.pods["b"]
	for family := range 2 {
		if err := h.apply(a.iface(), only(open80, b), openTo, 1); err != nil {
			t.Fatal(err)
		}
		c := b.dial("tcp", a.address(family))
		defer c.Close()
		if !echoes(c) {
			t.Fatal("the connection does not work")
		}
		if err := h.apply(a.iface(), denied, openTo, 2); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if !echoes(c) {
				t.Error("an established connection is cut")
			}
		}
		if b.reaches(a.address(family), policy.TCP, 80) {
			t.Error("a new connection begins")
		}
	}
}

// MNP-07: of an interface whose addresses nobody knows, blocks of addresses are peers.
func TestMNP07PeersOfAnInterfaceWithoutKnownAddresses(t *testing.T) { eachHolder(t, mnp07) }

func mnp07(t *testing.T, w *world, h holder) {
	w.TB = t
	i := w.pods["a"].iface()
	i.Addresses, i.AnyAddress = nil, true
	if err := h.apply(i, only(open80, w.pods["b"]), denied, 1); err != nil {
		t.Fatal(err)
	}
	w.expect(cells([2]string{"b", "a"}, [2]string{"c", "a"}), func(c cell, _, _ netip.Addr) bool {
		return c.from == "b" && c.port == 80
	})
}
