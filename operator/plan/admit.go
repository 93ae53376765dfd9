package plan

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// Cluster is what a policy that somebody is about to write would meet.
type Cluster struct {
	Policies []sriovv1.SriovNetworkNodePolicy
	Macvlans []sluicev1.MacvlanNodePolicy
	Nodes    []Node
	Bridges  bool // GateBridges is on
}

// Node is a node of a Cluster.
type Node struct {
	Name   string
	Labels map[string]string
	State  sriovv1.SriovNetworkNodeState // zero when it has none
}

// AdmitPolicy tells what would become of a policy, by doing what is done with it once it
// is written. Errors are what cannot be right: values that no NIC it selects can take, and
// conflicts, in which one of two policies would lose although neither yields. Warnings are
// what is allowed and helps nobody, or takes from others.
func (c *Cluster) AdmitPolicy(policy *sriovv1.SriovNetworkNodePolicy) (field.ErrorList, []string) {
	before, after := Compile(c.Policies, c.Bridges), Compile(replace(c.Policies, policy), c.Bridges)
	a := admission{policy: policy.Name, spec: &policy.Spec}
	for i := range c.Nodes {
		node := &c.Nodes[i]
		if !SelectsNode(policy.Spec.NodeSelector, node.Labels) {
			continue
		}
		a.node(node.Name)
		spec, findings := after.on(node).Desired(node.Labels, node.State.Status.Interfaces, node.State.Spec)
		a.own(findings)
		if suffers(policy.Name, findings) {
			_, were := before.on(node).Desired(node.Labels, node.State.Status.Interfaces, node.State.Spec)
			a.others(policy.Name, "SriovNetworkNodePolicy", were, findings)
		}
		a.slots(c.Macvlans, before, node, spec)
	}
	return a.verdict()
}

// AdmitMacvlanPolicy does for MacvlanNodePolicies what AdmitPolicy does.
func (c *Cluster) AdmitMacvlanPolicy(policy *sluicev1.MacvlanNodePolicy) (field.ErrorList, []string) {
	vfs, policies := Compile(c.Policies, c.Bridges), replace(c.Macvlans, policy)
	a := admission{policy: policy.Name, spec: &policy.Spec}
	for i := range c.Nodes {
		node := &c.Nodes[i]
		if !SelectsNode(policy.Spec.NodeSelector, node.Labels) {
			continue
		}
		a.node(node.Name)
		spec := vfs.Spec(node.Labels, node.State.Status.Interfaces, node.State.Spec)
		_, findings := DesiredMacvlan(macvlansOn(policies, node), node.Labels, node.State.Status.Links, spec)
		a.own(findings)
		if suffers(policy.Name, findings) {
			_, were := DesiredMacvlan(macvlansOn(c.Macvlans, node), node.Labels, node.State.Status.Links, spec)
			a.others(policy.Name, "MacvlanNodePolicy", were, findings)
		}
	}
	return a.verdict()
}

// on are the policies that select a node: that others do not is nothing to tell here.
func (p *Policies) on(node *Node) *Policies {
	some := &Policies{bridges: p.bridges}
	for _, c := range p.sorted {
		if SelectsNode(c.Spec.NodeSelector, node.Labels) {
			some.sorted = append(some.sorted, c)
		}
	}
	return some
}

func macvlansOn(policies []sluicev1.MacvlanNodePolicy, node *Node) []sluicev1.MacvlanNodePolicy {
	var some []sluicev1.MacvlanNodePolicy
	for i := range policies {
		if SelectsNode(policies[i].Spec.NodeSelector, node.Labels) {
			some = append(some, policies[i])
		}
	}
	return some
}

// AdmitPool does for SriovNetworkPoolConfigs what AdmitPolicy does for policies. A pool
// that shares a node with another is an error: the node would be in neither.
func AdmitPool(pool *sriovv1.SriovNetworkPoolConfig, pools []sriovv1.SriovNetworkPoolConfig, nodes []Node) (errs field.ErrorList, warnings []string) {
	if pool.Spec.OvsHardwareOffloadConfig.Name != "" {
		return nil, []string{"spec.ovsHardwareOffloadConfig has no effect: turn hardware offload on in Open vSwitch itself"}
	}
	path := field.NewPath("spec", "nodeSelector")
	all := NewPools(replace(pools, pool))
	if err := all.Invalid(pool.Name); err != nil {
		return field.ErrorList{field.Invalid(path, pool.Spec.NodeSelector, err.Error())}, nil
	}
	if most := pool.Spec.MaxUnavailable; most != nil && most.String() == "0" {
		warnings = append(warnings, "spec.maxUnavailable 0: no pod on this pool's nodes is ever evicted, and changes that need VFs which pods hold wait until they are gone")
	}
	matched := false
	var shared []remark
	for _, node := range nodes {
		of := all.Of(node.Labels)
		if !slices.ContainsFunc(of, func(p *sriovv1.SriovNetworkPoolConfig) bool { return p.Name == pool.Name }) {
			continue
		}
		matched = true
		for _, other := range of {
			if other.Name != pool.Name {
				shared = append(shared, remark{node.Name, fmt.Sprintf("nodeSelector selects nodes that SriovNetworkPoolConfig %s selects too, and a node in two pools is in neither: change one of the selectors", other.Name)})
			}
		}
	}
	if !matched {
		warnings = append(warnings, noNode)
	}
	for _, text := range together(shared) {
		errs = append(errs, field.Invalid(path, pool.Spec.NodeSelector, text))
	}
	return errs, warnings
}

const noNode = "spec.nodeSelector selects no Linux node: compare it with kubectl get nodes --show-labels"

// replace gives the policies with one of them as it is to be.
func replace[T any, P interface {
	*T
	GetName() string
}](policies []T, policy P) []T {
	kept := slices.DeleteFunc(slices.Clone(policies), func(p T) bool { return P(&p).GetName() == policy.GetName() })
	return append(kept, *policy)
}

// suffers tells whether another policy does not get what it asks for.
func suffers(policy string, findings []Finding) bool {
	return slices.ContainsFunc(findings, func(f Finding) bool { return f.Policy != policy && f.Refused() })
}

// admission gathers what would become of one policy on all nodes.
type admission struct {
	policy string
	spec   any // of the policy, for the values of fields

	current    string   // node being looked at
	matched    int      // nodes
	configured bool     // on some NIC of some node
	bare       []remark // nodes without a NIC for it
	unmet      []remark // values that a NIC cannot take
	errors     []remark
	warnings   []remark
}

// remark is a finding on one node.
type remark struct{ node, text string }

func (a *admission) node(name string) {
	a.current = name
	a.matched++
}

func (a *admission) remark(to *[]remark, text string) {
	*to = append(*to, remark{a.current, text})
}

// own sorts what became of the policy itself.
func (a *admission) own(findings []Finding) {
	for _, f := range findings {
		if f.Policy != a.policy {
			continue
		}
		switch message := f.Message; f.Reason { // what it keeps is no matter: it is not written yet
		case Configured:
			a.configured = true
		case PolicyInvalid, Conflict:
			a.remark(&a.errors, message)
		case TotalVFsExceeded, NICMismatch:
			a.remark(&a.unmet, message)
		case Overridden, UnsupportedByNode, PolicyIgnored:
			a.remark(&a.warnings, message)
		case NotSelected:
			if f.Named {
				a.remark(&a.warnings, message)
			}
		case NoNICSelected, InventoryPending:
			a.remark(&a.bare, message)
		}
	}
}

// others finds policies, other than the one named, that lose by it.
func (a *admission) others(policy, kind string, before, after []Finding) {
	for _, f := range after {
		if f.Policy == policy || !f.Refused() || slices.ContainsFunc(before, func(b Finding) bool {
			return b.Policy == f.Policy && b.PCIAddress == f.PCIAddress && b.Link == f.Link && (b.Reason == f.Reason || b.Refused() && f.Reason != Conflict)
		}) {
			continue
		}
		to := &a.warnings
		if f.Reason == Conflict {
			to = &a.errors
		}
		a.remark(to, fmt.Sprintf("%s %s would not have what it asks for: %s", kind, f.Policy, f))
	}
}

// slots finds MacvlanNodePolicies that lose their slots because of the VFs of this policy.
func (a *admission) slots(macvlans []sluicev1.MacvlanNodePolicy, before *Policies, node *Node, spec sriovv1.SriovNetworkNodeStateSpec) {
	macvlans = macvlansOn(macvlans, node)
	const none = "" // one of the same name is another policy too
	_, findings := DesiredMacvlan(macvlans, node.Labels, node.State.Status.Links, spec)
	if !suffers(none, findings) {
		return
	}
	_, were := DesiredMacvlan(macvlans, node.Labels, node.State.Status.Links, before.Spec(node.Labels, node.State.Status.Interfaces, node.State.Spec))
	a.others(none, "MacvlanNodePolicy", were, findings)
}

// verdict makes errors and warnings out of the remarks.
func (a *admission) verdict() (errs field.ErrorList, warnings []string) {
	if a.matched == 0 {
		return nil, []string{noNode}
	}
	if a.configured {
		a.warnings = append(a.warnings, a.unmet...)
	} else {
		a.errors = append(a.errors, a.unmet...)
	}
	if len(a.bare) == a.matched {
		a.warnings = append(a.warnings, a.bare...)
	}
	for _, text := range together(a.errors) {
		path, value := a.field(text)
		errs = append(errs, field.Invalid(path, value, text))
	}
	return errs, together(a.warnings)
}

// field is the field that a remark is about: messages begin with it, unless they are
// about NICs, which the selector selects.
func (a *admission) field(text string) (*field.Path, any) {
	path := field.NewPath("spec")
	spec, err := runtime.DefaultUnstructuredConverter.ToUnstructured(a.spec)
	if err != nil {
		return path, ""
	}
	first, _, _ := strings.Cut(text, " ")
	first, _, _ = strings.Cut(first, ".")
	if value, ok := spec[first]; ok {
		return path.Child(first), value
	}
	for _, selector := range []string{"nicSelector", "parentSelector"} {
		if value, ok := spec[selector]; ok {
			return path.Child(selector), value
		}
	}
	return path, ""
}

// together says what is the same on several nodes once, and each with where.
func together(remarks []remark) []string {
	nodes := map[string][]string{}
	for _, r := range remarks {
		if !slices.Contains(nodes[r.text], r.node) {
			nodes[r.text] = append(nodes[r.text], r.node)
		}
	}
	var all []string
	for text, on := range nodes {
		slices.Sort(on)
		where := " (on node " + on[0]
		if more := len(on) - 1; more > 0 {
			where += fmt.Sprintf(" and %d more", more)
		}
		all = append(all, text+where+")")
	}
	slices.SortFunc(all, func(a, b string) int { return cmp.Compare(a, b) })
	const most = 8
	if more := len(all) - most; more > 0 {
		all = append(all[:most], fmt.Sprintf("and %d more findings", more))
	}
	return all
}
