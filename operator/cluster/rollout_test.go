package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"pgregory.net/rapid"
	"sigs.k8s.io/controller-runtime/pkg/client"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

func nodeWith(labels ...string) metav1.PartialObjectMetadata {
	n := metav1.PartialObjectMetadata{}
	n.Labels = map[string]string{corev1.LabelOSStable: "linux"}
	for i := 0; i < len(labels); i += 2 {
		n.Labels[labels[i]] = labels[i+1]
	}
	return n
}

func TestAgentSelector(t *testing.T) {
	for _, c := range []struct {
		name   string
		config map[string]string
		nodes  []metav1.PartialObjectMetadata
		want   string
	}{
		{"no nodes", nil, nil, "kubernetes.io/os=linux"},
		{"no workers", nil, []metav1.PartialObjectMetadata{nodeWith()}, "kubernetes.io/os=linux"},
		{"workers", nil, []metav1.PartialObjectMetadata{nodeWith(), nodeWith(workerLabel, "")}, "kubernetes.io/os=linux,node-role.kubernetes.io/worker="},
		{"a worker of another kind", nil, []metav1.PartialObjectMetadata{nodeWith(workerLabel, "true")}, "kubernetes.io/os=linux"},
		{"a worker that runs Windows", nil, []metav1.PartialObjectMetadata{nodeWith(workerLabel, "", corev1.LabelOSStable, "windows")}, "kubernetes.io/os=linux"},
		{"chosen", map[string]string{"sriov": "yes"}, []metav1.PartialObjectMetadata{nodeWith(workerLabel, "")}, "kubernetes.io/os=linux,sriov=yes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := &sriovv1.SriovOperatorConfig{Spec: sriovv1.SriovOperatorConfigSpec{ConfigDaemonNodeSelector: c.config}}
			if got := metav1.FormatLabelSelector(&metav1.LabelSelector{MatchLabels: agentSelector(config, c.nodes)}); got != c.want {
				t.Errorf("it is %s, want %s", got, c.want)
			}
		})
	}
}

func TestUnsupported(t *testing.T) {
	for want, spec := range map[string]sriovv1.SriovOperatorConfigSpec{
		"": {
			ConfigurationMode: "daemon", DisablePlugins: []sriovv1.PluginName{"mellanox"},
			FeatureGates:   map[string]bool{"parallelNicConfig": true, "metricsExporter": true, "blockDevicePluginUntilConfigured": true, "mellanoxFirmwareReset": true, "manageSoftwareBridges": true, "resourceInjectorMatchCondition": true},
			EnableInjector: true,
		},
		"configurationMode systemd: ":        {ConfigurationMode: "systemd"},
		"enableOvsOffload true: ":            {EnableOvsOffload: true},
		"featureGates x: there is no such":   {FeatureGates: map[string]bool{"x": false}},
		"featureGates parallelNicConfig fal": {FeatureGates: map[string]bool{"parallelNicConfig": false}},
		"configDaemonEnvVars NODE_NAME: ":    {ConfigDaemonEnvVars: map[string]string{"NODE_NAME": "x"}},
	} {
		got := strings.Join(unsupported(&spec), "; ")
		if (want == "") != (got == "") || !strings.HasPrefix(got, want) {
			t.Errorf("%+v: %q, want %q", spec, got, want)
		}
	}
}

// On nodes whose /etc cannot be written to, the agent does without it, and with all else.
func TestAgentWithoutEtc(t *testing.T) {
	config := &sriovv1.SriovOperatorConfig{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "default", UID: "u"}}
	build := func() (paths, mounts []string) {
		ds, err := agentDaemonSet(config, nil, false, Config{})
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range ds.Spec.Template.Spec.Volumes {
			if v.HostPath != nil {
				paths = append(paths, v.HostPath.Path)
			}
		}
		for _, m := range ds.Spec.Template.Spec.Containers[0].VolumeMounts {
			if m.Name != "device-pools" { // not the node's
				mounts = append(mounts, m.MountPath)
			}
		}
		slices.Sort(paths)
		slices.Sort(mounts)
		return paths, mounts
	}
	all, allMounts := build()
	if !slices.Equal(all, allMounts) || !slices.Contains(all, "/etc/sriov-operator") || !slices.Contains(all, "/etc/modprobe.d") || !slices.Contains(all, "/etc/cni/net.d") {
		t.Fatalf("volumes %v, mounts %v", all, allMounts)
	}
	config.Annotations = map[string]string{sriovv1.AnnotationReadOnlyEtc: "true"}
	want := slices.DeleteFunc(all, func(path string) bool { return strings.HasPrefix(path, "/etc") && path != "/etc/cni/net.d" })
	if paths, mounts := build(); !slices.Equal(paths, want) || !slices.Equal(mounts, want) {
		t.Errorf("volumes %v, mounts %v, want %v", paths, mounts, want)
	}
}

func TestAgentWithCDI(t *testing.T) {
	config := &sriovv1.SriovOperatorConfig{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "default", UID: "u"}}
	for _, use := range []bool{false, true} {
		config.Spec.UseCDI = use
		ds, err := agentDaemonSet(config, nil, false, Config{})
		if err != nil {
			t.Fatal(err)
		}
		pod := ds.Spec.Template.Spec
		volume := slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool { return v.HostPath != nil && v.HostPath.Path == "/var/run/cdi" })
		mount := slices.ContainsFunc(pod.Containers[0].VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/var/run/cdi" })
		env := slices.ContainsFunc(pod.Containers[0].Env, func(e corev1.EnvVar) bool { return e.Name == "CDI_DIR" && e.Value == "/var/run/cdi" })
		if volume != use || mount != use || env != use {
			t.Errorf("useCDI %v: volume %v, mount %v, variable %v", use, volume, mount, env)
		}
	}
}

func TestAgentDaemonSet(t *testing.T) {
	config := &sriovv1.SriovOperatorConfig{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "default", UID: "u"}}
	settings := Config{ResourcePrefix: "example.com", AgentImage: "img", ImagePullSecrets: []corev1.LocalObjectReference{{Name: "s"}}}
	build := func() *appsv1.DaemonSet {
		ds, err := agentDaemonSet(config, map[string]string{"a": "b"}, false, settings)
		if err != nil {
			t.Fatal(err)
		}
		return ds
	}
	first := build()
	config.Spec.LogLevel = 2
	config.Spec.ConfigDaemonEnvVars = map[string]string{"EXTRA": "1", "NODE_NAME": "forged"}
	config.Spec.Tolerations = []corev1.Toleration{{Key: "k", Operator: corev1.TolerationOpExists}}
	ds := build()
	if ds.Annotations[annotationTemplate] == first.Annotations[annotationTemplate] || !metav1.IsControlledBy(ds, config) {
		t.Errorf("its metadata is %+v", ds.ObjectMeta)
	}
	pod, env := ds.Spec.Template.Spec, map[string]string{}
	for _, v := range pod.Containers[0].Env {
		if _, twice := env[v.Name]; twice {
			t.Errorf("the variable %s is there twice", v.Name)
		}
		env[v.Name] = v.Value
	}
	if env["RESOURCE_PREFIX"] != "example.com" || env["EXTRA"] != "1" || env["NODE_NAME"] != "" {
		t.Errorf("the environment is %v", env)
	}
	if pod.Containers[0].Image != "img" || pod.ImagePullSecrets[0].Name != "s" || pod.Containers[0].Args[0] != "--v=2" ||
		pod.NodeSelector["a"] != "b" || len(pod.Tolerations) != 1 || pod.Tolerations[0].Key != "k" {
		t.Errorf("the pod is %+v", pod)
	}
	if tolerations := first.Spec.Template.Spec.Tolerations; len(tolerations) != 1 || tolerations[0].Key != "" || tolerations[0].Operator != corev1.TolerationOpExists {
		t.Errorf("by default it tolerates %+v", tolerations)
	}
	// Least privilege: nothing of the host but what is named, and no privileged container.
	for _, v := range pod.Volumes {
		if pools := v.ConfigMap; pools != nil && pools.Name == "sriovdp-config" && *pools.Optional {
			continue
		}
		if v.HostPath == nil || v.HostPath.Path == "/" || v.HostPath.Path == "/etc" || v.HostPath.Path == "/var" || v.HostPath.Path == "/proc" {
			t.Errorf("the agent mounts %+v", v)
		}
	}
	if pod.HostPID || pod.HostIPC || len(pod.InitContainers) > 0 {
		t.Error("the agent shares more than the host's network")
	}
	for _, c := range pod.Containers {
		s := c.SecurityContext
		if s.Privileged != nil && *s.Privileged || *s.AllowPrivilegeEscalation || len(s.Capabilities.Drop) != 1 || s.Capabilities.Drop[0] != "ALL" {
			t.Errorf("container %s may do %+v", c.Name, s)
		}
	}
}

func TestCovers(t *testing.T) {
	type m = map[string]any
	type l = []any
	for _, c := range []struct {
		name       string
		have, want any
		covers     bool
	}{
		{"more fields", m{"a": int64(1), "b": "x"}, m{"a": float64(1)}, true},
		{"another value", m{"a": "x"}, m{"a": "y"}, false},
		{"a field less", m{}, m{"a": "y"}, false},
		{"empty things", nil, m{"a": m{}, "b": l{}, "c": nil}, false},
		{"empty things in a map", m{}, m{"a": m{}, "b": l{}, "c": nil}, true},
		{"names in another order", l{m{"name": "b"}, m{"name": "a", "v": "1"}}, l{m{"name": "a", "v": "1"}, m{"name": "b"}}, true},
		{"a name less", l{m{"name": "b"}}, l{m{"name": "a"}}, false},
		{"a longer list", l{"a", "b"}, l{"a"}, false},
		{"another order", l{"a", "b"}, l{"b", "a"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := covers(c.have, c.want); got != c.covers {
				t.Errorf("%v covers %v: %t", c.have, c.want, got)
			}
		})
	}
	rapid.Check(t, func(t *rapid.T) {
		tree := rapid.MapOf(rapid.StringMatching("[a-c]"), rapid.SliceOf(rapid.String())).Draw(t, "tree")
		have := m{"more": "x"}
		want := m{}
		for k, v := range tree {
			var list l
			for _, e := range v {
				list = append(list, e)
			}
			have[k], want[k] = list, list
		}
		if !covers(have, want) {
			t.Fatalf("%v does not cover %v", have, want)
		}
	})
}

func getConfig(t *testing.T) *sriovv1.SriovOperatorConfig {
	t.Helper()
	config := &sriovv1.SriovOperatorConfig{}
	eventually(t, func() error {
		return api.Get(t.Context(), client.ObjectKey{Namespace: operatorNamespace, Name: "default"}, config)
	})
	return config
}

func getAgents(t *testing.T) *appsv1.DaemonSet {
	t.Helper()
	ds := &appsv1.DaemonSet{}
	eventually(t, func() error {
		return api.Get(t.Context(), client.ObjectKey{Namespace: operatorNamespace, Name: agentName}, ds)
	})
	return ds
}

func TestRollOut(t *testing.T) {
	needAPI(t)
	config, ds := getConfig(t), getAgents(t) // made by installing alone
	if ds.Spec.Template.Spec.Containers[0].Image != "example.com/sluice:test" || !metav1.IsControlledBy(ds, config) {
		t.Errorf("the agents are %+v", ds)
	}
	says := func(kind string, status metav1.ConditionStatus, reason, message string) {
		t.Helper()
		wantCondition(t, config, func() []metav1.Condition { return config.Status.Conditions }, kind, status, reason, message)
	}
	defer change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec = sriovv1.SriovOperatorConfigSpec{} })
	makeNode(t, "ro-1", map[string]string{"ro": "yes"})
	makeNode(t, "ro-2", map[string]string{"ro": "yes"})
	makeNode(t, "ro-3", nil)
	for _, n := range []string{"ro-1", "ro-2", "ro-3"} {
		eventually(t, func() error { _, err := getState(t, n); return err })
	}

	// A selector narrows the agents, and the states go with them.
	change(t, config, func(c *sriovv1.SriovOperatorConfig) {
		c.Spec.ConfigDaemonNodeSelector = map[string]string{"ro": "yes"}
		c.Spec.LogLevel = 1
	})
	says(sriovv1.ConditionReady, metav1.ConditionFalse, "AgentsRollingOut", "0 of 2 selected nodes have a ready agent")
	says(sriovv1.ConditionProgressing, metav1.ConditionTrue, "AgentsRollingOut", "")
	eventually(t, func() error {
		if _, err := getState(t, "ro-3"); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the state of a node without an agent is there: %w", errors.Join(err))
		}
		return nil
	})
	if _, err := getState(t, "ro-1"); err != nil {
		t.Error(err)
	}
	running := func(desired, ready int32) {
		t.Helper()
		eventually(t, func() error {
			ds = getAgents(t)
			ds.Status = appsv1.DaemonSetStatus{ObservedGeneration: ds.Generation, DesiredNumberScheduled: desired, CurrentNumberScheduled: desired, UpdatedNumberScheduled: desired, NumberReady: ready, NumberAvailable: ready}
			return api.Status().Update(t.Context(), ds)
		})
	}
	running(1, 1)
	says(sriovv1.ConditionReady, metav1.ConditionFalse, "AgentsRollingOut", "1 nodes take no agent: they have taints that tolerations lacks")
	running(2, 2)
	says(sriovv1.ConditionReady, metav1.ConditionTrue, "OperatorConfigReady", "the agent runs on all 2 selected nodes")
	if config.Status.MatchedNodeCount != 2 || config.Status.ReadyNodeCount != 2 || config.Status.ObservedGeneration != config.Generation {
		t.Errorf("the status is %+v", config.Status)
	}

	// What is not supported is told; the agents run all the same.
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.ConfigurationMode = "systemd" })
	says(sriovv1.ConditionDegraded, metav1.ConditionTrue, "UnsupportedConfiguration", "configurationMode systemd: ")
	says(sriovv1.ConditionReady, metav1.ConditionFalse, "UnsupportedConfiguration", "")
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.ConfigurationMode = "" })
	says(sriovv1.ConditionReady, metav1.ConditionTrue, "OperatorConfigReady", "")

	// What a hand changes in the DaemonSet is put right, and what it adds is left.
	version := getAgents(t).ResourceVersion
	change(t, ds, func(ds *appsv1.DaemonSet) { ds.Spec.Template.Spec.Containers[0].Image = "other" })
	eventually(t, func() error {
		if ds = getAgents(t); ds.Spec.Template.Spec.Containers[0].Image != "example.com/sluice:test" || ds.ResourceVersion == version {
			return fmt.Errorf("the image is %s", ds.Spec.Template.Spec.Containers[0].Image)
		}
		return nil
	})
	// What is deleted comes back, and the states stay meanwhile.
	before, err := getState(t, "ro-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := api.Delete(t.Context(), ds); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if got := getAgents(t); got.UID == ds.UID {
			return fmt.Errorf("the DaemonSet is the old one")
		}
		return nil
	})
	if after, err := getState(t, "ro-1"); err != nil || after.UID != before.UID {
		t.Errorf("the state of ro-1 was made anew: %v", err)
	}

	other := makeOtherConfig(t)
	defer func() { _ = api.Delete(t.Context(), other) }()
	wantCondition(t, other, func() []metav1.Condition { return other.Status.Conditions }, sriovv1.ConditionReady, metav1.ConditionFalse, "Ignored", "only the SriovOperatorConfig named default")
}

// makeOtherConfig makes what the schema refuses now and may have been there before it did.
func makeOtherConfig(t *testing.T) *sriovv1.SriovOperatorConfig {
	t.Helper()
	kind := &unstructured.Unstructured{}
	kind.SetAPIVersion("apiextensions.k8s.io/v1")
	kind.SetKind("CustomResourceDefinition")
	kind.SetName("sriovoperatorconfigs." + sriovv1.GroupName)
	var rules any
	setRules := func(o *unstructured.Unstructured) {
		versions, _, _ := unstructured.NestedSlice(o.Object, "spec", "versions")
		schema := versions[0].(map[string]any)["schema"].(map[string]any)["openAPIV3Schema"].(map[string]any)
		rules, schema["x-kubernetes-validations"] = schema["x-kubernetes-validations"], rules
		if err := unstructured.SetNestedSlice(o.Object, versions, "spec", "versions"); err != nil {
			t.Fatal(err)
		}
	}
	change(t, kind, setRules)
	defer change(t, kind, setRules)
	other := &sriovv1.SriovOperatorConfig{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "other"}}
	eventually(t, func() error { return api.Create(t.Context(), other) })
	return other
}

// A configuration that is deleted takes the agents with it, and stays deleted.
func TestConfigDeleted(t *testing.T) {
	needAPI(t)
	makeNode(t, "cd-1", nil)
	eventually(t, func() error { _, err := getState(t, "cd-1"); return err })
	config := getConfig(t)
	if err := api.Delete(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	for _, object := range []client.Object{
		config,
		&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: agentName}},
		&sriovv1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "cd-1"}},
	} {
		wantGone(t, object)
	}
	// Made again by hand, it has all come back.
	if err := api.Create(t.Context(), &sriovv1.SriovOperatorConfig{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "default"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { _, err := getState(t, "cd-1"); return err })
	if ds := getAgents(t); !metav1.IsControlledBy(ds, getConfig(t)) {
		t.Errorf("the agents belong to %v", ds.OwnerReferences)
	}
}
