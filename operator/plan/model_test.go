package plan

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// do is what an obedient kernel makes of one operation; it fails where kernels do.
func do(op Operation, pf *PF) error {
	if op.VF < 0 {
		switch op.Kind {
		case SetPFMTU:
			pf.MTU = op.Number
			if pf.Original != nil && op.Number > pf.Original.MTU {
				pf.Original.RaisedMTU = op.Number // as the caller records
			}
		case SetPFUp:
			pf.Up = true
		case SetEswitchMode:
			if pf.Driver == "ice" && pf.NumVFs > 0 {
				return fmt.Errorf("%s with %d VFs", op, pf.NumVFs)
			}
			for _, vf := range pf.VFs {
				if vf.Driver != "" {
					return fmt.Errorf("%s while VF %d has driver %s", op, vf.Index, vf.Driver)
				}
			}
			pf.Eswitch = op.Value
		case SetNumVFs:
			pf.NumVFs, pf.VFs, pf.TakenOver = op.Number, nil, false
			for i := range op.Number {
				pf.VFs = append(pf.VFs, with(bornVF(i, pf.Ethernet), func(v *VF) { v.IOMMU = true }))
			}
		default:
			return fmt.Errorf("%s is not known", op)
		}
		return nil
	}
	vf := &pf.VFs[op.VF]
	if vf.Held {
		return fmt.Errorf("%s while a pod holds it", op)
	}
	switch op.Kind {
	case SetVFAdminMAC:
		vf.AdminMAC = op.Value
	case SetVFGUID:
		vf.GUID = op.Value
	case ResetVFSettings:
		vf.Drift = ""
	case UnbindVFDriver:
		vf.Driver, vf.Name, vf.MAC, vf.MTU, vf.RDMA = "", "", "", 0, false
	case BindVFDriver:
		switch {
		case op.Value == "vfio-pci" && !vf.IOMMU:
			return fmt.Errorf("%s without IOMMU", op)
		case op.Value != "":
			vf.Driver, vf.Name, vf.MAC, vf.MTU, vf.RDMA = op.Value, "", "", 0, false
		default:
			vf.Driver, vf.Name, vf.MAC, vf.MTU, vf.RDMA = "iavf", vf.HostName, vf.AdminMAC, 1500, vf.Index%2 == 0
		}
	case SetVFVDPA:
		if op.Value != "" && vf.VDPA != "" || pf.Eswitch != v1.EswitchModeSwitchdev && op.Value != "" {
			return fmt.Errorf("%s: it is %q in %s", op, vf.VDPA, pf.Eswitch)
		}
		vf.VDPA = op.Value
	case RenameVF:
		vf.Name = op.Value
	case SetVFMAC:
		vf.MAC = op.Value
	case SetVFMTU:
		if op.Number > pf.MTU {
			return fmt.Errorf("%s above the PF's %d", op, pf.MTU)
		}
		vf.MTU = op.Number
	default:
		return fmt.Errorf("%s is not known", op)
	}
	return nil
}

// bornVF is a VF as the kernel makes it.
func bornVF(i int, ethernet bool) VF {
	return with(vfAt(i), func(v *VF) {
		v.Driver, v.Name, v.MAC, v.AdminMAC, v.MTU = "", "", "", "00:00:00:00:00:00", 0
		if !ethernet {
			v.AdminMAC, v.StableGUID, v.GUID = "", fmt.Sprintf("02:00:00:00:00:00:00:%02x", i+1), "00:00:00:00:00:00:00:00"
		}
	})
}

func drawPF(t *rapid.T) PF {
	pf := pfWith()
	pf.Ethernet = rapid.IntRange(0, 3).Draw(t, "InfiniBand") > 0
	pf.Driver = rapid.SampledFrom([]string{"ice", "mlx5_core"}).Draw(t, "PF driver")
	pf.MTU, pf.Up = rapid.SampledFrom([]int{1500, 4000, 9000}).Draw(t, "mtu"), rapid.Bool().Draw(t, "up")
	pf.Eswitch = rapid.SampledFrom([]string{"", "legacy", "switchdev"}).Draw(t, "eswitch")
	pf.TakenOver = rapid.IntRange(0, 3).Draw(t, "taken over") == 0
	if rapid.Bool().Draw(t, "recorded") {
		pf.Original = &Original{MTU: 1500, RaisedMTU: rapid.SampledFrom([]int{0, 4000, 9000}).Draw(t, "raised"), Eswitch: pf.Eswitch}
	}
	for i := range rapid.IntRange(0, 6).Draw(t, "vfs") {
		vf := bornVF(i, pf.Ethernet)
		vf.Driver = rapid.SampledFrom([]string{"", "iavf", "vfio-pci"}).Draw(t, "driver")
		vf.Held = rapid.IntRange(0, 9).Draw(t, "held") == 0
		vf.IOMMU = rapid.IntRange(0, 9).Draw(t, "IOMMU") > 0
		vf.RDMA = vf.Driver == "iavf" && i%2 == 0
		vf.Drift = rapid.SampledFrom([]string{"", "", "vlan 100"}).Draw(t, "drift")
		if pf.Eswitch == v1.EswitchModeSwitchdev {
			vf.VDPA = rapid.SampledFrom([]string{"", "", "vhost", "virtio", "none"}).Draw(t, "vdpa")
		}
		if pf.Ethernet {
			vf.AdminMAC = rapid.SampledFrom([]string{vf.StableMAC, "", "02:00:00:00:aa:01"}).Draw(t, "admin")
		} else {
			vf.GUID = rapid.SampledFrom([]string{vf.StableGUID, "", "02:00:00:00:00:00:aa:01"}).Draw(t, "guid")
		}
		if vf.Driver == "iavf" && !vf.Held {
			vf.Name, vf.MTU = rapid.SampledFrom([]string{vf.HostName, "net1"}).Draw(t, "name"), 1500
		}
		pf.VFs = append(pf.VFs, vf)
	}
	pf.NumVFs = len(pf.VFs)
	return pf
}

func drawWant(t *rapid.T) v1.Interface {
	want := asked(rapid.IntRange(0, 6).Draw(t, "numVfs"))
	want.EswitchMode = rapid.SampledFrom([]string{"", "legacy", "switchdev"}).Draw(t, "mode")
	want.ExternallyManaged = rapid.IntRange(0, 5).Draw(t, "externally managed") == 0
	for first := 0; first < want.NumVfs; {
		last := rapid.IntRange(first, want.NumVfs-1).Draw(t, "last")
		g := group(FormatVfRange(first, last))
		g.DeviceType = rapid.SampledFrom([]string{v1.DeviceTypeNetDevice, v1.DeviceTypeVfioPci}).Draw(t, "type")
		g.Mtu = rapid.SampledFrom([]int{0, 1500, 9000}).Draw(t, "group mtu")
		if g.DeviceType == v1.DeviceTypeNetDevice {
			g.IsRdma = rapid.Bool().Draw(t, "rdma")
			if want.EswitchMode == v1.EswitchModeSwitchdev {
				g.VdpaType = rapid.SampledFrom([]string{"", "vhost", "virtio"}).Draw(t, "group vdpa")
			}
		}
		want.Mtu = max(want.Mtu, g.Mtu)
		want.VfGroups = append(want.VfGroups, g)
		first = last + 1 + rapid.IntRange(0, 1).Draw(t, "gap")
	}
	return want
}

// reached says what of want the PF lacks, leaving out what a pod holds up and what
// cannot be.
func reached(want v1.Interface, pf PF) string {
	if slices.ContainsFunc(pf.VFs, func(vf VF) bool { return vf.Held }) {
		return "" // what is held up is checked by what is Blocked
	}
	if want.ExternallyManaged {
		pf.NumVFs, pf.VFs, pf.Up, pf.Eswitch = want.NumVfs, pf.VFs[:want.NumVfs], true, want.EswitchMode
		for i := range pf.VFs {
			pf.VFs[i].AdminMAC, pf.VFs[i].Drift = pf.VFs[i].StableMAC, ""
		}
	}
	if pf.NumVFs != want.NumVfs || want.NumVfs > 0 && (!pf.Up || pf.MTU < want.Mtu) {
		return fmt.Sprintf("%d VFs, up %t, MTU %d", pf.NumVFs, pf.Up, pf.MTU)
	}
	if o := pf.Original; o != nil && !want.ExternallyManaged && o.RaisedMTU == pf.MTU && pf.MTU > max(o.MTU, want.Mtu) {
		return fmt.Sprintf("MTU %d was raised here and is not needed", pf.MTU)
	}
	if want.EswitchMode != "" && pf.Eswitch != "" && pf.Eswitch != want.EswitchMode {
		return "mode " + pf.Eswitch
	}
	groups, _ := Groups(want)
	for _, vf := range pf.VFs {
		g, _ := groups.Of(vf.Index)
		userspace := g.DeviceType == v1.DeviceTypeVfioPci
		switch {
		case pf.Ethernet && vf.AdminMAC != vf.StableMAC && (!pf.TakenOver || !isSet(vf.AdminMAC)):
			return fmt.Sprintf("admin MAC of %+v", vf)
		case pf.Ethernet && vf.Drift != "" && pf.Eswitch != v1.EswitchModeSwitchdev:
			return fmt.Sprintf("drift of %+v", vf)
		case userspace && vf.IOMMU && vf.Driver != "vfio-pci", !userspace && vf.Driver != "iavf":
			return fmt.Sprintf("driver of %+v", vf)
		case !userspace && (vf.Name != vf.HostName || g.Mtu > 0 && vf.MTU != g.Mtu):
			return fmt.Sprintf("netdev of %+v", vf)
		case vf.VDPA != g.VdpaType:
			return fmt.Sprintf("vDPA of %+v", vf)
		}
	}
	return ""
}

// From any state the plans lead, in few rounds, to what is asked, wherever the agent is
// stopped in between; then nothing is left to do. No step touches a VF that a pod holds,
// and a step that is done alone, without those after it, does no harm.
func TestOperationsLeadThere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pf, want := drawPF(t), drawWant(t)
		before := slices.Clone(pf.VFs)
		stops := rapid.IntRange(0, 4).Draw(t, "stops")
		for round := 0; ; round++ {
			ops, blocked, err := Operations(want, pf)
			if err != nil {
				if want.EswitchMode == v1.EswitchModeSwitchdev && pf.Eswitch == "" || want.ExternallyManaged {
					return // refused as a whole, as the tables show
				}
				t.Fatal(err)
			}
			for _, b := range blocked {
				if b.Operation.Cost < Evict || b.Operation.Reason == "" || (b.Operation.Cost == Evict) != (len(b.VFs) > 0) {
					t.Fatalf("%+v blocks nothing", b)
				}
			}
			if len(ops) == 0 {
				if lacks := reached(want, pf); lacks != "" {
					t.Fatalf("nothing left to do, but %s; blocked %v", lacks, blocked)
				}
				for i, vf := range before {
					if vf.Held && pf.VFs[i] != vf {
						t.Fatalf("a held VF was %+v and is %+v", vf, pf.VFs[i])
					}
				}
				return
			}
			if round == 8 {
				t.Fatalf("still to do after %d rounds: %v", round, ops)
			}
			if stops > 0 {
				stops--
				round--
				ops = ops[:rapid.IntRange(0, len(ops)).Draw(t, "stopped after")]
			}
			for _, op := range ops {
				if want.ExternallyManaged && (op.VF < 0 || op.Kind == SetVFAdminMAC || op.Kind == SetVFMAC || op.Kind == SetVFGUID || op.Kind == ResetVFSettings) {
					t.Fatalf("%s on an externally managed PF", op)
				}
				if op.Cost > VFReset || (op.Cost == Live) != (op.Reason == "") {
					t.Fatalf("%+v is not to be done", op)
				}
				for _, vf := range pf.VFs {
					if vf.Held && op.TouchesVF(vf.Index) {
						t.Fatalf("%s while %+v is held", op, vf)
					}
				}
				if err := do(op, &pf); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}
