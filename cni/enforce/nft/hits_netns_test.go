package nft

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
)

// by says that each of the policies allows all that the verdicts allow.
func by(v *policy.Verdicts, policies ...string) *policy.Verdicts {
	shared := &policy.Verdicts{Isolated: true, Policies: policies}
	for _, r := range v.Peers {
		all := *r.Ports
		ports := all
		for _, p := range policies {
			ports.By = append(ports.By, policy.Share{Policy: p, Ports: &all})
		}
		shared.Peers = append(shared.Peers, policy.PeerRange{First: r.First, Last: r.Last, Ports: &ports})
	}
	return shared
}

// hasCounters holds the counters in the pod's table to those of the policies that isolate
// it in ingress; a parent has none of hits.
func (h holder) hasCounters(t testing.TB, ingress *policy.Verdicts) {
	t.Helper()
	got, err := h.counted()
	if err != nil {
		t.Fatal(err)
	}
	want := hitsCounters([2]*policy.Verdicts{ingress, {}})
	if names := slices.Sorted(maps.Keys(got.Hits)); got.Hits != nil && !slices.Equal(names, slices.Sorted(slices.Values(want))) {
		t.Fatalf("counters of hits are %v, want %v", names, want)
	}
}

// What begins a connection is counted for each policy whose share allows it, once, in one
// direction; also over rules that are made anew or changed. What is dropped is for none.
func TestHitsArePackets(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "a", "b", "c")
	a, b, c := w.pods["a"], w.pods["b"], w.pods["c"]
	pod := openPod(t, a)
	one := func(port uint16) []policy.PortRange { return []policy.PortRange{{First: port, Last: port}} }
	p, q := &policy.Ports{TCP: []policy.PortRange{{First: 80, Last: 81}}}, &policy.Ports{TCP: one(81), UDP: one(80)}
	all, dns := &policy.Ports{All: true}, &policy.Ports{UDP: one(80), SCTP: one(81)}
	for _, cut := range []bool{false, true} {
		t.Run(fmt.Sprintf("cut=%v", cut), func(t *testing.T) {
			w.TB = t
			i := a.iface()
			i.Cut = cut
			// Of b p has some ports and q others, of c p has all and q two.
			ingress := &policy.Verdicts{Isolated: true, Policies: []string{"p", "q"}}
			for family := range 2 {
				ingress.Peers = append(ingress.Peers,
					policy.PeerRange{First: b.address(family), Last: b.address(family), Ports: &policy.Ports{TCP: p.TCP, UDP: q.UDP, By: []policy.Share{{Policy: "p", Ports: p}, {Policy: "q", Ports: q}}}},
					policy.PeerRange{First: c.address(family), Last: c.address(family), Ports: &policy.Ports{All: true, By: []policy.Share{{Policy: "p", Ports: all}, {Policy: "q", Ports: dns}}}})
			}
			egress := by(only(open80, b), "q", "r")
			if err := pod.Apply(i, ingress, egress, 1); err != nil {
				t.Fatal(err)
			}
			want := map[string]uint64{}
			for _, name := range hitsCounters([2]*policy.Verdicts{ingress, egress}) {
				want[name] = 0
			}
			var mu sync.Mutex
			hit := func(d policy.Direction, policies ...string) {
				mu.Lock()
				defer mu.Unlock()
				for _, p := range policies {
					want[HitsCounter(d, p)]++
				}
			}
			try := func() {
				t.Helper()
				var wg sync.WaitGroup
				for family := range 2 {
					for _, cell := range []struct {
						from, to *station
						protocol uint8
						port     uint16
						hits     []string // none: denied
					}{
						{b, a, policy.TCP, 80, []string{"p"}},
						{b, a, policy.TCP, 81, []string{"p", "q"}},
						{b, a, policy.UDP, 80, []string{"q"}},
						{b, a, policy.UDP, 81, nil},
						{b, a, icmpProtocol, 0, nil},
						{c, a, policy.TCP, 443, []string{"p"}},
						{c, a, policy.UDP, 80, []string{"p", "q"}},
						{c, a, policy.SCTP, 81, []string{"p", "q"}},
						{c, a, icmpProtocol, 0, []string{"p"}},
						{w.pods["wire"], a, policy.TCP, 80, nil},
						{a, b, policy.TCP, 80, []string{"q", "r"}},
						{a, b, policy.TCP, 81, nil},
					} {
						wg.Go(func() {
							d := policy.Ingress
							if cell.from == a {
								d = policy.Egress
							}
							got := false
							for try := 0; !got && (try == 0 || cell.hits != nil && try < 20); try++ { // a busy machine is late
								got = cell.from.reaches(cell.to.address(family), cell.protocol, cell.port)
								hit(d, cell.hits...)
							}
							if want := cell.hits != nil; got != want {
								t.Errorf("%s -> %s protocol %d port %d: passes %v", cell.from.name, cell.to.name, cell.protocol, cell.port, got)
							}
						})
					}
				}
				wg.Wait()
				var got Counted
				for end := time.Now().Add(10 * time.Second); !maps.Equal(got.Hits, want) && time.Now().Before(end); { // the last may be under way
					got = must(pod.Counted(i))
				}
				if !maps.Equal(got.Hits, want) {
					t.Errorf("counted %v, want %v", got.Hits, want)
				}
			}
			try()
			udp := b.dial("udp", a.v4) // one connection
			for n := range 20 {
				if !echoes(udp) {
					t.Fatalf("datagram %d does not pass", n)
				}
			}
			udp.Close()
			hit(policy.Ingress, "q")
			i.Node = []netip.Addr{netip.MustParseAddr("10.20.9.9")} // made anew
			if err := pod.Apply(i, ingress, egress, 2); err != nil {
				t.Fatal(err)
			}
			try()
			if err := pod.Remove("net1"); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// More policies than a rule has room for counters.
func TestHitsOfManyPolicies(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "a", "b")
	a, b := w.pods["a"], w.pods["b"]
	pod := openPod(t, a)
	var names []string
	for n := range 2*mostCounters + 1 {
		names = append(names, fmt.Sprintf("p%03d", n))
	}
	v := by(only(open80, b), names...)
	if err := pod.Apply(a.iface(), v, openTo, 1); err != nil {
		t.Fatal(err)
	}
	if !b.reaches(a.v4, policy.UDP, 80) || b.reaches(a.v4, policy.UDP, 81) {
		t.Error("not what policy says")
	}
	got := must(pod.Counted(a.iface())).Hits
	for _, name := range names {
		if n := got[HitsCounter(policy.Ingress, name)]; n != 1 {
			t.Errorf("%s has %d hits", name, n)
		}
	}
}

// Whatever came before, and whatever failed, a table has the counters of the policies that
// isolate it and no others, and a policy that stays keeps what it has counted.
func TestCountersComeAndGoWithPolicies(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "a", "b")
	a, b := w.pods["a"], w.pods["b"]
	pod := openPod(t, a)
	h := holder{engine: pod.engine}
	inet := table{unix.NFPROTO_INET, TablePrefix + "net1"}
	draw := func(d policy.Direction) *policy.Verdicts {
		if rand.IntN(5) == 0 {
			return openTo
		}
		names := []string{"p", "q", "r"}[:rand.IntN(4)]
		if d == policy.Ingress {
			names = append(slices.Clone(names), "stays")
		}
		if v := by(only(&policy.Ports{UDP: []policy.PortRange{{First: uint16(70 + rand.IntN(5)), Last: 80}}}, b), names...); rand.IntN(3) > 0 {
			return v
		}
		return &policy.Verdicts{Isolated: true, Policies: names} // which allow nothing
	}
	apply := func(v [2]*policy.Verdicts) error {
		i := a.iface()
		i.Cut = rand.IntN(6) == 0
		return pod.Apply(i, v[0], v[1], 1)
	}
	var last uint64
	for round := range 60 {
		v := [2]*policy.Verdicts{draw(policy.Ingress), draw(policy.Egress)}
		if rand.IntN(2) == 0 {
			failed := h.failing(rand.IntN(40), 1000)
			err := apply(v)
			h.commit = h.conn.commit
			if (err != nil) != *failed && !pod.states["net1"].stale {
				t.Fatalf("failed %v: %v", *failed, err)
			}
		}
		if err := apply(v); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if len(v[0].Peers) > 0 && !b.reachesWithin(netip.AddrPortFrom(b.v4, uint16(2000+round)), a.v4, 80) {
			t.Fatalf("round %d: no answer", round)
		}
		got := must(pod.conn.counters(inet))
		want := append(hitsCounters(v), droppedIn, droppedOut, droppedSpoofed)
		if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, slices.Sorted(slices.Values(want))) {
			t.Fatalf("round %d: counters %v, want %v", round, names, want)
		}
		if !v[0].Isolated {
			last = 0
			continue
		}
		now := got[HitsCounter(policy.Ingress, "stays")]
		if n := last + uint64(min(1, len(v[0].Peers))); now != n {
			t.Fatalf("round %d: %d hits, want %d", round, now, n)
		}
		last = now
	}
	if rules := nft(t, a, "list table inet sluice-net1"); strings.Count(rules, "counter hits-") != len(hitsCounters(pod.states["net1"].verdicts)) {
		t.Errorf("listed is\n%s", rules)
	}
}
