package explain

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/client-go/rest"

	"github.com/sluice-network/sluice/cni/enforce"
	"github.com/sluice-network/sluice/cni/enforce/cluster"
	"github.com/sluice-network/sluice/cni/policy"
)

// Question is about a new connection between a pod and a peer.
type Question struct {
	Namespace, Pod string
	// Peer is a pod, as name or namespace/name, or an address.
	Peer string
	// From says that the peer asks the pod, and not the pod the peer.
	From     bool
	Network  string // NetworkAttachmentDefinition, as name or namespace/name; empty for all that the pod is on
	Protocol uint8  // IP protocol
	Port     uint16
}

// Cluster is what policies are about, as it is at one time.
type Cluster struct {
	mu    sync.Mutex
	index *policy.Index
	pods  map[string]*cluster.Pod
}

// NewCluster makes a Cluster of which nothing is known. It is a cluster.Sink.
func NewCluster() *Cluster {
	return &Cluster{index: policy.NewIndex(func(policy.Pod) bool { return true }), pods: map[string]*cluster.Pod{}}
}

// Read reads all that policies are about.
func Read(ctx context.Context, config *rest.Config) (*Cluster, error) {
	c := NewCluster()
	follow, err := cluster.NewForAll(config, []string{enforce.Annotation}, c, logr.Discard())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go follow.Run(ctx)
	for !follow.Synced() {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("read pods, namespaces, networks and policies: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.index.Flush()
	return c, nil
}

// Explain answers the question, in lines for people.
func (c *Cluster) Explain(q Question) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	pod := c.pods[q.Namespace+"/"+q.Pod]
	if pod == nil {
		return "", fmt.Errorf("there is no pod %s/%s", q.Namespace, q.Pod)
	}
	if len(pod.Interfaces) == 0 {
		return "", fmt.Errorf("pod %s/%s has no interface besides the cluster's network", q.Namespace, q.Pod)
	}
	network := q.Network
	if network != "" && !strings.Contains(network, "/") {
		network = q.Namespace + "/" + network
	}
	peer, address, err := c.peer(q)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	asked := map[string]bool{}
	for _, i := range pod.Interfaces {
		if network != "" && i.Network != network {
			continue
		}
		addresses := []netip.Addr{address}
		if peer != nil {
			addresses = nil
			for _, o := range peer.Interfaces {
				if o.Network == i.Network {
					addresses = append(addresses, o.IPs...)
				}
			}
		}
		for _, own := range i.IPs {
			for _, other := range addresses {
				if own.Is4() != other.Is4() {
					continue
				}
				asked[i.Network] = true
				from, to := own, other
				if q.From {
					from, to = other, own
				}
				c.tell(&b, i.Network, from, to, q)
			}
		}
	}
	if len(asked) == 0 {
		return "", errors.New("pod and peer share no network, or have no addresses of one family on it: give --network, or an address")
	}
	return b.String(), nil
}

// peer finds the pod or the address that the question names.
func (c *Cluster) peer(q Question) (*cluster.Pod, netip.Addr, error) {
	if address, err := netip.ParseAddr(q.Peer); err == nil {
		return nil, address.Unmap(), nil
	}
	key := q.Peer
	if !strings.Contains(key, "/") {
		key = q.Namespace + "/" + key
	}
	if p := c.pods[key]; p != nil {
		return p, netip.Addr{}, nil
	}
	return nil, netip.Addr{}, fmt.Errorf("%s is neither an address nor a pod that there is", q.Peer)
}

// tell writes what holds for one connection.
func (c *Cluster) tell(b *strings.Builder, network string, from, to netip.Addr, q Question) {
	a := c.index.Verdict(network, from, to, q.Protocol, q.Port)
	word := map[bool]string{true: "allowed", false: "denied"}
	fmt.Fprintf(b, "%s: %s to %s, protocol %d, port %d: %s\n", network, from, to, q.Protocol, q.Port, word[a.Allowed])
	if a.Itself {
		b.WriteString("  a pod always reaches itself\n")
	}
	for d, reasons := range [...][]policy.Reason{policy.Ingress: a.Ingress, policy.Egress: a.Egress} {
		for _, r := range reasons {
			fmt.Fprintf(b, "  %s of pod %s/%s, %s: %s, %s\n", policy.Direction(d), r.ID.Namespace, r.ID.Pod, r.ID.Interface, word[r.Allowed], because(r, policy.Direction(d)))
			for _, fault := range r.State.Faults {
				fmt.Fprintf(b, "    not valid: %s\n", fault)
			}
			if r.State.Verdicts.Isolated {
				fmt.Fprintf(b, "    %s\n", c.where(r.ID, policy.Direction(d)))
			}
		}
	}
}

// because says why a verdict is as it is.
func because(r policy.Reason, d policy.Direction) string {
	switch {
	case r.State.OptedOut:
		return "the network is annotated " + policy.NetworkPolicyAnnotation + "=none"
	case !r.State.Verdicts.Isolated:
		return "no policy isolates it"
	case r.NodeItself:
		return "the peer is the pod's node"
	case len(r.By) == 0:
		return "isolated by " + strings.Join(r.State.Verdicts.Policies, ", ") + ", none of which allows it"
	}
	var rules []string
	for _, rule := range r.By {
		rules = append(rules, fmt.Sprintf("%s, spec.%s[%d]", rule.Policy, d, rule.Index))
	}
	return "by " + strings.Join(rules, " and ")
}

// where says where the interface's verdicts are in force, as its pod has it.
func (c *Cluster) where(id policy.ID, d policy.Direction) string {
	var i enforce.InterfaceStatus
	if p := c.pods[id.Namespace+"/"+id.Pod]; p != nil {
		i = enforce.ReadStatus(p.Annotations)[id.Interface]
	}
	s := []*enforce.DirectionStatus{policy.Ingress: i.Ingress, policy.Egress: i.Egress}[d]
	switch {
	case s == nil:
		return "the pod does not say that it is enforced: its node's agent has not got to it, or there is none"
	case s.Problem != "":
		return s.Problem
	}
	return fmt.Sprintf("in force: engine %s, generation %d", s.Engine, i.Generation)
}

// What cluster.Sink is told.

// SetPod implements cluster.Sink.
func (c *Cluster) SetPod(p *cluster.Pod) {
	c.with(func() {
		c.pods[p.Namespace+"/"+p.Name] = p
		c.index.SetPod(p.Pod)
	})
}

// DeletePod implements cluster.Sink.
func (c *Cluster) DeletePod(namespace, name string) {
	c.with(func() {
		delete(c.pods, namespace+"/"+name)
		c.index.RemovePod(namespace, name)
	})
}

// SetNamespace implements cluster.Sink.
func (c *Cluster) SetNamespace(n policy.Namespace) { c.with(func() { c.index.SetNamespace(n) }) }

// DeleteNamespace implements cluster.Sink.
func (c *Cluster) DeleteNamespace(name string) { c.with(func() { c.index.RemoveNamespace(name) }) }

// SetNetwork implements cluster.Sink.
func (c *Cluster) SetNetwork(n policy.Network) { c.with(func() { c.index.SetNetwork(n) }) }

// DeleteNetwork implements cluster.Sink.
func (c *Cluster) DeleteNetwork(name string) { c.with(func() { c.index.RemoveNetwork(name) }) }

// SetPolicy implements cluster.Sink.
func (c *Cluster) SetPolicy(p cluster.Policy) { c.with(func() { c.index.SetPolicy(p.Policy) }) }

// DeletePolicy implements cluster.Sink.
func (c *Cluster) DeletePolicy(p cluster.Policy) {
	c.with(func() { c.index.RemovePolicy(p.Kind, p.Namespace, p.Name) })
}

func (c *Cluster) with(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}
