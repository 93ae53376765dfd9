package plan

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// Reason says in one word what became of a policy on a node or on one of its PFs.
type Reason string

// The reasons of findings. Only Configured means that the policy is in effect.
const (
	Configured        Reason = "Configured"        // the PF's spec has the policy's VFs
	NodeNotSelected   Reason = "NodeNotSelected"   // nodeSelector does not select the node
	NotSelected       Reason = "NotSelected"       // nicSelector does not select the PF
	NoNICSelected     Reason = "NoNICSelected"     // nicSelector selects no PF of the node
	InventoryPending  Reason = "InventoryPending"  // the node has not reported any PF
	PolicyIgnored     Reason = "PolicyIgnored"     // the name default
	PolicyInvalid     Reason = "PolicyInvalid"     // wrong whatever the NIC
	TotalVFsExceeded  Reason = "TotalVFsExceeded"  // more VFs than the PF can have
	NICMismatch       Reason = "NICMismatch"       // the PF is not as the policy needs it
	Overridden        Reason = "Overridden"        // a policy of lower priority number has the VFs
	Conflict          Reason = "Conflict"          // a policy of the same priority has the VFs
	UnsupportedByNode Reason = "UnsupportedByNode" // nothing on the node can do it
)

// Finding is what became of one policy on one node, or on one PF of it.
type Finding struct {
	Policy     string // name of the policy
	PCIAddress string // PF; empty when the finding is about the whole node
	PFName     string
	Link       string // the same for a MacvlanNodePolicy: the link whose slots it is about
	Reason     Reason
	Message    string // names object, field, value and, unless all is well, the mend
}

// Refused tells whether the policy asks for something on this node that it does not get.
func (f Finding) Refused() bool {
	switch f.Reason {
	case PolicyInvalid, TotalVFsExceeded, NICMismatch, Overridden, Conflict, UnsupportedByNode:
		return true
	}
	return false
}

// claim is what one policy wants of one PF.
type claim struct {
	policy *sriovv1.SriovNetworkNodePolicy
	vfs    []int             // sorted
	group  sriovv1.VfGroup   // what the VFs are for; VfRange is left empty
	iface  sriovv1.Interface // what the PF shall be; VfGroups is left empty
}

// Desired gives the spec of a node and what became of each policy on it.
//
// inventory is the SriovNetworkNodeState's status.interfaces and prior its present spec.
// With an empty inventory the prior spec stands: the node has yet to say what it has.
// Findings are sorted by policy and PF.
func Desired(policies []sriovv1.SriovNetworkNodePolicy, nodeLabels map[string]string,
	inventory []sriovv1.InterfaceExt, prior sriovv1.SriovNetworkNodeStateSpec,
) (sriovv1.SriovNetworkNodeStateSpec, []Finding) {
	node := newNodePlan(inventory, prior)
	for _, policy := range byStrength(policies) {
		node.add(policy, nodeLabels)
	}
	slices.SortStableFunc(node.findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Policy, b.Policy), cmp.Compare(a.PCIAddress, b.PCIAddress))
	})
	if len(inventory) == 0 {
		return *prior.DeepCopy(), node.findings
	}
	return node.spec(prior), node.findings
}

// byStrength sorts policies, strongest first.
func byStrength(policies []sriovv1.SriovNetworkNodePolicy) []*sriovv1.SriovNetworkNodePolicy {
	sorted := make([]*sriovv1.SriovNetworkNodePolicy, 0, len(policies))
	for i := range policies {
		sorted = append(sorted, &policies[i])
	}
	slices.SortFunc(sorted, func(a, b *sriovv1.SriovNetworkNodePolicy) int {
		return cmp.Or(
			cmp.Compare(priority(a), priority(b)),
			a.CreationTimestamp.Compare(b.CreationTimestamp.Time),
			cmp.Compare(a.Name, b.Name))
	})
	return sorted
}

func priority(p *sriovv1.SriovNetworkNodePolicy) int {
	if p.Spec.Priority == nil {
		return sriovv1.DefaultPriority
	}
	return *p.Spec.Priority
}

// nodePlan gathers the claims in effect, strongest first.
type nodePlan struct {
	pfs      []*pfPlan // by PCI address
	findings []Finding
	// resources remembers the policy that settled what holds for all of a resource.
	resources map[string]*sriovv1.SriovNetworkNodePolicy
}

type pfPlan struct {
	pf     *sriovv1.InterfaceExt
	prior  *sriovv1.Interface // nil when the PF had no spec
	claims []claim
}

func newNodePlan(inventory []sriovv1.InterfaceExt, prior sriovv1.SriovNetworkNodeStateSpec) *nodePlan {
	n := &nodePlan{resources: map[string]*sriovv1.SriovNetworkNodePolicy{}}
	for i := range inventory {
		p := &pfPlan{pf: &inventory[i]}
		for j := range prior.Interfaces {
			if prior.Interfaces[j].PciAddress == p.pf.PciAddress {
				p.prior = &prior.Interfaces[j]
			}
		}
		n.pfs = append(n.pfs, p)
	}
	slices.SortFunc(n.pfs, func(a, b *pfPlan) int { return cmp.Compare(a.pf.PciAddress, b.pf.PciAddress) })
	return n
}

func (n *nodePlan) find(policy *sriovv1.SriovNetworkNodePolicy, p *pfPlan, reason Reason, message string) {
	f := Finding{Policy: policy.Name, Reason: reason, Message: message}
	if p != nil {
		f.PCIAddress, f.PFName = p.pf.PciAddress, p.pf.Name
	}
	n.findings = append(n.findings, f)
}

// add lets a policy claim its VFs. Stronger policies have been added before.
func (n *nodePlan) add(policy *sriovv1.SriovNetworkNodePolicy, nodeLabels map[string]string) {
	if policy.Name == "default" {
		n.find(policy, nil, PolicyIgnored, "a policy named default is ignored: give it another name")
		return
	}
	if why := whyNotNode(policy.Spec.NodeSelector, nodeLabels); why != "" {
		n.find(policy, nil, NodeNotSelected, why)
		return
	}
	if reason, why := refuseEverywhere(policy); why != "" {
		kept := false
		for _, p := range n.pfs {
			kept = p.keep(policy) || kept
		}
		if kept {
			why += keptSuffix
		}
		n.find(policy, nil, reason, why)
		return
	}
	if len(n.pfs) == 0 {
		n.find(policy, nil, InventoryPending, "the node has not reported any SR-IOV NIC: see that it has one, that SR-IOV is on in its firmware, and that the agent's pod runs there")
		return
	}
	var whys []string
	for _, p := range n.pfs {
		why := whyNotNIC(&policy.Spec.NicSelector, p.pf)
		if why == "" {
			n.claim(policy, p)
			continue
		}
		why = fmt.Sprintf("not PF %s: %s", p, why)
		n.find(policy, p, NotSelected, why)
		whys = append(whys, why)
	}
	if len(whys) == len(n.pfs) {
		n.find(policy, nil, NoNICSelected, "nicSelector selects no PF of the node: "+strings.Join(whys, "; "))
	}
}

const keptSuffix = "; until then it keeps the VFs it had"

// claim adds the policy's claim on a PF that it selects, or the finding that says why not.
func (n *nodePlan) claim(policy *sriovv1.SriovNetworkNodePolicy, p *pfPlan) {
	if reason, why := p.refuse(policy); why != "" {
		if p.keep(policy) {
			why += keptSuffix
		}
		n.find(policy, p, reason, why)
		return
	}
	vfs, err := chosenVFs(policy, p.pf)
	if err != nil { // refuseEverywhere has parsed every entry
		n.find(policy, p, PolicyInvalid, err.Error())
		return
	}
	c := newClaim(policy, p.pf, vfs)
	for i := range p.claims {
		if reason, why := p.clash(&p.claims[i], &c); why != "" {
			n.find(policy, p, reason, why)
			return
		}
	}
	if first := n.resources[policy.Spec.ResourceName]; first == nil {
		n.resources[policy.Spec.ResourceName] = policy
	} else if first.Spec.ExcludeTopology != policy.Spec.ExcludeTopology {
		// Kubelet asks a resource, not a device, whether it has NUMA nodes.
		n.find(policy, p, Conflict, fmt.Sprintf("excludeTopology is %t here and %t in policy %s, which has the same resourceName %s: make them equal or change one resourceName",
			policy.Spec.ExcludeTopology, first.Spec.ExcludeTopology, first.Name, policy.Spec.ResourceName))
		return
	}
	p.claims = append(p.claims, c)
	n.find(policy, p, Configured, fmt.Sprintf("PF %s has VFs %s of %d for resource %s", p, formatVFs(c.vfs), policy.Spec.NumVfs, policy.Spec.ResourceName))
}

// refuseEverywhere says what is wrong with a policy whatever the NIC. Most of it the API
// server refuses already; an object may predate those rules.
func refuseEverywhere(policy *sriovv1.SriovNetworkNodePolicy) (Reason, string) {
	spec := &policy.Spec
	s := &spec.NicSelector
	switch {
	case len(s.UnknownKeys) > 0:
		return PolicyInvalid, fmt.Sprintf("nicSelector has the unknown key %s: use vendor, deviceID, rootDevices, pfNames or netFilter", strings.Join(s.UnknownKeys, ", "))
	case s.Vendor == "" && s.DeviceID == "" && s.NetFilter == "" && len(s.RootDevices) == 0 && len(s.PfNames) == 0:
		return PolicyInvalid, "nicSelector is empty: give at least one of vendor, deviceID, rootDevices, pfNames, netFilter"
	case spec.NumVfs < 1:
		return PolicyInvalid, fmt.Sprintf("numVfs %d makes no VFs: set it to 1 or more; to take VFs away, delete the policy", spec.NumVfs)
	case spec.Bridge.OVS != nil:
		return UnsupportedByNode, "bridge.ovs is not supported: remove it and attach the PF to a bridge yourself"
	}
	for _, entry := range s.PfNames {
		_, vfs, err := ParsePfName(string(entry))
		if err != nil {
			return PolicyInvalid, "nicSelector." + err.Error()
		}
		if len(vfs) > 0 && vfs[len(vfs)-1] >= spec.NumVfs {
			return PolicyInvalid, fmt.Sprintf("nicSelector.pfNames %s reaches past VF %d, the last of numVfs %d: end the range there or raise numVfs", entry, spec.NumVfs-1, spec.NumVfs)
		}
	}
	return "", ""
}

// refuse says why the policy cannot be on this PF, whatever other policies want.
func (p *pfPlan) refuse(policy *sriovv1.SriovNetworkNodePolicy) (Reason, string) {
	spec, pf := &policy.Spec, p.pf
	switch {
	case pf.TotalVfs == 0:
		return TotalVFsExceeded, fmt.Sprintf("numVfs %d: PF %s can have no VFs (totalvfs 0): turn SR-IOV on in the card's firmware and the machine's", spec.NumVfs, p)
	case spec.NumVfs > pf.TotalVfs:
		return TotalVFsExceeded, fmt.Sprintf("numVfs %d is above the %d VFs (totalvfs) that PF %s can have: set numVfs to %d or less", spec.NumVfs, pf.TotalVfs, p, pf.TotalVfs)
	case spec.LinkType != "" && pf.LinkType != "" && !strings.EqualFold(spec.LinkType, pf.LinkType):
		return NICMismatch, fmt.Sprintf("linkType %s: PF %s is %s: change the card's port type with its vendor's tool, or linkType", spec.LinkType, p, pf.LinkType)
	case spec.ExternallyManaged && spec.NumVfs > pf.NumVfs:
		return NICMismatch, fmt.Sprintf("numVfs %d with externallyManaged: PF %s has only %d VFs: make them there, or lower numVfs", spec.NumVfs, p, pf.NumVfs)
	case spec.ExternallyManaged && spec.Mtu > pf.Mtu:
		return NICMismatch, fmt.Sprintf("mtu %d with externallyManaged: PF %s has MTU %d: raise it there, or lower mtu", spec.Mtu, p, pf.Mtu)
	}
	return "", ""
}

func newClaim(policy *sriovv1.SriovNetworkNodePolicy, pf *sriovv1.InterfaceExt, vfs []int) claim {
	spec := &policy.Spec
	return claim{
		policy: policy,
		vfs:    vfs,
		group: sriovv1.VfGroup{
			ResourceName:    spec.ResourceName,
			DeviceType:      cmp.Or(spec.DeviceType, sriovv1.DeviceTypeNetDevice),
			PolicyName:      policy.Name,
			Mtu:             spec.Mtu,
			IsRdma:          spec.IsRdma || (strings.EqualFold(spec.LinkType, sriovv1.LinkTypeIB) && spec.DeviceType != sriovv1.DeviceTypeVfioPci),
			VdpaType:        spec.VdpaType,
			NeedVhostNet:    spec.NeedVhostNet,
			ExcludeTopology: spec.ExcludeTopology,
		},
		iface: sriovv1.Interface{
			PciAddress:        pf.PciAddress,
			Name:              pf.Name,
			NumVfs:            spec.NumVfs,
			Mtu:               spec.Mtu,
			LinkType:          spec.LinkType,
			EswitchMode:       spec.EswitchMode,
			ExternallyManaged: spec.ExternallyManaged,
		},
	}
}

// keep lets a refused policy keep what it had on the PF, and tells whether it had
// anything there that it can still have.
func (p *pfPlan) keep(policy *sriovv1.SriovNetworkNodePolicy) bool {
	if p.prior == nil || p.prior.NumVfs > p.pf.TotalVfs {
		return false
	}
	c := claim{policy: policy, iface: *p.prior}
	c.iface.VfGroups = nil
	for _, group := range p.prior.VfGroups {
		if group.PolicyName != policy.Name {
			continue
		}
		first, last, err := ParseVfRange(group.VfRange)
		if err != nil || last >= p.prior.NumVfs {
			return false
		}
		for vf := first; vf <= last; vf++ {
			c.vfs = append(c.vfs, vf)
		}
		c.group = group
	}
	c.group.VfRange = ""
	slices.Sort(c.vfs)
	for i := range p.claims {
		if _, why := p.clash(&p.claims[i], &c); why != "" {
			return false
		}
		// What a stronger policy that agrees now has is no longer this one's to keep.
		c.vfs = slices.DeleteFunc(c.vfs, func(vf int) bool { return slices.Contains(p.claims[i].vfs, vf) })
	}
	if len(c.vfs) == 0 {
		return false
	}
	p.claims = append(p.claims, c)
	return true
}

// clash says why the weaker of two claims on the PF cannot stand beside the stronger.
func (p *pfPlan) clash(strong, weak *claim) (Reason, string) {
	reason, wins, mend := Overridden,
		fmt.Sprintf("policy %s has priority %d, the stronger, against %d", strong.policy.Name, priority(strong.policy), priority(weak.policy)),
		"or a lower priority number"
	if priority(strong.policy) == priority(weak.policy) {
		reason, wins, mend = Conflict,
			fmt.Sprintf("policies %s and %s have the same priority %d and %s was there first", strong.policy.Name, weak.policy.Name, priority(weak.policy), strong.policy.Name),
			"or another priority"
	}
	both := overlap(strong.vfs, weak.vfs)
	same := strong.group
	same.PolicyName = weak.group.PolicyName
	if len(both) > 0 && (reason == Overridden || same != weak.group) {
		return reason, fmt.Sprintf("VFs %s of PF %s stay with policy %s (%s): %s; give one of them other VFs in pfNames, %s",
			formatVFs(both), p, strong.policy.Name, differences(&strong.group, &weak.group), wins, mend)
	}
	for _, setting := range []struct{ field, strong, weak string }{
		{"eSwitchMode", strong.iface.EswitchMode, weak.iface.EswitchMode},
		{"linkType", strings.ToUpper(strong.iface.LinkType), strings.ToUpper(weak.iface.LinkType)},
		{"externallyManaged", fmt.Sprint(strong.iface.ExternallyManaged), fmt.Sprint(weak.iface.ExternallyManaged)},
	} {
		if setting.strong != "" && setting.weak != "" && setting.strong != setting.weak {
			return reason, fmt.Sprintf("%s of PF %s is %s by policy %s and cannot also be %s: %s; make them equal, or select another PF",
				setting.field, p, setting.strong, strong.policy.Name, setting.weak, wins)
		}
	}
	return "", ""
}

// differences names what two groups do not agree on, for people.
func differences(a, b *sriovv1.VfGroup) string {
	var all []string
	for _, d := range []struct {
		field string
		a, b  any
	}{
		{"resourceName", a.ResourceName, b.ResourceName},
		{"deviceType", a.DeviceType, b.DeviceType},
		{"mtu", a.Mtu, b.Mtu},
		{"isRdma", a.IsRdma, b.IsRdma},
		{"vdpaType", a.VdpaType, b.VdpaType},
		{"needVhostNet", a.NeedVhostNet, b.NeedVhostNet},
		{"excludeTopology", a.ExcludeTopology, b.ExcludeTopology},
	} {
		if d.a != d.b {
			all = append(all, fmt.Sprintf("%s %v, not %v", d.field, d.a, d.b))
		}
	}
	if all == nil {
		return "the same settings"
	}
	return strings.Join(all, ", ")
}

// overlap gives the numbers in both of two sorted lists.
func overlap(a, b []int) []int {
	var both []int
	for i, j := 0, 0; i < len(a) && j < len(b); {
		switch {
		case a[i] < b[j]:
			i++
		case a[i] > b[j]:
			j++
		default:
			both = append(both, a[i])
			i, j = i+1, j+1
		}
	}
	return both
}

// String names the PF for people: ens1f0 (0000:3b:00.0).
func (p *pfPlan) String() string {
	if p.pf.Name == "" {
		return p.pf.PciAddress
	}
	return p.pf.Name + " (" + p.pf.PciAddress + ")"
}

// spec writes the claims down. Bridges and system settings are not decided here: they
// stay as they were.
func (n *nodePlan) spec(prior sriovv1.SriovNetworkNodeStateSpec) sriovv1.SriovNetworkNodeStateSpec {
	spec := *prior.DeepCopy()
	spec.Interfaces = nil
	for _, p := range n.pfs {
		if len(p.claims) > 0 {
			spec.Interfaces = append(spec.Interfaces, p.spec())
		}
	}
	return spec
}

func (p *pfPlan) spec() sriovv1.Interface {
	iface := p.claims[0].iface
	iface.PciAddress, iface.Name = p.pf.PciAddress, p.pf.Name
	for _, c := range p.claims[1:] {
		iface.NumVfs = max(iface.NumVfs, c.iface.NumVfs)
		iface.Mtu = max(iface.Mtu, c.iface.Mtu)
		iface.LinkType = cmp.Or(iface.LinkType, c.iface.LinkType)
		iface.EswitchMode = cmp.Or(iface.EswitchMode, c.iface.EswitchMode)
	}
	// The strongest claim on a VF comes first; a weaker one that agrees takes the rest.
	owner := make([]*claim, iface.NumVfs)
	for i := range p.claims {
		for _, vf := range p.claims[i].vfs {
			if owner[vf] == nil {
				owner[vf] = &p.claims[i]
			}
		}
	}
	for first := 0; first < len(owner); {
		last := first
		for last+1 < len(owner) && owner[last+1] == owner[first] {
			last++
		}
		if owner[first] != nil {
			group := owner[first].group
			group.VfRange = FormatVfRange(first, last)
			iface.VfGroups = append(iface.VfGroups, group)
		}
		first = last + 1
	}
	return iface
}
