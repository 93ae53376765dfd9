package cluster

import (
	"fmt"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// object parses the YAML spec of an object of this group.
func object(t *testing.T, kind, name, spec string) *unstructured.Unstructured {
	t.Helper()
	var s map[string]any
	if err := yaml.Unmarshal([]byte(spec), &s); err != nil {
		t.Fatalf("parse the spec of %s: %v", name, err)
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": sriovv1.SchemeGroupVersion.String(), "kind": kind,
		"metadata": map[string]any{"name": name, "namespace": operatorNamespace},
		"spec":     s,
	}}
}

func TestSchemaRefuses(t *testing.T) {
	needAPI(t)
	const policy, network = "SriovNetworkNodePolicy", "SriovNetwork"
	const node = "nodeSelector: {a: b}\nresourceName: r\n"
	for _, c := range []struct{ name, kind, spec, field, want string }{
		{"no spec", policy, "null", "spec", "Required value"},
		{"no VFs", policy, node + "numVfs: 0\nnicSelector: {vendor: '8086'}", "spec.numVfs",
			"Invalid value: 0: this makes no VFs: set numVfs to 1 or more; to take VFs away, delete the policy"},
		{"range backwards", policy, node + "numVfs: 8\nnicSelector: {pfNames: ['ens1f0#5-2']}", "spec.nicSelector.pfNames[0]",
			`"ens1f0#5-2" has a VF range that runs backwards: write the lower VF number first, as in ens1f0#2-5`},
		{"two ranges", policy, node + "numVfs: 8\nnicSelector: {pfNames: [a, 'ens1f0#0-1#2']}", "spec.nicSelector.pfNames[1]",
			"at most one # before the VFs"},
		{"two dashes", policy, node + "numVfs: 8\nnicSelector: {pfNames: ['ens1f0#0-1-2']}", "spec.nicSelector.pfNames[0]",
			`"0-1-2" is not a choice of VFs`},
		{"no VF after #", policy, node + "numVfs: 8\nnicSelector: {pfNames: ['ens1f0#']}", "spec.nicSelector.pfNames[0]",
			`"" is not a choice of VFs`},
		{"range without a name", policy, node + "numVfs: 8\nnicSelector: {pfNames: ['#0-1']}", "spec.nicSelector.pfNames[0]",
			"is not a PF name"},
		{"range past the end", policy, node + "numVfs: 4\nnicSelector: {pfNames: ['ens1f0#0-4']}", "spec.nicSelector.pfNames",
			"a VF range in ens1f0#0-4 reaches past the last VF: VFs are numbered from 0 to numVfs - 1"},
		{"index past the end", policy, node + "numVfs: 4\nnicSelector: {pfNames: ['ens1f0#0-1,4']}", "spec.nicSelector.pfNames",
			"a VF range in ens1f0#0-1,4 reaches past the last VF"},
		{"vfio-pci with RDMA", policy, node + "numVfs: 4\ndeviceType: vfio-pci\nisRdma: true\nnicSelector: {vendor: '15b3'}", "spec.isRdma",
			"isRdma true cannot go with deviceType vfio-pci"},
		{"vDPA on vfio-pci", policy, node + "numVfs: 4\ndeviceType: vfio-pci\neSwitchMode: switchdev\nvdpaType: vhost\nnicSelector: {vendor: '15b3'}", "spec.vdpaType",
			"vdpaType vhost cannot go with deviceType vfio-pci"},
		{"vDPA in legacy mode", policy, node + "numVfs: 4\nvdpaType: virtio\nnicSelector: {vendor: '15b3'}", "spec.vdpaType",
			"vdpaType virtio needs the NIC in switchdev mode"},
		{"switchdev on InfiniBand", policy, node + "numVfs: 4\nlinkType: IB\neSwitchMode: switchdev\nnicSelector: {vendor: '15b3'}", "spec.eSwitchMode",
			"eSwitchMode switchdev cannot go with linkType IB"},
		{"netFilter with vendor", policy, node + "numVfs: 1\nnicSelector: {vendor: '15b3', netFilter: 'openstack/NetworkID:1'}", "spec.nicSelector.netFilter",
			"netFilter openstack/NetworkID:1 must stand alone"},
		{"netFilter with a mode", policy, node + "numVfs: 1\neSwitchMode: legacy\nnicSelector: {netFilter: 'openstack/NetworkID:1'}", "spec.eSwitchMode",
			"eSwitchMode legacy cannot go with nicSelector.netFilter"},
		{"netFilter on InfiniBand", policy, node + "numVfs: 1\nlinkType: ib\nnicSelector: {netFilter: 'openstack/NetworkID:1'}", "spec.linkType",
			"linkType ib cannot go with nicSelector.netFilter"},
		{"netFilter without a value", policy, node + "numVfs: 1\nnicSelector: {netFilter: 'openstack'}", "spec.nicSelector.netFilter",
			`netFilter "openstack" is not of the form <platform>/NetworkID:<id>`},
		{"bridge in legacy mode", policy, node + "numVfs: 1\nbridge: {ovs: {}}\nnicSelector: {vendor: '15b3'}", "spec.bridge",
			"bridge.ovs needs the NIC in switchdev mode"},
		{"bridge on a NIC managed elsewhere", policy, node + "numVfs: 1\neSwitchMode: switchdev\nexternallyManaged: true\nbridge: {ovs: {}}\nnicSelector: {vendor: '15b3'}", "spec.bridge",
			"bridge.ovs cannot go with externallyManaged true"},
		{"resource name", policy, "nodeSelector: {a: b}\nresourceName: -x\nnumVfs: 1\nnicSelector: {vendor: '15b3'}", "spec.resourceName",
			`resourceName "-x" is not a resource name`},
		{"priority", policy, node + "numVfs: 1\npriority: 100\nnicSelector: {vendor: '15b3'}", "spec.priority",
			"should be less than or equal to 99"},
		{"device type", policy, node + "numVfs: 1\ndeviceType: igb_uio\nnicSelector: {vendor: '15b3'}", "spec.deviceType",
			`supported values: "netdevice", "vfio-pci"`},

		{"VLAN", network, "resourceName: r\nvlan: 5000", "spec.vlan",
			"Invalid value: 5000: not a VLAN ID: set vlan to 1 to 4094, or to 0 for no VLAN"},
		{"negative VLAN", network, "resourceName: r\nvlan: -1", "spec.vlan", "Invalid value: -1: not a VLAN ID"},
		{"VLAN priority", network, "resourceName: r\nvlanQoS: 8", "spec.vlanQoS", "Invalid value: 8: not an 802.1p priority: set vlanQoS to 0 to 7"},
		{"VLAN priority without a VLAN", network, "resourceName: r\nvlanQoS: 3", "spec.vlanQoS", "vlanQoS is the priority in a VLAN tag: set vlan, or set vlanQoS to 0"},
		{"VLAN protocol", network, "resourceName: r\nvlanProto: 802.1x", "spec.vlanProto", "supported values"},
		{"rates", network, "resourceName: r\nminTxRate: 200\nmaxTxRate: 100", "spec.minTxRate",
			"minTxRate is above maxTxRate: lower minTxRate or raise maxTxRate"},
		{"negative rate", network, "resourceName: r\nmaxTxRate: -1", "spec.maxTxRate", "Invalid value: -1: a rate cannot be negative"},
		{"namespace", network, "resourceName: r\nnetworkNamespace: A_B", "spec.networkNamespace", `networkNamespace "A_B" is not a namespace name`},
		{"network resource name", network, "resourceName: a/b", "spec.resourceName", `resourceName "a/b" is not a resource name`},
		{"spoofChk", network, "resourceName: r\nspoofChk: 'yes'", "spec.spoofChk", `supported values: "on", "off"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := api.Create(t.Context(), object(t, c.kind, "refused", c.spec), client.DryRunAll)
			if err == nil {
				t.Fatal("it was accepted")
			}
			if !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(c.want)) || !strings.Contains(err.Error(), c.field+":") {
				t.Errorf("the error is\n%v\nand lacks %q at %s", err, c.want, c.field)
			}
		})
	}
}

func TestSchemaAccepts(t *testing.T) {
	needAPI(t)
	const node = "nodeSelector: {a: b}\nresourceName: r\n"
	for i, c := range []struct{ kind, spec string }{
		{"SriovNetworkNodePolicy", node + "numVfs: 8\nnicSelector: {pfNames: [ens1f0, 'ens1f0#0-7', 'ens1f0#3', 'ens1f0#0-3,7', 'ens1f0#0-0']}"},
		{"SriovNetworkNodePolicy", node + "numVfs: 128\npriority: 0\nmtu: 9000\nlinkType: ib\nisRdma: true\nneedVhostNet: true\nexcludeTopology: true\nexternallyManaged: true\nnicSelector: {vendor: '15b3', deviceID: '101b', rootDevices: ['0000:3b:00.0']}"},
		{"SriovNetworkNodePolicy", node + "numVfs: 8\neSwitchMode: switchdev\nlinkType: ETH\nvdpaType: virtio\nnicSelector: {vendor: '15b3'}\nbridge: {ovs: {bridge: {datapathType: netdev, failMode: secure, externalIDs: {a: b}}, uplink: {interface: {type: dpdk, mtuRequest: 9000}}}}"},
		{"SriovNetworkNodePolicy", node + "numVfs: 1\nnicSelector: {netFilter: 'openstack/NetworkID:ada9ec67-2c97-467c-b674-c47200e2f5da'}"},
		{"SriovNetworkNodePolicy", "nodeSelector: {}\nresourceName: intel-nics_1\nnumVfs: 1\nnicSelector: {vendor: '8086'}"},
		{"SriovNetwork", "resourceName: r"},
		{"SriovNetwork", "resourceName: r\nnetworkNamespace: default\nvlan: 4094\nvlanQoS: 7\nvlanProto: 802.1AD\nspoofChk: 'on'\ntrust: 'off'\nlinkState: auto\nminTxRate: 0\nmaxTxRate: 100\ncapabilities: '{\"mac\": true}'\nipam: '{}'\nmetaPlugins: '{\"type\": \"tuning\"}'\nlogLevel: ''\nlogFile: /tmp/x"},
		{"SriovNetwork", "resourceName: r\nminTxRate: 10\nmaxTxRate: 0"},
	} {
		if err := api.Create(t.Context(), object(t, c.kind, fmt.Sprintf("accepted-%d", i), c.spec), client.DryRunAll); err != nil {
			t.Errorf("the spec\n%s\nis refused: %v", c.spec, err)
		}
	}
}

func TestSchemaDefaults(t *testing.T) {
	needAPI(t)
	policy := object(t, "SriovNetworkNodePolicy", "defaults", "nodeSelector: {}\nresourceName: r\nnumVfs: 1\nnicSelector: {vendor: '8086'}")
	network := object(t, "SriovNetwork", "defaults", "resourceName: r")
	for _, c := range []struct {
		object *unstructured.Unstructured
		field  string
		want   any
	}{
		{policy, "priority", int64(sriovv1.DefaultPriority)},
		{policy, "deviceType", "netdevice"},
		{network, "logLevel", "info"},
	} {
		created := c.object.DeepCopy()
		if err := api.Create(t.Context(), created, client.DryRunAll); err != nil {
			t.Fatal(err)
		}
		if got, _, _ := unstructured.NestedFieldNoCopy(created.Object, "spec", c.field); got != c.want {
			t.Errorf("%s spec.%s defaults to %v, want %v", created.GetKind(), c.field, got, c.want)
		}
	}
}
