package deviceplugin

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/internal/host"
)

func TestEnvironmentNames(t *testing.T) {
	for _, c := range []struct{ prefix, name, key, shell string }{
		{"openshift.io", "intelnics", "PCIDEVICE_OPENSHIFT_IO_INTELNICS", "PCIDEVICE_OPENSHIFT_IO_INTELNICS"},
		{"intel.com", "my-net_x", "PCIDEVICE_INTEL_COM_MY-NET_X", "PCIDEVICE_INTEL_COM_MY_NET_X"},
		{"my-corp.example.com", "Nic0", "PCIDEVICE_MY-CORP_EXAMPLE_COM_NIC0", "PCIDEVICE_MY_CORP_EXAMPLE_COM_NIC0"},
	} {
		key := envKey(c.prefix + "/" + c.name)
		if key != c.key || shellKey(key) != c.shell {
			t.Errorf("%s/%s: %s and %s, want %s and %s", c.prefix, c.name, key, shellKey(key), c.key, c.shell)
		}
	}
}

func TestAliasNeverNamesAnotherResource(t *testing.T) {
	got := aliases([]string{"P_A-B", "P_A_B", "P_C-D", "P_E"})
	if diff := cmp.Diff(map[string]string{"P_C-D": "P_C_D"}, got); diff != "" {
		t.Error(diff)
	}
	rapid.Check(t, func(t *rapid.T) {
		keys := rapid.SliceOfDistinct(rapid.StringMatching(`[AB_-]{1,4}`), rapid.ID[string]).Draw(t, "keys")
		seen := map[string]bool{}
		for _, k := range keys {
			seen[k] = true
		}
		for k, a := range aliases(keys) {
			if seen[a] {
				t.Fatalf("alias %s of %s is taken in %v", a, k, keys)
			}
			seen[a] = true
		}
	})
}

func TestCheckPools(t *testing.T) {
	twice := pool("a", vf(1), vf(1))
	odd := pool("a", Device{PCIAddress: "01:00.1"})
	for _, c := range []struct {
		name  string
		pools []Pool
		good  string
		err   []string // empty: none
	}{
		{"fine", []Pool{pool("a", vf(1)), pool("b-c_D", vf(2))}, "a b-c_D", nil},
		{"empty pool", []Pool{pool("a")}, "a", nil},
		{"no name", []Pool{pool("")}, "", []string{`"p.io/"`, "resourceName"}},
		{"dot", []Pool{pool("a.b")}, "", []string{`"p.io/a.b"`, "'.'", "resourceName"}},
		{"space", []Pool{pool("a b")}, "", []string{`"p.io/a b"`, "resourceName"}},
		{"slash", []Pool{pool("a/b")}, "", []string{`"p.io/a/b"`}},
		{"hyphen at the end", []Pool{pool("a-")}, "", []string{`"p.io/a-"`}},
		{"too long", []Pool{pool(strings.Repeat("a", 64))}, "", []string{"63"}},
		{"not an address", []Pool{odd}, "", []string{`"p.io/a"`, `"01:00.1"`}},
		{"device twice", []Pool{twice}, "", []string{`"p.io/a"`, "0000:01:00.1", "twice"}},
		{"name twice", []Pool{pool("a"), pool("a"), pool("b")}, "b", []string{"PCIDEVICE_P_IO_A", "p.io/a, p.io/a"}},
		{"names differ in case", []Pool{pool("nic"), pool("NIC"), pool("b")}, "b", []string{"p.io/NIC, p.io/nic"}},
		{"device in two", []Pool{pool("a", vf(1)), pool("b", vf(1)), pool("c", vf(2))}, "c", []string{"0000:01:00.1", "p.io/a, p.io/b", "selectors"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			good, err := checkPools("p.io", c.pools)
			if got := strings.ReplaceAll(strings.Join(sortedKeys(good), " "), "p.io/", ""); got != c.good {
				t.Errorf("good pools %q, want %q", got, c.good)
			}
			if len(c.err) > 0 {
				wantError(t, err, c.err...)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestContainer(t *testing.T) {
	const key = "PCIDEVICE_P_IO_N-1"
	vfio := vf(1)
	vfio.IOMMUGroup = "12"
	other := vf(2)
	other.IOMMUGroup = "12" // shares the group
	rdmaFacts := facts{rdma: rdma{Device: "mlx5_2", Uverbs: "uverbs2", Umad: "umad2", CM: true}}
	rw := func(pairs ...string) (out []*api.DeviceSpec) {
		for i := 0; i < len(pairs); i += 2 {
			out = append(out, &api.DeviceSpec{HostPath: pairs[i], ContainerPath: pairs[i+1], Permissions: "rw"})
		}
		return out
	}
	for _, c := range []struct {
		name  string
		pool  Pool
		devs  []Device
		known map[string]facts
		ids   string
		info  string
		nodes []*api.DeviceSpec
	}{
		{
			"netdevice", pool("n-1"), []Device{vf(1), vf(2)}, nil, "0000:01:00.1,0000:01:00.2",
			`{"0000:01:00.1":{"generic":{"deviceID":"0000:01:00.1"},"sluice":{"pf":"ens1f0","resource":"p.io/n-1","vf":"0"}},"0000:01:00.2":{"generic":{"deviceID":"0000:01:00.2"},"sluice":{"pf":"ens1f0","resource":"p.io/n-1","vf":"1"}}}`, nil,
		},
		{
			"vfio, one group", Pool{DeviceType: DeviceTypeVFIO}, []Device{vfio, other}, nil, "0000:01:00.1,0000:01:00.2",
			`{"0000:01:00.1":{"generic":{"deviceID":"0000:01:00.1"},"sluice":{"pf":"ens1f0","resource":"p.io/n-1","vf":"0"},"vfio":{"dev-mount":"/dev/vfio/12","mount":"/dev/vfio/vfio"}},` +
				`"0000:01:00.2":{"generic":{"deviceID":"0000:01:00.2"},"sluice":{"pf":"ens1f0","resource":"p.io/n-1","vf":"1"},"vfio":{"dev-mount":"/dev/vfio/12","mount":"/dev/vfio/vfio"}}}`,
			rw("/dev/vfio/vfio", "/dev/vfio/vfio", "/dev/vfio/12", "/dev/vfio/12"),
		},
		{
			"vfio without IOMMU", Pool{DeviceType: DeviceTypeVFIO}, []Device{vfio}, map[string]facts{"0000:01:00.1": {noIOMMU: true}}, "0000:01:00.1",
			`{"0000:01:00.1":{"generic":{"deviceID":"0000:01:00.1"},"sluice":{"pf":"ens1f0","resource":"p.io/n-1","vf":"0"},"vfio":{"dev-mount":"/dev/vfio/12","mount":"/dev/vfio/vfio"}}}`,
			rw("/dev/vfio/vfio", "/dev/vfio/vfio", "/dev/vfio/noiommu-12", "/dev/vfio/12"),
		},
		{
			"vhost-net", Pool{VhostNet: true}, []Device{vf(1)}, nil, "0000:01:00.1",
			`{"0000:01:00.1":{"generic":{"deviceID":"0000:01:00.1"},"sluice":{"pf":"ens1f0","resource":"p.io/n-1","vf":"0"},"vhost":{"net-mount":"/dev/vhost-net","tun-mount":"/dev/net/tun"}}}`,
			rw("/dev/vhost-net", "/dev/vhost-net", "/dev/net/tun", "/dev/net/tun"),
		},
		{
			"RDMA", Pool{RDMA: true}, []Device{vf(1)}, map[string]facts{"0000:01:00.1": rdmaFacts}, "0000:01:00.1",
			`{"0000:01:00.1":{"generic":{"deviceID":"0000:01:00.1"},"rdma":{"rdma_cm":"/dev/infiniband/rdma_cm","rdma_dev":"mlx5_2",` +
				`"umad":"/dev/infiniband/umad2","uverbs":"/dev/infiniband/uverbs2"},"sluice":{"pf":"ens1f0","resource":"p.io/n-1","vf":"0"}}}`,
			rw("/dev/infiniband/uverbs2", "/dev/infiniband/uverbs2", "/dev/infiniband/umad2", "/dev/infiniband/umad2",
				"/dev/infiniband/rdma_cm", "/dev/infiniband/rdma_cm"),
		},
		{
			"vDPA", Pool{}, []Device{vdpaVF(host.VDPAVhost)}, map[string]facts{"0000:01:00.1": {vdpa: "/dev/vhost-vdpa-3"}}, "0000:01:00.1",
			`{"0000:01:00.1":{"generic":{"deviceID":"0000:01:00.1"},"sluice":{"pf":"ens1f0","resource":"p.io/n-1","vf":"0"},"vdpa":{"mount":"/dev/vhost-vdpa-3"}}}`,
			rw("/dev/vhost-vdpa-3", "/dev/vhost-vdpa-3"),
		},
		{
			"more of the user's", Pool{Info: map[string]map[string]string{"*": {"a": "1", "b": "1"}, "0000:01:00.1": {"b": "2"}}}, []Device{vf(1)}, nil, "0000:01:00.1",
			`{"0000:01:00.1":{"extra":{"a":"1","b":"2"},"generic":{"deviceID":"0000:01:00.1"},"sluice":{"pf":"ens1f0","resource":"p.io/n-1","vf":"0"}}}`, nil,
		},
		{
			"RDMA not asked for", Pool{}, []Device{vf(1)}, map[string]facts{"0000:01:00.1": rdmaFacts}, "0000:01:00.1",
			`{"0000:01:00.1":{"generic":{"deviceID":"0000:01:00.1"},"sluice":{"pf":"ens1f0","resource":"p.io/n-1","vf":"0"}}}`, nil,
		},
		{
			"RDMA not there", Pool{RDMA: true}, []Device{vf(1)}, nil, "0000:01:00.1",
			`{"0000:01:00.1":{"generic":{"deviceID":"0000:01:00.1"},"sluice":{"pf":"ens1f0","resource":"p.io/n-1","vf":"0"}}}`, nil,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			env, nodes, err := container(c.pool, "p.io/n-1", key, "ALIAS", c.devs, c.known)
			if err != nil {
				t.Fatal(err)
			}
			got := &api.ContainerAllocateResponse{Envs: env}
			r := &resource{opts: &Options{}}
			if err := r.nodes(got, c.devs, nodes); err != nil {
				t.Fatal(err)
			}
			want := map[string]string{key: c.ids, key + "_INFO": c.info, "ALIAS": c.ids, "ALIAS_INFO": c.info}
			if diff := cmp.Diff(want, got.GetEnvs()); diff != "" {
				t.Errorf("environment (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(fmt.Sprint(c.nodes), fmt.Sprint(got.GetDevices())); diff != "" {
				t.Errorf("device nodes (-want +got):\n%s", diff)
			}
		})
	}
	_, _, err := container(Pool{DeviceType: DeviceTypeVFIO}, "p.io/n-1", key, "", []Device{vf(1)}, nil)
	wantError(t, err, "0000:01:00.1", "IOMMU group", "intel_iommu=on")
}

func vdpaVF(kind string) Device {
	d := vf(1)
	d.VDPA = kind
	return d
}

// The files are those of the specification, and a runtime can make anything of them that
// the kubelet could be told.
func TestCDI(t *testing.T) {
	f := newFixture(t)
	f.opts.CDIDir = t.TempDir()
	k := startKubelet(t, f.dir)
	user := vf(1)
	user.IOMMUGroup, user.Driver = "7", DeviceTypeVFIO
	plain := vf(2)
	p := pool("nics", user, plain)
	p.DeviceType = ""
	f.advertise(t, p)
	eventually(t, "registered", func() bool { return k.client(nics) != nil })
	got, err := k.allocate(nics, "0000:01:00.1", "0000:01:00.2")
	if err != nil {
		t.Fatal(err)
	}
	if len(got.GetDevices()) > 0 || len(got.GetCdiDevices()) != 1 || got.GetCdiDevices()[0].GetName() != "sluice.dev/vf=0000:01:00.1" {
		t.Errorf("%v", got)
	}
	file := filepath.Join(f.opts.CDIDir, "sluice-vf-0000:01:00.1.json")
	b, err := os.ReadFile(file)
	want := `{"cdiVersion":"0.5.0","kind":"sluice.dev/vf","devices":[{"name":"0000:01:00.1","containerEdits":{"deviceNodes":[` +
		`{"path":"/dev/vfio/vfio","hostPath":"/dev/vfio/vfio","permissions":"rw"},{"path":"/dev/vfio/7","hostPath":"/dev/vfio/7","permissions":"rw"}]}}]}`
	if err != nil || string(b) != want {
		t.Errorf("%v, got\n%s\nwant\n%s", err, b, want)
	}
	other := filepath.Join(f.opts.CDIDir, "other.json")
	idle := filepath.Join(f.opts.CDIDir, "sluice-vf-0000:09:00.1.json")
	for _, path := range []string{other, idle} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f.advertise(t) // a container of the pod that has it may start again
	for path, stays := range map[string]bool{file: true, other: true, idle: false} {
		if _, err := os.Stat(path); (err == nil) != stays {
			t.Errorf("%s: %v", path, err)
		}
	}
	f.opts.CDIDir = filepath.Join(f.opts.CDIDir, "gone")
	f.advertise(t, p)
	_, err = k.allocate(nics, "0000:01:00.1")
	wantError(t, err, "write CDI specification of 0000:01:00.1")
}

func TestDeviceInfo(t *testing.T) {
	sys := t.TempDir()
	for _, dir := range []string{"vhost-vdpa-3", "virtio9", "power"} {
		if err := os.MkdirAll(filepath.Join(sys, "bus/vdpa/devices/vdpa:0000:01:00.1", dir), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	for kind, want := range map[string]string{
		host.VDPAVhost:  `{"type":"vdpa","version":"1.1.0","vdpa":{"parent-device":"vdpa:0000:01:00.1","driver":"vhost","path":"/dev/vhost-vdpa-3","pci-address":"0000:01:00.1","pf-pci-address":"0000:01:00.0","representor-device":"eth9"}}`,
		host.VDPAVirtio: `{"type":"vdpa","version":"1.1.0","vdpa":{"parent-device":"vdpa:0000:01:00.1","driver":"virtio","path":"/sys/bus/virtio/devices/virtio9","pci-address":"0000:01:00.1","pf-pci-address":"0000:01:00.0","representor-device":"eth9"}}`,
		"":              `{"type":"pci","version":"1.1.0","pci":{"pci-address":"0000:01:00.1","pf-pci-address":"0000:01:00.0","representor-device":"eth9"}}`,
	} {
		d := vdpaVF(kind)
		d.Representor = "eth9"
		if got, err := json.Marshal(deviceInfo(d, readFacts(sys, d))); err != nil || string(got) != want {
			t.Errorf("%v, got\n%s\nwant\n%s", err, got, want)
		}
	}
	_, _, err := container(Pool{}, "p.io/n", "K", "", []Device{vdpaVF(host.VDPAVhost)}, nil)
	wantError(t, err, "0000:01:00.1", "vhost_vdpa")
}

func TestReadFacts(t *testing.T) {
	sys := t.TempDir()
	file := func(path, content string) {
		t.Helper()
		full := filepath.Join(sys, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o750); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d := vf(2)
	d.IOMMUGroup = "7"
	if got := readFacts(sys, d); got != (facts{}) {
		t.Errorf("of nothing: %+v", got)
	}
	const dev = "bus/pci/devices/0000:01:00.2/"
	file("kernel/iommu_groups/7/name", "vfio-noiommu\n")
	file(dev+"infiniband/mlx5_2/node_type", "")
	file(dev+"infiniband_verbs/uverbs2/dev", "")
	file(dev+"infiniband_mad/umad2/dev", "")
	file(dev+"infiniband_mad/issm2/dev", "")
	file("class/misc/rdma_cm/dev", "")
	want := facts{
		noIOMMU: true,
		rdma:    rdma{Device: "mlx5_2", Uverbs: "uverbs2", Umad: "umad2", Issm: "issm2", CM: true},
	}
	if got := readFacts(sys, d); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestPrefer(t *testing.T) {
	// Two nodes; node 0 has PFs a (3 VFs) and b (2), node 1 has PF c (4).
	devices := map[string]Device{}
	var all []string
	add := func(pf string, numa, n int) {
		for i := range n {
			id := fmt.Sprintf("%s%d", pf, i)
			devices[id] = Device{PCIAddress: id, PFAddress: pf, NUMANode: numa}
			all = append(all, id)
		}
	}
	add("a", 0, 3)
	add("b", 0, 2)
	add("c", 1, 4)
	for _, c := range []struct {
		name      string
		available string
		must      string
		size      int
		exclude   bool
		want      string
	}{
		{"best fitting PF of the best fitting node", "a0 a1 a2 b0 b1 c0 c1 c2 c3", "", 2, false, "c0 c1"},
		{"a node that has enough", "a0 a1 a2 b0 b1 c0 c1", "", 4, false, "a0 a1 a2 b0"},
		{"smallest sufficient PF", "a0 a1 a2 b0 b1", "", 2, false, "b0 b1"},
		{"near what must be", "a1 b0 b1 c0 c1 c2", "a0", 2, false, "a0 a1"},
		{"same node as what must be", "b0 b1 c0", "a0", 2, false, "a0 b0"},
		{"across nodes when it must", "a0 c0 c1", "", 3, false, "c0 c1 a0"},
		{"topology excluded: PFs only", "a0 b0 b1 c0", "", 2, true, "b0 b1"},
		{"not enough", "a0", "", 3, false, "a0"},
		{"unknown IDs are not chosen", "z9 a0", "", 1, false, "a0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := prefer(devices, c.exclude, false, strings.Fields(c.available), strings.Fields(c.must), c.size)
			if strings.Join(got, " ") != c.want {
				t.Errorf("got %v, want %s", got, c.want)
			}
		})
	}
	rapid.Check(t, func(t *rapid.T) {
		available := rapid.SliceOfDistinct(rapid.SampledFrom(all), rapid.ID[string]).Draw(t, "available")
		must := available[:rapid.IntRange(0, len(available)).Draw(t, "must")]
		size := rapid.IntRange(len(must), len(all)).Draw(t, "size")
		got := prefer(devices, false, false, available, must, size)
		if len(got) != min(size, len(available)) {
			t.Fatalf("%d devices of %d, want %d", len(got), len(available), size)
		}
		for _, id := range got {
			if !slices.Contains(available, id) {
				t.Fatalf("%s is not available", id)
			}
		}
		for _, id := range must {
			if !slices.Contains(got, id) {
				t.Fatalf("%s must be included", id)
			}
		}
		// Never more nodes than necessary: when one node has all, one is used.
		free := map[int]int{}
		for _, id := range available {
			free[devices[id].NUMANode]++
		}
		nodes := map[int]bool{}
		for _, id := range got {
			nodes[devices[id].NUMANode] = true
		}
		if len(must) == 0 && len(nodes) > 1 && (free[0] >= size || free[1] >= size) {
			t.Fatalf("%v is on two nodes", got)
		}
	})
}

// Spread keeps to one NUMA node if it can, and takes as many PFs there as there are.
func TestPreferSpreads(t *testing.T) {
	devices := map[string]Device{}
	var all []string
	for _, pf := range []struct {
		name    string
		numa, n int
	}{{"a", 0, 3}, {"b", 0, 2}, {"c", 0, 1}, {"d", 1, 4}} {
		for i := range pf.n {
			id := fmt.Sprintf("%s%d", pf.name, i)
			devices[id] = Device{PCIAddress: id, PFAddress: pf.name, NUMANode: pf.numa}
			all = append(all, id)
		}
	}
	for _, c := range []struct{ available, must, want string }{
		{"a0 a1 a2 b0 b1 c0", "", "a0"},
		{"a0 a1 a2 b0 b1 c0", "", "a0 b0"},
		{"a0 a1 a2 b0 b1 c0", "", "a0 b0 c0"},
		{"a0 a1 a2 b0 b1 c0", "", "a0 b0 c0 a1"},
		{"a1 a2 b0 d0", "a0", "a0 b0"},
		{"d0 d1 d2 d3 a0", "", "d0 d1"}, // one node before two PFs
	} {
		must := strings.Fields(c.must)
		if got := prefer(devices, false, true, strings.Fields(c.available), must, len(strings.Fields(c.want))); strings.Join(got, " ") != c.want {
			t.Errorf("of %s beside %s: %v, want %s", c.available, c.must, got, c.want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		available := rapid.SliceOfDistinct(rapid.SampledFrom(all[:6]), rapid.ID[string]).Draw(t, "available") // of one node
		must := available[:rapid.IntRange(0, len(available)).Draw(t, "must")]
		size := rapid.IntRange(len(must), 8).Draw(t, "size")
		got := prefer(devices, false, true, available, must, size)
		if len(got) != min(size, len(available)) {
			t.Fatalf("%d devices of %d, want %d", len(got), len(available), size)
		}
		has, left := map[string]int{}, map[string]int{}
		for _, id := range available {
			if slices.Contains(got, id) {
				has[devices[id].PFAddress]++
			} else {
				left[devices[id].PFAddress]++
			}
			if slices.Contains(must, id) && !slices.Contains(got, id) {
				t.Fatalf("%s must be included", id)
			}
		}
		// No PF has two more than one that has some left, unless it must.
		required := map[string]int{}
		for _, id := range must {
			required[devices[id].PFAddress]++
		}
		for pf, n := range has {
			for other := range left {
				if n > has[other]+1 && n > required[pf] {
					t.Fatalf("%v: %d of %s, %d of %s which has some left", got, n, pf, has[other], other)
				}
			}
		}
	})
}
