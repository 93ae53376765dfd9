package render

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// The fields that are JSON inside text are either refused, by name, or stand in the
// configuration with the values they have, and nothing else does.
func FuzzNetwork(f *testing.F) {
	f.Add(`{"type": "host-local", "subnet": "10.1.0.0/24"}`, `{"mac": true, "ips": false}`, `{"type": "tuning", "sysctl": {"a": "b"}}, {"type": "vrf"}`)
	f.Add("{\n \"type\": \"static\"}", "", ` {"type": "a<b>&c"} `)
	f.Add(`{}, "type": "bridge"`, `{"mac": "yes"}`, `{"type": "a"}], "x": [{"type": "b"}`)
	f.Add(`{"type": "x", "type": 1e999}`, "null", "{\"type\": \"\u2028\xff\"}")
	f.Fuzz(func(t *testing.T, ipam, capabilities, plugins string) {
		nad, err := define(network(sriovv1.SriovNetworkSpec{Vlan: 7, IPAM: ipam, Capabilities: capabilities, MetaPluginsConfig: plugins}), "openshift.io")
		if err != nil {
			if !strings.Contains(err.Error(), "spec.ipam: ") && !strings.Contains(err.Error(), "spec.capabilities: ") && !strings.Contains(err.Error(), "spec.metaPlugins: ") {
				t.Fatalf("the error names no field: %v", err)
			}
			return
		}
		read := func(text string) (v any) {
			d := json.NewDecoder(strings.NewReader(text))
			d.UseNumber()
			if err := d.Decode(&v); err != nil {
				t.Fatalf("%q was accepted and is not JSON: %v", text, err)
			}
			return v
		}
		main := map[string]any{"type": "sriov", "vlan": json.Number("7"), "vlanQoS": json.Number("0"), "ipam": map[string]any{}}
		if strings.TrimSpace(ipam) != "" {
			main["ipam"] = read(ipam)
		}
		if strings.TrimSpace(capabilities) != "" {
			main["capabilities"] = read(capabilities)
		}
		want := main
		chain, _ := read("[" + plugins + "]").([]any)
		if len(chain) > 0 {
			want = map[string]any{"plugins": append([]any{main}, chain...)}
		}
		want["cniVersion"], want["name"] = cniVersion, "net"
		if got := read(nad.Spec.Config); !reflect.DeepEqual(got, any(want)) {
			t.Fatalf("the configuration is\n%s\nwant the values\n%v", nad.Spec.Config, want)
		}
		if bytes.ContainsAny([]byte(nad.Spec.Config), "\n") {
			t.Fatalf("the configuration has more than one line: %q", nad.Spec.Config)
		}
	})
}
