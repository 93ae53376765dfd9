package plan

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// GateBridges is the feature gate without which no software bridge is made.
const GateBridges = "manageSoftwareBridges"

// reserved begins the keys by which an agent knows what it made.
const reserved = "sluice.dev/"

// maxLinkName is how long the name of a link can be: IFNAMSIZ without the zero.
const maxLinkName = 15

// BridgeName is the name of the bridge that a PF is the uplink of.
func BridgeName(pciAddress string) string {
	return "br-" + strings.ReplaceAll(pciAddress, ":", "_")
}

// refuseBridge says which fields of a policy's bridge cannot be.
func refuseBridge(spec *v1.SriovNetworkNodePolicySpec) string {
	ovs := spec.Bridge.OVS
	switch {
	case ovs == nil:
		return ""
	case spec.EswitchMode != v1.EswitchModeSwitchdev:
		return "bridge.ovs needs the NIC in switchdev mode: set eSwitchMode to switchdev or remove bridge"
	case spec.ExternallyManaged:
		return "bridge.ovs cannot go with externallyManaged true, which leaves the NIC alone: remove bridge or set externallyManaged to false"
	}
	uplink := &ovs.Uplink.Interface
	if mtu := uplink.MTURequest; mtu != nil && (*mtu < 68 || *mtu > 65535) {
		return fmt.Sprintf("bridge.ovs.uplink.interface.mtuRequest %d is not an MTU: set it to 68 to 65535 bytes, or remove it", *mtu)
	}
	for _, key := range slices.Sorted(maps.Keys(ovs.Bridge.ExternalIDs)) {
		if strings.HasPrefix(key, reserved) {
			return fmt.Sprintf("bridge.ovs.bridge.externalIDs has the key %s: keys that begin with %s are the agent's own: remove it", key, reserved)
		}
	}
	return ""
}

// bridge is what the claims want of the PF's bridge: of those that want one, clash has
// seen to it that they want the same.
func (p *pfPlan) bridge(mtu int) *v1.OVSConfigExt {
	for i := range p.claims {
		if ovs := p.claims[i].ovs; ovs != nil {
			iface := *ovs.Uplink.Interface.DeepCopy()
			if mtu > 0 {
				iface.MTURequest = &mtu
			}
			return &v1.OVSConfigExt{
				Name: BridgeName(p.pf.PciAddress), Bridge: *ovs.Bridge.DeepCopy(),
				Uplinks: []v1.OVSUplinkConfigExt{{PciAddress: p.pf.PciAddress, Name: p.pf.Name, Interface: iface}},
			}
		}
	}
	return nil
}

// had is the bridge that the PF had in the spec before, as a policy asks for one.
func had(prior *v1.Bridges, pciAddress string) *v1.OVSConfig {
	for i := range prior.OVS {
		if b := &prior.OVS[i]; len(b.Uplinks) == 1 && b.Uplinks[0].PciAddress == pciAddress {
			return &v1.OVSConfig{Bridge: b.Bridge, Uplink: v1.OVSUplinkConfig{Interface: b.Uplinks[0].Interface}}
		}
	}
	return nil
}

// Bridge is what Open vSwitch has under the name of a PF's bridge.
type Bridge struct {
	// Is has what was set, as it is now, nil when there is no bridge; without an uplink
	// when that was taken out.
	Is      *v1.OVSConfigExt
	Foreign bool   // somebody else made it; Is is nil
	Made    bool   // it was recorded that one was to be made
	Unknown string // why nobody can tell
}

// As tells whether the bridge is as it is wanted.
func (b *Bridge) As(want *v1.OVSConfigExt) bool {
	return b.Is != nil && want != nil && equality.Semantic.DeepEqual(b.Is, want)
}

// WithBridge adds to the operations of a PF what its bridge needs, nil when it shall have
// none. The bridge is made once the eswitch is in switchdev mode, and the uplink goes out
// of it before the mode changes.
func WithBridge(want *v1.OVSConfigExt, have PF, ops []Operation, blocked []Blocked) ([]Operation, []Blocked) {
	b := &have.Bridge
	do := func(kind Kind) Operation {
		return Operation{Kind: kind, PCIAddress: have.PCIAddress, VF: -1, Value: BridgeName(have.PCIAddress)}
	}
	block := func(op Operation, cost Cost, reason string, vfs ...VF) {
		op.Cost, op.Reason = cost, reason
		blocked = append(blocked, Blocked{Operation: op, VFs: vfs})
	}
	doing := func(kinds ...Kind) bool {
		return slices.ContainsFunc(ops, func(op Operation) bool { return slices.Contains(kinds, op.Kind) })
	}
	kind := SetBridge
	if want == nil {
		kind = RemoveBridge
	}
	switch {
	case b.Unknown != "" && (want != nil || b.Made):
		block(do(kind), Refused, b.Unknown)
		if b.Made && doing(SetEswitchMode) {
			ops = slices.DeleteFunc(ops, func(op Operation) bool { return op.Kind == UnbindVFDriver || op.Kind == SetEswitchMode })
		}
	case b.Foreign && want != nil:
		block(do(SetBridge), Refused, fmt.Sprintf("somebody else made a bridge of this name: remove it, with ovs-vsctl del-br %s", want.Name))
	case want == nil && b.Is != nil:
		var held []VF
		for _, vf := range have.VFs {
			if vf.Held {
				held = append(held, vf)
			}
		}
		if len(held) > 0 {
			block(do(RemoveBridge), Evict, "the traffic of these pods goes through the bridge", held...)
		} else {
			ops = append([]Operation{do(RemoveBridge)}, ops...)
		}
	case b.Is != nil && len(b.Is.Uplinks) > 0 && doing(SetEswitchMode):
		ops = append([]Operation{do(DetachUplink)}, ops...)
	case want != nil && !b.As(want) && !doing(SetNumVFs, SetEswitchMode) && have.Eswitch == v1.EswitchModeSwitchdev && have.Name != "":
		ops = append(ops, do(SetBridge))
	}
	return ops, blocked
}
