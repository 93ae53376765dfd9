package attach

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/sluice-network/sluice/internal/host"
)

// Macvlan is what a configuration, and a record, says of a MacVLAN sub-interface.
type Macvlan struct {
	Parent         string `json:"parent"` // link; with a slot, the slot's
	Mode           string `json:"mode"`   // a key of host.MacvlanModes
	BroadcastQueue int    `json:"broadcastQueue,omitempty"`
	InPod          bool   `json:"inPod,omitempty"` // the parent is in the pod's namespace
}

// macvlans are MacVLAN sub-interfaces, as a kind of devices: made in the pod,
// and deleted there. What holds of a slot of the device plugin is its parent; a
// sub-interface on a parent that the configuration names takes no slot.
//
// The sub-interface carries the record's mark as its link group, from the
// message on that makes it: whatever the pod calls it later, it is known.
type macvlans struct{ *Attacher }

// prepare implements kind.
func (a macvlans) prepare(cfg *Config, ns *host.Netns, r *Record) (create, error) {
	m := *cfg.Macvlan
	others, err := a.taken(cfg, ns, r.IfName)
	if err != nil {
		return nil, err
	}
	where := (*host.Netns)(nil)
	if m.InPod {
		where = ns
	}
	if m.Parent == "" {
		// As the reference plugin has it.
		if m.Parent, err = a.Kernel.DefaultLink(where); err != nil {
			return nil, refusal(cfg, CodeKernel, "find the parent: %w", err)
		}
		if m.Parent == "" {
			return nil, refusal(cfg, types.ErrInvalidNetworkConfig, "there is no default route whose link could be the parent: set master")
		}
	}
	parent, err := a.Kernel.Link(where, m.Parent)
	switch {
	case errors.Is(err, syscall.ENODEV) && m.InPod:
		return nil, refusal(cfg, CodeUnusable, "the pod has no link %s: set master to one that an earlier network of the pod makes", m.Parent)
	case errors.Is(err, syscall.ENODEV):
		return nil, refusal(cfg, CodeUnusable, "the host has no link %s: make it, or let the network's pods go to nodes that have it", m.Parent)
	case err != nil:
		return nil, refusal(cfg, CodeKernel, "%w", err)
	case !parent.Up:
		return nil, refusal(cfg, CodeUnusable, "parent %s is down: set it up", m.Parent)
	case len(parent.MAC) != 6:
		return nil, refusal(cfg, CodeUnusable, "parent %s is no Ethernet link", m.Parent)
	case cfg.MTU > parent.MTU:
		return nil, refusal(cfg, types.ErrInvalidNetworkConfig, "mtu %d is above that of parent %s, %d: lower it, or raise the parent's", cfg.MTU, m.Parent, parent.MTU)
	}
	r.Macvlan, r.Only = &m, only(others)
	if r.MTU = cfg.MTU; r.MTU == 0 {
		r.MTU = parent.MTU
	}
	mac := cfg.MAC
	switch {
	case mac == nil && m.Mode == "passthru":
		mac = parent.MAC // the kernel keeps it
	case mac == nil:
		mac = derivedMAC(parent.MAC, r)
	}
	r.MAC = mac.String()
	return func(ctx context.Context, r Record, ns *host.Netns) (host.Netdev, error) {
		a.step("add: make sub-interface")
		return a.add(ctx, r, parent, mac, ns)
	}, nil
}

// derivedMAC is the MAC of a sub-interface for which none is asked: the same when
// the pod comes again on the parent, so that neighbours that know its address need
// not learn anew, and another on every other parent of the world.
func derivedMAC(parent net.HardwareAddr, r *Record) net.HardwareAddr {
	owner := r.Pod
	if owner == "" {
		owner = r.ContainerID
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%s\x00%s", parent, r.Network, owner, r.IfName))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^1 | 2 // locally administered, unicast
	return mac
}

// add makes the sub-interface and returns it as it is in the pod.
func (a macvlans) add(ctx context.Context, r Record, parent host.Netdev, mac net.HardwareAddr, ns *host.Netns) (host.Netdev, error) {
	m := r.Macvlan
	bad := func(err error) error {
		mend := ""
		switch {
		case errors.Is(err, syscall.EINVAL) && m.Mode == "passthru":
			mend = ": passthru needs the parent for itself, and it has other sub-interfaces"
		case errors.Is(err, syscall.EINVAL):
			mend = ": the parent may have a sub-interface in mode passthru, which has it for itself"
		case errors.Is(err, syscall.EBUSY):
			mend = ": the parent may belong to a bond or bridge"
		case errors.Is(err, syscall.EADDRINUSE):
			mend = ": the parent, or another sub-interface of it, has this MAC"
		}
		return fmt.Errorf("make sub-interface %s of %s, mode %s, MAC %s, MTU %d: %w%s", r.IfName, m.Parent, m.Mode, r.MAC, r.MTU, err, mend)
	}
	err := a.Kernel.AddMacvlan(ctx, ns, parent, m.InPod, host.Macvlan{
		Name: r.IfName, MAC: mac, MTU: r.MTU, Mode: host.MacvlanModes[m.Mode], BroadcastQueue: m.BroadcastQueue, Group: r.mark(),
	})
	if err != nil {
		return host.Netdev{}, bad(err)
	}
	link, err := a.Kernel.Link(ns, r.IfName)
	if err != nil {
		return link, bad(err)
	}
	// In mode passthru the kernel gives it the parent's MAC first.
	if !bytes.Equal(link.MAC, mac) {
		if err = a.Kernel.ChangeLink(ctx, ns, link.Index, host.LinkChange{MAC: mac}); err != nil {
			return link, bad(err)
		}
		link.MAC = mac
	}
	return link, nil
}

// restore implements kind: the sub-interface is deleted. One whose namespace has
// ended has ended with it.
func (a macvlans) restore(_ context.Context, r Record, ns *host.Netns) error {
	a.step("del: delete sub-interface")
	return a.inNetns(r, ns, func(ns *host.Netns) error {
		links, err := a.Kernel.Links(ns)
		if err != nil {
			return refused("delete the sub-interface: %w", err)
		}
		i := slices.IndexFunc(links, func(l host.Netdev) bool { return l.Kind == "macvlan" && l.Group == r.mark() })
		if i < 0 {
			return nil
		}
		if err := a.Kernel.DeleteLink(ns, links[i].Index); err != nil {
			return refused("delete the sub-interface: %w", err)
		}
		return nil
	})
}

// differences implements kind.
func (a macvlans) differences(r Record) ([]error, error) {
	if r.Macvlan.InPod {
		return nil, nil
	}
	_, err := a.Kernel.Link(nil, r.Macvlan.Parent)
	if errors.Is(err, syscall.ENODEV) {
		return []error{fmt.Errorf("parent %s is gone", r.Macvlan.Parent)}, nil
	}
	return nil, err
}

// is implements kind.
func (macvlans) is(link host.Netdev, r Record) error {
	if link.Kind != "macvlan" || link.Group != r.mark() {
		return errors.New("is not the sub-interface that was made")
	}
	if link.Mode != host.MacvlanModes[r.Macvlan.Mode] {
		return fmt.Errorf("is not in mode %s any more", r.Macvlan.Mode)
	}
	return nil
}
