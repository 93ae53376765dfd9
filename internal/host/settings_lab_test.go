//go:build lab

package host

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// twoVFs makes two VFs with drivers.
func twoVFs(t *testing.T, h *Host) PF {
	t.Helper()
	pf := labPF(t, h)
	if err := h.SetNumVFs(t.Context(), pf.PCIAddress, 2); err != nil {
		t.Fatal(err)
	}
	for _, vf := range again(t, h, pf.PCIAddress).VFs {
		if err := h.SetVFMAC(t.Context(), pf.Link(), vf.Index, net.HardwareAddr{2, 0, 0, 0, 0x78, byte(vf.Index)}); err != nil {
			t.Fatal(err)
		}
		if err := h.BindDriver(t.Context(), vf.PCIAddress, DefaultDriver); err != nil {
			t.Fatal(err)
		}
	}
	return within(t, h, pf.PCIAddress, func(pf PF) error {
		for _, vf := range pf.VFs {
			if vf.Name == "" {
				return errors.New("a VF has no netdev yet")
			}
		}
		return nil
	})
}

func TestLabResetVFSettings(t *testing.T) {
	h := open(t)
	pf := twoVFs(t, h)
	for _, vf := range pf.VFs {
		if drift := vf.Admin.Drift(); drift != 0 {
			t.Errorf("a new VF drifts: %s", vf.Admin.Text(drift))
		}
	}
	args := []string{"link", "set", pf.Name, "vf", "1", "vlan", "100", "qos", "3", "spoofchk", "off", "trust", "on", "state", "disable"}
	// igb takes no lower rate, and changes the upper one only with a link.
	if pf.Driver != "igb" {
		args = append(args, "max_tx_rate", "200")
	} else {
		args = args[:len(args)-2]
	}
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	drifted := again(t, h, pf.PCIAddress)
	vf := drifted.VFs[1]
	text := vf.Admin.Text(vf.Admin.Drift())
	for _, part := range []string{"vlan 100 qos 3", "spoofchk off", "trust on"} {
		if !strings.Contains(text, part) {
			t.Errorf("%q lacks %q", text, part)
		}
	}
	unsupported, err := h.ResetVFSettings(t.Context(), pf.Link(), 1, vf.Admin, vf.Admin.Drift())
	if err != nil || unsupported != 0 {
		t.Errorf("unsupported %b, %v", unsupported, err)
	}
	now := again(t, h, pf.PCIAddress)
	if drift := now.VFs[1].Admin.Drift(); drift != 0 || now.VFs[1].Admin.MAC.String() != vf.Admin.MAC.String() {
		t.Errorf("after the reset: %s, %+v", now.VFs[1].Admin.Text(drift), now.VFs[1].Admin)
	}
	if now.VFs[0].Admin.Drift() != 0 {
		t.Errorf("its neighbour: %+v", now.VFs[0].Admin)
	}
}

// A VF has the link that its PF shows it, and keeps its other settings.
func TestLabVFLinkState(t *testing.T) {
	h := open(t)
	pf := twoVFs(t, h)
	a, err := OpenAttacher(DefaultSysfs)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	ref, err := a.VF(pf.VFs[1].PCIAddress)
	if err != nil {
		t.Fatal(err)
	}
	links := []string{pf.Name, ref.Name}
	if pf.Driver != "igb" {
		links = append(links, "wire0") // the emulated NIC's cable, without which its PF has no link
	}
	for _, link := range links {
		if out, err := exec.Command("ip", "link", "set", link, "up").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	before, err := a.VFSettings(ref)
	if err != nil {
		t.Fatal(err)
	}
	carrier := func(link string) string {
		text, err := os.ReadFile("/sys/class/net/" + link + "/carrier")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(text))
	}
	for _, c := range []struct {
		state   LinkState
		carrier string
	}{{LinkDisable, "0"}, {LinkEnable, "1"}, {LinkDisable, "0"}, {LinkAuto, carrier(pf.Name)}} {
		err := a.SetVFLinkState(t.Context(), ref, c.state)
		if pf.Driver == "igb" { // has no ndo_set_vf_link_state
			if !errors.Is(err, unix.EOPNOTSUPP) {
				t.Errorf("%v", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		within(t, h, pf.PCIAddress, func(PF) error {
			if has := carrier(ref.Name); has != c.carrier {
				return fmt.Errorf("link state %d, carrier %s", c.state, has)
			}
			return nil
		})
		now, err := a.VFSettings(ref)
		if before.LinkState = c.state; err != nil || fmt.Sprint(now) != fmt.Sprint(before) {
			t.Errorf("%+v, want %+v, %v", now, before, err)
		}
	}
}

func TestLabUnbindDriver(t *testing.T) {
	h := open(t)
	pf := twoVFs(t, h)
	for range 2 { // the second time there is nothing to do
		if err := h.UnbindDriver(t.Context(), pf.VFs[0].PCIAddress); err != nil {
			t.Fatal(err)
		}
	}
	pf = again(t, h, pf.PCIAddress)
	if pf.VFs[0].Driver != "" || pf.VFs[0].Name != "" || pf.VFs[1].Driver == "" {
		t.Errorf("%+v", pf.VFs)
	}
}

// A VF goes to vfio-pci and back, and comes back with what its PF holds for it. The
// guest has no IOMMU: without one the kernel refuses, and for the way there and back it
// is told to do without, which the agent never does.
func TestLabVfioAndBack(t *testing.T) {
	h := open(t)
	pf := twoVFs(t, h)
	vf := pf.VFs[0]
	h.SystemBus = modprobes(t, "vfio_pci") // a module on some guests, built in on others
	noIOMMU := "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
	back := func() {
		t.Helper()
		if err := h.BindDriver(t.Context(), vf.PCIAddress, DefaultDriver); err != nil {
			t.Fatal(err)
		}
		within(t, h, pf.PCIAddress, func(pf PF) error {
			if now := pf.VFs[0]; now.Driver != vf.Driver || now.Name == "" || now.MAC.String() != vf.Admin.MAC.String() || now.Admin.MAC.String() != vf.Admin.MAC.String() {
				return fmt.Errorf("came back as %+v, was %+v", now, vf)
			}
			return nil
		})
	}
	var k *KernelError
	err := h.BindDriver(t.Context(), vf.PCIAddress, "vfio-pci")
	if !errors.Is(err, unix.EINVAL) || !errors.As(err, &k) || !strings.Contains(k.Hint, "IOMMU") {
		t.Errorf("without an IOMMU: %v", err)
	}
	back()
	if _, err := os.Stat(noIOMMU); err != nil && pf.Driver == "igb" {
		return // Debian's kernel is built without it
	}
	if err := writeSysfs(noIOMMU, "Y"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = writeSysfs(noIOMMU, "N") })
	if err := h.BindDriver(t.Context(), vf.PCIAddress, "vfio-pci"); err != nil {
		t.Fatal(err)
	}
	if now := again(t, h, pf.PCIAddress); now.VFs[0].Driver != "vfio-pci" || now.VFs[0].Name != "" || now.VFs[1].Driver != vf.Driver {
		t.Errorf("%+v", now.VFs)
	}
	back()
}

// What this NIC cannot do, or not while its VFs have drivers, is told, and nothing
// changes.
func TestLabUnsupported(t *testing.T) {
	h := open(t)
	pf := twoVFs(t, h)
	vf := pf.VFs[0]
	for what, c := range map[string]struct {
		err  error
		want []error
	}{
		"switchdev": {h.SetEswitchMode(t.Context(), pf.PCIAddress, Switchdev), []error{unix.EBUSY, unix.ENODEV}},
		"GUID":      {h.SetVFGUID(t.Context(), pf.Link(), 0, net.HardwareAddr{2, 0, 0, 0, 0, 0, 0, 1}), []error{unix.EOPNOTSUPP}},
		"vDPA":      {h.SetVDPA(t.Context(), vf.PCIAddress, VDPAVhost), []error{unix.ENODEV, unix.ENOENT}},
	} {
		var k *KernelError
		if !errors.As(c.err, &k) || k.Hint == "" || k.ErrnoName() == "" || !(errors.Is(c.err, c.want[0]) || errors.Is(c.err, c.want[len(c.want)-1])) {
			t.Errorf("%s: %v", what, c.err)
		}
	}
	if err := h.SetVDPA(t.Context(), vf.PCIAddress, ""); err != nil {
		t.Errorf("no vDPA device is there to remove: %v", err)
	}
	if now := again(t, h, pf.PCIAddress); now.Eswitch != pf.Eswitch || now.VFs[0].VDPA != "" || now.VFs[0].Name != vf.Name {
		t.Errorf("%+v", now)
	}
}

func TestLabRDMAMode(t *testing.T) {
	h := open(t)
	mode, err := h.RDMAMode(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("mode %q", mode)
	if mode == "" {
		if _, err := os.Stat("/sys/module/ib_core"); err == nil {
			t.Error("the kernel has RDMA and its mode is not told")
		}
		if err := h.SetRDMAMode(t.Context(), "exclusive"); err == nil {
			t.Error("set the mode of an RDMA subsystem that is not there")
		}
		return
	}
	t.Cleanup(func() { _ = h.SetRDMAMode(t.Context(), mode) })
	other := map[string]string{"shared": "exclusive", "exclusive": "shared"}[mode]
	if err := h.SetRDMAMode(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if now, err := h.RDMAMode(t.Context()); now != other || err != nil {
		t.Errorf("the mode is %s, %v", now, err)
	}
	if err := h.SetRDMAMode(t.Context(), mode); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("ip", "netns", "add", "pod").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", "pod").Run() })
	var k *KernelError
	if err := h.SetRDMAMode(t.Context(), other); !errors.Is(err, unix.EBUSY) || !errors.As(err, &k) || !strings.Contains(k.Hint, "ib_core.netns_mode") {
		t.Errorf("with another network namespace: %v", err)
	}
}

// modprobes is systemd with its unit modprobe@.service (units/modprobe@.service.in).
func modprobes(t *testing.T, module string) (socket string) {
	socket, _ = systemd(t, func() {
		if out, err := exec.Command("modprobe", "-abq", module).CombinedOutput(); err != nil {
			t.Logf("modprobe %s: %v %s", module, err, out)
		}
	})
	return socket
}
