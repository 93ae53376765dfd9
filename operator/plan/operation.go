package plan

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// Cost is who is disturbed by a change, the cheapest first.
type Cost int

// The costs. A planned Operation is Live or VFReset and may be done at once; the
// others belong to changes that are Blocked.
const (
	Live    Cost = iota // nobody
	VFReset             // VFs that no pod holds leave their driver, or are made anew
	Evict               // the pods that hold the VFs must go first
	Reboot              // the node must be booted anew
	Refused             // no consent helps: the reason says what must change
)

// String is the word for it; that of Evict and Reboot is PendingChange's.
func (c Cost) String() string {
	return [...]string{"Live", "VFReset", v1.CostEvict, v1.CostReboot, "Refused"}[c]
}

// Kind is what an Operation does.
type Kind string

// The operations, in the order they are done. New VFs have no driver until
// BindVFDriver: they get their address first and are probed once.
const (
	SetRDMAMode     Kind = "SetRDMAMode"     // Value: shared or exclusive; of the node
	RemoveBridge    Kind = "RemoveBridge"    // Value: the name, as below
	DetachUplink    Kind = "DetachUplink"    // takes the PF out of its bridge, before SetEswitchMode
	SetPFMTU        Kind = "SetPFMTU"        // Number: bytes
	SetPFUp         Kind = "SetPFUp"         //
	UnbindVFDriver  Kind = "UnbindVFDriver"  // before SetEswitchMode
	SetNumVFs       Kind = "SetNumVFs"       // Number: how many; destroys those there are
	SetEswitchMode  Kind = "SetEswitchMode"  // Value: legacy or switchdev
	SetVFAdminMAC   Kind = "SetVFAdminMAC"   // Value: the MAC the PF assigns
	SetVFGUID       Kind = "SetVFGUID"       // Value: the node and port GUID the PF assigns
	ResetVFSettings Kind = "ResetVFSettings" // Value: what differs from the baseline
	BindVFDriver    Kind = "BindVFDriver"    // Value: driver, empty for the kernel's choice
	SetVFVDPA       Kind = "SetVFVDPA"       // Value: virtio or vhost, empty for no vDPA device
	RequireRDMA     Kind = "RequireRDMA"     // only ever refused: nothing can make a VF's RDMA device
	RenameVF        Kind = "RenameVF"        // Value: the name
	SetVFMAC        Kind = "SetVFMAC"        // Value: the MAC of the netdev itself
	SetVFMTU        Kind = "SetVFMTU"        // Number: bytes
	SetBridge       Kind = "SetBridge"       // makes the bridge of the PF, or makes it right
)

// Operation is one change of one function, or with SetRDMAMode of the node.
type Operation struct {
	Kind       Kind
	PCIAddress string // the function: the PF's or the VF's
	VF         int    // index below the PF; -1 for the PF and the node
	Value      string
	Number     int
	Cost       Cost
	Reason     string // why it costs that; empty when it is Live
}

// String reads "SetVFMTU 9000 on VF 3 (0000:3b:02.3)".
func (o Operation) String() string {
	s := string(o.Kind)
	switch o.Kind {
	case SetPFMTU, SetNumVFs, SetVFMTU:
		s += " " + strconv.Itoa(o.Number)
	case BindVFDriver:
		s += " " + cmp.Or(o.Value, "default")
	case SetVFVDPA:
		s += " " + cmp.Or(o.Value, "none")
	case ResetVFSettings:
		s += " (" + o.Value + ")"
	default:
		s = strings.TrimSpace(s + " " + o.Value)
	}
	switch {
	case o.PCIAddress == "":
		return s + " on the node"
	case o.VF < 0:
		return s + " on " + o.PCIAddress
	}
	return fmt.Sprintf("%s on VF %d (%s)", s, o.VF, o.PCIAddress)
}

// TouchesVF tells whether the operation changes the VF, itself or with its PF.
func (o Operation) TouchesVF(index int) bool {
	switch o.Kind {
	case SetNumVFs, SetEswitchMode, RemoveBridge, DetachUplink:
		return true
	}
	return o.VF == index
}

// Blocked is a change that must wait. Operation.Cost says for what: Evict for
// the pods that hold the VFs, Reboot for the node, Refused for people.
type Blocked struct {
	Operation Operation
	VFs       []VF // with Evict: those in use
}

// String names what waits, for whom, and the mend.
func (b Blocked) String() string {
	switch b.Operation.Cost {
	case Reboot:
		return fmt.Sprintf("%s waits for a reboot: %s", b.Operation, b.Operation.Reason)
	case Refused:
		return fmt.Sprintf("%s cannot be: %s", b.Operation, b.Operation.Reason)
	}
	pods := make([]string, len(b.VFs))
	for i, vf := range b.VFs {
		pods[i] = fmt.Sprintf("%s (VF %d)", cmp.Or(vf.Holder, "an unknown pod"), vf.Index)
	}
	return fmt.Sprintf("%s waits for the pods that hold its VFs: %s; delete them or take the change back", b.Operation, strings.Join(pods, ", "))
}
