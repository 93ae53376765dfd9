//go:build lab

package server

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/sluice-network/sluice/cni/wire"
)

// TestLabVFsReturnByThemselves ends pods' namespaces without a DEL: the kernel gives
// their VFs back under the pods' names and with their settings, two of one name among
// them, and the agent puts them right and releases their addresses.
func TestLabVFsReturnByThemselves(t *testing.T) {
	l, dir, leases, pods := newLab(t), t.TempDir(), t.TempDir(), t.TempDir()
	a := startAgent(t, dir, -1)
	var ended []string
	for i, vf := range l.vfs {
		pod := newPod(t, pods, fmt.Sprintf("pod%d", i))
		if _, err := a.call(l.request("ADD", i, fmt.Sprintf("c%d", i), pod, leases)); err != nil {
			t.Fatal(err)
		}
		if err := inside(pod, func(h *netlink.Handle) error {
			dev, err := h.LinkByName("net1")
			if err != nil {
				return err
			}
			return h.LinkSetMTU(dev, 1300)
		}); err != nil {
			t.Fatal(err)
		}
		if l.state(t, vf) == l.home[vf] {
			t.Fatalf("%s has its baseline in the pod", vf)
		}
		ended = append(ended, pod)
	}
	begin := time.Now()
	for _, pod := range ended {
		endPod(pod)
	}
	eventually(t, "all VFs at their baseline, and no address held", func() error {
		for _, vf := range l.vfs {
			if now := l.state(t, vf); now != l.home[vf] {
				return fmt.Errorf("%s is %s", vf, now)
			}
		}
		if files, _ := filepath.Glob(filepath.Join(leases, "*")); len(files) > 0 {
			return fmt.Errorf("leases %v", files)
		}
		return nil
	})
	t.Logf("%d VFs were put right within %v of the end of their pods, without a DEL", len(l.vfs), time.Since(begin))
	// What comes late concerns nobody.
	for i := range l.vfs {
		if _, err := a.call(l.request("DEL", i, fmt.Sprintf("c%d", i), ended[i], leases)); err != nil {
			t.Error(err)
		}
	}
	l.atHome(t, "late DELs")
}

// TestLabWhatPodsDoToVFs: a pod bonds its VFs, sets them promiscuous and makes VLAN
// devices on them; DEL brings them home at their baseline all the same.
func TestLabWhatPodsDoToVFs(t *testing.T) {
	l, dir, leases := newLab(t), t.TempDir(), t.TempDir()
	pod := newPod(t, t.TempDir(), "pod")
	a := startAgent(t, dir, -1)
	var calls []wire.Request
	for i := range 2 {
		req := l.request("ADD", i, "c1", pod, leases)
		req.IfName = fmt.Sprintf("net%d", i+1)
		req.Stdin = conf(l.vfs[i], fmt.Sprintf(`,"promisc":true,"allmulti":true,"ipam":{"type":"testipam","dir":%q}`, leases))
		if _, err := a.call(req); err != nil {
			t.Fatal(err)
		}
		if dev, err := l.inPod(t, pod, req.IfName); err != nil || !dev.Promisc || !dev.AllMulti || !dev.Up {
			t.Errorf("%s: %+v, %v", req.IfName, dev, err)
		}
		calls = append(calls, req)
	}
	if err := inside(pod, func(h *netlink.Handle) error {
		bond := netlink.NewLinkBond(netlink.LinkAttrs{Name: "bond0"})
		bond.Mode, bond.FailOverMac = netlink.BOND_MODE_ACTIVE_BACKUP, netlink.BOND_FAIL_OVER_MAC_ACTIVE // the VFs keep their MACs, which they may not change
		if err := h.LinkAdd(bond); err != nil {
			return err
		}
		for _, req := range calls {
			dev, err := h.LinkByName(req.IfName)
			if err != nil {
				return err
			}
			if err := errors.Join(h.LinkSetDown(dev), h.LinkSetMaster(dev, bond), h.LinkSetUp(dev)); err != nil {
				return err
			}
		}
		vlan := &netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: "v7", ParentIndex: bond.Index}, VlanId: 7}
		return errors.Join(h.LinkSetUp(bond), h.LinkAdd(vlan))
	}); err != nil {
		t.Fatal(err)
	}
	for _, req := range calls {
		req.Command = "DEL"
		if _, err := a.call(req); err != nil {
			t.Error(err)
		}
	}
	l.atHome(t, "DEL of bonded VFs")
}
