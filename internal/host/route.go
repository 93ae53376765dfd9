package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// PathLinks lists the indexes of the links of this network namespace that carry
// packets to the addresses, down to the NICs: the link of the route to an
// address, or for an address of this machine the link that has it, the members of
// bonds and bridges, and what VLAN devices and the like stand on. Sorted.
//
// An address without a route is an error that wraps ENETUNREACH or EHOSTUNREACH;
// the links to the others are returned with it.
func (h *Host) PathLinks(ctx context.Context, addresses []net.IP) ([]int, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	list, err := h.links()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	own, err := h.rt.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var errs []error
	var tops []int
	for _, ip := range addresses {
		if i := slices.IndexFunc(own, func(a netlink.Addr) bool { return a.IP.Equal(ip) }); i >= 0 {
			tops = append(tops, own[i].LinkIndex)
			continue
		}
		routes, err := h.rt.RouteGet(ip)
		if err != nil {
			errs = append(errs, fmt.Errorf("find the route to %s: %w", ip, err))
			continue
		}
		for _, r := range routes {
			tops = append(tops, r.LinkIndex)
			for _, hop := range r.MultiPath {
				tops = append(tops, hop.LinkIndex)
			}
		}
	}
	return linksBelow(list, tops), errors.Join(errs...)
}

// linksBelow are the links and all that carry their packets; loopback carries none.
func linksBelow(list []netlink.Link, tops []int) []int {
	const openvswitch = "openvswitch"
	byIndex := make(map[int]netlink.Link, len(list))
	for _, l := range list {
		byIndex[l.Attrs().Index] = l
	}
	kind := func(index int) string {
		if l := byIndex[index]; l != nil {
			return l.Type()
		}
		return ""
	}
	seen := map[int]bool{}
	for todo := slices.Clone(tops); len(todo) > 0; {
		index := todo[0]
		todo = todo[1:]
		l := byIndex[index]
		if l == nil || seen[index] || l.Attrs().RawFlags&unix.IFF_LOOPBACK != 0 {
			continue
		}
		seen[index] = true
		switch a := l.Attrs(); {
		case a.NetNsID >= 0: // what it stands on is in another namespace
		case l.Type() == "veth": // its parent is its peer
		default:
			todo = append(todo, a.ParentIndex)
		}
		if v, ok := l.(*netlink.Vxlan); ok {
			todo = append(todo, v.VtepDevIndex)
		}
		for _, member := range list {
			master := member.Attrs().MasterIndex
			// Which port an internal port of Open vSwitch sends to is known to its
			// daemon only: any may be.
			if master == index || master != 0 && l.Type() == openvswitch && kind(master) == openvswitch {
				todo = append(todo, member.Attrs().Index)
			}
		}
	}
	out := make([]int, 0, len(seen))
	for index := range seen {
		out = append(out, index)
	}
	slices.Sort(out)
	return out
}
