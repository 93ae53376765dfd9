package policy

import (
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

// A small space around the edges of the families.
var edges = func() (all []netip.Addr) {
	for _, from := range []string{"0.0.0.0", "255.255.255.250", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff8"} {
		a := netip.MustParseAddr(from)
		for range 6 {
			all = append(all, a)
			a = a.Next()
		}
	}
	return append(all, lastIPv4, lastIPv6)
}()

func drawRange(t *rapid.T) addrRange {
	for {
		a, b := one(t, edges...), one(t, edges...)
		if a.Is4() == b.Is4() && !b.Less(a) {
			return addrRange{a, b}
		}
	}
}

func TestUniteAndPut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		sets := interner{}
		drawPorts := func(t *rapid.T) *Ports {
			p := &Ports{All: chance(t, 4)}
			p.TCP = many(t, 2, func(t *rapid.T) PortRange { n := one[uint16](t, 0, 1, 2, 65534); return PortRange{n, n + 1} })
			p.UDP = []PortRange{{5, 5}}
			p.canonical()
			if by := one(t, "", "p", "q"); by != "" {
				p = p.grantedBy(by)
			}
			return sets.intern(p)
		}
		var spans []span
		for range rapid.IntRange(0, 8).Draw(t, "spans") {
			spans = append(spans, span{drawRange(t), drawPorts(t)})
		}
		v := &Verdicts{Isolated: true, Policies: []string{"p", "q"}, Peers: (&scratch{spans: spans}).unite(sets)}
		wantCanonical(t, v)
		want := map[netip.Addr]*Ports{}
		for _, a := range edges {
			var some []*Ports
			for _, s := range spans {
				if s.contains(a) {
					some = append(some, s.ports)
				}
			}
			want[a] = sets.union(some)
		}
		check := func() {
			for a, ports := range want {
				if i, found := find(v.Peers, a); found != (ports != nil) || found && v.Peers[i].Ports != ports {
					t.Fatalf("%s: %v, want %v in %v", a, found, ports, v.Peers)
				}
			}
		}
		check()
		for range rapid.IntRange(0, 8).Draw(t, "changes") {
			a := one(t, edges...)
			want[a] = nil
			if !chance(t, 3) {
				want[a] = drawPorts(t)
			}
			v.Peers = put(v.Peers, a, want[a])
			wantCanonical(t, v)
			check()
		}
	})
}

func TestSubtract(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		whole := drawRange(t)
		var parts []addrRange
		for _, r := range many(t, 4, drawRange) {
			if whole.contains(r.first) && whole.contains(r.last) {
				parts = append(parts, r)
			}
		}
		rest := subtract(whole, parts)
		for _, a := range edges {
			if want := whole.contains(a) && !anyContains(parts, a); anyContains(rest, a) != want {
				t.Fatalf("%v without %v is %v: %s", whole, parts, rest, a)
			}
		}
	})
}
