//go:build lab

package server

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
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
