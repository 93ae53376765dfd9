package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// DefaultLink is the name of the link that ns sends packets to the outside
// through, empty when it has no default route.
func (a *Attacher) DefaultLink(ns *Netns) (string, error) {
	conn, err := a.rtnl(ns)
	if err != nil {
		return "", err
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := conn.defaults(family)
		if err != nil {
			return "", err
		}
		if len(routes) > 0 {
			links, err := conn.link(unix.RTM_GETLINK, routes[0].LinkIndex, nil, withoutCounters)
			if err == nil && len(links) == 0 {
				err = unix.ENODEV
			}
			if err != nil {
				return "", fmt.Errorf("find the link of the default route: %w", err)
			}
			return netdevFrom(links[0]).Name, nil
		}
	}
	return "", nil
}

// defaults lists the default routes of the main table, the preferred first.
func (r *rtnl) defaults(family int) ([]netlink.Route, error) {
	handle, err := r.library()
	if err != nil {
		return nil, err
	}
	routes, err := handle.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	routes = slices.DeleteFunc(routes, func(r netlink.Route) bool {
		ones := 0
		if r.Dst != nil {
			ones, _ = r.Dst.Mask.Size()
		}
		return ones != 0 || r.LinkIndex == 0 || r.Type != unix.RTN_UNICAST
	})
	slices.SortStableFunc(routes, func(a, b netlink.Route) int { return a.Priority - b.Priority })
	return routes, nil
}

// HasDefaultRoute tells whether another link of ns than index has the default
// route of an address family.
func (a *Attacher) HasDefaultRoute(ns *Netns, index int, v6 bool) (bool, error) {
	conn, err := a.rtnl(ns)
	if err != nil {
		return false, err
	}
	family := netlink.FAMILY_V4
	if v6 {
		family = netlink.FAMILY_V6
	}
	routes, err := conn.defaults(family)
	return slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.LinkIndex != index }), err
}

// AddNeighbour says for good which MAC ip has on a link of ns.
func (a *Attacher) AddNeighbour(ns *Netns, index int, ip net.IP, mac net.HardwareAddr) error {
	conn, err := a.rtnl(ns)
	if err != nil {
		return err
	}
	handle, err := conn.library()
	if err != nil {
		return err
	}
	if err := handle.NeighSet(&netlink.Neigh{LinkIndex: index, State: unix.NUD_PERMANENT, IP: ip, HardwareAddr: mac}); err != nil {
		return fmt.Errorf("set MAC of neighbour %s to %s: %w", ip, mac, err)
	}
	return nil
}

// Source is the address that the host takes for packets to the outside, nil when
// it has no way there.
func (a *Attacher) Source(v6 bool) (net.IP, error) {
	conn, err := a.rtnl(nil)
	if err != nil {
		return nil, err
	}
	outside := net.IPv4(192, 0, 2, 1) // RFC 5737
	if v6 {
		outside = net.ParseIP("2001:db8::1") // RFC 3849
	}
	handle, err := conn.library()
	if err != nil {
		return nil, err
	}
	routes, err := handle.RouteGet(outside)
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ask for the way to the outside: %w", err)
	}
	for _, r := range routes {
		if r.Src != nil {
			return r.Src, nil
		}
	}
	return nil, nil
}

// The per-link settings of IPv4 that are used here: their numbers in
// IFLA_INET_CONF (linux/ip.h).
const (
	confRPFilter    = 8
	confARPAnnounce = 18
	confARPIgnore   = 19
)

// ownAddresses are the settings of a link that does not answer for the addresses
// of other links, nor speak with them, and takes packets whatever link their
// answer would leave by. The last is what the source rules are for; strict reverse
// path filtering would not see them for packets it has to judge by the main table.
var ownAddresses = map[uint16]uint32{confARPIgnore: 1, confARPAnnounce: 2, confRPFilter: 2}

// KeepToOwnAddresses makes a link of ns answer ARP requests for its own addresses
// only, use only these in its own, and not drop what comes in by it for the
// sake of routes: arp_ignore 1, arp_announce 2, rp_filter 2. By netlink, for /proc/sys is
// read-only in containers.
func (a *Attacher) KeepToOwnAddresses(ns *Netns, index int) error {
	conn, err := a.rtnl(ns)
	if err != nil {
		return err
	}
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC|unix.NLA_F_NESTED, nil)
	conf := spec.AddRtAttr(unix.AF_INET|unix.NLA_F_NESTED, nil).AddRtAttr(inetConf|unix.NLA_F_NESTED, nil)
	for number, value := range ownAddresses {
		conf.AddRtAttr(int(number), u32(value))
	}
	if _, err := conn.link(unix.RTM_SETLINK, index, nil, spec); err != nil {
		return fmt.Errorf("set arp_ignore, arp_announce and rp_filter: %w", err)
	}
	return nil
}

const inetConf = 1 // IFLA_INET_CONF

// KeepsToOwnAddresses tells whether the settings of KeepToOwnAddresses are there.
func (a *Attacher) KeepsToOwnAddresses(ns *Netns, index int) (bool, error) {
	conn, err := a.rtnl(ns)
	if err != nil {
		return false, err
	}
	msgs, err := conn.link(unix.RTM_GETLINK, index, nil)
	if err != nil {
		return false, fmt.Errorf("read settings of the link: %w", err)
	}
	for _, m := range msgs {
		if len(m) < unix.SizeofIfInfomsg {
			continue
		}
		spec, _ := attribute(m[unix.SizeofIfInfomsg:], unix.IFLA_AF_SPEC)
		inet, _ := attribute(spec, unix.AF_INET)
		// An array of 32-bit values, the first of which has number 1.
		values, _ := attribute(inet, inetConf)
		for number, want := range ownAddresses {
			if at := 4 * (int(number) - 1); len(values) < at+4 || binary.NativeEndian.Uint32(values[at:]) != want {
				return false, nil
			}
		}
		return len(values) > 0, nil
	}
	return false, nil
}

// rulePriority is that of the rules that AddSourceRule makes: before the main
// table's (32766).
const rulePriority = 32000

// leadsTo are the attributes of such a rule, but for the addresses.
func leadsTo(table int) []nl.NetlinkRequestData {
	return []nl.NetlinkRequestData{nl.NewRtAttr(nl.FRA_TABLE, u32(uint32(table))), nl.NewRtAttr(nl.FRA_PRIORITY, u32(rulePriority))}
}

// hostNet is the network of ip alone.
func hostNet(ip net.IP) *net.IPNet {
	if v4 := ip.To4(); v4 != nil {
		return &net.IPNet{IP: v4, Mask: net.CIDRMask(32, 32)}
	}
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(128, 128)}
}

// AddSourceRule makes packets from ip look in the table first.
func (a *Attacher) AddSourceRule(ns *Netns, ip net.IP, table int) error {
	conn, err := a.rtnl(ns)
	if err != nil {
		return err
	}
	family, src, ones := familyOf(*hostNet(ip))
	msg := nl.NewRtMsg()
	msg.Family, msg.Src_len, msg.Table = uint8(family), uint8(ones), unix.RT_TABLE_UNSPEC
	if _, err := conn.request(unix.RTM_NEWRULE, create, append([]nl.NetlinkRequestData{msg, nl.NewRtAttr(nl.FRA_SRC, src)}, leadsTo(table)...)...); err != nil {
		return fmt.Errorf("add rule from %s lookup %d: %w", ip, table, err)
	}
	return nil
}

// HasSourceRule tells whether ns has the rule.
func (a *Attacher) HasSourceRule(ns *Netns, ip net.IP, table int) (bool, error) {
	rules, err := a.sourceRules(ns, table)
	return slices.ContainsFunc(rules, func(r netlink.Rule) bool {
		return r.Src != nil && r.Src.String() == hostNet(ip).String()
	}), err
}

// DeleteSourceRules deletes the rules that lead to the table.
func (a *Attacher) DeleteSourceRules(ns *Netns, table int) error {
	conn, err := a.rtnl(ns)
	if err != nil {
		return err
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		msg := &nl.RtMsg{RtMsg: unix.RtMsg{Family: family}}
		// Each request deletes one: the first that is like it.
		for err = nil; err == nil; {
			_, err = conn.request(unix.RTM_DELRULE, unix.NLM_F_ACK, append([]nl.NetlinkRequestData{msg}, leadsTo(table)...)...)
		}
		if !errors.Is(err, unix.ENOENT) && !noRules(err) {
			return fmt.Errorf("delete rules that lookup %d: %w", table, err)
		}
	}
	return nil
}

// noRules tells the error of a kernel without IPv6, or without policy routing for it.
func noRules(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

func (a *Attacher) sourceRules(ns *Netns, table int) ([]netlink.Rule, error) {
	conn, err := a.rtnl(ns)
	if err != nil {
		return nil, err
	}
	handle, err := conn.library()
	if err != nil {
		return nil, err
	}
	var all []netlink.Rule
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := handle.RuleListFiltered(family, &netlink.Rule{Table: table}, netlink.RT_FILTER_TABLE)
		if noRules(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list routing rules: %w", err)
		}
		for _, r := range rules {
			r.Family = family
			all = append(all, r)
		}
	}
	return all, nil
}
