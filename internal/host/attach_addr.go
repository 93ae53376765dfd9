package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Route is a route through one link.
type Route struct {
	Dst      net.IPNet
	Gateway  net.IP // nil: on link
	MTU      int    // 0: the link's
	AdvMSS   int    // 0: the kernel's choice
	Priority int    // 0: the kernel's choice
	Table    int    // 0: main
	Scope    *int   // nil: universe with a gateway, link without
	Src      net.IP // nil: the kernel's choice
	OnLink   bool   // the gateway is a neighbour, whatever the routes say
}

// PrepareIPv6 makes a link of ns ready for IPv6 addresses: IPv6 on, and where
// the kernel offers it, addresses that can be used while duplicate address
// detection is running (RFC 4429). Only the first is required.
func (a *Attacher) PrepareIPv6(ns *Netns, link string) error {
	return ns.Do(func() error {
		dir := filepath.Join("/proc/sys/net/ipv6/conf", filepath.Base(link))
		disabled := filepath.Join(dir, "disable_ipv6")
		if v, err := readText(disabled); err != nil {
			return fmt.Errorf("prepare IPv6: %w", err)
		} else if v != "0" {
			if err := os.WriteFile(disabled, []byte("0"), 0o644); err != nil {
				return fmt.Errorf("switch IPv6 on: %w", err)
			}
		}
		// An option of the kernel; and /proc/sys is read-only in some containers.
		_ = os.WriteFile(filepath.Join(dir, "optimistic_dad"), []byte("1"), 0o644)
		return nil
	})
}

// RefuseAdvertisedDefault keeps a link of ns from taking the default route that
// routers advertise (IPv6), where /proc/sys can be written to: netlink has no way to
// set it.
func (a *Attacher) RefuseAdvertisedDefault(ns *Netns, link string) error {
	return ns.Do(func() error {
		_ = os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", filepath.Base(link), "accept_ra_defrtr"), []byte("0"), 0o644)
		return nil
	})
}

// AddAddress adds an address to a link of ns. An IPv6 address for which Probe has asked
// can be used at once; for others the kernel asks (RFC 4862), which takes it a second or two.
func (a *Attacher) AddAddress(ns *Netns, index int, address net.IPNet, asked bool) error {
	conn, err := a.rtnl(ns)
	if err != nil {
		return err
	}
	family, ip, ones := familyOf(address)
	msg := nl.NewIfAddrmsg(family)
	msg.Index, msg.Prefixlen = uint32(index), uint8(ones)
	data := []nl.NetlinkRequestData{msg, nl.NewRtAttr(unix.IFA_LOCAL, ip), nl.NewRtAttr(unix.IFA_ADDRESS, ip)}
	switch {
	case family == unix.AF_INET && ones < 31: // RFC 3021
		broadcast := bytes.Clone(ip)
		for i, m := range net.CIDRMask(ones, 32) {
			broadcast[i] |= ^m
		}
		data = append(data, nl.NewRtAttr(unix.IFA_BROADCAST, broadcast))
	case family == unix.AF_INET:
	case asked:
		msg.Flags = unix.IFA_F_NODAD
	default:
		// The kernel drops the flag when optimistic detection is off.
		msg.Flags = unix.IFA_F_OPTIMISTIC
	}
	if _, err := conn.request(unix.RTM_NEWADDR, create, data...); err != nil {
		return fmt.Errorf("add address %s: %w", address.String(), err)
	}
	return nil
}

// familyOf is a network's address family, its address as the kernel writes it, and the
// length of its prefix.
func familyOf(n net.IPNet) (family int, ip []byte, ones int) {
	ones, bits := n.Mask.Size()
	if v4 := n.IP.To4(); v4 != nil {
		if bits == 128 {
			ones -= 96 // an IPv4 address written as IPv6
		}
		return unix.AF_INET, v4, ones
	}
	return unix.AF_INET6, n.IP.To16(), ones
}

// WaitIPv6 waits until the IPv6 addresses of a link can be used, that is until
// duplicate address detection has ended or runs optimistically. The error names
// an address that somebody else has. The end of the context is no error: without
// carrier detection does not even start.
func (a *Attacher) WaitIPv6(ctx context.Context, ns *Netns, index int) error {
	err := poll(ctx, func() (bool, error) {
		addrs, err := a.addresses(ns, index, netlink.FAMILY_V6)
		if err != nil {
			return false, err
		}
		for _, addr := range addrs {
			if addr.Flags&unix.IFA_F_DADFAILED != 0 {
				return false, fmt.Errorf("address %s is in use by another host (duplicate address detection failed)", addr.IPNet)
			}
			if addr.Flags&unix.IFA_F_TENTATIVE != 0 && addr.Flags&unix.IFA_F_OPTIMISTIC == 0 {
				return false, nil
			}
		}
		return true, nil
	})
	if errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}

func (a *Attacher) addresses(ns *Netns, index, family int) ([]netlink.Addr, error) {
	conn, err := a.rtnl(ns)
	if err != nil {
		return nil, err
	}
	handle, err := conn.library()
	if err != nil {
		return nil, err
	}
	addrs, err := handle.AddrList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}, family)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	return addrs, nil
}

// Addresses lists the addresses of a link of ns.
func (a *Attacher) Addresses(ns *Netns, index int) ([]net.IPNet, error) {
	addrs, err := a.addresses(ns, index, netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	out := make([]net.IPNet, len(addrs))
	for i, addr := range addrs {
		out[i] = *addr.IPNet
	}
	return out, nil
}

// OwnAddresses lists the addresses by which others know the host.
func (a *Attacher) OwnAddresses() ([]netip.Addr, error) {
	conn, err := a.rtnl(nil)
	if err != nil {
		return nil, err
	}
	handle, err := conn.library()
	if err != nil {
		return nil, err
	}
	all, err := handle.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the host's addresses: %w", err)
	}
	var own []netip.Addr
	for _, a := range all {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.IsGlobalUnicast() {
			own = append(own, ip.Unmap())
		}
	}
	return own, nil
}

// AddRoute adds a route through a link of ns.
func (a *Attacher) AddRoute(ns *Netns, index int, r Route) error {
	conn, err := a.rtnl(ns)
	if err != nil {
		return err
	}
	if err := conn.addRoute(index, r); err != nil {
		return fmt.Errorf("add route to %s via %s: %w", r.Dst.String(), r.Gateway, err)
	}
	return nil
}

func (r *rtnl) addRoute(index int, route Route) error {
	family, dst, ones := familyOf(route.Dst)
	msg := nl.NewRtMsg() // of table main, static
	msg.Family, msg.Dst_len = uint8(family), uint8(ones)
	if route.OnLink {
		msg.Flags = unix.RTNH_F_ONLINK
	}
	switch {
	case route.Scope != nil:
		msg.Scope = uint8(*route.Scope)
	case len(route.Gateway) == 0:
		msg.Scope = unix.RT_SCOPE_LINK
	}
	data := []nl.NetlinkRequestData{msg, nl.NewRtAttr(unix.RTA_DST, dst), nl.NewRtAttr(unix.RTA_OIF, u32(uint32(index)))}
	if route.Table != 0 {
		msg.Table = unix.RT_TABLE_UNSPEC
		data = append(data, nl.NewRtAttr(unix.RTA_TABLE, u32(uint32(route.Table))))
	}
	for kind, ip := range map[int]net.IP{unix.RTA_GATEWAY: route.Gateway, unix.RTA_PREFSRC: route.Src} {
		if len(ip) == 0 {
			continue
		}
		if v4 := ip.To4(); v4 != nil {
			ip = v4
		}
		data = append(data, nl.NewRtAttr(kind, ip))
	}
	if route.Priority != 0 {
		data = append(data, nl.NewRtAttr(unix.RTA_PRIORITY, u32(uint32(route.Priority))))
	}
	metrics := nl.NewRtAttr(unix.RTA_METRICS, nil)
	for kind, value := range map[int]int{unix.RTAX_MTU: route.MTU, unix.RTAX_ADVMSS: route.AdvMSS} {
		if value != 0 {
			metrics.AddRtAttr(kind, u32(uint32(value)))
		}
	}
	if metrics.Len() > unix.SizeofRtAttr {
		data = append(data, metrics)
	}
	_, err := r.request(unix.RTM_NEWROUTE, create, data...)
	return err
}

// HasRoute tells whether ns has the route through the link, whatever its metrics;
// index 0 is any link.
func (a *Attacher) HasRoute(ns *Netns, index int, r Route) (bool, error) {
	conn, err := a.rtnl(ns)
	if err != nil {
		return false, err
	}
	handle, err := conn.library()
	if err != nil {
		return false, err
	}
	want := r.netlink(index)
	if want.Table == 0 {
		want.Table = unix.RT_TABLE_MAIN
	}
	family := netlink.FAMILY_V4
	if r.Dst.IP.To4() == nil {
		family = netlink.FAMILY_V6
	}
	// The destination is compared here: the library's filter takes 0.0.0.0/0 for
	// "no destination" on some versions.
	filter := netlink.RT_FILTER_TABLE
	if index != 0 {
		filter |= netlink.RT_FILTER_OIF
	}
	routes, err := handle.RouteListFiltered(family, want, filter)
	if err != nil {
		return false, fmt.Errorf("list routes: %w", err)
	}
	for _, have := range routes {
		dst := net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		if family == netlink.FAMILY_V4 {
			dst = net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
		}
		if have.Dst != nil {
			dst = *have.Dst
		}
		if dst.String() == r.Dst.String() && (len(r.Gateway) == 0 || have.Gw.Equal(r.Gateway)) {
			return true, nil
		}
	}
	return false, nil
}

func (r Route) netlink(index int) *netlink.Route {
	out := &netlink.Route{
		LinkIndex: index, Dst: &r.Dst, Gw: r.Gateway,
		MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority, Table: r.Table, Src: r.Src,
	}
	if r.OnLink {
		out.Flags = unix.RTNH_F_ONLINK
	}
	switch {
	case r.Scope != nil:
		out.Scope = netlink.Scope(*r.Scope)
	case len(r.Gateway) == 0:
		out.Scope = netlink.SCOPE_LINK
	}
	return out
}

// Announce tells the neighbours of a link of ns that its addresses are at its
// MAC now: a gratuitous ARP (RFC 5227) for IPv4 and an unsolicited neighbour
// advertisement (RFC 4861) for IPv6. It waits for carrier for at most 200 ms and
// then sends anyway.
func (a *Attacher) Announce(ctx context.Context, ns *Netns, link string, addresses []net.IPNet) error {
	wait, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	var l Netdev
	err := poll(wait, func() (bool, error) {
		var err error
		l, err = a.Link(ns, link)
		return l.Carrier, err
	})
	if err != nil && !errors.Is(err, wait.Err()) {
		return err
	}
	if len(l.MAC) != 6 {
		return fmt.Errorf("announce %s: its hardware address %q is no MAC", link, l.MAC)
	}
	return ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("announce %s: %w", link, err)
		}
		defer unix.Close(fd)
		var errs []error
		for _, address := range addresses {
			frame := announcement(l.MAC, address.IP)
			if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Index, Halen: 6}); err != nil {
				errs = append(errs, fmt.Errorf("announce %s on %s: %w", address.IP, link, err))
			}
		}
		return errors.Join(errs...)
	})
}

// announcement is the Ethernet frame that tells everybody where ip is.
func announcement(mac net.HardwareAddr, ip net.IP) []byte {
	if v4 := ip.To4(); v4 != nil {
		frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac...)
		// EtherType ARP, Ethernet, IPv4, lengths 6 and 4, request
		frame = append(frame, 0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1)
		frame = append(append(frame, mac...), v4...)
		return append(append(frame, make([]byte, 6)...), v4...)
	}
	allNodes := net.ParseIP("ff02::1")
	// type 136, override flag, target, option 2: target link-layer address
	icmp := append([]byte{136, 0, 0, 0, 0x20, 0, 0, 0}, ip.To16()...)
	icmp = append(append(icmp, 2, 1), mac...)
	binary.BigEndian.PutUint16(icmp[2:], checksum(ip, allNodes, icmp))

	frame := append([]byte{0x33, 0x33, 0, 0, 0, 1}, mac...)
	// EtherType IPv6, version 6, payload length, ICMPv6, hop limit 255
	frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(icmp)), unix.IPPROTO_ICMPV6, 255)
	frame = append(append(frame, ip.To16()...), allNodes...)
	return append(frame, icmp...)
}

// checksum is the ICMPv6 checksum with its pseudo header (RFC 4443, RFC 8200).
// All parts have an even length.
func checksum(src, dst net.IP, payload []byte) uint16 {
	sum := uint32(len(payload)) + unix.IPPROTO_ICMPV6
	for _, part := range [][]byte{src.To16(), dst.To16(), payload} {
		for i := 0; i+1 < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
