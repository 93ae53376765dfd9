package plan

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// bridged makes the policy ask for a bridge.
func bridged(change func(*v1.OVSConfig)) edit {
	return func(p *v1.SriovNetworkNodePolicy) {
		p.Spec.EswitchMode, p.Spec.Bridge.OVS = v1.EswitchModeSwitchdev, &v1.OVSConfig{}
		if change != nil {
			change(p.Spec.Bridge.OVS)
		}
	}
}

func TestBridgeOfPolicy(t *testing.T) {
	both := func(p *v1.SriovNetworkNodePolicy) {
		p.Spec.NicSelector.PfNames = []v1.PfName{"ens2f0", "ens1f0"}
		bridged(func(c *v1.OVSConfig) {
			c.Bridge = v1.OVSBridgeConfig{DatapathType: "netdev", FailMode: "secure", ExternalIDs: map[string]string{"a": "1"}, OtherConfig: map[string]string{"b": "2"}}
			c.Uplink.Interface = v1.OVSInterfaceConfig{Type: "dpdk", Options: map[string]string{"c": "3"}, MTURequest: new(int)}
			*c.Uplink.Interface.MTURequest = 1500
		})(p)
	}
	a := policy("a", both)
	spec, _ := Desired([]v1.SriovNetworkNodePolicy{a}, nil, nics(), v1.SriovNetworkNodeStateSpec{})
	bridge := func(name, address, device string) v1.OVSConfigExt {
		return v1.OVSConfigExt{Name: name, Bridge: a.Spec.Bridge.OVS.Bridge, Uplinks: []v1.OVSUplinkConfigExt{{PciAddress: address, Name: device, Interface: a.Spec.Bridge.OVS.Uplink.Interface}}}
	}
	want := []v1.OVSConfigExt{bridge("br-0000_01_00.0", "0000:01:00.0", "ens1f0"), bridge("br-0000_02_00.0", "0000:02:00.0", "ens2f0")}
	if d := cmp.Diff(want, spec.Bridges.OVS); d != "" {
		t.Error(d)
	}
	// The VFs' MTU is the uplink's too, and the policy stays as it is.
	jumbo := policy("a", both, func(p *v1.SriovNetworkNodePolicy) { p.Spec.Mtu = 9000 })
	spec, _ = Desired([]v1.SriovNetworkNodePolicy{jumbo}, nil, nics(), spec)
	if got := *spec.Bridges.OVS[0].Uplinks[0].Interface.MTURequest; got != 9000 || *jumbo.Spec.Bridge.OVS.Uplink.Interface.MTURequest != 1500 {
		t.Errorf("mtuRequest is %d", got)
	}
	// One that is wrong now keeps the bridges, as it keeps the VFs; without the gate it does not.
	wrong := policy("a", both, numVfs(65))
	kept, _ := Desired([]v1.SriovNetworkNodePolicy{wrong}, nil, nics(), spec)
	if d := cmp.Diff(spec, kept); d != "" {
		t.Error(d)
	}
	off, findings := Compile([]v1.SriovNetworkNodePolicy{jumbo}, false).Desired(nil, nics(), spec)
	if len(off.Bridges.OVS) > 0 || len(off.Interfaces) != 2 || !strings.Contains(findings[0].String(), "featureGates manageSoftwareBridges") || !strings.HasSuffix(findings[0].String(), "it keeps the VFs it had") {
		t.Errorf("%+v, %s", off, findings[0])
	}
	spec, _ = Desired(nil, nil, nics(), spec)
	if len(spec.Bridges.OVS) > 0 {
		t.Errorf("bridges of no policy: %+v", spec.Bridges)
	}
}

func TestBridgeNameTooLong(t *testing.T) {
	inventory := nics()[:1]
	inventory[0].PciAddress = "10000:01:00.0"
	spec, findings := Desired([]v1.SriovNetworkNodePolicy{policy("a", bridged(nil))}, nil, inventory, v1.SriovNetworkNodeStateSpec{})
	if len(spec.Interfaces) > 0 || findings[0].Reason != NICMismatch || !strings.Contains(findings[0].Message, "br-10000_01_00.0, which is longer than the 15") {
		t.Errorf("%+v %+v", spec, findings)
	}
}

func genPF(t *rapid.T, want *v1.OVSConfigExt) PF {
	pf := PF{PCIAddress: "0000:01:00.0", Name: rapid.SampledFrom([]string{"ens1f0", "ens1f0", "ens1f0", ""}).Draw(t, "name"), Eswitch: rapid.SampledFrom([]string{"legacy", "switchdev"}).Draw(t, "mode"), Ethernet: true, Up: true, TotalVFs: 8}
	pf.NumVFs = rapid.IntRange(0, 2).Draw(t, "VFs")
	for i := range pf.NumVFs {
		pf.VFs = append(pf.VFs, VF{Index: i, PCIAddress: "vf", Driver: "iavf", Held: rapid.IntRange(0, 3).Draw(t, "held") == 0})
	}
	switch rapid.IntRange(0, 5).Draw(t, "bridge") {
	case 0:
		pf.Bridge.Is = want.DeepCopy()
	case 1:
		pf.Bridge.Is = want.DeepCopy()
		pf.Bridge.Is.Bridge.FailMode = "secure"
	case 2:
		pf.Bridge.Is = want.DeepCopy()
		pf.Bridge.Is.Uplinks = nil
	case 3:
		pf.Bridge.Foreign = true
	case 4:
		pf.Bridge.Unknown = "start it"
	}
	pf.Bridge.Made = pf.Bridge.Is != nil || pf.Bridge.Unknown != "" && rapid.Bool().Draw(t, "made")
	return pf
}

// Whatever there is, what is wanted comes about in the right order unless something is
// told to be in the way, and pods keep their bridge.
func TestWithBridgeProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		wanted := &v1.OVSConfigExt{Name: "br-0000_01_00.0", Uplinks: []v1.OVSUplinkConfigExt{{PciAddress: "0000:01:00.0", Name: "ens1f0"}}}
		pf := genPF(t, wanted)
		want, iface := wanted, v1.Interface{PciAddress: pf.PCIAddress, NumVfs: 2, EswitchMode: v1.EswitchModeSwitchdev}
		if rapid.Bool().Draw(t, "not wanted") {
			want, iface.EswitchMode = nil, rapid.SampledFrom([]string{"legacy", "switchdev"}).Draw(t, "wanted mode")
		}
		for round := 0; ; round++ {
			ops, blocked, err := Operations(iface, pf)
			if err != nil {
				t.Fatal(err)
			}
			ops, blocked = WithBridge(want, pf, ops, blocked)
			if round == 12 {
				t.Fatalf("it does not end: %v", ops)
			}
			for _, op := range ops {
				switch op.Kind {
				case RemoveBridge:
					pf.Bridge.Is = nil
				case DetachUplink:
					pf.Bridge.Is.Uplinks = nil
				case SetBridge:
					if pf.Eswitch != v1.EswitchModeSwitchdev || pf.Bridge.Foreign || pf.Bridge.Unknown != "" {
						t.Fatalf("the bridge is made on %+v", pf)
					}
					pf.Bridge.Is = want.DeepCopy()
				case SetEswitchMode:
					if pf.Bridge.Is != nil && len(pf.Bridge.Is.Uplinks) > 0 || pf.Bridge.Unknown != "" && pf.Bridge.Made {
						t.Fatalf("the mode changes with the uplink in the bridge: %+v", pf.Bridge)
					}
					pf.Eswitch = op.Value
				case SetNumVFs:
					pf.NumVFs, pf.VFs = op.Number, nil
					for i := range op.Number {
						pf.VFs = append(pf.VFs, VF{Index: i, PCIAddress: "vf"})
					}
				case UnbindVFDriver:
					pf.VFs[op.VF].Driver = ""
				case BindVFDriver:
					pf.VFs[op.VF].Driver = "iavf"
				}
				for _, vf := range pf.VFs {
					if vf.Held && op.TouchesVF(vf.Index) {
						t.Fatalf("%s while a pod holds VF %d", op, vf.Index)
					}
				}
			}
			if len(ops) > 0 {
				continue
			}
			if done := want == nil && pf.Bridge.Is == nil && !(pf.Bridge.Unknown != "" && pf.Bridge.Made) || pf.Bridge.As(want); !done && len(blocked) == 0 && pf.Name != "" {
				t.Fatalf("the bridge is not as wanted, and nothing says why: %+v", pf.Bridge)
			}
			return
		}
	})
}
