package render

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

var meta = metav1.ObjectMeta{Name: "net", Namespace: "ops"}

func network(spec sriovv1.SriovNetworkSpec) *sriovv1.SriovNetwork {
	spec.ResourceName = "intel"
	return &sriovv1.SriovNetwork{ObjectMeta: meta, Spec: spec}
}

// define renders a network for the operator's namespace ops.
func define(object metav1.Object, prefix string) (*nadv1.NetworkAttachmentDefinition, error) {
	n, ok := Of(object)
	if !ok {
		return nil, fmt.Errorf("%T is no network", object)
	}
	nad, errs := n.Definition(prefix, "ops")
	return nad, errs.ToAggregate()
}

func TestSriovNetworkConfig(t *testing.T) {
	low, high, none := 10, 100, 0
	for _, c := range []struct {
		name string
		spec sriovv1.SriovNetworkSpec
		want string
	}{
		{"nothing set", sriovv1.SriovNetworkSpec{},
			`{"cniVersion":"1.0.0","name":"net","type":"sriov","vlan":0,"vlanQoS":0,"ipam":{}}`},
		{"all set", sriovv1.SriovNetworkSpec{
			Vlan: 100, VlanQoS: 5, VlanProto: "802.1ad", SpoofChk: "off", Trust: "on", LinkState: "enable", MinTxRate: &low, MaxTxRate: &high,
			Capabilities: `{"mac": true, "ips": false}`, IPAM: "{\n  \"type\": \"host-local\",\n  \"subnet\": \"10.1.0.0/24\"\n}\n", LogLevel: "debug", LogFile: "/tmp/a & b"},
			`{"cniVersion":"1.0.0","name":"net","type":"sriov","vlan":100,"spoofchk":"off","trust":"on","vlanQoS":5,"vlanProto":"802.1ad",` +
				`"min_tx_rate":10,"max_tx_rate":100,"link_state":"enable","logLevel":"debug","logFile":"/tmp/a & b",` +
				`"capabilities":{"mac":true,"ips":false},"ipam":{"type":"host-local","subnet":"10.1.0.0/24"}}`},
		{"a rate of zero is written", sriovv1.SriovNetworkSpec{MaxTxRate: &none},
			`{"cniVersion":"1.0.0","name":"net","type":"sriov","vlan":0,"vlanQoS":0,"max_tx_rate":0,"ipam":{}}`},
		{"spaces in a value stay", sriovv1.SriovNetworkSpec{IPAM: `{"type": "x", "note": "it's a  note"}`},
			`{"cniVersion":"1.0.0","name":"net","type":"sriov","vlan":0,"vlanQoS":0,"ipam":{"type":"x","note":"it's a  note"}}`},
		{"meta plugins make a list", sriovv1.SriovNetworkSpec{MetaPluginsConfig: `{"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}}, {"type": "vrf"}`},
			`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"sriov","vlan":0,"vlanQoS":0,"ipam":{}},{"type":"tuning","sysctl":{"net.core.somaxconn":"500"}},{"type":"vrf"}]}`},
	} {
		nad, err := define(network(c.spec), "openshift.io")
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if nad.Spec.Config != c.want {
			t.Errorf("%s: the configuration is\n%s\nwant\n%s", c.name, nad.Spec.Config, c.want)
		}
	}
}

func TestOtherKinds(t *testing.T) {
	id, first, last := uint(5), uint(10), uint(20)
	for _, c := range []struct {
		name, owner, resource, want string
		network                     metav1.Object
	}{
		{"InfiniBand, nothing set", "SriovIBNetwork.sriovnetwork.openshift.io/ops/net", "openshift.io/ib",
			`{"cniVersion":"1.0.0","name":"net","type":"ib-sriov","ipam":{}}`,
			&sriovv1.SriovIBNetwork{ObjectMeta: meta, Spec: sriovv1.SriovIBNetworkSpec{ResourceName: "ib"}}},
		{"InfiniBand, all set", "SriovIBNetwork.sriovnetwork.openshift.io/ops/net", "openshift.io/ib",
			`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"ib-sriov","link_state":"enable","capabilities":{"infinibandGUID":true},"ipam":{"type":"static"}},{"type":"rdma"}]}`,
			&sriovv1.SriovIBNetwork{ObjectMeta: meta, Spec: sriovv1.SriovIBNetworkSpec{ResourceName: "ib", LinkState: "enable",
				Capabilities: `{"infinibandGUID": true}`, IPAM: `{"type": "static"}`, MetaPluginsConfig: `{"type": "rdma"}`}}},
		{"OVS, nothing set", "OVSNetwork.sriovnetwork.openshift.io/ops/net", "openshift.io/ovs",
			`{"cniVersion":"1.0.0","name":"net","type":"ovs","ipam":{}}`,
			&sriovv1.OVSNetwork{ObjectMeta: meta, Spec: sriovv1.OVSNetworkSpec{ResourceName: "ovs"}}},
		{"OVS, all set", "OVSNetwork.sriovnetwork.openshift.io/ops/net", "openshift.io/ovs",
			`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"ovs","bridge":"br\"1","vlan":7,"mtu":9000,"trunk":[{"id":5},{"minID":10,"maxID":20}],"interface_type":"dpdk",` +
				`"capabilities":{"mac":true},"ipam":{"type":"static"}},{"type":"tuning"}]}`,
			&sriovv1.OVSNetwork{ObjectMeta: meta, Spec: sriovv1.OVSNetworkSpec{ResourceName: "ovs", Bridge: `br"1`, Vlan: 7, MTU: 9000, InterfaceType: "dpdk",
				Trunk:        []*sriovv1.TrunkConfig{{ID: &id}, {MinID: &first, MaxID: &last}},
				Capabilities: `{"mac": true}`, IPAM: `{"type": "static"}`, MetaPluginsConfig: `{"type": "tuning"}`}}},
		{"MacVLAN on a slot", "MacvlanNetwork.sluice.dev/ops/net", "openshift.io/slots",
			`{"cniVersion":"1.0.0","name":"net","type":"sluice","mode":"bridge","ipam":{}}`,
			&sluicev1.MacvlanNetwork{ObjectMeta: meta, Spec: sluicev1.MacvlanNetworkSpec{ResourceName: "slots", Mode: "bridge"}}},
		{"MacVLAN on a named link", "MacvlanNetwork.sluice.dev/ops/net", "",
			`{"cniVersion":"1.0.0","name":"net","type":"sluice","master":"bond0","mode":"vepa","mtu":1400,"ipam":{"type":"dhcp"}}`,
			&sluicev1.MacvlanNetwork{ObjectMeta: meta, Spec: sluicev1.MacvlanNetworkSpec{Master: "bond0", Mode: "vepa", Mtu: 1400, IPAM: `{"type": "dhcp"}`}}},
		{"MacVLAN with an interface to the host", "MacvlanNetwork.sluice.dev/ops/net", "openshift.io/slots",
			`{"cniVersion":"1.0.0","name":"net","type":"sluice","mode":"bridge","conflictProbe":0,"hostInterface":{"routes":["10.96.0.0/12"]},"ipam":{"type":"static"}}`,
			&sluicev1.MacvlanNetwork{ObjectMeta: meta, Spec: sluicev1.MacvlanNetworkSpec{ResourceName: "slots", Mode: "bridge", ConflictProbe: new(int),
				HostInterface: &sluicev1.HostInterface{Routes: []string{"10.96.0.0/12"}}, IPAM: `{"type": "static"}`}}},
		{"MacVLAN on a slot of a named link", "MacvlanNetwork.sluice.dev/ops/net", "openshift.io/slots",
			`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"sluice","master":"bond0","mode":"private","capabilities":{"ips":true},"ipam":{}},{"type":"tuning"}]}`,
			&sluicev1.MacvlanNetwork{ObjectMeta: meta, Spec: sluicev1.MacvlanNetworkSpec{ResourceName: "slots", Master: "bond0", Mode: "private",
				Capabilities: `{"ips": true}`, MetaPlugins: `{"type": "tuning"}`}}},
	} {
		nad, err := define(c.network, "openshift.io")
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if nad.Spec.Config != c.want {
			t.Errorf("%s: the configuration is\n%s\nwant\n%s", c.name, nad.Spec.Config, c.want)
		}
		if got := nad.Annotations[sriovv1.AnnotationResourceName]; got != c.resource {
			t.Errorf("%s: the resource is %q, want %q", c.name, got, c.resource)
		}
		if got := nad.Annotations[sriovv1.AnnotationOwnerRef]; got != c.owner {
			t.Errorf("%s: the owner is %q, want %q", c.name, got, c.owner)
		}
	}
}

// What a tenant's network may not say, one in the operator's namespace may.
func TestTenantsMayNot(t *testing.T) {
	spec := sriovv1.SriovNetworkSpec{NetworkNamespace: "victim", LogFile: "/etc/passwd"}
	if _, err := define(network(spec), "openshift.io"); err != nil {
		t.Errorf("in the operator's namespace: %v", err)
	}
	tenants := network(spec)
	tenants.Namespace = "tenant"
	_, err := define(tenants, "openshift.io")
	for _, want := range []string{
		"spec.networkNamespace: Forbidden: it is victim, and only networks in namespace ops may name another namespace: remove networkNamespace, or make the network in ops",
		"spec.logFile: Forbidden: it is /etc/passwd, a path on the node that root writes to, and only networks in namespace ops may name one: remove logFile, or make the network in ops",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error is %v, want %q", err, want)
		}
	}
	tenants.Spec.NetworkNamespace, tenants.Spec.LogFile = "tenant", "" // its own
	if _, err := define(tenants, "openshift.io"); err != nil {
		t.Error(err)
	}
}

func TestMacvlanNeedsALink(t *testing.T) {
	_, err := define(&sluicev1.MacvlanNetwork{ObjectMeta: meta}, "openshift.io")
	if err == nil || !strings.Contains(err.Error(), "spec.resourceName: Required value: give resourceName, that of a MacvlanNodePolicy, or master") {
		t.Errorf("the error is %v", err)
	}
}

func TestSriovNetworkObject(t *testing.T) {
	for wantNamespace, spec := range map[string]sriovv1.SriovNetworkSpec{"ops": {}, "apps": {NetworkNamespace: "apps"}} {
		nad, err := define(network(spec), "example.com")
		if err != nil {
			t.Fatal(err)
		}
		if nad.Namespace != wantNamespace || nad.Name != "net" {
			t.Errorf("it is %s/%s, want %s/net", nad.Namespace, nad.Name, wantNamespace)
		}
		for annotation, want := range map[string]string{
			"k8s.v1.cni.cncf.io/resourceName":     "example.com/intel",
			"sriovnetwork.openshift.io/owner-ref": "SriovNetwork.sriovnetwork.openshift.io/ops/net",
		} {
			if got := nad.Annotations[annotation]; got != want {
				t.Errorf("annotation %s is %q, want %q", annotation, got, want)
			}
		}
	}
}

func TestSriovNetworkRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		spec sriovv1.SriovNetworkSpec
		want string
	}{
		{"ipam without a brace", sriovv1.SriovNetworkSpec{IPAM: `{"type": "static"`}, `spec.ipam: Invalid value: "{\"type\": \"static\"": invalid JSON at line 1, column 17: unexpected end of JSON input: write a JSON object with a type`},
		{"ipam with a second line", sriovv1.SriovNetworkSpec{IPAM: "{\n  \"type\": static}"}, "invalid JSON at line 2, column 11: invalid character 's'"},
		{"ipam as a list", sriovv1.SriovNetworkSpec{IPAM: `["static"]`}, `["static"] is not a JSON object: write`},
		{"ipam as null", sriovv1.SriovNetworkSpec{IPAM: "null"}, ": null is not a JSON object"},
		{"ipam without a type", sriovv1.SriovNetworkSpec{IPAM: `{"subnet": "10.0.0.0/8"}`}, ": it has no type: write"},
		{"ipam that adds keys", sriovv1.SriovNetworkSpec{IPAM: `{}, "type": "bridge"`}, ": invalid JSON at line 1, column 3: invalid character ','"},
		{"capabilities that are not booleans", sriovv1.SriovNetworkSpec{Capabilities: `{"mac": "yes"}`}, `: mac is "yes": write a JSON object of booleans`},
		{"meta plugins that leave the list", sriovv1.SriovNetworkSpec{MetaPluginsConfig: `{"type": "a"}], "x": [{"type": "b"}`}, ": invalid JSON at line 1, column 15: invalid character ','"},
		{"a meta plugin that is no object", sriovv1.SriovNetworkSpec{MetaPluginsConfig: `{"type": "a"}, 5`}, ": plugin 2: 5 is not a JSON object"},
		{"a meta plugin without a type", sriovv1.SriovNetworkSpec{MetaPluginsConfig: `{"type": 1}`}, ": plugin 1 has no type: write JSON objects with commas"},
		{"a comma at the end", sriovv1.SriovNetworkSpec{MetaPluginsConfig: `{"type": "a"},`}, ": invalid JSON at line 1, column 15"},
	} {
		if _, err := define(network(c.spec), "openshift.io"); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: the error is %v, want %q", c.name, err, c.want)
		}
	}
}

// Whatever is written into the free-text fields, the configuration is either refused or
// has exactly the keys and values that the other fields give it.
func TestNetworksCannotBeInjected(t *testing.T) {
	fragments := []string{`{`, `}`, `[`, `]`, `,`, `:`, `"`, `'`, `\`, `"type"`, `"a"`, `"vlan"`, `1`, `true`, "\n", " ", "é", "<"}
	text := rapid.Custom(func(t *rapid.T) string {
		if rapid.Bool().Draw(t, "valid") {
			return `{"type": "a"}`
		}
		return strings.Join(rapid.SliceOfN(rapid.SampledFrom(fragments), 0, 12).Draw(t, "fragments"), "")
	})
	rapid.Check(t, func(t *rapid.T) {
		ipam, capabilities, chained := text.Draw(t, "ipam"), text.Draw(t, "capabilities"), text.Draw(t, "metaPlugins")
		free := text.Draw(t, "free")
		network, want := rapid.SampledFrom([]func() (metav1.Object, map[string]any){
			func() (metav1.Object, map[string]any) {
				return &sriovv1.SriovNetwork{ObjectMeta: meta, Spec: sriovv1.SriovNetworkSpec{Vlan: 7, LogFile: free, IPAM: ipam, Capabilities: capabilities, MetaPluginsConfig: chained}},
					map[string]any{"type": "sriov", "vlan": 7.0, "vlanQoS": 0.0, "logFile": free}
			},
			func() (metav1.Object, map[string]any) {
				return &sriovv1.SriovIBNetwork{ObjectMeta: meta, Spec: sriovv1.SriovIBNetworkSpec{LinkState: free, IPAM: ipam, Capabilities: capabilities, MetaPluginsConfig: chained}},
					map[string]any{"type": "ib-sriov", "link_state": free}
			},
			func() (metav1.Object, map[string]any) {
				return &sriovv1.OVSNetwork{ObjectMeta: meta, Spec: sriovv1.OVSNetworkSpec{Bridge: free, InterfaceType: free, IPAM: ipam, Capabilities: capabilities, MetaPluginsConfig: chained}},
					map[string]any{"type": "ovs", "bridge": free, "interface_type": free}
			},
			func() (metav1.Object, map[string]any) {
				return &sluicev1.MacvlanNetwork{ObjectMeta: meta, Spec: sluicev1.MacvlanNetworkSpec{Master: "x" + free, IPAM: ipam, Capabilities: capabilities, MetaPlugins: chained}},
					map[string]any{"type": "sluice", "master": "x" + free}
			},
		}).Draw(t, "kind")()
		nad, err := define(network, "openshift.io")
		if err != nil {
			return
		}
		var config map[string]any
		if err := json.Unmarshal([]byte(nad.Spec.Config), &config); err != nil {
			t.Fatalf("the configuration %s is not JSON: %v", nad.Spec.Config, err)
		}
		main := config
		if plugins, ok := config["plugins"].([]any); ok {
			main = plugins[0].(map[string]any)
			if len(config) != 3 {
				t.Fatalf("the list has other keys: %s", nad.Spec.Config)
			}
		}
		for _, key := range []string{"cniVersion", "name", "ipam", "capabilities"} {
			delete(main, key)
		}
		for key, value := range want {
			if value == "" {
				delete(want, key) // what is empty is left out
			}
		}
		if !reflect.DeepEqual(main, want) {
			t.Fatalf("the plugin's keys are %v, want %v", main, want)
		}
	})
}
