package node

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/host/hostfake"
)

// A mode that the kernel changes only without pods waits for a reboot, and is not tried
// again with each event.
func TestRDMAModeWaitsForReboot(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.ready()
		r.kernel.Fail(hostfake.SetRDMAMode, slices.Repeat([]unix.Errno{unix.EBUSY}, 100)...)
		r.server.mu.Lock()
		r.server.state.Spec.System.RdmaMode = v1.RdmaModeExclusive
		r.server.mu.Unlock()
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.eventually(func() error {
			s := r.server.status()
			if len(s.Pending) != 1 || s.Pending[0].Cost != v1.CostReboot || s.Pending[0].PciAddress != "" || !strings.Contains(s.Pending[0].Reason, "ib_core.netns_mode=0") {
				return fmt.Errorf("pending %+v", s.Pending)
			}
			if s.System.RdmaMode != v1.RdmaModeShared || s.VFs != "2/2" || len(r.plugin.healthy("left")) != 2 {
				return fmt.Errorf("mode %s, VFs %s", s.System.RdmaMode, s.VFs)
			}
			return nil
		})
		if got := r.kernel.Tried(hostfake.SetRDMAMode); got != 1 {
			t.Errorf("tried %d times", got)
		}
		// Not asked for any more, nothing waits.
		r.server.mu.Lock()
		r.server.state.Spec.System.RdmaMode = v1.RdmaModeShared
		r.server.mu.Unlock()
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		r.eventually(func() error {
			if s := r.server.status(); len(s.Pending) > 0 {
				return fmt.Errorf("pending %+v", s.Pending)
			}
			return nil
		})
	})
}

// What a driver cannot set is tried once, and keeps no VF from pods.
func TestSettingsThatADriverCannotSet(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.kernel.NoReset()
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		for _, trust := range []bool{true, false, true} {
			r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[1].Admin.Trust = trust })
			r.eventually(func() error {
				if got := r.kernel.Tried(hostfake.ResetVFSettings); got != 1 {
					return fmt.Errorf("tried %d times", got)
				}
				return nil
			})
		}
		r.eventually(func() error {
			if got := r.plugin.healthy("left"); len(got) != 2 {
				return fmt.Errorf("left offers %v", got)
			}
			return nil
		})
		r.ready()
		if got := r.kernel.Tried(hostfake.ResetVFSettings); got != 1 {
			t.Errorf("tried %d times", got)
		}
	})
}

func TestGUIDOf(t *testing.T) {
	one, two, none := []byte{2, 0, 0, 0, 0, 0, 0, 1}, []byte{2, 0, 0, 0, 0, 0, 0, 2}, make([]byte, 8)
	for _, c := range []struct {
		assigned, own []byte
		want          string
	}{
		{one, two, "02:00:00:00:00:00:00:01"},
		{none, two, "02:00:00:00:00:00:00:02"}, // the firmware's choice
		{nil, two, "02:00:00:00:00:00:00:02"},
		{none, nil, ""},
	} {
		if got := guidOf(host.VF{GUID: c.own, Admin: host.VFSettings{NodeGUID: c.assigned}}); got != c.want {
			t.Errorf("%v, %v: %q", c.assigned, c.own, got)
		}
	}
}

func TestGUIDsThatAreSetAside(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := rigWith(t)
		r.kernel.Change(func(pfs []host.PF) {
			for i := range pfs {
				pfs[i].LinkType = host.InfiniBand
			}
		})
		file := filepath.Join(r.upstream, "infiniband", "guids")
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(`[{"pciAddress":"`+nic0+`","guids":["02:00:00:00:00:00:00:07"]}]`), 0o644); err != nil {
			t.Fatal(err)
		}
		r.start()
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)), wants(nic1, 1, of("right", "0-0", 0)))
		r.degraded(ReasonUnsupported, "VF 1 of ens1f0", "no GUID for VF 1", file)
		r.eventually(func() error {
			s := r.server.status()
			if got := s.Interfaces[0].VFs[0].GUID; got != "02:00:00:00:00:00:00:07" {
				return fmt.Errorf("VF 0 has GUID %q", got)
			}
			if got := s.Interfaces[1].VFs; len(got) != 1 || got[0].GUID == "" || got[0].Message != "" {
				return fmt.Errorf("the other NIC's VF is %+v", got)
			}
			if got := r.plugin.healthy("left"); !slices.Equal(got, []string{vfAddress(nic0, 0)}) {
				return fmt.Errorf("left offers %v", got)
			}
			return nil
		})
	})
}

// Switchdev waits for pods, takes every VF of the PF off offer meanwhile, and tells the
// representors.
func TestSwitchdev(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		want := wants(nic0, 2, of("left", "0-1", 0))
		r.server.spec(want)
		r.ready()
		held := vfAddress(nic0, 1)
		r.usage.set(held, "default/client")
		r.kernel.Change(func(pfs []host.PF) { vf := &pfs[0].VFs[1]; vf.Name, vf.IfIndex, vf.MAC, vf.MTU = "", 0, nil, 0 })
		want.EswitchMode = v1.EswitchModeSwitchdev
		r.server.spec(want)
		r.eventually(func() error {
			s := r.server.status()
			if len(s.Pending) != 1 || s.Pending[0].Cost != v1.CostEvict || len(s.Pending[0].Pods) != 1 || s.Pending[0].Pods[0].Name != "client" || s.Pending[0].Operation != "SetEswitchMode switchdev on "+nic0 {
				return fmt.Errorf("pending %+v", s.Pending)
			}
			if got := r.plugin.healthy("left"); slices.Contains(got, vfAddress(nic0, 0)) {
				return fmt.Errorf("left offers %v", got)
			}
			return nil
		})
		if pf := r.kernel.PF(nic0); pf.Eswitch != host.Legacy || pf.VFs[0].Driver == "" {
			t.Errorf("touched under a pod: %+v", pf)
		}
		r.usage.set(held, "")
		r.agent.HolderChanged()
		r.ready()
		r.eventually(func() error {
			s := r.server.status().Interfaces[0]
			if s.EswitchMode != "switchdev" || s.VFs[0].RepresentorName != "ens1f0_0" || len(r.plugin.healthy("left")) != 2 {
				return fmt.Errorf("%+v", s)
			}
			r.plugin.mu.Lock()
			defer r.plugin.mu.Unlock()
			if d := r.plugin.pools[0].Devices[0]; d.Representor != "ens1f0_0" {
				return fmt.Errorf("offered %+v", d)
			}
			return nil
		})
	})
}

// A mode that the kernel refuses leaves no VF without driver, whether it had one before
// or was made for it; none is offered until the mode is right or no longer asked for.
func TestSwitchdevRefused(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		plain := wants(nic0, 2, of("left", "0-1", 1400))
		r.server.spec(plain)
		r.ready()
		refuse := func() {
			for range 20 {
				r.kernel.Fail(hostfake.SetEswitchMode, unix.ENOSPC)
			}
		}
		bound := func(n int) {
			t.Helper()
			r.eventually(func() error {
				s := r.server.status()
				pf := s.Interfaces[0]
				if pf.EswitchMode != "legacy" || len(pf.VFs) != n || s.VFs != fmt.Sprintf("0/%d", n) || !strings.Contains(s.LastSyncError, "ENOSPC") {
					return fmt.Errorf("VFs %s, %q, %+v", s.VFs, s.LastSyncError, pf)
				}
				for _, vf := range pf.VFs {
					if vf.Driver == "" || vf.Mac != r.agent.stableMAC(*r.kernel.PF(nic0), vf.VfID).String() || !strings.Contains(vf.Message, "mode legacy") {
						return fmt.Errorf("%+v", vf)
					}
				}
				if got := r.plugin.healthy("left"); len(got) != 0 {
					return fmt.Errorf("left offers %v", got)
				}
				return nil
			})
		}
		refuse()
		switchdev := with(plain, func(i *v1.Interface) { i.EswitchMode = v1.EswitchModeSwitchdev })
		r.server.spec(switchdev)
		bound(2)
		// A pod that was faster keeps its VF, and the others have their driver, too.
		held := vfAddress(nic0, 1)
		r.usage.set(held, "default/client")
		r.agent.HolderChanged()
		r.eventually(func() error {
			if s := r.server.status(); len(s.Pending) != 1 || s.Interfaces[0].VFs[0].Driver == "" {
				return fmt.Errorf("%+v", s)
			}
			return nil
		})
		r.usage.set(held, "")
		r.agent.HolderChanged()

		more := with(switchdev, func(i *v1.Interface) {
			i.NumVfs, i.VfGroups = 3, []v1.VfGroup{of("left", "0-2", 1400)}
		})
		r.server.spec(more)
		bound(3)
		r.server.spec(plain)
		r.ready()
		r.eventually(func() error {
			for _, vf := range r.server.status().Interfaces[0].VFs {
				if vf.Mtu != 1400 || vf.Message != "" {
					return fmt.Errorf("%+v", vf)
				}
			}
			if got := r.plugin.healthy("left"); len(got) != 2 {
				return fmt.Errorf("left offers %v", got)
			}
			return nil
		})
	})
}
