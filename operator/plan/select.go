package plan

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// SelectsNode tells whether a policy's nodeSelector selects a node with these labels.
func SelectsNode(policy *sriovv1.SriovNetworkNodePolicy, labels map[string]string) bool {
	return whyNotNode(policy.Spec.NodeSelector, labels) == ""
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

// whyNotNIC says why the nicSelector does not select the PF; empty when it does.
func whyNotNIC(s *sriovv1.SriovNetworkNicSelector, pf *sriovv1.InterfaceExt) string {
	switch {
	case s.NetFilter != "" && netFilter(s.NetFilter) != netFilter(pf.NetFilter):
		return fmt.Sprintf("its network is %q, nicSelector.netFilter wants %q", pf.NetFilter, s.NetFilter)
	case s.Vendor != "" && !strings.EqualFold(s.Vendor, pf.Vendor):
		return fmt.Sprintf("its vendor is %s, nicSelector.vendor wants %s", pf.Vendor, s.Vendor)
	case s.DeviceID != "" && !strings.EqualFold(s.DeviceID, pf.DeviceID):
		return fmt.Sprintf("its device is %s, nicSelector.deviceID wants %s", pf.DeviceID, s.DeviceID)
	case len(s.RootDevices) > 0 && !slices.ContainsFunc(s.RootDevices, func(d string) bool { return strings.EqualFold(d, pf.PciAddress) }):
		return fmt.Sprintf("its address is not among nicSelector.rootDevices %s", strings.Join(s.RootDevices, " "))
	case len(s.PfNames) > 0 && !slices.ContainsFunc(s.PfNames, func(n sriovv1.PfName) bool { return names(n, pf) }):
		return fmt.Sprintf("its name is not among nicSelector.pfNames %s", join(s.PfNames))
	}
	return ""
}

// names tells whether an entry of pfNames names the PF, by its name or an alternative one.
func names(entry sriovv1.PfName, pf *sriovv1.InterfaceExt) bool {
	name, _, _ := strings.Cut(string(entry), "#")
	return name != "" && (name == pf.Name || slices.Contains(pf.AltNames, name))
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
func chosenVFs(policy *sriovv1.SriovNetworkNodePolicy, pf *sriovv1.InterfaceExt) ([]int, error) {
	var chosen []int
	for _, entry := range policy.Spec.NicSelector.PfNames {
		if !names(entry, pf) {
			continue
		}
		_, vfs, err := ParsePfName(string(entry))
		if err != nil {
			return nil, err
		}
		if vfs == nil {
			chosen = nil
			break
		}
		chosen = append(chosen, vfs...)
	}
	if chosen == nil {
		for vf := range policy.Spec.NumVfs {
			chosen = append(chosen, vf)
		}
	}
	slices.Sort(chosen)
	return slices.Compact(chosen), nil
}
