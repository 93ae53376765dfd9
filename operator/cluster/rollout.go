package cluster

import (
	"crypto/sha256"
	_ "embed" // the agent's manifest
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/cluster/admission"
	"github.com/sluice-network/sluice/operator/plan"
)

// agentName is the name of the agents' DaemonSet, service account and container owner.
const agentName = "sluice-agent"

// workerLabel, when any node has it, is what nodes must have for an agent unless the
// configuration selects others.
const workerLabel = "node-role.kubernetes.io/worker"

// annotationTemplate is the digest of the agents' DaemonSet as applied, by which a
// setting that was taken back is noticed.
const annotationTemplate = "sluice.dev/template"

//go:embed agent.yaml
var agentManifest []byte

// ownEnv are the agent's variables that the operator sets.
var ownEnv = []string{"NODE_NAME", "NODE_IP", "POD_NAMESPACE", "RESOURCE_PREFIX", "CDI_DIR"}

// agentDaemonSet is the DaemonSet of the agents as the configuration wants it, bridges with
// what it takes to make and remove bridges.
func agentDaemonSet(config *sriovv1.SriovOperatorConfig, selector map[string]string, bridges bool, settings Config) (*appsv1.DaemonSet, error) {
	ds := &appsv1.DaemonSet{}
	if err := yaml.UnmarshalStrict(agentManifest, ds); err != nil {
		return nil, fmt.Errorf("read the agent's manifest: %w", err)
	}
	ds.Namespace = config.Namespace
	ds.OwnerReferences = []metav1.OwnerReference{ownedBy(config)}
	pod := &ds.Spec.Template.Spec
	pod.NodeSelector, pod.Tolerations, pod.ImagePullSecrets = selector, config.Spec.Tolerations, settings.ImagePullSecrets
	if len(pod.Tolerations) == 0 {
		pod.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}}
	}
	agent := &pod.Containers[0]
	if config.Annotations[sriovv1.AnnotationReadOnlyEtc] == "true" {
		withoutEtc(pod)
	}
	if config.Spec.UseCDI {
		withCDI(pod)
	}
	if bridges {
		withSwitch(pod)
	}
	agent.Image = settings.AgentImage
	agent.Args = []string{fmt.Sprintf("--v=%d", config.Spec.LogLevel)}
	agent.Env = append(agent.Env, corev1.EnvVar{Name: "RESOURCE_PREFIX", Value: settings.ResourcePrefix})
	for _, name := range slices.Sorted(maps.Keys(config.Spec.ConfigDaemonEnvVars)) {
		if !slices.Contains(ownEnv, name) {
			agent.Env = append(agent.Env, corev1.EnvVar{Name: name, Value: config.Spec.ConfigDaemonEnvVars[name]})
		}
	}
	data, err := json.Marshal(ds)
	if err != nil {
		return nil, fmt.Errorf("encode DaemonSet %s: %w", ds.Name, err)
	}
	digest := sha256.Sum256(data)
	ds.Annotations = map[string]string{annotationTemplate: fmt.Sprintf("%x", digest[:8])}
	return ds, nil
}

// cdiDir is where runtimes look for what changes as the node runs.
const cdiDir = "/var/run/cdi"

// withCDI lets the agent describe device nodes for the runtime.
func withCDI(pod *corev1.PodSpec) {
	mount(pod, corev1.VolumeMount{Name: "cdi", MountPath: cdiDir})
	agent := &pod.Containers[0]
	agent.Env = append(agent.Env, corev1.EnvVar{Name: "CDI_DIR", Value: cdiDir})
}

// switchDir is where Open vSwitch's database listens, on nodes that have it.
const switchDir = "/var/run/openvswitch"

// overrideDAC is needed for a socket that is not root's, as on distributions where Open
// vSwitch has a user of its own. The group of that has another number on each node.
const overrideDAC corev1.Capability = "DAC_OVERRIDE"

// withSwitch lets the agent reach Open vSwitch.
func withSwitch(pod *corev1.PodSpec) {
	mount(pod, corev1.VolumeMount{Name: "openvswitch", MountPath: switchDir, ReadOnly: true})
	capabilities := pod.Containers[0].SecurityContext.Capabilities
	capabilities.Add = append(capabilities.Add, overrideDAC)
}

// reachesSwitch tells whether withSwitch was applied.
func reachesSwitch(pod *corev1.PodSpec) bool {
	return len(pod.Containers) > 0 && slices.ContainsFunc(pod.Containers[0].VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == switchDir })
}

// mount gives the agent a directory of the node, by the same path.
func mount(pod *corev1.PodSpec, m corev1.VolumeMount) {
	create := corev1.HostPathDirectoryOrCreate
	pod.Volumes = append(pod.Volumes, corev1.Volume{Name: m.Name, VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: m.MountPath, Type: &create}}})
	agent := &pod.Containers[0]
	agent.VolumeMounts = append(agent.VolumeMounts, m)
}

// withoutEtc takes the folders below /etc from a pod, but for the runtime's own. The runtime
// would make those that are missing, whatever their type, and where it cannot the pod does
// not start.
func withoutEtc(pod *corev1.PodSpec) {
	in := map[string]bool{}
	pod.Volumes = slices.DeleteFunc(pod.Volumes, func(v corev1.Volume) bool {
		in[v.Name] = v.HostPath != nil && strings.HasPrefix(v.HostPath.Path, "/etc/") && !strings.HasPrefix(v.HostPath.Path, "/etc/cni/")
		return in[v.Name]
	})
	agent := &pod.Containers[0]
	agent.VolumeMounts = slices.DeleteFunc(agent.VolumeMounts, func(m corev1.VolumeMount) bool { return in[m.Name] })
}

// ownedBy makes the garbage collector delete an object with the configuration, also when
// no operator is there to do it.
func ownedBy(config *sriovv1.SriovOperatorConfig) metav1.OwnerReference {
	controller := true
	return metav1.OwnerReference{
		APIVersion: sriovv1.SchemeGroupVersion.String(), Kind: "SriovOperatorConfig",
		Name: config.Name, UID: config.UID, Controller: &controller,
	}
}

// agentSelector are the labels a node must have for an agent.
func agentSelector(config *sriovv1.SriovOperatorConfig, nodes []metav1.PartialObjectMetadata) map[string]string {
	selector := map[string]string{corev1.LabelOSStable: "linux"}
	if len(config.Spec.ConfigDaemonNodeSelector) > 0 {
		maps.Copy(selector, config.Spec.ConfigDaemonNodeSelector)
		return selector
	}
	for i := range nodes {
		if role, ok := nodes[i].Labels[workerLabel]; ok && role == "" && runsLinux(&nodes[i]) {
			selector[workerLabel] = ""
			break
		}
	}
	return selector
}

// heeded are the feature gates that have an effect.
var heeded = []string{plan.GateBridges, admission.GateInjectorFails}

// gates are the other ones that the SR-IOV network operator has, with what Sluice does
// instead of heeding them.
var gates = map[string]struct {
	on   bool
	does string
}{
	"parallelNicConfig":                {true, "PFs of a node are always configured side by side"},
	"blockDevicePluginUntilConfigured": {true, "a VF is never advertised before it is configured"},
	"metricsExporter":                  {true, "agents always serve their metrics"},
	"mellanoxFirmwareReset":            {false, "firmware is never changed, so it needs no reset"},
}

// defaultsOn are gates that are on where nothing is said of them. Turned on they ask for
// nothing that the user has chosen.
var defaultsOn = []string{"mellanoxFirmwareReset"}

// unsupported says what of the configuration Sluice does not do, each naming field, value
// and mend.
func unsupported(spec *sriovv1.SriovOperatorConfigSpec) []string {
	var all []string
	if spec.ConfigurationMode == sriovv1.ConfigurationModeSystemd {
		all = append(all, "configurationMode systemd: agents configure NICs themselves, and VFs are not there before kubelet starts: set it to daemon")
	}
	if spec.EnableOvsOffload {
		all = append(all, "enableOvsOffload true: it has no effect: turn hardware offload on in the nodes' Open vSwitch, with ovs-vsctl set Open_vSwitch . other_config:hw-offload=true and a restart of it, and set it to false")
	}
	for _, name := range slices.Sorted(maps.Keys(spec.FeatureGates)) {
		gate, known := gates[name]
		switch on := spec.FeatureGates[name]; {
		case slices.Contains(heeded, name):
		case !known:
			all = append(all, fmt.Sprintf("featureGates %s: there is no such gate: remove it, or use one of %s, %s", name, strings.Join(slices.Sorted(maps.Keys(gates)), ", "), strings.Join(heeded, ", ")))
		case on != gate.on && !slices.Contains(defaultsOn, name):
			all = append(all, fmt.Sprintf("featureGates %s %t: %s: set it to %t or remove it", name, on, gate.does, gate.on))
		}
	}
	for _, name := range ownEnv {
		if _, set := spec.ConfigDaemonEnvVars[name]; set {
			all = append(all, fmt.Sprintf("configDaemonEnvVars %s: the operator sets this variable of the agents: remove it", name))
		}
	}
	return all
}

// covers tells whether an object has all that another one, of the same kind and as JSON,
// asks for. It may have more: the API server fills in defaults, and other writers have
// their say in what is not ours. Lists of things with names are compared by name.
func covers(have, want any) bool {
	switch want := want.(type) {
	case map[string]any:
		h, ok := have.(map[string]any)
		if !ok {
			return len(want) == 0 && have == nil
		}
		for key, value := range want {
			if !covers(h[key], value) {
				return false
			}
		}
		return true
	case []any:
		h, ok := have.([]any)
		if !ok || len(h) < len(want) {
			return len(want) == 0 && have == nil
		}
		for i, value := range want {
			name := nameIn(value)
			if name == "" && (len(h) != len(want) || !covers(h[i], value)) {
				return false
			}
			if name != "" && !slices.ContainsFunc(h, func(v any) bool { return nameIn(v) == name && covers(v, value) }) {
				return false
			}
		}
		return true
	case nil:
		return true // an empty field, such as creationTimestamp, asks for nothing
	}
	return fmt.Sprint(have) == fmt.Sprint(want) // numbers differ in their Go types
}

func nameIn(v any) string {
	m, _ := v.(map[string]any)
	name, _ := m["name"].(string)
	return name
}
