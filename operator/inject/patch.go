package inject

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/netselect"
)

// AnnotationDefaultNetwork names the pod's default network, in place of Multus's own.
const AnnotationDefaultNetwork = "v1.multus-cni.io/default-network"

// AnnotationNodeSelector on a NetworkAttachmentDefinition is a label, <key>=<value> or
// <key>, of the nodes that have the network.
const AnnotationNodeSelector = "k8s.v1.cni.cncf.io/nodeSelector"

// The volume that tells programs in a pod of its networks, by names that they know.
const (
	volumeName    = "podnetinfo"
	volumePath    = "/etc/podnetinfo"
	containerName = "CONTAINER_NAME" // environment variable, for the names of huge page files
)

// Pod is what of a pod matters here.
type Pod struct {
	Metadata struct {
		Annotations, Labels map[string]string
	}
	Spec struct {
		NodeSelector               map[string]string
		Containers, InitContainers []container
		Volumes                    []named
	}
	namespace string
}

type container struct {
	Name          string
	RestartPolicy corev1.ContainerRestartPolicy
	Resources     *struct{ Requests, Limits corev1.ResourceList } // nil when there is no such key to patch
	Env           []named
	VolumeMounts  []mount
}

type (
	named struct{ Name string }
	mount struct{ Name, MountPath string }
)

// Operation is one of a JSON patch (RFC 6902).
type Operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

// Parse reads a pod that is about to be made in a namespace.
func Parse(raw []byte, namespace string) (*Pod, error) {
	p := &Pod{namespace: namespace}
	if err := json.Unmarshal(raw, p); err != nil {
		return nil, fmt.Errorf("read the pod: %w", err)
	}
	return p, nil
}

// Networks names the pod's NetworkAttachmentDefinitions, one as often as it is attached.
// A default network without a namespace is in Multus's own, which nobody says here, and
// is left out.
func (p *Pod) Networks() (names []types.NamespacedName, err error) {
	selections, err := netselect.Parse(p.Metadata.Annotations[netselect.Annotation], p.namespace)
	if err != nil {
		return nil, err
	}
	const nowhere = "nowhere"
	first, err := netselect.Parse(p.Metadata.Annotations[AnnotationDefaultNetwork], nowhere)
	if err == nil && len(first) > 1 {
		err = fmt.Errorf("it names %d networks: name one", len(first))
	}
	if err != nil {
		return nil, fmt.Errorf("annotation %s, of the same form: %w", AnnotationDefaultNetwork, err)
	}
	for _, s := range append(first, selections...) {
		if s.Namespace != nowhere {
			names = append(names, types.NamespacedName{Namespace: s.Namespace, Name: s.Name})
		}
	}
	return names, nil
}

// Patch gives what the pod lacks, given the annotations of its NetworkAttachmentDefinitions.
// A resource that a container asks for is left as it is: its author has counted. A
// warning says where that is too few, and what of the pod is not as it was written.
//
// Done to the pod that the patch makes, there is nothing left to patch.
func (p *Pod) Patch(definitions map[types.NamespacedName]map[string]string) (patch []Operation, warnings []string, err error) {
	names, err := p.Networks()
	if err != nil || len(p.Spec.Containers) == 0 { // a pod without containers is refused as such
		return nil, nil, err
	}
	needs := map[corev1.ResourceName]int64{}
	selector := map[string]string{}
	for _, name := range names {
		annotations := definitions[name]
		if resourceName := annotations[sriovv1.AnnotationResourceName]; resourceName != "" {
			for _, problem := range validation.IsQualifiedName(resourceName) {
				return nil, nil, fmt.Errorf("NetworkAttachmentDefinition %s: annotation %s: %q is not the name of a resource: %s", name, sriovv1.AnnotationResourceName, resourceName, problem)
			}
			needs[corev1.ResourceName(resourceName)]++
		}
		label, ok := annotations[AnnotationNodeSelector]
		if !ok {
			continue
		}
		key, value, _ := strings.Cut(label, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		for _, problem := range slices.Concat(validation.IsQualifiedName(key), validation.IsValidLabelValue(value)) {
			return nil, nil, fmt.Errorf("NetworkAttachmentDefinition %s: annotation %s: %q is not a label of nodes, <key>=<value>: %s", name, AnnotationNodeSelector, label, problem)
		}
		if before, ok := selector[key]; ok && before != value {
			warnings = append(warnings, fmt.Sprintf("NetworkAttachmentDefinition %s is for nodes with %s=%s, another of the pod's for nodes with %s=%s, and no node has both: name one of them", name, key, value, key, before))
		}
		selector[key] = value
	}
	if len(needs) > 0 {
		more, told := p.resources(needs)
		patch, warnings = append(more, p.volume()...), append(warnings, told...)
	}
	more, told := p.nodes(selector)
	return append(patch, more...), append(warnings, told...), nil
}

func add(path string, value any) Operation { return Operation{"add", path, value} }

// resources asks, in the first container, for what no container asks for.
func (p *Pod) resources(needs map[corev1.ResourceName]int64) (patch []Operation, warnings []string) {
	missing := map[corev1.ResourceName]string{}
	for _, name := range slices.Sorted(maps.Keys(needs)) {
		asked, byName := p.asks(name)
		switch need := needs[name]; {
		case !byName:
			missing[name] = strconv.FormatInt(need, 10)
		case asked < need:
			warnings = append(warnings, fmt.Sprintf("spec.containers: %d of %s, and the pod's networks need %d: ask for that many, or for none to have it filled in", asked, name, need))
		}
	}
	if len(missing) == 0 {
		return nil, warnings
	}
	const first = "/spec/containers/0/resources"
	has := p.Spec.Containers[0].Resources
	if has == nil {
		return []Operation{add(first, map[string]any{"requests": missing, "limits": missing})}, warnings
	}
	for _, list := range []struct {
		path string
		has  corev1.ResourceList
	}{{first + "/requests", has.Requests}, {first + "/limits", has.Limits}} {
		if len(list.has) == 0 {
			patch = append(patch, add(list.path, missing))
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(missing)) {
			patch = append(patch, add(list.path+"/"+strings.ReplaceAll(string(name), "/", "~1"), missing[name]))
		}
	}
	return patch, warnings
}

// asks tells how many of a resource the containers ask for, and whether any names it, be it with 0.
// Init containers count if they stay: kubelet says of the others to nobody what they have.
func (p *Pod) asks(name corev1.ResourceName) (asked int64, byName bool) {
	count := func(c *container) {
		if c.Resources == nil {
			return
		}
		limit, limited := c.Resources.Limits[name]
		request, requested := c.Resources.Requests[name]
		asked += max(limit.Value(), request.Value())
		byName = byName || limited || requested
	}
	for i := range p.Spec.Containers {
		count(&p.Spec.Containers[i])
	}
	for i := range p.Spec.InitContainers {
		if c := &p.Spec.InitContainers[i]; c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			count(c)
		}
	}
	return asked, byName
}

// volume shows labels, annotations (of which network-status is one) and huge pages to the
// pod's containers. What the pod has under this name, or at this path, is its own.
func (p *Pod) volume() (patch []Operation) {
	var files []corev1.DownwardAPIVolumeFile
	for _, f := range []struct {
		path string
		of   map[string]string
	}{{"labels", p.Metadata.Labels}, {"annotations", p.Metadata.Annotations}} {
		if len(f.of) > 0 {
			files = append(files, corev1.DownwardAPIVolumeFile{Path: f.path, FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata." + f.path}})
		}
	}
	has := slices.ContainsFunc(p.Spec.Volumes, func(v named) bool { return v.Name == volumeName })
	for i := range p.Spec.Containers {
		c := &p.Spec.Containers[i]
		path := fmt.Sprintf("/spec/containers/%d/", i)
		pages := c.hugePages()
		files = append(files, pages...)
		if len(pages) > 0 && !slices.ContainsFunc(c.Env, func(e named) bool { return e.Name == containerName }) {
			patch = append(patch, appendTo(path+"env", len(c.Env), corev1.EnvVar{Name: containerName, Value: c.Name}))
		}
		if !slices.ContainsFunc(c.VolumeMounts, func(m mount) bool {
			return m.Name == volumeName || strings.TrimRight(m.MountPath, "/") == volumePath
		}) {
			patch = append(patch, appendTo(path+"volumeMounts", len(c.VolumeMounts), corev1.VolumeMount{Name: volumeName, ReadOnly: true, MountPath: volumePath}))
		}
	}
	if !has {
		patch = append(patch, appendTo("/spec/volumes", len(p.Spec.Volumes), corev1.Volume{
			Name: volumeName, VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: files}},
		}))
	}
	return patch
}

// appendTo appends to a list, of which the pod has n entries.
func appendTo[T any](path string, n int, value T) Operation {
	if n == 0 {
		return add(path, []T{value})
	}
	return add(path+"/-", value)
}

// hugePages are the files that say, in MiB, what huge pages the container has:
// hugepages_1G_request_<container> for its request of hugepages-1Gi.
func (c *container) hugePages() (files []corev1.DownwardAPIVolumeFile) {
	if c.Resources == nil {
		return nil
	}
	for _, list := range []struct {
		kind, field string
		of          corev1.ResourceList
	}{{"request", "requests.", c.Resources.Requests}, {"limit", "limits.", c.Resources.Limits}} {
		for _, name := range slices.Sorted(maps.Keys(list.of)) {
			size, ok := strings.CutPrefix(string(name), corev1.ResourceHugePagesPrefix)
			if quantity := list.of[name]; ok && !quantity.IsZero() {
				files = append(files, corev1.DownwardAPIVolumeFile{
					Path:             fmt.Sprintf("hugepages_%s_%s_%s", strings.TrimSuffix(size, "i"), list.kind, c.Name),
					ResourceFieldRef: &corev1.ResourceFieldSelector{ContainerName: c.Name, Resource: list.field + string(name), Divisor: resource.MustParse("1Mi")},
				})
			}
		}
	}
	return files
}

// nodes limits the pod to nodes that have its networks.
func (p *Pod) nodes(selector map[string]string) (patch []Operation, warnings []string) {
	all := maps.Clone(p.Spec.NodeSelector)
	if all == nil {
		all = map[string]string{}
	}
	for _, label := range slices.Sorted(maps.Keys(selector)) {
		if own, ok := all[label]; ok && own != selector[label] {
			warnings = append(warnings, fmt.Sprintf("spec.nodeSelector %s=%s became %s=%s, of the nodes that have the pod's networks: change it, or the networks", label, own, label, selector[label]))
		}
		all[label] = selector[label]
	}
	if maps.Equal(all, p.Spec.NodeSelector) {
		return nil, nil
	}
	return []Operation{add("/spec/nodeSelector", all)}, warnings
}
