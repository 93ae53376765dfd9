package render

import (
	"encoding/json"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

func network(spec sriovv1.SriovNetworkSpec) *sriovv1.SriovNetwork {
	spec.ResourceName = "intel"
	return &sriovv1.SriovNetwork{ObjectMeta: metav1.ObjectMeta{Name: "net", Namespace: "ops"}, Spec: spec}
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
				`"capabilities":{"mac":true,"ips":false},"max_tx_rate":100,"min_tx_rate":10,"link_state":"enable","logLevel":"debug","logFile":"/tmp/a & b",` +
				`"ipam":{"type":"host-local","subnet":"10.1.0.0/24"}}`},
		{"a rate of zero is written", sriovv1.SriovNetworkSpec{MaxTxRate: &none},
			`{"cniVersion":"1.0.0","name":"net","type":"sriov","vlan":0,"vlanQoS":0,"max_tx_rate":0,"ipam":{}}`},
		{"spaces in a value stay", sriovv1.SriovNetworkSpec{IPAM: `{"type": "x", "note": "it's a  note"}`},
			`{"cniVersion":"1.0.0","name":"net","type":"sriov","vlan":0,"vlanQoS":0,"ipam":{"type":"x","note":"it's a  note"}}`},
		{"meta plugins make a list", sriovv1.SriovNetworkSpec{MetaPluginsConfig: `{"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}}, {"type": "vrf"}`},
			`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"sriov","vlan":0,"vlanQoS":0,"ipam":{}},{"type":"tuning","sysctl":{"net.core.somaxconn":"500"}},{"type":"vrf"}]}`},
	} {
		nad, err := SriovNetwork(network(c.spec), "openshift.io")
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if nad.Spec.Config != c.want {
			t.Errorf("%s: the configuration is\n%s\nwant\n%s", c.name, nad.Spec.Config, c.want)
		}
	}
}

func TestSriovNetworkObject(t *testing.T) {
	for wantNamespace, spec := range map[string]sriovv1.SriovNetworkSpec{"ops": {}, "apps": {NetworkNamespace: "apps"}} {
		nad, err := SriovNetwork(network(spec), "example.com")
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
		{"ipam without a brace", sriovv1.SriovNetworkSpec{IPAM: `{"type": "static"`}, "SriovNetwork ops/net: spec.ipam: invalid JSON at line 1, column 17: unexpected end of JSON input: write a JSON object with a type"},
		{"ipam with a second line", sriovv1.SriovNetworkSpec{IPAM: "{\n  \"type\": static}"}, "spec.ipam: invalid JSON at line 2, column 11: invalid character 's'"},
		{"ipam as a list", sriovv1.SriovNetworkSpec{IPAM: `["static"]`}, `spec.ipam: ["static"] is not a JSON object: write`},
		{"ipam as null", sriovv1.SriovNetworkSpec{IPAM: "null"}, "spec.ipam: null is not a JSON object"},
		{"ipam without a type", sriovv1.SriovNetworkSpec{IPAM: `{"subnet": "10.0.0.0/8"}`}, "spec.ipam: it has no type: write"},
		{"ipam that adds keys", sriovv1.SriovNetworkSpec{IPAM: `{}, "type": "bridge"`}, "spec.ipam: invalid JSON at line 1, column 3: invalid character ','"},
		{"capabilities that are not booleans", sriovv1.SriovNetworkSpec{Capabilities: `{"mac": "yes"}`}, `spec.capabilities: mac is "yes": write a JSON object of booleans`},
		{"meta plugins that leave the list", sriovv1.SriovNetworkSpec{MetaPluginsConfig: `{"type": "a"}], "x": [{"type": "b"}`}, "spec.metaPlugins: invalid JSON at line 1, column 15: invalid character ','"},
		{"a meta plugin that is no object", sriovv1.SriovNetworkSpec{MetaPluginsConfig: `{"type": "a"}, 5`}, "spec.metaPlugins: plugin 2: 5 is not a JSON object"},
		{"a meta plugin without a type", sriovv1.SriovNetworkSpec{MetaPluginsConfig: `{"type": 1}`}, "spec.metaPlugins: plugin 1 has no type: write JSON objects with commas"},
		{"a comma at the end", sriovv1.SriovNetworkSpec{MetaPluginsConfig: `{"type": "a"},`}, "spec.metaPlugins: invalid JSON at line 1, column 15"},
	} {
		if _, err := SriovNetwork(network(c.spec), "openshift.io"); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: the error is %v, want %q", c.name, err, c.want)
		}
	}
}

// Whatever is written into the free-text fields, the configuration is either refused or
// has exactly the keys and values that the other fields give it.
func TestSriovNetworkCannotBeInjected(t *testing.T) {
	fragments := []string{`{`, `}`, `[`, `]`, `,`, `:`, `"`, `'`, `\`, `"type"`, `"a"`, `"vlan"`, `1`, `true`, "\n", " ", "é", "<"}
	text := rapid.Custom(func(t *rapid.T) string {
		if rapid.Bool().Draw(t, "valid") {
			return `{"type": "a"}`
		}
		return strings.Join(rapid.SliceOfN(rapid.SampledFrom(fragments), 0, 12).Draw(t, "fragments"), "")
	})
	rapid.Check(t, func(t *rapid.T) {
		spec := sriovv1.SriovNetworkSpec{
			Vlan: 7, IPAM: text.Draw(t, "ipam"), Capabilities: text.Draw(t, "capabilities"),
			MetaPluginsConfig: text.Draw(t, "metaPlugins"), LogFile: text.Draw(t, "logFile"),
		}
		nad, err := SriovNetwork(network(spec), "openshift.io")
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
		if main["type"] != "sriov" || main["vlan"] != 7.0 {
			t.Fatalf("type or vlan is not ours: %s", nad.Spec.Config)
		}
		if file, _ := main["logFile"].(string); file != spec.LogFile {
			t.Fatalf("logFile is %q, want %q", file, spec.LogFile)
		}
	})
}
