package nft

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/cni/policy"
)

// With Cut each packet is judged by the direction its connection was begun in, and TCP
// that is seen from its middle on passes never.
func TestPodRulesCutWhatVerdictsForbid(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		i := Interface{Name: "net1", Index: 7, MAC: ownMAC, Addresses: ownAddresses, Cut: true}
		verdicts := [2]*policy.Verdicts{drawVerdicts(t, "ingress"), drawVerdicts(t, "egress")}
		k := kernel{}
		r := podRendering(i, verdicts, 3)
		versions(t, k, r, verdicts)
		for range 30 {
			d := policy.Direction(rapid.IntRange(0, 1).Draw(t, "direction"))
			f, peer := drawFlow(t, d)
			p := f.packet()
			base := [2]string{"input", "output"}[d]
			if d == policy.Ingress {
				p.in, p.inName = 7, "net1"
			} else {
				p.out, p.outName = 7, "net1"
			}
			p.state = rapid.SampledFrom([]uint32{1, 2, 4, 8, 64}).Draw(t, "state")
			p.direction = byte(rapid.IntRange(0, 1).Draw(t, "answer"))
			answer := p.direction == 1 && p.state&(2|4|8) != 0
			begins, answers := verdicts[d].Allows(peer, f.protocol, f.destinationPort), verdicts[1-d].Allows(peer, f.protocol, f.sourcePort)
			var want bool
			switch {
			case !verdicts[0].Isolated && !verdicts[1].Isolated:
				want = true
			case (f.protocol == 1 || f.protocol == 58) && p.state == 4:
				want = true
			case f.protocol == policy.TCP && p.state != 2 && f.flags&0x17 != 2:
				want = false
			case f.protocol == policy.SCTP && f.flags == 1: // INIT
				want = begins
			case f.protocol == policy.SCTP && verdicts[d].Isolated:
				// Whoever began it, for a kernel that knows only addresses.
				want = begins || verdicts[1-d].Isolated && answers || !verdicts[1-d].Isolated && p.state == 2
			case answer:
				want = answers
			default:
				want = begins
			}
			var got bool
			var counter string
			counted := k.counts(r.table, func() { got, counter = k.walk(r.table, base, p) })
			wantCounted := hits(verdicts[d], d, peer, f.protocol, f.destinationPort, p.state)
			init := f.protocol == policy.SCTP && f.flags == 1
			answered := answer && f.protocol != policy.SCTP || f.protocol == policy.SCTP && verdicts[1-d].Isolated && answers
			if !got || (p.state == 2 || answered) && !init || (f.protocol == 1 || f.protocol == 58) && p.state == 4 {
				clear(wantCounted) // it begins nothing
			}
			if !maps.Equal(counted, wantCounted) {
				t.Fatalf("%s %+v in state %d, answer %v is counted by %v, should be by %v", d, f, p.state, answer, counted, wantCounted)
			}
			if got != want {
				t.Fatalf("%s %+v in state %d, answer %v: rules say %v, should be %v", d, f, p.state, answer, got, want)
			}
			if want := [2]string{droppedIn, droppedOut}[d]; !got && counter != want {
				t.Fatalf("dropped packet is counted by %q", counter)
			}
			p.in, p.out, p.inName, p.outName = 8*min(p.in, 1), 8*min(p.out, 1), "net2", "net2"
			if got, _ := k.walk(r.table, base, p); !got {
				t.Fatalf("%s %+v of another interface is dropped", d, f)
			}
		}
	})
}

// connection is one between two stations, to port 8080 of the second.
type connection struct {
	from, to string
	ends     [2]net.Conn
}

// connect makes a TCP connection.
func (w *world) connect(from, to string, family int) connection {
	w.Helper()
	at := netip.AddrPortFrom(w.pods[to].address(family), 8080)
	var l net.Listener
	if err := w.pods[to].ns.Do(func() (err error) { l, err = net.Listen("tcp", at.String()); return err }); err != nil {
		w.Fatal(err)
	}
	defer l.Close()
	c := connection{from: from, to: to}
	if err := w.pods[from].ns.Do(func() (err error) { c.ends[0], err = net.DialTimeout("tcp", at.String(), 10*time.Second); return err }); err != nil {
		w.Fatal(err)
	}
	var err error
	if c.ends[1], err = l.Accept(); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { c.ends[0].Close(); c.ends[1].Close() })
	return c
}

// passes says for each end whether it gets what the other one sends.
func (c connection) passes(patience time.Duration) (got [2]bool) {
	var wg sync.WaitGroup
	for end := range c.ends {
		_, _ = c.ends[1-end].Write([]byte("x"))
		wg.Go(func() {
			var b [1]byte
			_ = c.ends[end].SetReadDeadline(time.Now().Add(patience))
			n, _ := c.ends[end].Read(b[:])
			got[end] = n == 1
		})
	}
	wg.Wait()
	return got
}

// When policy forbids what is established, it goes on, or with Cut no byte of it gets
// through any more, in either direction; what is still allowed goes on. The guard on the
// parent knows no connections: if both directions are isolated it ends them anyway.
func TestEstablishedConnectionsWhenPolicyTightens(t *testing.T) {
	t.Parallel()
	ports := &policy.Ports{TCP: []policy.PortRange{{First: 8080, Last: 8080}}, UDP: []policy.PortRange{{First: 80, Last: 80}}}
	for _, cut := range []bool{false, true} {
		for _, guarded := range []bool{false, true} {
			for _, isolated := range [][2]bool{{true, false}, {false, true}, {true, true}} {
				t.Run(fmt.Sprintf("cut=%v parent=%v isolated=%v", cut, guarded, isolated), func(t *testing.T) {
					w := newWorld(t, "a", "b", "c")
					a, b, c := w.pods["a"], w.pods["b"], w.pods["c"]
					i := a.iface()
					i.Cut = cut
					pod, parent := openPod(t, a), openParent(t, w)
					apply := func(generation uint64, peers ...*station) {
						var verdicts [2]*policy.Verdicts
						for d := range verdicts {
							verdicts[d] = openTo
							if isolated[d] {
								verdicts[d] = only(ports, peers...)
							}
						}
						err := pod.Apply(i, verdicts[0], verdicts[1], generation)
						if guarded {
							err = errors.Join(parent.Apply(i, verdicts[0], verdicts[1], generation), err)
						}
						if err != nil {
							t.Fatal(err)
						}
					}
					apply(1, b, c)
					var all []connection
					for _, ends := range [][2]string{{"b", "a"}, {"c", "a"}, {"a", "b"}, {"a", "c"}} {
						for family := range 2 {
							all = append(all, w.connect(ends[0], ends[1], family))
						}
					}
					udp := b.dial("udp", a.v4)
					defer udp.Close()
					if !echoes(udp) {
						t.Fatal("no datagram passes")
					}
					for _, c := range all {
						if got := c.passes(10 * time.Second); got != [2]bool{true, true} {
							t.Fatalf("%s -> %s passes %v", c.from, c.to, got)
						}
					}
					apply(2, c)
					var wg sync.WaitGroup
					for _, c := range all {
						wg.Go(func() {
							d := policy.Ingress
							if c.from == "a" {
								d = policy.Egress
							}
							ends := isolated[d] && slices.Contains([]string{c.from, c.to}, "b") && (cut || guarded && isolated == [2]bool{true, true})
							patience := 10 * time.Second
							if ends {
								patience = 2 * wait
							}
							if got := c.passes(patience); got != [2]bool{!ends, !ends} {
								t.Errorf("%s -> %s: ends get %v, should be cut: %v", c.from, c.to, got, ends)
							}
						})
					}
					wg.Wait()
					datagrams := func(want bool) (got bool) {
						for try := 0; try < 5 && !got && (want || try == 0); try++ { // a busy machine is late
							got = echoes(udp)
						}
						return got
					}
					if want := !isolated[policy.Ingress] || !cut && !(guarded && isolated[policy.Egress]); datagrams(want) != want {
						t.Errorf("datagrams of a flow that was allowed pass: %v, should %v", !want, want)
					}
				})
			}
		}
	}
}

// What was established before anybody tracked connections is not known, and so cut.
func TestCutEndsWhatWasBefore(t *testing.T) {
	w := newWorld(t, "a", "b")
	a, b := w.pods["a"], w.pods["b"]
	before := w.connect("b", "a", 0)
	i := a.iface()
	i.Cut = true
	if err := openPod(t, a).Apply(i, only(&policy.Ports{All: true}, b), openTo, 1); err != nil {
		t.Fatal(err)
	}
	if got := before.passes(2 * wait); got != [2]bool{} {
		t.Errorf("ends get %v", got)
	}
	if got := w.connect("b", "a", 0).passes(10 * time.Second); got != [2]bool{true, true} {
		t.Errorf("a new one: ends get %v", got)
	}
}

// Cut changes nothing for what begins anew.
func TestPodPacketsWithCut(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	a := w.pods["a"]
	pod := openPod(t, a)
	i := a.iface()
	i.Cut = true
	for n, c := range policies(w) {
		t.Run(c.name, func(t *testing.T) {
			w.TB = t
			if err := pod.Apply(i, c.ingress, c.egress, uint64(n)); err != nil {
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
}
