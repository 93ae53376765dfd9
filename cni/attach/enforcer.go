package attach

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/sluice-network/sluice/internal/host"
)

// Interface is what an Enforcer is told of a pod's interface.
type Interface struct {
	Key
	Generation uint64 // of the attachment: another one of the same key has another
	Pod        string // namespace/name
	PodUID     string // empty when the runtime did not tell it
	Definition string // the NetworkAttachmentDefinition, namespace/name; empty for none
	Device     string
	MAC        net.HardwareAddr
	IPs        []netip.Addr // none before they are known, and on a network without IPAM
	DHCP       bool         // the pod's address comes by DHCP, on the interface itself

	Parent string // in the host's namespace, of a MacVLAN sub-interface; empty for what is filtered in the pod
	Beside string // the pod's end of its host interface, by which its addresses are reached, too; empty for none
	Bypass string // why packets go past the pod's kernel; empty when they do not

	Unchecked bool // the VF's definition lets it send from others' addresses: spoofchk is off, or trust on

	LinkState host.LinkState // that the VF is shown by its PF, unless policy takes its link

	NetnsPath string
	Netns     host.NetnsID
}

// Enforcer puts network policy in force on interfaces. The calls for one interface
// follow one another. Errors without a CNI error code are the kernel's.
type Enforcer interface {
	// Load is called first, with the interfaces that there are from before, oldest first,
	// and again with those of sriov-cni whose pod becomes known later. What is in force on
	// them stays so until the Enforcer knows better.
	Load(interfaces []Interface)

	// Definition returns the NetworkAttachmentDefinition, as namespace/name, that makes
	// the pod's interface, empty when none does. Pod and UID are what the runtime told.
	Definition(ctx context.Context, pod, uid, ifName string) (string, error)

	// Deny is called before the interface is in the pod. If a policy isolates it, it
	// returns when nothing can pass it, or refuses what cannot be enforced.
	Deny(ctx context.Context, i Interface, ns *host.Netns) error

	// Enforce is called when the interface has its addresses, before it is anybody's,
	// and returns when what policy says now is in force. From then on the Enforcer
	// follows the policies, until Remove.
	Enforce(ctx context.Context, i Interface, ns *host.Netns) error

	// Leave is called before the interface is taken out of the pod. The Enforcer leaves
	// what is in force, and holds nothing of the pod's namespace any more, which may have
	// to end for that.
	Leave(i Interface)

	// Remove is called when the interface is out of the pod, also for one that the
	// Enforcer knows nothing of. ns is nil when the pod's namespace is gone.
	Remove(ctx context.Context, i Interface, ns *host.Netns) error

	// Cut tells whether the VF's link is taken from the pod, because nothing else keeps
	// it from what policy forbids.
	Cut(i Interface) bool

	// Differences lists what is not in force as it should be.
	Differences(ctx context.Context, i Interface, ns *host.Netns) ([]error, error)
}

// interfaces are those of pods that are attached, oldest first.
func (a *Attacher) interfaces() (out []Interface) {
	for _, r := range a.journal.all() {
		if r.Phase == Attached && r.Pod != "" {
			out = append(out, r.policed())
		}
	}
	return out
}

// policed is the record's interface as an Enforcer sees it.
func (r *Record) policed() Interface {
	i := Interface{
		Key: r.Key, Generation: r.Generation, Pod: r.Pod, PodUID: r.podUID(), Definition: r.Definition, Device: r.Device,
		DHCP: r.IPAM == dhcpIPAM || r.AdoptedDHCP, Bypass: r.Bypass, LinkState: r.Settings.LinkState, NetnsPath: r.NetnsPath, Netns: r.Netns,
	}
	i.MAC, _ = net.ParseMAC(r.MAC) // written by us
	if r.Macvlan == nil {
		i.Unchecked = !r.Settings.SpoofChk || r.Settings.Trust
	} else if !r.Macvlan.InPod {
		i.Parent = r.Macvlan.Parent
	}
	if r.HostLink != "" {
		i.Beside = hostPeer
	}
	var result types100.Result
	if json.Unmarshal(r.Result, &result) == nil {
		i.IPs = addresses(result.IPs)
	}
	return i
}

func addresses(ips []*types100.IPConfig) (out []netip.Addr) {
	for _, ip := range ips {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			out = append(out, a.Unmap())
		}
	}
	return out
}

func (r *Record) podUID() string {
	for kv := range strings.SplitSeq(r.Args, ";") {
		if uid, ok := strings.CutPrefix(kv, "K8S_POD_UID="); ok {
			return uid
		}
	}
	return ""
}

// definition finds out what network the record's interface is on.
func (a *Attacher) definition(ctx context.Context, r *Record, cfg *Config) (err error) {
	if a.Enforcer == nil || cfg.Pod == "" {
		return nil
	}
	a.step("add: find definition")
	if r.Definition, err = a.Enforcer.Definition(ctx, cfg.Pod, cfg.PodUID, r.IfName); err != nil {
		return WithCode(CodePolicy, fmt.Errorf("network %q: %s: %w", cfg.Network, cfg.device(), err))
	}
	return nil
}

// deny closes the record's interface before it is in the pod.
func (a *Attacher) deny(ctx context.Context, r Record, ns *host.Netns) error {
	if a.Enforcer == nil || r.Pod == "" {
		return nil
	}
	a.step("add: deny all")
	return a.Enforcer.Deny(ctx, r.policed(), ns)
}

// enforce puts policy in force on the record's interface.
func (a *Attacher) enforce(ctx context.Context, r Record, ns *host.Netns, ips []*types100.IPConfig) error {
	if a.Enforcer == nil || r.Pod == "" {
		return nil
	}
	a.step("add: enforce policy")
	i := r.policed()
	i.IPs = addresses(ips)
	return a.Enforcer.Enforce(ctx, i, ns)
}

// leave lets the Enforcer let go of the pod.
func (a *Attacher) leave(r Record) {
	if a.Enforcer != nil && r.Pod != "" {
		a.Enforcer.Leave(r.policed())
	}
}

// unenforce takes back what deny and enforce did.
func (a *Attacher) unenforce(ctx context.Context, r Record, ns *host.Netns) error {
	if a.Enforcer == nil || r.Pod == "" || r.Phase == Returned {
		return nil
	}
	a.step("del: remove policy")
	there := false
	err := a.inNetns(r, ns, func(ns *host.Netns) error {
		there = true
		return a.Enforcer.Remove(ctx, r.policed(), ns)
	})
	if !there && err == nil {
		err = a.Enforcer.Remove(ctx, r.policed(), nil)
	}
	if err != nil {
		return refused("remove policy: %w", err)
	}
	return nil
}

// policyDifferences lists what of policy is not in force as it should be.
func (a *Attacher) policyDifferences(ctx context.Context, r Record, ns *host.Netns) ([]error, error) {
	if a.Enforcer == nil || r.Pod == "" {
		return nil, nil
	}
	return a.Enforcer.Differences(ctx, r.policed(), ns)
}
