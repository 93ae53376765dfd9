package config

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/sluice-network/sluice/deviceplugin"
	"github.com/sluice-network/sluice/internal/host"
)

// upstream is the sample ConfigMap of the SR-IOV network device plugin, but for what Sluice
// does not offer.
const upstream = `{
  "resourceList": [{
      "resourceName": "intel_sriov_netdevice",
      "selectors": [{"vendors": ["8086"], "devices": ["154c", "10ed", "1889"], "drivers": ["i40evf", "iavf", "ixgbevf"]}]
    }, {
      "resourceName": "intel_sriov_dpdk",
      "resourcePrefix": "intel.com",
      "additionalInfo": {"*": {"token": "3e49019f-412f-4f02-824e-4cd195944205"}},
      "selectors": [{"vendors": ["8086"], "devices": ["154c", "10ed", "1889"], "drivers": ["vfio-pci"], "pfNames": ["enp0s0f0", "enp2s2f1"]}]
    }, {
      "resourceName": "mlnx_sriov_rdma",
      "resourcePrefix": "mellanox.com",
      "selectors": [{"vendors": ["15b3"], "devices": ["1018"], "drivers": ["mlx5_ib"], "isRdma": true, "needVhostNet": true}]
    }, {
      "resourceName": "one",
      "deviceType": "netDevice",
      "excludeTopology": true,
      "allocation": "Spread",
      "requireCarrier": true,
      "selectors": {"pciAddresses": ["0000:01:00.1"], "linkTypes": ["ether"], "rootDevices": ["0000:01:00.0#0-3,8"]}
    }, {
      "resourceName": "all",
      "selectors": {"selectAll": true}
    }]}`

func TestParseAcceptsWhatUpstreamDoes(t *testing.T) {
	c, err := Parse([]byte(upstream), "openshift.io")
	if err != nil {
		t.Fatal(err)
	}
	intel := []string{"154c", "10ed", "1889"}
	want := &Config{Resources: []Resource{
		{Prefix: "openshift.io", Name: "intel_sriov_netdevice", Selectors: []Selector{{Vendors: []string{"8086"}, Devices: intel, Drivers: []string{"i40evf", "iavf", "ixgbevf"}}}},
		{Prefix: "intel.com", Name: "intel_sriov_dpdk", Info: map[string]map[string]string{"*": {"token": "3e49019f-412f-4f02-824e-4cd195944205"}}, Selectors: []Selector{{
			Vendors: []string{"8086"}, Devices: intel, Drivers: []string{"vfio-pci"}, PFNames: []string{"enp0s0f0", "enp2s2f1"},
		}}},
		{Prefix: "mellanox.com", Name: "mlnx_sriov_rdma", Selectors: []Selector{{Vendors: []string{"15b3"}, Devices: []string{"1018"}, Drivers: []string{"mlx5_ib"}, IsRdma: true, NeedVhostNet: true}}},
		{Prefix: "openshift.io", Name: "one", ExcludeTopology: true, Spread: true, RequireCarrier: true, Selectors: []Selector{{PCIAddresses: []string{"0000:01:00.1"}, LinkTypes: []string{"ether"}, RootDevices: []string{"0000:01:00.0#0-3,8"}}}},
		{Prefix: "openshift.io", Name: "all", Selectors: []Selector{{SelectAll: true}}},
	}}
	if diff := cmp.Diff(want, c, cmpopts.IgnoreUnexported(Selector{})); diff != "" {
		t.Error(diff)
	}
}

func TestParseRefuses(t *testing.T) {
	one := func(selector string) string {
		return `{"resourceList":[{"resourceName":"a","selectors":` + selector + `}]}`
	}
	for _, c := range []struct{ name, text, want string }{
		{"nothing", ``, "unexpected end"},
		{"null", `null`, "resourceList is missing"},
		{"another file", `{"resourcelist":[]}`, `resourcelist: unknown key: did you mean "resourceList"?`},
		{"two objects", `{"resourceList":[]}{}`, "after top-level value"},
		{"misspelt key", `{"resourceList":[{"resourceName":"a"},{"resourceNmae":"b"}]}`, `resourceList[1].resourceNmae: unknown key: did you mean "resourceName"?`},
		{"misspelt selector", one(`[{"vendors":["8086"]},{"vendros":["8086"]}]`), `resourceList[0].selectors[1].vendros: unknown key: did you mean "vendors"?`},
		{"selector in other case", one(`{"IsRdma":true}`), `resourceList[0].selectors.IsRdma: unknown key: did you mean "isRdma"?`},
		{"unknown", one(`{"colour":"red"}`), `resourceList[0].selectors.colour: unknown key`},
		{"repeated key", one(`{"vendors":["8086"],"vendors":[]}`), `resourceList[0].selectors: duplicate field "vendors"`},
		{"a string for a list", one(`{"vendors":"8086"}`), "resourceList[0].selectors: json: cannot unmarshal string"},
		{"no selectors", `{"resourceList":[{"resourceName":"a"}]}`, `resourceList[0].selectors: nothing is selected: write filters, or {"selectAll": true}`},
		{"null selectors", one(`null`), "nothing is selected"},
		{"no selector in the list", one(`[]`), "nothing is selected"},
		{"empty selector", one(`{}`), `resourceList[0].selectors: it has no filter and would select every VF`},
		{"empty lists", one(`[{"vendors":[]}]`), `resourceList[0].selectors[0]: it has no filter`},
		{"needVhostNet is no filter", one(`{"needVhostNet":true}`), "it has no filter"},
		{"null in the list", one(`[null]`), "it has no filter"},
		{"selectAll and a filter", one(`{"selectAll":true,"drivers":["iavf"]}`), "selectAll true has filters beside it"},
		{"name", `{"resourceList":[{"resourceName":"a.b","selectors":{"selectAll":true}}]}`, `resourceList[0].resourceName "a.b"`},
		{"no name", `{"resourceList":[{"selectors":{"selectAll":true}}]}`, `resourceList[0].resourceName ""`},
		{"prefix", `{"resourceList":[{"resourceName":"a","resourcePrefix":"x/y","selectors":{"selectAll":true}}]}`, "x/y/a is not a valid resource name"},
		{"same name", `{"resourceList":[{"resourceName":"a","selectors":{"selectAll":true}},{"resourceName":"A","resourcePrefix":"p.io","selectors":{"selectAll":true}}]}`, `resourceList[1].resourceName "A": resourceList[0] has this name`},
		{"accelerator", `{"resourceList":[{"resourceName":"a","deviceType":"accelerator"}]}`, `resourceList[0].deviceType "accelerator" is not supported`},
		{"subfunctions", `{"resourceList":[{"resourceName":"a","deviceType":"auxNetDevice"}]}`, `"auxNetDevice" is not supported`},
		{"no type", `{"resourceList":[{"resourceName":"a","deviceType":"netdevice"}]}`, `deviceType "netdevice": there is no such type: write netDevice`},
		{"information of no device", `{"resourceList":[{"resourceName":"a","additionalInfo":{"ens1":{}},"selectors":{"selectAll":true}}]}`, `resourceList[0].additionalInfo: key "ens1"`},
		{"allocation", `{"resourceList":[{"resourceName":"a","allocation":"spread","selectors":{"selectAll":true}}]}`, `resourceList[0].allocation "spread": write Pack or Spread`},
		{"vendor", one(`{"vendors":["8086","0x15b3"]}`), `resourceList[0].selectors.vendors[1] "0x15b3": write four hex digits`},
		{"device", one(`{"devices":[""]}`), `devices[0] ""`},
		{"driver", one(`{"drivers":[""]}`), `drivers[0] ""`},
		{"address", one(`{"pciAddresses":["01:00.1"]}`), `pciAddresses[0] "01:00.1": write a PCI address`},
		{"root device", one(`{"rootDevices":["ens1"]}`), `rootDevices[0] "ens1": write the PCI address of a PF`},
		{"link type", one(`{"linkTypes":["infiniban"]}`), `linkTypes[0] "infiniban": write ether or infiniband: did you mean "infiniband"?`},
		{"range backwards", one(`{"pfNames":["ens1#3-1"]}`), `pfNames[0] "ens1#3-1": "3-1" is not a choice of VFs`},
		{"empty range", one(`{"pfNames":["ens1#"]}`), `"" is not a choice of VFs`},
		{"range of words", one(`{"pfNames":["ens1#a-b"]}`), `"a-b" is not a choice`},
		{"two choices", one(`{"pfNames":["ens1#1#2"]}`), `"1#2" is not a choice`},
		{"no PF", one(`{"pfNames":["#1"]}`), "write the PF"},
		{"DDP", one(`{"ddpProfiles":["GTP"]}`), `resourceList[0].selectors.ddpProfiles ["GTP"] is not supported`},
		{"partition keys", one(`{"pKeys":["0x1"]}`), "pKeys"},
		{"ACPI index", one(`{"acpiIndexes":["101"]}`), "acpiIndexes"},
		{"subfunction types", one(`{"auxTypes":["sf"]}`), "auxTypes"},
		{"vDPA", one(`{"vdpaType":"virtio-net"}`), `vdpaType "virtio-net": write virtio or vhost`},
		{"RDMA and vDPA", one(`{"isRdma":true,"vdpaType":"vhost"}`), "exclude each other"},
		{"selectors that differ", one(`[{"isRdma":true},{"drivers":["iavf"]}]`), "resourceList[0].selectors[1]: isRdma, needVhostNet and vdpaType must be the same"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Parse([]byte(c.text), "p.io")
			if err == nil || got != nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%+v, %v; want %s", got, err, c.want)
			}
		})
	}
	// All of it is told at once.
	_, err := Parse([]byte(`{"resourceList":[{"resourceName":"a.b"},{"resourceName":"b","selectors":{}}]}`), "p.io")
	if err == nil || !strings.Contains(err.Error(), "resourceList[0]") || !strings.Contains(err.Error(), "resourceList[1]") {
		t.Error(err)
	}
}

func vf(n int, change func(*Candidate)) Candidate {
	c := Candidate{Vendor: "8086", DeviceID: "1889", Device: deviceplugin.Device{
		PCIAddress: fmt.Sprintf("0000:01:00.%d", n+1), PFAddress: "0000:01:00.0", PFName: "ens1f0", VFIndex: n, Driver: "iavf", LinkType: host.Ethernet, Healthy: true,
	}}
	if change != nil {
		change(&c)
	}
	return c
}

func TestPools(t *testing.T) {
	candidates := []Candidate{
		vf(0, nil),
		vf(1, func(c *Candidate) { c.Driver = "vfio-pci" }),
		vf(2, func(c *Candidate) { c.RDMA, c.Vendor, c.DeviceID = true, "15b3", "101e" }),
		vf(3, func(c *Candidate) { c.LinkType, c.VDPA = host.InfiniBand, host.VDPAVhost }),
		vf(4, func(c *Candidate) { c.PFName, c.PFAddress = "ens2f0", "0000:02:00.0" }),
		vf(5, func(c *Candidate) { c.Resource = "openshift.io/policy" }),
	}
	for _, c := range []struct {
		name, list string
		want       string // pools with VF numbers
		refused    string
	}{
		{"all", `{"resourceName":"a","selectors":{"selectAll":true}}`, "a:0,1,2,3,4", "p.io/a does not get VFs that policies give to other resources: 0000:01:00.6 (openshift.io/policy)"},
		{"vendor", `{"resourceName":"a","selectors":{"vendors":["15B3"]}}`, "a:2", ""},
		{"device", `{"resourceName":"a","selectors":{"devices":["101E"]}}`, "a:2", ""},
		{"driver", `{"resourceName":"a","selectors":{"drivers":["vfio-pci"]}}`, "a:1", ""},
		{"address", `{"resourceName":"a","selectors":{"pciAddresses":["0000:01:00.4","0000:09:00.0"]}}`, "a:3", ""},
		{"PF", `{"resourceName":"a","selectors":{"pfNames":["ENS2F0"]}}`, "a:4", ""},
		{"VFs of a PF", `{"resourceName":"a","selectors":{"pfNames":["ens1f0#0,2-3"]}}`, "a:0,2,3", ""},
		{"root device", `{"resourceName":"a","selectors":{"rootDevices":["0000:02:00.0#4"]}}`, "a:4", ""},
		{"link", `{"resourceName":"a","selectors":{"linkTypes":["infiniband"]}}`, "a:3", ""},
		{"RDMA", `{"resourceName":"a","selectors":{"isRdma":true}}`, "a:2", ""},
		{"vDPA", `{"resourceName":"a","selectors":{"vdpaType":"vhost"}}`, "a:3", ""},
		{"both of two filters", `{"resourceName":"a","selectors":{"vendors":["8086"],"pfNames":["ens1f0#1-2"]}}`, "a:1", ""},
		{"one of two selectors", `{"resourceName":"a","selectors":[{"vendors":["15b3"]},{"drivers":["vfio-pci"]}]}`, "a:1,2", ""},
		{"none", `{"resourceName":"a","selectors":{"vendors":["1af4"]}}`, "a:", ""},
		{"the first of the list", `{"resourceName":"a","selectors":{"vendors":["15b3"]}},{"resourceName":"b","selectors":{"pfNames":["ens1f0#0-3"]}}`, "a:2 b:0,1,3",
			"p.io/b does not get VFs that resources before it in the list select: 0000:01:00.3 (p.io/a)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config, err := Parse([]byte(`{"resourceList":[`+c.list+`]}`), "p.io")
			if err != nil {
				t.Fatal(err)
			}
			pools, refused := config.Pools(candidates)
			var got []string
			for _, p := range pools {
				var vfs []string
				for _, d := range p.Devices {
					vfs = append(vfs, fmt.Sprint(d.VFIndex))
				}
				got = append(got, p.Resource+":"+strings.Join(vfs, ","))
			}
			if strings.Join(got, " ") != c.want || !strings.Contains(strings.Join(refused, "; "), c.refused) || c.refused == "" && len(refused) > 0 {
				t.Errorf("%v, refused %v", got, refused)
			}
		})
	}
}

func TestRequireCarrier(t *testing.T) {
	config, err := Parse([]byte(`{"resourceList":[{"resourceName":"a","requireCarrier":true,"allocation":"Spread","selectors":{"selectAll":true}}]}`), "p.io")
	if err != nil {
		t.Fatal(err)
	}
	pools, _ := config.Pools([]Candidate{vf(0, func(c *Candidate) { c.Carrier = true }), vf(1, nil)})
	if d := pools[0].Devices; !d[0].Healthy || d[1].Healthy || !strings.Contains(d[1].Reason, "ens1f0 has no carrier") || !pools[0].Spread {
		t.Errorf("%+v", pools)
	}
}

// What is in a pod cannot be selected by what its netdev or driver shows; it stays where
// it was given from.
func TestAHeldVFStaysInItsPool(t *testing.T) {
	config, err := Parse([]byte(`{"resourceList":[{"resourceName":"a","selectors":{"selectAll":true}},{"resourceName":"b","selectors":{"isRdma":true}}]}`), "p.io")
	if err != nil {
		t.Fatal(err)
	}
	pools, refused := config.Pools([]Candidate{vf(0, nil), vf(1, func(c *Candidate) { c.Hand = "p.io/b" }), vf(2, func(c *Candidate) { c.Hand = "p.io/gone" })})
	if len(pools[0].Devices) != 2 || len(pools[1].Devices) != 1 || pools[1].Devices[0].VFIndex != 1 || len(refused) != 1 {
		t.Errorf("%+v, %v", pools, refused)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(upstream))
	f.Add([]byte(`{"resourceList":[{"resourceName":"a","selectors":{"vendros":["8086"]}}]}`))
	f.Add([]byte(`{"resourceList":[{"resourceName":"a","selectors":[{"pfNames":["a#0-1,2"]},null,3]}]}`))
	f.Add([]byte(`{"resourceList":null,"resourceList":[{}]}`))
	known := map[string]bool{}
	for _, v := range []any{file{}, entry{}, Selector{}} {
		for _, key := range keysOf(v) {
			known[key] = true
		}
	}
	candidates := []Candidate{vf(0, nil), vf(1, nil)}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse(data, "p.io")
		if err != nil {
			if c != nil {
				t.Fatal("half a configuration")
			}
			return
		}
		var raw any
		if err := json.Unmarshal(data, &raw); err != nil {
			t.Fatalf("took what is no JSON: %v", err)
		}
		walk(t, raw, known)
		for _, r := range c.Resources {
			for _, s := range r.Selectors {
				filters := s
				filters.SelectAll, filters.NeedVhostNet = false, false
				empty := true
				for i := range reflect.TypeOf(filters).NumField() {
					v := reflect.ValueOf(filters).Field(i)
					empty = empty && (v.IsZero() || v.Kind() == reflect.Slice && v.Len() == 0)
				}
				if empty != s.SelectAll {
					t.Fatalf("selects all without being asked, or is asked with filters: %+v", s)
				}
			}
		}
		pools, _ := c.Pools(candidates)
		seen := map[string]bool{}
		for _, p := range pools {
			for _, d := range p.Devices {
				if seen[d.PCIAddress] {
					t.Fatalf("%s is in two pools", d.PCIAddress)
				}
				seen[d.PCIAddress] = true
			}
		}
	})
}

// walk finds keys that nobody knows; what additionalInfo has is the user's.
func walk(t *testing.T, v any, known map[string]bool) {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			if !known[key] {
				t.Fatalf("accepted the unknown key %q", key)
			}
			if key != "additionalInfo" {
				walk(t, value, known)
			}
		}
	case []any:
		for _, value := range v {
			walk(t, value, known)
		}
	}
}
