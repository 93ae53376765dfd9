package inject

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	jsonpatch "github.com/evanphx/json-patch/v5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"
	"sigs.k8s.io/yaml"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/netselect"
)

// definitions are NetworkAttachmentDefinitions by namespace and name.
var definitions = map[types.NamespacedName]map[string]string{
	{Namespace: "ns", Name: "a"}:     {sriovv1.AnnotationResourceName: "openshift.io/a"},
	{Namespace: "other", Name: "a"}:  {sriovv1.AnnotationResourceName: "openshift.io/a", AnnotationNodeSelector: "rack = 1"},
	{Namespace: "ns", Name: "b"}:     {sriovv1.AnnotationResourceName: "openshift.io/b", AnnotationNodeSelector: "rack=2"},
	{Namespace: "ns", Name: "plain"}: {AnnotationNodeSelector: "fast"},
	{Namespace: "ns", Name: "none"}:  nil,
	{Namespace: "ns", Name: "wrong"}: {sriovv1.AnnotationResourceName: "a/b/c"},
	{Namespace: "ns", Name: "label"}: {AnnotationNodeSelector: "a=b=c"},
}

// apply does the patch to a pod in JSON.
func apply(t interface{ Fatal(...any) }, raw []byte) (after []byte, warnings []string, err error) {
	p, err := Parse(raw, "ns")
	if err != nil {
		return nil, nil, err
	}
	patch, warnings, err := p.Patch(definitions)
	if err != nil {
		return nil, nil, err
	}
	text, err := json.Marshal(patch)
	if err != nil {
		t.Fatal(err)
	}
	if len(patch) == 0 {
		return raw, warnings, nil
	}
	decoded, err := jsonpatch.DecodePatch(text)
	if err != nil {
		t.Fatal(err)
	}
	after, err = decoded.Apply(raw)
	if err != nil {
		t.Fatal(fmt.Sprintf("the API server could not apply %s: %v", text, err))
	}
	return after, warnings, nil
}

func TestPatch(t *testing.T) {
	const info = `
  volumes: [{name: podnetinfo, downwardAPI: {items: [{path: annotations, fieldRef: {fieldPath: metadata.annotations}}]}}]`
	const mounts = "volumeMounts: [{name: podnetinfo, readOnly: true, mountPath: /etc/podnetinfo}]"
	pod := func(networks, spec string) string {
		return fmt.Sprintf("metadata: {annotations: {k8s.v1.cni.cncf.io/networks: '%s'}}\nspec: %s", networks, spec)
	}
	for _, c := range []struct {
		name, pod, want string
		warnings        []string
	}{
		{"one network", pod("a", "{containers: [{name: c, resources: {}}, {name: d}]}"), pod("a", `
  containers:
  - {name: c, resources: {requests: {openshift.io/a: "1"}, limits: {openshift.io/a: "1"}}, `+mounts+`}
  - {name: d, `+mounts+`}`+info), nil},
		{"no key for resources", pod("a", "{containers: [{name: c}]}"), pod("a", `
  containers:
  - {name: c, resources: {requests: {openshift.io/a: "1"}, limits: {openshift.io/a: "1"}}, `+mounts+`}`+info), nil},
		{"counted, beside others, and in another namespace", pod(`[{"name": "a"}, {"name": "a", "namespace": "other", "interface": "x"}, {"name": "b"}]`,
			`{nodeSelector: {x: z}, containers: [{name: c, resources: {requests: {cpu: "1"}}}]}`), pod(`[{"name": "a"}, {"name": "a", "namespace": "other", "interface": "x"}, {"name": "b"}]`, `
  nodeSelector: {x: z, rack: "2"}
  containers:
  - {name: c, resources: {requests: {cpu: "1", openshift.io/a: "2", openshift.io/b: "1"}, limits: {openshift.io/a: "2", openshift.io/b: "1"}}, `+mounts+`}`+info),
			[]string{"NetworkAttachmentDefinition ns/b is for nodes with rack=2, another of the pod's for nodes with rack=1"}},
		{"asked for already", pod("a@eth1", `{containers: [{name: c}, {name: d, resources: {limits: {openshift.io/a: "1"}}}]}`), pod("a@eth1", `
  containers:
  - {name: c, `+mounts+`}
  - {name: d, resources: {limits: {openshift.io/a: "1"}}, `+mounts+`}`+info), nil},
		{"asked for too few", pod("a, other/a", `{nodeSelector: {rack: "3"}, containers: [{name: c, resources: {requests: {openshift.io/a: "1"}}}]}`), pod("a, other/a", `
  nodeSelector: {rack: "1"}
  containers:
  - {name: c, resources: {requests: {openshift.io/a: "1"}}, `+mounts+`}`+info),
			[]string{"spec.containers: 1 of openshift.io/a, and the pod's networks need 2", "spec.nodeSelector rack=3 became rack=1"}},
		{"a sidecar asks for it", pod("a", `{initContainers: [{name: s, restartPolicy: Always, resources: {limits: {openshift.io/a: "1"}}}], containers: [{name: c}]}`), pod("a", `
  initContainers: [{name: s, restartPolicy: Always, resources: {limits: {openshift.io/a: "1"}}}]
  containers: [{name: c, `+mounts+`}]`+info), nil},
		{"an init container that ends asks for it", pod("a", `{initContainers: [{name: s, resources: {limits: {openshift.io/a: "1"}}}], containers: [{name: c}]}`), pod("a", `
  initContainers: [{name: s, resources: {limits: {openshift.io/a: "1"}}}]
  containers: [{name: c, resources: {requests: {openshift.io/a: "1"}, limits: {openshift.io/a: "1"}}, `+mounts+`}]`+info), nil},
		{"its own volume and mount", pod("a", `{volumes: [{name: v}, {name: podnetinfo}], containers: [{name: c, resources: {limits: {openshift.io/a: "1"}}, volumeMounts: [{name: v, mountPath: /etc/podnetinfo/}]}]}`),
			pod("a", `{volumes: [{name: v}, {name: podnetinfo}], containers: [{name: c, resources: {limits: {openshift.io/a: "1"}}, volumeMounts: [{name: v, mountPath: /etc/podnetinfo/}]}]}`), nil},
		{"huge pages", pod("a", `{volumes: [{name: v}], containers: [{name: c, resources: {requests: {hugepages-1Gi: 2Gi, hugepages-2Mi: "0"}, limits: {hugepages-1Gi: 2Gi}}, env: [{name: A}], volumeMounts: [{name: v, mountPath: /v}]}]}`), pod("a", `
  volumes:
  - name: v
  - name: podnetinfo
    downwardAPI:
      items:
      - {path: annotations, fieldRef: {fieldPath: metadata.annotations}}
      - {path: hugepages_1G_request_c, resourceFieldRef: {containerName: c, resource: requests.hugepages-1Gi, divisor: 1Mi}}
      - {path: hugepages_1G_limit_c, resourceFieldRef: {containerName: c, resource: limits.hugepages-1Gi, divisor: 1Mi}}
  containers:
  - name: c
    resources: {requests: {hugepages-1Gi: 2Gi, hugepages-2Mi: "0", openshift.io/a: "1"}, limits: {hugepages-1Gi: 2Gi, openshift.io/a: "1"}}
    env: [{name: A}, {name: CONTAINER_NAME, value: c}]
    volumeMounts: [{name: v, mountPath: /v}, {name: podnetinfo, readOnly: true, mountPath: /etc/podnetinfo}]`), nil},
		{"labels", "metadata: {labels: {x: z}, annotations: {k8s.v1.cni.cncf.io/networks: a}}\nspec: {containers: [{name: c, resources: {limits: {openshift.io/a: '1'}}}]}", `
metadata: {labels: {x: z}, annotations: {k8s.v1.cni.cncf.io/networks: a}}
spec:
  containers: [{name: c, resources: {limits: {openshift.io/a: '1'}}, ` + mounts + `}]
  volumes: [{name: podnetinfo, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}, {path: annotations, fieldRef: {fieldPath: metadata.annotations}}]}}]`, nil},
		{"no resource", pod("plain, none", "{containers: [{name: c}]}"), pod("plain, none", "{nodeSelector: {fast: ''}, containers: [{name: c}]}"), nil},
		{"no containers", pod("a", "{}"), pod("a", "{}"), nil},
		{"no network", pod(" ", "{containers: [{name: c}]}"), pod(" ", "{containers: [{name: c}]}"), nil},
		{"the default network", "metadata: {annotations: {v1.multus-cni.io/default-network: other/a}}\nspec: {containers: [{name: c, resources: {limits: {openshift.io/a: '1'}}, " + mounts + "}]," + strings.TrimSpace(info) + "}",
			"metadata: {annotations: {v1.multus-cni.io/default-network: other/a}}\nspec: {nodeSelector: {rack: '1'}, containers: [{name: c, resources: {limits: {openshift.io/a: '1'}}, " + mounts + "}]," + strings.TrimSpace(info) + "}", nil},
		{"a default network of nobody knows which namespace", "metadata: {annotations: {v1.multus-cni.io/default-network: a}}\nspec: {containers: [{name: c}]}", "metadata: {annotations: {v1.multus-cni.io/default-network: a}}\nspec: {containers: [{name: c}]}", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			raw, err := yaml.YAMLToJSON([]byte(c.pod))
			if err != nil {
				t.Fatal(err)
			}
			after, warnings, err := apply(t, raw)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := parsed(t, after), parsed(t, []byte(c.want)); !reflect.DeepEqual(got, want) {
				t.Errorf("the pod is\n%s\nwant\n%v", after, want)
			}
			ok := len(warnings) == len(c.warnings)
			for i := 0; ok && i < len(warnings); i++ {
				ok = strings.Contains(warnings[i], c.warnings[i])
			}
			if !ok {
				t.Errorf("the warnings are %q, want %q", warnings, c.warnings)
			}
		})
	}
}

func parsed(t *testing.T, text []byte) (v any) {
	t.Helper()
	if err := yaml.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestPatchRefuses(t *testing.T) {
	for annotations, want := range map[string]string{
		"{k8s.v1.cni.cncf.io/networks: wrong}":                  `NetworkAttachmentDefinition ns/wrong: annotation k8s.v1.cni.cncf.io/resourceName: "a/b/c" is not the name of a resource`,
		"{k8s.v1.cni.cncf.io/networks: label}":                  `NetworkAttachmentDefinition ns/label: annotation k8s.v1.cni.cncf.io/nodeSelector: "a=b=c" is not a label of nodes`,
		"{k8s.v1.cni.cncf.io/networks: 'a,'}":                   `annotation k8s.v1.cni.cncf.io/networks: "" is not [namespace/]name[@interface]`,
		"{v1.multus-cni.io/default-network: 'ns/a, ns/b'}":      "annotation v1.multus-cni.io/default-network, of the same form: it names 2 networks: name one",
		"{v1.multus-cni.io/default-network: '[{\"name\": 7}]'}": "annotation v1.multus-cni.io/default-network, of the same form: annotation k8s.v1.cni.cncf.io/networks: is not a list of networks",
	} {
		raw, err := yaml.YAMLToJSON([]byte("metadata: {annotations: " + annotations + "}\nspec: {containers: [{name: c}]}"))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := apply(t, raw); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: the error is %v, want %q", annotations, err, want)
		}
	}
}

// Whatever the pod, the patch fits it, takes nothing away, leaves no network without its
// device unless the user counted, and done twice is as good as once.
func TestPatchProperty(t *testing.T) {
	resources := []corev1.ResourceName{"openshift.io/a", "openshift.io/b", "cpu", "hugepages-2Mi"}
	rapid.Check(t, func(t *rapid.T) {
		names := slices.DeleteFunc(slices.Collect(maps.Keys(definitions)), func(n types.NamespacedName) bool { return n.Name == "wrong" || n.Name == "label" })
		slices.SortFunc(names, func(a, b types.NamespacedName) int { return strings.Compare(a.String(), b.String()) })
		var chosen []string
		needs := map[string]int64{}
		for _, n := range rapid.SliceOfN(rapid.SampledFrom(names), 0, 5).Draw(t, "networks") {
			chosen = append(chosen, n.String())
			needs[definitions[n][sriovv1.AnnotationResourceName]]++
		}
		delete(needs, "")
		list := func(label string) map[string]string {
			return rapid.MapOfN(rapid.SampledFrom([]string{string(resources[0]), string(resources[1]), "cpu", "hugepages-2Mi"}), rapid.SampledFrom([]string{"0", "1", "2"}), 0, 3).Draw(t, label)
		}
		some := func(label string) bool { return rapid.Bool().Draw(t, label) }
		written := map[string]bool{}
		var containers []any
		for i := range rapid.IntRange(1, 3).Draw(t, "containers") {
			c := map[string]any{"name": fmt.Sprint("c", i)}
			if some("resources") {
				r := map[string]any{}
				for _, kind := range []string{"requests", "limits"} {
					if some(kind) {
						asked := list(kind)
						r[kind] = asked
						for name := range asked {
							written[name] = true
						}
					}
				}
				c["resources"] = r
			}
			if some("mounts") {
				c["volumeMounts"] = []any{map[string]any{"name": rapid.SampledFrom([]string{"v", "podnetinfo"}).Draw(t, "mount"), "mountPath": "/v"}}
			}
			containers = append(containers, c)
		}
		spec := map[string]any{"containers": containers, "unknown": map[string]any{"kept": true}}
		if some("volumes") {
			spec["volumes"] = []any{map[string]any{"name": rapid.SampledFrom([]string{"v", "podnetinfo"}).Draw(t, "volume")}}
		}
		if some("selector") {
			spec["nodeSelector"] = map[string]string{"rack": "1"}
		}
		raw, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{netselect.Annotation: strings.Join(chosen, ", ")}}, "spec": spec})
		if err != nil {
			t.Fatal(err)
		}

		after, _, err := apply(t, raw)
		if err != nil {
			t.Fatal(err)
		}
		again, _, err := apply(t, after)
		if err != nil || string(again) != string(after) {
			t.Fatalf("done twice it is\n%s\nand once\n%s: %v", again, after, err)
		}
		p, err := Parse(after, "ns")
		if err != nil {
			t.Fatal(err)
		}
		for name, need := range needs {
			if asked, byName := p.asks(corev1.ResourceName(name)); !byName || !written[name] && asked != need {
				t.Fatalf("%d of %s asked for, %d needed, in\n%s", asked, name, need, after)
			}
			if r := p.Spec.Containers[0].Resources; !written[name] {
				request, limit := r.Requests[corev1.ResourceName(name)], r.Limits[corev1.ResourceName(name)]
				if request.Value() != need || limit.Value() != need {
					t.Fatalf("%s: request %v, limit %v, want %d, in\n%s", name, &request, &limit, need, after)
				}
			}
		}
		for _, name := range resources {
			before, _ := Parse(raw, "ns")
			if was, asked := before.asks(name); asked {
				if is, _ := p.asks(name); is != was {
					t.Fatalf("%d of %s became %d, in\n%s", was, name, is, after)
				}
			}
		}
		var v struct {
			Spec struct{ Unknown map[string]bool }
		}
		if err := json.Unmarshal(after, &v); err != nil || !v.Spec.Unknown["kept"] {
			t.Fatalf("what is not known here is gone: %s", after)
		}
	})
}

// No pod and no annotation brings it down, and what it asks the API server for has a name.
func FuzzPatch(f *testing.F) {
	for _, text := range []string{"a", "ns/a@eth1, b", `[{"name": "a", "namespace": "other"}]`, `[null]`, `{"name": "a"}`, "a,,b", "a/../b", ""} {
		f.Add(text, text, `{"containers": [{"name": "c", "resources": {"requests": {"cpu": 1}}}], "nodeSelector": {"a": "b"}}`)
	}
	f.Add("a", "", `{"containers": [null, {"volumeMounts": [null]}], "initContainers": [{"restartPolicy": "Always"}], "volumes": [{}]}`)
	f.Fuzz(func(t *testing.T, networks, first, spec string) {
		raw, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{netselect.Annotation: networks, AnnotationDefaultNetwork: first}}})
		if err != nil {
			return
		}
		if json.Valid([]byte(spec)) {
			raw = append(raw[:len(raw)-1], `,"spec":`+spec+"}"...)
		}
		p, err := Parse(raw, "ns")
		if err != nil {
			return
		}
		names, err := p.Networks()
		for _, n := range names {
			if n.Name == "" || n.Namespace == "" || strings.ContainsAny(n.Name, "/%") || strings.Contains(n.String(), "..") {
				t.Fatalf("%q and %q name %+v", networks, first, n)
			}
		}
		if patch, _, patchErr := p.Patch(definitions); err == nil && patchErr == nil {
			if _, err := json.Marshal(patch); err != nil {
				t.Fatal(err)
			}
		}
	})
}
