package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// A world is a node with a parent link p0 on a wire, MacVLAN pods on it, and a station
// at the wire's other end, all namespaces of this machine's kernel.
type world struct {
	testing.TB
	node *host.Netns
	pods map[string]*station
}

// station is a pod, or the station on the wire.
type station struct {
	world *world
	name  string
	ns    *host.Netns
	link  string
	index int
	mac   [6]byte
	v4    netip.Addr
	v6    netip.Addr

	senders map[bool]int // sockets that inject has opened
}

// wait is how long a packet may take, before what should pass is tried again. One that is
// dropped costs as long.
var wait = 500 * time.Millisecond

func newNetns(t testing.TB) *host.Netns {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	var ns *host.Netns
	here, err := host.OpenNetns("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	if err := here.Do(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		ns, err = host.OpenNetns("/proc/thread-self/ns/net")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ns.Close)
	inside(t, ns, func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		return h.LinkSetUp(lo)
	})
	return ns
}

// inside runs f with a handle in the namespace.
func inside(t testing.TB, ns *host.Netns, f func(*netlink.Handle) error) {
	t.Helper()
	if err := ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return f(h)
	}); err != nil {
		t.Fatal(err)
	}
}

// file is the namespace's, for the kernel's messages.
func file(t testing.TB, ns *host.Netns) *os.File {
	t.Helper()
	var f *os.File
	if err := ns.Do(func() (err error) { f, err = os.Open("/proc/thread-self/ns/net"); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// newWorld makes a node with MacVLAN pods of the given names, and station "wire", which
// answer at the served ports.
func newWorld(t testing.TB, pods ...string) *world {
	t.Helper()
	addresses := map[string][]netip.Addr{}
	for i, name := range append([]string{"wire"}, pods...) {
		addresses[name] = []netip.Addr{netip.AddrFrom4([4]byte{10, 20, 0, byte(i + 1)}), netip.MustParseAddr(fmt.Sprintf("fd20::%x", i+1))}
	}
	w := newWorldOf(t, addresses)
	for _, s := range w.pods {
		for _, a := range []netip.Addr{s.v4, s.v6} {
			s.serve(a, served)
		}
	}
	// A link that is up may not send yet.
	deadline := time.Now().Add(30 * time.Second)
	for _, name := range pods {
		for family := range 2 {
			for s := w.pods[name]; !s.reaches(w.pods["wire"].address(family), policy.UDP, 80); {
				if time.Now().After(deadline) {
					t.Fatalf("%s does not reach the wire", name)
				}
			}
		}
	}
	return w
}

// newWorldOf makes a node with MacVLAN pods that have addresses, of which the first of
// each family are their own ones, and station "wire".
func newWorldOf(t testing.TB, addresses map[string][]netip.Addr) *world {
	t.Helper()
	w := &world{TB: t, node: newNetns(t), pods: map[string]*station{}}
	wire := newNetns(t)
	inside(t, w.node, func(h *netlink.Handle) error {
		if err := h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "p0", Flags: net.FlagUp}, PeerName: "wire", PeerNamespace: netlink.NsFd(int(file(t, wire).Fd()))}); err != nil {
			return err
		}
		for name := range addresses {
			if name == "wire" {
				continue
			}
			p0, err := h.LinkByName("p0")
			if err != nil {
				return err
			}
			ns := newNetns(t)
			w.pods[name] = &station{world: w, name: name, ns: ns, link: "net1"}
			if err := h.LinkAdd(&netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "net1", ParentIndex: p0.Attrs().Index, Namespace: netlink.NsFd(int(file(t, ns).Fd()))}, Mode: netlink.MACVLAN_MODE_BRIDGE}); err != nil {
				return err
			}
		}
		return nil
	})
	w.pods["wire"] = &station{world: w, name: "wire", ns: wire, link: "wire"}
	w.settle(addresses)
	return w
}

// settle gives the stations their addresses, and says that all others are on the link.
func (w *world) settle(addresses map[string][]netip.Addr) {
	w.Helper()
	t := w.TB
	for name, s := range w.pods {
		inside(t, s.ns, func(h *netlink.Handle) error {
			l, err := h.LinkByName(s.link)
			if err != nil {
				return err
			}
			s.index = l.Attrs().Index
			copy(s.mac[:], l.Attrs().HardwareAddr)
			for _, a := range addresses[name] {
				address := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(16, 32)}}
				own := &s.v4
				if a.Is6() {
					address, own = &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}, &s.v6
				}
				if !own.IsValid() {
					*own = a
				}
				if err := h.AddrAdd(l, address); err != nil {
					return err
				}
			}
			if err := h.LinkSetUp(l); err != nil {
				return err
			}
			for _, all := range []*net.IPNet{{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, {IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}} {
				if err := h.RouteAdd(&netlink.Route{LinkIndex: s.index, Dst: all, Scope: netlink.SCOPE_LINK}); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

// iface is the station as enforcement sees it.
func (s *station) iface() Interface {
	i := Interface{Name: s.link, Index: s.index, MAC: s.mac}
	for _, a := range []netip.Addr{s.v4, s.v6} {
		if a.IsValid() {
			i.Addresses = append(i.Addresses, a)
		}
	}
	return i
}

func (s *station) address(family int) netip.Addr { return [2]netip.Addr{s.v4, s.v6}[family] }

// The ports that stations answer at.
var served = []uint16{80, 81, 443}

// serve answers on TCP and UDP with what it gets, and SCTP's INIT by INIT ACK.
func (s *station) serve(a netip.Addr, ports []uint16) {
	t := s.world.TB
	for _, port := range ports {
		at := netip.AddrPortFrom(a, port)
		var l *net.TCPListener
		var u *net.UDPConn
		if err := s.ns.Do(func() (err error) {
			if l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at)); err == nil {
				u, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close(); u.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					var b [65536]byte
					for {
						n, err := c.Read(b[:])
						if err != nil {
							return
						}
						_, _ = c.Write(b[:n])
					}
				}()
			}
		}()
		go func() {
			var b [1500]byte
			for {
				n, from, err := u.ReadFromUDPAddrPort(b[:])
				if err != nil && errors.Is(err, net.ErrClosed) {
					return
				}
				if err == nil {
					_, _ = u.WriteToUDPAddrPort(b[:n], from)
				}
			}
		}()
	}
	raw := s.raw(a, "132")
	go func() {
		var b [1500]byte
		for {
			n, from, err := raw.ReadFromIP(b[:])
			if err != nil {
				return
			}
			if n < 32 || b[12] != 1 { // only INIT
				continue
			}
			_, _ = raw.WriteToIP(sctpPacket(binary.BigEndian.Uint16(b[2:]), binary.BigEndian.Uint16(b[:]), 2, binary.BigEndian.Uint32(b[16:])), from)
		}
	}()
}

// raw is a raw socket of the station for a protocol.
func (s *station) raw(a netip.Addr, protocol string) *net.IPConn {
	var c *net.IPConn
	kind := "ip4:"
	if a.Is6() {
		kind = "ip6:"
	}
	if err := s.ns.Do(func() (err error) {
		c, err = net.ListenIP(kind+protocol, &net.IPAddr{IP: a.AsSlice()})
		return err
	}); err != nil {
		s.world.Fatal(err)
	}
	s.world.Cleanup(func() { c.Close() })
	return c
}

// sctpPacket is INIT (1) or INIT ACK (2), with its checksum (RFC 9260).
func sctpPacket(from, to uint16, chunk byte, tag uint32) []byte {
	b := make([]byte, 32)
	binary.BigEndian.PutUint16(b, from)
	binary.BigEndian.PutUint16(b[2:], to)
	if chunk == 2 {
		binary.BigEndian.PutUint32(b[4:], tag)
	}
	b[12] = chunk
	binary.BigEndian.PutUint16(b[14:], 20)
	binary.BigEndian.PutUint32(b[16:], 77)
	binary.BigEndian.PutUint32(b[20:], 65536)
	b[25], b[27] = 1, 1
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

var pings struct {
	sync.Mutex
	port uint16
}

// reaches says whether the station gets an answer from an address: to a TCP connection,
// a UDP datagram, an SCTP INIT, each at a port, or an ICMP echo request.
func (s *station) reaches(to netip.Addr, protocol uint8, port uint16) bool {
	own := s.v4
	if to.Is6() {
		own = s.v6
	}
	return s.reachesFrom(own, to, protocol, port)
}

func (s *station) reachesFrom(own, to netip.Addr, protocol uint8, port uint16) bool {
	at := netip.AddrPortFrom(to, port)
	switch protocol {
	case policy.TCP, policy.UDP:
		var c net.Conn
		if s.ns.Do(func() (err error) {
			c, err = (&net.Dialer{Timeout: wait, LocalAddr: map[uint8]net.Addr{policy.TCP: &net.TCPAddr{IP: own.AsSlice()}, policy.UDP: &net.UDPAddr{IP: own.AsSlice()}}[protocol]}).
				Dial(map[uint8]string{policy.TCP: "tcp", policy.UDP: "udp"}[protocol], at.String())
			return err
		}) != nil {
			return false
		}
		defer c.Close()
		return echoes(c)
	}
	pings.Lock()
	pings.port++
	id := 20000 + pings.port
	pings.Unlock()
	var raw *net.IPConn
	var ask []byte
	var answers func([]byte) bool
	if protocol == policy.SCTP {
		raw, ask = s.raw(own, "132"), sctpPacket(id, port, 1, 0)
		answers = func(b []byte) bool { return len(b) > 12 && binary.BigEndian.Uint16(b[2:]) == id && b[12] == 2 }
	} else {
		ask = []byte{8, 0, 0, 0, byte(id >> 8), byte(id), 0, 1}
		kind, reply := "1", byte(0)
		if to.Is6() {
			kind, ask[0], reply = "58", 128, 129
		} else {
			sum := ^(uint32(0x0800) + uint32(id) + 1)
			for sum>>16 != 0xffff {
				sum = ^((^sum)>>16 + (^sum)&0xffff)
			}
			binary.BigEndian.PutUint16(ask[2:], uint16(sum))
		}
		raw = s.raw(own, kind)
		answers = func(b []byte) bool { return len(b) >= 8 && b[0] == reply && binary.BigEndian.Uint16(b[4:]) == id }
	}
	defer raw.Close()
	if _, err := raw.WriteToIP(ask, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return false
	}
	_ = raw.SetReadDeadline(time.Now().Add(wait))
	var b [1500]byte
	for {
		n, _, err := raw.ReadFromIP(b[:])
		if err != nil {
			return false
		}
		if answers(b[:n]) {
			return true
		}
	}
}

// echoes says whether what is sent comes back.
func echoes(c net.Conn) bool {
	_ = c.SetDeadline(time.Now().Add(wait))
	if _, err := c.Write([]byte("x")); err != nil {
		return false
	}
	var b [1]byte
	n, err := c.Read(b[:])
	return n == 1 && err == nil
}

// cell is one thing to try.
type cell struct {
	from, to string
	protocol uint8
	port     uint16
}

const icmpProtocol = 1

// cells are all pairs of the stations, all protocols, at two ports.
func cells(pairs ...[2]string) (all []cell) {
	for _, p := range pairs {
		for _, protocol := range []uint8{policy.TCP, policy.UDP, policy.SCTP} {
			for _, port := range []uint16{80, 81} {
				all = append(all, cell{p[0], p[1], protocol, port})
			}
		}
		all = append(all, cell{p[0], p[1], icmpProtocol, 0})
	}
	return all
}

// expect tries all cells at once, in both families, and holds them to want. What
// should pass is tried again.
func (w *world) expect(all []cell, want func(c cell, source, destination netip.Addr) bool) {
	w.Helper()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var wrong []string
	for _, c := range all {
		for family := range 2 {
			wg.Go(func() {
				from, to := w.pods[c.from], w.pods[c.to]
				want := want(c, from.address(family), to.address(family))
				got := from.reaches(to.address(family), c.protocol, c.port)
				for try := 0; want && !got && try < 20; try++ { // a busy machine is late
					got = from.reaches(to.address(family), c.protocol, c.port)
				}
				if got != want {
					mu.Lock()
					defer mu.Unlock()
					wrong = append(wrong, fmt.Sprintf("%s %s -> %s %s, protocol %d port %d: passes %v, should %v", c.from, from.address(family), c.to, to.address(family), c.protocol, c.port, got, want))
				}
			})
		}
	}
	wg.Wait()
	if wrong != nil {
		w.Errorf("%d wrong:\n%s", len(wrong), strings.Join(wrong, "\n"))
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func rename(t testing.TB, s *station, name string) {
	t.Helper()
	inside(t, s.ns, func(h *netlink.Handle) error {
		l, err := h.LinkByName(s.link)
		if err != nil {
			return err
		}
		return errors.Join(h.LinkSetDown(l), h.LinkSetName(l, name), h.LinkSetUp(l),
			h.AddrReplace(l, &netlink.Addr{IPNet: &net.IPNet{IP: s.v6.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}))
	})
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("did not happen: %s", what)
		}
	}
}
