package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
)

// only is the verdict map that allows peers, all their addresses, these ports.
func only(p *policy.Ports, peers ...*station) *policy.Verdicts {
	v := &policy.Verdicts{Isolated: true}
	for family := range 2 {
		for _, s := range peers {
			v.Peers = append(v.Peers, policy.PeerRange{First: s.address(family), Last: s.address(family), Ports: p})
		}
	}
	slices.SortFunc(v.Peers, func(a, b policy.PeerRange) int { return a.First.Compare(b.First) })
	return v
}

var (
	open80 = &policy.Ports{TCP: []policy.PortRange{{First: 80, Last: 80}}, UDP: []policy.PortRange{{First: 80, Last: 80}}, SCTP: []policy.PortRange{{First: 80, Last: 80}}}
	openTo = &policy.Verdicts{}
)

func (p *Pod) dropped(i Interface) (Dropped, error) {
	c, err := p.Counted(i)
	return c.Dropped, err
}

func openPod(t testing.TB, s *station) *Pod {
	t.Helper()
	p, err := OpenPod(s.ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// policies are pairs of verdict maps for a pod whose peers are b and the wire.
func policies(w *world) []struct {
	name            string
	ingress, egress *policy.Verdicts
} {
	return []struct {
		name            string
		ingress, egress *policy.Verdicts
	}{
		{"NP-01 not isolated", openTo, openTo},
		{"NP-02 NP-03 NP-05 NP-32 NP-33 ingress isolated, one peer's port", only(open80, w.pods["b"]), openTo},
		{"NP-02 NP-05 egress isolated, two peers' port", openTo, only(open80, w.pods["b"], w.pods["wire"])},
		{"NP-05 both isolated", only(open80, w.pods["b"]), only(open80, w.pods["wire"])},
		{"NP-11 NP-13 nothing allowed", denied, denied},
		{"NP-15 NP-41 all of one peer", only(&policy.Ports{All: true}, w.pods["wire"]), denied},
	}
}

// around are all cells to and from a.
func around() []cell {
	return cells([2]string{"a", "b"}, [2]string{"b", "a"}, [2]string{"a", "wire"}, [2]string{"wire", "a"}, [2]string{"c", "a"})
}

func TestPodPackets(t *testing.T) {
	w := newWorld(t, "a", "b", "c")
	a := w.pods["a"]
	pod := openPod(t, a)
	all := around()
	generation := uint64(0)
	for _, c := range policies(w) {
		t.Run(c.name, func(t *testing.T) {
			w.TB = t
			generation++
			if err := pod.Apply(a.iface(), c.ingress, c.egress, generation); err != nil {
				t.Fatal(err)
			}
			w.expect(all, func(cell cell, source, destination netip.Addr) bool {
				if cell.from == "a" {
					return c.egress.Allows(destination, cell.protocol, cell.port)
				}
				return c.ingress.Allows(source, cell.protocol, cell.port)
			})
			// NP-06
			if !a.reaches(a.v4, policy.TCP, 80) || !a.reaches(a.v6, policy.UDP, 80) {
				t.Error("the pod does not reach itself")
			}
			if got, held, err := pod.Generation(a.iface()); err != nil || !held || got != generation {
				t.Errorf("generation %d, %v, %v; applied %d", got, held, err, generation)
			}
		})
	}
	w.TB = t
	if err := pod.Remove("net1"); err != nil {
		t.Fatal(err)
	}
	if there := append(must(pod.conn.tables(1)), must(pod.conn.tables(5))...); len(there) > 0 {
		t.Errorf("tables %v are left", there)
	}
	w.expect(all, func(cell, netip.Addr, netip.Addr) bool { return true })
}

// NP-07: traffic with the pod's own node passes, whatever policy says.
func TestNP07Node(t *testing.T) {
	w := newWorld(t, "a", "b")
	a, b := w.pods["a"], w.pods["b"]
	i := a.iface()
	i.Node = []netip.Addr{b.v4, b.v6}
	pod := openPod(t, a)
	if err := pod.Apply(i, denied, denied, 1); err != nil {
		t.Fatal(err)
	}
	w.expect(cells([2]string{"a", "b"}, [2]string{"b", "a"}, [2]string{"wire", "a"}, [2]string{"a", "wire"}), func(c cell, _, _ netip.Addr) bool {
		return c.from == "b" || c.to == "b"
	})
}

// Deny-all is in force before the interface is there, and is what it meets.
func TestDenyAllComesFirst(t *testing.T) {
	w := newWorld(t, "a", "b")
	a := w.pods["a"]
	pod := openPod(t, a)
	i := a.iface()
	i.Index, i.Addresses, i.AnyAddress = 0, nil, true
	for _, name := range []string{"net1", "net2"} { // net2 is yet to come
		i.Name = name
		if err := pod.DenyAll(i); err != nil {
			t.Fatal(err)
		}
	}
	all := cells([2]string{"a", "b"}, [2]string{"b", "a"})
	w.expect(all, func(cell, netip.Addr, netip.Addr) bool { return false })
	if g, held, err := pod.Generation(i); g != 0 || !held || err != nil {
		t.Errorf("generation %d, %v, %v", g, held, err)
	}
	if err := pod.Apply(a.iface(), openTo, openTo, 1); err != nil {
		t.Fatal(err)
	}
	w.expect(all, func(cell, netip.Addr, netip.Addr) bool { return true })
}

// A rename inside the pod changes nothing.
func TestARenamedInterfaceIsHeld(t *testing.T) {
	w := newWorld(t, "a", "b")
	a := w.pods["a"]
	if err := openPod(t, a).Apply(a.iface(), denied, denied, 1); err != nil {
		t.Fatal(err)
	}
	rename(t, a, "other")
	w.expect(cells([2]string{"a", "b"}, [2]string{"b", "a"}), func(cell, netip.Addr, netip.Addr) bool { return false })
}

// Who starts anew finds what is in force, and replaces it; what others made stays.
func TestAdoptionAndForeignTables(t *testing.T) {
	w := newWorld(t, "a", "b")
	a := w.pods["a"]
	foreign := "table inet filter {\n\tchain input {\n\t\ttype filter hook input priority filter; policy accept;\n\t\tip saddr 192.0.2.1 drop\n\t}\n}\n"
	nft(t, a, foreign)
	for generation := range uint64(3) {
		pod := openPod(t, a)
		if generation > 0 {
			if got, held, err := pod.Generation(a.iface()); got != generation-1 || !held || err != nil {
				t.Errorf("generation %d, %v, %v", got, held, err)
			}
		}
		if err := pod.Apply(a.iface(), only(open80, w.pods["b"]), denied, generation); err != nil {
			t.Fatal(err)
		}
		pod.Close()
	}
	if rules := nft(t, a, "list table inet sluice-net1"); strings.Count(rules, "chain v") != 7 || strings.Count(rules, "map v") != 12 {
		t.Errorf("not one version:\n%s", rules)
	}
	w.expect(cells([2]string{"b", "a"}), func(c cell, _, _ netip.Addr) bool { return c.port == 80 })
	pod := openPod(t, a)
	if err := errors.Join(pod.Remove("net1"), pod.Remove("net1")); err != nil {
		t.Fatal(err)
	}
	if rules := nft(t, a, "list ruleset"); rules != foreign {
		t.Errorf("left is\n%s", rules)
	}
}

// What nft lists of the table that judges connections it can read, so that whoever saves
// and restores a namespace's rules can.
func TestNftReadsWhatItLists(t *testing.T) {
	w := newWorld(t, "a", "b")
	a := w.pods["a"]
	pod := openPod(t, a)
	for _, verdicts := range [][2]*policy.Verdicts{{by(only(open80, w.pods["b"]), "p", "q"), denied}, {openTo, by(only(&policy.Ports{All: true}, w.pods["b"]), "p")}} {
		for _, cut := range []bool{false, true} {
			i := a.iface()
			i.Cut, i.DHCP, i.Node = cut, true, []netip.Addr{w.pods["wire"].v4}
			if err := pod.Apply(i, verdicts[0], verdicts[1], 1); err != nil {
				t.Fatal(err)
			}
			listed := nft(t, a, "list table inet sluice-net1")
			nft(t, a, "delete table inet sluice-net1\n"+listed)
			if again := nft(t, a, "list table inet sluice-net1"); again != listed {
				t.Errorf("listed\n%s\nread as\n%s", listed, again)
			}
		}
	}
}

// nft runs the tool in the station's namespace, as a second reader and a stranger.
func nft(t testing.TB, s *station, commands string) string {
	t.Helper()
	var out []byte
	if err := s.ns.Do(func() (err error) {
		c := exec.Command("nft", "-f", "-")
		c.Stdin = strings.NewReader(commands)
		out, err = c.CombinedOutput()
		return err
	}); err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
	return string(out)
}

// What a pod sends of its own making is held to its MAC and addresses, sent past the
// queues or not.
func TestAntiSpoofing(t *testing.T) {
	w := newWorld(t, "a")
	a, wire := w.pods["a"], w.pods["wire"]
	pod := openPod(t, a)
	for name, ingress := range map[string]*policy.Verdicts{"isolated": only(&policy.Ports{All: true}, wire), "held": openTo} {
		t.Run(name, func(t *testing.T) {
			if err := pod.Apply(a.iface(), ingress, openTo, 1); err != nil {
				t.Fatal(err)
			}
			spoofing(t, a, wire, true, ingress.Isolated)
		})
	}
	if n, err := pod.dropped(a.iface()); err != nil || n.Spoofed < 20 || n.Ingress+n.Egress != 0 {
		t.Errorf("dropped %+v, %v", n, err)
	}
}

// spoofing sends frames of all sorts from a. On the parent other MACs pass: they may be
// those of others.
func spoofing(t *testing.T, a, wire *station, macHeld, isolated bool) {
	t.Helper()
	catch := packetSocket(t, wire)
	other4, other6 := netip.MustParseAddr("10.20.7.7"), netip.MustParseAddr("fd20::77")
	otherMAC := [6]byte{2, 7, 7, 7, 7, 7}
	linkLocal := netip.MustParseAddr("fe80::abcd")
	ip := func(mac [6]byte, source, destination netip.Addr, protocol uint8, payload []byte) []byte {
		return ipFrame(mac, wire.mac, source, destination, protocol, 255, payload)
	}
	udpTo := func(from, to uint16) []byte {
		return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from), to)
	}
	nd := func(kind byte, target netip.Addr) []byte {
		return slices.Concat([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice())
	}
	arp := func(mac, sender [6]byte, address netip.Addr) []byte {
		return arpFrame(mac, sender, wire.mac, address, wire.v4)
	}
	tagged := func(b []byte) []byte { return slices.Concat(b[:12], []byte{0x81, 0, 0, 5}, b[12:]) }
	data := func() []byte { return append(udpTo(1, 9), make([]byte, 8)...) }
	for i, c := range []struct {
		name   string
		frame  []byte
		passes bool
	}{
		{"own IPv4", ip(a.mac, a.v4, wire.v4, 17, data()), true},
		{"own IPv6", ip(a.mac, a.v6, wire.v6, 17, data()), true},
		{"link-local", ip(a.mac, linkLocal, wire.v6, 17, data()), true},
		{"another's IPv4", ip(a.mac, other4, wire.v4, 17, data()), false},
		{"another's IPv6", ip(a.mac, other6, wire.v6, 17, data()), false},
		{"another's MAC", ip(otherMAC, a.v4, wire.v4, 17, data()), !macHeld},
		{"another's MAC, IPv6", ip(otherMAC, a.v6, wire.v6, 17, data()), !macHeld},
		{"tagged", tagged(ip(a.mac, a.v4, wire.v4, 17, data())), false},
		{"no source, no DHCP", ip(a.mac, netip.IPv4Unspecified(), wire.v4, 17, append(udpTo(68, 67), make([]byte, 8)...)), false},
		{"no source, UDP", ip(a.mac, netip.IPv6Unspecified(), wire.v6, 17, data()), false},
		{"duplicate address detection", ip(a.mac, netip.IPv6Unspecified(), wire.v6, 58, nd(135, a.v6)), true},
		{"neighbour advertisement", ip(a.mac, a.v6, wire.v6, 58, nd(136, a.v6)), true},
		{"another's neighbour advertisement", ip(a.mac, a.v6, wire.v6, 58, nd(136, other6)), false},
		{"router advertisement", ip(a.mac, linkLocal, wire.v6, 58, nd(134, a.v6)), false},
		{"redirect", ip(a.mac, linkLocal, wire.v6, 58, nd(137, a.v6)), false},
		{"ARP", arp(a.mac, a.mac, a.v4), true},
		{"ARP probe", arp(a.mac, a.mac, netip.IPv4Unspecified()), true},
		{"ARP of another's address", arp(a.mac, a.mac, other4), false},
		{"ARP of another's MAC", arp(a.mac, otherMAC, a.v4), false},
		{"another protocol", slices.Concat(wire.mac[:], a.mac[:], []byte{0x88, 0xcc}, make([]byte, 60)), !isolated},
		{"another's MAC, another protocol", slices.Concat(wire.mac[:], otherMAC[:], []byte{0x88, 0xcc}, make([]byte, 60)), !macHeld},
		{"tagged twice", slices.Concat(wire.mac[:], a.mac[:], []byte{0x88, 0xa8, 0, 0}, make([]byte, 60)), false},
	} {
		for _, bypass := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s bypass=%v", c.name, bypass), func(t *testing.T) {
				got := comes(t, a, catch, fmt.Sprintf("%d %v.", i, bypass), c.frame, bypass, func(end string) {
					inject(t, a, append(ip(a.mac, a.v4, wire.v4, 17, data()), end...), false)
				})
				// A frame past the queues may match nothing of the link layer.
				if got && !c.passes || !got && c.passes && !bypass {
					t.Errorf("passes %v, should %v", got, c.passes)
				}
			})
		}
	}
}

// Packet sockets send past the stack, where egress policy holds. Of a pod that has one they
// send ARP, even to whom the policy allows; other sockets send what it allows.
func TestPacketSocketsUnderPolicy(t *testing.T) {
	w := newWorld(t, "a")
	a, wire := w.pods["a"], w.pods["wire"]
	pod := openPod(t, a)
	if err := pod.Apply(a.iface(), openTo, only(&policy.Ports{All: true}, wire), 1); err != nil {
		t.Fatal(err)
	}
	packetSockets(t, a, wire)
	if n, err := pod.Counted(a.iface()); err != nil || n.Egress < 4 || n.Ingress+n.Spoofed != 0 {
		t.Errorf("dropped %+v, %v", n, err)
	}
}

func packetSockets(t *testing.T, a, wire *station) {
	t.Helper()
	catch := packetSocket(t, wire)
	judged := a.dial("udp", wire.v4)
	defer judged.Close()
	for i, c := range []struct {
		name   string
		frame  []byte
		passes bool
	}{
		{"IPv4", ipFrame(a.mac, wire.mac, a.v4, wire.v4, 17, 255, make([]byte, 12)), false},
		{"IPv6", ipFrame(a.mac, wire.mac, a.v6, wire.v6, 17, 255, make([]byte, 12)), false},
		{"ARP", arpFrame(a.mac, a.mac, wire.mac, a.v4, wire.v4), true},
	} {
		for _, bypass := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s bypass=%v", c.name, bypass), func(t *testing.T) {
				got := comes(t, a, catch, fmt.Sprintf("raw %d %v.", i, bypass), c.frame, bypass, func(end string) {
					if _, err := judged.Write([]byte(end)); err != nil {
						t.Fatal(err)
					}
				})
				// A frame past the queues may match nothing of the link layer.
				if got && !c.passes || !got && c.passes && !bypass {
					t.Errorf("passes %v, should %v", got, c.passes)
				}
			})
		}
	}
}

// comes says whether a frame that a sends is caught. What then sends is caught after it, but
// of the first it is not known: of frames that it receives at once the kernel gives those of
// a protocol that nobody knows to packet sockets last (__netif_receive_skb_list_core).
func comes(t *testing.T, a *station, catch func(time.Duration) (string, bool), name string, frame []byte, bypass bool, then func(end string)) (got bool) {
	t.Helper()
	mark := "mark " + name
	inject(t, a, append(slices.Clone(frame), mark...), bypass)
	for _, end := range []string{"end " + name, "last " + name} {
		then(end)
		for caught := ""; !strings.Contains(caught, end); got = got || strings.Contains(caught, mark) {
			var ok bool
			if caught, ok = catch(5 * time.Second); !ok {
				t.Fatal("what was sent after it did not come")
			}
		}
	}
	return got
}

// packetSocket returns what receives the next frame that comes to a station.
func packetSocket(t testing.TB, s *station) func(time.Duration) (string, bool) {
	t.Helper()
	fd := packetFD(t, s, unix.ETH_P_ALL)
	return func(patience time.Duration) (string, bool) {
		tv := unix.NsecToTimeval(patience.Nanoseconds())
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
		b := make([]byte, 2048)
		n, _, err := unix.Recvfrom(fd, b, 0)
		return string(b[:max(n, 0)]), err == nil
	}
}

func packetFD(t testing.TB, s *station, protocol uint16) int {
	t.Helper()
	fd := -1
	if err := s.ns.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol<<8 | protocol>>8, Ifindex: s.index})
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// inject sends a frame from a raw socket of the station. There is one for all frames:
// to close one takes the kernel long.
func inject(t testing.TB, s *station, frame []byte, bypass bool) {
	t.Helper()
	fd, open := s.senders[bypass]
	if !open {
		fd = packetFD(s.world.TB, s, 0) // as long as the world
		if s.senders == nil {
			s.senders = map[bool]int{}
		}
		s.senders[bypass] = fd
		if bypass {
			if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: s.index}); err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EPERM) {
		t.Fatal(err)
	}
}
