//go:build lab

package host

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
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

	// The other driver makes a netdev of the node's, which is the VF's.
	set("")
	set(VDPAVirtio)
	links, err := h.Links(t.Context())
	if err != nil || !slices.ContainsFunc(links, func(l ParentLink) bool {
		return l.PCIAddress == vf.PCIAddress && l.PFAddress == pf.PCIAddress && l.Name != vf.Name
	}) {
		t.Errorf("no virtio link of the VF: %+v, %v", links, err)
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
