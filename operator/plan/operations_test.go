package plan

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

const pfAddress = "0000:3b:00.0"

func vfAt(i int) VF {
	mac := fmt.Sprintf("02:00:00:00:00:%02x", i)
	return VF{
		Index: i, PCIAddress: fmt.Sprintf("0000:3b:02.%d", i), Driver: "iavf", Name: fmt.Sprintf("ens1f0v%d", i), HostName: fmt.Sprintf("ens1f0v%d", i),
		MTU: 1500, MAC: mac, AdminMAC: mac, StableMAC: mac, IOMMU: true,
	}
}

func pfWith(vfs ...VF) PF {
	return PF{PCIAddress: pfAddress, Name: "ens1f0", Driver: "i40e", Ethernet: true, MTU: 1500, Up: true, TotalVFs: 8, NumVFs: len(vfs), VFs: vfs}
}

func asked(numVfs int, groups ...v1.VfGroup) v1.Interface {
	return v1.Interface{PciAddress: pfAddress, Name: "ens1f0", NumVfs: numVfs, VfGroups: groups}
}

func group(vfRange string) v1.VfGroup {
	return v1.VfGroup{VfRange: vfRange, ResourceName: "r", PolicyName: "p", DeviceType: v1.DeviceTypeNetDevice}
}

func with[T any](v T, change func(*T)) T {
	change(&v)
	return v
}

func TestOperations(t *testing.T) {
	vf0, vf1 := vfAt(0), vfAt(1)
	held := with(vf0, func(v *VF) { v.Held, v.Holder, v.Name, v.MAC, v.MTU = true, "default/client", "", "", 0 })
	bare := with(vf1, func(v *VF) { v.Driver, v.Name, v.AdminMAC, v.MAC, v.MTU = "", "", "00:00:00:00:00:00", "", 0 })
	vfio := with(group("0-1"), func(g *v1.VfGroup) { g.DeviceType = v1.DeviceTypeVfioPci })
	jumbo := with(group("0-1"), func(g *v1.VfGroup) { g.Mtu = 9000 })
	vdpa := with(group("0-1"), func(g *v1.VfGroup) { g.VdpaType = "vhost" })
	switchdev := func(n int, groups ...v1.VfGroup) v1.Interface {
		return with(asked(n, groups...), func(i *v1.Interface) { i.EswitchMode = v1.EswitchModeSwitchdev })
	}
	foreign := func(vf VF) VF {
		return with(vf, func(v *VF) { v.AdminMAC, v.MAC = "02:00:00:00:aa:0"+fmt.Sprint(v.Index), "02:00:00:00:bb:00" })
	}
	infiniBand := func(vf VF) PF {
		return with(pfWith(with(vf, func(v *VF) { v.AdminMAC, v.StableGUID = "", "02:11:22:33:44:55:66:77" })), func(p *PF) { p.Ethernet = false })
	}

	for name, c := range map[string]struct {
		want    v1.Interface
		have    PF
		ops     []string
		blocked []string
	}{
		"right already": {asked(2, group("0-1")), pfWith(vf0, vf1), nil, nil},
		"first VFs": {
			with(asked(2, group("0-1")), func(i *v1.Interface) { i.Mtu = 9000 }), with(pfWith(), func(p *PF) { p.Up = false }),
			[]string{"SetPFMTU 9000 on 0000:3b:00.0", "SetPFUp on 0000:3b:00.0", "SetNumVFs 2 on 0000:3b:00.0"}, nil,
		},
		"PF MTU is not lowered": {with(asked(2, group("0-1")), func(i *v1.Interface) { i.Mtu = 1400 }), pfWith(vf0, vf1), nil, nil},
		"new VF gets its MAC before its driver": {
			asked(2, group("0-1")), pfWith(vf0, bare),
			[]string{"SetVFAdminMAC 02:00:00:00:00:01 on VF 1 (0000:3b:02.1)", "BindVFDriver default on VF 1 (0000:3b:02.1)"}, nil,
		},
		"shrink": {asked(1, group("0-0")), pfWith(vf0, vf1), []string{"SetNumVFs 1 on 0000:3b:00.0"}, nil},
		"shrink below a pod": {
			asked(1, group("0-0")), pfWith(held, vf1), nil,
			[]string{"SetNumVFs 1 on 0000:3b:00.0 waits for the pods that hold its VFs: default/client (VF 0); delete them or take the change back"},
		},
		"grow below a pod, the rest goes on": {
			asked(4, jumbo), pfWith(held, vf1), []string{"SetVFMTU 9000 on VF 1 (0000:3b:02.1)"},
			[]string{"SetNumVFs 4 on 0000:3b:00.0 waits for the pods that hold its VFs: default/client (VF 0); delete them or take the change back"},
		},
		"held VF is left alone": {asked(2, jumbo), pfWith(held, with(vf1, func(v *VF) { v.MTU = 9000 })), nil, nil},
		"driver":                {asked(2, vfio), pfWith(held, vf1), []string{"BindVFDriver vfio-pci on VF 1 (0000:3b:02.1)"}, []string{"BindVFDriver vfio-pci on VF 0 (0000:3b:02.0) waits for the pods that hold its VFs: default/client (VF 0); delete them or take the change back"}},
		"driver back": {asked(2, group("0-1")), pfWith(vf0, with(vf1, func(v *VF) { v.Driver, v.Name, v.MAC, v.MTU = "vfio-pci", "", "", 0 })),
			[]string{"BindVFDriver default on VF 1 (0000:3b:02.1)"}, nil},
		"a VF without a group gets its driver too": {asked(2, group("0-0")), pfWith(vf0, bare),
			[]string{"SetVFAdminMAC 02:00:00:00:00:01 on VF 1 (0000:3b:02.1)", "BindVFDriver default on VF 1 (0000:3b:02.1)"}, nil},
		"came back under another name, with a pod's MAC": {
			asked(2, group("0-1")), pfWith(vf0, with(vf1, func(v *VF) { v.Name, v.MAC, v.AdminMAC = "net1", "02:00:00:00:aa:01", "02:00:00:00:aa:01" })),
			[]string{"SetVFAdminMAC 02:00:00:00:00:01 on VF 1 (0000:3b:02.1)", "RenameVF ens1f0v1 on VF 1 (0000:3b:02.1)", "SetVFMAC 02:00:00:00:00:01 on VF 1 (0000:3b:02.1)"}, nil,
		},
		"netdev not there yet":         {asked(2, jumbo), pfWith(with(vf0, func(v *VF) { v.MTU = 9000 }), with(vf1, func(v *VF) { v.Name, v.MAC, v.MTU = "", "", 0 })), nil, nil},
		"InfiniBand has no MAC to set": {asked(1, group("0-0")), with(pfWith(with(vf0, func(v *VF) { v.AdminMAC = "" })), func(p *PF) { p.Ethernet = false }), nil, nil},
		"externally managed": {
			with(asked(1, with(group("0-0"), func(g *v1.VfGroup) { g.Mtu = 1400 })), func(i *v1.Interface) { i.ExternallyManaged = true }),
			with(pfWith(with(vf0, func(v *VF) { v.AdminMAC = "02:00:00:00:bb:00" }), vf1), func(p *PF) { p.Up = false }),
			[]string{"SetVFMTU 1400 on VF 0 (0000:3b:02.0)"}, nil,
		},
		"PF MTU is lowered to what it was when it was raised here": {
			asked(2, group("0-1")), with(pfWith(vf0, vf1), func(p *PF) { p.MTU, p.Original = 9000, &Original{MTU: 1500, RaisedMTU: 9000} }),
			[]string{"SetPFMTU 1500 on 0000:3b:00.0"}, nil,
		},
		"but not below what a policy wants": {
			with(asked(2, group("0-1")), func(i *v1.Interface) { i.Mtu = 4000 }), with(pfWith(vf0, vf1), func(p *PF) { p.MTU, p.Original = 9000, &Original{MTU: 1500, RaisedMTU: 9000} }),
			[]string{"SetPFMTU 4000 on 0000:3b:00.0"}, nil,
		},
		"nor when somebody else set it since": {
			asked(2, group("0-1")), with(pfWith(vf0, vf1), func(p *PF) { p.MTU, p.Original = 9216, &Original{MTU: 1500, RaisedMTU: 9000} }), nil, nil,
		},
		"nor under a pod": {
			asked(2, group("0-1")), with(pfWith(held, vf1), func(p *PF) { p.MTU, p.Original = 9000, &Original{MTU: 1500, RaisedMTU: 9000} }), nil, nil,
		},
		"given up, the PF gets back what it had": {
			asked(0), with(pfWith(), func(p *PF) {
				p.MTU, p.Eswitch, p.Original = 9000, "legacy", &Original{MTU: 1500, RaisedMTU: 9000, Eswitch: "switchdev"}
			}),
			[]string{"SetPFMTU 1500 on 0000:3b:00.0", "SetEswitchMode switchdev on 0000:3b:00.0"}, nil,
		},
		"switchdev: VFs leave their driver first": {
			switchdev(2), with(pfWith(vf0, with(vf1, func(v *VF) { v.Driver = "" })), func(p *PF) { p.Eswitch = "legacy" }),
			[]string{"UnbindVFDriver on VF 0 (0000:3b:02.0)", "SetEswitchMode switchdev on 0000:3b:00.0"}, nil,
		},
		"switchdev with more VFs: these first": {
			switchdev(2), with(pfWith(vf0), func(p *PF) { p.Eswitch = "legacy" }), []string{"SetNumVFs 2 on 0000:3b:00.0"}, nil,
		},
		"switchdev on ice: no VFs first": {
			switchdev(2), with(pfWith(vf0, vf1), func(p *PF) { p.Driver, p.Eswitch = "ice", "legacy" }), []string{"SetNumVFs 0 on 0000:3b:00.0"}, nil,
		},
		"then the mode": {
			switchdev(2), with(pfWith(), func(p *PF) { p.Driver, p.Eswitch = "ice", "legacy" }), []string{"SetEswitchMode switchdev on 0000:3b:00.0"}, nil,
		},
		"switchdev under a pod waits, the other VFs stay": {
			switchdev(2), with(pfWith(held, vf1), func(p *PF) { p.Eswitch = "legacy" }), nil,
			[]string{"SetEswitchMode switchdev on 0000:3b:00.0 waits for the pods that hold its VFs: default/client (VF 0); delete them or take the change back"},
		},
		"no mode is legacy": {
			asked(1, group("0-0")), with(pfWith(with(vf0, func(v *VF) { v.Driver = "" })), func(p *PF) { p.Eswitch = "switchdev" }),
			[]string{"SetEswitchMode legacy on 0000:3b:00.0"}, nil,
		},
		"settings that drifted": {
			asked(2, group("0-1")), pfWith(with(vf0, func(v *VF) { v.Drift = "vlan 100" }), with(held, func(v *VF) { v.Index, v.Drift = 1, "trust on" })),
			[]string{"ResetVFSettings (vlan 100) on VF 0 (0000:3b:02.0)"}, nil,
		},
		"which mean nothing in switchdev mode": {
			switchdev(1), with(pfWith(with(vf0, func(v *VF) { v.Drift = "spoofchk off" })), func(p *PF) { p.Eswitch = "switchdev" }), nil, nil,
		},
		"vfio without an IOMMU": {
			asked(2, vfio), pfWith(with(vf0, func(v *VF) { v.IOMMU = false }), vf1),
			[]string{"BindVFDriver vfio-pci on VF 1 (0000:3b:02.1)"},
			[]string{"BindVFDriver vfio-pci on VF 0 (0000:3b:02.0) cannot be: deviceType vfio-pci needs an IOMMU and the VF is in no IOMMU group: turn VT-d or AMD-Vi on in the BIOS and boot with intel_iommu=on or amd_iommu=on, and iommu=pt"},
		},
		"RDMA on a NIC without": {
			asked(1, with(group("0-0"), func(g *v1.VfGroup) { g.IsRdma = true })), pfWith(vf0), nil,
			[]string{"RequireRDMA on VF 0 (0000:3b:02.0) cannot be: isRdma is asked for and driver iavf has made no RDMA device for the VF: load its RDMA module on the node, or set isRdma to false"},
		},
		"vDPA": {
			switchdev(2, vdpa), with(pfWith(vf0, with(vf1, func(v *VF) { v.VDPA = "virtio" })), func(p *PF) { p.Eswitch = "switchdev" }),
			[]string{"SetVFVDPA vhost on VF 0 (0000:3b:02.0)", "SetVFVDPA none on VF 1 (0000:3b:02.1)"}, nil,
		},
		"vDPA no more, under a pod": {
			asked(1, group("0-0")), pfWith(with(held, func(v *VF) { v.VDPA = "vhost" })), nil,
			[]string{"SetVFVDPA none on VF 0 (0000:3b:02.0) waits for the pods that hold its VFs: default/client (VF 0); delete them or take the change back"},
		},
		"taken over, the VFs keep their addresses": {
			asked(2, group("0-1")), with(pfWith(foreign(vf0), foreign(vf1)), func(p *PF) { p.TakenOver = true }), nil, nil,
		},
		"but one without any gets its own": {
			asked(2, group("0-1")), with(pfWith(foreign(vf0), with(vf1, func(v *VF) { v.AdminMAC = "00:00:00:00:00:00" })), func(p *PF) { p.TakenOver = true }),
			[]string{"SetVFAdminMAC 02:00:00:00:00:01 on VF 1 (0000:3b:02.1)"}, nil,
		},
		"InfiniBand: a new VF gets its GUID before its driver": {
			asked(1, group("0-0")), infiniBand(with(bare, func(v *VF) { v.Index = 0 })),
			[]string{"SetVFGUID 02:11:22:33:44:55:66:77 on VF 0 (0000:3b:02.1)", "BindVFDriver default on VF 0 (0000:3b:02.1)"}, nil,
		},
		"InfiniBand: another GUID needs the driver anew": {
			asked(1, group("0-0")), infiniBand(with(vf0, func(v *VF) { v.GUID = "02:00:00:00:00:00:00:01" })),
			[]string{"SetVFGUID 02:11:22:33:44:55:66:77 on VF 0 (0000:3b:02.0)", "BindVFDriver default on VF 0 (0000:3b:02.0)"}, nil,
		},
		"InfiniBand: a GUID that cannot be read is left": {asked(1, group("0-0")), infiniBand(vf0), nil, nil},
		"InfiniBand: taken over": {
			asked(1, group("0-0")), with(infiniBand(with(vf0, func(v *VF) { v.GUID = "02:00:00:00:00:00:00:01" })), func(p *PF) { p.TakenOver = true }), nil, nil,
		},
		"InfiniBand: too few GUIDs": {
			asked(1, group("0-0")), infiniBand(with(vf0, func(v *VF) { v.NoGUID = "add some" })), nil, []string{"SetVFGUID on VF 0 (0000:3b:02.0) cannot be: add some"},
		},
		"none": {asked(0), pfWith(vf0), []string{"SetNumVFs 0 on 0000:3b:00.0"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			ops, blocked, err := Operations(c.want, c.have)
			if err != nil {
				t.Fatal(err)
			}
			var gotOps, gotBlocked []string
			for _, o := range ops {
				gotOps = append(gotOps, o.String())
			}
			for _, b := range blocked {
				gotBlocked = append(gotBlocked, b.String())
			}
			if d := cmp.Diff(c.ops, gotOps); d != "" {
				t.Errorf("operations: %s", d)
			}
			if d := cmp.Diff(c.blocked, gotBlocked); d != "" {
				t.Errorf("blocked: %s", d)
			}
		})
	}
}

func TestOperationsRefuse(t *testing.T) {
	for name, c := range map[string]struct {
		want v1.Interface
		err  string
	}{
		"too many":          {asked(9), "interface 0000:3b:00.0 (ens1f0): numVfs: 9 is more than the 8 VFs the device can make: use 8 or less"},
		"negative":          {asked(-1), "numVfs: -1 is negative"},
		"range backwards":   {asked(4, group("3-1")), `vfGroups[0] (policy p): VF range "3-1" runs backwards: write 1-3`},
		"range open":        {asked(4, group("-2")), `vfGroups[0] (policy p): VF range "-2": "" is not a VF number`},
		"range beyond":      {asked(4, group("0-4")), `vfRange "0-4" reaches beyond the last of numVfs 4 VFs, 3`},
		"overlap":           {asked(4, group("0-2"), group("2-3")), `vfGroups[1] (policy p): vfRange "2-3" overlaps "0-2"`},
		"external, too few": {with(asked(4), func(i *v1.Interface) { i.ExternallyManaged = true }), "externally managed PF that has 2"},
		"external, MTU":     {with(asked(2), func(i *v1.Interface) { i.ExternallyManaged, i.Mtu = true, 9000 }), "mtu: 9000 is more than the 1500"},
		"switchdev":         {with(asked(2), func(i *v1.Interface) { i.EswitchMode = "switchdev" }), "eSwitchMode: switchdev: driver i40e has no eswitch that devlink can switch"},
	} {
		t.Run(name, func(t *testing.T) {
			ops, blocked, err := Operations(c.want, pfWith(vfAt(0), vfAt(1)))
			if err == nil || !strings.Contains(err.Error(), c.err) || ops != nil || blocked != nil {
				t.Errorf("%v %v %v", ops, blocked, err)
			}
		})
	}
}

// Each operation says what it costs; who is disturbed decides, not the kind.
func TestCosts(t *testing.T) {
	held := with(vfAt(0), func(v *VF) { v.Held, v.Holder = true, "default/client" })
	vfio := with(group("0-0"), func(g *v1.VfGroup) { g.DeviceType = v1.DeviceTypeVfioPci })
	for name, c := range map[string]struct {
		want v1.Interface
		have PF
		cost Cost
		why  string
	}{
		"first VFs":             {asked(2), pfWith(), Live, ""},
		"other VFs":             {asked(2), pfWith(vfAt(0)), VFReset, "all 1 VFs of the PF are made anew"},
		"other VFs under a pod": {asked(2), pfWith(held), Evict, "all 1 VFs of the PF are made anew"},
		"MTU":                   {asked(1, with(group("0-0"), func(g *v1.VfGroup) { g.Mtu = 9000 })), pfWith(vfAt(0)), Live, ""},
		"driver":                {asked(1, vfio), pfWith(vfAt(0)), VFReset, "must leave driver iavf"},
		"driver under a pod":    {asked(1, vfio), pfWith(held), Evict, "must leave driver iavf"},
		"first driver":          {asked(1, vfio), pfWith(with(vfAt(0), func(v *VF) { v.Driver = "" })), Live, ""},
	} {
		t.Run(name, func(t *testing.T) {
			ops, blocked, err := Operations(c.want, c.have)
			for _, b := range blocked {
				ops = append(ops, b.Operation)
			}
			if err != nil || len(ops) != 1 || ops[0].Cost != c.cost || !strings.Contains(ops[0].Reason, c.why) || (c.why == "") != (ops[0].Reason == "") {
				t.Errorf("%+v, %v", ops, err)
			}
		})
	}
	if Live >= VFReset || VFReset >= Evict || Evict >= Reboot || Evict.String() != v1.CostEvict || Reboot.String() != v1.CostReboot {
		t.Error("the costs are out of order")
	}
}

func TestSystemOperations(t *testing.T) {
	for name, c := range map[string]struct {
		want string
		have System
		op   string
		cost Cost
	}{
		"nothing asked": {"", System{RDMAMode: "shared"}, "", Live},
		"as asked":      {"shared", System{RDMAMode: "shared", RDMABusy: true}, "", Live},
		"live":          {"exclusive", System{RDMAMode: "shared"}, "SetRDMAMode exclusive on the node", Live},
		"reboot":        {"exclusive", System{RDMAMode: "shared", RDMABusy: true}, "SetRDMAMode exclusive on the node waits for a reboot: the kernel changes rdmaMode only while no pod has a network namespace: boot with ib_core.netns_mode=0", Reboot},
		"no RDMA":       {"exclusive", System{}, "SetRDMAMode exclusive on the node cannot be: rdmaMode exclusive is asked for and the kernel has no RDMA: load module ib_core on the node, or take the node out of the pool", Refused},
	} {
		t.Run(name, func(t *testing.T) {
			ops, blocked := SystemOperations(v1.System{RdmaMode: c.want}, c.have)
			got, cost := "", Live
			for _, op := range ops {
				got, cost = op.String(), op.Cost
			}
			for _, b := range blocked {
				got, cost = b.String(), b.Operation.Cost
			}
			if got != c.op || cost != c.cost {
				t.Errorf("%q at %s", got, cost)
			}
		})
	}
}

func TestStableMAC(t *testing.T) {
	perm := net.HardwareAddr{0x3c, 0xfd, 0xfe, 1, 2, 3}
	first := StableMAC("vm1", perm, pfAddress, 0)
	if got := StableMAC("vm1", perm, pfAddress, 0); got.String() != first.String() {
		t.Errorf("%s, then %s", first, got)
	}
	// Changing the rule would change every VF's address on upgrade.
	if first.String() != "6a:e8:ce:15:16:e3" {
		t.Errorf("the rule changed: %s", first)
	}
	seen := map[string]bool{}
	for _, node := range []string{"vm1", "vm2"} {
		for _, p := range []net.HardwareAddr{nil, perm} {
			for _, pf := range []string{pfAddress, "0000:3b:00.1"} {
				for i := range 256 {
					mac := StableMAC(node, p, pf, i)
					if mac[0]&0x03 != 0x02 {
						t.Fatalf("%s is not unicast and locally administered", mac)
					}
					if seen[mac.String()] {
						t.Fatalf("%s twice", mac)
					}
					seen[mac.String()] = true
				}
			}
		}
	}
}

func TestOurs(t *testing.T) {
	foreign := with(vfAt(0), func(v *VF) { v.AdminMAC = "00:00:00:00:00:00" })
	if !Ours(with(pfWith(foreign), func(p *PF) { p.TakenOver = true })) {
		t.Error("a PF that was taken over is ours")
	}
	if Ours(pfWith()) || Ours(pfWith(foreign)) || !Ours(pfWith(foreign, vfAt(1))) {
		t.Error("a PF is ours when one of its VFs has its stable MAC")
	}
}
