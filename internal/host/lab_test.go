//go:build lab

package host

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// These run in a lab guest, on a kernel with SR-IOV NICs.

// labPF returns the guest's first PF, with no VFs before and after the test.
func labPF(t *testing.T, h *Host) PF {
	t.Helper()
	pfs, err := h.Inventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(pfs) == 0 {
		t.Fatal("the guest has no SR-IOV NIC")
	}
	clear := func() {
		if err := h.SetNumVFs(t.Context(), pfs[0].PCIAddress, 0); err != nil && t.Context().Err() == nil {
			t.Error(err)
		}
	}
	clear()
	t.Cleanup(func() {
		_ = writeSysfs(filepath.Join(DefaultSysfs, "bus/pci/devices", pfs[0].PCIAddress, "sriov_numvfs"), "0")
	})
	if err := h.SetLinkUp(t.Context(), pfs[0].Link()); err != nil {
		t.Fatal(err)
	}
	return again(t, h, pfs[0].PCIAddress)
}

// again reads the PF anew, with VF settings.
func again(t *testing.T, h *Host, address string) PF {
	t.Helper()
	pfs, err := h.Inventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, pf := range pfs {
		if pf.PCIAddress == address {
			if err := h.ReadVFSettings(t.Context(), &pf); err != nil {
				t.Fatal(err)
			}
			return pf
		}
	}
	t.Fatalf("%s is gone", address)
	return PF{}
}

// within looks until the PF is as wanted; drivers make netdevs in their own time.
func within(t *testing.T, h *Host, address string, ok func(PF) error) PF {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		pf := again(t, h, address)
		err := ok(pf)
		if err == nil {
			return pf
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func TestLabInventory(t *testing.T) {
	h := open(t)
	pf := labPF(t, h)
	if pf.Name == "" || pf.Driver == "" || pf.TotalVFs == 0 || len(pf.Vendor) != 4 || len(pf.VFDeviceID) != 4 || pf.MTU == 0 || !pf.AdminUp || len(pf.MAC) != 6 {
		t.Errorf("incomplete: %+v", pf)
	}
	t.Logf("%+v", pf)
}

func TestLabVFsFromBirthToEnd(t *testing.T) {
	h := open(t)
	pf := labPF(t, h)
	start := time.Now()
	if err := h.SetNumVFs(t.Context(), pf.PCIAddress, 2); err != nil {
		t.Fatal(err)
	}
	t.Logf("2 VFs in %s", time.Since(start))
	pf = again(t, h, pf.PCIAddress)
	if pf.NumVFs != 2 || len(pf.VFs) != 2 {
		t.Fatalf("%+v", pf)
	}
	for _, vf := range pf.VFs {
		if vf.Driver != "" || vf.Name != "" {
			t.Errorf("VF %d was probed before it had its address: %+v", vf.Index, vf)
		}
		mac := net.HardwareAddr{2, 0, 0, 0, 0x77, byte(vf.Index)}
		if err := h.SetVFMAC(t.Context(), pf.Link(), vf.Index, mac); err != nil {
			t.Fatal(err)
		}
		if err := h.BindDriver(t.Context(), vf.PCIAddress, DefaultDriver); err != nil {
			t.Fatal(err)
		}
	}
	pf = within(t, h, pf.PCIAddress, func(pf PF) error {
		for _, vf := range pf.VFs {
			mac := fmt.Sprintf("02:00:00:00:77:%02x", vf.Index)
			if vf.Driver == "" || vf.Name == "" || vf.MAC.String() != mac || vf.Admin.MAC.String() != mac {
				return fmt.Errorf("VF %d is %+v, want a netdev with MAC %s", vf.Index, vf, mac)
			}
		}
		return nil
	})
	vf := pf.VFs[1]
	if err := h.Rename(t.Context(), vf.Link(), "odd1"); err != nil {
		t.Error(err)
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 0x78, 1}
	if err := errors.Join(h.SetVFMAC(t.Context(), pf.Link(), 1, mac), h.SetMAC(t.Context(), vf.Link(), mac)); err != nil {
		t.Error(err)
	}
	if err := h.SetMTU(t.Context(), vf.Link(), 1400); err != nil {
		t.Error(err)
	}
	within(t, h, pf.PCIAddress, func(pf PF) error {
		if vf := pf.VFs[1]; vf.Name != "odd1" || vf.MAC.String() != mac.String() || vf.MTU != 1400 || vf.Admin.MAC.String() != mac.String() || !vf.Admin.SpoofChk {
			return fmt.Errorf("VF 1 is %+v", vf)
		}
		return nil
	})

	// Another number goes through 0, so what was set is gone.
	if err := h.SetNumVFs(t.Context(), pf.PCIAddress, 3); err != nil {
		t.Fatal(err)
	}
	if pf = again(t, h, pf.PCIAddress); len(pf.VFs) != 3 || pf.VFs[1].Name != "" {
		t.Errorf("%+v", pf.VFs)
	}
	if got, _ := readText(filepath.Join(DefaultSysfs, "bus/pci/devices", pf.PCIAddress, "sriov_drivers_autoprobe")); got != "1" {
		t.Errorf("autoprobe left at %s", got)
	}
}

func TestLabKernelSaysNo(t *testing.T) {
	h := open(t)
	pf := labPF(t, h)
	err := h.SetNumVFs(t.Context(), pf.PCIAddress, pf.TotalVFs+1)
	if !errors.Is(err, unix.ERANGE) || !strings.Contains(err.Error(), "sriov_totalvfs") {
		t.Errorf("more than it has: %v", err)
	}
	err = h.SetMTU(t.Context(), pf.Link(), 1<<20)
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), pf.Name) {
		t.Errorf("huge MTU: %v", err)
	}
	err = h.SetVFMAC(t.Context(), pf.Link(), 0, net.HardwareAddr{2, 0, 0, 0, 0, 1})
	if err == nil || !strings.Contains(err.Error(), "the MAC of VF 0") {
		t.Errorf("a VF that is not there: %v", err)
	}
	t.Log(err)
}

// The emulated NIC fails on demand; the errno reaches the message.
func TestLabInjectedErrno(t *testing.T) {
	h := open(t)
	pf := labPF(t, h)
	if pf.Driver != "sluicenic" {
		t.Skipf("driver %s injects no errors", pf.Driver)
	}
	knob := filepath.Join("/sys/kernel/debug/sluicenic", pf.PCIAddress, "fail_sriov_enable")
	if err := os.WriteFile(knob, []byte("12\n"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(knob, []byte("0\n"), 0) })
	err := h.SetNumVFs(t.Context(), pf.PCIAddress, 2)
	if !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "pci=realloc") {
		t.Errorf("got %v", err)
	}
	if err := os.WriteFile(knob, []byte("0\n"), 0); err != nil {
		t.Fatal(err)
	}
	if err := h.SetNumVFs(t.Context(), pf.PCIAddress, 2); err != nil {
		t.Errorf("tried again: %v", err)
	}
}

// Each kind of change is told, soon.
func TestLabEvents(t *testing.T) {
	h := open(t)
	pf := labPF(t, h)
	events, err := h.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	told := func(what string, change func() error) {
		t.Helper()
		for quiet := false; !quiet; {
			select {
			case <-events:
			case <-time.After(300 * time.Millisecond):
				quiet = true
			}
		}
		var changed time.Time
		done := make(chan error, 1)
		go func() { err := change(); changed = time.Now(); done <- err }()
		if err := <-done; err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		select {
		case <-events:
			t.Logf("%s: told %s after the change was done", what, time.Since(changed))
		case <-time.After(20 * time.Second):
			t.Errorf("%s: not told", what)
		}
	}
	told("VFs made", func() error { return h.SetNumVFs(t.Context(), pf.PCIAddress, 1) })
	pf = again(t, h, pf.PCIAddress)
	told("driver bound", func() error { return h.BindDriver(t.Context(), pf.VFs[0].PCIAddress, DefaultDriver) })
	pf = within(t, h, pf.PCIAddress, func(pf PF) error {
		if pf.VFs[0].Name == "" {
			return errors.New("no netdev")
		}
		return nil
	})
	told("VF's admin MAC", func() error { return h.SetVFMAC(t.Context(), pf.Link(), 0, net.HardwareAddr{2, 0, 0, 0, 0x77, 9}) })
	told("PF's MTU", func() error { return h.SetMTU(t.Context(), pf.Link(), pf.MTU+50) })
	told("VF renamed", func() error { return h.Rename(t.Context(), pf.VFs[0].Link(), "odd0") })
	told("VFs removed", func() error { return h.SetNumVFs(t.Context(), pf.PCIAddress, 0) })
}
