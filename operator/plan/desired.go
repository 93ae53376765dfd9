package plan

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"

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
	PolicyIgnored     Reason = "PolicyIgnored"     // the name default, or no VFs: it asks for nothing
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
	Owner      string // the policy that has it in the spec, when that is another one that wants the very same
	Link       string // the same for a MacvlanNodePolicy: the link whose slots it is about
	Reason     Reason
	Message    string // names object, field, value and, unless all is well, the mend
	Named      bool   // the selector names the PF or link, by its name or address, and does not select it all the same
	Keeps      string // what a refused policy keeps of what it had: VFs or slots; empty for nothing
}

// String is the message, with what the policy keeps until that is mended.
func (f Finding) String() string {
	if f.Keeps == "" {
		return f.Message
	}
	return f.Message + "; until then it keeps the " + f.Keeps + " it had"
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
	vfs    []int              // sorted
	group  sriovv1.VfGroup    // what the VFs are for; VfRange is left empty
	iface  sriovv1.Interface  // what the PF shall be; VfGroups is left empty
	ovs    *sriovv1.OVSConfig // the bridge it shall be the uplink of; nil when the policy asks for none
}

func (c *claim) rank() rank { return rankOf(c.policy, c.policy.Spec.Priority) }

// Policies are policies made ready for planning many nodes. They are not changed, and
// must not be changed by others either.
type Policies struct {
	sorted  []compiled // strongest first
	bridges bool       // GateBridges is on
}

// compiled is a policy with what is the same on all nodes.
type compiled struct {
	*sriovv1.SriovNetworkNodePolicy
	pfNames []pfChoice
	reason  Reason // when it is wrong on every node
	why     string
}

func (c *compiled) rank() rank { return rankOf(c, c.Spec.Priority) }

// pfChoice is an entry of pfNames.
type pfChoice struct {
	name string
	vfs  []int // nil without a choice of VFs
}

// Compile makes policies ready for planning, bridges with GateBridges.
func Compile(policies []sriovv1.SriovNetworkNodePolicy, bridges bool) *Policies {
	p := &Policies{sorted: make([]compiled, len(policies)), bridges: bridges}
	for i := range policies {
		c := compiled{SriovNetworkNodePolicy: &policies[i]}
		c.reason, c.why = refuseEverywhere(c.SriovNetworkNodePolicy)
		if c.why == "" && c.Spec.Bridge.OVS != nil && !bridges {
			c.reason, c.why = UnsupportedByNode, "bridge.ovs needs the feature gate "+GateBridges+": set featureGates "+GateBridges+" to true in SriovOperatorConfig default, or remove bridge"
		}
		for _, entry := range policies[i].Spec.NicSelector.PfNames {
			name, vfs, err := ParsePfName(string(entry))
			if err != nil && c.why == "" {
				c.reason, c.why = PolicyInvalid, "nicSelector."+err.Error()
			}
			c.pfNames = append(c.pfNames, pfChoice{name, vfs})
		}
		p.sorted[i] = c
	}
	slices.SortFunc(p.sorted, func(a, b compiled) int { return a.rank().compare(b.rank()) })
	return p
}

// Desired gives the spec of a node and what became of each policy on it.
//
// inventory is the SriovNetworkNodeState's status.interfaces and prior its present spec.
// With an empty inventory the prior spec stands: the node has yet to say what it has.
// Findings are sorted by policy and PF.
func (p *Policies) Desired(nodeLabels map[string]string, inventory []sriovv1.InterfaceExt, prior sriovv1.SriovNetworkNodeStateSpec,
) (sriovv1.SriovNetworkNodeStateSpec, []Finding) {
	node := newNodePlan(inventory, prior)
	node.explain = true
	spec := node.plan(p, nodeLabels, prior)
	slices.SortStableFunc(node.findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Policy, b.Policy), cmp.Compare(a.PCIAddress, b.PCIAddress))
	})
	return spec, node.findings
}

// Spec is Desired without the findings, which take most of its time.
func (p *Policies) Spec(nodeLabels map[string]string, inventory []sriovv1.InterfaceExt, prior sriovv1.SriovNetworkNodeStateSpec) sriovv1.SriovNetworkNodeStateSpec {
	return newNodePlan(inventory, prior).plan(p, nodeLabels, prior)
}

// Desired is that of the compiled policies, for one node, with all feature gates on.
func Desired(policies []sriovv1.SriovNetworkNodePolicy, nodeLabels map[string]string,
	inventory []sriovv1.InterfaceExt, prior sriovv1.SriovNetworkNodeStateSpec,
) (sriovv1.SriovNetworkNodeStateSpec, []Finding) {
	return Compile(policies, true).Desired(nodeLabels, inventory, prior)
}

// nodePlan gathers the claims in effect, strongest first.
type nodePlan struct {
	pfs      []*pfPlan // by PCI address
	explain  bool      // findings are wanted
	findings []Finding
	// resources remembers the policy that settled what holds for all of a resource.
	resources map[string]*sriovv1.SriovNetworkNodePolicy
}

type pfPlan struct {
	pf     *sriovv1.InterfaceExt
	prior  *sriovv1.Interface // nil when the PF had no spec
	ovs    *sriovv1.OVSConfig // the bridge it had; nil when none, or none is to be kept
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

// plan lets the policies, strongest first, claim their VFs.
func (n *nodePlan) plan(p *Policies, nodeLabels map[string]string, prior sriovv1.SriovNetworkNodeStateSpec) sriovv1.SriovNetworkNodeStateSpec {
	if p.bridges {
		for _, pf := range n.pfs {
			pf.ovs = had(&prior.Bridges, pf.pf.PciAddress)
		}
	}
	for i := range p.sorted {
		n.add(&p.sorted[i], nodeLabels)
	}
	if len(n.pfs) == 0 {
		return *prior.DeepCopy()
	}
	return n.spec(prior)
}

// find takes down what became of a policy, if anybody wants to know.
func (n *nodePlan) find(policy *compiled, p *pfPlan, reason Reason, message func() string) {
	if !n.explain {
		return
	}
	f := Finding{Policy: policy.Name, Reason: reason, Message: message()}
	if p != nil {
		f.PCIAddress, f.PFName = p.pf.PciAddress, p.pf.Name
	}
	n.findings = append(n.findings, f)
}

// add lets a policy claim its VFs. Stronger policies have been added before.
func (n *nodePlan) add(policy *compiled, nodeLabels map[string]string) {
	if !SelectsNode(policy.Spec.NodeSelector, nodeLabels) {
		n.find(policy, nil, NodeNotSelected, func() string { return whyNotNode(policy.Spec.NodeSelector, nodeLabels) })
		return
	}
	if policy.why != "" {
		kept := false
		for _, p := range n.pfs {
			kept = policy.reason != PolicyIgnored && p.keep(policy.SriovNetworkNodePolicy) || kept
		}
		n.find(policy, nil, policy.reason, func() string { return policy.why })
		n.keeps(kept)
		return
	}
	if len(n.pfs) == 0 {
		n.find(policy, nil, InventoryPending, func() string {
			if policy.Spec.NicSelector.NetFilter != "" {
				return "the node has not reported any SR-IOV NIC, and nicSelector.netFilter selects those that a virtual machine has whole: one that is itself a VF, or virtio, is not given to pods"
			}
			return "the node has not reported any SR-IOV NIC: see that it has one, that SR-IOV is on in its firmware, and that the agent's pod runs there"
		})
		return
	}
	var whys []string
	for _, p := range n.pfs {
		whyNot := policy.whyNotNIC(p.pf)
		if whyNot == nil {
			n.claim(policy, p)
		} else if n.explain {
			why := fmt.Sprintf("not PF %s: %s", p, whyNot())
			n.find(policy, p, NotSelected, func() string { return why })
			n.findings[len(n.findings)-1].Named = policy.namesPF(p.pf)
			whys = append(whys, why)
		}
	}
	if len(whys) == len(n.pfs) {
		n.find(policy, nil, NoNICSelected, func() string { return "nicSelector selects no PF of the node: " + strings.Join(whys, "; ") })
	}
}

// keeps notes whether the policy that was found refused last keeps VFs it had.
func (n *nodePlan) keeps(kept bool) {
	if kept && n.explain {
		n.findings[len(n.findings)-1].Keeps = "VFs"
	}
}

// claim adds the policy's claim on a PF that it selects, or the finding that says why not.
func (n *nodePlan) claim(policy *compiled, p *pfPlan) {
	if reason, why := p.refuse(policy.SriovNetworkNodePolicy); why != "" {
		n.find(policy, p, reason, func() string { return why })
		n.keeps(p.keep(policy.SriovNetworkNodePolicy))
		return
	}
	c := newClaim(policy.SriovNetworkNodePolicy, p.pf, policy.chosenVFs(p.pf))
	for i := range p.claims {
		if reason, why := p.clash(&p.claims[i], &c); why != "" {
			n.find(policy, p, reason, func() string { return why })
			return
		}
	}
	if why := n.clash(policy.SriovNetworkNodePolicy); why != "" {
		n.find(policy, p, Conflict, func() string { return why })
		return
	}
	p.claims = append(p.claims, c)
	n.find(policy, p, Configured, func() string {
		return fmt.Sprintf("PF %s has VFs %s of %d for resource %s", p, formatVFs(c.vfs), policy.Spec.NumVfs, policy.Spec.ResourceName)
	})
}

// clash says why the policy cannot share its resource with those that have it already.
// Kubelet asks a resource, not a device, whether it has NUMA nodes, and a pod that asks
// for a resource must know what driver its VF has.
func (n *nodePlan) clash(policy *sriovv1.SriovNetworkNodePolicy) string {
	first := n.resources[policy.Spec.ResourceName]
	if first == nil {
		n.resources[policy.Spec.ResourceName] = policy
		return ""
	}
	for _, setting := range []struct{ field, first, here string }{
		{"excludeTopology", strconv.FormatBool(first.Spec.ExcludeTopology), strconv.FormatBool(policy.Spec.ExcludeTopology)},
		{"allocation", cmp.Or(first.Spec.Allocation, sriovv1.AllocationPack), cmp.Or(policy.Spec.Allocation, sriovv1.AllocationPack)},
		{"deviceType", cmp.Or(first.Spec.DeviceType, sriovv1.DeviceTypeNetDevice), cmp.Or(policy.Spec.DeviceType, sriovv1.DeviceTypeNetDevice)},
	} {
		if setting.first != setting.here {
			return fmt.Sprintf("%s is %s here and %s in policy %s, which has the same resourceName %s: make them equal or change one resourceName",
				setting.field, setting.here, setting.first, first.Name, policy.Spec.ResourceName)
		}
	}
	return ""
}

// refuseEverywhere says what is wrong with a policy whatever the NIC. Most of it the API
// server refuses already; an object may predate those rules.
func refuseEverywhere(policy *sriovv1.SriovNetworkNodePolicy) (Reason, string) {
	spec := &policy.Spec
	s := &spec.NicSelector
	switch {
	case policy.Name == "default":
		return PolicyIgnored, "a policy named default has no effect, as in the SR-IOV network operator: to make VFs, give it another name"
	case spec.NumVfs == 0:
		return PolicyIgnored, "numVfs 0 makes no VFs: set it to 1 or more, or delete the policy"
	case len(s.UnknownKeys) > 0:
		return PolicyInvalid, fmt.Sprintf("nicSelector has the unknown key %s: use vendor, deviceID, rootDevices, pfNames or netFilter", strings.Join(s.UnknownKeys, ", "))
	case s.Vendor == "" && s.DeviceID == "" && s.NetFilter == "" && len(s.RootDevices) == 0 && len(s.PfNames) == 0:
		return PolicyInvalid, "nicSelector is empty: give at least one of vendor, deviceID, rootDevices, pfNames, netFilter"
	case spec.NumVfs < 0:
		return PolicyInvalid, fmt.Sprintf("numVfs %d makes no VFs: set it to 1 or more; to take VFs away, delete the policy", spec.NumVfs)
	case !resourceName.MatchString(spec.ResourceName):
		return PolicyInvalid, fmt.Sprintf("resourceName %q is not a resource name: use 1 to 63 letters, digits, _ and -, with a letter or digit at both ends", spec.ResourceName)
	}
	if why := combined(spec); why != "" {
		return PolicyInvalid, why
	}
	for _, entry := range s.PfNames {
		_, vfs, err := ParsePfName(string(entry))
		if err == nil && len(vfs) > 0 && vfs[len(vfs)-1] >= spec.NumVfs {
			return PolicyInvalid, fmt.Sprintf("nicSelector.pfNames %s reaches past VF %d, the last of numVfs %d: end the range there or raise numVfs", entry, spec.NumVfs-1, spec.NumVfs)
		}
	}
	return "", ""
}

// combined says which fields of a policy cannot go together.
func combined(spec *sriovv1.SriovNetworkNodePolicySpec) string {
	s := &spec.NicSelector
	switchdev := spec.EswitchMode == sriovv1.EswitchModeSwitchdev
	infiniBand := strings.EqualFold(spec.LinkType, sriovv1.LinkTypeIB)
	switch {
	case s.NetFilter != "" && (s.Vendor != "" || s.DeviceID != "" || len(s.RootDevices) > 0 || len(s.PfNames) > 0):
		return fmt.Sprintf("nicSelector.netFilter %s must stand alone: remove it, or remove vendor, deviceID, rootDevices and pfNames", s.NetFilter)
	case s.NetFilter != "" && (spec.EswitchMode != "" || infiniBand):
		return "nicSelector.netFilter selects virtual NICs, which have no eSwitchMode and linkType eth: remove netFilter, or eSwitchMode and linkType"
	case spec.DeviceType == sriovv1.DeviceTypeVfioPci && spec.IsRdma:
		return "isRdma true cannot go with deviceType vfio-pci, because RDMA needs the VF's kernel driver: set deviceType to netdevice or isRdma to false"
	case spec.VdpaType != "" && spec.DeviceType == sriovv1.DeviceTypeVfioPci:
		return fmt.Sprintf("vdpaType %s cannot go with deviceType vfio-pci: set deviceType to netdevice or remove vdpaType", spec.VdpaType)
	case spec.VdpaType != "" && !switchdev:
		return fmt.Sprintf("vdpaType %s needs the NIC in switchdev mode: set eSwitchMode to switchdev or remove vdpaType", spec.VdpaType)
	case switchdev && infiniBand:
		return fmt.Sprintf("eSwitchMode switchdev cannot go with linkType %s: set linkType to eth or eSwitchMode to legacy", spec.LinkType)
	}
	return refuseBridge(spec)
}

// resourceName is the form of a resource's name, after the prefix.
var resourceName = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?$`)

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
	case spec.EswitchMode == sriovv1.EswitchModeSwitchdev && pf.EswitchMode == "":
		return NICMismatch, fmt.Sprintf("eSwitchMode switchdev: the driver of PF %s has no eswitch that devlink can switch: remove eSwitchMode, or select another NIC", p)
	case spec.Bridge.OVS != nil && len(BridgeName(pf.PciAddress)) > maxLinkName:
		return NICMismatch, fmt.Sprintf("bridge.ovs: the bridge of PF %s would be called %s, which is longer than the %d characters that a link's name can have: remove bridge, or select another NIC", p, BridgeName(pf.PciAddress), maxLinkName)
	case spec.ExternallyManaged && spec.EswitchMode != "" && pf.EswitchMode != "" && spec.EswitchMode != pf.EswitchMode:
		return NICMismatch, fmt.Sprintf("eSwitchMode %s with externallyManaged: PF %s is in %s: change it there, or eSwitchMode", spec.EswitchMode, p, pf.EswitchMode)
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
		ovs:    spec.Bridge.OVS,
		group: sriovv1.VfGroup{
			ResourceName:    spec.ResourceName,
			DeviceType:      cmp.Or(spec.DeviceType, sriovv1.DeviceTypeNetDevice),
			PolicyName:      policy.Name,
			Mtu:             spec.Mtu,
			IsRdma:          spec.IsRdma || (strings.EqualFold(spec.LinkType, sriovv1.LinkTypeIB) && spec.DeviceType != sriovv1.DeviceTypeVfioPci),
			VdpaType:        spec.VdpaType,
			NeedVhostNet:    spec.NeedVhostNet,
			ExcludeTopology: spec.ExcludeTopology,
			Allocation:      spec.Allocation,
			RequireCarrier:  spec.RequireCarrier,
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
	if asked := policy.Spec.Bridge.OVS; asked != nil && p.ovs != nil {
		ovs := *p.ovs
		if p.prior.Mtu > 0 { // stands in its place
			ovs.Uplink.Interface.MTURequest = asked.Uplink.Interface.MTURequest
		}
		c.ovs = &ovs
	}
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
	high, low := strong.rank(), weak.rank()
	reason := high.reason(low)
	both := overlap(strong.vfs, weak.vfs)
	same := strong.group
	same.PolicyName = weak.group.PolicyName
	if len(both) > 0 && (reason == Overridden || same != weak.group) {
		mend := "or a lower priority number"
		if reason == Conflict {
			mend = "or another priority"
		}
		return reason, fmt.Sprintf("VFs %s of PF %s stay with policy %s (%s): %s; give one of them other VFs in pfNames, %s",
			formatVFs(both), p, strong.policy.Name, differences(&strong.group, &weak.group), high.wins(low), mend)
	}
	for _, setting := range []struct{ field, strong, weak string }{
		{"eSwitchMode", strong.iface.EswitchMode, weak.iface.EswitchMode},
		{"linkType", strings.ToUpper(strong.iface.LinkType), strings.ToUpper(weak.iface.LinkType)},
		{"externallyManaged", strconv.FormatBool(strong.iface.ExternallyManaged), strconv.FormatBool(weak.iface.ExternallyManaged)},
	} {
		if setting.strong != "" && setting.weak != "" && setting.strong != setting.weak {
			return reason, fmt.Sprintf("%s of PF %s is %s by policy %s and cannot also be %s: %s; make them equal, or select another PF",
				setting.field, p, setting.strong, strong.policy.Name, setting.weak, high.wins(low))
		}
	}
	if strong.ovs != nil && weak.ovs != nil && !equality.Semantic.DeepEqual(strong.ovs, weak.ovs) {
		return reason, fmt.Sprintf("bridge.ovs of PF %s is as policy %s says and cannot also be otherwise, for a PF is in one bridge: %s; make them equal, or remove one",
			p, strong.policy.Name, high.wins(low))
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
		{"allocation", cmp.Or(a.Allocation, sriovv1.AllocationPack), cmp.Or(b.Allocation, sriovv1.AllocationPack)},
		{"requireCarrier", a.RequireCarrier, b.RequireCarrier},
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

// spec writes the claims down. System settings are not decided here: they stay as they
// were.
func (n *nodePlan) spec(prior sriovv1.SriovNetworkNodeStateSpec) sriovv1.SriovNetworkNodeStateSpec {
	prior.Interfaces, prior.Bridges = nil, sriovv1.Bridges{}
	spec := *prior.DeepCopy()
	for _, p := range n.pfs {
		if len(p.claims) > 0 {
			spec.Interfaces = append(spec.Interfaces, p.spec())
			if bridge := p.bridge(spec.Interfaces[len(spec.Interfaces)-1].Mtu); bridge != nil {
				spec.Bridges.OVS = append(spec.Bridges.OVS, *bridge)
			}
		}
	}
	slices.SortFunc(spec.Bridges.OVS, func(a, b sriovv1.OVSConfigExt) int { return cmp.Compare(a.Name, b.Name) })
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
