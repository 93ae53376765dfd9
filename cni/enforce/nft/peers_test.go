package nft

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/cni/policy"
)

// space is how many addresses the tests of intervals have.
const space = 24

func addressAt(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{255, 255, 255, byte(256 - space + i)})
}

// drawPeers draws sorted intervals of the space, up to its very end.
func drawPeers(t *rapid.T, label string) []peer {
	var peers []peer
	for i := 0; i < space; {
		i += rapid.SampledFrom([]int{0, 0, 1, 3}).Draw(t, label+" gap")
		size := rapid.IntRange(1, 6).Draw(t, label+" size")
		if i+size > space {
			break
		}
		peers = append(peers, peer{addressAt(i), addressAt(i + size - 1), rapid.SampledFrom([]string{"x", "y"}).Draw(t, label+" chain")})
		i += size
	}
	return peers
}

func chainAt(peers []peer, a netip.Addr) string {
	for _, p := range peers {
		if !a.Less(p.first) && !p.last.Less(a) {
			return p.chain
		}
	}
	return ""
}

// After any sequence of changes the maps together say what is wanted, the hash has single
// addresses only, and while a change is under way nothing in a map hides anything else in it: what is added to a map
// overlaps nothing that is in it before, deleted or not.
func TestPeersChangeInPlace(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var now sides
		for range rapid.IntRange(1, 6).Draw(t, "changes") {
			want := drawPeers(t, "want")
			given := slices.Clone(want)
			next, changes := now.diff(want)
			if !slices.Equal(want, given) {
				t.Fatal("what is wanted was changed")
			}
			for side, c := range changes {
				kept := slices.Clone(now[side])
				for _, d := range c.del {
					i := slices.Index(kept, d)
					if i < 0 {
						t.Fatalf("%v is deleted from map %d, which has %v", d, side, now[side])
					}
					kept = slices.Delete(kept, i, i+1)
				}
				for _, a := range c.add {
					for _, o := range now[side] {
						if !a.last.Less(o.first) && !o.last.Less(a.first) {
							t.Fatalf("%v is added to map %d over %v", a, side, o)
						}
					}
				}
				kept = append(kept, c.add...)
				slices.SortFunc(kept, func(a, b peer) int { return a.first.Compare(b.first) })
				if !slices.Equal(kept, next[side]) {
					t.Fatalf("map %d has %v, not %v", side, kept, next[side])
				}
			}
			for i := range space {
				a := addressAt(i)
				// Between adding and taking away both what was and what will be is found.
				var in [len(sides{})]string
				before, after, both := "", chainAt(want, a), ""
				for side, c := range changes {
					before, both = before+chainAt(now[side], a), both+chainAt(now[side], a)+chainAt(c.add, a)
					in[side] = chainAt(next[side], a)
				}
				if both != before && both != after && both != before+after && both != after+before {
					t.Fatalf("%s: while it changes from %q to %q it is %q", a, before, after, both)
				}
				if !strings.Contains(both, before) || !strings.Contains(both, after) {
					t.Fatalf("%s: while it changes from %q to %q only %q is found", a, before, after, both)
				}
				if got := strings.Join(in[:], ""); got != after {
					t.Fatalf("%s: maps have %q, wanted %q", a, in, after)
				}
			}
			if i := slices.IndexFunc(next[single], func(p peer) bool { return p.first != p.last }); i >= 0 {
				t.Fatalf("the hash has %v", next[single][i])
			}
			now = next
		}
	})
}

// One peer that comes or goes among thousands is a handful of elements.
func TestOnePeerIsAFewElements(t *testing.T) {
	var peers []peer
	first := netip.MustParseAddr("10.0.0.0")
	for a := first; len(peers) < 5000; a = a.Next().Next() {
		peers = append(peers, peer{a, a, "x"})
	}
	now, _ := sides{}.diff(peers)
	elements := func(want []peer) (n int) {
		_, changes := now.diff(want)
		for _, c := range changes {
			n += len(c.del) + len(c.add)
		}
		return n
	}
	if len(now[single]) != len(peers) {
		t.Errorf("%d of %d are in the hash", len(now[single]), len(peers))
	}
	if n := elements(slices.Delete(slices.Clone(peers), 2500, 2501)); n != 1 {
		t.Errorf("one that goes is %d elements", n)
	}
	if n := elements(slices.Insert(slices.Clone(peers), 2500, peer{peers[2499].last.Next(), peers[2499].last.Next(), "x"})); n != 1 {
		t.Errorf("one that comes is %d elements", n)
	}
	now, _ = sides{}.diff([]peer{{first, peers[4999].last, "x"}})
	if n := elements([]peer{{first, peers[2000].first, "x"}, {peers[2001].first, peers[4999].last, "x"}}); n != 3 {
		t.Errorf("one that goes out of an interval is %d elements", n)
	}
}

// Who allows it is nothing to a parent: its peers are not more for it, nor are its chains.
func TestParentsHaveNoShares(t *testing.T) {
	var v [2]*policy.Verdicts
	for d := range v {
		v[d] = &policy.Verdicts{Isolated: true, Policies: []string{"p", "q"}}
		for i := range space {
			ports := &policy.Ports{TCP: []policy.PortRange{{First: 80, Last: 80}}}
			ports.By = []policy.Share{{Policy: v[d].Policies[i%2], Ports: &policy.Ports{TCP: ports.TCP}}}
			v[d].Peers = append(v[d].Peers, policy.PeerRange{First: addressAt(i), Last: addressAt(i), Ports: ports})
		}
	}
	for want, r := range map[int]rendering{1: parentRendering("p0", Interface{}, v, 1, nil, true), space: podRendering(Interface{Name: "net1"}, v, 1)} {
		chains := map[string]chain{}
		if peers := r.peersOf(policy.Ingress, v, chains); len(peers[0]) != want || len(chains) != min(want, 2) {
			t.Errorf("%s: %d peers lead to %d chains, want %d", r.prefix, len(peers[0]), len(chains), want)
		}
	}
}
