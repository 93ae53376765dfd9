package plan

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

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

// do is what an obedient kernel makes of one operation.
func do(op Operation, pf *PF) {
	if op.VF < 0 {
		switch op.Kind {
		case SetPFMTU:
			pf.MTU = op.Number
		case SetPFUp:
			pf.Up = true
		case SetNumVFs:
			pf.NumVFs, pf.VFs = op.Number, nil
			for i := range op.Number {
				vf := vfAt(i)
				vf.Driver, vf.Name, vf.MAC, vf.AdminMAC, vf.MTU = "", "", "", "00:00:00:00:00:00", 0
				pf.VFs = append(pf.VFs, vf)
			}
		}
		return
	}
	vf := &pf.VFs[op.VF]
	switch op.Kind {
	case SetVFAdminMAC:
		vf.AdminMAC = op.Value
	case BindVFDriver:
		if vf.Driver = op.Value; op.Value == "" {
			vf.Driver, vf.Name, vf.MAC, vf.MTU = "iavf", vf.HostName, vf.AdminMAC, 1500
		} else {
			vf.Name, vf.MAC, vf.MTU = "", "", 0
		}
	case RenameVF:
		vf.Name = op.Value
	case SetVFMAC:
		vf.MAC = op.Value
	case SetVFMTU:
		vf.MTU = op.Number
	}
}

// From any state the plans lead, in few rounds, to one that needs nothing, and
// no step touches a VF that a pod holds or destroys one.
func TestOperationsConvergeAndSpareHeldVFs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pf := pfWith()
		pf.MTU, pf.Up = rapid.SampledFrom([]int{1500, 9000}).Draw(t, "mtu"), rapid.Bool().Draw(t, "up")
		for i := range rapid.IntRange(0, 8).Draw(t, "vfs") {
			vf := vfAt(i)
			vf.Driver = rapid.SampledFrom([]string{"", "iavf", "vfio-pci"}).Draw(t, "driver")
			vf.Held = rapid.IntRange(0, 9).Draw(t, "held") == 0
			vf.AdminMAC = rapid.SampledFrom([]string{vf.StableMAC, "", "02:00:00:00:aa:01"}).Draw(t, "admin")
			if vf.Driver != "iavf" || vf.Held {
				vf.Name, vf.MAC, vf.MTU = "", "", 0
			} else {
				vf.Name = rapid.SampledFrom([]string{vf.Name, "net1"}).Draw(t, "name")
			}
			pf.VFs = append(pf.VFs, vf)
		}
		pf.NumVFs = len(pf.VFs)
		want := asked(rapid.IntRange(0, 8).Draw(t, "numVfs"))
		if want.NumVfs > 0 {
			g := group(fmt.Sprintf("0-%d", rapid.IntRange(0, want.NumVfs-1).Draw(t, "last")))
			g.DeviceType = rapid.SampledFrom([]string{v1.DeviceTypeNetDevice, v1.DeviceTypeVfioPci}).Draw(t, "type")
			g.Mtu = rapid.SampledFrom([]int{0, 1500, 9000}).Draw(t, "group mtu")
			want.Mtu, want.VfGroups = g.Mtu, []v1.VfGroup{g}
		}
		for round := 0; ; round++ {
			ops, blocked, err := Operations(want, pf)
			if err != nil {
				t.Fatal(err)
			}
			if len(ops) == 0 {
				if len(blocked) == 0 && pf.NumVFs != want.NumVfs {
					t.Fatalf("done with %d VFs, want %d", pf.NumVFs, want.NumVfs)
				}
				return
			}
			if round == 4 {
				t.Fatalf("still to do after %d rounds: %v", round, ops)
			}
			for _, op := range ops {
				for _, vf := range pf.VFs {
					if vf.Held && (op.Kind == SetNumVFs || op.VF == vf.Index) {
						t.Fatalf("%s while %v is held", op, vf)
					}
				}
				do(op, &pf)
			}
		}
	})
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
	if Ours(pfWith()) || Ours(pfWith(foreign)) || !Ours(pfWith(foreign, vfAt(1))) {
		t.Error("a PF is ours when one of its VFs has its stable MAC")
	}
}

func FuzzParseVfRange(f *testing.F) {
	for _, s := range []string{"0-3", "5-2", "-2", "2-", "a-b", "0-0", "+1-2", "0-99999", "1-2-3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if first, last, err := ParseVfRange(s); err == nil && (first < 0 || last < first || last >= maxVF) {
			t.Errorf("%q gives %d to %d", s, first, last)
		}
	})
}
