package nft

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// Whatever somebody does to the rules is noticed, told and put right, by an event each.
func TestTampering(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "a", "b")
	a, b := w.pods["a"], w.pods["b"]
	pod, parent := openPod(t, a), openParent(t, w)
	if err := pod.Apply(a.iface(), only(open80, b), openTo, 5); err != nil {
		t.Fatal(err)
	}
	if err := parent.Apply(a.iface(), only(open80, b), openTo, 5); err != nil {
		t.Fatal(err)
	}
	told := make(chan Tampering, 100)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- pod.Watch(ctx, a.ns, func(t Tampering) { told <- t }) }()
	go func() { ended <- parent.Watch(ctx, w.node, func(t Tampering) { told <- t }) }()
	t.Cleanup(func() {
		stop()
		for range 2 {
			if err := <-ended; err != nil {
				t.Errorf("watching ended: %v", err)
			}
		}
	})
	waitForWatcher(t, a.ns)
	waitForWatcher(t, w.node)
	element := fmt.Sprintf("%s : accept", w.pods["wire"].v4)
	for _, c := range []struct{ where, what string }{
		{"pod", "flush ruleset"},
		{"pod", "delete table inet sluice-net1"},
		{"pod", "delete table netdev sluice-net1"},
		{"pod", "flush chain inet sluice-net1 input"},
		{"pod", "insert rule inet sluice-net1 input accept"},
		{"pod", "add table inet sluice-net1 { flags dormant; }"},
		{"pod", "add element inet sluice-net1 %s { " + element + " }"},
		{"pod", "add chain inet sluice-net1 mine { type filter hook input priority -5; policy drop; }"},
		{"node", "flush ruleset"},
		{"node", "flush chain netdev sluice-p0 receivers"},
		{"node", "flush map netdev sluice-p0 to"},
	} {
		t.Run(c.where+" "+c.what, func(t *testing.T) {
			where, key, states := a, "net1", pod.engine
			if c.where == "node" {
				where, key, states = &station{ns: w.node}, macPrefix(a.mac), parent.engine
			}
			states.mu.Lock()
			peers := peerMap(states.states[key].table, states.states[key].prefix, policy.Ingress, 0, single).name
			states.mu.Unlock()
			if element != "" && c.what[:3] == "add" && c.what[4] == 'e' {
				c.what = fmt.Sprintf(c.what, peers)
			}
			nft(t, where, c.what)
			select {
			case got := <-told:
				if got.Err != nil || got.Interface.MAC != a.mac || got.Process != "nft" {
					t.Errorf("told %+v", got)
				}
			case <-time.After(30 * time.Second):
				t.Fatal("nothing is told")
			}
			w.TB = t
			w.expect(cells([2]string{"b", "a"}, [2]string{"wire", "a"}), func(c cell, source, _ netip.Addr) bool {
				return only(open80, b).Allows(source, c.protocol, c.port)
			})
			if g, held, err := pod.Generation(a.iface()); g != 5 || !held || err != nil {
				t.Errorf("generation %d, %v, %v", g, held, err)
			}
		})
	}
	// What others do to what is theirs is none of its business, nor is its own work.
	nft(t, a, "add table inet mine")
	if err := pod.Apply(a.iface(), denied, denied, 6); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-told:
		t.Errorf("told %+v", got)
	case <-time.After(300 * time.Millisecond):
	}
}

// waitForWatcher waits until a socket of the namespace gets the events of nf_tables: what
// is changed from then on is told, and nothing else.
func waitForWatcher(t *testing.T, ns *host.Netns) {
	t.Helper()
	eventually(t, "a watcher of nf_tables", func() bool {
		var sockets []byte
		if err := ns.Do(func() (err error) {
			sockets, err = os.ReadFile("/proc/thread-self/net/netlink")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(sockets)) {
			// The columns are the kernel's address, protocol, port, groups and more.
			f := strings.Fields(line)
			groups, err := strconv.ParseUint(f[3], 16, 32)
			if err == nil && f[1] == strconv.Itoa(unix.NETLINK_NETFILTER) && groups&(1<<(unix.NFNLGRP_NFTABLES-1)) != 0 {
				return true
			}
		}
		return false
	})
}
