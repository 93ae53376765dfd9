package attach

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"syscall"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/sluice-network/sluice/internal/host"
)

// The way between the host and a pod. A MacVLAN sub-interface cannot reach its
// parent's host, and a VF reaches it by the switch, if at all: a pod without
// another network has no Services, no node-local DNS and no kubelet probes. With
// hostInterface it has a pair of links besides: the host sends to the pod's
// addresses by it, and the pod sends to the host, and to the networks that are named,
// where kube-proxy's rules see its packets like those of other pods.
//
// Neither end has an address. Each end's MAC is said to the other for good, so nobody
// asks for it and the host need not answer for addresses that are not its own.

// hostPeer is the name of the pod's end.
const hostPeer = "host0"

// hostGateways are the host as the pod's routes name it, by being IPv6.
var hostGateways = map[bool]net.IP{false: net.IPv4(169, 254, 1, 1).To4(), true: net.ParseIP("fe80::1")}

// hostLink is the name of the host's end.
func (k Key) hostLink() string {
	sum := sha256.Sum256([]byte(k.file()))
	return fmt.Sprintf("slh%x", sum[:5])
}

// connectHost makes the way between the host and the pod's addresses. mtu is that
// of the interface the addresses are on.
func (a *Attacher) connectHost(ctx context.Context, r Record, mtu int, ns *host.Netns, result *types100.Result) error {
	a.step("add: make host interface")
	if err := a.Kernel.AddVeth(ctx, r.HostLink, ns, hostPeer, mtu); err != nil {
		return fmt.Errorf("make host interface %s, in the pod %s: %w", r.HostLink, hostPeer, err)
	}
	here, err := a.Kernel.Link(nil, r.HostLink)
	if err != nil {
		return err
	}
	there, err := a.Kernel.Link(ns, hostPeer)
	if err != nil {
		return err
	}
	if err := a.Kernel.ChangeLink(ctx, ns, there.Index, host.LinkChange{State: host.SetUp}); err != nil {
		return fmt.Errorf("set %s up in the pod: %w", hostPeer, err)
	}
	if err := a.Kernel.KeepToOwnAddresses(ns, there.Index); err != nil {
		return err
	}
	a.step("add: make host routes")
	routed := map[bool]bool{}
	for _, ip := range result.IPs {
		v6 := ip.Address.IP.To4() == nil
		node, err := a.Kernel.Source(v6)
		if err != nil {
			return err
		}
		if err := a.Kernel.AddNeighbour(nil, here.Index, ip.Address.IP, there.MAC); err != nil {
			return err
		}
		if err := a.Kernel.AddRoute(nil, here.Index, host.Route{Dst: alone(ip.Address.IP), Src: node}); err != nil {
			return err
		}
		if routed[v6] {
			continue // the way back is there
		}
		routed[v6] = true
		if err := a.Kernel.AddNeighbour(ns, there.Index, hostGateways[v6], here.MAC); err != nil {
			return err
		}
		for _, route := range toHost(r, ip.Address.IP, node) {
			if err := a.Kernel.AddRoute(ns, there.Index, route); err != nil {
				return err
			}
		}
	}
	return nil
}

// toHost are the pod's routes of one address family by the host interface. Other
// packets of the pod go that way only when no other network is there to take them.
func toHost(r Record, own, node net.IP) (out []host.Route) {
	v6 := own.To4() == nil
	var all []net.IPNet
	if node != nil {
		all = append(all, alone(node))
	}
	for _, dst := range r.HostRoutes {
		if (dst.IP.To4() == nil) == v6 {
			all = append(all, net.IPNet(dst))
		}
	}
	for _, dst := range all {
		route := host.Route{Dst: dst, Gateway: hostGateways[v6], OnLink: true}
		if r.Only {
			if !v6 {
				route.Src = own
			}
			out = append(out, route)
		}
		route.Src, route.Table = nil, int(r.mark())
		out = append(out, route)
	}
	return out
}

// alone is the network of one address.
func alone(ip net.IP) net.IPNet {
	if v4 := ip.To4(); v4 != nil {
		return net.IPNet{IP: v4, Mask: net.CIDRMask(32, 32)}
	}
	return net.IPNet{IP: ip, Mask: net.CIDRMask(128, 128)}
}

// disconnectHost deletes the record's host interface, and with it its other end
// and all routes by it, as far as they are there.
func (a *Attacher) disconnectHost(r Record) error {
	if r.HostLink == "" {
		return nil
	}
	a.step("del: delete host interface")
	l, err := a.Kernel.Link(nil, r.HostLink)
	if errors.Is(err, syscall.ENODEV) {
		return nil
	}
	if err == nil {
		err = a.Kernel.DeleteLink(nil, l.Index)
	}
	if err != nil {
		return refused("delete host interface: %w", err)
	}
	return nil
}

// hostDifferences lists what is missing of the way between the host and the pod.
func (a *Attacher) hostDifferences(r Record, ns *host.Netns, result *types100.Result) (wrong []error, err error) {
	if r.HostLink == "" {
		return nil, nil
	}
	here, err := a.Kernel.Link(nil, r.HostLink)
	if errors.Is(err, syscall.ENODEV) {
		return []error{fmt.Errorf("host interface %s is missing", r.HostLink)}, nil
	}
	if err != nil {
		return nil, err
	}
	there, err := a.Kernel.Link(ns, hostPeer)
	if errors.Is(err, syscall.ENODEV) {
		return []error{fmt.Errorf("host interface is not %s in the pod any more", hostPeer)}, nil
	}
	if err != nil {
		return nil, err
	}
	for _, l := range []host.Netdev{here, there} {
		if !l.Up {
			wrong = append(wrong, fmt.Errorf("host interface %s is down", l.Name))
		}
	}
	routed := map[bool]bool{}
	for _, ip := range result.IPs {
		v6 := ip.Address.IP.To4() == nil
		lacks, err := a.missing(nil, here, []host.Route{{Dst: alone(ip.Address.IP)}})
		if err != nil {
			return nil, err
		}
		wrong = append(wrong, lacks...)
		if routed[v6] {
			continue
		}
		routed[v6] = true
		if lacks, err = a.missing(ns, there, toHost(r, ip.Address.IP, nil)); err != nil {
			return nil, err
		}
		wrong = append(wrong, lacks...)
	}
	return wrong, nil
}
