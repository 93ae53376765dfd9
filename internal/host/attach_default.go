package host

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// SetDefaultRoutes makes the link the way of ns's default routes, for the families
// of the gateways: the default routes of the main table through other links go, and
// those through the gateways come. It can be repeated.
func (a *Attacher) SetDefaultRoutes(ns *Netns, link string, gateways []netip.Addr) error {
	conn, err := a.rtnl(ns)
	if err != nil {
		return err
	}
	handle, err := conn.library()
	if err != nil {
		return err
	}
	l, err := a.Link(ns, link)
	if err != nil {
		return err
	}
	for _, gateway := range gateways {
		family, dst := netlink.FAMILY_V4, net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
		if gateway.Is6() {
			family, dst = netlink.FAMILY_V6, net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		}
		routes, err := handle.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if r.Dst != nil && r.Dst.String() != dst.String() || r.LinkIndex == l.Index {
				continue
			}
			if err := handle.RouteDel(&r); err != nil {
				return fmt.Errorf("delete the default route via %s: %w", r.Gw, err)
			}
		}
		route := Route{Dst: dst, Gateway: gateway.AsSlice()}
		if err := handle.RouteReplace(route.netlink(l.Index)); err != nil {
			return fmt.Errorf("set the default route via %s through %s: %w", gateway, link, err)
		}
	}
	return nil
}
