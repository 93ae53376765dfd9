package plan

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// SelectsNode tells whether a nodeSelector selects a node with these labels: they must
// have all that it wants.
func SelectsNode(nodeSelector, labels map[string]string) bool {
	for key, want := range nodeSelector {
		if have, ok := labels[key]; !ok || have != want {
			return false
		}
	}
	return true
}

// whyNotNode says why a nodeSelector does not select the node; empty when it does.
func whyNotNode(nodeSelector, labels map[string]string) string {
	for _, key := range slices.Sorted(maps.Keys(nodeSelector)) {
		want := nodeSelector[key]
		switch have, ok := labels[key]; {
		case !ok:
			return fmt.Sprintf("the node has no label %s, nodeSelector wants it to be %q", key, want)
		case have != want:
			return fmt.Sprintf("the node's label %s is %q, nodeSelector wants %q", key, have, want)
		}
	}
	return ""
}

// whyNotNIC gives what says why the nicSelector does not select the PF; nil when it does.
func (c *compiled) whyNotNIC(pf *sriovv1.InterfaceExt) func() string {
	s := &c.Spec.NicSelector
	why := func(format string, args ...any) func() string {
		return func() string { return fmt.Sprintf(format, args...) }
	}
	switch {
	case s.NetFilter != "" && pf.NetFilter == "":
		return why("it is not known to be the virtual NIC of any network, nicSelector.netFilter wants %q", s.NetFilter)
	case s.NetFilter != "" && netFilter(s.NetFilter) != netFilter(pf.NetFilter):
		return why("its network is %q, nicSelector.netFilter wants %q", pf.NetFilter, s.NetFilter)
	case s.Vendor != "" && !strings.EqualFold(s.Vendor, pf.Vendor):
		return why("its vendor is %s, nicSelector.vendor wants %s", pf.Vendor, s.Vendor)
	case s.DeviceID != "" && !strings.EqualFold(s.DeviceID, pf.DeviceID):
		return why("its device is %s, nicSelector.deviceID wants %s", pf.DeviceID, s.DeviceID)
	case len(s.RootDevices) > 0 && !slices.ContainsFunc(s.RootDevices, func(d string) bool { return strings.EqualFold(d, pf.PciAddress) }):
		return why("its address is not among nicSelector.rootDevices %s", strings.Join(s.RootDevices, " "))
	case len(c.pfNames) > 0 && !slices.ContainsFunc(c.pfNames, func(p pfChoice) bool { return p.names(pf) }):
		return func() string { return "its name is not among nicSelector.pfNames " + join(s.PfNames) }
	}
	return nil
}

// namesPF tells whether the nicSelector has the PF's name or address in it.
func (c *compiled) namesPF(pf *sriovv1.InterfaceExt) bool {
	return slices.ContainsFunc(c.Spec.NicSelector.RootDevices, func(d string) bool { return strings.EqualFold(d, pf.PciAddress) }) ||
		slices.ContainsFunc(c.pfNames, func(p pfChoice) bool { return p.names(pf) })
}

// names tells whether an entry of pfNames names the PF, by its name or an alternative one.
func (p pfChoice) names(pf *sriovv1.InterfaceExt) bool {
	return p.name != "" && (p.name == pf.Name || slices.Contains(pf.AltNames, p.name))
}

// netFilter takes out the spaces that may stand around <platform>/NetworkID:<id>.
func netFilter(s string) string {
	return strings.Join(strings.Fields(strings.Replace(s, ":", " : ", 1)), "")
}

func join(entries []sriovv1.PfName) string {
	var all []string
	for _, e := range entries {
		all = append(all, string(e))
	}
	return strings.Join(all, " ")
}

// chosenVFs are the VFs of the PF that the policy claims: those its pfNames entries
// choose, or all of its numVfs.
func (c *compiled) chosenVFs(pf *sriovv1.InterfaceExt) []int {
	var chosen []int
	for _, p := range c.pfNames {
		if !p.names(pf) {
			continue
		}
		if p.vfs == nil {
			chosen = nil
			break
		}
		chosen = append(chosen, p.vfs...)
	}
	if chosen == nil {
		for vf := range c.Spec.NumVfs {
			chosen = append(chosen, vf)
		}
	}
	slices.Sort(chosen)
	return slices.Compact(chosen)
}
