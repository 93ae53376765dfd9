package plan

import (
	"fmt"
	"testing"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// BenchmarkSpec2000Nodes plans 2,000 nodes with 4 PFs of 16 VFs against 200 policies.
func BenchmarkSpec2000Nodes(b *testing.B) {
	var policies []sriovv1.SriovNetworkNodePolicy
	for i := range 200 {
		pf := i % 4
		p := policy(fmt.Sprintf("p%d", i), numVfs(16), pfNames(sriovv1.PfName(fmt.Sprintf("ens%df0#%d-%d", pf, i/4%4*4, i/4%4*4+3))))
		if i >= 16 { // for one rack each
			p.Spec.NodeSelector = map[string]string{"rack": fmt.Sprint(i % 50)}
		}
		policies = append(policies, p)
	}
	var inventory []sriovv1.InterfaceExt
	for pf := range 4 {
		nic := sriovv1.InterfaceExt{Name: fmt.Sprintf("ens%df0", pf), PciAddress: fmt.Sprintf("0000:%02x:00.0", pf), Vendor: "8086", DeviceID: "158b", TotalVfs: 64, NumVfs: 16, Mtu: 1500, LinkType: "ETH", EswitchMode: "legacy"}
		for vf := range 16 {
			nic.VFs = append(nic.VFs, sriovv1.VirtualFunction{VfID: vf, PciAddress: fmt.Sprintf("0000:%02x:10.%d", pf, vf)})
		}
		inventory = append(inventory, nic)
	}
	for b.Loop() {
		compiled := Compile(policies, true)
		for node := range 2000 {
			labels := map[string]string{"rack": fmt.Sprint(node % 50)}
			spec := compiled.Spec(labels, inventory, sriovv1.SriovNetworkNodeStateSpec{})
			if len(spec.Interfaces) != 4 {
				b.Fatalf("%d interfaces", len(spec.Interfaces))
			}
		}
	}
}
