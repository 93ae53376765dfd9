package node

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/holder"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/operator/plan"
)

// Reasons of the conditions of a SriovNetworkNodeState.
const (
	ReasonConfigured  = "Configured"           // everything asked for is in effect
	ReasonConfiguring = "Configuring"          // work goes on
	ReasonWaiting     = "WaitingForVFs"        // nothing to do but wait for a VF's driver, or for a pod
	ReasonInvalidSpec = "InvalidSpec"          // the spec asks for what cannot be
	ReasonInUse       = "InUse"                // a change waits for pods that hold VFs it would destroy
	ReasonReboot      = "NeedsReboot"          // a change waits for the node to be booted anew
	ReasonNoHelp      = "RebootDidNotHelp"     // a change still waits for the reboot that there was
	ReasonNotBooted   = "RebootFailed"         // the node could not be made to reboot
	ReasonNoReboot    = "NoReboot"             // nothing needs a reboot
	ReasonUnsupported = "Unsupported"          // the spec asks for what the NIC, its driver or the machine has not
	ReasonRefused     = "KernelRefused"        // the kernel or the driver said no
	ReasonNotFound    = "NICNotFound"          // the spec names a NIC that the node has not
	ReasonDrifted     = "ChangedByOthers"      // somebody else changed a VF that a pod holds
	ReasonManagement  = "ManagementNIC"        // a change would cut the node's way to the API server
	ReasonLost        = "ManagementLinkLost"   // a change cut it and was taken back
	ReasonUnverified  = "APIServerUnreachable" // whether a change cuts it could not be checked
	ReasonNoState     = "StateNotWritten"      // the agent could not write what must survive a reboot
	ReasonNoUplink    = "UplinkNotOpened"      // Open vSwitch cannot open the PF
	ReasonNoParent    = "NoParent"             // the spec names a MacVLAN parent that is not there, or cannot be one
	ReasonUnreadable  = "NICUnreadable"        // a NIC could not be read
	ReasonIdle        = "Idle"                 // no work to do
	ReasonRemoved     = "Removed"              // nothing of ours is left on the node
	ReasonLeaving     = "Leaving"              // something keeps the agent's files on the node
	ReasonNoTrouble   = "NoTrouble"            // nothing is in the way
)

// trouble is what keeps a PF or VF from being as the spec asks.
type trouble struct {
	reason  string
	message string
}

// report is one PF as it is, and what is in its way.
type report struct {
	have      host.PF
	network   string        // that it is on, as nicSelector.netFilter names it
	want      *v1.Interface // nil when the spec does not speak of the PF
	bridge    bridge
	asked     bool // want comes from the spec, not from giving the PF up
	takenOver bool // see plan.PF
	stale     bool // have is what was read last; it cannot be read now
	holders   map[string]string
	held      map[string]bool
	working   bool
	touched   map[string]bool // VFs under work, by PCI address
	blocked   []plan.Blocked  // what waits for pods or a reboot
	trouble   trouble
	vfTrouble map[int]trouble
	carries   []int           // indexes of VFs that carry the node's way to the API server
	drift     map[int]trouble // of VFs in pods, which stay on offer
}

// waits says what the PF itself, or with an index the VF, waits for.
func (r *report) waits(vf int) string {
	for _, b := range r.blocked {
		if max(b.Operation.VF, -1) == vf {
			return b.String()
		}
	}
	return ""
}

// spared tells why the VF is not given to new pods: it would keep the change
// that needs it waiting for ever.
func (r *report) spared(index int) string {
	for _, b := range r.blocked {
		if b.Operation.Cost == plan.Evict && b.Operation.TouchesVF(index) {
			return b.String()
		}
	}
	return ""
}

// pending are the changes that wait, with the pods they wait for.
func pending(reports []*report) []v1.PendingChange {
	var all []v1.PendingChange
	for _, r := range reports {
		for _, b := range r.blocked {
			change := v1.PendingChange{PciAddress: r.have.PCIAddress, Operation: b.Operation.String(), Cost: b.Operation.Cost.String(), Reason: b.Operation.Reason}
			for _, vf := range b.VFs {
				// Whose pod is not known, while the kubelet does not answer, is known soon.
				if uid, ok := holder.UID(vf.Holder); ok {
					change.Pods = append(change.Pods, v1.PodReference{UID: types.UID(uid), Device: vf.PCIAddress})
				} else if namespace, name, ok := strings.Cut(vf.Holder, "/"); ok {
					change.Pods = append(change.Pods, v1.PodReference{Namespace: namespace, Name: name, Device: vf.PCIAddress})
				}
			}
			slices.SortFunc(change.Pods, func(a, b v1.PodReference) int {
				return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID), cmp.Compare(a.Device, b.Device))
			})
			all = append(all, change)
		}
	}
	return all
}

// vfState tells whether the VF is as the spec asks, and if not, why.
func (r *report) vfState(vf host.VF, group plan.VFGroup) (ready bool, why string) {
	switch {
	case r.touched[vf.PCIAddress]:
		return false, "is being configured"
	case r.vfTrouble[vf.Index].message != "":
		return false, r.vfTrouble[vf.Index].message
	case r.waits(vf.Index) != "":
		return false, r.waits(vf.Index)
	case r.held[vf.PCIAddress]:
		return vf.Driver != "", "has no driver"
	case vf.Driver == "":
		return false, "has no driver"
	case r.otherMode() != "":
		// It would get a pod, which would have to go before the mode can change.
		return false, fmt.Sprintf("the PF's eswitch is in mode %s and shall be in %s", r.have.Eswitch, r.otherMode())
	case !r.bridge.ready():
		return false, r.bridge.why(r.have.Name)
	case group.DeviceType != v1.DeviceTypeVfioPci && vf.Name == "":
		return false, "waits: its driver has made no network device in the node's namespace, and no pod known here holds it"
	}
	return true, ""
}

// ready counts the VFs that are as the spec asks, of those it asks for.
func (r *report) ready() (ready, asked int) {
	if r.want == nil {
		return 0, 0
	}
	groups, err := plan.Groups(*r.want)
	if err != nil {
		return 0, r.want.NumVfs
	}
	for _, vf := range r.have.VFs {
		group, _ := groups.Of(vf.Index)
		if ok, _ := r.vfState(vf, group); ok && vf.Index < r.want.NumVfs {
			ready++
		}
	}
	return ready, r.want.NumVfs
}

// status says what the reports say. The conditions of before, which are the
// agent's own, keep their time of transition where they did not change.
func status(reports []*report, slots *parents, unreadable error, generation int64, before []metav1.Condition, now metav1.Time) v1.SriovNetworkNodeStateStatus {
	s := v1.SriovNetworkNodeStateStatus{ObservedGeneration: generation, Pending: pending(reports), Macvlans: slots.status(), Links: statusLinks(slots.links, pooled(reports))}
	var troubles []trouble
	var waiting, blocked, reboot []string
	ready, asked, nics, working := 0, 0, 0, false
	for _, r := range reports {
		if r.have.PCIAddress != "" {
			s.Interfaces = append(s.Interfaces, r.interfaceStatus())
		}
		s.Bridges.OVS = append(s.Bridges.OVS, r.bridges()...)
		troubles = append(troubles, r.troubles()...)
		for _, b := range r.blocked {
			blocked = append(blocked, b.String())
			if b.Operation.Cost == plan.Reboot {
				reboot = append(reboot, b.String())
			}
		}
		working = working || r.working
		vfs, of := r.ready()
		ready, asked = ready+vfs, asked+of
		if r.asked {
			nics++
		}
		if vfs < of && !r.working && len(r.troubles()) == 0 && len(r.blocked) == 0 {
			waiting = append(waiting, fmt.Sprintf("%d of %d VFs of %s are ready", vfs, of, cmp.Or(r.have.Name, r.have.PCIAddress)))
		}
	}
	if unreadable != nil {
		troubles = append(troubles, trouble{ReasonUnreadable, unreadable.Error()})
	}
	troubles = append(troubles, slots.troubles()...)
	s.VFs = fmt.Sprintf("%d/%d", ready, asked)

	set := func(kind string, on bool, reason, message string) {
		c := metav1.Condition{Type: kind, Status: metav1.ConditionFalse, Reason: reason, Message: message, ObservedGeneration: generation, LastTransitionTime: now}
		if on {
			c.Status = metav1.ConditionTrue
		}
		meta.SetStatusCondition(&s.Conditions, c)
	}
	s.Conditions = slices.Clone(before)
	var all trouble
	if len(troubles) > 0 {
		messages := make([]string, len(troubles))
		for i, t := range troubles {
			messages[i] = t.message
		}
		all = trouble{troubles[0].reason, shorten(strings.Join(messages, "; "))}
	}
	progress := fmt.Sprintf("%d of %d VFs are ready", ready, asked)
	switch {
	case working:
		s.SyncStatus = v1.SyncStatusInProgress
		set(v1.ConditionReady, false, ReasonConfiguring, progress)
		set(v1.ConditionProgressing, true, ReasonConfiguring, progress)
	case len(troubles) > 0:
		s.SyncStatus = v1.SyncStatusFailed
		set(v1.ConditionReady, false, all.reason, all.message)
		set(v1.ConditionProgressing, false, ReasonIdle, progress)
	case len(blocked) > 0:
		s.SyncStatus = v1.SyncStatusInProgress
		reason, message := ReasonInUse, shorten(strings.Join(blocked, "; "))
		if len(reboot) == len(blocked) {
			reason = ReasonReboot
		}
		set(v1.ConditionReady, false, reason, message)
		set(v1.ConditionProgressing, true, reason, message)
	case len(waiting) > 0:
		s.SyncStatus = v1.SyncStatusInProgress
		set(v1.ConditionReady, false, ReasonWaiting, strings.Join(waiting, "; "))
		set(v1.ConditionProgressing, true, ReasonWaiting, strings.Join(waiting, "; "))
	default:
		s.SyncStatus = v1.SyncStatusSucceeded
		message := fmt.Sprintf("%d NICs are configured, all %d VFs are ready", nics, asked)
		switch parents := len(s.Macvlans); {
		case parents > 0:
			message += fmt.Sprintf(", the slots of %d MacVLAN parents are offered", parents)
		case nics == 0:
			message = "no policy asks anything of this node"
		}
		set(v1.ConditionReady, true, ReasonConfigured, message)
		set(v1.ConditionProgressing, false, ReasonIdle, "nothing to do")
	}
	if len(troubles) > 0 {
		s.LastSyncError = all.message
		set(v1.ConditionDegraded, true, all.reason, all.message)
	} else {
		set(v1.ConditionDegraded, false, ReasonNoTrouble, "nothing is in the way")
	}
	if len(reboot) > 0 {
		set(v1.ConditionRebootRequired, true, ReasonReboot, shorten(strings.Join(reboot, "; ")))
	} else {
		set(v1.ConditionRebootRequired, false, ReasonNoReboot, "nothing waits for a reboot")
	}
	return s
}

// failed tells whether something that was to be done could not be.
func (r *report) failed() bool {
	return r.trouble.message != "" || len(r.vfTrouble) > 0
}

// shorten keeps a message within the 1024 bytes that events may have,
// and readable.
func shorten(s string) string {
	const limit = 1000
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "... (more in the status of the interfaces)"
}

// troubles of the PF and its VFs, each naming its object.
func (r *report) troubles() []trouble {
	var all []trouble
	if r.trouble.message != "" {
		all = append(all, r.trouble)
	}
	if t := r.bridge.trouble(r.have.Name); t.message != "" {
		all = append(all, t)
	}
	for _, vf := range r.have.VFs {
		for _, t := range []trouble{r.vfTrouble[vf.Index], r.drift[vf.Index]} {
			if t.message != "" {
				all = append(all, trouble{t.reason, fmt.Sprintf("VF %d of %s: %s", vf.Index, cmp.Or(r.have.Name, r.have.PCIAddress), t.message)})
			}
		}
	}
	return all
}

func (r *report) interfaceStatus() v1.InterfaceExt {
	pf := r.have
	s := v1.InterfaceExt{
		Name: pf.Name, AltNames: pf.AltNames, Mac: macText(pf.MAC), Driver: pf.Driver, PciAddress: pf.PCIAddress,
		Vendor: pf.Vendor, DeviceID: pf.DeviceID, Mtu: pf.MTU, NumVfs: pf.NumVFs, TotalVfs: pf.TotalVFs,
		LinkType: string(pf.LinkType), EswitchMode: string(pf.Eswitch), Message: cmp.Or(r.trouble.message, r.waits(-1), r.bridge.trouble(pf.Name).message),
		ExternallyManaged: r.want != nil && r.want.ExternallyManaged, NetFilter: r.network,
	}
	if pf.LinkSpeed > 0 {
		s.LinkSpeed = fmt.Sprintf("%d Mb/s", pf.LinkSpeed)
	}
	if pf.Name != "" {
		s.LinkAdminState = "down"
		if pf.AdminUp {
			s.LinkAdminState = "up"
		}
	}
	var groups plan.VFGroups
	if r.want != nil {
		groups, _ = plan.Groups(*r.want) // its error is the PF's trouble
	}
	for _, vf := range pf.VFs {
		v := v1.VirtualFunction{
			Name: vf.Name, Mac: macText(vf.MAC), Assigned: r.holders[vf.PCIAddress], Driver: vf.Driver, PciAddress: vf.PCIAddress,
			Vendor: vf.Vendor, DeviceID: vf.DeviceID, Vlan: vf.Admin.VLAN, Mtu: vf.MTU, VfID: vf.Index,
			VdpaType: vf.VDPA, RepresentorName: vf.Representor, GUID: guidOf(vf),
		}
		if v.Mac == "" {
			v.Mac = macText(vf.Admin.MAC) // in a pod, or bound to user space
		}
		if group, ok := groups.Of(vf.Index); ok {
			if ready, why := r.vfState(vf, group); !ready {
				v.Message = why
			}
		}
		v.Message = cmp.Or(v.Message, r.drift[vf.Index].message)
		s.VFs = append(s.VFs, v)
	}
	return s
}

// macText is empty for no address and for the all-zero one of a VF that has
// been given none.
func macText(mac []byte) string {
	if len(mac) == 0 || !slices.ContainsFunc(mac, func(b byte) bool { return b != 0 }) {
		return ""
	}
	parts := make([]string, len(mac))
	for i, b := range mac {
		parts[i] = fmt.Sprintf("%02x", b)
	}
	return strings.Join(parts, ":")
}

// pools are the VFs that exist and that a policy wants, one pool for each
// resource name, in the order of PF and VF.
func pools(reports []*report) []Pool {
	var all []Pool
	for _, r := range reports {
		if r.want == nil {
			continue
		}
		groups, err := plan.Groups(*r.want)
		if err != nil {
			continue
		}
		for _, vf := range r.have.VFs {
			group, ok := groups.Of(vf.Index)
			if !ok || group.ResourceName == "" {
				continue
			}
			kind := cmp.Or(group.DeviceType, v1.DeviceTypeNetDevice)
			at := slices.IndexFunc(all, func(p Pool) bool { return p.Resource == group.ResourceName })
			if at < 0 {
				all = append(all, Pool{Resource: group.ResourceName, DeviceType: kind})
				at = len(all) - 1
			}
			p := &all[at]
			p.ExcludeTopology = p.ExcludeTopology || group.ExcludeTopology
			p.RDMA = p.RDMA || group.IsRdma
			p.VhostNet = p.VhostNet || group.NeedVhostNet
			p.Spread = p.Spread || group.Allocation == v1.AllocationSpread
			d := r.device(vf, group)
			if d.Healthy && kind != p.DeviceType {
				d.Healthy, d.Reason = false, fmt.Sprintf("resource %s has VFs of deviceType %s already: give this one's policy another resourceName", p.Resource, p.DeviceType)
			}
			p.Devices = append(p.Devices, d)
		}
	}
	return all
}

// device is the VF as it is offered, of which the group is asked.
func (r *report) device(vf host.VF, group plan.VFGroup) Device {
	d := Device{
		PCIAddress: vf.PCIAddress, PFAddress: r.have.PCIAddress, PFName: r.have.Name, VFIndex: vf.Index, Driver: vf.Driver,
		NUMANode: vf.NUMANode, IOMMUGroup: vf.IOMMUGroup, LinkType: r.have.LinkType, Representor: vf.Representor,
	}
	if vf.VDPA == host.VDPAVirtio || vf.VDPA == host.VDPAVhost {
		d.VDPA = vf.VDPA
	}
	if d.NUMANode < 0 {
		d.NUMANode = r.have.NUMANode
	}
	d.Healthy, d.Reason = r.vfState(vf, group)
	switch {
	case slices.Contains(r.carries, vf.Index):
		d.Healthy, d.Reason = false, "it carries the node's way to the API server: a pod would take it away"
	case r.spared(vf.Index) != "":
		d.Healthy, d.Reason = false, r.spared(vf.Index)
	case group.RequireCarrier && !r.have.Carrier:
		d.Healthy, d.Reason = false, fmt.Sprintf("its PF %s has no carrier: check cable and switch", r.have.Name)
	}
	if d.Healthy {
		d.Reason = ""
	}
	return d
}

// candidates are all VFs, as they would be offered by who asks for nothing of them, with
// the resources of the policies' pools that they are in.
func candidates(reports []*report, pools []Pool) []Candidate {
	taken := map[string]string{}
	for _, p := range pools {
		for _, d := range p.Devices {
			taken[d.PCIAddress] = p.Resource
		}
	}
	var all []Candidate
	for _, r := range reports {
		for _, vf := range r.have.VFs {
			var group plan.VFGroup
			if vf.Driver == v1.DeviceTypeVfioPci || vf.VDPA == host.VDPAVhost {
				group.DeviceType = v1.DeviceTypeVfioPci // user space has it, not a netdev
			}
			all = append(all, Candidate{
				Device: r.device(vf, group), Vendor: vf.Vendor, DeviceID: vf.DeviceID, RDMA: vf.RDMADevice != "", Carrier: r.have.Carrier, Resource: taken[vf.PCIAddress],
			})
		}
	}
	return all
}
