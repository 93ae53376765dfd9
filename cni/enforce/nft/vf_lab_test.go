//go:build lab

package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// These run in a lab guest: pods have VFs of a NIC in legacy mode, and their own rules
// only.

// vfsOf makes a world of a card's VFs, each in a namespace of its own.
func vfsOf(t *testing.T, card int, addresses map[string][]netip.Addr) *world {
	t.Helper()
	h, err := host.Open(host.DefaultSysfs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	kernel, err := host.OpenAttacher(host.DefaultSysfs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(kernel.Close)
	pfs, err := h.Inventory(t.Context())
	if err != nil || len(pfs) <= card || pfs[card].TotalVFs < len(addresses) {
		t.Fatalf("card %d does not have %d VFs: %+v, %v", card, len(addresses), pfs, err)
	}
	if err := h.SetLinkUp(t.Context(), pfs[card].Link()); err != nil {
		t.Fatal(err)
	}
	// The emulated NIC has a link when its wire is up, which is a link of the guest; QEMU's
	// has none.
	if l, err := netlink.LinkByName(fmt.Sprintf("wire%d", card)); err == nil {
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
	}
	numVFs := filepath.Join(host.DefaultSysfs, "bus/pci/devices", pfs[card].PCIAddress, "sriov_numvfs")
	for _, n := range []string{"0", fmt.Sprint(len(addresses))} {
		if err := os.WriteFile(numVFs, []byte(n), 0); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = os.WriteFile(numVFs, []byte("0"), 0) })
	var vfs []host.VF
	eventually(t, "VFs with netdevs", func() bool {
		pfs, err := h.Inventory(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		vfs = pfs[card].VFs
		return len(vfs) == len(addresses) && !slices.ContainsFunc(vfs, func(v host.VF) bool { return v.Name == "" })
	})
	w := &world{TB: t, pods: map[string]*station{}}
	for name := range addresses {
		s := &station{world: w, name: name, ns: newNetns(t), link: "net1"}
		if err := kernel.ChangeLink(t.Context(), nil, vfs[len(w.pods)].IfIndex, host.LinkChange{To: s.ns, Name: s.link}); err != nil {
			t.Fatal(err)
		}
		w.pods[name] = s
	}
	w.settle(addresses)
	for name, s := range w.pods {
		eventually(t, name+" with a carrier", func() (up bool) {
			inside(t, s.ns, func(h *netlink.Handle) error {
				l, err := h.LinkByName(s.link)
				up = err == nil && l.Attrs().OperState == netlink.OperUp
				return err
			})
			return up
		})
	}
	return w
}

// Of each statement's examples packets between VFs do what they should. Both networks are
// VFs of a card.
func TestLabStatementsAsPackets(t *testing.T) {
	cards := 0
	statementsAsPackets(t, func(_ string, addresses map[string][]netip.Addr) *world {
		cards++
		return vfsOf(t, cards-1, addresses)
	}, 6, func(*station, [2]*policy.Verdicts, uint64) error { return nil })
}

func TestLabUpdatesHaveNoGap(t *testing.T) {
	addresses := map[string][]netip.Addr{}
	for i, name := range []string{"wire", "a", "b"} { // what is around b is nobody's
		addresses[name] = []netip.Addr{netip.AddrFrom4([4]byte{10, 20, 0, byte(8*i + 8)}), netip.MustParseAddr(fmt.Sprintf("fd20::%x", 8*i+8))}
	}
	w := vfsOf(t, 0, addresses)
	for _, s := range w.pods {
		for _, a := range []netip.Addr{s.v4, s.v6} {
			s.serve(a, served)
		}
	}
	noGap(t, w, inPod(t, w.pods["a"]))
}

// servers are VFs that answer at the served ports.
func servers(t *testing.T) *world {
	t.Helper()
	addresses := map[string][]netip.Addr{}
	for i, name := range []string{"wire", "a", "b", "c"} {
		addresses[name] = []netip.Addr{netip.AddrFrom4([4]byte{10, 20, 0, byte(i + 1)}), netip.MustParseAddr(fmt.Sprintf("fd20::%x", i+1))}
	}
	w := vfsOf(t, 0, addresses)
	for _, s := range w.pods {
		for _, a := range []netip.Addr{s.v4, s.v6} {
			s.serve(a, served)
		}
	}
	return w
}

// Of the statements that are no examples, packets between VFs do what they should, too.
func TestLabNP42AndMNP07(t *testing.T) {
	w := servers(t)
	h := inPod(t, w.pods["a"])
	t.Run("NP-42", func(t *testing.T) { np42(t, w, h) })
	t.Run("MNP-07", func(t *testing.T) { mnp07(t, w, h) })
}

// A VF that no policy isolates, and that is held to its addresses.
func TestLabAntiSpoofing(t *testing.T) {
	w := servers(t)
	a := w.pods["a"]
	if err := openPod(t, a).Apply(a.iface(), openTo, openTo, 1); err != nil {
		t.Fatal(err)
	}
	spoofing(t, a, w.pods["wire"], true, false)
}

// Both directions, all protocols, replies, and rules that go.
func TestLabPackets(t *testing.T) {
	w := servers(t)
	a := w.pods["a"]
	pod := openPod(t, a)
	for n, c := range policies(w) {
		t.Run(c.name, func(t *testing.T) {
			w.TB = t
			if err := pod.Apply(a.iface(), c.ingress, c.egress, uint64(n)); err != nil {
				t.Fatal(err)
			}
			w.expect(around(), func(cell cell, source, destination netip.Addr) bool {
				if cell.from == "a" {
					return c.egress.Allows(destination, cell.protocol, cell.port)
				}
				return c.ingress.Allows(source, cell.protocol, cell.port)
			})
		})
	}
	w.TB = t
	if err := pod.Apply(a.iface(), openTo, only(&policy.Ports{All: true}, w.pods["wire"]), 99); err != nil {
		t.Fatal(err)
	}
	packetSockets(t, a, w.pods["wire"])
	if err := errors.Join(pod.DenyAll(a.iface()), pod.Remove(a.link)); err != nil {
		t.Fatal(err)
	}
	w.expect(around(), func(cell, netip.Addr, netip.Addr) bool { return true })
}
