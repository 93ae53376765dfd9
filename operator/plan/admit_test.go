package plan

import (
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

func node(name string, pfs ...sriovv1.InterfaceExt) Node {
	n := Node{Name: name, Labels: map[string]string{"name": name}}
	n.State.Status.Interfaces = pfs
	n.State.Status.Links = []sriovv1.Link{{Name: "bond0", Kind: "bond"}, {Name: "bond1", Kind: "bond"}}
	return n
}

func slotsOn(name, resource string, links ...string) sluicev1.MacvlanNodePolicy {
	p := sluicev1.MacvlanNodePolicy{}
	p.Name, p.CreationTimestamp.Time = name, noon
	p.Spec.ResourceName, p.Spec.Slots, p.Spec.ParentSelector.PfNames = resource, 8, links
	return p
}

func nodeSelector(name string) edit {
	return func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NodeSelector = map[string]string{"name": name} }
}

func wantVerdict(t *testing.T, errs []string, warnings []string, wantErrors, wantWarnings []string) {
	t.Helper()
	for _, c := range []struct {
		what      string
		got, want []string
	}{{"errors", errs, wantErrors}, {"warnings", warnings, wantWarnings}} {
		ok := len(c.got) == len(c.want)
		for i := range c.want {
			ok = ok && strings.Contains(c.got[i], c.want[i])
		}
		if !ok {
			t.Errorf("the %s are\n%s\nwant\n%s", c.what, strings.Join(c.got, "\n"), strings.Join(c.want, "\n"))
		}
	}
}

func TestAdmitPolicy(t *testing.T) {
	both := pfNames("ens1f0", "ens2f0")
	for _, c := range []struct {
		name             string
		nodes            []Node
		others           []sriovv1.SriovNetworkNodePolicy
		macvlans         []sluicev1.MacvlanNodePolicy
		candidate        sriovv1.SriovNetworkNodePolicy
		errors, warnings []string
	}{
		{name: "all is well", candidate: policy("a")},
		{name: "no node", candidate: policy("a", nodeSelector("z")), warnings: []string{"spec.nodeSelector selects no Linux node"}},
		{name: "no NIC", candidate: policy("a", pfNames("eth9")), warnings: []string{"nicSelector selects no PF of the node: not PF ens1f0 (0000:01:00.0): its name is not among nicSelector.pfNames eth9"}},
		{name: "a NIC on one of two nodes", nodes: []Node{node("n1", nics()...), node("n2")}, candidate: policy("a")},
		{name: "nodes that have yet to report", nodes: []Node{node("n1"), node("n2")}, candidate: policy("a"), warnings: []string{"the node has not reported any SR-IOV NIC: see that it has one, that SR-IOV is on in its firmware, and that the agent's pod runs there (on node n1 and 1 more)"}},
		{name: "more VFs than any NIC has", candidate: policy("a", numVfs(65)), errors: []string{"spec.numVfs: Invalid value: 65: numVfs 65 is above the 64 VFs (totalvfs) that PF ens1f0 (0000:01:00.0) can have: set numVfs to 64 or less (on node n1)"}},
		{name: "more VFs than one NIC has", candidate: policy("a", both, numVfs(9)), warnings: []string{"numVfs 9 is above the 8 VFs (totalvfs) that PF ens2f0 (0000:02:00.0) can have: set numVfs to 8 or less (on node n1)"}},
		{name: "the wrong kind of link", candidate: policy("a", func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.LinkType = "ib" }), errors: []string{`spec.linkType: Invalid value: "ib": linkType ib: PF ens1f0 (0000:01:00.0) is ETH: change`}},
		{name: "more VFs than somebody else made", candidate: policy("a", pfNames("ens2f0"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.ExternallyManaged = true }),
			errors: []string{"spec.numVfs: Invalid value: 4: numVfs 4 with externallyManaged: PF ens2f0 (0000:02:00.0) has only 2 VFs: make them there, or lower numVfs"}},
		{name: "a higher MTU than somebody else set", candidate: policy("a", pfNames("ens2f0"), numVfs(2), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.ExternallyManaged, p.Spec.Mtu = true, 9000 }),
			errors: []string{"spec.mtu: Invalid value: 9000: mtu 9000 with externallyManaged: PF ens2f0 (0000:02:00.0) has MTU 1500: raise it there, or lower mtu"}},
		{name: "managed by us and by somebody else", others: []sriovv1.SriovNetworkNodePolicy{policy("b", pfNames("ens2f0#0-0"), numVfs(2))},
			candidate: policy("a", pfNames("ens2f0#1-1"), numVfs(2), later(1), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.ExternallyManaged = true }),
			errors:    []string{"spec.externallyManaged: Invalid value: true: externallyManaged of PF ens2f0 (0000:02:00.0) is false by policy b and cannot also be true"}},
		{name: "the same VFs", others: []sriovv1.SriovNetworkNodePolicy{policy("b")}, candidate: policy("a", later(1)),
			errors: []string{`spec.nicSelector: Invalid value: {"pfNames":["ens1f0"]}: VFs 0-3 of PF ens1f0 (0000:01:00.0) stay with policy b (resourceName res-b, not res-a): policies b and a have the same priority 99 and b was there first; give one of them other VFs in pfNames, or another priority (on node n1)`}},
		{name: "the same VFs, and the same wish", others: []sriovv1.SriovNetworkNodePolicy{policy("b")}, candidate: policy("a", later(1), resource("res-b"))},
		{name: "the same VFs of the second PF only", others: []sriovv1.SriovNetworkNodePolicy{policy("b", pfNames("ens1f0#0-1", "ens2f0#0-1"))}, candidate: policy("a", later(1), pfNames("ens1f0#2-3", "ens2f0#0-1")),
			errors: []string{"VFs 0-1 of PF ens2f0 (0000:02:00.0) stay with policy b"}},
		{name: "all VFs over a range", others: []sriovv1.SriovNetworkNodePolicy{policy("b", pfNames("ens1f0#2-3"))}, candidate: policy("a", later(1)),
			errors: []string{"VFs 2-3 of PF ens1f0 (0000:01:00.0) stay with policy b"}},
		{name: "a range over all VFs", others: []sriovv1.SriovNetworkNodePolicy{policy("b")}, candidate: policy("a", later(1), pfNames("ens1f0#2-3")),
			errors: []string{"VFs 2-3 of PF ens1f0 (0000:01:00.0) stay with policy b"}},
		{name: "the same VFs by another name", others: []sriovv1.SriovNetworkNodePolicy{policy("b", pfNames("ens1f0#0-1"))}, candidate: policy("a", later(1), pfNames("enp1s0f0#1-2")),
			errors: []string{"VFs 1 of PF ens1f0 (0000:01:00.0) stay with policy b"}},
		{name: "an edit that takes VFs from a younger one", others: []sriovv1.SriovNetworkNodePolicy{policy("a", pfNames("ens1f0#0-1")), policy("b", later(1), pfNames("ens1f0#2-3"))}, candidate: policy("a"),
			errors: []string{"spec.nicSelector: Invalid value: {\"pfNames\":[\"ens1f0\"]}: SriovNetworkNodePolicy b would not have what it asks for: VFs 2-3 of PF ens1f0 (0000:01:00.0) stay with policy a"}},
		{name: "an edit that leaves another's conflict", others: []sriovv1.SriovNetworkNodePolicy{policy("a"), policy("b", later(1))}, candidate: policy("a", func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.Mtu = 9000 })},
		{name: "a stronger one has the VFs", others: []sriovv1.SriovNetworkNodePolicy{policy("b", prio(1))}, candidate: policy("a", later(1)),
			warnings: []string{"VFs 0-3 of PF ens1f0 (0000:01:00.0) stay with policy b"}},
		{name: "a weaker one has the VFs", others: []sriovv1.SriovNetworkNodePolicy{policy("b")}, candidate: policy("a", later(1), prio(1)),
			warnings: []string{"SriovNetworkNodePolicy b would not have what it asks for: VFs 0-3 of PF ens1f0 (0000:01:00.0) stay with policy a"}},
		{name: "two modes of one switch", others: []sriovv1.SriovNetworkNodePolicy{policy("b", pfNames("ens1f0#0-1"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.EswitchMode = "legacy" })},
			candidate: policy("a", later(1), pfNames("ens1f0#2-3"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.EswitchMode = "switchdev" }),
			errors:    []string{`spec.eSwitchMode: Invalid value: "switchdev": eSwitchMode of PF ens1f0 (0000:01:00.0) is legacy by policy b and cannot also be switchdev`}},
		{name: "two topologies of one resource", others: []sriovv1.SriovNetworkNodePolicy{policy("b", pfNames("ens2f0"))},
			candidate: policy("a", later(1), resource("res-b"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.ExcludeTopology = true }),
			errors:    []string{"spec.excludeTopology: Invalid value: true: excludeTopology is true here and false in policy b, which has the same resourceName res-b"}},
		{name: "a resource of MacVLAN slots", macvlans: []sluicev1.MacvlanNodePolicy{slotsOn("a", "res-a", "bond0")}, candidate: policy("a"),
			errors: []string{"MacvlanNodePolicy a would not have what it asks for: resourceName res-a is that of SriovNetworkNodePolicy a, which has VFs on the node"}},
		{name: "a bridge with its gate off", candidate: policy("a", bridged(nil)), warnings: []string{"bridge.ovs needs the feature gate manageSoftwareBridges: set featureGates manageSoftwareBridges to true"}},
		{name: "an unknown key", candidate: policy("a", func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NicSelector.UnknownKeys = []string{"pfName"} }),
			errors: []string{"spec.nicSelector: Invalid value: {\"pfNames\":[\"ens1f0\"]}: nicSelector has the unknown key pfName"}},
		{name: "the same on many nodes", nodes: []Node{node("n3", nics()...), node("n1", nics()...), node("n2", nics()...)}, candidate: policy("a", numVfs(65)),
			errors: []string{"set numVfs to 64 or less (on node n1 and 2 more)"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.nodes == nil {
				c.nodes = []Node{node("n1", nics()...)}
			}
			errs, warnings := (&Cluster{Policies: c.others, Macvlans: c.macvlans, Nodes: c.nodes}).AdmitPolicy(&c.candidate)
			var texts []string
			for _, e := range errs {
				texts = append(texts, e.Error())
			}
			wantVerdict(t, texts, warnings, c.errors, c.warnings)
		})
	}
}

func TestAdmitMacvlanPolicy(t *testing.T) {
	slots := func(n int) func(*sluicev1.MacvlanNodePolicy) {
		return func(p *sluicev1.MacvlanNodePolicy) { p.Spec.Slots = n }
	}
	with := func(p sluicev1.MacvlanNodePolicy, edits ...func(*sluicev1.MacvlanNodePolicy)) sluicev1.MacvlanNodePolicy {
		for _, e := range edits {
			e(&p)
		}
		return p
	}
	for _, c := range []struct {
		name             string
		policies         []sriovv1.SriovNetworkNodePolicy
		others           []sluicev1.MacvlanNodePolicy
		candidate        sluicev1.MacvlanNodePolicy
		errors, warnings []string
	}{
		{name: "all is well", candidate: slotsOn("a", "slots", "bond0")},
		{name: "no node", candidate: with(slotsOn("a", "slots", "bond0"), func(p *sluicev1.MacvlanNodePolicy) { p.Spec.NodeSelector = map[string]string{"name": "z"} }), warnings: []string{"spec.nodeSelector selects no Linux node"}},
		{name: "no link", candidate: slotsOn("a", "slots", "bond9"), warnings: []string{"parentSelector selects no link of the node: not bond0"}},
		{name: "a resource of VFs", policies: []sriovv1.SriovNetworkNodePolicy{policy("v")}, candidate: slotsOn("a", "res-v", "bond0"),
			errors: []string{`spec.resourceName: Invalid value: "res-v": resourceName res-v is that of SriovNetworkNodePolicy v, which has VFs on the node`}},
		{name: "the same link", others: []sluicev1.MacvlanNodePolicy{slotsOn("a", "other", "bond0")}, candidate: slotsOn("b", "slots", "bond0"),
			errors: []string{`spec.parentSelector: Invalid value: {"pfNames":["bond0"]}: link bond0 stays with policy a (resourceName other, not slots)`}},
		{name: "an edit that takes a link", others: []sluicev1.MacvlanNodePolicy{slotsOn("a", "slots", "bond1"), slotsOn("b", "other", "bond0")}, candidate: slotsOn("a", "slots", "bond0"),
			errors: []string{"MacvlanNodePolicy b would not have what it asks for: link bond0 stays with policy a"}},
		{name: "a stronger one has the link", others: []sluicev1.MacvlanNodePolicy{with(slotsOn("b", "other", "bond0"), func(p *sluicev1.MacvlanNodePolicy) { p.Spec.Priority = new(int) })}, candidate: with(slotsOn("a", "slots", "bond0"), slots(9)),
			warnings: []string{"link bond0 stays with policy b"}},
		{name: "no slots", candidate: with(slotsOn("a", "slots", "bond0"), slots(0)), errors: []string{"spec.parentSelector: Invalid value: {\"pfNames\":[\"bond0\"]}: slots 0 is not a number of slots"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			errs, warnings := (&Cluster{Policies: c.policies, Macvlans: c.others, Nodes: []Node{node("n1", nics()...)}}).AdmitMacvlanPolicy(&c.candidate)
			var texts []string
			for _, e := range errs {
				texts = append(texts, e.Error())
			}
			wantVerdict(t, texts, warnings, c.errors, c.warnings)
		})
	}
}

func TestAdmitPool(t *testing.T) {
	pool := func(name string, selector *metav1.LabelSelector, edits ...func(*sriovv1.SriovNetworkPoolConfigSpec)) sriovv1.SriovNetworkPoolConfig {
		p := sriovv1.SriovNetworkPoolConfig{ObjectMeta: metav1.ObjectMeta{Name: name}}
		p.Spec.NodeSelector = selector
		for _, e := range edits {
			e(&p.Spec)
		}
		return p
	}
	on := func(node string) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{"name": node}}
	}
	offload := func(s *sriovv1.SriovNetworkPoolConfigSpec) { s.OvsHardwareOffloadConfig.Name = "worker" }
	for _, c := range []struct {
		name             string
		others           []sriovv1.SriovNetworkPoolConfig
		candidate        sriovv1.SriovNetworkPoolConfig
		errors, warnings []string
	}{
		{name: "all is well", others: []sriovv1.SriovNetworkPoolConfig{pool("b", on("n2")), pool("a", nil), pool("o", nil, offload)}, candidate: pool("a", on("n1"))},
		{name: "no node", candidate: pool("a", on("n9")), warnings: []string{"spec.nodeSelector selects no Linux node"}},
		{name: "offload", others: []sriovv1.SriovNetworkPoolConfig{pool("b", nil)}, candidate: pool("a", nil, offload), warnings: []string{"spec.ovsHardwareOffloadConfig has no effect"}},
		{name: "nothing at a time", candidate: pool("a", nil, func(s *sriovv1.SriovNetworkPoolConfigSpec) { s.MaxUnavailable = &intstr.IntOrString{} }), warnings: []string{"spec.maxUnavailable 0: no pod"}},
		{name: "nodes in two pools", others: []sriovv1.SriovNetworkPoolConfig{pool("b", nil)}, candidate: pool("a", &metav1.LabelSelector{}),
			errors: []string{`spec.nodeSelector: Invalid value: {}: nodeSelector selects nodes that SriovNetworkPoolConfig b selects too, and a node in two pools is in neither: change one of the selectors (on node n1 and 1 more)`}},
		{name: "a selector that cannot be read", candidate: pool("a", on("a b")), errors: []string{"spec.nodeSelector: Invalid value: "}},
	} {
		t.Run(c.name, func(t *testing.T) {
			errs, warnings := AdmitPool(&c.candidate, c.others, []Node{node("n1"), node("n2")})
			var texts []string
			for _, e := range errs {
				texts = append(texts, e.Error())
			}
			wantVerdict(t, texts, warnings, c.errors, c.warnings)
		})
	}
}

// Whatever is admitted, one policy after the other, none is in conflict with another.
func TestAdmittedPoliciesDoNotConflict(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &Cluster{Nodes: []Node{node("n1", nics()...), node("n2", nics()[:1]...)}}
		for i := range rapid.IntRange(1, 8).Draw(t, "policies") {
			p := policy(fmt.Sprint("p", rapid.IntRange(0, 4).Draw(t, "name")), later(1),
				numVfs(rapid.IntRange(1, 9).Draw(t, "numVfs")), prio(rapid.IntRange(0, 1).Draw(t, "priority")),
				resource(rapid.SampledFrom([]string{"r", "s"}).Draw(t, "resource")),
				pfNames(rapid.SliceOfN(rapid.SampledFrom([]sriovv1.PfName{"ens1f0", "ens2f0", "ens1f0#0-0", "enp1s0f0#1-3", "ens2f0#0-1", "ens2f0#1"}), 1, 2).Draw(t, "pfNames")...))
			p.Spec.ExcludeTopology = rapid.Bool().Draw(t, "excludeTopology")
			p.CreationTimestamp.Time = noon.Add(1000 * 1000 * 1000)
			for j := range c.Policies { // an edit keeps the age
				if c.Policies[j].Name == p.Name {
					p.CreationTimestamp = c.Policies[j].CreationTimestamp
				}
			}
			if errs, _ := c.AdmitPolicy(&p); len(errs) == 0 {
				c.Policies = replace(c.Policies, &p)
			}
			for _, n := range c.Nodes {
				_, findings := Desired(c.Policies, n.Labels, n.State.Status.Interfaces, n.State.Spec)
				for _, f := range findings {
					if f.Reason == Conflict {
						t.Fatalf("after policy %d: %s: %s", i, f.Policy, f.Message)
					}
				}
			}
		}
	})
}

// A policy for every node of a large cluster must be judged well before the API server
// gives up on the webhook, which is after 5 s.
func BenchmarkAdmitPolicy(b *testing.B) {
	c := &Cluster{}
	for i := range 2000 {
		var pfs []sriovv1.InterfaceExt
		for j := range 4 {
			pfs = append(pfs, sriovv1.InterfaceExt{Name: fmt.Sprintf("ens%df0", j), PciAddress: fmt.Sprintf("0000:0%d:00.0", j), Vendor: "8086", TotalVfs: 64, Mtu: 1500, LinkType: "ETH"})
		}
		n := node(fmt.Sprintf("node-%04d", i), pfs...)
		n.Labels["rack"] = fmt.Sprint(i % 40)
		c.Nodes = append(c.Nodes, n)
	}
	for i := range 200 {
		c.Policies = append(c.Policies, policy(fmt.Sprintf("p%03d", i), pfNames(sriovv1.PfName(fmt.Sprintf("ens%df0#%d-%d", i%4, i/40*4, i/40*4+3))), numVfs(32),
			func(p *sriovv1.SriovNetworkNodePolicy) {
				p.Spec.NodeSelector = map[string]string{"rack": fmt.Sprint(i % 40)}
			}))
	}
	candidate := policy("new", later(1), numVfs(32), pfNames("ens0f0#28-31"))
	for b.Loop() {
		if errs, warnings := c.AdmitPolicy(&candidate); len(errs) != 0 || len(warnings) != 0 {
			b.Fatal(errs, warnings)
		}
	}
}
