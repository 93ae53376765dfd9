//go:build lab

package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/sluice-network/sluice/internal/host"
)

// TestLabPolicyOnPodsFromBeforeSluice: VFs that sriov-cni left in pods are under policy from
// the agent's start, and come home when their pods go.
func TestLabPolicyOnPodsFromBeforeSluice(t *testing.T) {
	l, dir, leases, pods := newLab(t), t.TempDir(), t.TempDir(), t.TempDir()
	n := &node{T: t, dir: dir}
	write := func(content string, path ...string) {
		file := filepath.Join(append([]string{dir}, path...)...)
		n.ok(errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(content), 0o600)))
	}
	if wire, err := netlink.LinkByName("wire0"); err == nil { // by which the emulated NIC has a link
		n.ok(netlink.LinkSetUp(wire))
	}
	netns := map[string]string{}
	config := func(i int, more string) []byte {
		return conf(l.vfs[i], fmt.Sprintf(`,"ipam":{"type":"testipam","dir":%q}%s`, leases, more))
	}
	for i, name := range []string{"a", "b", "c"} {
		netns[name] = newPod(t, pods, name)
		vf := l.vfs[i]
		ref, err := l.kernel.VF(vf)
		n.ok(err)
		link, err := l.kernel.Link(nil, ref.Name)
		n.ok(err)
		ns, err := host.OpenNetns(netns[name])
		n.ok(err)
		n.ok(l.kernel.ChangeLink(t.Context(), nil, link.Index, host.LinkChange{To: ns, Name: "net1", State: host.SetUp}))
		ns.Close()
		n.ok(inside(netns[name], func(h *netlink.Handle) error {
			dev, err := h.LinkByName("net1")
			return errors.Join(err, h.AddrAdd(dev, must(netlink.ParseAddr(fmt.Sprintf("10.20.1.%d/16", i+1)))))
		}))
		write(string(config(i, fmt.Sprintf(`,"OrigVfState":{"HostIFName":%q,"EffectiveMAC":%q,"AdminMAC":"00:00:00:00:00:00","MTU":1500}`, ref.Name, link.MAC))), "sriov-cni", name+"-net1")
		write(netns[name], "sriov-cni", "pci", vf)
		write("ns/"+name, "allocated", vf)
		n.echo(netns[name], fmt.Sprintf("10.20.1.%d", i+1))
	}
	n.passes("before Sluice", netns["c"], "10.20.1.1", true)
	n.policies(ingress("a", "b"))
	a := startAgent(t, dir, -1)
	n.passes("b may", netns["b"], "10.20.1.1", true)
	n.passes("b may", netns["c"], "10.20.1.1", false)
	n.forges(netns["c"], netns["b"], "10.20.1.2", "10.20.1.1", false)
	n.policies(`[]`)
	n.passes("no policy", netns["c"], "10.20.1.1", true)
	n.forges(netns["c"], netns["b"], "10.20.1.2", "10.20.1.1", true)
	n.policies(ingress("a", "b"))
	n.passes("b may again", netns["c"], "10.20.1.1", false)
	for i, name := range []string{"a", "b", "c"} {
		req := l.request("DEL", i, name, netns[name], leases)
		req.Stdin = config(i, "")
		_, err := a.call(req)
		n.ok(err)
		if tables := n.tables(netns[name]); tables > 0 {
			t.Errorf("%s has %d tables left", name, tables)
		}
	}
	l.atHome(t, "DEL")
}
