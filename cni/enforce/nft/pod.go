package nft

import (
	"context"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// Pod enforces inside the network namespace of a pod. Its methods may be called
// concurrently.
type Pod struct{ *engine }

// OpenPod opens a pod's namespace for enforcement. It holds the namespace, and needs ns
// no more.
func OpenPod(ns *host.Netns) (*Pod, error) {
	e, err := openEngine(ns)
	if err != nil {
		return nil, err
	}
	return &Pod{e}, nil
}

// Close lets go of the namespace. The rules stay in force.
func (p *Pod) Close() { p.close() }

// denied is what isolates and allows nothing.
var denied = &policy.Verdicts{Isolated: true}

// DenyAll puts generation 0 in force, which lets only pass what an interface needs to
// get its addresses. The interface need not be there yet.
func (p *Pod) DenyAll(i Interface) error { return p.Apply(i, denied, denied, 0) }

// Apply puts a generation in force for an interface and returns when the kernel has
// acknowledged it. On an error the one before is wholly in force. Connections that are
// established go on, also if they are no longer allowed, unless the interface says Cut.
func (p *Pod) Apply(i Interface, ingress, egress *policy.Verdicts, generation uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.put(i, [2]*policy.Verdicts{ingress, egress}, generation)
}

func (p *Pod) put(i Interface, verdicts [2]*policy.Verdicts, generation uint64) error {
	return p.apply(i.Name, table{unix.NFPROTO_INET, TablePrefix + i.Name}, i, verdicts, generation, func(version int) (rendering, error) {
		return podRendering(i, verdicts, version), nil
	})
}

func podRendering(i Interface, verdicts [2]*policy.Verdicts, version int) rendering {
	in, out := verdicts[policy.Ingress].Isolated, verdicts[policy.Egress].Isolated
	prefix := "v" + strconv.Itoa(version) + "."
	t := table{unix.NFPROTO_INET, TablePrefix + i.Name}
	return rendering{
		layout: pod(i, in, out, prefix), prefix: prefix, table: t,
		ports:  func(d policy.Direction, a allowed) chain { return portsOf(t, prefix, i.Cut, d, a) },
		owns:   func(string) bool { return true },
		judged: [2]bool{in || i.Cut && out, out || i.Cut && in}, replies: i.Cut,
		counts: true, hits: hitsCounters(verdicts),
	}
}

// Watch puts the rules of the pod's interfaces right when somebody else changes them,
// and tells so. ns is the same as at opening. It returns when ctx ends or its socket fails.
func (p *Pod) Watch(ctx context.Context, ns *host.Netns, report func(Tampering)) error {
	return p.watch(ctx, ns, report, func(table string) []string {
		return []string{strings.TrimPrefix(table, TablePrefix)}
	}, p.put)
}

// Generation is the one in force for an interface; held is false if there is none.
func (p *Pod) Generation(i Interface) (generation uint64, held bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.generation(table{unix.NFPROTO_INET, TablePrefix + i.Name}, i.MAC)
}

// Dropped counts packets dropped since the interface has rules.
type Dropped struct{ Ingress, Egress, Spoofed uint64 }

// Counted is what the rules of an interface count.
type Counted struct {
	Dropped
	// Hits are by the names that HitsCounter gives, since the policy isolates the interface.
	Hits map[string]uint64
}

// Counted reads the counters of an interface.
func (p *Pod) Counted(i Interface) (c Counted, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, family := range []uint8{unix.NFPROTO_NETDEV, unix.NFPROTO_INET} {
		if c.Hits, err = p.conn.counters(table{family, TablePrefix + i.Name}); err != nil {
			return c, err
		}
		for name, n := range map[string]*uint64{droppedIn: &c.Ingress, droppedOut: &c.Egress, droppedSpoofed: &c.Spoofed} {
			*n += c.Hits[name]
			delete(c.Hits, name)
		}
	}
	return c, nil
}

// Remove takes all rules of the interface away. It is no error if there are none.
func (p *Pod) Remove(name string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.states, name)
	var ops []op
	for _, family := range []uint8{unix.NFPROTO_INET, unix.NFPROTO_NETDEV} {
		t := table{family, TablePrefix + name}
		there, err := p.conn.tables(family)
		if err != nil {
			return err
		}
		if slices.Contains(there, t.name) {
			ops = append(ops, op{do: deleteTable, table: t})
		}
	}
	return p.commit(ops)
}
