package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"slices"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/sluice-network/sluice/internal/host"
)

// Every interface has a routing table of its own, for packets from its addresses:
// its subnets, the gateways that IPAM names, and its routes. So an answer leaves
// by the interface the question came in by, also where several interfaces are in one subnet
// and whatever link has the default route of the main table.

// mark is a number that no other attachment of the node has: the interface's routing
// table and, of a sub-interface, the link group. It is never one that people or
// distributions give out.
func (r *Record) mark() uint32 { return 1<<30 | uint32(r.Generation)&(1<<30-1) }

// routing is what an interface's addresses need.
type routing struct {
	table  int
	routes []host.Route // of the main table and of the interface's own
	source []net.IP     // whose packets look in the own table first
}

// routingOf computes the routing of a result. other tells whether another link of
// the pod has the default route of a family: an interface takes that only where
// nobody has it.
func routingOf(r Record, result *types100.Result, other func(v6 bool) (bool, error)) (routing, error) {
	out := routing{table: int(r.mark())}
	seen := map[string]bool{}
	own := func(route host.Route) {
		route.Table, route.OnLink = out.table, route.Gateway != nil
		// The kernel takes one route to a destination.
		if key := fmt.Sprint(route.Dst.String(), route.Priority); !seen[key] {
			seen[key] = true
			out.routes = append(out.routes, route)
		}
	}
	gateways := map[bool]net.IP{} // by being IPv6, the first of each
	for _, ip := range result.IPs {
		v6 := ip.Address.IP.To4() == nil
		if gateways[v6] == nil {
			gateways[v6] = ip.Gateway
		}
		out.source = append(out.source, ip.Address.IP)
		own(host.Route{Dst: net.IPNet{IP: ip.Address.IP.Mask(ip.Address.Mask), Mask: ip.Address.Mask}})
	}
	for _, given := range result.Routes {
		v6 := given.Dst.IP.To4() == nil
		route, taken := routeOf(given), false
		if route.Gateway == nil {
			route.Gateway = gateways[v6]
		}
		if ones, _ := given.Dst.Mask.Size(); ones == 0 && given.Table == nil {
			var err error
			if taken, err = other(v6); err != nil {
				return out, err
			}
		}
		if !taken {
			out.routes = append(out.routes, route)
		}
		if given.Table == nil {
			own(route)
		}
	}
	for _, v6 := range []bool{false, true} {
		if gateways[v6] != nil {
			own(host.Route{Dst: everything(v6), Gateway: gateways[v6]})
		}
	}
	return out, nil
}

// everything is the destination of a default route.
func everything(v6 bool) net.IPNet {
	if v6 {
		return net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
}

// routing computes the routing of the interface with the given index.
func (a *Attacher) routing(r Record, ns *host.Netns, index int, result *types100.Result) (routing, error) {
	return routingOf(r, result, func(v6 bool) (bool, error) { return a.Kernel.HasDefaultRoute(ns, index, v6) })
}

// route makes the pod's routes and rules of the interface, whose addresses are there.
func (a *Attacher) route(r Record, ns *host.Netns, link host.Netdev, result *types100.Result) error {
	want, err := a.routing(r, ns, link.Index, result)
	if err != nil {
		return err
	}
	for _, route := range want.routes {
		// Of networks that give a pod the same route the first has it in the main
		// table, as with the reference plugins; each has it in its own.
		if err := a.Kernel.AddRoute(ns, link.Index, route); err != nil && (route.Table != 0 || !errors.Is(err, fs.ErrExist)) {
			return err
		}
	}
	for _, ip := range want.source {
		if err := a.Kernel.AddSourceRule(ns, ip, want.table); err != nil {
			return err
		}
	}
	return a.Kernel.KeepToOwnAddresses(ns, link.Index)
}

// routeDifferences lists what is missing of the routing of the interface.
func (a *Attacher) routeDifferences(r Record, ns *host.Netns, link host.Netdev, result *types100.Result) ([]error, error) {
	want, err := a.routing(r, ns, link.Index, result)
	if err != nil {
		return nil, err
	}
	wrong, err := a.missing(ns, link, want.routes)
	if err != nil {
		return nil, err
	}
	for _, ip := range want.source {
		has, err := a.Kernel.HasSourceRule(ns, ip, want.table)
		if err != nil {
			return nil, err
		}
		if !has {
			wrong = append(wrong, fmt.Errorf("rule from %s lookup %d is missing", ip, want.table))
		}
	}
	if len(want.source) > 0 {
		keeps, err := a.Kernel.KeepsToOwnAddresses(ns, link.Index)
		if err != nil {
			return nil, err
		}
		if !keeps {
			wrong = append(wrong, fmt.Errorf("arp_ignore, arp_announce and rp_filter of %s are not 1, 2 and 2", link.Name))
		}
	}
	return wrong, nil
}

// missing lists the routes that the link does not have.
func (a *Attacher) missing(ns *host.Netns, link host.Netdev, routes []host.Route) (wrong []error, err error) {
	for _, route := range routes {
		has, err := a.Kernel.HasRoute(ns, link.Index, route)
		if err != nil {
			return nil, err
		}
		if !has && route.Table == 0 { // another network's
			if has, err = a.Kernel.HasRoute(ns, 0, host.Route{Dst: route.Dst}); err != nil {
				return nil, err
			}
		}
		if !has {
			in := ""
			if route.Table != 0 {
				in = fmt.Sprintf(" in table %d", route.Table)
			}
			wrong = append(wrong, fmt.Errorf("route to %s via %s%s is missing", route.Dst.String(), link.Name, in))
		}
	}
	return wrong, nil
}

// unroute deletes the rules of the record's interface. The routes go with the link.
func (a *Attacher) unroute(r Record, ns *host.Netns) error {
	if r.IPAM == "" {
		return nil // there were no addresses
	}
	a.step("del: delete rules")
	return a.inNetns(r, ns, func(ns *host.Netns) error { return a.Kernel.DeleteSourceRules(ns, int(r.mark())) })
}

// only tells whether none of the pod's links leads anywhere.
func only(links []host.Netdev) bool {
	return !slices.ContainsFunc(links, func(l host.Netdev) bool { return l.Name != "lo" })
}

// inNetns runs f in the record's namespace, if that is still there. ns may be it,
// or nil.
func (a *Attacher) inNetns(r Record, ns *host.Netns, f func(*host.Netns) error) error {
	if ns == nil || ns.ID != r.Netns {
		byPath, err := a.Kernel.OpenNetns(r.NetnsPath)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, host.ErrNotNetns) {
			return nil
		}
		if err != nil {
			return refused("look into the pod: %w", err) // it may be there, with what is to be undone
		}
		defer byPath.Close()
		if ns = byPath; ns.ID != r.Netns {
			return nil
		}
	}
	return f(ns)
}
