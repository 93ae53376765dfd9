package cluster

import (
	"fmt"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// object parses the YAML spec of an object of one of our kinds.
func object(t *testing.T, kind, name, spec string) *unstructured.Unstructured {
	t.Helper()
	var s map[string]any
	if err := yaml.Unmarshal([]byte(spec), &s); err != nil {
		t.Fatalf("parse the spec of %s: %v", name, err)
	}
	group := sriovv1.SchemeGroupVersion
	if strings.HasPrefix(kind, "Macvlan") || strings.HasPrefix(kind, "IP") {
		group = sluicev1.SchemeGroupVersion
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": group.String(), "kind": kind,
		"metadata": map[string]any{"name": name, "namespace": operatorNamespace},
		"spec":     s,
	}}
}

func TestSchemaRefuses(t *testing.T) {
	needAPI(t)
	const (
		policy, network, ib, ovs = "SriovNetworkNodePolicy", "SriovNetwork", "SriovIBNetwork", "OVSNetwork"
		config, pool             = "SriovOperatorConfig", "SriovNetworkPoolConfig"
		slots, macvlan           = "MacvlanNodePolicy", "MacvlanNetwork"
		node                     = "nodeSelector: {a: b}\nresourceName: r\n"
	)
	for _, c := range []struct{ name, kind, spec, field, want string }{
		{"no spec", policy, "null", "spec", "Required value"},
		{"no VFs", policy, node + "numVfs: 0\nnicSelector: {vendor: '8086'}", "spec.numVfs",
			"this makes no VFs: set numVfs to 1 or more; to take VFs away, delete the policy"},
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
		{"netFilter with a bridge", policy, node + "numVfs: 1\nbridge: {ovs: {}}\nnicSelector: {netFilter: 'openstack/NetworkID:1'}", "spec.bridge",
			"bridge.ovs cannot go with nicSelector.netFilter"},
		{"netFilter without a value", policy, node + "numVfs: 1\nnicSelector: {netFilter: 'openstack'}", "spec.nicSelector.netFilter",
			`netFilter "openstack" is not of the form <platform>/NetworkID:<id>`},
		{"bridge in legacy mode", policy, node + "numVfs: 1\nbridge: {ovs: {}}\nnicSelector: {vendor: '15b3'}", "spec.bridge",
			"bridge.ovs needs the NIC in switchdev mode"},
		{"bridge on a NIC managed elsewhere", policy, node + "numVfs: 1\neSwitchMode: switchdev\nexternallyManaged: true\nbridge: {ovs: {}}\nnicSelector: {vendor: '15b3'}", "spec.bridge",
			"bridge.ovs cannot go with externallyManaged true"},
		{"resource name", policy, "nodeSelector: {a: b}\nresourceName: -x\nnumVfs: 1\nnicSelector: {vendor: '15b3'}", "spec.resourceName",
			`resourceName "-x" is not a resource name`},
		{"priority", policy, node + "numVfs: 1\npriority: 100\nnicSelector: {vendor: '15b3'}", "spec.priority",
			"Invalid value: 100: not a priority: set priority to 0, the strongest, to 99"},
		{"MTU", policy, node + "numVfs: 1\nmtu: 67\nnicSelector: {vendor: '15b3'}", "spec.mtu",
			"Invalid value: 67: not an MTU: set mtu to 68 to 65535 bytes"},
		{"vendor by name", policy, node + "numVfs: 1\nnicSelector: {vendor: Intel}", "spec.nicSelector.vendor",
			`vendor "Intel" is not a PCI vendor ID: write four hex digits, such as 8086`},
		{"device ID", policy, node + "numVfs: 1\nnicSelector: {deviceID: '0x158b'}", "spec.nicSelector.deviceID",
			`deviceID "0x158b" is not a PCI device ID: write four hex digits, such as 158b`},
		{"PCI address", policy, node + "numVfs: 1\nnicSelector: {rootDevices: ['0000:3b:00.0', '3b:00.0']}", "spec.nicSelector.rootDevices[1]",
			`"3b:00.0" is not a PCI address: write, for example, 0000:3b:00.0`},
		{"link type", policy, node + "numVfs: 1\nlinkType: ethernet\nnicSelector: {vendor: '15b3'}", "spec.linkType", "supported values"},
		{"eswitch mode", policy, node + "numVfs: 1\neSwitchMode: offload\nnicSelector: {vendor: '15b3'}", "spec.eSwitchMode", "supported values"},
		{"vDPA type", policy, node + "numVfs: 1\neSwitchMode: switchdev\nvdpaType: net\nnicSelector: {vendor: '15b3'}", "spec.vdpaType", "supported values"},
		{"bridge's fail mode", policy, node + "numVfs: 1\neSwitchMode: switchdev\nbridge: {ovs: {bridge: {failMode: closed}}}\nnicSelector: {vendor: '15b3'}", "spec.bridge.ovs.bridge.failMode", "supported values"},
		{"device type", policy, node + "numVfs: 1\ndeviceType: igb_uio\nnicSelector: {vendor: '15b3'}", "spec.deviceType",
			`supported values: "netdevice", "vfio-pci"`},

		{"empty pool", "IPPool", "{}", "spec", "it has no addresses: give ipv4, ipv6 or both"},
		{"host bits", "IPPool", "ipv4: {cidr: 10.1.0.1/24}", "spec.ipv4.cidr", `"10.1.0.1/24" is not a subnet: write, for example, 10.1.0.0/20 or fd00:1::/64`},
		{"gateway", "IPPool", "ipv4: {cidr: 10.1.0.0/24, gateway: x}", "spec.ipv4.gateway", `"x" is not an IP address`},
		{"exclude", "IPPool", "ipv4: {cidr: 10.1.0.0/24, exclude: [x]}", "spec.ipv4.exclude[0]", `"x" is neither an address nor a subnet`},
		{"block size", "IPPool", "ipv4: {cidr: 10.1.0.0/24, blockSize: 3}", "spec.ipv4.blockSize", "not a power of two from 1 to 65536"},
		{"rest", "IPPool", "ipv4: {cidr: 10.1.0.0/24}\nrestSeconds: -1", "spec.restSeconds", "not a time of rest: set restSeconds to 0 to 86400"},
		{"quota", "IPPool", "ipv4: {cidr: 10.1.0.0/24}\nquotas: [{namespace: a, interfaces: -1}]", "spec.quotas[0].interfaces", "not a number of interfaces"},
		{"reservation for nobody", "IPPool", "ipv4: {cidr: 10.1.0.0/24}\nreservations: [{address: 10.1.0.7, namespace: a, pod: ''}]", "spec.reservations[0]", "it is for nobody: give pod, mac or both"},
		{"reserved MAC", "IPPool", "ipv4: {cidr: 10.1.0.0/24}\nreservations: [{address: 10.1.0.7, namespace: a, mac: x}]", "spec.reservations[0].mac", `"x" is not a MAC address`},
		{"route", "IPPool", "ipv4: {cidr: 10.1.0.0/24}\nroutes: [{dst: 10.2.0.1}]", "spec.routes[0].dst", `"10.2.0.1" is not a subnet`},

		{"VLAN", network, "resourceName: r\nvlan: 5000", "spec.vlan",
			"Invalid value: 5000: not a VLAN ID: set vlan to 1 to 4094, or to 0 for no VLAN"},
		{"negative VLAN", network, "resourceName: r\nvlan: -1", "spec.vlan", "Invalid value: -1: not a VLAN ID"},
		{"VLAN priority", network, "resourceName: r\nvlanQoS: 8", "spec.vlanQoS", "Invalid value: 8: not an 802.1p priority: set vlanQoS to 0 to 7"},
		{"VLAN priority without a VLAN", network, "resourceName: r\nvlanQoS: 3", "spec.vlanQoS", "vlanQoS is the priority in a VLAN tag: set vlan, or set vlanQoS to 0"},
		{"VLAN protocol without a VLAN", network, "resourceName: r\nvlanProto: 802.1ad", "spec.vlanProto", "vlanProto 802.1ad is the kind of a VLAN tag: set vlan, or remove vlanProto"},
		{"link state", network, "resourceName: r\nlinkState: up", "spec.linkState", "supported values"},
		{"log level", network, "resourceName: r\nlogLevel: trace", "spec.logLevel", "supported values"},
		{"VLAN protocol", network, "resourceName: r\nvlanProto: 802.1x", "spec.vlanProto", "supported values"},
		{"rates", network, "resourceName: r\nminTxRate: 200\nmaxTxRate: 100", "spec.minTxRate",
			"minTxRate is above maxTxRate: lower minTxRate or raise maxTxRate"},
		{"negative rate", network, "resourceName: r\nmaxTxRate: -1", "spec.maxTxRate", "Invalid value: -1: a rate cannot be negative"},
		{"namespace", network, "resourceName: r\nnetworkNamespace: A_B", "spec.networkNamespace", `networkNamespace "A_B" is not a namespace name`},
		{"network resource name", network, "resourceName: a/b", "spec.resourceName", `resourceName "a/b" is not a resource name`},
		{"spoofChk", network, "resourceName: r\nspoofChk: 'yes'", "spec.spoofChk", `supported values: "on", "off"`},

		{"InfiniBand resource name", ib, "resourceName: a/b", "spec.resourceName", `resourceName "a/b" is not a resource name`},
		{"InfiniBand namespace", ib, "resourceName: r\nnetworkNamespace: A", "spec.networkNamespace", `networkNamespace "A" is not a namespace name`},
		{"InfiniBand link state", ib, "resourceName: r\nlinkState: up", "spec.linkState", "supported values"},

		{"OVS resource name", ovs, "resourceName: a/b", "spec.resourceName", `resourceName "a/b" is not a resource name`},
		{"OVS namespace", ovs, "resourceName: r\nnetworkNamespace: A", "spec.networkNamespace", `networkNamespace "A" is not a namespace name`},
		{"OVS VLAN", ovs, "resourceName: r\nvlan: 4096", "spec.vlan", "Invalid value: 4096: not a VLAN ID"},
		{"OVS MTU", ovs, "resourceName: r\nmtu: 60", "spec.mtu", "Invalid value: 60: not an MTU: set mtu to 68 to 65535 bytes, or to 0 for the VF's own"},
		{"trunk VLAN", ovs, "resourceName: r\ntrunk: [{id: 1}, {id: 4096}]", "spec.trunk[1].id", "Invalid value: 4096: not a VLAN ID: use 0 to 4095"},
		{"trunk end", ovs, "resourceName: r\ntrunk: [{minID: 1, maxID: -1}]", "spec.trunk[0].maxID", "Invalid value: -1: not a VLAN ID"},
		{"empty trunk entry", ovs, "resourceName: r\ntrunk: [{}]", "spec.trunk[0]", "an empty trunk entry passes nothing: give id, or minID and maxID"},
		{"half a trunk range", ovs, "resourceName: r\ntrunk: [{minID: 1}]", "spec.trunk[0]", "a trunk range needs both ends: give minID and maxID"},
		{"trunk backwards", ovs, "resourceName: r\ntrunk: [{minID: 2, maxID: 1}]", "spec.trunk[0]", "the trunk range runs backwards"},

		{"configuration's log level", config, "logLevel: 3", "spec.logLevel", "Invalid value: 3: not a log level: set logLevel to 0, 1 or 2"},
		{"configuration mode", config, "configurationMode: ansible", "spec.configurationMode", "supported values"},
		{"plugin", config, "disablePlugins: [intel]", "spec.disablePlugins[0]", "supported values"},
		{"onRemoval", config, "onRemoval: Reset", "spec.onRemoval", "supported values"},
		{"environment variable", config, "configDaemonEnvVars: {A: b, 1B: c}", "spec.configDaemonEnvVars", "1B is not the name of an environment variable"},
		{"toleration's operator", config, "tolerations: [{operator: Exists}, {key: a, operator: In}]", "spec.tolerations[1].operator", "operator In is none: use Exists or Equal"},
		{"toleration's effect", config, "tolerations: [{operator: Exists, effect: NoStart}]", "spec.tolerations[0].effect", "effect NoStart is none: use NoSchedule"},
		{"toleration without a key", config, "tolerations: [{value: a}]", "spec.tolerations[0].operator", "set operator to Exists, or give a key"},
		{"toleration with a value too many", config, "tolerations: [{key: a, operator: Exists, value: b}]", "spec.tolerations[0].value", "operator Exists looks at no value: remove value"},

		{"negative maxUnavailable", pool, "maxUnavailable: -1", "spec.maxUnavailable", "Invalid value: -1: maxUnavailable is not a number of nodes or a percentage: write 0 or more, or 1% to 100%"},
		{"maxUnavailable in words", pool, "maxUnavailable: two", "spec.maxUnavailable", `Invalid value: "two": maxUnavailable is not`},
		{"maxUnavailable of nothing", pool, "maxUnavailable: 0%", "spec.maxUnavailable", `Invalid value: "0%": maxUnavailable is not`},
		{"maxUnavailable of more than all", pool, "maxUnavailable: 101%", "spec.maxUnavailable", `Invalid value: "101%": maxUnavailable is not`},
		{"offload pool with maxUnavailable", pool, "maxUnavailable: 1\novsHardwareOffloadConfig: {name: worker}", "spec.ovsHardwareOffloadConfig", "cannot go with maxUnavailable or nodeSelector: make two SriovNetworkPoolConfigs"},
		{"offload pool with nodes", pool, "nodeSelector: {}\novsHardwareOffloadConfig: {name: worker}", "spec.ovsHardwareOffloadConfig", "cannot go with"},
		{"RDMA mode", pool, "rdmaMode: none", "spec.rdmaMode", "supported values"},
		{"reboot policy", pool, "rebootPolicy: Always", "spec.rebootPolicy", "supported values"},
		{"node expression", pool, "nodeSelector: {matchExpressions: [{key: a, operator: Is, values: [b]}]}", "spec.nodeSelector.matchExpressions", "an operator is none of In, NotIn, Exists and DoesNotExist"},
		{"node expression without values", pool, "nodeSelector: {matchExpressions: [{key: a, operator: In}]}", "spec.nodeSelector.matchExpressions", "In and NotIn need values"},
		{"node expression with values", pool, "nodeSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}", "spec.nodeSelector.matchExpressions", "Exists and DoesNotExist take none"},

		{"slots", slots, node + "slots: 0\nparentSelector: {pfNames: [bond0]}", "spec.slots", "Invalid value: 0: not a number of slots: set slots to 1 to 4096"},
		{"parent's VLAN", slots, node + "vlan: 4095\nparentSelector: {pfNames: [bond0]}", "spec.vlan", "Invalid value: 4095: not a VLAN ID: set vlan to 1 to 4094, or to 0"},
		{"parent's MTU", slots, node + "mtu: 10\nparentSelector: {pfNames: [bond0]}", "spec.mtu", "Invalid value: 10: not an MTU"},
		{"slots' priority", slots, node + "priority: -1\nparentSelector: {pfNames: [bond0]}", "spec.priority", "Invalid value: -1: not a priority"},
		{"slots' resource name", slots, "nodeSelector: {}\nresourceName: a/b\nparentSelector: {pfNames: [bond0]}", "spec.resourceName", `resourceName "a/b" is not a resource name`},
		{"parent with a VF range", slots, node + "parentSelector: {pfNames: [bond0, 'ens1f0#0-3']}", "spec.parentSelector.pfNames[1]", `"ens1f0#0-3" has a VF range: MacVLAN parents are whole links, write the name alone`},
		{"parent's kind", slots, node + "parentSelector: {kinds: [dummy]}", "spec.parentSelector.kinds[0]", "supported values"},
		{"parent's vendor", slots, node + "parentSelector: {vendor: Intel}", "spec.parentSelector.vendor", `vendor "Intel" is not a PCI vendor ID`},
		{"parent's device", slots, node + "parentSelector: {deviceID: '1'}", "spec.parentSelector.deviceID", `deviceID "1" is not a PCI device ID`},
		{"parent's address", slots, node + "parentSelector: {rootDevices: [x]}", "spec.parentSelector.rootDevices[0]", `"x" is not a PCI address`},
		{"vendor of a bond", slots, node + "parentSelector: {vendor: '8086', kinds: [bond]}", "spec.parentSelector.kinds", "vendor, deviceID and rootDevices are of physical NICs, which kinds bond leaves out: add physical"},

		{"no link", macvlan, "mode: bridge", "spec", "nothing says on which link: give resourceName, that of a MacvlanNodePolicy, or master"},
		{"mode", macvlan, "master: bond0\nmode: source", "spec.mode", "supported values"},
		{"MacVLAN MTU", macvlan, "master: bond0\nmtu: 67", "spec.mtu", "Invalid value: 67: not an MTU"},
		{"master", macvlan, "master: a/b", "spec.master", `master "a/b" is not the name of a link: write 1 to 15 characters`},
		{"long master", macvlan, "master: abcdefghijklmnop", "spec.master", `master "abcdefghijklmnop" is not the name of a link`},
		{"MacVLAN resource name", macvlan, "resourceName: a/b", "spec.resourceName", `resourceName "a/b" is not a resource name`},
		{"probe", macvlan, "master: bond0\nconflictProbe: 20000", "spec.conflictProbe", "not a time to listen"},
		{"host interface without addresses", macvlan, "master: bond0\nhostInterface: {}", "spec", "hostInterface leads to the pod's addresses: set ipam, too"},
		{"route of a host interface", macvlan, "master: bond0\nipam: '{}'\nhostInterface: {routes: [10.96.0.1/12]}", "spec.hostInterface.routes[0]", `"10.96.0.1/12" is not a network such as 10.96.0.0/12`},
		{"MacVLAN namespace", macvlan, "resourceName: r\nnetworkNamespace: A", "spec.networkNamespace", `networkNamespace "A" is not a namespace name`},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := "refused"
			if c.kind == config {
				name = sriovv1.DefaultOperatorConfigName
			}
			err := api.Create(t.Context(), object(t, c.kind, name, c.spec), client.DryRunAll)
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
		{"SriovIBNetwork", "resourceName: r\nnetworkNamespace: default\nlinkState: disable\ncapabilities: '{\"infinibandGUID\": true}'\nipam: '{}'\nmetaPlugins: '{\"type\": \"rdma\"}'"},
		{"OVSNetwork", "resourceName: r\nbridge: br0\nvlan: 4095\nmtu: 9000\ntrunk: [{id: 0}, {minID: 1, maxID: 4095}, {id: 7, minID: 8, maxID: 8}]\ninterfaceType: dpdk"},
		{"SriovOperatorConfig", "{}"},
		{"SriovOperatorConfig", "configDaemonNodeSelector: {a: b}\nenableInjector: true\nenableOperatorWebhook: true\nlogLevel: 2\ndisableDrain: true\nenableOvsOffload: true\nconfigurationMode: systemd\nuseCDI: true\n" +
			"disablePlugins: [mellanox]\nfeatureGates: {parallelNicConfig: true, other: false}\nconfigDaemonEnvVars: {A_1: b}\nonRemoval: Restore\n" +
			"tolerations: [{operator: Exists}, {key: a, value: b, effect: NoExecute, tolerationSeconds: 5}, {key: a, operator: Exists}]"},
		{"SriovNetworkPoolConfig", "maxUnavailable: 0"},
		{"SriovNetworkPoolConfig", "maxUnavailable: 100%\nrdmaMode: exclusive\nrebootPolicy: WhenRequired\nnodeSelector: {matchLabels: {a: b}, matchExpressions: [{key: a, operator: In, values: [b]}, {key: c, operator: DoesNotExist}]}"},
		{"SriovNetworkPoolConfig", "ovsHardwareOffloadConfig: {name: worker}"},
		{"MacvlanNodePolicy", node + "parentSelector: {kinds: [bond, vxlan]}"},
		{"MacvlanNodePolicy", node + "priority: 0\nvlan: 4094\nmtu: 9000\nslots: 4096\nexcludeTopology: true\nparentSelector: {vendor: '8086', deviceID: 158B, rootDevices: ['10000:3b:00.7'], pfNames: [ens1f0], kinds: [physical, bond]}"},
		{"MacvlanNetwork", "resourceName: r"},
		{"MacvlanNetwork", "master: eth0.5\nresourceName: r\nmode: passthru\nmtu: 1400\nnetworkNamespace: default\nipam: '{}'\ncapabilities: '{\"mac\": true}'\nmetaPlugins: '{\"type\": \"tuning\"}'\nconflictProbe: 0\nhostInterface: {routes: [10.96.0.0/12, 169.254.20.10/32, 'fd00::/64']}"},
	} {
		o := object(t, c.kind, fmt.Sprintf("accepted-%d", i), c.spec)
		if c.kind == "SriovOperatorConfig" {
			o.SetName(sriovv1.DefaultOperatorConfigName)
			o.SetNamespace("default") // where nobody else makes one
		}
		if err := api.Create(t.Context(), o, client.DryRunAll); err != nil {
			t.Errorf("the spec\n%s\nis refused: %v", c.spec, err)
		}
	}
}

func TestOperatorConfigIsNamedDefault(t *testing.T) {
	needAPI(t)
	const want = "metadata.name: mine would have no effect, because only the SriovOperatorConfig named default counts: name it default"
	eventually(t, func() error {
		return refusedWith(api.Create(t.Context(), object(t, "SriovOperatorConfig", "mine", "{}"), client.DryRunAll), want)
	})
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
		{object(t, "MacvlanNodePolicy", "defaults", "nodeSelector: {}\nresourceName: r\nparentSelector: {pfNames: [bond0]}"), "priority", int64(sriovv1.DefaultPriority)},
		{object(t, "MacvlanNodePolicy", "defaults", "nodeSelector: {}\nresourceName: r\nparentSelector: {pfNames: [bond0]}"), "slots", int64(64)},
		{object(t, "MacvlanNetwork", "defaults", "master: bond0"), "mode", "bridge"},
		{object(t, "SriovNetworkPoolConfig", "defaults", "{}"), "rebootPolicy", "Never"},
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
