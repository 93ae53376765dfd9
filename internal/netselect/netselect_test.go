package netselect

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
)

func TestParse(t *testing.T) {
	for annotation, want := range map[string][]Selection{
		"": nil, " \n": nil, "[]": {},
		"blue":                           {{Namespace: "ns", Name: "blue", Interface: "net1"}},
		"blue, other/red@fast , blue.v2": {{Namespace: "ns", Name: "blue", Interface: "net1"}, {Namespace: "other", Name: "red", Interface: "fast"}, {Namespace: "ns", Name: "blue.v2", Interface: "net3"}},
		"blue,blue":                      {{Namespace: "ns", Name: "blue", Interface: "net1"}, {Namespace: "ns", Name: "blue", Interface: "net2"}},
		` [{"name":"blue","namespace":"other","interface":"ib0","mac":"02:00:00:00:00:01","infiniband-guid":"02:00:00:00:00:00:00:01",
		   "ips":["10.0.0.1/24","fd00::1"],"default-route":["10.0.0.254","fd00::ff"],"cni-args":{"a":1},"deviceID":"0000:01:00.1",
		   "portMappings":[{"hostPort":80,"containerPort":8080,"protocol":"tcp"}],"bandwidth":{"ingressRate":1,"ingressBurst":2,"egressRate":3,"egressBurst":4}},
		   {"name":"red","interfaceRequest":"x","ipam-claim-reference":"c"}]`: {{
			Namespace: "other", Name: "blue", Interface: "ib0", MAC: "02:00:00:00:00:01", InfinibandGUID: "02:00:00:00:00:00:00:01",
			IPs: []string{"10.0.0.1/24", "fd00::1"}, DefaultRoute: []netip.Addr{netip.MustParseAddr("10.0.0.254"), netip.MustParseAddr("fd00::ff")},
			CNIArgs: map[string]any{"a": int64(1)}, DeviceID: "0000:01:00.1",
			PortMappings: []nadv1.PortMapEntry{{HostPort: 80, ContainerPort: 8080, Protocol: "tcp"}},
			Bandwidth:    &nadv1.BandwidthEntry{IngressRate: 1, IngressBurst: 2, EgressRate: 3, EgressBurst: 4},
		}, {Namespace: "ns", Name: "red", Interface: "x", IPAMClaim: "c"}},
	} {
		got, err := Parse(annotation, "ns")
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); err != nil || diff != "" {
			t.Errorf("%s: %v\n%s", annotation, err, diff)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for annotation, says := range map[string]string{
		"a,,b":                      `"" is not [namespace/]name[@interface]`,
		"a@":                        `"a@" is not`,
		"/a":                        `"/a" is not`,
		"A":                         `name "A" is not a name of a NetworkAttachmentDefinition`,
		"a/b/c":                     `name "b/c"`,
		"x.y/a":                     `namespace "x.y"`,
		"a@sixteen-letters-":        `interface "sixteen-letters-"`,
		"a@b:c":                     `interface "b:c"`,
		"a@net2,b":                  "networks 1 and 2 both make interface net2",
		`{"name":"a"}`:              "put the network into [ ]",
		`"a"`:                       "no list",
		`[{"name":"a"}`:             "not a list of networks",
		`[{"name":"a"}] x`:          "not a list of networks",
		`[{"name":"a","macc":"x"}]`: `unknown field "[0].macc"`,
		`[{"name":"a","Mac":"x"}]`:  `unknown field "[0].Mac"`,
		`[{"name":"a","name":"b"}]`: `duplicate field "[0].name"`,
		`[{"name":"a","ips":"x"}]`:  "string",
		`[{}]`:                      `name "" is not`,
		`[{"name":"a","mac":"01:00:00:00:00:01"}]`:                                           "multicast",
		`[{"name":"a","mac":"00:00:00:00:00:00"}]`:                                           "is no address of an interface",
		`[{"name":"a","mac":"02:00:00:00:00:00:00:01"}]`:                                     "is not a MAC address",
		`[{"name":"a","infiniband-guid":"02:00:00:00:00:01"}]`:                               "is not a GUID",
		`[{"name":"a","ips":["10.0.0.300"]}]`:                                                `ips has "10.0.0.300"`,
		`[{"name":"a","ips":["10.0.0.3"],"ipam-claim-reference":"c"}]`:                       "only one can choose",
		`[{"name":"a","default-route":["x"]}]`:                                               `default-route has "x"`,
		`[{"name":"a","default-route":["10.0.0.1","10.0.0.2"]}]`:                             "second gateway of its family",
		`[{"name":"a","default-route":["10.0.0.1"]},{"name":"b","default-route":["fd::1"]}]`: "networks 1 and 2 both have default-route",
		`[{"name":"a","interface":"x","interfaceRequest":"y"}]`:                              "old name",
		`[{"name":"a","portMappings":[{"hostPort":0,"containerPort":80}]}]`:                  "hostPort 0",
		`[{"name":"a","bandwidth":{"ingressRate":-1}}]`:                                      "negative",
	} {
		if got, err := Parse(annotation, "ns"); err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), Annotation) {
			t.Errorf("%s: %+v, %v, want it to say %s", annotation, got, err, says)
		}
	}
}

// FuzzParse holds what users of the result rely on.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"a,b/c@d", `[{"name":"a","ips":["10.0.0.1"],"default-route":["::ffff:1.2.3.4"]}]`, `[{"name":"a","cni-args":{"x":[{}]}},null]`, "[[", `[{"name":"a"}]"`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, annotation string) {
		selections, err := Parse(annotation, "ns")
		if err != nil {
			return
		}
		seen := map[string]bool{}
		for _, s := range selections {
			if s.Name == "" || s.Namespace == "" || !ValidInterface(s.Interface) || seen[s.Interface] || len(s.DefaultRoute) > 2 {
				t.Errorf("%q: %+v", annotation, s)
			}
			seen[s.Interface] = true
		}
	})
}

// What makes an interface is read as meta plugins read it, whatever else is written.
func TestNetwork(t *testing.T) {
	for _, c := range []struct{ annotation, ifName, want string }{
		{"", "net1", ""},
		{"blue, other/red@eth5", "net1", "ns/blue"},
		{"blue, other/red@eth5", "eth5", "other/red"},
		{"blue, other/red@eth5", "net2", ""},
		{`[{"name":"blue","nosuch":1,"mac":"x"},{"name":"red","namespace":"other","interface":"eth5"}]`, "net1", "ns/blue"},
		{`[{"name":"blue","nosuch":1,"mac":"x"},{"name":"red","namespace":"other","interface":"eth5"}]`, "eth5", "other/red"},
		{`[{"name":"blue","interfaceRequest":"eth7"}]`, "eth7", "ns/blue"},
	} {
		if got, err := Network(c.annotation, "ns", c.ifName); err != nil || got != c.want {
			t.Errorf("%s of %s: %q, %v; want %q", c.ifName, c.annotation, got, err, c.want)
		}
	}
	for _, bad := range []string{"[{", "blue@", `{"name":"blue"}`} {
		if got, err := Network(bad, "ns", "net1"); err == nil {
			t.Errorf("%s: %q", bad, got)
		}
	}
}
