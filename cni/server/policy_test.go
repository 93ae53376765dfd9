package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-logr/logr"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/enforce"
	"github.com/sluice-network/sluice/cni/enforce/cluster"
	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/host"
)

// policies makes the agent of a test enforce the NetworkPolicies in the file
// policies.json of its directory, which it follows, if it is there at the start. What its
// network says of existing connections is in the file existing-connections. When there is a
// file metrics-wanted it writes the file metrics.
func policies(dir string, kernel *host.Attacher) attach.Enforcer {
	path := filepath.Join(dir, "policies.json")
	if _, err := os.Stat(path); err != nil {
		return nil
	}
	e := enforce.New(enforce.Options{
		Node: "node", Cluster: anyPod{}, Engine: enforce.NewEngine(kernel), OpenNetns: kernel.OpenNetns, Log: logr.Discard(),
		Addresses: kernel.OwnAddresses,
	})
	existing, _ := os.ReadFile(filepath.Join(dir, "existing-connections"))
	e.SetNetwork(must(policy.ReadNetwork(&nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{
		Namespace: "ns", Name: "blue", Annotations: map[string]string{policy.NetworkPolicyAnnotation: "all", policy.ExistingConnectionsAnnotation: string(existing)},
	}})))
	for _, name := range []string{"a", "b", "c"} { // those that an earlier agent may have had
		p, _ := anyPod{}.Known("ns", name)
		e.SetPod(p)
	}
	var known []byte
	var before []networkingv1.NetworkPolicy
	read := func() {
		b, err := os.ReadFile(path)
		if err != nil || bytes.Equal(b, known) {
			return
		}
		var now []networkingv1.NetworkPolicy
		if err := json.Unmarshal(b, &now); err != nil {
			return // half written
		}
		for i := range before {
			e.DeletePolicy(cluster.Policy{Policy: policy.ReadNetworkPolicy(&before[i])})
		}
		for i := range now {
			e.SetPolicy(cluster.Policy{Policy: policy.ReadNetworkPolicy(&now[i])})
		}
		known, before = b, now
	}
	read()
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(e)
	go func() { _ = e.Run(context.Background()) }()
	go func() {
		for range time.Tick(10 * time.Millisecond) {
			read()
			if os.Remove(filepath.Join(dir, "metrics-wanted")) == nil {
				_ = prometheus.WriteToTextfile(filepath.Join(dir, "metrics"), metrics)
			}
		}
	}()
	return e
}

// TestNetnsHostInterfacePolicy: what policy keeps out does not come in by the pod's way to
// its host either, nor what it keeps in go out there; the node itself is let in.
func TestNetnsHostInterfacePolicy(t *testing.T) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	n.hostAddresses()
	stranger := newPod(t, t.TempDir(), "stranger")
	n.ok(in(hostNS, func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) }))
	n.ok(inside(hostNS, func(h *netlink.Handle) error {
		there, err := os.Open(stranger)
		if err != nil {
			return err
		}
		defer there.Close()
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "cluster"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(there.Fd())}
		return errors.Join(h.LinkAdd(link), h.AddrAdd(link, must(netlink.ParseAddr("198.51.100.1/24"))), h.LinkSetUp(link))
	}))
	n.ok(inside(stranger, func(h *netlink.Handle) error {
		link, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(h.AddrAdd(link, must(netlink.ParseAddr("198.51.100.2/24"))), h.LinkSetUp(link),
			h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.IPv4(198, 51, 100, 1)}))
	}))
	n.policies(`[]`)
	n.agent = startAgent(t, n.dir, -1)
	a := n.request("a", `"deviceID":"p0-0","hostInterface":{"routes":["198.51.100.0/24"]}`, "10.20.1.1/16", "fd20::11/64")
	if _, err := n.pod(a); err != nil {
		t.Fatal(err)
	}
	for netns, addresses := range map[string][]string{a.Netns: {"10.20.1.1", "fd20::11"}, hostNS: {"192.0.2.7"}, stranger: {"198.51.100.2"}} {
		for _, address := range addresses {
			n.echo(netns, address)
		}
	}
	passes := n.passes
	passes("no policy", stranger, "10.20.1.1", true)
	passes("no policy", a.Netns, "198.51.100.2", true)
	closed := `[{"metadata":{"namespace":"ns","name":"p"},"spec":{"podSelector":{},"policyTypes":["Ingress"]}}]`
	n.policies(closed)
	passes("ingress is closed", stranger, "10.20.1.1", false)
	passes("ingress is closed", a.Netns, "198.51.100.2", true) // and its replies
	for _, address := range []string{"10.20.1.1", "fd20::11"} {
		passes("the node", hostNS, address, true)
	}
	n.policies(`[{"metadata":{"namespace":"ns","name":"p"},"spec":{"podSelector":{},"policyTypes":["Egress"]}}]`)
	passes("egress is closed", a.Netns, "198.51.100.2", false)
	passes("egress is closed", stranger, "10.20.1.1", true)
	passes("the node", a.Netns, "192.0.2.7", true)
	n.policies(`[{"metadata":{"namespace":"ns","name":"p"},"spec":{"podSelector":{},"ingress":[{"from":[{"ipBlock":{"cidr":"198.51.100.2/32"}}]}]}}]`)
	passes("the stranger may", stranger, "10.20.1.1", true)
	// One that comes under policy, and an agent that goes on with it.
	n.policies(closed)
	b := n.request("b", `"deviceID":"p0-1","hostInterface":{"routes":["198.51.100.0/24"]}`, "10.20.1.2/16")
	if _, err := n.pod(b); err != nil {
		t.Fatal(err)
	}
	n.echo(b.Netns, "10.20.1.2")
	passes("begins closed", stranger, "10.20.1.2", false)
	passes("begins closed", hostNS, "10.20.1.2", true)
	n.ok(n.agent.cmd.Process.Kill())
	_ = n.agent.cmd.Wait()
	n.agent = startAgent(t, n.dir, -1)
	passes("next agent", stranger, "10.20.1.2", false)
	passes("next agent", hostNS, "10.20.1.2", true)
	n.policies(`[]`)
	passes("no policy any more", stranger, "10.20.1.2", true)
	n.del(a)
	n.del(b)
	n.ok(inside(hostNS, func(h *netlink.Handle) error {
		link, err := h.LinkByName("cluster")
		if err != nil {
			return err
		}
		return h.LinkDel(link)
	}))
	n.clean("DEL")
}

// TestNetnsParentTampering: rules at the parent that somebody on the host takes away are put
// back at once; those of a parent that goes are gone.
func TestNetnsParentTampering(t *testing.T) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	n.policies(ingress("a", "b"))
	n.agent = startAgent(t, n.dir, -1)
	a := n.request("a", `"deviceID":"p0-0"`, "10.20.1.1/16")
	if _, err := n.pod(a); err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"flush ruleset", "delete table netdev sluice-p0", "flush chain netdev sluice-p0 senders"} {
		before := n.chains(hostNS)
		if !strings.Contains(before, "senders") {
			t.Fatalf("no rules: %s", before)
		}
		n.ok(in(hostNS, func() error { return exec.Command("nft", what).Run() }))
		eventually(t, "put right after "+what, func() error {
			if now := n.chains(hostNS); !slices.Equal(versionless(now), versionless(before)) {
				return fmt.Errorf("rules are\n%s\nand were\n%s", now, before)
			}
			return nil
		})
	}
	n.del(a)
	n.clean("DEL")
}

// passes waits until packets pass, or do not.
func (n *node) passes(when, from, to string, want bool) {
	n.Helper()
	eventually(n.T, fmt.Sprintf("%s: %s from %s: %t", when, to, filepath.Base(from), want), func() error {
		err := ask(from, to)
		if want {
			return err
		}
		if err == nil {
			return errors.New("it passes")
		}
		return nil
	})
}

// forges waits until what a pod sends in another's name is answered to that one, or is not.
func (n *node) forges(from, other, as, to string, want bool) {
	n.Helper()
	var victim net.PacketConn
	n.ok(in(other, func() (err error) { victim, err = net.ListenPacket("udp", as+":0"); return err }))
	defer victim.Close()
	anyone := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1) }), err)
	}}
	var forger net.PacketConn
	n.ok(in(from, func() (err error) {
		forger, err = anyone.ListenPacket(n.Context(), "udp", victim.LocalAddr().String())
		return err
	}))
	defer forger.Close()
	eventually(n.T, fmt.Sprintf("%s asked in the name of %s: %t", to, as, want), func() error {
		answered := false
		for range 5 {
			_, _ = forger.WriteTo([]byte("?"), &net.UDPAddr{IP: net.ParseIP(to), Port: 7}) // it may be told that it must not
			_ = victim.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if _, _, err := victim.ReadFrom(make([]byte, 8)); err == nil {
				answered = true
			}
		}
		if answered != want {
			return fmt.Errorf("it is %t", answered)
		}
		return nil
	})
}

// counts waits until the agent has counted something of the kind for the policy of ingress.
func (n *node) counts(what string) {
	n.Helper()
	metric := regexp.MustCompile(`(?m)^sluice_policy_` + what + `_total{direction="ingress",policy="NetworkPolicy ns/p"} [1-9]`)
	eventually(n.T, "a metric of "+what, func() error {
		n.ok(os.WriteFile(filepath.Join(n.dir, "metrics-wanted"), nil, 0o600))
		text, err := os.ReadFile(filepath.Join(n.dir, "metrics"))
		if err == nil && !metric.Match(text) {
			err = fmt.Errorf("there is none in\n%s", text)
		}
		return err
	})
}

// chains are the rules in a namespace, as nft lists them.
func (n *node) chains(netns string) (text string) {
	n.Helper()
	n.ok(in(netns, func() error {
		out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
		text = string(out)
		return err
	}))
	return text
}

var version = regexp.MustCompile(`\.v\d+\.|packets \d+ bytes \d+`)

// versionless are the sorted lines of rules without what is new in each version of them.
func versionless(rules string) []string {
	lines := strings.Split(version.ReplaceAllString(rules, ""), "\n")
	slices.Sort(lines)
	return lines
}

// anyPod is an API server that has every pod of the namespace ns, whose label pod is its
// name, and whose interfaces are all on network blue.
type anyPod struct{}

func (anyPod) Synced() bool { return true }

func (anyPod) Missing() error { return nil }

func (anyPod) Known(namespace, name string) (*cluster.Pod, bool) {
	return &cluster.Pod{
		Pod:         policy.Pod{Namespace: namespace, Name: name, UID: "uid", Node: "node", Labels: map[string]string{"pod": name}},
		Annotations: map[string]string{nadv1.NetworkAttachmentAnnot: "blue,blue,blue@p0"},
	}, true
}

func (a anyPod) Pod(_ context.Context, namespace, name, _ string, _ time.Duration) (*cluster.Pod, error) {
	p, _ := a.Known(namespace, name)
	return p, nil
}

// policies writes what the node's agent enforces.
func (n *node) policies(list string) {
	n.Helper()
	n.ok(os.WriteFile(filepath.Join(n.dir, "policies.json"), []byte(list), 0o600))
}

// ingress is a list with one NetworkPolicy, by which only the pod from may talk to pod to,
// and only by UDP on port 7.
func ingress(to, from string) string {
	return fmt.Sprintf(`[{"metadata":{"namespace":"ns","name":"p"},"spec":{"podSelector":{"matchLabels":{"pod":%q}},
		"ingress":[{"from":[{"podSelector":{"matchLabels":{"pod":%q}}}],"ports":[{"protocol":"UDP","port":7}]}]}}]`, to, from)
}

// What policy no longer allows goes on, or is cut if the network says so.
func TestNetnsKeepConnections(t *testing.T) { existingConnections(t, "keep") }
func TestNetnsCutConnections(t *testing.T)  { existingConnections(t, "cut") }

func existingConnections(t *testing.T, existing string) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	n.policies(ingress("a", "b"))
	n.ok(os.WriteFile(filepath.Join(n.dir, "existing-connections"), []byte(existing), 0o600))
	n.agent = startAgent(t, n.dir, -1)
	a := n.request("a", `"deviceID":"p0-0"`, "10.20.1.1/16")
	b := n.request("b", `"deviceID":"p0-1"`, "10.20.1.2/16")
	for _, req := range []wire.Request{a, b} {
		if _, err := n.pod(req); err != nil {
			t.Fatal(err)
		}
	}
	n.echo(a.Netns, "10.20.1.1")
	var flow net.Conn
	n.ok(in(b.Netns, func() (err error) { flow, err = net.Dial("udp", "10.20.1.1:7"); return err }))
	defer flow.Close()
	answered := func() (err error) {
		for range 20 {
			if _, err = flow.Write([]byte("?")); err == nil {
				_ = flow.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
				if _, err = flow.Read(make([]byte, 8)); err == nil {
					return nil
				}
			}
		}
		return err
	}
	n.ok(answered())
	n.policies(ingress("a", "nobody"))
	n.passes("one that begins", b.Netns, "10.20.1.1", false)
	for { // answers to what was sent before
		_ = flow.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := flow.Read(make([]byte, 8)); err != nil {
			break
		}
	}
	if err := answered(); (err == nil) != (existing == "keep") {
		t.Errorf("one that goes on: %v", err)
	}
}

// TestNetnsPolicy has packets pass, or not, as the policies say that come, change and go
// while pods run.
func TestNetnsPolicy(t *testing.T) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	n.policies(ingress("a", "b"))
	n.agent = startAgent(t, n.dir, -1)
	a := n.request("a", `"deviceID":"p0-0"`, "10.20.1.1/16", "fd20::11/64")
	b := n.request("b", `"deviceID":"p0-1"`, "10.20.1.2/16", "fd20::12/64")
	c := n.request("c", `"deviceID":"p1-0"`, "10.20.1.3/16", "fd20::13/64")
	for _, req := range []wire.Request{a, b, c} {
		r, err := n.pod(req)
		if err != nil {
			t.Fatal(err)
		}
		for _, ip := range r.IPs {
			n.echo(req.Netns, ip.Address.IP.String())
		}
	}
	n.echo(n.station, "10.20.0.1")
	passes := n.passes
	for _, family := range []string{"10.20.1.1", "fd20::11"} {
		passes("b may", b.Netns, family, true)
		passes("b may", c.Netns, family, false)
		passes("b may", n.station, family, false)
	}
	passes("egress is not isolated", a.Netns, "10.20.0.1", true)
	passes("another pod", c.Netns, "10.20.1.2", true)
	if a, b, c := n.tables(a.Netns), n.tables(b.Netns), n.tables(c.Netns); a == 0 || b == 0 || c == 0 {
		t.Errorf("tables: a %d, b %d, c %d", a, b, c)
	}
	n.forges(c.Netns, b.Netns, "10.20.1.2", "10.20.1.1", false)

	for _, metric := range []string{"hits", "dropped_packets"} {
		n.counts(metric)
	}

	n.policies(ingress("a", "c"))
	passes("c may", c.Netns, "10.20.1.1", true)
	passes("c may", b.Netns, "10.20.1.1", false)

	// The next agent goes on where this one was killed.
	n.ok(n.agent.cmd.Process.Kill())
	_ = n.agent.cmd.Wait()
	passes("no agent", b.Netns, "10.20.1.1", false)
	n.policies(ingress("a", "b"))
	n.agent = startAgent(t, n.dir, -1)
	passes("b may again", b.Netns, "10.20.1.1", true)
	passes("b may again", c.Netns, "10.20.1.1", false)

	n.policies(`[]`)
	passes("no policy", c.Netns, "10.20.1.1", true)
	passes("no policy", n.station, "fd20::11", true)
	eventually(t, "no rules", func() error {
		for _, req := range []wire.Request{a, b, c} {
			if n.tables(req.Netns) > 0 {
				return fmt.Errorf("%s has some", req.Netns)
			}
		}
		return nil
	})
	n.forges(c.Netns, b.Netns, "10.20.1.2", "10.20.1.1", true)
	n.policies(ingress("a", "b"))
	passes("b may at last", c.Netns, "10.20.1.1", false)
	for _, req := range []wire.Request{a, b, c} {
		n.del(req)
	}
	n.clean("DEL")
}
