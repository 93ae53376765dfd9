package config

import (
	"fmt"
	"slices"
	"strings"

	"github.com/sluice-network/sluice/deviceplugin"
	"github.com/sluice-network/sluice/internal/host"
)

// Candidate is a VF of the node.
type Candidate struct {
	deviceplugin.Device        // as it would be offered
	Vendor, DeviceID    string // PCI, four hex digits
	RDMA                bool   // it has an RDMA device
	Carrier             bool   // its PF has one
	Resource            string // that a policy gives it to; empty for none
	// Hand is the resource, with prefix, that it was given to a pod from, which has it
	// still: what was selected by is not there to see, as its netdev is in the pod.
	Hand string
}

var linkTypes = map[string]host.LinkType{"ether": host.Ethernet, "infiniband": host.InfiniBand}

// Pools are the resources of the file with the candidates that they select. refused says
// of VFs that a resource selects why it does not get them.
func (c *Config) Pools(candidates []Candidate) (pools []deviceplugin.Pool, refused []string) {
	taken := map[string]string{}
	for _, d := range candidates {
		if slices.ContainsFunc(c.Resources, func(r Resource) bool { return r.full() == d.Hand }) {
			taken[d.PCIAddress] = d.Hand
		}
	}
	for _, r := range c.Resources {
		first, name := r.Selectors[0], r.full()
		p := deviceplugin.Pool{
			Prefix: r.Prefix, Resource: r.Name, ExcludeTopology: r.ExcludeTopology, RDMA: first.IsRdma, VhostNet: first.NeedVhostNet,
			Spread: r.Spread, Info: r.Info, Devices: []deviceplugin.Device{},
		}
		var ofPolicy, ofOther []string
		for _, d := range candidates {
			other := taken[d.PCIAddress]
			if other != name && !slices.ContainsFunc(r.Selectors, func(s Selector) bool { return s.selects(d) }) {
				continue
			}
			switch {
			case d.Resource != "":
				ofPolicy = append(ofPolicy, fmt.Sprintf("%s (%s)", d.PCIAddress, d.Resource))
			case other != "" && other != name:
				ofOther = append(ofOther, fmt.Sprintf("%s (%s)", d.PCIAddress, other))
			default:
				taken[d.PCIAddress] = name
				if r.RequireCarrier && !d.Carrier && d.Healthy {
					d.Healthy, d.Reason = false, fmt.Sprintf("its PF %s has no carrier: check cable and switch", d.PFName)
				}
				p.Devices = append(p.Devices, d.Device)
			}
		}
		if len(ofPolicy) > 0 {
			refused = append(refused, fmt.Sprintf("resource %s does not get VFs that policies give to other resources: %s: select others, or change the policies", name, strings.Join(ofPolicy, ", ")))
		}
		if len(ofOther) > 0 {
			refused = append(refused, fmt.Sprintf("resource %s does not get VFs that resources before it in the list select: %s", name, strings.Join(ofOther, ", ")))
		}
		pools = append(pools, p)
	}
	return pools, refused
}

// full is the name of the resource, with prefix.
func (r *Resource) full() string { return r.Prefix + "/" + r.Name }

func (s *Selector) selects(d Candidate) bool {
	has := func(list []string, value string) bool {
		return len(list) == 0 || slices.ContainsFunc(list, func(v string) bool { return strings.EqualFold(v, value) })
	}
	chosen := func(list []choice, pf string) bool {
		return len(list) == 0 || slices.ContainsFunc(list, func(c choice) bool { return strings.EqualFold(c.pf, pf) && c.has(d.VFIndex) })
	}
	return has(s.Vendors, d.Vendor) && has(s.Devices, d.DeviceID) && has(s.PCIAddresses, d.PCIAddress) &&
		(len(s.Drivers) == 0 || slices.Contains(s.Drivers, d.Driver)) &&
		chosen(s.pfs, d.PFName) && chosen(s.roots, d.PFAddress) &&
		(len(s.LinkTypes) == 0 || slices.ContainsFunc(s.LinkTypes, func(t string) bool { return linkTypes[t] == d.LinkType })) &&
		(!s.IsRdma || d.RDMA) && (s.VdpaType == "" || s.VdpaType == d.VDPA)
}

func (c choice) has(vf int) bool {
	return len(c.ranges) == 0 || slices.ContainsFunc(c.ranges, func(r [2]int) bool { return r[0] <= vf && vf <= r[1] })
}
