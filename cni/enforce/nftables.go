package enforce

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/enforce/nft"
	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// Links finds the links of interfaces and parents; *host.Attacher does.
type Links interface {
	HostNetns() *host.Netns
	OpenNetns(path string) (*host.Netns, error)
	Link(ns *host.Netns, name string) (host.Netdev, error)
}

// nftables is the Engine of package nft: each interface has its own table in its pod, and
// a MacVLAN sub-interface rules at its parent besides.
type nftables struct {
	links    Links
	tampered func(attach.Interface, nft.Tampering)

	mu      sync.Mutex
	pods    map[attach.Key]pod
	parents map[string]parent // by name
}

// pod is a pod's namespace, for one interface.
type pod struct {
	*nft.Pod
	stop context.CancelFunc // of the watch
}

// parent is a link of the host. One that was made anew has another index.
type parent struct {
	*nft.Parent
	index int
}

// NewEngine makes the Engine that filters by nftables.
func NewEngine(links Links) Engine {
	return &nftables{links: links, pods: map[attach.Key]pod{}, parents: map[string]parent{}}
}

// Report implements Engine.
func (n *nftables) Report(tampered func(attach.Interface, nft.Tampering)) { n.tampered = tampered }

// pod opens the pod's namespace for the interface, and has the rules there watched.
func (n *nftables) pod(i attach.Interface, ns *host.Netns) (*nft.Pod, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p, open := n.pods[i.Key]; open {
		return p.Pod, nil
	}
	p, err := nft.OpenPod(ns)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	n.pods[i.Key] = pod{p, stop}
	watched, err := n.links.OpenNetns(i.NetnsPath) // ns is the caller's
	if err != nil {
		return p, nil //nolint:nilerr // the pod is ending: its rules go with it
	}
	go func() {
		defer watched.Close()
		if err := p.Watch(ctx, watched, func(t nft.Tampering) { n.tampered(i, t) }); err != nil {
			n.tampered(i, nft.Tampering{Err: fmt.Errorf("what others change of the rules is not noticed any more: %w", err)})
		}
	}()
	return p, nil
}

// describe is the interface as package nft sees it, with its link if that is there.
func (n *nftables) describe(i attach.Interface, ns *host.Netns) (nft.Interface, error) {
	d := nft.Interface{Name: i.IfName, Addresses: i.IPs, AnyAddress: len(i.IPs) == 0, DHCP: i.DHCP}
	copy(d.MAC[:], i.MAC)
	link, err := n.links.Link(ns, i.IfName)
	if errors.Is(err, syscall.ENODEV) {
		return d, nil
	}
	d.Index = link.Index
	return d, err
}

// DenyAll implements Engine.
func (n *nftables) DenyAll(i attach.Interface, ns *host.Netns) error {
	closed := &policy.Verdicts{Isolated: true}
	return n.Apply(i, ns, [2]*policy.Verdicts{closed, closed}, 0)
}

// Apply implements Engine.
func (n *nftables) Apply(i attach.Interface, ns *host.Netns, verdicts [2]*policy.Verdicts, generation uint64) error {
	d, err := n.describe(i, ns)
	if err != nil {
		return err
	}
	if i.Parent != "" {
		p, err := n.parent(i.Parent)
		if err != nil {
			return err
		}
		if err := p.Apply(d, verdicts[policy.Ingress], verdicts[policy.Egress], generation); err != nil {
			return err
		}
	}
	p, err := n.pod(i, ns)
	if err != nil {
		return err
	}
	return p.Apply(d, verdicts[policy.Ingress], verdicts[policy.Egress], generation)
}

// parent opens the link for enforcement.
func (n *nftables) parent(name string) (*nft.Parent, error) {
	link, err := n.links.Link(nil, name)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	known, there := n.parents[name]
	if there && known.index == link.Index {
		return known.Parent, nil
	}
	if there {
		known.Close()
	}
	p, err := nft.OpenParent(n.links.HostNetns(), name)
	if err == nil {
		n.parents[name] = parent{p, link.Index}
	}
	return p, err
}

// Generation implements Engine.
func (n *nftables) Generation(i attach.Interface, ns *host.Netns) (generation uint64, held bool, err error) {
	p, err := n.pod(i, ns)
	if err != nil {
		return 0, false, err
	}
	d, err := n.describe(i, ns)
	if err != nil {
		return 0, false, err
	}
	generation, held, err = p.Generation(d)
	if err != nil || !held || i.Parent == "" {
		return generation, held, err
	}
	host, err := n.parent(i.Parent)
	if err != nil {
		return 0, false, err
	}
	all, err := host.Generations()
	there, held := all[d.MAC]
	return min(generation, there), held, err
}

// Remove implements Engine.
func (n *nftables) Remove(i attach.Interface, ns *host.Netns) error {
	defer n.Close(i)
	if i.Parent != "" {
		p, err := n.parent(i.Parent)
		if err == nil {
			err = p.Remove([6]byte(i.MAC))
		}
		if err != nil && !errors.Is(err, syscall.ENODEV) { // the rules go with the link
			return err
		}
	}
	if ns == nil {
		return nil // the rules went with it
	}
	p, err := n.pod(i, ns)
	if err != nil {
		return err
	}
	return p.Remove(i.IfName)
}

// Close implements Engine.
func (n *nftables) Close(i attach.Interface) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p, open := n.pods[i.Key]; open {
		p.stop()
		p.Close()
		delete(n.pods, i.Key)
	}
}
