//go:build lab

package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The embedded switch goes to switchdev mode and back. Meanwhile no representor is taken
// for a PF, a VF, or a link that MacVLAN can stand on.
func TestLabEswitchMode(t *testing.T) {
	h := open(t)
	pf := twoVFs(t, h)
	if pf.Eswitch == "" {
		t.Skipf("driver %s has no eswitch that devlink can switch", pf.Driver)
	}
	if pf.Eswitch != Legacy || pf.VFs[0].Representor != "" {
		t.Fatalf("at first: %+v", pf)
	}
	vfs := []string{pf.VFs[0].Name, pf.VFs[1].Name}
	unbind := func() {
		t.Helper()
		for _, vf := range pf.VFs {
			if err := h.UnbindDriver(t.Context(), vf.PCIAddress); err != nil {
				t.Fatal(err)
			}
		}
	}
	legacyAfter(t, h, pf)
	refused := func(want unix.Errno, mode EswitchMode) {
		t.Helper()
		before := again(t, h, pf.PCIAddress)
		err := h.SetEswitchMode(t.Context(), pf.PCIAddress, mode)
		var k *KernelError
		if !errors.Is(err, want) || !errors.As(err, &k) || k.Hint == "" || !strings.Contains(err.Error(), "sluicenic: ") {
			t.Errorf("%v, want %v with the driver's own words and a mend", err, want)
		}
		if now := again(t, h, pf.PCIAddress); now.Eswitch != before.Eswitch || now.VFs[0].Representor != before.VFs[0].Representor {
			t.Errorf("a refused change left %+v", now)
		}
	}
	refused(unix.EBUSY, Switchdev)
	unbind()
	knob := filepath.Join("/sys/kernel/debug/sluicenic", pf.PCIAddress, "fail_eswitch_mode")
	fail := func() {
		t.Helper()
		if err := os.WriteFile(knob, []byte("12\n"), 0); err != nil {
			t.Fatal(err)
		}
	}
	fail()
	refused(unix.ENOMEM, Switchdev)

	events, err := h.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.SetEswitchMode(t.Context(), pf.PCIAddress, Switchdev); err != nil {
		t.Fatal(err)
	}
	if c := <-events; !slices.Contains(c.Devices, pf.PCIAddress) {
		t.Errorf("told of %+v, want the PF %s", c, pf.PCIAddress)
	}
	is := func(pf PF, mode EswitchMode, representors ...string) {
		t.Helper()
		if pf.Eswitch != mode || pf.Name != "ens1f0" || len(pf.VFs) != 2 {
			t.Errorf("%s, want %s: %+v", pf.Eswitch, mode, pf)
		}
		for i, vf := range pf.VFs {
			if vf.Representor != representors[i] || vf.Name != "" && vf.Name != vfs[i] {
				t.Errorf("VF %d has netdev %s and representor %s, want %s and %s", i, vf.Name, vf.Representor, vfs[i], representors[i])
			}
		}
	}
	is(again(t, h, pf.PCIAddress), Switchdev, "ens1f0npf0vf0", "ens1f0npf0vf1")
	if features, err := h.eth.Features("ens1f0"); err != nil || !features["hw-tc-offload"] {
		t.Errorf("rules of tc would stay in software: hw-tc-offload is %t, %v", features["hw-tc-offload"], err)
	}
	for _, vf := range pf.VFs {
		if err := h.BindDriver(t.Context(), vf.PCIAddress, DefaultDriver); err != nil {
			t.Fatal(err)
		}
	}
	now := within(t, h, pf.PCIAddress, func(pf PF) error {
		for i, vf := range pf.VFs {
			if vf.Name != vfs[i] || vf.MAC.String() != vf.Admin.MAC.String() {
				return fmt.Errorf("%+v", vf)
			}
		}
		return nil
	})
	is(now, Switchdev, "ens1f0npf0vf0", "ens1f0npf0vf1")
	one, ok, err := h.ReadPF(t.Context(), pf.PCIAddress)
	if err != nil || !ok {
		t.Fatal(err)
	}
	is(one, Switchdev, "ens1f0npf0vf0", "ens1f0npf0vf1")

	pfs, err := h.Inventory(t.Context())
	if err != nil || len(pfs) != 2 {
		t.Errorf("%d PFs, want 2: %v", len(pfs), err)
	}
	links, err := h.Links(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	has := map[string]string{}
	for _, l := range links {
		has[l.Name] = l.PFAddress
	}
	for _, name := range append(vfs, "ens1f0") {
		if _, ok := has[name]; !ok {
			t.Errorf("MacVLAN could not stand on %s", name)
		}
	}
	for _, vf := range now.VFs {
		if _, ok := has[vf.Representor]; ok {
			t.Errorf("MacVLAN could stand on representor %s", vf.Representor)
		}
		a, err := OpenAttacher(DefaultSysfs)
		if err != nil {
			t.Fatal(err)
		}
		ref, err := a.VF(vf.PCIAddress)
		a.Close()
		if err != nil || ref.PFName != "ens1f0" || ref.Name != vf.Name {
			t.Errorf("%+v, %v", ref, err)
		}
	}

	refused(unix.EBUSY, Legacy)
	unbind()
	fail()
	refused(unix.ENOMEM, Legacy)
	if err := h.SetEswitchMode(t.Context(), pf.PCIAddress, Legacy); err != nil {
		t.Fatal(err)
	}
	is(again(t, h, pf.PCIAddress), Legacy, "", "")
}

// legacyAfter takes the PF back to legacy mode when the test ends.
func legacyAfter(t *testing.T, h *Host, pf PF) {
	t.Cleanup(func() {
		if err := errors.Join(h.SetNumVFs(context.Background(), pf.PCIAddress, 0), h.SetEswitchMode(context.Background(), pf.PCIAddress, Legacy)); err != nil {
			t.Error(err)
		}
	})
}

// switchdevVFs makes n VFs with drivers in switchdev mode.
func switchdevVFs(t *testing.T, h *Host, pf PF, n int) {
	t.Helper()
	legacyAfter(t, h, pf)
	if err := errors.Join(h.SetEswitchMode(t.Context(), pf.PCIAddress, Switchdev), h.SetNumVFs(t.Context(), pf.PCIAddress, n)); err != nil {
		t.Fatal(err)
	}
	for _, vf := range again(t, h, pf.PCIAddress).VFs {
		if err := h.BindDriver(t.Context(), vf.PCIAddress, DefaultDriver); err != nil {
			t.Fatal(err)
		}
	}
}
