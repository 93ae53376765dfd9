package standalone

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/internal/netselect"
)

func definition(name, resource, config string) *nadv1.NetworkAttachmentDefinition {
	d := &nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}, Spec: nadv1.NetworkAttachmentDefinitionSpec{Config: config}}
	if resource != "" {
		d.Annotations = map[string]string{resourceAnnotation: resource}
	}
	return d
}

func selections(t interface {
	Helper()
	Fatal(...any)
}, annotation string) []netselect.Selection {
	t.Helper()
	s, err := netselect.Parse(annotation, "ns")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var clusterArgs = [][2]string{{"K8S_POD_NAMESPACE", "ns"}, {"K8S_POD_NAME", "p"}, {"MAC", "02:00:00:00:00:ff"}}

func TestPlan(t *testing.T) {
	got, ignored, err := plan(
		selections(t, `[{"name":"fast"},{"name":"fast","interface":"f2","mac":"02:00:00:00:00:01","ips":["10.0.0.1/24"],"cni-args":{"k":"v"},
			"bandwidth":{"egressRate":5},"portMappings":[{"hostPort":1,"containerPort":1}]},{"name":"plain","default-route":["10.1.0.1"]},{"name":"other","deviceID":"b-1"}]`),
		[]*nadv1.NetworkAttachmentDefinition{
			definition("fast", "x/vf", `{"cniVersion":"1.0.0","name":"blue","type":"sriov","capabilities":{"mac":true}}`),
			definition("fast", "x/vf", `{"cniVersion":"1.0.0","plugins":[{"type":"sriov","vlan":7},{"type":"portmap","capabilities":{"portMappings":true}}]}`),
			definition("plain", "", `{"type":"macvlan"}`),
			definition("other", "x/slot", `{"cniVersion":"1.1.0","type":"sluice"}`),
		},
		map[string][]string{"x/vf": {"0000:01:00.1", "0000:01:00.2"}, "x/slot": {"a-1", "b-1"}}, clusterArgs, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		`ns/fast net1 x/vf 0000:01:00.1 {"cniVersion":"1.0.0","name":"blue","plugins":[{"capabilities":{"mac":true},"cniVersion":"1.0.0","deviceID":"0000:01:00.1","name":"blue","pciBusID":"0000:01:00.1","type":"sriov"}]} [[K8S_POD_NAMESPACE ns] [K8S_POD_NAME p]] {"deviceID":"0000:01:00.1"}`,
		`ns/fast f2 x/vf 0000:01:00.2 {"cniVersion":"1.0.0","name":"fast","plugins":[{"args":{"cni":{"k":"v"}},"deviceID":"0000:01:00.2","pciBusID":"0000:01:00.2","type":"sriov","vlan":7},{"args":{"cni":{"k":"v"}},"capabilities":{"portMappings":true},"deviceID":"0000:01:00.2","pciBusID":"0000:01:00.2","type":"portmap"}]} [[K8S_POD_NAMESPACE ns] [K8S_POD_NAME p] [MAC 02:00:00:00:00:01] [IP 10.0.0.1/24]] {"bandwidth":{"ingressRate":0,"ingressBurst":0,"egressRate":5,"egressBurst":0},"deviceID":"0000:01:00.2","ips":["10.0.0.1/24"],"mac":"02:00:00:00:00:01","portMappings":[{"hostPort":1,"containerPort":1}]}`,
		`ns/plain net3   {"name":"plain","plugins":[{"name":"plain","type":"macvlan"}]} [[K8S_POD_NAMESPACE ns] [K8S_POD_NAME p]] {}`,
		`ns/other net4 x/slot b-1 {"cniVersion":"1.1.0","name":"other","plugins":[{"cniVersion":"1.1.0","deviceID":"b-1","name":"other","pciBusID":"b-1","type":"sluice"}]} [[K8S_POD_NAMESPACE ns] [K8S_POD_NAME p]] {"deviceID":"b-1"}`,
	}
	var have []string
	for _, a := range got {
		capabilities, _ := json.Marshal(a.Capabilities)
		args := make([]string, len(a.Args))
		for i, kv := range a.Args {
			args[i] = "[" + kv[0] + " " + kv[1] + "]"
		}
		have = append(have, strings.Join([]string{a.Network, a.IfName, a.Resource, a.DeviceID, string(a.List), "[" + strings.Join(args, " ") + "]", string(capabilities)}, " "))
	}
	if diff := cmp.Diff(want, have); diff != "" {
		t.Error(diff)
	}
	if len(got[2].DefaultRoute) != 1 {
		t.Errorf("default route: %+v", got[2])
	}
	if want := []string{"network ns/fast as f2: bandwidth: no plugin of the network has this capability"}; !slices.Equal(ignored, want) {
		t.Errorf("ignored: %q", ignored)
	}
}

func TestPlanRefuses(t *testing.T) {
	vf := definition("a", "x/vf", `{"cniVersion":"1.0.0","type":"sriov"}`)
	for _, c := range []struct {
		annotation string
		definition *nadv1.NetworkAttachmentDefinition
		says       string
	}{
		{"a@eth0", vf, "network ns/a as eth0: the cluster network has this interface"},
		{"a", definition("a", "x/none", vf.Spec.Config), "was given 0 devices of resource x/none"},
		{"a,a", vf, "network ns/a as net2: the pod was given 1 devices of resource x/vf"},
		{`[{"name":"a","deviceID":"0000:01:00.9"}]`, vf, "deviceID 0000:01:00.9 is not among the devices of resource x/vf"},
		{`[{"name":"a","deviceID":"0000:01:00.1"}]`, definition("a", "", vf.Spec.Config), "the network has no annotation"},
		{"a", definition("a", "", " "), "spec.config is empty"},
		{"a", definition("a", "", "{"), "spec.config is no JSON object"},
		{"a", definition("a", "", `[]`), "spec.config is no JSON object"},
		{"a", definition("a", "", `{"plugins":[]}`), "no plugins in list"},
		{"a", definition("a", "", `{"plugins":[{}]}`), "missing 'type'"},
		{"a", definition("a", "", `{"name":7,"type":"x"}`), "invalid name type"},
	} {
		s := selections(t, c.annotation)
		definitions := make([]*nadv1.NetworkAttachmentDefinition, len(s))
		for i := range s {
			definitions[i] = c.definition
		}
		got, _, err := plan(s, definitions, map[string][]string{"x/vf": {"0000:01:00.1"}}, nil, "eth0")
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %+v, %v, want it to say %s", c.annotation, got, err, c.says)
		}
	}
}

// No device is given twice, none that the kubelet did not give, and the same inputs
// give the same plan.
func TestPlanGivesEachDeviceOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		resources := []string{"x/a", "x/b", ""}
		devices := map[string][]string{}
		for _, r := range resources[:2] {
			for i := range rapid.IntRange(0, 4).Draw(t, r) {
				devices[r] = append(devices[r], r+string(rune('0'+i)))
			}
		}
		var s []netselect.Selection
		var definitions []*nadv1.NetworkAttachmentDefinition
		wanted := map[string]int{}
		for i := range rapid.IntRange(0, 6).Draw(t, "networks") {
			r := rapid.SampledFrom(resources).Draw(t, "resource")
			wanted[r]++
			s = append(s, netselect.Selection{Namespace: "ns", Name: "n", Interface: "net" + string(rune('0'+i))})
			definitions = append(definitions, definition("n", r, `{"type":"sluice"}`))
		}
		got, _, err := plan(s, definitions, devices, nil, "eth0")
		if enough := wanted["x/a"] <= len(devices["x/a"]) && wanted["x/b"] <= len(devices["x/b"]); enough != (err == nil) {
			t.Fatalf("devices %v, wanted %v: %v", devices, wanted, err)
		}
		next := map[string]int{}
		for _, a := range got {
			if a.Resource != "" && a.DeviceID != devices[a.Resource][next[a.Resource]] {
				t.Fatalf("%+v is not the next of %v", a, devices[a.Resource])
			}
			next[a.Resource]++
		}
		again, _, _ := plan(s, definitions, devices, nil, "eth0")
		if diff := cmp.Diff(got, again); diff != "" {
			t.Fatal(diff)
		}
	})
}

// FuzzConfigurationList reads whatever people put into a definition.
func FuzzConfigurationList(f *testing.F) {
	for _, s := range []string{`null`, `{"type":"x"}`, `{"plugins":[{"type":"x"}],"cniVersions":["1.0.0"]}`, `{"plugins":7}`, `{"name":null,"type":"x","plugins":null}`, `{"type":"x","args":{"cni":7}}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, config string) {
		list, err := configurationList(definition("a", "", config))
		if err != nil {
			return
		}
		raw, err := inject(list, "0000:01:00.1", map[string]any{"k": "v"})
		if err != nil {
			return
		}
		if _, _, err := (attachment{List: raw}).runtime(sandbox{}, ""); err != nil {
			t.Errorf("%s became %s, which DEL cannot read: %v", config, raw, err)
		}
	})
}
