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

// NetnsMode is the value of ib_core's parameter netns_mode with which the kernel boots
// into an RDMA mode (ib_devices_shared_netns in drivers/infiniband/core/device.c).
func NetnsMode(rdmaMode string) int {
	if rdmaMode == v1.RdmaModeExclusive {
		return 0
	}
	return 1
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
		op.Cost, op.Reason = Reboot, fmt.Sprintf("the kernel changes rdmaMode only while no pod has a network namespace: boot with ib_core.netns_mode=%d", NetnsMode(want.RdmaMode))
	default:
		return []Operation{op}, nil
	}
	return nil, []Blocked{{Operation: op}}
}
