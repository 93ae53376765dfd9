package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tree is a sysfs made of files, with the links a kernel would dump.
type tree struct {
	t     *testing.T
	root  string
	links []netlink.Link
	modes map[string]EswitchMode
}

func newTree(t *testing.T) *tree {
	tr := &tree{t: t, root: t.TempDir(), modes: map[string]EswitchMode{}}
	for _, dir := range []string{"bus/pci/devices", "bus/pci/drivers"} {
		if err := os.MkdirAll(filepath.Join(tr.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return tr
}

func (tr *tree) host() *Host {
	return &Host{
		sysfs: tr.root,
		links: func() ([]netlink.Link, error) { return tr.links, nil },
		link: func(name string) (*netlink.LinkAttrs, error) {
			for _, l := range tr.links {
				if l.Attrs().Name == name {
					return l.Attrs(), nil
				}
			}
			return nil, nil
		},
		eswitch: func(a string) (EswitchMode, error) { return tr.modes[a], nil },
		speed:   func(string) int { return 25000 },
	}
}

func (tr *tree) write(path, content string) {
	tr.t.Helper()
	path = filepath.Join(tr.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		tr.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		tr.t.Fatal(err)
	}
}

func (tr *tree) read(path string) string {
	tr.t.Helper()
	b, err := os.ReadFile(filepath.Join(tr.root, path))
	if err != nil {
		tr.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func (tr *tree) link(target, path string) {
	tr.t.Helper()
	if err := os.MkdirAll(filepath.Dir(filepath.Join(tr.root, path)), 0o755); err != nil {
		tr.t.Fatal(err)
	}
	if err := os.Symlink(target, filepath.Join(tr.root, path)); err != nil {
		tr.t.Fatal(err)
	}
}

func dev(address string) string { return "bus/pci/devices/" + address }

// pf makes a PF with its VFs at device numbers 0x10 and up, all with drivers.
func (tr *tree) pf(address string, total, num int) {
	d := dev(address)
	for file, content := range map[string]string{
		"class": "0x020000", "vendor": "0x8086", "device": "0x1572", "sriov_vf_device": "154c",
		"sriov_totalvfs": fmt.Sprint(total), "sriov_numvfs": fmt.Sprint(num), "numa_node": "1", "sriov_drivers_autoprobe": "1",
	} {
		tr.write(d+"/"+file, content+"\n")
	}
	tr.link("../../drivers/i40e", d+"/driver")
	for i := range num {
		vf := tr.vf(address, i)
		tr.link("../"+vf, fmt.Sprintf("%s/virtfn%d", d, i))
	}
}

func (tr *tree) vf(pf string, i int) string {
	address := strings.Replace(pf, ":00.0", fmt.Sprintf(":%02x.%d", 0x10+i/8, i%8), 1)
	d := dev(address)
	for file, content := range map[string]string{
		"class": "0x020000", "vendor": "0x8086", "device": "0x154c", "numa_node": "-1", "driver_override": "(null)",
	} {
		tr.write(d+"/"+file, content+"\n")
	}
	tr.link("../../drivers/iavf", d+"/driver")
	tr.link("../../../kernel/iommu_groups/"+fmt.Sprint(40+i), d+"/iommu_group")
	tr.link("../"+pf, d+"/physfn")
	return address
}

func (tr *tree) netdev(address, name string, index int, port string) {
	dir := dev(address) + "/net/" + name
	if port != "" {
		tr.write(dir+"/phys_port_name", port+"\n")
	}
	tr.write(dir+"/dev_port", "0\n")
	tr.links = append(tr.links, &netlink.Device{LinkAttrs: netlink.LinkAttrs{
		Name: name, Index: index, MTU: 1500, EncapType: "ether",
		HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, byte(index)}, RawFlags: unix.IFF_UP | unix.IFF_LOWER_UP,
		AltNames: []string{name + "alt"},
	}})
}

func TestInventory(t *testing.T) {
	tr := newTree(t)
	tr.pf("0000:3b:00.0", 64, 2)
	// In switchdev mode the folder holds the representors too, sorted before the uplink.
	tr.netdev("0000:3b:00.0", "eth0", 7, "pf0vf0")
	tr.netdev("0000:3b:00.0", "eth1", 8, "pf0vf1")
	tr.netdev("0000:3b:00.0", "eth2", 9, "c1pf0vf1")
	tr.netdev("0000:3b:00.0", "eth9", 3, "p0")
	tr.modes["0000:3b:00.0"] = Switchdev
	tr.netdev("0000:3b:10.0", "eth9v0", 11, "")
	// VF 1 is in a pod: its netdev is in no folder here.
	tr.link("../../../bus/vdpa/drivers/vhost_vdpa", "bus/vdpa/devices/vdpa:0000:3b:10.0/driver")
	tr.write(dev("0000:3b:10.1")+"/infiniband/mlx5_3/node_guid", "506b:4b03:00cc:1234\n")

	tr.pf("0000:5e:00.0", 8, 0) // no netdev, no devlink
	if err := os.Remove(filepath.Join(tr.root, dev("0000:5e:00.0"), "driver")); err != nil {
		t.Fatal(err)
	}
	tr.write(dev("0000:00:1f.0")+"/class", "0x060100\n") // a bridge
	tr.write(dev("0000:00:02.0")+"/class", "0x020000\n") // a NIC without SR-IOV
	tr.write(dev("0000:00:03.0")+"/class", "0x020000\n")
	tr.write(dev("0000:00:03.0")+"/sriov_totalvfs", "0\n") // switched off in firmware

	got, err := tr.host().Inventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []PF{{
		PCIAddress: "0000:3b:00.0", Name: "eth9", AltNames: []string{"eth9alt"}, IfIndex: 3, Driver: "i40e",
		Vendor: "8086", DeviceID: "1572", VFDeviceID: "154c", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 3}, MTU: 1500,
		LinkSpeed: 25000, LinkType: Ethernet, AdminUp: true, Carrier: true, Eswitch: Switchdev, NUMANode: 1, TotalVFs: 64, NumVFs: 2,
		VFs: []VF{
			{Index: 0, PCIAddress: "0000:3b:10.0", Vendor: "8086", DeviceID: "154c", Driver: "iavf", Name: "eth9v0", IfIndex: 11, MTU: 1500, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 11}, NUMANode: -1, IOMMUGroup: "40", Representor: "eth0", VDPA: "vhost"},
			{Index: 1, PCIAddress: "0000:3b:10.1", Vendor: "8086", DeviceID: "154c", Driver: "iavf", NUMANode: -1, IOMMUGroup: "41", Representor: "eth1", RDMADevice: "mlx5_3", GUID: net.HardwareAddr{0x50, 0x6b, 0x4b, 3, 0, 0xcc, 0x12, 0x34}},
		},
	}, {
		PCIAddress: "0000:5e:00.0", Vendor: "8086", DeviceID: "1572", VFDeviceID: "154c", LinkType: Ethernet, NUMANode: 1, TotalVFs: 8,
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// One NIC that cannot be read is named and does not hide the others.
func TestInventoryOfBrokenTrees(t *testing.T) {
	const pf, vf = "0000:3b:00.0", "0000:3b:10.0"
	for name, c := range map[string]struct {
		damage func(*tree)
		want   string
	}{
		"garbage totalvfs": {func(tr *tree) { tr.write(dev(pf)+"/sriov_totalvfs", "many\n") }, `read NIC 0000:3b:00.0: read`},
		"garbage numvfs":   {func(tr *tree) { tr.write(dev(pf)+"/sriov_numvfs", "\n") }, `"" is not a number`},
		"garbage vendor":   {func(tr *tree) { tr.write(dev(pf)+"/vendor", "0x80861\n") }, `"0x80861" is not a 16-bit hexadecimal number`},
		"no numvfs":        {func(tr *tree) { os.Remove(filepath.Join(tr.root, dev(pf), "sriov_numvfs")) }, "sriov_numvfs"},
		"garbage VF":       {func(tr *tree) { tr.write(dev(vf)+"/device", "zz\n") }, `read VF 0: read`},
		"VF without id":    {func(tr *tree) { os.Remove(filepath.Join(tr.root, dev(vf), "vendor")) }, "read VF 0:"},
		"VF half gone":     {func(tr *tree) { os.RemoveAll(filepath.Join(tr.root, dev(vf))) }, ""},
		"class missing":    {func(tr *tree) { os.Remove(filepath.Join(tr.root, dev(pf), "class")) }, "class"},
		"name no address":  {func(tr *tree) { tr.write("bus/pci/devices/evil/class", "0x020000") }, `"evil" is not a PCI address`},
		"VF link no device": {func(tr *tree) {
			os.Remove(filepath.Join(tr.root, dev(pf), "virtfn0"))
			tr.link("../../../../etc", dev(pf)+"/virtfn0")
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			tr := newTree(t)
			tr.pf(pf, 8, 1)
			tr.pf("0000:5e:00.0", 8, 1)
			c.damage(tr)
			got, err := tr.host().Inventory(t.Context())
			if len(got) == 0 || got[len(got)-1].PCIAddress != "0000:5e:00.0" {
				t.Errorf("the healthy NIC is missing: %+v", got)
			}
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

func TestInventoryStopsWithItsContext(t *testing.T) {
	tr := newTree(t)
	tr.pf("0000:3b:00.0", 8, 0)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tr.host().Inventory(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestOwnNetdev(t *testing.T) {
	for name, c := range map[string]struct {
		in   []candidate
		want string
	}{
		"none":                {nil, ""},
		"only representors":   {[]candidate{{name: "a", portName: "pf0vf1"}, {name: "b", portName: "pf1sf22"}}, ""},
		"host PF on a DPU":    {[]candidate{{name: "a", portName: "pf0"}, {name: "b", portName: "p0"}}, "b"},
		"no port names":       {[]candidate{{name: "z"}}, "z"},
		"uplink before plain": {[]candidate{{name: "a"}, {name: "b", portName: "p1"}}, "b"},
		"lower port first":    {[]candidate{{name: "a", devPort: 1}, {name: "b", devPort: 0}}, "b"},
		"split port":          {[]candidate{{name: "a", portName: "p0s1"}, {name: "b", portName: "pf0vf0"}}, "a"},
	} {
		if got := ownNetdev(c.in); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// What the files say after a change is what a kernel would have been told.
func TestSetNumVFs(t *testing.T) {
	const pf = "0000:3b:00.0"
	tr := newTree(t)
	tr.pf(pf, 8, 0)
	h := tr.host()
	if err := h.SetNumVFs(t.Context(), pf, 4); err != nil {
		t.Fatal(err)
	}
	if got := tr.read(dev(pf) + "/sriov_numvfs"); got != "4" {
		t.Errorf("sriov_numvfs %s", got)
	}
	if got := tr.read(dev(pf) + "/sriov_drivers_autoprobe"); got != "1" {
		t.Errorf("autoprobe left at %s", got)
	}
	if err := h.SetNumVFs(t.Context(), "../../../etc", 4); err == nil || !strings.Contains(err.Error(), "not a PCI address") {
		t.Errorf("got %v", err)
	}
	os.Remove(filepath.Join(tr.root, dev(pf), "sriov_numvfs"))
	err := h.SetNumVFs(t.Context(), pf, 4)
	var k *KernelError
	if !errors.As(err, &k) || k.ErrnoName() != "ENOENT" || !strings.Contains(err.Error(), "create 4 VFs on 0000:3b:00.0") || !strings.Contains(k.Hint, "PF driver") {
		t.Errorf("got %v", err)
	}
}

func TestBindDriver(t *testing.T) {
	const pf, vf = "0000:3b:00.0", "0000:3b:10.0"
	tr := newTree(t)
	tr.pf(pf, 8, 1)
	tr.write("bus/pci/drivers/iavf/unbind", "")
	tr.write("bus/pci/drivers_probe", "")
	h := tr.host()

	if err := h.BindDriver(t.Context(), vf, "iavf"); err != nil {
		t.Error(err)
	}
	if got := tr.read("bus/pci/drivers/iavf/unbind"); got != "" {
		t.Errorf("a VF with the right driver was unbound: %q", got)
	}
	err := h.BindDriver(t.Context(), vf, "vfio-pci")
	if err == nil || !strings.Contains(err.Error(), "load its module") || !errors.Is(err, unix.ENXIO) {
		t.Errorf("got %v", err)
	}
	if got := tr.read("bus/pci/drivers/iavf/unbind"); got != "" {
		t.Errorf("the VF left its driver for one that is not there: %q", got)
	}
	tr.write("bus/pci/drivers/vfio-pci/bind", "")
	if err = h.BindDriver(t.Context(), vf, "vfio-pci"); err != nil {
		t.Error(err)
	}
	for file, want := range map[string]string{dev(vf) + "/driver_override": "vfio-pci", "bus/pci/drivers/iavf/unbind": vf, "bus/pci/drivers/vfio-pci/bind": vf} {
		if got := tr.read(file); got != want {
			t.Errorf("%s holds %q, want %q", file, got, want)
		}
	}
	if err = h.BindDriver(t.Context(), vf, "../x"); err == nil {
		t.Error("a path was taken for a driver")
	}

	tr.write(dev(pf)+"/sriov_drivers_autoprobe", "0\n") // as a killed SetNumVFs leaves it
	tr.write(dev(vf)+"/driver_override", "")
	os.Remove(filepath.Join(tr.root, dev(vf), "driver"))
	os.Remove(filepath.Join(tr.root, "bus/pci/drivers/vfio-pci/bind"))
	err = h.BindDriver(t.Context(), vf, DefaultDriver)
	if err == nil || !strings.Contains(err.Error(), "no driver took the VF") || !strings.Contains(err.Error(), "8086:154c") {
		t.Errorf("got %v", err)
	}
	for file, want := range map[string]string{dev(vf) + "/driver_override": "", "bus/pci/drivers_probe": vf, dev(pf) + "/sriov_drivers_autoprobe": "1"} {
		if got := tr.read(file); got != want {
			t.Errorf("%s holds %q, want %q", file, got, want)
		}
	}
}

func TestKernelErrorNamesCauseAndMend(t *testing.T) {
	err := &KernelError{Op: "create 8 VFs", Object: "0000:3b:00.0", Err: fmt.Errorf("write: %w", unix.ENOMEM), Hint: hintFor(unix.ENOMEM, numVFsHints)}
	for _, part := range []string{"create 8 VFs on 0000:3b:00.0", "cannot allocate memory", "(ENOMEM)", "pci=realloc"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q lacks %q", err.Error(), part)
		}
	}
	if !errors.Is(err, unix.ENOMEM) {
		t.Error("the errno is hidden")
	}
}

func TestChangesNeedANetdev(t *testing.T) {
	h := &Host{}
	err := h.SetMTU(t.Context(), Link{PCIAddress: "0000:3b:00.0"}, 9000)
	if !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "0000:3b:00.0") {
		t.Errorf("got %v", err)
	}
}

func FuzzParsePCIID(f *testing.F) {
	for _, s := range []string{"0x8086", "154c", "", "0x", "0xfffff", "-1", "0x 1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := parsePCIID(s)
		if err != nil {
			return
		}
		if again, err := parsePCIID(id); err != nil || again != id || len(id) != 4 {
			t.Errorf("%q gives %q, read again %q %v", s, id, again, err)
		}
	})
}

func FuzzParseVirtfn(f *testing.F) {
	for _, s := range []string{"virtfn0", "virtfn63", "virtfn-1", "virtfn+1", "virtfn01", "virtfn", "physfn"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if i, ok := parseVirtfn(s); ok && fmt.Sprintf("virtfn%d", i) != s {
			t.Errorf("%q taken as %d", s, i)
		}
	})
}

func FuzzValidPCIAddress(f *testing.F) {
	for _, s := range []string{"0000:3b:00.0", "10000:e1:1f.7", "../../etc", "0000:3b:00.8", "0000:3B:00.0", "0000:3b:00.0\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if ValidPCIAddress(s) && (filepath.Base(s) != s || strings.ContainsAny(s, "/\n\x00")) {
			t.Errorf("%q would leave its folder", s)
		}
	})
}
