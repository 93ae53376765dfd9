//go:build lab

package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
)

// switchdevLab is a lab whose first NIC was set to mode and VFs by somebody else.
func switchdevLab(t *testing.T, mode host.EswitchMode, vfs int) *lab {
	l := newLab(t)
	if l.read(nic0).Eswitch == "" {
		t.Skipf("driver %s has no eswitch that devlink can switch", l.read(nic0).Driver)
	}
	l.stop()
	sriov := filepath.Join("/sys/bus/pci/devices", nic0, "sriov_numvfs")
	t.Cleanup(func() {
		l.stop()
		_ = os.WriteFile(sriov, []byte("0"), 0)
		if err := l.host.SetEswitchMode(t.Context(), nic0, host.Legacy); err != nil && t.Context().Err() == nil {
			t.Error(err)
		}
	})
	if err := l.host.SetEswitchMode(t.Context(), nic0, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(sriov, strconv.AppendInt(nil, int64(vfs), 10), 0); err != nil && vfs > 0 {
		t.Fatal(err)
	}
	l.restart()
	return l
}

func inMode(mode string, vfs int) v1.Interface {
	return with(wants(nic0, vfs, of("left", fmt.Sprintf("0-%d", vfs-1), 1400)), func(i *v1.Interface) { i.EswitchMode = mode })
}

// looks wants the first NIC in the mode, and all its VFs as the spec asks and offered.
func (l *lab) looks(mode string, vfs int) {
	l.Helper()
	s := l.succeeded(mode, fmt.Sprintf("%d/%d", vfs, vfs))
	pf := s.Interfaces[0]
	if pf.EswitchMode != mode || pf.Name != "ens1f0" || len(pf.VFs) != vfs {
		l.Errorf("want %d VFs in %s: %+v", vfs, mode, pf)
	}
	for i, vf := range pf.VFs {
		representor := ""
		if mode == v1.EswitchModeSwitchdev {
			representor = fmt.Sprintf("ens1f0npf0vf%d", i)
		}
		mac, _, ok := l.agent.Baseline(vf.PciAddress)
		if !ok || vf.Mac != mac.String() || vf.Mtu != 1400 || vf.RepresentorName != representor || vf.Name != fmt.Sprintf("ens1f0v%d", i) || vf.Message != "" {
			l.Errorf("VF %d in %s: %+v, its address shall be %s", i, mode, vf, mac)
		}
		if slices.ContainsFunc(s.Links, func(link v1.Link) bool { return link.Name == representor }) {
			l.Errorf("representor %s is told as a link for MacVLAN", representor)
		}
	}
	if got := l.plugin.healthy("left"); len(got) != vfs {
		l.Errorf("offered %v", got)
	}
}

// The agent takes a NIC to switchdev mode, works there, and takes it back.
func TestLabSwitchdev(t *testing.T) {
	l := switchdevLab(t, host.Legacy, 1)
	l.server.spec(inMode("legacy", 2))
	l.looks("legacy", 2)
	l.server.spec(inMode("switchdev", 2))
	l.looks("switchdev", 2)
	l.server.spec(inMode("switchdev", 3))
	l.looks("switchdev", 3)

	again := func() {
		l.restart()
		l.server.spec(inMode("switchdev", 3))
		l.looks("switchdev", 3)
	}
	t.Run("restart changes nothing", func(t *testing.T) {
		before := l.read(nic0)
		again()
		if after := l.read(nic0); after.VFs[0].IfIndex != before.VFs[0].IfIndex {
			t.Error("the VFs were made anew")
		}
	})
	t.Run("somebody set it back while the agent was away", func(t *testing.T) {
		l.stop()
		for _, vf := range l.read(nic0).VFs {
			if err := l.host.UnbindDriver(t.Context(), vf.PCIAddress); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.host.SetEswitchMode(t.Context(), nic0, host.Legacy); err != nil {
			t.Fatal(err)
		}
		again()
	})
	t.Run("under a pod", func(t *testing.T) {
		vf := l.read(nic0).VFs[1]
		run(t, "ip", "netns", "add", "pod")
		l.usage.set(vf.PCIAddress, "default/p")
		run(t, "ip", "link", "set", vf.Name, "netns", "pod", "name", "net1")
		l.agent.HolderChanged()
		l.server.spec(inMode("legacy", 3))
		l.until("pending", func(s v1.SriovNetworkNodeStateStatus) error {
			if len(s.Pending) != 1 || s.Pending[0].Operation != "SetEswitchMode legacy on "+nic0 || s.Interfaces[0].EswitchMode != "switchdev" || len(l.plugin.healthy("left")) != 0 {
				return fmt.Errorf("%+v, %s, offered %v", s.Pending, s.Interfaces[0].EswitchMode, l.plugin.healthy("left"))
			}
			return nil
		})
		run(t, "ip", "netns", "del", "pod")
		l.usage.set(vf.PCIAddress, "")
		l.agent.HolderChanged()
		l.looks("legacy", 3)
	})
	l.server.spec(inMode("switchdev", 2))
	l.looks("switchdev", 2)
	l.server.spec()
	l.succeeded("given up", "0/0")
	l.until("as it was", func(v1.SriovNetworkNodeStateStatus) error {
		if pf := l.read(nic0); pf.Eswitch != host.Legacy || len(pf.VFs) != 1 || pf.VFs[0].Driver != "sluicenicvf" {
			return fmt.Errorf("%+v", pf)
		}
		return nil
	})
}

// A driver that is called ice changes the mode only while there are no VFs.
func TestLabSwitchdevOnIce(t *testing.T) {
	if _, err := os.Stat("/sys/module/sluicenic"); err != nil {
		t.Skip("the guest's NIC is not the emulated one")
	}
	load := func(params ...string) {
		run(t, "rmmod", "sluicenic")
		run(t, "insmod", append([]string{"/lib/sluice/sluicenic.ko", "cards=2"}, params...)...)
	}
	load("pf_driver=ice")
	t.Cleanup(func() { load() })
	l := switchdevLab(t, host.Legacy, 1)
	for _, vf := range l.read(nic0).VFs {
		if err := l.host.UnbindDriver(t.Context(), vf.PCIAddress); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.host.SetEswitchMode(t.Context(), nic0, host.Switchdev); !errors.Is(err, unix.EOPNOTSUPP) || l.read(nic0).Driver != "ice" {
		t.Fatalf("with VFs: %v", err)
	}
	for _, step := range []struct {
		mode string
		vfs  int
	}{{"legacy", 2}, {"switchdev", 2}, {"switchdev", 3}, {"legacy", 3}, {"switchdev", 2}} {
		l.server.spec(inMode(step.mode, step.vfs))
		l.looks(step.mode, step.vfs)
	}
	l.server.spec()
	l.succeeded("given up", "0/0")
	l.until("as it was", func(v1.SriovNetworkNodeStateStatus) error {
		if pf := l.read(nic0); pf.Eswitch != host.Legacy || len(pf.VFs) != 1 || pf.VFs[0].Driver == "" {
			return fmt.Errorf("%+v", pf)
		}
		return nil
	})
}

// A NIC that was in switchdev mode goes back to it when no policy asks for it any more.
func TestLabSwitchdevIsGivenBack(t *testing.T) {
	l := switchdevLab(t, host.Switchdev, 2)
	l.server.spec(inMode("", 3))
	l.looks("legacy", 3)
	l.server.spec()
	l.succeeded("given up", "0/0")
	l.until("as it was", func(v1.SriovNetworkNodeStateStatus) error {
		if pf := l.read(nic0); pf.Eswitch != host.Switchdev || len(pf.VFs) != 2 || pf.VFs[1].Driver != "sluicenicvf" || pf.VFs[1].Representor == "" {
			return fmt.Errorf("%+v", pf)
		}
		return nil
	})
}

// A mode that the driver refuses is told, with its errno. The VFs get their driver back
// and are off offer, until it is not refused or no longer asked for.
func TestLabSwitchdevRefused(t *testing.T) {
	l := switchdevLab(t, host.Legacy, 0)
	knob := filepath.Join("/sys/kernel/debug/sluicenic", nic0, "fail_eswitch_mode")
	set := func(text string) {
		t.Helper()
		if err := os.WriteFile(knob, []byte(text), 0); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = os.WriteFile(knob, []byte("0"), 0) })
	refused := func(what, is string, vfs int) {
		t.Helper()
		l.until(what, func(s v1.SriovNetworkNodeStateStatus) error {
			if len(s.Interfaces) == 0 {
				return errors.New("no NICs yet")
			}
			pf := s.Interfaces[0]
			if s.SyncStatus != v1.SyncStatusFailed || !strings.Contains(pf.Message, "ENOSPC") || pf.EswitchMode != is || len(pf.VFs) != vfs || len(l.plugin.healthy("left")) != 0 {
				return fmt.Errorf("%s, offered %v, %+v", s.SyncStatus, l.plugin.healthy("left"), pf)
			}
			for _, vf := range pf.VFs {
				if mac, _, _ := l.agent.Baseline(vf.PciAddress); vf.Driver != "sluicenicvf" || vf.Mac != mac.String() {
					return fmt.Errorf("%+v", vf)
				}
			}
			return nil
		})
	}
	set("28 0")
	l.server.spec(inMode("switchdev", 2))
	refused("new VFs", "legacy", 2)
	l.server.spec(inMode("legacy", 2))
	l.looks("legacy", 2)
	l.server.spec(inMode("switchdev", 2))
	refused("VFs in use", "legacy", 2)
	set("0")
	l.looks("switchdev", 2)
	set("28 0")
	l.server.spec(inMode("legacy", 2))
	refused("the way back", "switchdev", 2)
	set("0")
	l.looks("legacy", 2)
}

// The VFs of a group get their vDPA device once the mode is there, and keep it over a
// restart of the agent; without the mode it is gone.
func TestLabVDPA(t *testing.T) {
	l := switchdevLab(t, host.Legacy, 0)
	vdpa := of("left", "0-1", 1400)
	vdpa.VdpaType = host.VDPAVhost
	want := inMode("switchdev", 3)
	want.VfGroups = []v1.VfGroup{vdpa, of("plain", "2-2", 1400)}
	told := func(types ...string) {
		t.Helper()
		l.until(fmt.Sprint(types), func(s v1.SriovNetworkNodeStateStatus) error {
			if len(s.Interfaces) == 0 || len(s.Interfaces[0].VFs) != len(types) || s.SyncStatus != v1.SyncStatusSucceeded {
				return fmt.Errorf("%s: %s", s.SyncStatus, s.LastSyncError)
			}
			for i, vf := range s.Interfaces[0].VFs {
				if vf.VdpaType != types[i] || vf.Message != "" {
					return fmt.Errorf("%+v", vf)
				}
			}
			return nil
		})
	}
	l.server.spec(want)
	told("vhost", "vhost", "")
	before := l.read(nic0)
	l.restart()
	l.server.spec(want)
	l.succeeded("seen", "3/3")
	if after := l.read(nic0); after.VFs[0].IfIndex != before.VFs[0].IfIndex {
		t.Error("the VFs were made anew")
	}
	want.VfGroups[0].VdpaType = ""
	l.server.spec(want)
	told("", "", "")
	want.VfGroups[0].VdpaType = host.VDPAVirtio
	l.server.spec(want)
	told("virtio", "virtio", "")
	for _, link := range l.server.status().Links {
		if link.PciAddress == before.VFs[0].PCIAddress {
			t.Errorf("%s is offered as a MacVLAN parent, and is of a VF that goes to pods", link.Name)
		}
	}
	want.VfGroups[0].VdpaType = host.VDPAVhost
	l.server.spec(want)
	told("vhost", "vhost", "")
	l.server.spec(inMode("legacy", 3))
	told("", "", "")
}
