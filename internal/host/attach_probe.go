package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// AddressConflictError says that another station has an address.
type AddressConflictError struct {
	IP  net.IP
	MAC net.HardwareAddr // of the other station
}

// Error names both.
func (e *AddressConflictError) Error() string {
	return fmt.Sprintf("address %s is in use by the station with MAC %s", e.IP, e.MAC)
}

// Probe asks the neighbours of a link of ns, which need not have any of the
// addresses yet, whether they have one: an ARP probe (RFC 5227) for IPv4 and
// the neighbour solicitation of duplicate address detection (RFC 4862) for
// IPv6, once at the beginning and once after half of the time. An answer is an
// *AddressConflictError; so is somebody else's probe for the same address at the
// same time. Without carrier there is nobody to ask, and nothing was asked.
func (a *Attacher) Probe(ctx context.Context, ns *Netns, link string, addresses []net.IPNet, wait time.Duration) (asked bool, err error) {
	l, err := a.Link(ns, link)
	if err != nil || !l.Carrier || len(l.MAC) != 6 {
		return false, err
	}
	f, err := packetSocket(ns, l.Index)
	if err != nil {
		return false, fmt.Errorf("probe %s: %w", link, err)
	}
	defer f.Close()
	for half := 1; half <= 2; half++ {
		for _, address := range addresses {
			if _, err := f.Write(probe(l.MAC, address.IP)); err != nil {
				return false, fmt.Errorf("probe for %s on %s: %w", address.IP, link, err)
			}
		}
		if err := hear(ctx, f, l.MAC, addresses, wait/2); err != nil {
			return false, err
		}
	}
	return true, nil
}

// packetSocket opens a packet socket on a link of ns (packet(7)): what is written are
// whole Ethernet frames, and what is read are all that the link receives, and those to
// all IPv6 nodes, which is where advertisements for a detection go (RFC 4861, 7.2.4).
func packetSocket(ns *Netns, index int) (*os.File, error) {
	var f *os.File
	err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), "packet socket")
		allNodes := unix.PacketMreq{Ifindex: int32(index), Type: unix.PACKET_MR_MULTICAST, Alen: 6, Address: [8]uint8{0x33, 0x33, 0, 0, 0, 1}}
		return errors.Join(
			unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &allNodes),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: index}),
		)
	})
	if err != nil && f != nil {
		f.Close()
	}
	return f, err
}

// hear reads frames until the time is over, or one says that another station has, or
// wants, one of the addresses.
func hear(ctx context.Context, f *os.File, own net.HardwareAddr, addresses []net.IPNet, wait time.Duration) error {
	if err := f.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return fmt.Errorf("wait for answers to a probe: %w", err)
	}
	frame := make([]byte, 256)
	for {
		n, err := f.Read(frame)
		if errors.Is(err, os.ErrDeadlineExceeded) || ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("read answers to a probe: %w", err)
		}
		for _, address := range addresses {
			if mac := claimant(frame[:n], address.IP); mac != nil && !bytes.Equal(mac, own) {
				return &AddressConflictError{address.IP, mac}
			}
		}
	}
}

func htons(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}

// probe is the Ethernet frame that asks who has ip, without claiming any address.
func probe(mac net.HardwareAddr, ip net.IP) []byte {
	if v4 := ip.To4(); v4 != nil {
		frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac...)
		// EtherType ARP, Ethernet, IPv4, lengths 6 and 4, request
		frame = append(frame, 0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1)
		frame = append(append(frame, mac...), 0, 0, 0, 0)
		return append(append(frame, make([]byte, 6)...), v4...)
	}
	ip = ip.To16()
	// the solicited-node multicast address (RFC 4291, 2.7.1)
	group := append(net.ParseIP("ff02::1:ff00:0")[:13:13], ip[13:]...)
	icmp := append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, ip...)
	binary.BigEndian.PutUint16(icmp[2:], checksum(net.IPv6unspecified, group, icmp))

	frame := append([]byte{0x33, 0x33, 0xff}, ip[13:]...)
	frame = append(frame, mac...)
	// EtherType IPv6, version 6, payload length, ICMPv6, hop limit 255
	frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(icmp)), unix.IPPROTO_ICMPV6, 255)
	frame = append(append(frame, net.IPv6unspecified...), group...)
	return append(frame, icmp...)
}

// claimant returns the MAC of the station that says in the frame that it has ip,
// or asks whether it may take it; nil for all other frames.
func claimant(frame []byte, ip net.IP) net.HardwareAddr {
	if len(frame) < 14 {
		return nil
	}
	kind, body := binary.BigEndian.Uint16(frame[12:]), frame[14:]
	station := func(b []byte) net.HardwareAddr { return net.HardwareAddr(bytes.Clone(b[:6])) }
	if v4 := ip.To4(); v4 != nil {
		// Ethernet, IPv4, lengths 6 and 4
		if kind != unix.ETH_P_ARP || len(body) < 28 || !bytes.Equal(body[:6], []byte{0, 1, 0x08, 0, 6, 4}) {
			return nil
		}
		sender, target := body[14:18], body[24:28]
		if bytes.Equal(sender, v4) || bytes.Equal(sender, []byte{0, 0, 0, 0}) && bytes.Equal(target, v4) {
			return station(body[8:])
		}
		return nil
	}
	if kind != unix.ETH_P_IPV6 || len(body) < 64 || body[6] != unix.IPPROTO_ICMPV6 || body[7] != 255 || !bytes.Equal(body[48:64], ip.To16()) {
		return nil
	}
	const solicitation, advertisement = 135, 136
	if body[40] == advertisement || body[40] == solicitation && net.IP(body[8:24]).IsUnspecified() {
		return station(frame[6:])
	}
	return nil
}
