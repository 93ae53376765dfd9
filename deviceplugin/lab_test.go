//go:build lab

package deviceplugin

import (
	"slices"
	"testing"

	"github.com/sluice-network/sluice/internal/host"
)

// On a kernel in switchdev mode a VF's device-info file names its PF and the representor
// that the kernel made for it.
func TestLabRepresentorInDeviceInfo(t *testing.T) {
	h, err := host.Open(host.DefaultSysfs)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	pfs, err := h.Inventory(t.Context())
	if err != nil || len(pfs) == 0 {
		t.Fatal(pfs, err)
	}
	pf := pfs[0]
	if pf.Eswitch == "" {
		t.Skipf("driver %s has no eswitch that devlink can switch", pf.Driver)
	}
	defer func() {
		for _, err := range []error{h.SetNumVFs(t.Context(), pf.PCIAddress, 0), h.SetEswitchMode(t.Context(), pf.PCIAddress, host.Legacy)} {
			if err != nil {
				t.Error(err)
			}
		}
	}()
	if err := h.SetEswitchMode(t.Context(), pf.PCIAddress, host.Switchdev); err != nil {
		t.Fatal(err)
	}
	if err := h.SetNumVFs(t.Context(), pf.PCIAddress, 2); err != nil {
		t.Fatal(err)
	}
	now, there, err := h.ReadPF(t.Context(), pf.PCIAddress)
	if err != nil || !there || len(now.VFs) != 2 {
		t.Fatal(now, there, err)
	}
	var seen []string
	for _, vf := range now.VFs {
		d := Device{PCIAddress: vf.PCIAddress, PFAddress: now.PCIAddress, PFName: now.Name, VFIndex: vf.Index}
		info := deviceInfo(d, readFacts(host.DefaultSysfs, d))
		if rep := info.Pci.RepresentorDevice; rep == "" || rep != vf.Representor || slices.Contains(seen, rep) || info.Pci.PfPciAddress != pf.PCIAddress {
			t.Errorf("VF %d, of which the representor is %q: %+v", vf.Index, vf.Representor, info.Pci)
		}
		seen = append(seen, info.Pci.RepresentorDevice)
	}
}
