//go:build lab

package host

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A VF in switchdev mode gets its vDPA device, for user space and for the kernel, and
// loses it.
func TestLabVDPA(t *testing.T) {
	h := open(t)
	pf := labPF(t, h)
	if pf.Eswitch == "" {
		t.Skipf("driver %s has no switchdev mode", pf.Driver)
	}
	switchdevVFs(t, h, pf, 2)
	vf := again(t, h, pf.PCIAddress).VFs[0]
	has := func(want string) {
		t.Helper()
		now := again(t, h, pf.PCIAddress)
		if now.VFs[0].VDPA != want || now.VFs[1].VDPA != "" || now.VFs[0].Name != vf.Name {
			t.Errorf("want %q: %+v", want, now.VFs)
		}
	}
	set := func(kind string) {
		t.Helper()
		if err := h.SetVDPA(t.Context(), vf.PCIAddress, kind); err != nil {
			t.Fatal(err)
		}
		has(kind)
	}
	for range 2 { // the second time there is nothing to do
		set(VDPAVhost)
		set("")
	}
	set(VDPAVhost)
	dev, err := netlink.VDPAGetDevByName(vdpaName(vf.PCIAddress))
	if err != nil || dev.MaxVQS != 16 {
		t.Errorf("the device has %+v, want all 16 virtqueues of the VF: %v", dev, err)
	}
	nodes, err := filepath.Glob("/sys/bus/vdpa/devices/" + vdpaName(vf.PCIAddress) + "/vhost-vdpa-*")
	if err != nil || len(nodes) != 1 {
		t.Fatalf("vhost devices %v, %v", nodes, err)
	}
	f, err := os.OpenFile("/dev/"+filepath.Base(nodes[0]), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()

	// The other driver: where it is not loaded that is told, and no device is left.
	set("")
	err = h.SetVDPA(t.Context(), vf.PCIAddress, VDPAVirtio)
	if _, there := os.Stat("/sys/bus/vdpa/drivers/virtio_vdpa"); there != nil {
		var k *KernelError
		if !errors.Is(err, unix.ENXIO) || !errors.As(err, &k) || !strings.Contains(err.Error(), "driver virtio_vdpa is not loaded") {
			t.Errorf("without driver: %v", err)
		}
		has("")
	} else if err != nil {
		t.Error(err)
	} else {
		has(VDPAVirtio)
	}

	// The device goes with the VF's driver.
	set("")
	set(VDPAVhost)
	if err := h.UnbindDriver(t.Context(), vf.PCIAddress); err != nil {
		t.Fatal(err)
	}
	vf.Name = ""
	has("")
	var k *KernelError
	if err := h.SetVDPA(t.Context(), vf.PCIAddress, VDPAVhost); !errors.Is(err, unix.ENODEV) || !errors.As(err, &k) || !strings.Contains(k.Hint, "vDPA module") {
		t.Errorf("of a VF without driver: %v", err)
	}
}
