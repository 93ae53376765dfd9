package plan

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

func genPolicies(t *rapid.T) []sriovv1.SriovNetworkNodePolicy {
	var policies []sriovv1.SriovNetworkNodePolicy
	for i := range rapid.IntRange(0, 6).Draw(t, "policies") {
		policies = append(policies, genPolicy(t, fmt.Sprintf("p%d", i)))
	}
	return policies
}

func genPolicy(t *rapid.T, name string) sriovv1.SriovNetworkNodePolicy {
	n := rapid.IntRange(0, 12).Draw(t, name+" numVfs")
	p := policy(name, numVfs(n), prio(rapid.IntRange(8, 10).Draw(t, name+" priority")),
		later(time.Duration(rapid.IntRange(0, 2).Draw(t, name+" age"))*time.Second),
		resource(rapid.SampledFrom([]string{"x", "y"}).Draw(t, name+" resource")))
	p.Spec.DeviceType = rapid.SampledFrom([]string{"netdevice", "vfio-pci"}).Draw(t, name+" type")
	p.Spec.EswitchMode = rapid.SampledFrom([]string{"", "", "legacy", "switchdev"}).Draw(t, name+" mode")
	p.Spec.ExcludeTopology = rapid.IntRange(0, 9).Draw(t, name+" topology") == 0
	p.Spec.ExternallyManaged = rapid.IntRange(0, 9).Draw(t, name+" external") == 0
	if rapid.IntRange(0, 3).Draw(t, name+" bridge") == 0 {
		bridged(func(c *sriovv1.OVSConfig) {
			c.Bridge.FailMode = rapid.SampledFrom([]string{"", "secure"}).Draw(t, name+" fail mode")
		})(&p)
	}
	p.Spec.Mtu = rapid.SampledFrom([]int{0, 1500, 9000}).Draw(t, name+" mtu")
	p.Spec.NicSelector.PfNames = nil
	for _, nic := range []string{"ens1f0", "enp1s0f0", "ens2f0"} {
		switch rapid.IntRange(0, 3).Draw(t, name+" on "+nic) {
		case 1:
			p.Spec.NicSelector.PfNames = append(p.Spec.NicSelector.PfNames, sriovv1.PfName(nic))
		case 2, 3:
			first := rapid.IntRange(0, 12).Draw(t, "first")
			last := rapid.IntRange(0, 12).Draw(t, "last")
			p.Spec.NicSelector.PfNames = append(p.Spec.NicSelector.PfNames, sriovv1.PfName(fmt.Sprintf("%s#%d-%d", nic, first, last)))
		}
	}
	return p
}

func reasons(findings []Finding, policy string) []Finding {
	var of []Finding
	for _, f := range findings {
		if f.Policy == policy {
			of = append(of, f)
		}
	}
	return of
}

func TestDesiredProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		policies, inventory := genPolicies(t), nics()
		var prior sriovv1.SriovNetworkNodeStateSpec
		if rapid.Bool().Draw(t, "has a prior spec") {
			prior, _ = Desired(genPolicies(t), nil, inventory, prior)
		}
		spec, findings := Desired(policies, nil, inventory, prior)
		if diff := cmp.Diff(spec, Compile(policies, true).Spec(nil, inventory, prior)); diff != "" {
			t.Fatalf("without findings it is another spec:\n%s", diff)
		}

		// The order of the inputs, and doing it again, make no difference.
		shuffled := rapid.Permutation(policies).Draw(t, "order")
		nics := rapid.Permutation(inventory).Draw(t, "NIC order")
		again, findingsAgain := Desired(shuffled, nil, nics, prior)
		if diff := cmp.Diff(spec, again); diff != "" {
			t.Fatalf("another order gives another spec:\n%s", diff)
		}
		if diff := cmp.Diff(findings, findingsAgain); diff != "" {
			t.Fatalf("another order gives other findings:\n%s", diff)
		}
		// A plan that is in effect stays as it is.
		settled, _ := Desired(policies, nil, inventory, spec)
		if diff := cmp.Diff(spec, settled); diff != "" {
			t.Fatalf("the plan does not settle:\n%s", diff)
		}

		for _, iface := range spec.Interfaces {
			pf := inventory[slices.IndexFunc(inventory, func(i sriovv1.InterfaceExt) bool { return i.PciAddress == iface.PciAddress })]
			if iface.NumVfs > pf.TotalVfs || iface.NumVfs < 1 || len(iface.VfGroups) == 0 {
				t.Fatalf("numVfs %d of %d with groups %+v", iface.NumVfs, pf.TotalVfs, iface.VfGroups)
			}
			next := 0
			for _, g := range iface.VfGroups {
				first, last, err := ParseVfRange(g.VfRange)
				if err != nil || first < next || last >= iface.NumVfs {
					t.Fatalf("group %+v of %d VFs overlaps the one before or the end", g, iface.NumVfs)
				}
				next = last + 1
				if !slices.ContainsFunc(policies, func(p sriovv1.SriovNetworkNodePolicy) bool { return p.Name == g.PolicyName }) {
					t.Fatalf("group %+v of no policy", g)
				}
			}
		}
		for _, b := range spec.Bridges.OVS {
			up := b.Uplinks[0]
			i := slices.IndexFunc(spec.Interfaces, func(i sriovv1.Interface) bool { return i.PciAddress == up.PciAddress })
			if b.Name != BridgeName(up.PciAddress) || i < 0 || spec.Interfaces[i].EswitchMode != "switchdev" || spec.Interfaces[i].ExternallyManaged {
				t.Fatalf("bridge %+v on %+v", b, spec.Interfaces)
			}
		}
		if off := Compile(policies, false).Spec(nil, inventory, prior); len(off.Bridges.OVS) > 0 {
			t.Fatalf("bridges without the gate: %+v", off.Bridges)
		}

		for _, p := range policies {
			if len(reasons(findings, p.Name)) == 0 {
				t.Fatalf("policy %s has no finding", p.Name)
			}
		}

		// A policy that got nothing anywhere might as well not be there.
		if len(prior.Interfaces) > 0 {
			return // it may have kept something of the prior spec
		}
		for i, p := range policies {
			if slices.ContainsFunc(reasons(findings, p.Name), func(f Finding) bool { return f.Reason == Configured }) {
				continue
			}
			without, others := Desired(slices.Delete(slices.Clone(policies), i, i+1), nil, inventory, prior)
			if diff := cmp.Diff(spec, without); diff != "" {
				t.Fatalf("refused policy %s changes the plan:\n%s", p.Name, diff)
			}
			for _, q := range policies {
				if q.Name != p.Name {
					if diff := cmp.Diff(reasons(findings, q.Name), reasons(others, q.Name)); diff != "" {
						t.Fatalf("refused policy %s changes the findings of %s:\n%s", p.Name, q.Name, diff)
					}
				}
			}
		}
	})
}

func TestPfNameRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		vfs := rapid.SliceOfDistinct(rapid.IntRange(0, 60), rapid.ID[int]).Draw(t, "vfs")
		if len(vfs) == 0 {
			return
		}
		slices.Sort(vfs)
		name, got, err := ParsePfName("pf#" + formatVFs(vfs))
		if err != nil || name != "pf" || !slices.Equal(got, vfs) {
			t.Fatalf("%v comes back as %s %v, %v", vfs, name, got, err)
		}
	})
}
