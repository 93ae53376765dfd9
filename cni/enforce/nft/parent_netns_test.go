package nft

import (
	"errors"
	"maps"
	"net/netip"
	"strings"
	"testing"

	"github.com/sluice-network/sluice/cni/policy"
)

func openParent(t testing.TB, w *world) *Parent {
	t.Helper()
	p, err := OpenParent(w.node, "p0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// The guard on the parent is exact for what begins a connection; what may be a reply
// passes where the other direction lets it. With the table in the pod all is exact.
// Siblings are on the same parent, the wire is at its other end.
func TestParentPackets(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	a := w.pods["a"]
	parent, pod := openParent(t, w), openPod(t, a)
	all := around()
	generation := uint64(0)
	for _, alone := range []bool{true, false} {
		for _, c := range policies(w) {
			name := " with the pod's table"
			if alone {
				name = " alone"
			}
			t.Run(c.name+name, func(t *testing.T) {
				w.TB = t
				generation++
				if err := parent.Apply(a.iface(), c.ingress, c.egress, generation); err != nil {
					t.Fatal(err)
				}
				if !alone {
					if err := pod.Apply(a.iface(), c.ingress, c.egress, generation); err != nil {
						t.Fatal(err)
					}
				}
				w.expect(all, func(cell cell, source, destination netip.Addr) bool {
					verdicts, peer, other := c.ingress, source, c.egress
					if cell.from == "a" {
						verdicts, peer, other = c.egress, destination, c.ingress
					}
					allowed := verdicts.Allows(peer, cell.protocol, cell.port)
					if alone && cell.protocol == policy.UDP {
						const ephemeral = 40000 // whatever the sender's port is
						allowed = allowed || other.Allows(peer, policy.UDP, ephemeral)
					}
					if alone && cell.protocol == icmpProtocol {
						allowed = allowed || other.Allows(peer, icmpProtocol, 0)
					}
					return allowed
				})
			})
		}
	}
	if got, err := parent.Generations(); err != nil || !maps.Equal(got, map[[6]byte]uint64{a.mac: generation}) {
		t.Errorf("generations %v, %v", got, err)
	}
	if d, err := parent.Dropped(a.mac); err != nil || d.Ingress == 0 || d.Egress == 0 {
		t.Errorf("dropped %+v, %v", d, err)
	}
}

// NP-04: between two pods of one parent both have to allow it. Each one's change is its
// own, and when one goes the other's stay.
func TestParentNP04(t *testing.T) {
	w := newWorld(t, "a", "b")
	a, b := w.pods["a"], w.pods["b"]
	parent := openParent(t, w)
	nftNode(t, w, "table netdev mine {\n}\n")
	all := cells([2]string{"a", "b"}, [2]string{"b", "a"})
	ports := &policy.Ports{TCP: []policy.PortRange{{First: 80, Last: 81}}, SCTP: []policy.PortRange{{First: 81, Last: 81}}}
	if err := errors.Join(parent.Apply(a.iface(), denied, only(open80, b), 1), parent.Apply(b.iface(), only(ports, a), denied, 2)); err != nil {
		t.Fatal(err)
	}
	w.expect(all, func(c cell, _, _ netip.Addr) bool { return c.from == "a" && c.protocol == policy.TCP && c.port == 80 })
	// Who starts anew takes over.
	parent = openParent(t, w)
	if err := parent.Apply(b.iface(), only(&policy.Ports{All: true}, a), denied, 3); err != nil {
		t.Fatal(err)
	}
	if got, err := parent.Generations(); err != nil || !maps.Equal(got, map[[6]byte]uint64{a.mac: 1, b.mac: 3}) {
		t.Errorf("generations %v, %v", got, err)
	}
	w.expect(all, func(c cell, _, _ netip.Addr) bool { return c.from == "a" && c.port == 80 })
	if err := errors.Join(parent.Remove(b.mac), parent.Remove(b.mac)); err != nil {
		t.Fatal(err)
	}
	if rules := nftNode(t, w, "list ruleset"); strings.Contains(rules, macPrefix(b.mac)) || !strings.Contains(rules, macPrefix(a.mac)) {
		t.Errorf("left is\n%s", rules)
	}
	w.expect(all, func(c cell, _, _ netip.Addr) bool { return c.from == "a" && c.port == 80 })
	if err := parent.Remove(a.mac); err != nil {
		t.Fatal(err)
	}
	if rules := nftNode(t, w, "list ruleset"); rules != "table netdev mine {\n}\n" {
		t.Errorf("left is\n%s", rules)
	}
	w.expect(all, func(cell, netip.Addr, netip.Addr) bool { return true })
}

// What begins generation 0 is held before the pod is there, by its MAC.
func TestParentDenyAll(t *testing.T) {
	w := newWorld(t, "a", "b")
	a := w.pods["a"]
	parent := openParent(t, w)
	i := a.iface()
	i.Index, i.Addresses, i.AnyAddress = 0, nil, true
	if err := parent.DenyAll(i); err != nil {
		t.Fatal(err)
	}
	all := cells([2]string{"a", "b"}, [2]string{"b", "a"}, [2]string{"a", "wire"}, [2]string{"wire", "a"})
	w.expect(all, func(cell, netip.Addr, netip.Addr) bool { return false })
	if err := parent.Apply(a.iface(), openTo, openTo, 1); err != nil {
		t.Fatal(err)
	}
	w.expect(all, func(cell, netip.Addr, netip.Addr) bool { return true })
	spoofing(t, a, w.pods["wire"], false, false)
}

// nftNode runs the tool on the node.
func nftNode(t testing.TB, w *world, commands string) string {
	t.Helper()
	return nft(t, &station{ns: w.node}, commands)
}
