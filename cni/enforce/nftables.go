package enforce

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
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
	VF(pciAddress string) (host.VFRef, error)
	SetVFLinkState(ctx context.Context, vf host.VFRef, state host.LinkState) error
}

// nftables is the Engine of package nft: each interface has its own table in its pod, and
// a MacVLAN sub-interface rules at its parent besides.
type nftables struct {
	links    Links
	tampered func(attach.Interface, nft.Tampering)

	mu      sync.Mutex
	pods    map[attach.Key]pod
	parents map[string]*parent // by name
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
	stop  context.CancelFunc           // of the watch
	of    map[[6]byte]attach.Interface // with rules there
}

// NewEngine makes the Engine that filters by nftables.
func NewEngine(links Links) Engine {
	return &nftables{links: links, pods: map[attach.Key]pod{}, parents: map[string]*parent{}}
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
	if err != nil && !errors.Is(err, syscall.ENODEV) {
		return d, err
	}
	d.Index = link.Index
	if d.Beside.Name = i.Beside; i.Beside == "" {
		return d, nil
	}
	if link, err = n.links.Link(ns, i.Beside); err != nil && !errors.Is(err, syscall.ENODEV) {
		return d, err
	}
	d.Beside.Index = link.Index
	copy(d.Beside.MAC[:], link.MAC)
	return d, nil
}

// DenyAll implements Engine.
func (n *nftables) DenyAll(i attach.Interface, ns *host.Netns) error {
	closed := &policy.Verdicts{Isolated: true}
	return n.Apply(i, ns, [2]*policy.Verdicts{closed, closed}, false, 0)
}

// Apply implements Engine.
func (n *nftables) Apply(i attach.Interface, ns *host.Netns, verdicts [2]*policy.Verdicts, cut bool, generation uint64) error {
	d, err := n.describe(i, ns)
	if err != nil {
		return err
	}
	d.Cut = cut
	if i.Parent != "" {
		p, err := n.parent(i.Parent)
		if err != nil {
			return err
		}
		n.mu.Lock()
		p.of[d.MAC] = i
		n.mu.Unlock()
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

// parent opens the link for enforcement, and has the rules there watched.
func (n *nftables) parent(name string) (*parent, error) {
	link, err := n.links.Link(nil, name)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	known := n.parents[name]
	if known != nil && known.index == link.Index {
		return known, nil
	}
	n.closeParent(name)
	opened, err := nft.OpenParent(n.links.HostNetns(), name)
	if err != nil {
		return nil, err
	}
	p := &parent{Parent: opened, index: link.Index, of: map[[6]byte]attach.Interface{}}
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	n.parents[name] = p
	go func() {
		err := p.Watch(ctx, n.links.HostNetns(), func(t nft.Tampering) { n.tamperedParent(name, p, t) })
		if err == nil {
			return
		}
		n.mu.Lock()
		all := slices.Collect(maps.Values(p.of))
		n.mu.Unlock()
		for _, i := range all {
			n.tampered(i, nft.Tampering{Err: fmt.Errorf("what others change of the rules at %s is not noticed any more: %w", name, err)})
		}
	}()
	return p, nil
}

// tamperedParent tells whose rules were changed at a parent. A link that is gone took its
// rules with it, and the sub-interfaces too.
func (n *nftables) tamperedParent(name string, p *parent, t nft.Tampering) {
	if link, err := n.links.Link(nil, name); errors.Is(err, syscall.ENODEV) || err == nil && link.Index != p.index {
		return
	}
	n.mu.Lock()
	i, known := p.of[t.Interface.MAC]
	n.mu.Unlock()
	if known {
		n.tampered(i, t)
	}
}

// closeParent lets go of a parent. mu is held.
func (n *nftables) closeParent(name string) {
	if p := n.parents[name]; p != nil {
		p.stop()
		p.Close()
		delete(n.parents, name)
	}
}

// removeParent removes the interface's rules at its parent, also if that is gone: what of
// a table is not bound to the link stays.
func (n *nftables) removeParent(i attach.Interface) error {
	mac := [6]byte(i.MAC)
	p, err := n.parent(i.Parent)
	if errors.Is(err, syscall.ENODEV) {
		n.mu.Lock()
		n.closeParent(i.Parent)
		n.mu.Unlock()
		gone, err := nft.OpenParent(n.links.HostNetns(), i.Parent)
		if err != nil {
			return err
		}
		defer gone.Close()
		return gone.Remove(mac)
	}
	if err != nil {
		return err
	}
	if err := p.Remove(mac); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(p.of, mac)
	return nil
}

// Cut implements Engine.
func (n *nftables) Cut(i attach.Interface, cut bool) error {
	vf, err := n.links.VF(i.Device)
	if err != nil {
		return err
	}
	state := i.LinkState
	if cut {
		state = host.LinkDisable
	}
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	return n.links.SetVFLinkState(ctx, vf, state)
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
		if err := n.removeParent(i); err != nil {
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

// Counted implements Engine.
func (n *nftables) Counted(i attach.Interface) (nft.Counted, error) {
	n.mu.Lock()
	p, open := n.pods[i.Key]
	at := n.parents[i.Parent]
	n.mu.Unlock()
	if !open {
		return nft.Counted{}, fmt.Errorf("read the counters of %s: the pod's namespace was let go of", i.IfName)
	}
	c, err := p.Counted(nft.Interface{Name: i.IfName})
	if err != nil || at == nil {
		return c, err
	}
	there, err := at.Dropped([6]byte(i.MAC))
	c.Dropped = nft.Dropped{Ingress: c.Ingress + there.Ingress, Egress: c.Egress + there.Egress, Spoofed: c.Spoofed + there.Spoofed}
	return c, err
}

// Sizes implements Engine.
func (n *nftables) Sizes() map[string]nft.Size {
	n.mu.Lock()
	pods, parents := slices.Collect(maps.Values(n.pods)), slices.Collect(maps.Values(n.parents))
	n.mu.Unlock()
	all := map[string]nft.Size{EnginePod: {}, EngineHost: {}}
	add := func(engine string, s nft.Size) {
		all[engine] = nft.Size{Rules: all[engine].Rules + s.Rules, Elements: all[engine].Elements + s.Elements}
	}
	for _, p := range pods {
		add(EnginePod, p.Size())
	}
	for _, p := range parents {
		add(EngineHost, p.Size())
	}
	return all
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
