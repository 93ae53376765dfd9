package plan

import (
	"fmt"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// System is the node as a whole, as far as planning goes.
type System struct {
	RDMAMode string // shared or exclusive; empty when the kernel has no RDMA
	RDMABusy bool   // the kernel would not change it a moment ago: there are other network namespaces
}

// SystemOperations plans what turns the node's own settings into those of want.
func SystemOperations(want v1.System, have System) ([]Operation, []Blocked) {
	if want.RdmaMode == "" || want.RdmaMode == have.RDMAMode {
		return nil, nil
	}
	op := Operation{Kind: SetRDMAMode, VF: -1, Value: want.RdmaMode}
	switch {
	case have.RDMAMode == "":
		op.Cost, op.Reason = Refused, fmt.Sprintf("rdmaMode %s is asked for and the kernel has no RDMA: load module ib_core on the node, or take the node out of the pool", want.RdmaMode)
	case have.RDMABusy:
		mode := map[string]int{v1.RdmaModeExclusive: 0, v1.RdmaModeShared: 1}[want.RdmaMode]
		op.Cost, op.Reason = Reboot, fmt.Sprintf("the kernel changes rdmaMode only while no pod has a network namespace: boot with ib_core.netns_mode=%d", mode)
	default:
		return []Operation{op}, nil
	}
	return nil, []Blocked{{Operation: op}}
}
