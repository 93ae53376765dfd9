//go:build lab

package node

import (
	"fmt"
	"strings"
	"testing"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// What these NICs and this machine have not is told, field by field, and the rest works.
func TestLabUnsupportedIsTold(t *testing.T) {
	l := newLab(t)
	vfio, rdma := of("vfio", "0-0", 0), of("rdma", "1-1", 0)
	vfio.DeviceType, rdma.IsRdma = v1.DeviceTypeVfioPci, true
	l.server.spec(wants(nic0, 3, vfio, rdma, of("plain", "2-2", 0)))
	l.until("told", func(s v1.SriovNetworkNodeStateStatus) error {
		if s.SyncStatus != v1.SyncStatusFailed || len(s.Interfaces) == 0 || len(s.Interfaces[0].VFs) != 3 {
			return fmt.Errorf("%s", s.SyncStatus)
		}
		vfs := s.Interfaces[0].VFs
		for i, part := range []string{"deviceType vfio-pci needs an IOMMU", "isRdma is asked for", ""} {
			if !strings.Contains(vfs[i].Message, part) || (part == "") != (vfs[i].Message == "") {
				return fmt.Errorf("VF %d: %q", i, vfs[i].Message)
			}
		}
		if a, b, c := l.plugin.healthy("vfio"), l.plugin.healthy("rdma"), l.plugin.healthy("plain"); len(a) != 0 || len(b) != 0 || len(c) != 1 {
			return fmt.Errorf("offered %v %v %v", a, b, c)
		}
		return nil
	})
	if l.read(nic1).Eswitch != "" {
		return // TestLabSwitchdev
	}
	switchdev := wants(nic1, 1, of("right", "0-0", 0))
	switchdev.EswitchMode = v1.EswitchModeSwitchdev
	l.server.spec(switchdev)
	l.until("switchdev is told", func(s v1.SriovNetworkNodeStateStatus) error {
		if !strings.Contains(s.LastSyncError, "switchdev") || len(l.plugin.healthy("right")) != 0 {
			return fmt.Errorf("%q, offered %v", s.LastSyncError, l.plugin.healthy("right"))
		}
		return nil
	})
	// Taken back, it works.
	switchdev.EswitchMode = v1.EswitchModeLegacy
	l.server.spec(switchdev)
	l.succeeded("legacy", "1/1")
}
