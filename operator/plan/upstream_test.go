package plan

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// What the SR-IOV network operator gets wrong when it plans: each with what is right.
func TestNotAsUpstream(t *testing.T) {
	type policies = []sriovv1.SriovNetworkNodePolicy
	range_ := func(name string, numVfs_ int, entries ...sriovv1.PfName) sriovv1.SriovNetworkNodePolicy {
		return policy(name, numVfs(numVfs_), pfNames(entries...))
	}
	for name, c := range map[string]struct {
		policies policies
		want     string
		refused  string // policy and reason of the finding that must be there
	}{
		"the range of an alternative name counts": {policies{range_("a", 8, "enp1s0f0#2-3")}, "ens1f0 0-7: a/res-a=2-3", ""},
		"overlaps count on every PF": {
			policies{range_("a", 8, "ens1f0#0-3", "ens2f0#0-3"), range_("b", 8, "ens1f0#4-7", "ens2f0#2-5")},
			"ens1f0 0-7: a/res-a=0-3 b/res-b=4-7\nens2f0 0-7: a/res-a=0-3", "b Conflict ens2f0",
		},
		"a policy without a range overlaps one with a range": {
			policies{range_("a", 8, "ens1f0#2-3"), range_("b", 8, "ens1f0")}, "ens1f0 0-7: a/res-a=2-3", "b Conflict ens1f0",
		},
		"and the other way round": {
			policies{range_("a", 8, "ens1f0"), range_("b", 8, "ens1f0#2-3")}, "ens1f0 0-7: a/res-a=0-7", "b Conflict ens1f0",
		},
		"two ranges of one resource on one PF": {
			policies{policy("a", numVfs(8), resource("r"), pfNames("ens1f0#0-1")), policy("b", numVfs(8), resource("r"), pfNames("ens1f0#4-5"))},
			"ens1f0 0-7: a/r=0-1 b/r=4-5", "",
		},
		"a single VF is a range, and bad ranges harm only their policy": {
			policies{range_("a", 8, "ens1f0#3"), range_("b", 8, "ens2f0#x-"), range_("c", 8, "ens2f0#0-1")},
			"ens1f0 0-7: a/res-a=3-3\nens2f0 0-7: c/res-c=0-1", "b PolicyInvalid ",
		},
		"an absent priority is the weakest": {
			policies{range_("a", 8, "ens1f0"), policy("b", prio(10))}, "ens1f0 0-3: b/res-b=0-3", "a Overridden ens1f0",
		},
	} {
		t.Run(name, func(t *testing.T) {
			for range 2 {
				spec, findings := Desired(c.policies, nil, nics(), sriovv1.SriovNetworkNodeStateSpec{})
				if d := cmp.Diff(c.want, summary(spec)); d != "" {
					t.Error(d)
				}
				refused := ""
				for _, f := range findings {
					if f.Refused() {
						refused = f.Policy + " " + string(f.Reason) + " " + f.PFName
					}
				}
				if refused != c.refused {
					t.Errorf("refused %q, want %q: %+v", refused, c.refused, findings)
				}
				slices.Reverse(c.policies)
			}
		})
	}
}

// The settings of each policy of a resource are those of its own VFs, whichever is first.
func TestEachPolicyOfAResourceKeepsItsSettings(t *testing.T) {
	rdma := policy("a", numVfs(8), resource("r"), pfNames("ens1f0#0-3"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.IsRdma = true })
	vhost := policy("b", numVfs(8), resource("r"), pfNames("ens1f0#4-7"), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NeedVhostNet = true })
	for _, policies := range [][]sriovv1.SriovNetworkNodePolicy{{rdma, vhost}, {vhost, rdma}} {
		spec, _ := Desired(policies, nil, nics(), sriovv1.SriovNetworkNodeStateSpec{})
		a, b := spec.Interfaces[0].VfGroups[0], spec.Interfaces[0].VfGroups[1]
		if !a.IsRdma || a.NeedVhostNet || b.IsRdma || !b.NeedVhostNet {
			t.Errorf("%+v, %+v", a, b)
		}
	}
}

// What the SR-IOV network operator rendered is what we render: an upgrade changes nothing.
func TestUpstreamSpecStays(t *testing.T) {
	prior := sriovv1.SriovNetworkNodeStateSpec{Interfaces: []sriovv1.Interface{{
		PciAddress: "0000:01:00.0", Name: "ens1f0", NumVfs: 8, Mtu: 9000, LinkType: "eth",
		VfGroups: []sriovv1.VfGroup{
			{ResourceName: "res-b", DeviceType: "vfio-pci", VfRange: "4-7", PolicyName: "b"},
			{ResourceName: "res-a", DeviceType: "netdevice", VfRange: "0-3", PolicyName: "a", Mtu: 9000},
		},
	}}}
	mtu := func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.Mtu, p.Spec.LinkType = 9000, "eth" }
	vfio := func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.DeviceType = "vfio-pci" }
	spec, _ := Desired([]sriovv1.SriovNetworkNodePolicy{
		policy("a", numVfs(8), pfNames("ens1f0#0-3"), mtu), policy("b", numVfs(8), pfNames("ens1f0#4-7"), vfio),
	}, nil, nics(), prior)
	slices.Reverse(prior.Interfaces[0].VfGroups) // the order of groups means nothing
	if d := cmp.Diff(prior, spec); d != "" {
		t.Error(d)
	}
}

func TestRefusedWhateverTheNIC(t *testing.T) {
	for name, c := range map[string]struct {
		edit edit
		want string // reason and part of the message, which begins with the field
	}{
		"numVfs 0":                {numVfs(0), "PolicyIgnored numVfs 0 makes no VFs"},
		"numVfs below 0":          {numVfs(-1), "PolicyInvalid numVfs -1"},
		"a resource's name":       {resource("a.b"), `PolicyInvalid resourceName "a.b"`},
		"vfio with RDMA":          {func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.DeviceType, p.Spec.IsRdma = "vfio-pci", true }, "PolicyInvalid isRdma true"},
		"vDPA in legacy mode":     {func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.VdpaType = "vhost" }, "PolicyInvalid vdpaType vhost needs"},
		"vDPA with vfio":          {func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.VdpaType, p.Spec.DeviceType = "vhost", "vfio-pci" }, "PolicyInvalid vdpaType vhost cannot"},
		"switchdev on InfiniBand": {func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.EswitchMode, p.Spec.LinkType = "switchdev", "IB" }, "PolicyInvalid eSwitchMode switchdev"},
		"a network and a name":    {func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NicSelector.NetFilter = "aws/NetworkID:x" }, "PolicyInvalid nicSelector.netFilter"},
		"a mode for a virtual NIC": {func(p *sriovv1.SriovNetworkNodePolicy) {
			p.Spec.NicSelector = sriovv1.SriovNetworkNicSelector{NetFilter: "aws/NetworkID:x"}
			p.Spec.EswitchMode = "legacy"
		}, "PolicyInvalid nicSelector.netFilter"},
		"a bridge in legacy mode": {func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.Bridge.OVS = &sriovv1.OVSConfig{} }, "PolicyInvalid bridge.ovs needs the NIC in switchdev mode"},
		"a bridge on a NIC of others": {func(p *sriovv1.SriovNetworkNodePolicy) {
			bridged(nil)(p)
			p.Spec.ExternallyManaged = true
		}, "PolicyInvalid bridge.ovs cannot go with externallyManaged"},
		"a bridge with the agent's key": {bridged(func(c *sriovv1.OVSConfig) { c.Bridge.ExternalIDs = map[string]string{"sluice.dev/bridge": ""} }),
			"PolicyInvalid bridge.ovs.bridge.externalIDs has the key sluice.dev/bridge"},
		"a bridge's MTU": {bridged(func(c *sriovv1.OVSConfig) { c.Uplink.Interface.MTURequest = new(int) }), "PolicyInvalid bridge.ovs.uplink.interface.mtuRequest 0"},
		"a network nobody knows": {func(p *sriovv1.SriovNetworkNodePolicy) {
			p.Spec.NicSelector = sriovv1.SriovNetworkNicSelector{NetFilter: "aws/NetworkID:x"}
		}, "NoNICSelected nicSelector selects no PF"},
		"switchdev without an eswitch": {func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.EswitchMode = "switchdev" }, "NICMismatch eSwitchMode switchdev: the driver of PF ens1f0"},
	} {
		t.Run(name, func(t *testing.T) {
			inventory := nics()
			for i := range inventory {
				inventory[i].EswitchMode = ""
			}
			p := policy("a", c.edit)
			spec, findings := Desired([]sriovv1.SriovNetworkNodePolicy{p}, nil, inventory, sriovv1.SriovNetworkNodeStateSpec{})
			if len(spec.Interfaces) > 0 || !slices.ContainsFunc(findings, func(f Finding) bool {
				return strings.HasPrefix(string(f.Reason)+" "+f.Message, c.want)
			}) {
				t.Errorf("%+v, %+v", spec, findings)
			}
		})
	}
}

func TestNetFilter(t *testing.T) {
	inventory := nics()
	inventory[0].NetFilter = "openstack/NetworkID:abc"
	p := policy("a", pfNames(), func(p *sriovv1.SriovNetworkNodePolicy) { p.Spec.NicSelector.NetFilter = " openstack/NetworkID : abc" })
	spec, _ := Desired([]sriovv1.SriovNetworkNodePolicy{p}, nil, inventory, sriovv1.SriovNetworkNodeStateSpec{})
	if d := cmp.Diff("ens1f0 0-3: a/res-a=0-3", summary(spec)); d != "" {
		t.Error(d)
	}
}

// A policy taken back to numVfs 0 gives its VFs up, as a deleted one does.
func TestNumVfs0GivesUp(t *testing.T) {
	prior, _ := Desired([]sriovv1.SriovNetworkNodePolicy{policy("a")}, nil, nics(), sriovv1.SriovNetworkNodeStateSpec{})
	spec, _ := Desired([]sriovv1.SriovNetworkNodePolicy{policy("a", numVfs(0))}, nil, nics(), prior)
	if len(spec.Interfaces) > 0 {
		t.Errorf("%+v", spec)
	}
}
