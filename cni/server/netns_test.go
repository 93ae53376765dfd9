package server

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/host"
)

// These have this machine's kernel for a node: MacVLAN needs no NIC. Each test is a
// process in a network namespace of its own, which is the host's for it and for its
// agents. There are two NICs, p0 and p1, on a switch, and a station on it besides.

// node is the node of a test.
type node struct {
	*testing.T
	kernel  *host.Attacher
	agent   *agentProcess
	dir     string // of the agent
	leases  string
	bin     string
	pods    string
	station string // network namespace of the other station, with 10.20.0.1, 10.20.0.2 and fd20::1 on link wire
}

// netnsTest runs the rest of the test in a process with a network namespace of its
// own; false when that was done.
func netnsTest(t *testing.T) bool {
	t.Helper()
	if os.Getenv("SLUICE_TEST_NETNS") != "" {
		return true
	}
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	args := []string{"-test.run", "^" + t.Name() + "$", "-test.v=" + strconv.FormatBool(testing.Verbose()), "-test.timeout", "30m"}
	c := exec.Command("/proc/self/exe", args...)
	c.Env = append(os.Environ(), "SLUICE_TEST_NETNS=1")
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	out, err := c.CombinedOutput()
	if testing.Verbose() || err != nil {
		t.Logf("%s", out)
	}
	if err != nil {
		t.Error(err)
	}
	return false
}

// ok ends the test on an error.
func (n *node) ok(errs ...error) {
	n.Helper()
	if err := errors.Join(errs...); err != nil {
		n.Fatal(err)
	}
}

// newNode makes the node of a test.
func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{T: t, dir: t.TempDir(), leases: t.TempDir(), bin: pluginDir(t), pods: t.TempDir()}
	kernel, err := host.OpenAttacher(host.DefaultSysfs)
	n.ok(err)
	n.kernel = kernel
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	n.ok(err)
	defer h.Close()
	n.station = newPod(t, n.pods, "station")
	ns, err := host.OpenNetns(n.station)
	n.ok(err)
	defer ns.Close()
	wireNS, err := os.Open(n.station)
	n.ok(err)
	defer wireNS.Close()
	lo, err := h.LinkByName("lo")
	n.ok(err, h.LinkSetUp(lo))
	sw := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "switch"}}
	n.ok(h.LinkAdd(sw), h.LinkSetUp(sw))
	for _, nic := range []string{"p0", "p1", "wire"} {
		port := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "s-" + nic, MasterIndex: sw.Index, Flags: net.FlagUp}, PeerName: nic}
		if nic == "wire" {
			port.PeerNamespace = netlink.NsFd(int(wireNS.Fd()))
		}
		n.ok(h.LinkAdd(port))
		if nic != "wire" {
			l, err := h.LinkByName(nic)
			n.ok(err, h.LinkSetUp(l))
		}
	}
	n.ok(inside(n.station, func(h *netlink.Handle) error {
		l, err := h.LinkByName("wire")
		if err != nil {
			return err
		}
		v4, v6 := must(netlink.ParseAddr("10.20.0.1/16")), must(netlink.ParseAddr("fd20::1/64"))
		v6.Flags = unix.IFA_F_NODAD
		return errors.Join(h.LinkSetUp(l), h.AddrAdd(l, v4), h.AddrAdd(l, must(netlink.ParseAddr("10.20.0.2/16"))), h.AddrAdd(l, v6))
	}))
	return n
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// request is a call for a MacVLAN sub-interface with the given keys, and the IPAM
// result of the addresses, the first of each family with the station for its gateway.
func (n *node) request(container, keys string, addresses ...string) wire.Request {
	n.Helper()
	var ips []string
	gateways := map[bool]string{false: `,"gateway":"10.20.0.1"`, true: `,"gateway":"fd20::1"`}
	for _, a := range addresses {
		v6 := strings.Contains(a, ":")
		ips = append(ips, fmt.Sprintf(`{"address":%q%s}`, a, gateways[v6]))
		delete(gateways, v6)
	}
	if !strings.Contains(keys, `"type"`) {
		keys += `,"type":"sluice"`
	}
	if len(ips) > 0 {
		keys += fmt.Sprintf(`,"ipam":{"type":"testipam","dir":%q,"result":{"cniVersion":"1.0.0","ips":[%s]}}`, n.leases, strings.Join(ips, ","))
	}
	return wire.Request{
		Command: "ADD", ContainerID: container, IfName: "net1", Netns: filepath.Join(n.pods, container), Path: n.bin,
		Args:  "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=" + container,
		Stdin: fmt.Appendf(nil, `{"cniVersion":"1.1.0","name":"blue",%s}`, keys),
	}
}

// pod makes a pod with the sub-interface that the request is for.
func (n *node) pod(req wire.Request) (*types100.Result, error) {
	n.Helper()
	if _, err := os.Stat(req.Netns); err != nil {
		newPod(n.T, n.pods, filepath.Base(req.Netns))
	}
	out, err := n.agent.call(req)
	if err != nil {
		return nil, err
	}
	r, err := types100.NewResult(out)
	n.ok(err)
	check := req
	check.Command, check.Stdin = "CHECK", []byte(strings.TrimSuffix(string(req.Stdin), "}")+`,"prevResult":`+string(out)+"}")
	if _, err := n.agent.call(check); err != nil {
		n.Errorf("CHECK of %s: %v", req.ContainerID, err)
	}
	return r.(*types100.Result), nil
}

// del deletes what the request is for, twice.
func (n *node) del(req wire.Request) {
	n.Helper()
	req.Command = "DEL"
	for range 2 {
		if _, err := n.agent.call(req); err != nil {
			n.Errorf("DEL of %s: %v", req.ContainerID, err)
		}
	}
}

// links are the names of all links of a namespace but those of every namespace.
func (n *node) links(netns string) (names []string) {
	n.Helper()
	n.ok(inside(netns, func(h *netlink.Handle) error {
		all, err := h.LinkList()
		for _, l := range all {
			if l.Attrs().Name != "lo" && l.Attrs().Name != "sit0" && l.Attrs().Name != "ip6tnl0" {
				names = append(names, l.Attrs().Name)
			}
		}
		return err
	}))
	slices.Sort(names)
	return names
}

// rules counts the routing rules of a namespace beyond the kernel's.
func (n *node) rules(netns string) (more int) {
	n.Helper()
	n.ok(inside(netns, func(h *netlink.Handle) error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rules, err := h.RuleList(family)
			if err != nil {
				return err
			}
			for _, r := range rules {
				if r.Src != nil {
					more++
				}
			}
		}
		return nil
	}))
	return more
}

// tables counts the tables of nf_tables in a namespace.
func (n *node) tables(netns string) int {
	n.Helper()
	var messages [][]byte
	n.ok(in(netns, func() (err error) {
		r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP)
		r.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_UNSPEC, Version: nl.NFNETLINK_V0})
		messages, err = r.Execute(unix.NETLINK_NETFILTER, 0)
		return err
	}))
	return len(messages)
}

// clean fails unless nothing of any attachment is left.
func (n *node) clean(when string) {
	n.Helper()
	if files, _ := filepath.Glob(filepath.Join(n.leases, "*")); len(files) > 0 {
		n.Errorf("%s: leases left: %v", when, files)
	}
	if files, _ := filepath.Glob(filepath.Join(n.dir, "attachments", "*")); len(files) > 0 {
		n.Errorf("%s: records left: %v", when, files)
	}
	for _, l := range n.links("/proc/self/ns/net") {
		if strings.HasPrefix(l, "sl") {
			n.Errorf("%s: link %s is left", when, l)
		}
	}
	if tables := n.tables("/proc/self/ns/net"); tables > 0 {
		n.Errorf("%s: the host has %d tables of nf_tables", when, tables)
	}
	pods, _ := filepath.Glob(filepath.Join(n.pods, "*"))
	for _, pod := range pods {
		if pod == n.station {
			continue
		}
		if links, rules, tables := n.links(pod), n.rules(pod), n.tables(pod); len(links) > 0 || rules > 0 || tables > 0 {
			n.Errorf("%s: pod %s has links %v, %d rules and %d tables of nf_tables", when, filepath.Base(pod), links, rules, tables)
		}
	}
}

// in runs f in a namespace.
func in(netns string, f func() error) error {
	ns, err := host.OpenNetns(netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(f)
}

// echo answers UDP on the address, in a namespace, with what it was asked.
func (n *node) echo(netns, address string) {
	n.Helper()
	var conn net.PacketConn
	n.ok(in(netns, func() (err error) {
		conn, err = net.ListenPacket("udp", net.JoinHostPort(address, "7"))
		return err
	}))
	n.Cleanup(func() { conn.Close() })
	go func() {
		b := make([]byte, 64)
		for {
			size, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(b[:size], from)
		}
	}()
}

// ask asks the address, from a namespace, until it answers or two seconds have
// passed. An answer from another address does not count.
func ask(netns, address string) error {
	return in(netns, func() error {
		conn, err := net.Dial("udp", net.JoinHostPort(address, "7"))
		if err != nil {
			return err
		}
		defer conn.Close()
		for range 20 {
			if _, err = conn.Write([]byte("?")); err == nil {
				_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
				if _, err = conn.Read(make([]byte, 8)); err == nil {
					return nil
				}
			}
			time.Sleep(5 * time.Millisecond)
		}
		return fmt.Errorf("%s asked from %s: %w", address, filepath.Base(netns), err)
	})
}

func TestNetnsMacvlan(t *testing.T) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	n.agent = startAgent(t, n.dir, -1)
	a := n.request("a", `"deviceID":"p0-0"`, "10.20.1.1/16", "fd20::11/64")
	b := n.request("b", `"deviceID":"p0-1","mtu":1400,"bcqueuelen":2000`, "10.20.1.2/16", "fd20::12/64")
	// The host has links of the names p0 and p1 itself.
	c := n.request("c", `"type":"macvlan","master":"p1","mac":"02:00:00:00:0c:01"`, "10.20.1.3/16", "fd20::13/64")
	c.IfName = "p0"
	for _, req := range []wire.Request{a, b, c} {
		r, err := n.pod(req)
		if err != nil {
			t.Fatal(err)
		}
		ns := must(host.OpenNetns(req.Netns))
		l, err := n.kernel.Link(ns, req.IfName)
		ns.Close()
		i := r.Interfaces[0]
		if err != nil || i.Name != req.IfName || i.Mac != l.MAC.String() || i.Mtu != l.MTU || !l.Up || l.Kind != "macvlan" || len(r.IPs) != 2 {
			t.Errorf("%s: result %+v, link %+v, %v", req.ContainerID, i, l, err)
		}
		if want := map[string]int{"b": 1400}[req.ContainerID]; want != 0 && l.MTU != want {
			t.Errorf("%s has MTU %d", req.ContainerID, l.MTU)
		}
		if req.ContainerID == "c" && i.Mac != "02:00:00:00:0c:01" {
			t.Errorf("c has MAC %s", i.Mac)
		}
		for _, ip := range r.IPs {
			n.echo(req.Netns, ip.Address.IP.String())
		}
	}
	// in the parent, from one parent to the other, and from the wire
	for from, to := range map[string][]string{
		a.Netns:   {"10.20.1.2", "fd20::12", "10.20.1.3", "fd20::13"},
		c.Netns:   {"10.20.1.1", "fd20::11"},
		n.station: {"10.20.1.1", "10.20.1.2", "10.20.1.3", "fd20::13"},
	} {
		for _, address := range to {
			if err := ask(from, address); err != nil {
				t.Error(err)
			}
		}
	}
	// On the interface that the pod has already.
	inner := n.request("a", `"master":"net1","linkInContainer":true`, "10.20.1.5/16")
	inner.IfName = "net2"
	if _, err := n.pod(inner); err != nil {
		t.Error(err)
	} else {
		n.echo(inner.Netns, "10.20.1.5")
		n.ok(ask(c.Netns, "10.20.1.5"))
	}
	n.del(inner)
	// The same slot for another pod.
	if _, err := n.pod(n.request("d", `"deviceID":"p0-0"`, "10.20.1.4/16")); err == nil || !strings.Contains(err.Error(), "the slot is held by pod ns/a") {
		t.Errorf("slot of another pod: %v", err)
	}
	for _, req := range []wire.Request{a, b, c} {
		n.del(req)
	}
	n.clean("DEL")
}

func TestNetnsMacvlanRefusals(t *testing.T) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	n.agent = startAgent(t, n.dir, -1)
	mac := ""
	n.ok(inside(n.station, func(h *netlink.Handle) error {
		l, err := h.LinkByName("wire")
		mac = l.Attrs().HardwareAddr.String()
		return err
	}))
	shared, alone := n.request("shared", `"deviceID":"p0-0"`), n.request("alone", `"deviceID":"p1-0","mode":"passthru"`)
	for _, req := range []wire.Request{shared, alone} {
		if _, err := n.pod(req); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		req  wire.Request
		says []string
	}{
		"address in use":      {n.request("x", `"deviceID":"p0-1"`, "10.20.1.1/16", "10.20.0.2/16"), []string{`"code":107`, "10.20.0.2 is in use", mac}},
		"IPv6 address in use": {n.request("x", `"deviceID":"p0-1"`, "fd20::1/64"), []string{`"code":107`, "fd20::1 is in use", mac}},
		"passthru of many":    {n.request("x", `"deviceID":"p0-1","mode":"passthru"`), []string{`"code":103`, "needs the parent for itself", "invalid argument"}},
		"parent of one":       {n.request("x", `"deviceID":"p1-1"`), []string{`"code":103`, "in mode passthru, which has it for itself"}},
		"port of a bridge":    {n.request("x", `"master":"s-p0"`), []string{`"code":103`, "may belong to a bond or bridge", "busy"}},
		"no such parent":      {n.request("x", `"master":"p7"`), []string{`"code":101`, "the host has no link p7"}},
		"MTU of the parent":   {n.request("x", `"master":"p0","mtu":9000`), []string{`"code":7`, "mtu 9000 is above that of parent p0, 1500"}},
		"not Ethernet":        {n.request("x", `"master":"lo"`), []string{`"code":101`, "parent lo is no Ethernet link"}},
		"MAC in use":          {n.request("x", `"master":"p0","mac":"`+n.macOf(shared)+`"`), []string{`"code":103`, "another sub-interface of it, has this MAC"}},
	} {
		_, err := n.pod(c.req)
		for _, say := range c.says {
			if err == nil || !strings.Contains(err.Error(), say) || !strings.Contains(err.Error(), "blue") {
				t.Errorf("%s: %v lacks %q", name, err, say)
			}
		}
		if links := n.links(c.req.Netns); len(links) > 0 {
			t.Errorf("%s: the pod has %v", name, links)
		}
	}
	// Without the probe the address is taken as it is.
	late := n.request("late", `"deviceID":"p0-2","conflictProbe":0`, "10.20.0.2/16")
	if _, err := n.pod(late); err != nil {
		t.Errorf("without probe: %v", err)
	}
	for _, req := range []wire.Request{shared, alone, late} {
		n.del(req)
	}
	n.clean("DEL")
}

func (n *node) macOf(req wire.Request) (mac string) {
	n.Helper()
	n.ok(inside(req.Netns, func(h *netlink.Handle) error {
		l, err := h.LinkByName(req.IfName)
		mac = l.Attrs().HardwareAddr.String()
		return err
	}))
	return mac
}

// TestNetnsReplies has a pod with two interfaces in one subnet, and a client beyond
// the router of it: answers leave by the interface the question came in by, and each
// interface answers for its own address only.
func TestNetnsReplies(t *testing.T) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	n.agent = startAgent(t, n.dir, -1)
	one := n.request("pod", `"deviceID":"p0-0"`, "10.20.1.1/16")
	two := n.request("pod", `"deviceID":"p1-0"`, "10.20.1.2/16")
	two.IfName = "net2"
	macs := map[string]string{}
	for address, req := range map[string]wire.Request{"10.20.1.1": one, "10.20.1.2": two} {
		r, err := n.pod(req)
		if err != nil {
			t.Fatal(err)
		}
		macs[address] = r.Interfaces[0].Mac
		n.echo(req.Netns, address)
	}
	// The client is the station under an address that is in no subnet of the pod.
	n.ok(inside(n.station, func(h *netlink.Handle) error {
		l, err := h.LinkByName("wire")
		if err != nil {
			return err
		}
		return errors.Join(h.AddrDel(l, must(netlink.ParseAddr("10.20.0.1/16"))), // and the second of its subnet with it
			h.AddrAdd(l, must(netlink.ParseAddr("10.20.0.1/32"))), h.AddrAdd(l, must(netlink.ParseAddr("192.0.2.9/32"))),
			h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: must(netlink.ParseIPNet("10.20.0.0/16")), Src: net.IPv4(192, 0, 2, 9), Scope: netlink.SCOPE_LINK}))
	}))
	sent := func() map[string]uint64 {
		count := map[string]uint64{}
		n.ok(inside(one.Netns, func(h *netlink.Handle) error {
			for _, name := range []string{"net1", "net2"} {
				l, err := h.LinkByName(name)
				if err != nil {
					return err
				}
				count[name] = l.Attrs().Statistics.TxPackets
			}
			return nil
		}))
		return count
	}
	for address, ifName := range map[string]string{"10.20.1.1": "net1", "10.20.1.2": "net2"} {
		n.ok(ask(n.station, address)) // so that the neighbours know each other
		before := sent()
		for range 20 {
			n.ok(ask(n.station, address))
		}
		after := sent()
		other := map[string]string{"net1": "net2", "net2": "net1"}[ifName]
		if after[ifName]-before[ifName] < 20 || after[other]-before[other] >= 20 {
			t.Errorf("%s: 20 answers sent %d packets by %s and %d by %s", address, after[ifName]-before[ifName], ifName, after[other]-before[other], other)
		}
		n.ok(inside(n.station, func(h *netlink.Handle) error {
			l, err := h.LinkByName("wire")
			if err != nil {
				return err
			}
			neighbours, err := h.NeighList(l.Attrs().Index, netlink.FAMILY_V4)
			for _, e := range neighbours {
				if e.IP.String() == address && e.HardwareAddr.String() != macs[address] {
					t.Errorf("%s is taken to be at %s, not at %s", address, e.HardwareAddr, macs[address])
				}
			}
			return err
		}))
	}
	// One goes, the other keeps its routing.
	n.del(one)
	n.ok(ask(n.station, "10.20.1.2"))
	if rules := n.rules(two.Netns); rules != 1 {
		t.Errorf("%d rules are left with one interface", rules)
	}
	n.del(two)
	n.clean("DEL")
}

// TestNetnsDefaultRoute: a second network does not take the default route.
func TestNetnsDefaultRoute(t *testing.T) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	n.agent = startAgent(t, n.dir, -1)
	defaultOf := func(pod string) (name string) {
		n.ok(inside(pod, func(h *netlink.Handle) error {
			routes, err := h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
			for _, r := range routes {
				if ones, _ := r.Dst.Mask.Size(); r.Dst == nil || ones == 0 {
					l, err := h.LinkByIndex(r.LinkIndex)
					if err != nil {
						return err
					}
					name += l.Attrs().Name
				}
			}
			return err
		}))
		return name
	}
	withDefault := func(req wire.Request) wire.Request {
		req.Stdin = bytes.Replace(req.Stdin, []byte(`"ips":[`), []byte(`"routes":[{"dst":"0.0.0.0/0"}],"ips":[`), 1)
		return req
	}
	first := withDefault(n.request("pod", `"deviceID":"p0-0"`, "10.20.1.1/16"))
	second := withDefault(n.request("pod", `"deviceID":"p1-0"`, "10.20.1.2/16"))
	second.IfName = "net2"
	for _, req := range []wire.Request{first, second} {
		if _, err := n.pod(req); err != nil {
			t.Fatal(err)
		}
		if got := defaultOf(req.Netns); got != "net1" {
			t.Errorf("after %s the default route is by %q", req.IfName, got)
		}
	}
	n.del(second)
	n.del(first)
	n.clean("DEL")
}

// TestNetnsHostInterface: the host and a pod whose only network is MacVLAN reach each
// other, and the pod reaches what the host has behind itself.
func TestNetnsHostInterface(t *testing.T) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	n.agent = startAgent(t, n.dir, -1)
	n.hostAddresses()
	// Strict reverse path filtering, as some distributions have it, on new links.
	n.ok(in(hostNS, func() error { return os.WriteFile("/proc/sys/net/ipv4/conf/default/rp_filter", []byte("1"), 0) }))
	for _, address := range []string{"192.0.2.7", "169.254.20.10", "fd99::7"} {
		n.echo(hostNS, address)
	}
	req := n.request("pod", `"deviceID":"p0-0","hostInterface":{"routes":["169.254.20.10/32","10.96.0.0/12"]}`, "10.20.1.1/16", "fd20::11/64")
	if _, err := n.pod(req); err != nil {
		t.Fatal(err)
	}
	n.echo(req.Netns, "10.20.1.1")
	n.echo(req.Netns, "fd20::11")
	for from, to := range map[string][]string{
		hostNS:    {"10.20.1.1", "fd20::11"},
		req.Netns: {"192.0.2.7", "169.254.20.10", "fd99::7"},
		n.station: {"10.20.1.1"}, // by its network, as ever
	} {
		for _, address := range to {
			if err := ask(from, address); err != nil {
				t.Error(err)
			}
		}
	}
	n.del(req)
	n.clean("DEL")
	// The pod ends first.
	if _, err := n.pod(req); err != nil {
		t.Fatal(err)
	}
	endPod(req.Netns)
	n.del(req)
	n.clean("DEL after the end of the pod")
}

const hostNS = "/proc/self/ns/net"

// hostAddresses gives the host addresses besides its networks.
func (n *node) hostAddresses() {
	n.Helper()
	n.ok(inside(hostNS, func(h *netlink.Handle) error {
		p1, err := h.LinkByName("p1")
		if err != nil {
			return err
		}
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		six := must(netlink.ParseAddr("fd99::7/64"))
		six.Flags = unix.IFA_F_NODAD
		// the node's own, a node-local DNS's
		return errors.Join(h.AddrAdd(p1, must(netlink.ParseAddr("192.0.2.7/24"))), h.AddrAdd(p1, six),
			h.AddrAdd(lo, must(netlink.ParseAddr("169.254.20.10/32"))),
			h.RouteAdd(&netlink.Route{LinkIndex: p1.Attrs().Index, Gw: net.IPv4(192, 0, 2, 1)}),
			h.RouteAdd(&netlink.Route{LinkIndex: p1.Attrs().Index, Gw: net.ParseIP("fd99::1"), Dst: must(netlink.ParseIPNet("::/0"))}))
	}))
}

// TestNetnsAgentKilledAtEachStep kills the agent (SIGKILL) at each step of ADD and of
// DEL. Its successor finds everything there or nothing.
func TestNetnsAgentKilledAtEachStep(t *testing.T) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	n.policies(`[{"metadata":{"namespace":"ns","name":"p"},"spec":{"policyTypes":["Ingress","Egress"]}}]`)
	for at, done := 0, false; !done; at++ {
		container := fmt.Sprintf("pod%d", at)
		add := n.request(container, `"deviceID":"p0-0","conflictProbe":2,"hostInterface":{"routes":["10.96.0.0/12"]}`, "10.20.1.1/16", "fd20::11/64")
		pod := newPod(t, n.pods, container)
		n.agent = startAgent(t, n.dir, at)
		_, err := n.agent.call(add)
		del := add
		del.Command = "DEL"
		if err == nil {
			_, err = n.agent.call(del)
		}
		done = err == nil
		step := ""
		if !done {
			_ = n.agent.cmd.Wait()
			if step = n.agent.step(); step == "" {
				t.Fatalf("the agent failed without being killed: %v", err)
			}
		} else {
			n.agent.stop()
		}
		n.agent = startAgent(t, n.dir, -1)
		files, _ := filepath.Glob(filepath.Join(n.dir, "attachments", "*.json"))
		t.Logf("killed at %-28q: attached %v", step, len(files) > 0)
		if len(files) == 0 {
			n.clean(fmt.Sprintf("killed at %q", step))
		}
		// The retry is checked, too: what was half there would be told.
		if _, err := n.pod(add); err != nil {
			t.Errorf("killed at %q: retry: %v", step, err)
		}
		n.del(add)
		n.clean(fmt.Sprintf("killed at %q, deleted", step))
		n.agent.stop()
		endPod(pod)
	}
}

// TestNetnsSoak attaches and deletes 200 sub-interfaces at once, again and again.
// Nothing is left behind, and the agent does not grow.
func TestNetnsSoak(t *testing.T) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	n.agent = startAgent(t, n.dir, -1)
	const pods = 200
	for i := range pods {
		newPod(t, n.pods, fmt.Sprintf("pod%d", i))
	}
	end := time.Now().Add(soak(t))
	var first, last usage
	rounds := 0
	for ; rounds < 2 || time.Now().Before(end); rounds++ {
		var all sync.WaitGroup
		var mu sync.Mutex
		macs := map[string]bool{}
		for i := range pods {
			req := n.request(fmt.Sprintf("pod%d", i), fmt.Sprintf(`"deviceID":"p%d-%d","conflictProbe":2`, i%2, i), fmt.Sprintf("10.20.2.%d/16", i), fmt.Sprintf("fd20::2:%x/64", i))
			all.Go(func() {
				var r types100.Result
				out, err := n.agent.insist(req)
				if err == nil {
					err = json.Unmarshal(out, &r)
				}
				if err != nil {
					t.Errorf("ADD %d: %v", i, err)
					return
				}
				mu.Lock()
				if macs[r.Interfaces[0].Mac] {
					t.Errorf("MAC %s twice", r.Interfaces[0].Mac)
				}
				macs[r.Interfaces[0].Mac] = true
				mu.Unlock()
				req.Command = "DEL"
				if _, err := n.agent.insist(req); err != nil {
					t.Errorf("DEL %d: %v", i, err)
				}
			})
		}
		all.Wait()
		n.clean(fmt.Sprintf("round %d", rounds))
		if t.Failed() {
			return
		}
		last = usageOf(t, n.agent.cmd.Process.Pid)
		if rounds == 0 {
			first = last
		}
	}
	t.Logf("%d rounds of %d: %+v after the first, %+v after the last", rounds, pods, first, last)
	notGrown(t, first, last)
}

// dhcpServer answers on the station's wire, an address of its own for each client: RFC
// 2131, what of it a client needs that asks for the first time and releases.
type dhcpServer struct {
	mu      sync.Mutex
	offered []string          // hardware addresses; the place is the end of the address
	leases  map[string]string // addresses by hardware address
}

func (n *node) dhcpServer() *dhcpServer {
	n.Helper()
	d := &dhcpServer{leases: map[string]string{}}
	var conn net.PacketConn
	var packets *os.File // of IPv4: who gives up an address sends from none, and no UDP socket hears that
	n.ok(in(n.station, func() error {
		raw, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(binary.NativeEndian.Uint16([]byte{0x08, 0})))
		if err != nil {
			return err
		}
		packets = os.NewFile(uintptr(raw), "packets")
		config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			_ = c.Control(func(fd uintptr) {
				err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1), unix.BindToDevice(int(fd), "wire"))
			})
			return err
		}}
		conn, err = config.ListenPacket(n.Context(), "udp4", ":67")
		return err
	}))
	n.Cleanup(func() { conn.Close(); packets.Close() })
	go func() {
		b := make([]byte, 1500)
		for {
			size, err := packets.Read(b)
			if err != nil {
				return
			}
			const header = 20 + 8 // of IPv4 and UDP
			if size < header || b[9] != unix.IPPROTO_UDP || binary.BigEndian.Uint16(b[22:]) != 67 {
				continue
			}
			if answer := d.answer(b[header:size]); answer != nil {
				_, _ = conn.WriteTo(answer, &net.UDPAddr{IP: net.IPv4bcast, Port: 68})
			}
		}
	}()
	return d
}

func (d *dhcpServer) answer(question []byte) []byte {
	const header = 240 // with the magic cookie
	if len(question) < header {
		return nil
	}
	kind := byte(0)
	for o := question[header:]; len(o) > 2 && o[0] != 255; o = o[2+int(o[1]):] {
		if o[0] == 53 { // message type
			kind = o[2]
		}
	}
	client := net.HardwareAddr(question[28:34]).String()
	d.mu.Lock()
	defer d.mu.Unlock()
	if kind == 7 { // RELEASE
		delete(d.leases, client)
		return nil
	}
	if !slices.Contains(d.offered, client) {
		d.offered = append(d.offered, client)
	}
	address := net.IPv4(10, 20, 3, byte(slices.Index(d.offered, client))).To4()
	if kind == 3 { // REQUEST
		d.leases[client] = address.String()
	}
	answer := bytes.Clone(question[:header])
	answer[0] = 2 // BOOTREPLY
	copy(answer[16:], address)
	answer = append(answer, 53, 1, map[byte]byte{1: 2, 3: 5}[kind], 54, 4, 10, 20, 0, 1, 51, 4, 0, 0, 14, 16) // OFFER or ACK, by whom, for an hour
	return append(answer, 1, 4, 255, 255, 0, 0, 3, 4, 10, 20, 0, 1, 255)                                      // mask, router
}

func (d *dhcpServer) has() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Values(d.leases))
}

// TestNetnsDHCP has the reference plugin dhcp with its daemon get addresses from a server on
// the wire, and give them back, also those of a pod that ended.
func TestNetnsDHCP(t *testing.T) {
	if !netnsTest(t) {
		return
	}
	n := newNode(t)
	server := n.dhcpServer()
	n.bin = built(t, "../../test/lab/node", "github.com/containernetworking/plugins/plugins/ipam/dhcp")
	socket := filepath.Join(n.dir, "dhcp.sock")
	daemon := exec.Command(filepath.Join(n.bin, "dhcp"), "daemon", "-socketpath", socket)
	n.ok(daemon.Start())
	t.Cleanup(func() { _ = daemon.Process.Kill(); _ = daemon.Wait() })
	eventually(t, "daemon", func() error { _, err := os.Stat(socket); return err })
	n.agent = startAgent(t, n.dir, -1)
	add := func(pod string) (wire.Request, string) {
		req := n.request(pod, fmt.Sprintf(`"master":"p0","ipam":{"type":"dhcp","daemonSocketPath":%q}`, socket))
		r, err := n.pod(req)
		n.ok(err)
		if len(r.IPs) != 1 || r.IPs[0].Gateway.String() != "10.20.0.1" || r.IPs[0].Address.Mask.String() != "ffff0000" {
			t.Fatalf("%+v", r)
		}
		return req, r.IPs[0].Address.IP.String()
	}
	n.echo(n.station, "10.20.0.1")
	one, address := add("one")
	_, other := add("two")
	if want := slices.Sorted(slices.Values([]string{address, other})); !slices.Equal(server.has(), want) {
		t.Errorf("the server has given %v, the pods have %v", server.has(), want)
	}
	n.ok(ask(one.Netns, "10.20.0.1"))
	n.del(one)
	released := func(left ...string) func() error {
		return func() error {
			if now := server.has(); !slices.Equal(now, left) {
				return fmt.Errorf("the server has %v", now)
			}
			return nil
		}
	}
	eventually(t, "release", released(other))

	// The runtime ends a pod, and asks for no DEL: the daemon is all that keeps its
	// namespace alive, and the agent's look at what is left has it let go.
	endPod(filepath.Join(n.pods, "two"))
	n.agent.stop()
	n.agent = startAgent(t, n.dir, -1)
	eventually(t, "release of a pod that ended", released())
	eventually(t, "empty journal", func() error {
		if files, _ := filepath.Glob(filepath.Join(n.dir, "attachments", "*")); len(files) > 0 {
			return fmt.Errorf("%v", files)
		}
		return nil
	})
	n.clean("the end")
}
