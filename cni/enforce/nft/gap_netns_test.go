package nft

import (
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
)

// holder is one of the two that hold pod a to its policy.
type holder struct {
	*engine
	apply      func(i Interface, ingress, egress *policy.Verdicts, generation uint64) error
	counted    func() (Counted, error)
	generation func() (uint64, error)
}

func (h holder) dropped() (Dropped, error) {
	c, err := h.counted()
	return c.Dropped, err
}

// eachHolder runs f with the tables in the pod, and with those on its parent.
func eachHolder(t *testing.T, f func(t *testing.T, w *world, h holder)) {
	t.Run("pod", func(t *testing.T) {
		w := newWorld(t, "a", "b", "c")
		f(t, w, inPod(t, w.pods["a"]))
	})
	t.Run("parent", func(t *testing.T) {
		w := newWorld(t, "a", "b", "c")
		a := w.pods["a"]
		parent := openParent(t, w)
		f(t, w, holder{parent.engine, parent.Apply, func() (Counted, error) {
			d, err := parent.Dropped(a.mac)
			return Counted{Dropped: d}, err
		}, func() (uint64, error) {
			all, err := parent.Generations()
			return all[a.mac], err
		}})
	})
}

func inPod(t *testing.T, a *station) holder {
	pod := openPod(t, a)
	return holder{pod.engine, pod.Apply, func() (Counted, error) { return pod.Counted(a.iface()) }, func() (uint64, error) {
		g, _, err := pod.Generation(a.iface())
		return g, err
	}}
}

// node says that the pod's node has the addresses: with another one all rules are made anew.
func node(i Interface, addresses ...netip.Addr) Interface {
	i.Node = addresses
	return i
}

// failing makes the operations of numbers k to last of those to come fail, and returns
// whether it did.
func (h holder) failing(k, last int) (failed *bool) {
	seen, real := 0, h.conn.commit
	failed = new(bool)
	h.commit = func(ops []op) error {
		first := max(k-seen, 0)
		if len(ops) > 0 && first < len(ops) && seen <= last {
			*failed = true
			refused := op{do: deleteChain, table: ops[0].table, chain: &chain{name: "not-there"}}
			ops = slices.Insert(slices.Clone(ops), first, refused)
		}
		seen += len(ops)
		return real(ops)
	}
	return failed
}

// A failure anywhere leaves the generation before in force, and the next try works.
func TestEveryFailingOperationLeavesTheOldGeneration(t *testing.T) {
	t.Parallel()
	eachHolder(t, func(t *testing.T, w *world, h holder) {
		a, b, c := w.pods["a"], w.pods["b"], w.pods["c"]
		all := cells([2]string{"b", "a"}, [2]string{"c", "a"}, [2]string{"a", "b"})
		udp := &policy.Ports{UDP: []policy.PortRange{{First: 80, Last: 81}}}
		from, to := by(only(open80, b), "p", "q"), by(only(udp, b, c), "q", "r")
		for _, next := range []Interface{a.iface(), node(a.iface(), w.pods["wire"].v4)} { // in place; a new version
			for k := 0; ; k++ {
				if err := h.apply(a.iface(), from, denied, 1); err != nil {
					t.Fatal(err)
				}
				failed := h.failing(k, k)
				err := h.apply(next, to, denied, 2)
				h.commit = h.conn.commit
				g, readErr := h.generation()
				if readErr != nil {
					t.Fatal(readErr)
				}
				if err != nil {
					if !errors.Is(err, unix.ENOENT) || g != 1 {
						t.Fatalf("operation %d: %v, generation %d", k, err, g)
					}
					if !b.reachesWithin(netip.AddrPort{}, a.v4, 80) || b.reachesWithin(netip.AddrPort{}, a.v6, 81) || c.reachesWithin(netip.AddrPort{}, a.v4, 81) {
						t.Fatalf("operation %d: not as before", k)
					}
				} else if g != 2 {
					t.Fatalf("generation %d after no error", g)
				}
				if err := h.apply(next, to, denied, 3); err != nil {
					t.Fatalf("after failed operation %d: %v", k, err)
				}
				h.hasCounters(t, to)
				if *failed {
					continue
				}
				w.TB = t
				w.expect(all, func(c cell, source, destination netip.Addr) bool {
					return c.from != "a" && to.Allows(source, c.protocol, c.port)
				})
				break
			}
		}
	})
}

// If what was added cannot be taken back either, that is told, and the next try works.
func TestAFailingUndoIsTold(t *testing.T) {
	eachHolder(t, func(t *testing.T, w *world, h holder) {
		a, b := w.pods["a"], w.pods["b"]
		both := &policy.Ports{UDP: []policy.PortRange{{First: 80, Last: 81}}}
		if err := h.apply(a.iface(), only(open80, b), denied, 1); err != nil {
			t.Fatal(err)
		}
		commits := 0
		h.commit = func(ops []op) error {
			if commits++; commits > 1 {
				return errors.New("no more")
			}
			return h.conn.commit(ops)
		}
		err := h.apply(a.iface(), only(both, b), denied, 2)
		h.commit = h.conn.commit
		if err == nil || !strings.Contains(err.Error(), "allowed until policy is put in force again") || commits != 3 {
			t.Errorf("%v after %d commits", err, commits)
		}
		if g, err := h.generation(); g != 1 || err != nil {
			t.Errorf("generation %d, %v", g, err)
		}
		if err := h.apply(a.iface(), only(open80, b), denied, 3); err != nil {
			t.Fatal(err)
		}
		if !b.reachesWithin(netip.AddrPort{}, a.v4, 80) || b.reachesWithin(netip.AddrPort{}, a.v4, 81) {
			t.Error("not what was applied")
		}
	})
}

// While verdicts change, a cell that both the old and the new ones allow is open at each
// instant, and one that both deny is closed. The rules count what they drop, and for policy
// p what begins a connection.
func TestUpdatesHaveNoGap(t *testing.T) {
	t.Parallel()
	eachHolder(t, func(t *testing.T, w *world, h holder) { noGap(t, w, h) })
}

// noGap makes up to 400 changes: in a guest without acceleration one takes a second.
func noGap(t *testing.T, w *world, h holder) {
	t.Helper()
	a, b := w.pods["a"], w.pods["b"]
	draw := func() *policy.Verdicts {
		// Always open: b at port 80. Always closed: b at port 81. What is around b, and
		// what else is allowed with b, changes.
		v := &policy.Verdicts{Isolated: true, Policies: []string{"p", "q"}[:1+rand.IntN(2)]}
		for family := range 2 {
			address := b.address(family)
			ports := &policy.Ports{UDP: []policy.PortRange{{First: uint16(60 + rand.IntN(20)), Last: 80}}}
			share := *ports
			ports.By = []policy.Share{{Policy: "p", Ports: &share}}
			if len(v.Policies) > 1 {
				ports.By = []policy.Share{{Policy: "p", Ports: &policy.Ports{UDP: []policy.PortRange{{First: 80, Last: 80}}}}, {Policy: "q", Ports: &share}}
			}
			first, last := address, address
			for range rand.IntN(3) {
				first = first.Prev()
			}
			for range rand.IntN(3) {
				last = last.Next()
			}
			if rand.IntN(2) == 0 && first != address { // the neighbours apart
				v.Peers = append(v.Peers, policy.PeerRange{First: first, Last: address.Prev(), Ports: open80})
				first = address
			}
			v.Peers = append(v.Peers, policy.PeerRange{First: first, Last: last, Ports: ports})
			if rand.IntN(2) == 0 {
				v.Peers = append(v.Peers, policy.PeerRange{First: last.Next(), Last: last.Next().Next(), Ports: ports})
			}
		}
		return v
	}
	if err := h.apply(a.iface(), draw(), draw(), 0); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	var lost, leaked atomic.Int64
	var open, more, closed [2]atomic.Int64
	for d, ends := range [...][2]*station{policy.Ingress: {b, a}, policy.Egress: {a, b}} {
		for family := range 2 {
			wg.Go(func() {
				for n := 1024; !stop.Load(); n++ {
					own := netip.AddrPortFrom(ends[0].address(family), uint16(n))
					if n < 32768 { // where the kernel chooses none
						open[d].Add(1)
					} else { // may be of a connection that there was
						own = netip.AddrPort{}
						more[d].Add(1)
					}
					if !ends[0].reachesWithin(own, ends[1].address(family), 80) {
						lost.Add(1)
					}
				}
			})
			wg.Go(func() {
				for ; !stop.Load(); time.Sleep(time.Millisecond) { // what may not be sent fails at once
					closed[d].Add(1)
					if ends[0].reachesWithin(netip.AddrPort{}, ends[1].address(family), 81) {
						leaked.Add(1)
					}
				}
			})
		}
	}
	changes := 0
	for end := time.Now().Add(15 * time.Second); changes < 400 && time.Now().Before(end); changes++ {
		i := a.iface()
		if rand.IntN(4) == 0 {
			i = node(i, w.pods["wire"].v4)
		}
		if err := h.apply(i, draw(), draw(), uint64(changes)); err != nil {
			t.Error(err)
			break
		}
		time.Sleep(time.Millisecond)
	}
	stop.Store(true)
	wg.Wait()
	want := Dropped{Ingress: uint64(closed[policy.Ingress].Load()), Egress: uint64(closed[policy.Egress].Load())}
	var got Counted
	for deadline := time.Now().Add(10 * time.Second); got.Dropped != want && time.Now().Before(deadline); { // the last may be under way
		var err error
		if got, err = h.counted(); err != nil {
			t.Fatal(err)
		}
	}
	sent := open[0].Load() + more[0].Load() + open[1].Load() + more[1].Load() + closed[0].Load() + closed[1].Load()
	t.Logf("%d packets over %d changes, %+v", sent, changes, got)
	for d := range open {
		if n := got.Hits[HitsCounter(policy.Direction(d), "p")]; got.Hits != nil && (int64(n) < open[d].Load() || int64(n) > open[d].Load()+more[d].Load()) {
			t.Errorf("%s: %d hits, %d connections, and of %d packets some", policy.Direction(d), n, open[d].Load(), more[d].Load())
		}
	}
	if got.Dropped != want || leaked.Load() > 0 || lost.Load() > 0 || sent < int64(changes) {
		t.Errorf("%d leaked, %d lost, dropped %+v, want %+v", leaked.Load(), lost.Load(), got.Dropped, want)
	}
}

// reachesWithin is reaches for UDP from a socket's address, the zero one for any, with a
// short wait for what is expected to be dropped and a long one for what is not.
func (s *station) reachesWithin(from netip.AddrPort, to netip.Addr, port uint16) bool {
	c, err := s.udp(from, to, port)
	if err != nil {
		return false
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		return false
	}
	patience := 5 * time.Second
	if port == 81 {
		patience = 5 * time.Millisecond
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	var b [1]byte
	_, err = c.Read(b[:])
	return err == nil
}

// udp is a socket for one peer, at an address or the zero one for any.
func (s *station) udp(from netip.AddrPort, to netip.Addr, port uint16) (c *net.UDPConn, err error) {
	err = s.ns.Do(func() (err error) {
		var own *net.UDPAddr
		if from.IsValid() {
			own = net.UDPAddrFromAddrPort(from)
		}
		c, err = net.DialUDP("udp", own, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, port)))
		return err
	})
	return c, err
}
