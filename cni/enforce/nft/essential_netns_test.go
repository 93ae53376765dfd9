package nft

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
)

// A pod that may do nothing still has neighbours, and DHCP if its addresses come so. Nothing
// else passes that policy did not allow: who answers for the link's other stations, or
// gives out addresses, is not the pod.
func TestEssentialTraffic(t *testing.T) {
	eachHolder(t, func(t *testing.T, w *world, h holder) {
		a, wire := w.pods["a"], w.pods["wire"]
		guard := strings.HasSuffix(t.Name(), "/parent")
		routers, nodes := netip.MustParseAddr("ff02::2"), netip.MustParseAddr("ff02::1")
		none4, none6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
		// Another one than the pod's packets go to: they are no answers.
		server4, server6 := netip.MustParseAddr("10.20.9.9"), netip.MustParseAddr("fd20::99")
		ports := func(from, to uint16) []byte {
			b := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from), to)
			return append(b, 0, 12, 0, 0, 'd', 'a', 't', 'a')
		}
		icmp := func(kind byte, target netip.Addr) []byte {
			return slices.Concat([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice())
		}
		const never, always, withDHCP, guarded = 0, 1, 2, 3 // guarded: the parent, which knows no connections, lets it through
		frames := []struct {
			name   string
			out    bool
			frame  []byte
			passes int
			arp    bool
		}{
			{"ARP request", true, arpFrame(a.mac, a.mac, wire.mac, a.v4, wire.v4), always, true},
			{"ARP reply", false, arpFrame(wire.mac, wire.mac, a.mac, wire.v4, a.v4), always, true},
			{"another's ARP reply", true, arpFrame(a.mac, a.mac, wire.mac, wire.v4, wire.v4), never, true},
			{"UDP", true, ipFrame(a.mac, wire.mac, a.v4, wire.v4, 17, 64, ports(7, 9)), never, false},
			{"UDP", false, ipFrame(wire.mac, a.mac, wire.v6, a.v6, 17, 64, ports(7, 9)), never, false},
			{"echo request", true, ipFrame(a.mac, wire.mac, a.v4, wire.v4, 1, 64, icmp(8, none4)), never, false},
			{"echo request", false, ipFrame(wire.mac, a.mac, wire.v6, a.v6, 58, 255, icmp(128, none6)), never, false},
			{"IGMP report", true, ipFrame(a.mac, wire.mac, a.v4, wire.v4, 2, 1, icmp(0x16, none4)), never, false},

			{"neighbour solicitation", true, ipFrame(a.mac, wire.mac, a.v6, wire.v6, 58, 255, icmp(135, wire.v6)), always, false},
			{"neighbour solicitation", false, ipFrame(wire.mac, a.mac, wire.v6, a.v6, 58, 255, icmp(135, a.v6)), always, false},
			{"neighbour solicitation from elsewhere", false, ipFrame(wire.mac, a.mac, wire.v6, a.v6, 58, 64, icmp(135, a.v6)), never, false},
			{"neighbour advertisement", true, ipFrame(a.mac, wire.mac, a.v6, wire.v6, 58, 255, icmp(136, a.v6)), always, false},
			{"neighbour advertisement", false, ipFrame(wire.mac, a.mac, wire.v6, a.v6, 58, 255, icmp(136, wire.v6)), always, false},
			{"another's neighbour advertisement", true, ipFrame(a.mac, wire.mac, a.v6, wire.v6, 58, 255, icmp(136, wire.v6)), never, false},
			{"router solicitation", true, ipFrame(a.mac, wire.mac, a.v6, routers, 58, 255, icmp(133, none6)), always, false},
			{"router solicitation", false, ipFrame(wire.mac, a.mac, wire.v6, a.v6, 58, 255, icmp(133, none6)), never, false},
			{"router advertisement", false, ipFrame(wire.mac, a.mac, wire.v6, a.v6, 58, 255, icmp(134, none6)), always, false},
			{"router advertisement", true, ipFrame(a.mac, wire.mac, a.v6, nodes, 58, 255, icmp(134, none6)), never, false},
			{"redirect", false, ipFrame(wire.mac, a.mac, wire.v6, a.v6, 58, 255, icmp(137, wire.v6)), never, false},
			{"redirect", true, ipFrame(a.mac, wire.mac, a.v6, wire.v6, 58, 255, icmp(137, wire.v6)), never, false},
			{"MLD query", false, ipFrame(wire.mac, a.mac, wire.v6, a.v6, 58, 1, icmp(130, none6)), always, false},
			{"MLD query", true, ipFrame(a.mac, wire.mac, a.v6, nodes, 58, 1, icmp(130, none6)), never, false},
			{"MLD report", true, ipFrame(a.mac, wire.mac, a.v6, routers, 58, 1, icmp(131, nodes)), always, false},
			{"MLD done", true, ipFrame(a.mac, wire.mac, a.v6, routers, 58, 1, icmp(132, nodes)), always, false},
			{"MLDv2 report", true, ipFrame(a.mac, wire.mac, a.v6, routers, 58, 1, icmp(143, none6)), always, false},
			{"MLDv2 report", false, ipFrame(wire.mac, a.mac, wire.v6, a.v6, 58, 1, icmp(143, none6)), never, false},

			{"DHCP client", true, ipFrame(a.mac, wire.mac, a.v4, wire.v4, 17, 64, ports(68, 67)), withDHCP, false},
			{"DHCP server", false, ipFrame(wire.mac, a.mac, server4, a.v4, 17, 64, ports(67, 68)), withDHCP, false},
			{"DHCP server", true, ipFrame(a.mac, wire.mac, a.v4, wire.v4, 17, 64, ports(67, 68)), never, false},
			{"DHCP client", false, ipFrame(wire.mac, a.mac, server4, a.v4, 17, 64, ports(68, 67)), never, false},
			{"DHCPv6 client", true, ipFrame(a.mac, wire.mac, a.v6, wire.v6, 17, 64, ports(546, 547)), withDHCP, false},
			{"DHCPv6 server", false, ipFrame(wire.mac, a.mac, server6, a.v6, 17, 64, ports(547, 546)), withDHCP, false},
			{"DHCPv6 server", true, ipFrame(a.mac, wire.mac, a.v6, wire.v6, 17, 64, ports(547, 546)), never, false},
			{"DHCPv6 client", false, ipFrame(wire.mac, a.mac, server6, a.v6, 17, 64, ports(546, 547)), never, false},

			{"fragmentation needed, of nothing", false, ipFrame(wire.mac, a.mac, wire.v4, a.v4, 1, 64, icmp(3, none4)), guarded, false},
			{"fragmentation needed, of nothing", true, ipFrame(a.mac, wire.mac, a.v4, wire.v4, 1, 64, icmp(3, none4)), guarded, false},
			{"redirect of IPv4", false, ipFrame(wire.mac, a.mac, wire.v4, a.v4, 1, 64, icmp(5, none4)), never, false},
			{"packet too big, of nothing", false, ipFrame(wire.mac, a.mac, wire.v6, a.v6, 58, 64, icmp(2, none6)), guarded, false},
			{"packet too big, of nothing", true, ipFrame(a.mac, wire.mac, a.v6, wire.v6, 58, 64, icmp(2, none6)), guarded, false},
		}
		for _, dhcp := range []bool{false, true} {
			i := a.iface()
			i.DHCP = dhcp
			if err := h.apply(i, denied, denied, 1); err != nil {
				t.Fatal(err)
			}
			for _, c := range frames {
				name := c.name + map[bool]string{true: " out", false: " in"}[c.out]
				want := c.passes == always || c.passes == withDHCP && dhcp || c.passes == guarded && guard
				send := func(frame []byte, arp bool) {
					switch {
					case !c.out:
						inject(t, wire, frame, false)
					case guard || arp:
						inject(t, a, frame, false)
					default: // packet sockets pass the output hook by
						sendIP(t, a, frame[14:])
					}
				}
				before, err := h.dropped()
				if err != nil {
					t.Fatal(err)
				}
				send(c.frame, c.arp)
				// Frames come in order: this one is dropped, and when it has been the other one
				// has come or has been dropped.
				marker := ipFrame(wire.mac, a.mac, wire.v4, a.v4, 17, 64, ports(7, 9))
				if c.out {
					marker = ipFrame(a.mac, wire.mac, a.v4, wire.v4, 17, 64, ports(7, 9))
				}
				send(marker, false)
				drops := func(d Dropped) uint64 { return d.Ingress + d.Egress + d.Spoofed }
				marked := func(d Dropped) uint64 { return map[bool]uint64{true: d.Egress, false: d.Ingress}[c.out] }
				after := before
				for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
					if after, err = h.dropped(); err != nil {
						t.Fatal(err)
					}
					if marked(after) > marked(before) && (want || drops(after) > drops(before)+1) {
						break
					}
				}
				if n := drops(after) - drops(before); n != map[bool]uint64{true: 1, false: 2}[want] {
					t.Errorf("%s, DHCP %v: %d were dropped, should pass: %v", name, dhcp, n, want)
				}
			}
		}
	})
}

// Errors about what is allowed pass both ways, whatever else is not: the port is not
// served, the packet is too big.
func TestErrorsOfWhatIsAllowed(t *testing.T) {
	w := newWorld(t, "a", "b")
	a, b := w.pods["a"], w.pods["b"]
	pod, parent := openPod(t, a), openParent(t, w)
	udp := &policy.Ports{UDP: []policy.PortRange{{First: 70, Last: 70}}} // nobody answers there
	put := func(ingress, egress *policy.Verdicts, generation uint64) {
		t.Helper()
		if err := errors.Join(parent.Apply(a.iface(), ingress, egress, generation), pod.Apply(a.iface(), ingress, egress, generation)); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(from, to *station, family int) bool {
		return errors.Is(from.ask(t, to.address(family), 70), syscall.ECONNREFUSED)
	}
	for family := range 2 {
		put(only(udp, b), denied, 1)
		if !refused(b, a, family) {
			t.Errorf("family %d: the pod's error about a packet that it got is dropped", family)
		}
		put(denied, only(udp, b), 2)
		if !refused(a, b, family) {
			t.Errorf("family %d: the error about the pod's packet is dropped", family)
		}
		put(denied, denied, 3)
		if refused(a, b, family) || refused(b, a, family) {
			t.Errorf("family %d: there is an error about what should be dropped", family)
		}
		// Too big for a router on the way, which says so; another time of a flow that is not.
		put(denied, only(open80, b), 4)
		before, err := pod.dropped(a.iface())
		if err != nil {
			t.Fatal(err)
		}
		for _, sport := range []uint16{a.flowTo(t, b.address(family), 80), 9} {
			quoted := flow{source: a.address(family), destination: b.address(family), protocol: 17, sourcePort: sport, destinationPort: 80}.packet()
			quote := slices.Concat(quoted.network, quoted.transport[:8])
			if family == 0 {
				binary.BigEndian.PutUint16(quote[2:], 28)
				quote[8] = 64
				inject(t, b, ipFrame(b.mac, a.mac, b.v4, a.v4, 1, 64, checked(nil, slices.Concat([]byte{3, 4, 0, 0, 0, 0, 5, 0}, quote))), false)
			} else {
				binary.BigEndian.PutUint16(quote[4:], 8)
				quote[6] = 17
				message := slices.Concat([]byte{2, 0, 0, 0, 0, 0, 5, 0}, quote)
				pseudo := slices.Concat(b.v6.AsSlice(), a.v6.AsSlice(), binary.BigEndian.AppendUint32(nil, uint32(len(message))), []byte{0, 0, 0, 58})
				inject(t, b, ipFrame(b.mac, a.mac, b.v6, a.v6, 58, 64, checked(pseudo, message)), false)
			}
			after := before
			for end := time.Now().Add(10 * time.Second); sport == 9 && after == before && time.Now().Before(end); {
				if after, err = pod.dropped(a.iface()); err != nil {
					t.Fatal(err)
				}
			}
			// Frames come in order, so that when the second has been dropped the first has not.
			if want := before.Ingress + 1; sport == 9 && after.Ingress != want {
				t.Errorf("family %d: %d errors were dropped, want the one of no flow", family, after.Ingress-before.Ingress)
			}
		}
	}
}

// ask sends a datagram to a port and returns the error that comes back, if any.
func (s *station) ask(t testing.TB, to netip.Addr, port uint16) error {
	t.Helper()
	c := must(s.udp(netip.AddrPort{}, to, port))
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Now().Add(wait))
	_, err := c.Read(make([]byte, 1))
	return err
}

// flowTo begins a flow that is answered, and returns its port.
func (s *station) flowTo(t testing.TB, to netip.Addr, port uint16) uint16 {
	t.Helper()
	c := must(s.udp(netip.AddrPort{}, to, port))
	t.Cleanup(func() { c.Close() })
	if !echoes(c) {
		t.Fatalf("%s does not answer", to)
	}
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

func ipFrame(mac, to [6]byte, source, destination netip.Addr, protocol, hops uint8, payload []byte) []byte {
	p := flow{source: source, destination: destination, protocol: protocol, sourceMAC: mac, destinationMAC: to}.packet()
	if source.Is6() {
		p.network[6], p.network[7] = protocol, hops
		binary.BigEndian.PutUint16(p.network[4:], uint16(len(payload)))
	} else {
		binary.BigEndian.PutUint16(p.network[2:], uint16(20+len(payload)))
		p.network[8] = hops
		copy(p.network[10:], checksum(p.network))
	}
	return slices.Concat(p.link, p.network, payload)
}

func arpFrame(mac, sender, to [6]byte, address, asked netip.Addr) []byte {
	return slices.Concat(to[:], mac[:], []byte(etherARP), []byte{0, 1, 8, 0, 6, 4, 0, 2}, sender[:], address.AsSlice(), to[:], asked.AsSlice())
}

// checked is an ICMP message with its checksum.
func checked(pseudo, message []byte) []byte {
	copy(message[2:], checksum(slices.Concat(pseudo, message)))
	return message
}

// checksum is the Internet's, RFC 1071, of an even number of bytes.
func checksum(b []byte) []byte {
	sum := uint32(0)
	for ; len(b) > 0; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return binary.BigEndian.AppendUint16(nil, ^uint16(sum))
}

// sendIP sends a packet from a raw socket, through the output hook. One that is refused there
// is dropped.
func sendIP(t testing.TB, s *station, packet []byte) {
	t.Helper()
	family, level, option := unix.AF_INET, unix.IPPROTO_IP, unix.IP_HDRINCL
	var to unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte(packet[16:20])}
	if packet[0]>>4 == 6 {
		family, level, option = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_HDRINCL
		to = &unix.SockaddrInet6{Addr: [16]byte(packet[24:40]), ZoneId: uint32(s.index)}
	}
	if err := s.ns.Do(func() error {
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := errors.Join(unix.SetsockoptInt(fd, level, option, 1), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1)); err != nil {
			return err
		}
		return unix.Sendto(fd, packet, 0, to)
	}); err != nil && !errors.Is(err, unix.EPERM) {
		t.Fatal(err)
	}
}
