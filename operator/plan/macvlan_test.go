package plan

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

type mvEdit = func(*sluicev1.MacvlanNodePolicy)

// mvPolicy makes a valid policy for ens1f0 of every node; edits change it.
func mvPolicy(name string, edits ...mvEdit) sluicev1.MacvlanNodePolicy {
	p := sluicev1.MacvlanNodePolicy{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(noon)}}
	p.Spec.ResourceName, p.Spec.Slots, p.Spec.ParentSelector.PfNames = "res-"+name, 8, []string{"ens1f0"}
	for _, edit := range edits {
		edit(&p)
	}
	return p
}

func mvSpec(edit func(*sluicev1.MacvlanNodePolicySpec)) mvEdit {
	return func(p *sluicev1.MacvlanNodePolicy) { edit(&p.Spec) }
}
func mvNames(names ...string) mvEdit {
	return mvSpec(func(s *sluicev1.MacvlanNodePolicySpec) { s.ParentSelector.PfNames = names })
}
func mvKinds(kinds ...sluicev1.LinkKind) mvEdit {
	return mvSpec(func(s *sluicev1.MacvlanNodePolicySpec) {
		s.ParentSelector.PfNames, s.ParentSelector.Kinds = nil, kinds
	})
}
func mvVlan(vlan int) mvEdit {
	return mvSpec(func(s *sluicev1.MacvlanNodePolicySpec) { s.Vlan = vlan })
}
func mvMtu(mtu int) mvEdit { return mvSpec(func(s *sluicev1.MacvlanNodePolicySpec) { s.Mtu = mtu }) }
func mvSlots(n int) mvEdit { return mvSpec(func(s *sluicev1.MacvlanNodePolicySpec) { s.Slots = n }) }
func mvPrio(n int) mvEdit  { return mvSpec(func(s *sluicev1.MacvlanNodePolicySpec) { s.Priority = &n }) }
func mvResource(name string) mvEdit {
	return mvSpec(func(s *sluicev1.MacvlanNodePolicySpec) { s.ResourceName = name })
}
func mvLater(p *sluicev1.MacvlanNodePolicy) {
	p.CreationTimestamp = metav1.NewTime(noon.Add(time.Hour))
}

// mvLinks is a node with a link of every kind.
func mvLinks() []sriovv1.Link {
	up := func(l sriovv1.Link) sriovv1.Link { l.LinkAdminState, l.Mtu = "up", 1500; return l }
	return []sriovv1.Link{
		up(sriovv1.Link{Name: "ens1f0", Kind: "physical", AltNames: []string{"enp1s0f0"}, PciAddress: "0000:01:00.0", Vendor: "8086", DeviceID: "158b"}),
		up(sriovv1.Link{Name: "ens1f1", Kind: "physical", PciAddress: "0000:01:00.1", Vendor: "8086", DeviceID: "158b"}),
		up(sriovv1.Link{Name: "ens2f0", Kind: "physical", PciAddress: "0000:02:00.0", Vendor: "15b3", DeviceID: "101b", Master: "bond0"}),
		up(sriovv1.Link{Name: "bond0", Kind: "bond"}),
		up(sriovv1.Link{Name: "br0", Kind: "bridge"}),
		up(sriovv1.Link{Name: "storage", Kind: "vlan", Lower: "bond0", Vlan: 7}),
		up(sriovv1.Link{Name: "vxlan5", Kind: "vxlan"}),
		up(sriovv1.Link{Name: "ens1f1.20", Kind: "vlan", Lower: "ens1f1", Vlan: 20, Managed: true}),
		up(sriovv1.Link{Name: "ens1f1.30", Kind: "vlan", Lower: "ens1f1", Vlan: 30, Master: "br0"}),
	}
}

// mvSummary writes parents in one line each.
func mvSummary(parents []sriovv1.MacvlanParent) string {
	var lines []string
	for _, p := range parents {
		lines = append(lines, fmt.Sprintf("%s: %s.%d*%d %s", p.PolicyName, p.Link, p.Vlan, p.Slots, p.ResourceName))
	}
	return strings.Join(lines, "\n")
}

func TestDesiredMacvlan(t *testing.T) {
	type policies = []sluicev1.MacvlanNodePolicy
	invalid := func(edit func(*sluicev1.MacvlanNodePolicySpec)) policies {
		return policies{mvPolicy("a", mvSpec(edit))}
	}
	for _, c := range []struct {
		name     string
		policies policies
		want     string
		findings []string // policy reason link: part of message
	}{
		{"one link", policies{mvPolicy("a")}, "a: ens1f0.0*8 res-a",
			[]string{"a Configured ens1f0: link ens1f0 has 8 slots for resource res-a", "a NotSelected br0: not br0: its name is not among parentSelector.pfNames ens1f0"}},
		{"an alternative name", policies{mvPolicy("a", mvNames("enp1s0f0"), mvVlan(100))}, "a: ens1f0.100*8 res-a",
			[]string{"a Configured ens1f0: VLAN 100 of link ens1f0 has 8 slots"}},
		{"every kind by name", policies{mvPolicy("a", mvNames("ens1f0", "bond0", "br0", "storage", "vxlan5"))},
			"a: bond0.0*8 res-a\na: br0.0*8 res-a\na: ens1f0.0*8 res-a\na: storage.0*8 res-a\na: vxlan5.0*8 res-a", nil},
		{"a vendor", policies{mvPolicy("a", mvNames(), mvSpec(func(s *sluicev1.MacvlanNodePolicySpec) { s.ParentSelector.Vendor = "8086" }))},
			"a: ens1f0.0*8 res-a\na: ens1f1.0*8 res-a", []string{`a NotSelected br0: not br0: its vendor is "", parentSelector.vendor wants 8086`}},
		{"a device and an address", policies{mvPolicy("a", mvNames(), mvSpec(func(s *sluicev1.MacvlanNodePolicySpec) {
			s.ParentSelector.DeviceID, s.ParentSelector.RootDevices = "158B", []string{"0000:01:00.1"}
		}))}, "a: ens1f1.0*8 res-a", []string{`a NotSelected ens1f0: its PCI address is "0000:01:00.0", not among parentSelector.rootDevices 0000:01:00.1`, `a NotSelected ens2f0: its device is "101b", parentSelector.deviceID wants 158B`}},
		{"a kind", policies{mvPolicy("a", mvKinds("bond", "bridge"))}, "a: bond0.0*8 res-a\na: br0.0*8 res-a",
			[]string{"a NotSelected ens1f0: it is a physical link, parentSelector.kinds wants bond bridge"}},
		{"a kind does not select what was made for a policy", policies{mvPolicy("a", mvKinds("vlan"))}, "a: storage.0*8 res-a",
			[]string{"a NotSelected ens1f1.20: it was made for the vlan of a policy: name it in parentSelector.pfNames", "a NICMismatch ens1f1.30: link ens1f1.30 is a port of br0"}},
		{"a name does", policies{mvPolicy("a", mvNames("ens1f1.20"), mvVlan(9))}, "a: ens1f1.20.9*8 res-a", nil},
		{"a port of a bond", policies{mvPolicy("a", mvNames("ens2f0"), mvVlan(100))}, "",
			[]string{"a NICMismatch ens2f0: link ens2f0 is a port of bond0, which takes its packets, and the kernel makes no MacVLAN sub-interface on it (EBUSY): select bond0 instead"}},
		{"a VLAN whose device is a port of a bridge", policies{mvPolicy("a", mvNames("ens1f1"), mvVlan(30))}, "",
			[]string{"a NICMismatch ens1f1: link ens1f1.30 is a port of br0"}},
		{"a link and its VLANs", policies{mvPolicy("a"), mvPolicy("b", mvVlan(1)), mvPolicy("c", mvVlan(2))},
			"a: ens1f0.0*8 res-a\nb: ens1f0.1*8 res-b\nc: ens1f0.2*8 res-c", nil},
		{"one resource on two links", policies{mvPolicy("a", mvResource("r")), mvPolicy("b", mvResource("r"), mvNames("bond0"), mvSlots(2))},
			"b: bond0.0*2 r\na: ens1f0.0*8 r", nil},
		{"equal wants merge", policies{mvPolicy("a", mvResource("r")), mvPolicy("b", mvResource("r"), mvNames("enp1s0f0"))},
			"a: ens1f0.0*8 r", []string{"b Configured ens1f0: link ens1f0 has 8 slots for resource r, which policy a asks for too"}},
		{"a VLAN device and its VLAN are one parent", policies{mvPolicy("a", mvNames("storage"), mvResource("r")), mvPolicy("b", mvNames("bond0"), mvVlan(7), mvResource("r"))},
			"a: storage.0*8 r", []string{"b Configured storage: VLAN 7 of link bond0 has 8 slots for resource r, which policy a asks for too"}},
		{"and have one owner", policies{mvPolicy("a", mvNames("storage"), mvLater), mvPolicy("b", mvNames("bond0"), mvVlan(7))},
			"b: bond0.7*8 res-b", []string{"a Conflict storage: VLAN 7 of link bond0 stays with policy b (resourceName res-b, not res-a): policies b and a have the same priority 99 and b was there first; make them equal, or give one of them another link or vlan, or a lower priority number"}},
		{"the lower number wins", policies{mvPolicy("a"), mvPolicy("b", mvPrio(10), mvLater)}, "b: ens1f0.0*8 res-b",
			[]string{"a Overridden ens1f0: link ens1f0 stays with policy b (resourceName res-b, not res-a): policy b has priority 10, the stronger, against 99"}},
		{"an absent priority is 99", policies{mvPolicy("a", mvPrio(98), mvLater), mvPolicy("b")}, "a: ens1f0.0*8 res-a", []string{"b Overridden ens1f0: "}},
		{"other MTU", policies{mvPolicy("a", mvResource("r"), mvMtu(9000)), mvPolicy("b", mvResource("r"), mvMtu(1500))}, "a: ens1f0.0*8 r",
			[]string{"b Conflict ens1f0: link ens1f0 stays with policy a (mtu 9000, not 1500)"}},
		{"a loser keeps its other links", policies{mvPolicy("a"), mvPolicy("b", mvNames("ens1f0", "br0"))}, "a: ens1f0.0*8 res-a\nb: br0.0*8 res-b", nil},
		{"topology told and not told", policies{mvPolicy("a", mvResource("r")), mvPolicy("b", mvResource("r"), mvNames("br0"), mvSpec(func(s *sluicev1.MacvlanNodePolicySpec) { s.ExcludeTopology = true }))},
			"a: ens1f0.0*8 r", []string{"b Conflict : excludeTopology is true here and false in policy a, which has the same resourceName r"}},
		{"resources that differ in case", policies{mvPolicy("a", mvResource("r")), mvPolicy("b", mvResource("R"), mvNames("br0"))},
			"a: ens1f0.0*8 r", []string{"b Conflict : resourceName R differs from r of policy a in case only"}},
		{"a resource of VFs", policies{mvPolicy("a", mvResource("vfs"))}, "",
			[]string{"a Conflict : resourceName vfs is that of SriovNetworkNodePolicy nics, which has VFs on the node: give one of them another name"}},
		{"no link", policies{mvPolicy("a", mvNames("eth9"))}, "", []string{"a NoNICSelected : parentSelector selects no link of the node: not bond0: its name is not among parentSelector.pfNames eth9; not br0", "a NoNICSelected : and 1 more, see status.links"}},
		{"another node", policies{mvPolicy("a", mvSpec(func(s *sluicev1.MacvlanNodePolicySpec) { s.NodeSelector = map[string]string{"role": "db"} }))}, "",
			[]string{`a NodeNotSelected : the node's label role is "worker", nodeSelector wants "db"`}},
		{"an unknown key", invalid(func(s *sluicev1.MacvlanNodePolicySpec) { s.ParentSelector.UnknownKeys = []string{"pfName"} }), "",
			[]string{"a PolicyInvalid : parentSelector has the unknown key pfName: use vendor, deviceID, rootDevices, pfNames or kinds"}},
		{"an empty selector", invalid(func(s *sluicev1.MacvlanNodePolicySpec) { s.ParentSelector.PfNames = nil }), "", []string{"a PolicyInvalid : parentSelector is empty"}},
		{"a VF range", invalid(func(s *sluicev1.MacvlanNodePolicySpec) { s.ParentSelector.PfNames = []string{"ens1f0#0-3"} }), "", []string{"a PolicyInvalid : parentSelector.pfNames ens1f0#0-3 has a VF range"}},
		{"no VLAN ID", invalid(func(s *sluicev1.MacvlanNodePolicySpec) { s.Vlan = 4095 }), "", []string{"a PolicyInvalid : vlan 4095 is not a VLAN ID"}},
		{"no MTU", invalid(func(s *sluicev1.MacvlanNodePolicySpec) { s.Mtu = 67 }), "", []string{"a PolicyInvalid : mtu 67 is not an MTU"}},
		{"no slots", invalid(func(s *sluicev1.MacvlanNodePolicySpec) { s.Slots = 0 }), "", []string{"a PolicyInvalid : slots 0 is not a number of slots"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := sriovv1.SriovNetworkNodeStateSpec{Interfaces: []sriovv1.Interface{{VfGroups: []sriovv1.VfGroup{{ResourceName: "VFs", PolicyName: "nics"}}}}}
			parents, findings := DesiredMacvlan(c.policies, map[string]string{"role": "worker"}, mvLinks(), spec)
			if diff := cmp.Diff(c.want, mvSummary(parents)); diff != "" {
				t.Error(diff)
			}
			for _, want := range c.findings {
				head, part, _ := strings.Cut(want, ": ")
				if !slices.ContainsFunc(findings, func(f Finding) bool {
					return fmt.Sprintf("%s %s %s", f.Policy, f.Reason, f.Link) == head && strings.Contains(f.Message, part)
				}) {
					t.Errorf("no finding %q in %+v", want, findings)
				}
			}
		})
	}
}

// A wrong edit leaves what was there; what is no longer possible goes all the same.
func TestRefusedMacvlanPolicyKeepsWhatItHad(t *testing.T) {
	had := []sriovv1.MacvlanParent{
		{PolicyName: "a", ResourceName: "r", Link: "ens1f0", Vlan: 5, Slots: 3},
		{PolicyName: "a", ResourceName: "r", Link: "ens2f0", Slots: 3}, // a port of a bond now
		{PolicyName: "a", ResourceName: "r", Link: "eth9", Slots: 3},   // gone
		{PolicyName: "gone", ResourceName: "r", Link: "br0", Slots: 3},
	}
	wrong := mvPolicy("a", mvSlots(0))
	const kept = "a: ens1f0.5*3 r"
	for name, c := range map[string]struct {
		others []sluicev1.MacvlanNodePolicy
		spec   sriovv1.SriovNetworkNodeStateSpec
		want   string
	}{
		"alone":             {nil, sriovv1.SriovNetworkNodeStateSpec{}, kept},
		"beside another":    {[]sluicev1.MacvlanNodePolicy{mvPolicy("b", mvPrio(1))}, sriovv1.SriovNetworkNodeStateSpec{}, kept + "\nb: ens1f0.0*8 res-b"},
		"a stronger has it": {[]sluicev1.MacvlanNodePolicy{mvPolicy("b", mvPrio(1), mvVlan(5))}, sriovv1.SriovNetworkNodeStateSpec{}, "b: ens1f0.5*8 res-b"},
		"a weaker wants it": {[]sluicev1.MacvlanNodePolicy{mvPolicy("b", mvLater, mvVlan(5))}, sriovv1.SriovNetworkNodeStateSpec{}, kept},
		"its resource has VFs": {nil, sriovv1.SriovNetworkNodeStateSpec{
			Interfaces: []sriovv1.Interface{{VfGroups: []sriovv1.VfGroup{{ResourceName: "r"}}}},
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c.spec.Macvlans = had
			parents, findings := DesiredMacvlan(append(c.others, wrong), nil, mvLinks(), c.spec)
			if diff := cmp.Diff(c.want, mvSummary(parents)); diff != "" {
				t.Error(diff)
			}
			if told := strings.HasSuffix(findings[0].String(), "; until then it keeps the slots it had"); told != strings.Contains(c.want, kept) {
				t.Errorf("the finding is %+v", findings[0])
			}
		})
	}
	parents, findings := DesiredMacvlan([]sluicev1.MacvlanNodePolicy{wrong, mvPolicy("b")}, nil, nil, sriovv1.SriovNetworkNodeStateSpec{Macvlans: had})
	if len(parents) != len(had) || findings[1].Reason != InventoryPending {
		t.Errorf("without an inventory the parents are %+v, the findings %+v", parents, findings)
	}
}

func genMvPolicy(t *rapid.T, name string) sluicev1.MacvlanNodePolicy {
	p := mvPolicy(name,
		mvPrio(rapid.IntRange(8, 10).Draw(t, name+" priority")),
		mvResource(rapid.SampledFrom([]string{"x", "y", "Y"}).Draw(t, name+" resource")),
		mvVlan(rapid.SampledFrom([]int{0, 0, 7, 20, 4095}).Draw(t, name+" vlan")),
		mvMtu(rapid.SampledFrom([]int{0, 1500, 9000}).Draw(t, name+" mtu")),
		mvSlots(rapid.IntRange(0, 2).Draw(t, name+" slots")))
	p.Spec.ExcludeTopology = rapid.IntRange(0, 9).Draw(t, name+" topology") == 0
	p.Spec.ParentSelector = sluicev1.ParentSelector{
		PfNames: rapid.SliceOfN(rapid.SampledFrom([]string{"ens1f0", "enp1s0f0", "ens1f1", "ens2f0", "bond0", "br0", "storage", "ens1f1.20"}), 0, 3).Draw(t, name+" names"),
		Kinds:   rapid.SliceOfN(rapid.SampledFrom([]sluicev1.LinkKind{"physical", "bond", "vlan"}), 0, 2).Draw(t, name+" kinds"),
	}
	if rapid.Bool().Draw(t, name+" is young") {
		mvLater(&p)
	}
	return p
}

func genMvPolicies(t *rapid.T) []sluicev1.MacvlanNodePolicy {
	var policies []sluicev1.MacvlanNodePolicy
	for i := range rapid.IntRange(0, 6).Draw(t, "policies") {
		policies = append(policies, genMvPolicy(t, fmt.Sprintf("p%d", i)))
	}
	return policies
}

func TestDesiredMacvlanProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		policies, links := genMvPolicies(t), mvLinks()
		spec := sriovv1.SriovNetworkNodeStateSpec{Interfaces: []sriovv1.Interface{{VfGroups: []sriovv1.VfGroup{{ResourceName: "x", PolicyName: "nics"}}}}}
		if rapid.Bool().Draw(t, "no VFs") {
			spec.Interfaces = nil
		}
		if rapid.Bool().Draw(t, "has a prior spec") {
			spec.Macvlans, _ = DesiredMacvlan(genMvPolicies(t), nil, links, spec)
		}
		parents, findings := DesiredMacvlan(policies, nil, links, spec)

		again, findingsAgain := DesiredMacvlan(rapid.Permutation(policies).Draw(t, "order"), nil, rapid.Permutation(links).Draw(t, "link order"), spec)
		if diff := cmp.Diff(parents, again) + cmp.Diff(findings, findingsAgain); diff != "" {
			t.Fatalf("another order gives another plan:\n%s", diff)
		}
		settled := spec
		settled.Macvlans = parents
		if got, _ := DesiredMacvlan(policies, nil, links, settled); !cmp.Equal(parents, got) {
			t.Fatalf("the plan does not settle:\n%s", cmp.Diff(parents, got))
		}

		keys, topology := map[parentKey]bool{}, map[string]bool{}
		for _, p := range parents {
			key := keyOf(findLink(links, p.Link), p.Vlan)
			told, seen := topology[strings.ToLower(p.ResourceName)]
			if keys[key] || p.Slots < 1 || p.Vlan > 4094 || seen && told != p.ExcludeTopology || len(spec.Interfaces) > 0 && p.ResourceName == "x" {
				t.Fatalf("%+v cannot stand in %+v", p, parents)
			}
			keys[key], topology[strings.ToLower(p.ResourceName)] = true, p.ExcludeTopology
			if _, _, err := MacvlanOperations(p, links); err != nil {
				t.Fatal(err)
			}
		}
		for _, p := range policies {
			if len(reasons(findings, p.Name)) == 0 {
				t.Fatalf("policy %s has no finding", p.Name)
			}
		}

		// A policy that got nothing anywhere might as well not be there.
		if len(spec.Macvlans) > 0 {
			return
		}
		for i, p := range policies {
			if slices.ContainsFunc(reasons(findings, p.Name), func(f Finding) bool { return f.Reason == Configured }) {
				continue
			}
			without, _ := DesiredMacvlan(slices.Delete(slices.Clone(policies), i, i+1), nil, links, spec)
			if diff := cmp.Diff(parents, without); diff != "" {
				t.Fatalf("refused policy %s changes the plan:\n%s", p.Name, diff)
			}
		}
	})
}

// applyTo does the operation on the model as the kernel would, or fails.
func applyTo(links []sriovv1.Link, op LinkOperation) ([]sriovv1.Link, error) {
	link := findLink(links, op.Link)
	if link == nil {
		return nil, fmt.Errorf("%s: no such link", op)
	}
	lower := findLink(links, link.Lower)
	switch op.Kind {
	case RaiseLinkMTU:
		if op.Number <= link.Mtu || lower != nil && lower.Mtu < op.Number {
			return nil, fmt.Errorf("%s: refused", op)
		}
		link.Mtu = op.Number
	case SetLinkUp:
		if link.LinkAdminState == "up" || lower != nil && lower.LinkAdminState != "up" {
			return nil, fmt.Errorf("%s: refused", op)
		}
		link.LinkAdminState = "up"
	case AddVLAN:
		if link.LinkAdminState != "up" || vlanDevice(links, link, op.Number) != nil || findLink(links, op.Value) != nil || len(op.Value) > 15 {
			return nil, fmt.Errorf("%s: refused", op)
		}
		links = append(links, sriovv1.Link{Name: op.Value, Kind: "vlan", Lower: link.Name, Vlan: op.Number, Mtu: link.Mtu, LinkAdminState: "up", Managed: true})
	case RemoveVLAN:
		if !link.Managed {
			return nil, fmt.Errorf("%s: not ours", op)
		}
		links = slices.DeleteFunc(links, func(l sriovv1.Link) bool { return l.Name == op.Link })
	}
	return links, nil
}

// Whatever the links are like, the operations make the parents and then there are none;
// links that are no concern of theirs are left, and all that was made goes again.
func TestMacvlanOperationsReachTheirGoal(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		links := mvLinks()
		for i := range links {
			links[i].LinkAdminState = rapid.SampledFrom([]string{"up", "down"}).Draw(t, links[i].Name+" is")
			if links[i].Lower == "" {
				links[i].Mtu = rapid.SampledFrom([]int{1400, 1500, 9000}).Draw(t, links[i].Name+" mtu")
			}
		}
		for i := range links {
			if lower := findLink(links, links[i].Lower); lower != nil {
				links[i].Mtu = min(1400, lower.Mtu)
				if lower.LinkAdminState != "up" {
					links[i].LinkAdminState = "down"
				}
			}
		}
		before := slices.Clone(links)
		wants, _ := DesiredMacvlan(genMvPolicies(t), nil, links, sriovv1.SriovNetworkNodeStateSpec{})
		touched := map[string]bool{}
		for _, want := range wants {
			for round := 0; ; round++ {
				_, ops, err := MacvlanOperations(want, links)
				if err != nil || round > 2 {
					t.Fatalf("%+v: after %d rounds %v, %v", want, round, ops, err)
				}
				if len(ops) == 0 {
					break
				}
				for _, op := range ops {
					touched[op.Link] = true
					if links, err = applyTo(links, op); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		for _, want := range wants {
			name, ops, err := MacvlanOperations(want, links)
			parent := findLink(links, name)
			if err != nil || len(ops) > 0 || parent == nil || parent.LinkAdminState != "up" || parent.Mtu < want.Mtu || keyOf(parent, 0) != keyOf(findLink(links, want.Link), want.Vlan) {
				t.Fatalf("%+v has parent %q %+v, operations %v, error %v", want, name, parent, ops, err)
			}
		}
		for _, was := range before {
			if is := findLink(links, was.Name); !touched[was.Name] && !cmp.Equal(was, *is) {
				t.Fatalf("%s was changed: %s", was.Name, cmp.Diff(was, *is))
			}
		}
		for _, keep := range [][]sriovv1.MacvlanParent{wants, nil} {
			for _, op := range UnusedVLANs(keep, links) {
				var err error
				if links, err = applyTo(links, op); err != nil {
					t.Fatal(err)
				}
			}
			for _, want := range keep {
				if name, ops, err := MacvlanOperations(want, links); name == "" || len(ops) > 0 || err != nil {
					t.Fatalf("%+v lost its parent: %v %v", want, ops, err)
				}
			}
		}
		for _, l := range links {
			if l.Managed {
				t.Fatalf("%s is left", l.Name)
			}
		}
	})
}

func TestMacvlanOperationsSayWhyNot(t *testing.T) {
	for link, want := range map[string]string{
		"eth9":   "link eth9: the node has no such link now",
		"ens2f0": "link ens2f0 is a port of bond0",
	} {
		if _, ops, err := MacvlanOperations(sriovv1.MacvlanParent{Link: link, Vlan: 9}, mvLinks()); err == nil || !strings.Contains(err.Error(), want) || ops != nil {
			t.Errorf("%s: %v, %v", link, ops, err)
		}
	}
	links := mvLinks()
	links[0].LinkAdminState = "down"
	_, ops, _ := MacvlanOperations(sriovv1.MacvlanParent{Link: "enp1s0f0", Vlan: 9, Mtu: 9000}, links)
	if got := fmt.Sprint(ops); got != "[RaiseLinkMTU 9000 on ens1f0 SetLinkUp on ens1f0 AddVLAN 9 (ens1f0.9) on ens1f0]" {
		t.Error(got)
	}
	if got := fmt.Sprint(UnusedVLANs(nil, mvLinks())); got != "[RemoveVLAN on ens1f1.20]" {
		t.Error(got)
	}
}

func TestVLANNames(t *testing.T) {
	if got := VLANName("0123456789", 4094); got != "0123456789.4094" {
		t.Error(got)
	}
	long, other := VLANName("enp175s0f0np0a", 1), VLANName("enp175s0f0np0b", 1)
	if len(long) > 15 || long == other || long != VLANName("enp175s0f0np0a", 1) || !strings.HasSuffix(long, ".1") {
		t.Errorf("%s and %s", long, other)
	}
}
