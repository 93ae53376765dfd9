package plan

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// DesiredMacvlan gives the MacVLAN parents of a node and what became of each policy on
// it, as Desired does for VFs.
//
// links is the SriovNetworkNodeState's status.links. spec is its present spec, with the
// VFs as Desired wants them: a resource that has VFs takes no MacVLAN slots. Without
// links the present parents stand. Findings are sorted by policy and link.
func DesiredMacvlan(policies []sluicev1.MacvlanNodePolicy, nodeLabels map[string]string,
	links []sriovv1.Link, spec sriovv1.SriovNetworkNodeStateSpec,
) ([]sriovv1.MacvlanParent, []Finding) {
	node := &macvlanPlan{links: slices.Clone(links), prior: spec.Macvlans, vfs: map[string]string{}}
	slices.SortFunc(node.links, func(a, b sriovv1.Link) int { return cmp.Compare(a.Name, b.Name) })
	for _, iface := range spec.Interfaces {
		for _, group := range iface.VfGroups {
			node.vfs[strings.ToLower(group.ResourceName)] = group.PolicyName
		}
	}
	for _, policy := range byMacvlanStrength(policies) {
		node.add(policy, nodeLabels)
	}
	slices.SortStableFunc(node.findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Policy, b.Policy), cmp.Compare(a.Link, b.Link))
	})
	if len(links) == 0 {
		return spec.Macvlans, node.findings
	}
	var parents []sriovv1.MacvlanParent
	for _, c := range node.claims {
		parents = append(parents, c.parent)
	}
	slices.SortFunc(parents, func(a, b sriovv1.MacvlanParent) int {
		return cmp.Or(cmp.Compare(a.ResourceName, b.ResourceName), cmp.Compare(a.Link, b.Link), cmp.Compare(a.Vlan, b.Vlan))
	})
	return parents, node.findings
}

// byMacvlanStrength sorts policies, strongest first.
func byMacvlanStrength(policies []sluicev1.MacvlanNodePolicy) []*sluicev1.MacvlanNodePolicy {
	sorted := make([]*sluicev1.MacvlanNodePolicy, 0, len(policies))
	for i := range policies {
		sorted = append(sorted, &policies[i])
	}
	slices.SortFunc(sorted, func(a, b *sluicev1.MacvlanNodePolicy) int { return macvlanRank(a).compare(macvlanRank(b)) })
	return sorted
}

func macvlanRank(p *sluicev1.MacvlanNodePolicy) rank { return rankOf(p, p.Spec.Priority) }

// macvlanPlan gathers the parents in effect, those of the strongest policy first.
type macvlanPlan struct {
	links    []sriovv1.Link // by name
	prior    []sriovv1.MacvlanParent
	vfs      map[string]string // policy that has VFs, by resource in lower case
	claims   []parentClaim
	findings []Finding
}

// parentClaim is a parent that a policy wants.
type parentClaim struct {
	policy *sluicev1.MacvlanNodePolicy
	key    parentKey
	parent sriovv1.MacvlanParent
}

// parentKey tells parents apart: a VLAN device that is there is the same parent as its
// VLAN of the link below.
type parentKey struct {
	link string
	vlan int
}

func (k parentKey) String() string {
	if k.vlan == 0 {
		return "link " + k.link
	}
	return fmt.Sprintf("VLAN %d of link %s", k.vlan, k.link)
}

func keyOf(link *sriovv1.Link, vlan int) parentKey {
	if vlan == 0 && link.Vlan != 0 && link.Lower != "" {
		return parentKey{link.Lower, link.Vlan}
	}
	return parentKey{link.Name, vlan}
}

func (n *macvlanPlan) find(policy *sluicev1.MacvlanNodePolicy, link string, reason Reason, message string) {
	n.findings = append(n.findings, Finding{Policy: policy.Name, Link: link, Reason: reason, Message: message})
}

// add lets a policy claim its parents. Stronger policies have been added before.
func (n *macvlanPlan) add(policy *sluicev1.MacvlanNodePolicy, nodeLabels map[string]string) {
	if why := whyNotNode(policy.Spec.NodeSelector, nodeLabels); why != "" {
		n.find(policy, "", NodeNotSelected, why)
		return
	}
	if reason, why := n.refuseEverywhere(policy); why != "" {
		n.find(policy, "", reason, why)
		if n.keep(policy) {
			n.findings[len(n.findings)-1].Keeps = "slots"
		}
		return
	}
	if len(n.links) == 0 {
		n.find(policy, "", InventoryPending, "the node has not reported any link: see that the agent's pod runs there")
		return
	}
	var whys []string
	selector := compileParents(&policy.Spec.ParentSelector)
	for i := range n.links {
		link := &n.links[i]
		why := selector.whyNot(link)
		if why == "" {
			n.claim(policy, link)
			continue
		}
		// Put together by hand: on a node with many links this is most of planning.
		why = "not " + link.Name + ": " + why
		n.find(policy, link.Name, NotSelected, why)
		n.findings[len(n.findings)-1].Named = selector.names(link)
		whys = append(whys, why)
	}
	if len(whys) == len(n.links) {
		const most = 8
		if more := len(whys) - most; more > 0 {
			whys = append(whys[:most], fmt.Sprintf("and %d more, see status.links of its SriovNetworkNodeState", more))
		}
		n.find(policy, "", NoNICSelected, "parentSelector selects no link of the node: "+strings.Join(whys, "; "))
	}
}

// refuseEverywhere says what is wrong with a policy whatever the link. Most of it the
// API server refuses already; an object may predate those rules.
func (n *macvlanPlan) refuseEverywhere(policy *sluicev1.MacvlanNodePolicy) (Reason, string) {
	spec := &policy.Spec
	s := &spec.ParentSelector
	switch {
	case len(s.UnknownKeys) > 0:
		return PolicyInvalid, fmt.Sprintf("parentSelector has the unknown key %s: use vendor, deviceID, rootDevices, pfNames or kinds", strings.Join(s.UnknownKeys, ", "))
	case s.Vendor == "" && s.DeviceID == "" && len(s.RootDevices) == 0 && len(s.PfNames) == 0 && len(s.Kinds) == 0:
		return PolicyInvalid, "parentSelector is empty: give at least one of vendor, deviceID, rootDevices, pfNames, kinds"
	case spec.Vlan < 0 || spec.Vlan > 4094:
		return PolicyInvalid, fmt.Sprintf("vlan %d is not a VLAN ID: set it to 1 to 4094, or to 0 to use the parent itself", spec.Vlan)
	case spec.Mtu != 0 && (spec.Mtu < 68 || spec.Mtu > 65535):
		return PolicyInvalid, fmt.Sprintf("mtu %d is not an MTU: set it to 68 to 65535 bytes", spec.Mtu)
	case spec.Slots < 1 || spec.Slots > 4096:
		return PolicyInvalid, fmt.Sprintf("slots %d is not a number of slots: set it to 1 to 4096; to offer none, delete the policy", spec.Slots)
	}
	for _, name := range s.PfNames {
		if strings.Contains(name, "#") {
			return PolicyInvalid, fmt.Sprintf("parentSelector.pfNames %s has a VF range: MacVLAN parents are whole links, write the name alone", name)
		}
	}
	return n.refuseResource(policy, spec.ResourceName, spec.ExcludeTopology)
}

// refuseResource says why the node can have no slots of the resource for the policy.
func (n *macvlanPlan) refuseResource(policy *sluicev1.MacvlanNodePolicy, resource string, excludeTopology bool) (Reason, string) {
	if vfs, taken := n.vfs[strings.ToLower(resource)]; taken {
		return Conflict, fmt.Sprintf("resourceName %s is that of SriovNetworkNodePolicy %s, which has VFs on the node: give one of them another name", resource, vfs)
	}
	for i := range n.claims {
		c := &n.claims[i]
		high, low := macvlanRank(c.policy), macvlanRank(policy)
		switch {
		case c.policy == policy || !strings.EqualFold(c.parent.ResourceName, resource):
		case c.parent.ResourceName != resource:
			// Applications find both by one environment variable.
			return high.reason(low), fmt.Sprintf("resourceName %s differs from %s of policy %s in case only: %s; change one of them", resource, c.parent.ResourceName, c.policy.Name, high.wins(low))
		case c.parent.ExcludeTopology != excludeTopology:
			// Kubelet asks a resource, not a device, whether it has NUMA nodes.
			return high.reason(low), fmt.Sprintf("excludeTopology is %t here and %t in policy %s, which has the same resourceName %s: %s; make them equal or change one resourceName",
				excludeTopology, c.parent.ExcludeTopology, c.policy.Name, resource, high.wins(low))
		}
	}
	return "", ""
}

// claim adds the policy's claim on a link that it selects, or the finding that says why not.
func (n *macvlanPlan) claim(policy *sluicev1.MacvlanNodePolicy, link *sriovv1.Link) {
	spec := &policy.Spec
	c := parentClaim{policy: policy, key: keyOf(link, spec.Vlan), parent: sriovv1.MacvlanParent{
		PolicyName: policy.Name, ResourceName: spec.ResourceName, Link: link.Name, Vlan: spec.Vlan, Mtu: spec.Mtu, Slots: spec.Slots, ExcludeTopology: spec.ExcludeTopology,
	}}
	if why := whyNoParent(n.links, link, spec.Vlan); why != "" {
		n.find(policy, link.Name, NICMismatch, why)
		return
	}
	if other, reason, why := n.clash(&c); why != "" {
		n.find(policy, link.Name, reason, why)
		return
	} else if other != nil {
		n.find(policy, other.parent.Link, Configured, fmt.Sprintf("%s has %d slots for resource %s, which policy %s asks for too", c.key, spec.Slots, spec.ResourceName, other.policy.Name))
		n.findings[len(n.findings)-1].Owner = other.policy.Name
		return
	}
	n.claims = append(n.claims, c)
	n.find(policy, link.Name, Configured, fmt.Sprintf("%s has %d slots for resource %s", c.key, spec.Slots, spec.ResourceName))
}

// clash says why a claim cannot stand beside those of stronger policies. other is the
// claim that wants the very same already.
func (n *macvlanPlan) clash(c *parentClaim) (other *parentClaim, reason Reason, why string) {
	for i := range n.claims {
		o := &n.claims[i]
		if o.key != c.key {
			continue
		}
		var all []string
		for _, d := range []struct {
			field string
			a, b  any
		}{
			{"resourceName", o.parent.ResourceName, c.parent.ResourceName},
			{"mtu", o.parent.Mtu, c.parent.Mtu},
			{"slots", o.parent.Slots, c.parent.Slots},
			{"excludeTopology", o.parent.ExcludeTopology, c.parent.ExcludeTopology},
		} {
			if d.a != d.b {
				all = append(all, fmt.Sprintf("%s %v, not %v", d.field, d.a, d.b))
			}
		}
		if all == nil {
			return o, "", ""
		}
		high, low := macvlanRank(o.policy), macvlanRank(c.policy)
		return nil, high.reason(low), fmt.Sprintf("%s stays with policy %s (%s): %s; make them equal, or give one of them another link or vlan, or a lower priority number",
			c.key, o.policy.Name, strings.Join(all, ", "), high.wins(low))
	}
	return nil, "", ""
}

// keep lets a refused policy keep what it had, and tells whether it had anything that
// it can still have.
func (n *macvlanPlan) keep(policy *sluicev1.MacvlanNodePolicy) bool {
	kept := false
	for _, parent := range n.prior {
		if parent.PolicyName != policy.Name {
			continue
		}
		link := findLink(n.links, parent.Link)
		if link == nil || whyNoParent(n.links, link, parent.Vlan) != "" {
			continue
		}
		if _, why := n.refuseResource(policy, parent.ResourceName, parent.ExcludeTopology); why != "" {
			continue
		}
		c := parentClaim{policy: policy, key: keyOf(link, parent.Vlan), parent: parent}
		if other, _, why := n.clash(&c); other != nil || why != "" {
			continue
		}
		n.claims = append(n.claims, c)
		kept = true
	}
	return kept || len(n.links) == 0 && slices.ContainsFunc(n.prior, func(p sriovv1.MacvlanParent) bool { return p.PolicyName == policy.Name })
}

// parentSelector is a ParentSelector with the words that say what it wants.
type parentSelector struct {
	*sluicev1.ParentSelector
	rootDevices, pfNames, kinds string
}

func compileParents(s *sluicev1.ParentSelector) parentSelector {
	kinds := make([]string, len(s.Kinds))
	for i, k := range s.Kinds {
		kinds[i] = string(k)
	}
	return parentSelector{s, strings.Join(s.RootDevices, " "), strings.Join(s.PfNames, " "), strings.Join(kinds, " ")}
}

// names tells whether the selector has the link's name, or another of its names, in it.
func (s parentSelector) names(link *sriovv1.Link) bool {
	return slices.ContainsFunc(s.PfNames, func(name string) bool { return name == link.Name || slices.Contains(link.AltNames, name) })
}

// whyNot says why the selector does not select the link; empty when it does.
func (s parentSelector) whyNot(link *sriovv1.Link) string {
	named := s.names(link)
	switch {
	case s.Vendor != "" && !strings.EqualFold(s.Vendor, link.Vendor):
		return "its vendor is \"" + link.Vendor + "\", parentSelector.vendor wants " + s.Vendor
	case s.DeviceID != "" && !strings.EqualFold(s.DeviceID, link.DeviceID):
		return "its device is \"" + link.DeviceID + "\", parentSelector.deviceID wants " + s.DeviceID
	case len(s.RootDevices) > 0 && !slices.ContainsFunc(s.RootDevices, func(d string) bool { return strings.EqualFold(d, link.PciAddress) }):
		return "its PCI address is \"" + link.PciAddress + "\", not among parentSelector.rootDevices " + s.rootDevices
	case len(s.PfNames) > 0 && !named:
		return "its name is not among parentSelector.pfNames " + s.pfNames
	case len(s.Kinds) > 0 && !slices.Contains(s.Kinds, sluicev1.LinkKind(link.Kind)):
		return "it is a " + link.Kind + " link, parentSelector.kinds wants " + s.kinds
	case link.Managed && !named:
		// Selected by its kind, what one policy makes would be another's parent, or its
		// own policy's, VLAN upon VLAN without end.
		return "it was made for the vlan of a policy: name it in parentSelector.pfNames to use it here too"
	}
	return ""
}

// whyNoParent says why no sub-interface can be made on the link, or on its VLAN.
func whyNoParent(links []sriovv1.Link, link *sriovv1.Link, vlan int) string {
	for _, l := range []*sriovv1.Link{link, vlanDevice(links, link, vlan)} {
		if l != nil && l.Master != "" {
			return fmt.Sprintf("link %s is a port of %s, which takes its packets, and the kernel makes no MacVLAN sub-interface on it (EBUSY): select %s instead", l.Name, l.Master, l.Master)
		}
	}
	return ""
}

// vlanDevice is the VLAN device of the link, whoever made it; nil when there is none.
func vlanDevice(links []sriovv1.Link, link *sriovv1.Link, vlan int) *sriovv1.Link {
	at := slices.IndexFunc(links, func(l sriovv1.Link) bool { return vlan != 0 && l.Lower == link.Name && l.Vlan == vlan })
	if at < 0 {
		return nil
	}
	return &links[at]
}

// findLink finds a link by its name, or an alternative one.
func findLink(links []sriovv1.Link, name string) *sriovv1.Link {
	at := slices.IndexFunc(links, func(l sriovv1.Link) bool { return l.Name == name })
	if at < 0 {
		at = slices.IndexFunc(links, func(l sriovv1.Link) bool { return slices.Contains(l.AltNames, name) })
	}
	if at < 0 {
		return nil
	}
	return &links[at]
}

// The operations on links. All are Live: a link loses no packet by a VLAN device more
// or less, nor by a larger MTU, and one that somebody uses is not removed.
const (
	RaiseLinkMTU Kind = "RaiseLinkMTU" // Number: bytes
	SetLinkUp    Kind = "SetLinkUp"    //
	AddVLAN      Kind = "AddVLAN"      // Number: the VLAN; Value: the device's name
	RemoveVLAN   Kind = "RemoveVLAN"   // of the device itself
)

// LinkOperation is one change of a link.
type LinkOperation struct {
	Kind   Kind
	Link   string
	Value  string
	Number int
}

// String reads "AddVLAN 100 (ens1f0.100) on ens1f0".
func (o LinkOperation) String() string {
	switch o.Kind {
	case RaiseLinkMTU:
		return fmt.Sprintf("%s %d on %s", o.Kind, o.Number, o.Link)
	case AddVLAN:
		return fmt.Sprintf("%s %d (%s) on %s", o.Kind, o.Number, o.Value, o.Link)
	}
	return fmt.Sprintf("%s on %s", o.Kind, o.Link)
}

// MacvlanOperations plans what turns links into what the parent needs, and only that,
// in order, and names the link that sub-interfaces are made on, empty while that is not
// there. A VLAN device is made in the last of them; look again then, for its own MTU.
//
// An error says why the parent cannot be had; nothing is planned then.
func MacvlanOperations(want sriovv1.MacvlanParent, links []sriovv1.Link) (parent string, ops []LinkOperation, err error) {
	link := findLink(links, want.Link)
	if link == nil {
		return "", nil, fmt.Errorf("link %s: the node has no such link now: check the NIC, or what makes the link", want.Link)
	}
	if why := whyNoParent(links, link, want.Vlan); why != "" {
		return "", nil, fmt.Errorf("%s", why)
	}
	if want.Vlan == 0 {
		return link.Name, prepare(links, link, want.Mtu), nil
	}
	if device := vlanDevice(links, link, want.Vlan); device != nil {
		return device.Name, prepare(links, device, want.Mtu), nil
	}
	ops = prepare(links, link, want.Mtu)
	return "", append(ops, LinkOperation{Kind: AddVLAN, Link: link.Name, Value: VLANName(link.Name, want.Vlan), Number: want.Vlan}), nil
}

// prepare raises the MTU of a link and sets it up. What a VLAN device is on comes first:
// it must be up, and no smaller (vlan_dev_open and vlan_dev_change_mtu in the kernel).
func prepare(links []sriovv1.Link, link *sriovv1.Link, mtu int) []LinkOperation {
	var ops []LinkOperation
	raise, up := link.Mtu < mtu, link.LinkAdminState != "up"
	if lower := findLink(links, link.Lower); (raise || up) && link.Lower != "" && lower != nil {
		ops = prepare(links, lower, mtu)
	}
	if raise {
		ops = append(ops, LinkOperation{Kind: RaiseLinkMTU, Link: link.Name, Number: mtu})
	}
	if up {
		ops = append(ops, LinkOperation{Kind: SetLinkUp, Link: link.Name})
	}
	return ops
}

// UnusedVLANs plans the removal of the VLAN devices that were made for no parent of now.
func UnusedVLANs(want []sriovv1.MacvlanParent, links []sriovv1.Link) []LinkOperation {
	used := map[string]bool{}
	for _, parent := range want {
		if link := findLink(links, parent.Link); link != nil {
			used[link.Name] = true
			if device := vlanDevice(links, link, parent.Vlan); device != nil {
				used[device.Name] = true
			}
		}
	}
	var ops []LinkOperation
	for _, link := range links {
		if link.Managed && !used[link.Name] {
			ops = append(ops, LinkOperation{Kind: RemoveVLAN, Link: link.Name})
		}
	}
	return ops
}

// VLANName is the name of the VLAN device that is made on a link: ens1f0.100, or, as
// names have 15 bytes at most (IFNAMSIZ), one with a hash of the link's.
func VLANName(link string, vlan int) string {
	const longest = 15
	name := fmt.Sprintf("%s.%d", link, vlan)
	if len(name) > longest {
		sum := sha256.Sum256([]byte(link))
		name = fmt.Sprintf("v%x.%d", sum[:4], vlan)
	}
	return name
}
