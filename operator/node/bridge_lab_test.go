//go:build lab

package node

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/ovsdb"
	"github.com/sluice-network/sluice/internal/ovsdb/ovstest"
)

// A NIC in switchdev mode becomes the uplink of a bridge in a real Open vSwitch, beside the
// representors of pods' VFs, and is given back once these are gone.
func TestLabBridge(t *testing.T) {
	l := switchdevLab(t, host.Legacy, 0)
	o := ovstest.New(t)
	o.StartSwitch()
	l.stop()
	l.ovs = &ovsdb.Client{Socket: o.Socket}
	l.restart()
	want := onNIC0("standalone")
	spec := func(bridge *v1.OVSConfigExt, interfaces ...v1.Interface) {
		l.server.mu.Lock()
		l.server.state.Spec.Bridges.OVS = nil
		if bridge != nil {
			l.server.state.Spec.Bridges.OVS = []v1.OVSConfigExt{*bridge}
		}
		l.server.mu.Unlock()
		l.server.spec(interfaces...)
	}
	spec(want, inMode("switchdev", 2))
	l.looks("switchdev", 2)
	if port := o.Ctl("get", "Interface", "ens1f0", "ofport"); port == "[]" || port == "-1" {
		t.Errorf("the uplink has port %s", port)
	}
	run(t, "ip", "link", "show", onBridge)

	pf := l.read(nic0)
	for i, vf := range pf.VFs {
		pod := fmt.Sprintf("pod%d", i)
		o.Ctl("add-port", onBridge, vf.Representor)
		run(t, "ip", "link", "set", vf.Representor, "up")
		run(t, "ip", "netns", "add", pod)
		t.Cleanup(func() { run(t, "ip", "netns", "del", pod) })
		run(t, "ip", "link", "set", vf.Name, "netns", pod, "name", "net1")
		run(t, "ip", "-n", pod, "addr", "add", fmt.Sprintf("192.0.2.%d/24", i+1), "dev", "net1")
		run(t, "ip", "-n", pod, "link", "set", "net1", "up")
		l.usage.set(vf.PCIAddress, "default/"+pod)
	}
	l.agent.HolderChanged()
	run(t, "ip", "netns", "exec", "pod0", "ping", "-c", "3", "-i", "0.1", "-W", "5", "192.0.2.2")
	transfer(t, "pod1", "192.0.2.1", "pod0", 4<<20)

	spec(nil)
	l.until("pods keep the bridge", func(s v1.SriovNetworkNodeStateStatus) error {
		if !slices.ContainsFunc(s.Pending, func(c v1.PendingChange) bool {
			return c.Operation == "RemoveBridge "+onBridge+" on "+nic0 && len(c.Pods) == 2
		}) || o.Ctl("list-br") != onBridge {
			return fmt.Errorf("pending %+v", s.Pending)
		}
		return nil
	})
	for i, vf := range pf.VFs {
		run(t, "ip", "-n", fmt.Sprintf("pod%d", i), "link", "set", "net1", "netns", "1", "name", vf.Name)
		l.usage.set(vf.PCIAddress, "")
	}
	l.agent.HolderChanged()
	l.succeeded("given up", "0/0")
	if left := o.Ctl("list-br"); left != "" {
		t.Errorf("left is bridge %s", left)
	}
	if pf := l.read(nic0); pf.Eswitch != host.Legacy {
		t.Errorf("not what it was: %+v", pf)
	}
}

// transfer sends bytes by TCP from one network namespace to an address in another.
func transfer(t *testing.T, from, address, to string, bytes int64) {
	t.Helper()
	var listener net.Listener
	within(t, to, func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(address, "0"))
		return err
	})
	defer listener.Close()
	got := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			defer conn.Close()
			_, err = io.CopyN(io.Discard, conn, bytes)
		}
		got <- err
	}()
	within(t, from, func() error {
		conn, err := net.DialTimeout("tcp", listener.Addr().String(), 10*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		_, err = conn.Write(make([]byte, bytes))
		return errors.Join(err, <-got)
	})
}
