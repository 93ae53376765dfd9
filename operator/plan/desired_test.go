package plan

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

// policy makes a valid policy for ens1f0 of every node; edits change it.
func policy(name string, edits ...func(*sriovv1.SriovNetworkNodePolicy)) sriovv1.SriovNetworkNodePolicy {
	p := sriovv1.SriovNetworkNodePolicy{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(noon)}}
	p.Spec.ResourceName = "res-" + name
	p.Spec.NumVfs = 4
	p.Spec.DeviceType = sriovv1.DeviceTypeNetDevice
	p.Spec.NicSelector.PfNames = []sriovv1.PfName{"ens1f0"}
	for _, edit := range edits {
		edit(&p)
	}
	return p
}

type edit = func(*sriovv1.SriovNetworkNodePolicy)

func pfNames(entries ...sriovv1.PfName) edit {
	return func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NicSelector.PfNames = entries }
}
func numVfs(n int) edit { return func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NumVfs = n } }
func prio(n int) edit   { return func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.Priority = &n } }
func resource(name string) edit {
	return func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.ResourceName = name }
}
func later(d time.Duration) edit {
	return func(p *sriovv1.SriovNetworkNodePolicy) { p.CreationTimestamp = metav1.NewTime(noon.Add(d)) }
}

// nics is a node with two cards: an Intel one with an alternative name, and an NVIDIA one.
func nics() []sriovv1.InterfaceExt {
	return []sriovv1.InterfaceExt{
		{Name: "ens1f0", AltNames: []string{"enp1s0f0"}, PciAddress: "0000:01:00.0", Vendor: "8086", DeviceID: "158b", TotalVfs: 64, Mtu: 1500, LinkType: "ETH", EswitchMode: "legacy"},
		{Name: "ens2f0", PciAddress: "0000:02:00.0", Vendor: "15b3", DeviceID: "101b", TotalVfs: 8, Mtu: 1500, NumVfs: 2, LinkType: "ETH", EswitchMode: "legacy"},
	}
}

// summary writes a spec in one line per group.
func summary(spec sriovv1.SriovNetworkNodeStateSpec) string {
	var lines []string
	for _, i := range spec.Interfaces {
		line := i.Name + " " + FormatVfRange(0, i.NumVfs-1) + ":"
		for _, g := range i.VfGroups {
			line += " " + g.PolicyName + "/" + g.ResourceName + "=" + g.VfRange
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func TestDesired(t *testing.T) {
	for _, c := range []struct {
		name     string
		policies []sriovv1.SriovNetworkNodePolicy
		want     string
		findings []string // policy reason pf: part of message
	}{
		{"one policy takes all of its VFs", []sriovv1.SriovNetworkNodePolicy{policy("a")},
			"ens1f0 0-3: a/res-a=0-3",
			[]string{"a Configured ens1f0: PF ens1f0 (0000:01:00.0) has VFs 0-3 of 4 for resource res-a", "a NotSelected ens2f0: its name is not among nicSelector.pfNames ens1f0"}},
		{"a vendor selects", []sriovv1.SriovNetworkNodePolicy{policy("a", pfNames(), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NicSelector.Vendor = "15B3" })},
			"ens2f0 0-3: a/res-a=0-3", []string{"a NotSelected ens1f0: its vendor is 8086, nicSelector.vendor wants 15B3"}},
		{"a range, a single VF and a list", []sriovv1.SriovNetworkNodePolicy{policy("a", numVfs(10), pfNames("ens1f0#0-3,8", "ens1f0#5"))},
			"ens1f0 0-9: a/res-a=0-3 a/res-a=5-5 a/res-a=8-8", nil},
		{"a range of an alternative name", []sriovv1.SriovNetworkNodePolicy{policy("a", numVfs(8), pfNames("enp1s0f0#2-3"))},
			"ens1f0 0-7: a/res-a=2-3", nil},
		{"two policies share a PF", []sriovv1.SriovNetworkNodePolicy{policy("a", numVfs(8), pfNames("ens1f0#0-3")), policy("b", numVfs(12), pfNames("ens1f0#4-7"))},
			"ens1f0 0-11: a/res-a=0-3 b/res-b=4-7", nil},
		{"two policies with one resource share a PF", []sriovv1.SriovNetworkNodePolicy{policy("a", numVfs(8), resource("r"), pfNames("ens1f0#0-3")), policy("b", numVfs(8), resource("r"), pfNames("ens1f0#4-7"))},
			"ens1f0 0-7: a/r=0-3 b/r=4-7", nil},
		{"equal wants merge", []sriovv1.SriovNetworkNodePolicy{policy("a", resource("r")), policy("b", resource("r"), numVfs(6))},
			"ens1f0 0-5: a/r=0-3 b/r=4-5", nil},
		{"the lower number wins", []sriovv1.SriovNetworkNodePolicy{policy("a", numVfs(8)), policy("b", prio(10))},
			"ens1f0 0-3: b/res-b=0-3",
			[]string{"a Overridden ens1f0: VFs 0-3 of PF ens1f0 (0000:01:00.0) stay with policy b (resourceName res-b, not res-a): policy b has priority 10, the stronger, against 99"}},
		{"an absent priority is 99", []sriovv1.SriovNetworkNodePolicy{policy("a", later(time.Hour), prio(98)), policy("b")},
			"ens1f0 0-3: a/res-a=0-3", []string{"b Overridden ens1f0: "}},
		{"the weaker keeps what does not overlap on other PFs", []sriovv1.SriovNetworkNodePolicy{policy("a", pfNames("ens1f0", "ens2f0")), policy("b", prio(10))},
			"ens1f0 0-3: b/res-b=0-3\nens2f0 0-3: a/res-a=0-3", []string{"a Overridden ens1f0: ", "a Configured ens2f0: "}},
		{"an overridden policy overrides nobody", []sriovv1.SriovNetworkNodePolicy{
			policy("strong", prio(1), numVfs(8), pfNames("ens1f0#0-3")), policy("mid", prio(2), numVfs(8), pfNames("ens1f0#2-5")), policy("weak", prio(3), numVfs(8), pfNames("ens1f0#4-7"))},
			"ens1f0 0-7: strong/res-strong=0-3 weak/res-weak=4-7", []string{"mid Overridden ens1f0: "}},
		{"the earlier of equals keeps", []sriovv1.SriovNetworkNodePolicy{policy("a", later(time.Minute)), policy("b")},
			"ens1f0 0-3: b/res-b=0-3",
			[]string{"a Conflict ens1f0: VFs 0-3 of PF ens1f0 (0000:01:00.0) stay with policy b (resourceName res-b, not res-a): policies b and a have the same priority 99 and b was there first; give one of them other VFs in pfNames, or another priority"}},
		{"then the first by name keeps", []sriovv1.SriovNetworkNodePolicy{policy("b"), policy("a", numVfs(8), pfNames("ens1f0#3-5"))},
			"ens1f0 0-7: a/res-a=3-5", []string{"b Conflict ens1f0: VFs 3 of PF"}},
		{"one resource with other settings conflicts", []sriovv1.SriovNetworkNodePolicy{policy("a", resource("r")), policy("b", resource("r"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.DeviceType = "vfio-pci" })},
			"ens1f0 0-3: a/r=0-3", []string{"b Conflict ens1f0: stay with policy a (deviceType netdevice, not vfio-pci)"}},
		{"more VFs than the PF has", []sriovv1.SriovNetworkNodePolicy{policy("a", numVfs(9), pfNames("ens1f0", "ens2f0")), policy("b", pfNames("ens2f0"))},
			"ens1f0 0-8: a/res-a=0-8\nens2f0 0-3: b/res-b=0-3",
			[]string{"a TotalVFsExceeded ens2f0: numVfs 9 is above the 8 VFs (totalvfs) that PF ens2f0 (0000:02:00.0) can have: set numVfs to 8 or less", "b Configured ens2f0: "}},
		{"a range backwards", []sriovv1.SriovNetworkNodePolicy{policy("a", numVfs(8), pfNames("ens1f0#5-2"))}, "",
			[]string{`a PolicyInvalid : nicSelector.pfNames "ens1f0#5-2": VF range "5-2" runs backwards: write 2-5`}},
		{"a range past the end", []sriovv1.SriovNetworkNodePolicy{policy("a", pfNames("ens1f0#0-4"))}, "",
			[]string{"a PolicyInvalid : nicSelector.pfNames ens1f0#0-4 reaches past VF 3, the last of numVfs 4"}},
		{"an unknown key", []sriovv1.SriovNetworkNodePolicy{policy("a", func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NicSelector.UnknownKeys = []string{"pfName"} })}, "",
			[]string{"a PolicyInvalid : nicSelector has the unknown key pfName: use vendor, deviceID, rootDevices, pfNames or netFilter"}},
		{"an empty selector", []sriovv1.SriovNetworkNodePolicy{policy("a", pfNames())}, "", []string{"a PolicyInvalid : nicSelector is empty"}},
		{"no NIC", []sriovv1.SriovNetworkNodePolicy{policy("a", pfNames("eth9"))}, "", []string{"a NoNICSelected : nicSelector selects no PF of the node: not PF ens1f0 (0000:01:00.0): its name is not among nicSelector.pfNames eth9; not PF ens2f0"}},
		{"another node", []sriovv1.SriovNetworkNodePolicy{policy("a", func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NodeSelector = map[string]string{"role": "db"} })}, "",
			[]string{`a NodeNotSelected : the node's label role is "worker", nodeSelector wants "db"`}},
		{"the name default", []sriovv1.SriovNetworkNodePolicy{policy("default")}, "", []string{"default PolicyIgnored : a policy named default has no effect, as in the SR-IOV network operator: to make VFs, give it another name"}},
		{"the wrong link", []sriovv1.SriovNetworkNodePolicy{policy("a", func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.LinkType = "ib" })}, "",
			[]string{"a NICMismatch ens1f0: linkType ib: PF ens1f0 (0000:01:00.0) is ETH"}},
		{"managed elsewhere with too few VFs", []sriovv1.SriovNetworkNodePolicy{policy("a", pfNames("ens2f0"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.ExternallyManaged = true })}, "",
			[]string{"a NICMismatch ens2f0: numVfs 4 with externallyManaged: PF ens2f0 (0000:02:00.0) has only 2 VFs"}},
		{"two modes", []sriovv1.SriovNetworkNodePolicy{
			policy("a", numVfs(8), pfNames("ens1f0#0-3"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.EswitchMode = "switchdev" }),
			policy("b", numVfs(8), pfNames("ens1f0#4-7"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.EswitchMode = "legacy" })},
			"ens1f0 0-7: a/res-a=0-3", []string{"b Conflict ens1f0: eSwitchMode of PF ens1f0 (0000:01:00.0) is switchdev by policy a and cannot also be legacy"}},
		{"one resource with two topologies", []sriovv1.SriovNetworkNodePolicy{
			policy("a", resource("r")), policy("b", resource("r"), pfNames("ens2f0"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.ExcludeTopology = true })},
			"ens1f0 0-3: a/r=0-3", []string{"b Conflict ens2f0: excludeTopology is true here and false in policy a"}},
		{"named, and of another vendor", []sriovv1.SriovNetworkNodePolicy{policy("a", pfNames("ens1f0", "ens2f0"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NicSelector.RootDevices = []string{"0000:01:00.0"} })},
			"ens1f0 0-3: a/res-a=0-3", []string{"a NotSelected ens2f0: not PF ens2f0 (0000:02:00.0): its address is not among nicSelector.rootDevices 0000:01:00.0"}},
		{"one resource packed and spread", []sriovv1.SriovNetworkNodePolicy{
			policy("a", resource("r")), policy("b", resource("r"), pfNames("ens2f0"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.Allocation = sriovv1.AllocationSpread })},
			"ens1f0 0-3: a/r=0-3", []string{"b Conflict ens2f0: allocation is Spread here and Pack in policy a"}},
		{"two bridges on a PF", []sriovv1.SriovNetworkNodePolicy{policy("a", pfNames("ens1f0#0-1"), bridged(nil)), policy("b", pfNames("ens1f0#2-3"), later(1), bridged(func(c *sriovv1.OVSConfig) { c.Bridge.FailMode = "secure" }))},
			"ens1f0 0-3: a/res-a=0-1", []string{"b Conflict ens1f0: bridge.ovs of PF ens1f0 (0000:01:00.0) is as policy a says"}},
		{"one bridge of two policies", []sriovv1.SriovNetworkNodePolicy{policy("a", pfNames("ens1f0#0-1"), bridged(nil)), policy("b", pfNames("ens1f0#2-3"), later(1), bridged(nil)), policy("c", numVfs(6), pfNames("ens1f0#4-5"), later(2))},
			"ens1f0 0-5: a/res-a=0-1 b/res-b=2-3 c/res-c=4-5", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec, findings := Desired(c.policies, map[string]string{"role": "worker"}, nics(), sriovv1.SriovNetworkNodeStateSpec{})
			if got := summary(spec); got != c.want {
				t.Errorf("the spec is\n%s\nwant\n%s", got, c.want)
			}
		want:
			for _, want := range c.findings {
				head, message, _ := strings.Cut(want, ":")
				for _, f := range findings {
					if strings.TrimSpace(f.Policy+" "+string(f.Reason)+" "+f.PFName) == strings.TrimSpace(head) && strings.Contains(f.Message, strings.TrimSpace(message)) {
						continue want
					}
				}
				t.Errorf("no finding is %q; they are %+v", want, findings)
			}
		})
	}
}

func TestDesiredFields(t *testing.T) {
	p := policy("a", numVfs(2), func(p *sriovv1.SriovNetworkNodePolicy) {
		p.Spec.Mtu, p.Spec.EswitchMode, p.Spec.LinkType, p.Spec.VdpaType = 9000, "switchdev", "eth", "virtio"
		p.Spec.IsRdma, p.Spec.NeedVhostNet, p.Spec.ExcludeTopology, p.Spec.RequireCarrier = true, true, true, true
		p.Spec.Allocation = sriovv1.AllocationSpread
	})
	spec, _ := Desired([]sriovv1.SriovNetworkNodePolicy{p}, nil, nics(), sriovv1.SriovNetworkNodeStateSpec{})
	want := sriovv1.SriovNetworkNodeStateSpec{Interfaces: []sriovv1.Interface{{
		PciAddress: "0000:01:00.0", Name: "ens1f0", NumVfs: 2, Mtu: 9000, LinkType: "eth", EswitchMode: "switchdev",
		VfGroups: []sriovv1.VfGroup{{
			ResourceName: "res-a", DeviceType: "netdevice", VfRange: "0-1", PolicyName: "a", Mtu: 9000,
			IsRdma: true, VdpaType: "virtio", NeedVhostNet: true, ExcludeTopology: true, Allocation: "Spread", RequireCarrier: true,
		}},
	}}}
	if diff := cmp.Diff(want, spec); diff != "" {
		t.Error(diff)
	}
}

func TestAddressesSelectWhateverTheirCase(t *testing.T) {
	p := policy("a", pfNames(), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NicSelector.RootDevices = []string{"0000:3B:00.0"} })
	spec, _ := Desired([]sriovv1.SriovNetworkNodePolicy{p}, nil, []sriovv1.InterfaceExt{{Name: "a", PciAddress: "0000:3b:00.0", TotalVfs: 8}}, sriovv1.SriovNetworkNodeStateSpec{})
	if len(spec.Interfaces) != 1 {
		t.Errorf("the spec is %+v", spec)
	}
}

func TestDesiredWithoutInventoryKeepsThePriorSpec(t *testing.T) {
	prior, _ := Desired([]sriovv1.SriovNetworkNodePolicy{policy("a")}, nil, nics(), sriovv1.SriovNetworkNodeStateSpec{})
	spec, findings := Desired([]sriovv1.SriovNetworkNodePolicy{policy("b")}, nil, nil, prior)
	if diff := cmp.Diff(prior, spec); diff != "" {
		t.Error(diff)
	}
	if len(findings) != 1 || findings[0].Reason != InventoryPending {
		t.Errorf("the findings are %+v", findings)
	}
}

func TestANetworkWithoutInventory(t *testing.T) {
	p := policy("a", pfNames(), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NicSelector.NetFilter = "openstack/NetworkID:x" })
	_, findings := Desired([]sriovv1.SriovNetworkNodePolicy{p}, nil, nil, sriovv1.SriovNetworkNodeStateSpec{})
	if len(findings) != 1 || findings[0].Reason != InventoryPending || !strings.Contains(findings[0].Message, "virtual machine has whole") {
		t.Errorf("the findings are %+v", findings)
	}
}

// A typing error in a policy that is in effect must not take its VFs from pods.
func TestDesiredRefusedEditKeepsWhatWas(t *testing.T) {
	prior, _ := Desired([]sriovv1.SriovNetworkNodePolicy{policy("a", numVfs(8), pfNames("ens1f0#0-3,6")), policy("b", numVfs(8), pfNames("ens1f0#4-5"))}, nil, nics(), sriovv1.SriovNetworkNodeStateSpec{})
	for _, bad := range []edit{numVfs(65), pfNames("ens1f0#5-2"), pfNames()} {
		edited := policy("a", numVfs(8), bad)
		spec, findings := Desired([]sriovv1.SriovNetworkNodePolicy{edited, policy("b", numVfs(8), pfNames("ens1f0#4-5"))}, nil, nics(), prior)
		if diff := cmp.Diff(prior, spec); diff != "" {
			t.Error(diff)
		}
		if !strings.HasSuffix(findings[0].String(), "; until then it keeps the VFs it had") {
			t.Errorf("the finding is %q", findings[0])
		}
	}
}

func TestParsePfName(t *testing.T) {
	for entry, want := range map[string]string{
		"ens1f0": "ens1f0 ", "ens1f0#0-3": "ens1f0 0-3", "ens1f0#3": "ens1f0 3", "ens1f0#8,0-3,2-4": "ens1f0 0-4,8",
		"ens1f0#5-2": "runs backwards: write 2-5", "ens1f0#": `"" is not a VF number`, "ens1f0#a": `"a" is not a VF number`,
		"ens1f0#-1": `"" is not a VF number`, "ens1f0#0-1-2": `"1-2" is not a VF number`, "#0-1": "no PF name", "": "no PF name",
		"ens1f0#0-1#2": `"1#2" is not a VF number`, "ens1f0#10000": `"10000" is not a VF number: use 0 to 9999`,
	} {
		name, vfs, err := ParsePfName(entry)
		got := name + " " + formatVFs(vfs)
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, want) {
			t.Errorf("%q gives %q, want %q", entry, got, want)
		}
	}
}
