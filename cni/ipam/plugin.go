package ipam

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/sluice-network/sluice/cni/attach"
)

// Type is the ipam.type of networks whose addresses come from here.
const Type = attach.OwnIPAM

// Find implements attach.IPAM.
func (n *Node) Find(string, attach.Request) error { return nil }

// Exec implements attach.IPAM, with no process.
func (n *Node) Exec(ctx context.Context, _ string, req attach.Request) (*types100.Result, error) {
	if req.Command == attach.Del {
		// Whatever the configuration is by now.
		n.Del(attach.KeyOf(req))
		return nil, nil
	}
	ask, err := parse(req)
	if err != nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	switch req.Command {
	case attach.Add:
		g, err := n.Add(ctx, ask)
		if err != nil {
			return nil, err
		}
		return g.result(), nil
	case attach.Check:
		return nil, n.Check(ask.Key, ask.Pool)
	case attach.Status:
		return nil, n.Status(ask.Pool)
	case attach.GC:
		// By what attachments there are, not by the list: of one that could not be undone
		// the interface is still there.
		n.reconcile()
	}
	return nil, nil
}

// parse reads what an interface needs from a request.
func parse(req attach.Request) (Ask, error) {
	var conf struct {
		IPAM          map[string]json.RawMessage `json:"ipam"`
		RuntimeConfig struct {
			IPs []string `json:"ips"`
		} `json:"runtimeConfig"`
		Args struct {
			CNI struct {
				IPs []string `json:"ips"`
			} `json:"cni"`
		} `json:"args"`
	}
	if err := json.Unmarshal(req.Stdin, &conf); err != nil {
		return Ask{}, fmt.Errorf("read network configuration: %w", err)
	}
	ask := Ask{Key: attach.KeyOf(req), MAC: req.MAC}
	for key, raw := range conf.IPAM {
		switch key {
		case "type":
		case "pool":
			if json.Unmarshal(raw, &ask.Pool) != nil {
				return Ask{}, fmt.Errorf("ipam.pool %s is not a string", raw)
			}
		default:
			return Ask{}, fmt.Errorf("unknown key %q with value %s: ipam of type %q has the key pool, and the IPPool all else", "ipam."+key, raw, Type)
		}
	}
	if ask.Pool == "" {
		return Ask{}, fmt.Errorf(`key "ipam.pool" is missing: name an IPPool`)
	}
	ips := append(conf.RuntimeConfig.IPs, conf.Args.CNI.IPs...)
	for pair := range strings.SplitSeq(req.Args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			ask.Namespace = value
		case "K8S_POD_NAME":
			ask.Pod = value
		case "IP":
			if value != "" {
				ips = append(ips, strings.Split(value, ",")...)
			}
		}
	}
	seen := map[netip.Prefix]bool{}
	for _, text := range ips {
		ip, err := netip.ParsePrefix(text)
		if a, bad := netip.ParseAddr(text); bad == nil {
			ip, err = netip.PrefixFrom(a, 0), nil
		}
		if err != nil || ip.Addr().Zone() != "" {
			return Ask{}, fmt.Errorf("address %q is asked for, which is not an IP address", text)
		}
		ip = netip.PrefixFrom(ip.Addr().Unmap(), ip.Bits())
		if !seen[ip] {
			ask.IPs = append(ask.IPs, ip)
		}
		seen[ip] = true
	}
	return ask, nil
}

func (g *Grant) result() *types100.Result {
	r := &types100.Result{CNIVersion: types100.ImplementedSpecVersion}
	for _, a := range g.Addresses {
		ip := &types100.IPConfig{Address: net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}}
		if own := g.Pool.Family(a.Is4()); own != nil {
			ip.Address.Mask = net.CIDRMask(own.Subnet.Bits(), a.BitLen())
			if own.Gateway.IsValid() {
				ip.Gateway = own.Gateway.AsSlice()
			}
		}
		r.IPs = append(r.IPs, ip)
	}
	for _, route := range g.Spec.Routes {
		_, dst, err := net.ParseCIDR(route.Dst) // Parse has read it
		if err == nil {
			r.Routes = append(r.Routes, &types.Route{Dst: *dst, GW: net.ParseIP(route.Gw)})
		}
	}
	if d := g.Spec.DNS; d != nil {
		r.DNS = types.DNS{Nameservers: d.Nameservers, Domain: d.Domain, Search: d.Search, Options: d.Options}
	}
	return r
}
