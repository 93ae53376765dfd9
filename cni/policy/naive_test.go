package policy

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// world is the objects of a cluster, as they were written. Its judge decides packet by
// packet from the statements of the specification, and shares no code with the package.
type world struct {
	namespaces map[string]corev1.Namespace
	pods       map[string]corev1.Pod // by namespace/name
	interfaces map[string][]rawInterface
	networks   map[string]nadv1.NetworkAttachmentDefinition
	policies   map[string]rawPolicy // by kind/namespace/name
	node       []netip.Addr
}

type rawPolicy struct {
	multi       bool
	namespace   string
	name        string
	annotations map[string]string
	spec        networkingv1.NetworkPolicySpec
	// What the one who wrote it wrong knows of it.
	invalid, anyPod, bothWays, anyNetwork bool
}

func (p rawPolicy) key() string { return fmt.Sprintf("%v/%s/%s", p.multi, p.namespace, p.name) }

// read gives the policy to the package.
func (p rawPolicy) read() *Policy {
	meta := metav1.ObjectMeta{Namespace: p.namespace, Name: p.name, Annotations: p.annotations}
	if !p.multi {
		return ReadNetworkPolicy(&networkingv1.NetworkPolicy{ObjectMeta: meta, Spec: p.spec})
	}
	object, err := json.Marshal(map[string]any{"apiVersion": "k8s.cni.cncf.io/v1beta2", "kind": "MultiNetworkPolicy", "metadata": meta, "spec": p.spec})
	if err != nil {
		panic(err)
	}
	read, err := ReadMultiNetworkPolicy(object)
	if err != nil {
		panic(err)
	}
	return read
}

type rawInterface struct {
	network, name string
	ips           []netip.Addr
}

func rawInterfaces(pod *corev1.Pod) []rawInterface {
	var all []struct {
		Name, Interface string
		IPs             []string
	}
	if text := pod.Annotations["k8s.v1.cni.cncf.io/network-status"]; text != "" {
		if err := json.Unmarshal([]byte(text), &all); err != nil {
			panic(err)
		}
	}
	var some []rawInterface
	for _, s := range all {
		i := rawInterface{network: s.Name, name: s.Interface}
		for _, ip := range s.IPs {
			i.ips = append(i.ips, netip.MustParseAddr(ip))
		}
		some = append(some, i)
	}
	return some
}

// allowed is one packet's fate at one end, and the policies that allow it, sorted.
func (w *world) allowed(pod *corev1.Pod, network string, egress bool, peer netip.Addr, protocol corev1.Protocol, port int32) (allowed bool, by []string) {
	enforcement := "all"
	if nad, known := w.networks[network]; known {
		enforcement = nad.Annotations["sluice.dev/network-policy"]
	}
	if enforcement == "none" {
		return true, nil
	}
	isolated := !egress && enforcement == "all" && w.namespaces[pod.Namespace].Annotations["net.beta.kubernetes.io/network-policy"] != ""
	for _, p := range w.policies {
		if p.namespace != pod.Namespace || !p.anyPod && !matches(&p.spec.PodSelector, pod.Labels) || !p.concerns(egress) {
			continue
		}
		if p.multi && !p.anyNetwork && !p.lists(network) || !p.multi && enforcement != "all" {
			continue
		}
		isolated = true
		if !p.invalid && w.somethingAllows(p, pod, network, egress, peer, protocol, port) {
			by = append(by, map[bool]string{false: "NetworkPolicy ", true: "MultiNetworkPolicy "}[p.multi]+p.namespace+"/"+p.name)
		}
	}
	slices.Sort(by)
	return !isolated || len(by) > 0 || slices.Contains(w.node, peer), by
}

// policed says whether there is any policy for a network, whomever it selects.
func (w *world) policed(network string) bool {
	enforcement := "all"
	if nad, known := w.networks[network]; known {
		enforcement = nad.Annotations["sluice.dev/network-policy"]
	}
	if enforcement == "none" {
		return false
	}
	for _, ns := range w.namespaces {
		if enforcement == "all" && ns.Annotations["net.beta.kubernetes.io/network-policy"] != "" {
			return true
		}
	}
	for _, p := range w.policies {
		if p.multi && (p.anyNetwork || p.lists(network)) || !p.multi && enforcement == "all" {
			return true
		}
	}
	return false
}

func (p rawPolicy) lists(network string) bool {
	for _, item := range strings.Split(p.annotations["k8s.v1.cni.cncf.io/policy-for"], ",") {
		item = strings.Trim(item, " ")
		if item == network || p.namespace+"/"+item == network {
			return true
		}
	}
	return false
}

func (p rawPolicy) concerns(egress bool) bool {
	if p.bothWays {
		return true
	}
	if len(p.spec.PolicyTypes) == 0 {
		return !egress || len(p.spec.Egress) > 0
	}
	if egress {
		return slices.Contains(p.spec.PolicyTypes, "Egress")
	}
	return slices.Contains(p.spec.PolicyTypes, "Ingress")
}

func (w *world) somethingAllows(p rawPolicy, pod *corev1.Pod, network string, egress bool, peer netip.Addr, protocol corev1.Protocol, port int32) bool {
	// Who has the address: maybe nobody, maybe several.
	var peers []*corev1.Pod
	for _, q := range w.pods {
		if q.Spec.HostNetwork || q.Status.Phase == "Succeeded" || q.Status.Phase == "Failed" {
			continue
		}
		for _, i := range w.interfaces[q.Namespace+"/"+q.Name] {
			if i.network == network && slices.Contains(i.ips, peer) {
				peers = append(peers, &q)
			}
		}
	}
	type rawRule struct {
		peers []networkingv1.NetworkPolicyPeer
		ports []networkingv1.NetworkPolicyPort
	}
	var rules []rawRule
	for _, r := range p.spec.Ingress {
		if !egress {
			rules = append(rules, rawRule{r.From, r.Ports})
		}
	}
	for _, r := range p.spec.Egress {
		if egress {
			rules = append(rules, rawRule{r.To, r.Ports})
		}
	}
	for _, r := range rules {
		// The address as such, and each pod that has it.
		for _, q := range append([]*corev1.Pod{nil}, peers...) {
			destination := q
			if !egress {
				destination = pod
			}
			if w.isPeer(p, r.peers, q, peer) && isPort(r.ports, destination, protocol, port) {
				return true
			}
		}
	}
	return false
}

func (w *world) isPeer(p rawPolicy, peers []networkingv1.NetworkPolicyPeer, pod *corev1.Pod, address netip.Addr) bool {
	for _, peer := range peers {
		if b := peer.IPBlock; b != nil {
			in := netip.MustParsePrefix(b.CIDR).Contains(address)
			for _, except := range b.Except {
				in = in && !netip.MustParsePrefix(except).Contains(address)
			}
			if in {
				return true
			}
			continue
		}
		if pod == nil {
			continue
		}
		in := pod.Namespace == p.namespace
		if peer.NamespaceSelector != nil {
			ns, known := w.namespaces[pod.Namespace]
			in = known && matches(peer.NamespaceSelector, ns.Labels)
		}
		if in && (peer.PodSelector == nil || matches(peer.PodSelector, pod.Labels)) {
			return true
		}
	}
	return len(peers) == 0
}

func isPort(ports []networkingv1.NetworkPolicyPort, destination *corev1.Pod, protocol corev1.Protocol, port int32) bool {
	for _, p := range ports {
		wanted := corev1.ProtocolTCP
		if p.Protocol != nil {
			wanted = *p.Protocol
		}
		switch {
		case wanted != protocol:
		case p.Port == nil:
			return true
		case p.Port.Type == intstr.String:
			if destination != nil && serves(destination, p.Port.StrVal, protocol, port) {
				return true
			}
		case p.EndPort != nil:
			if p.Port.IntVal <= port && port <= *p.EndPort {
				return true
			}
		case p.Port.IntVal == port:
			return true
		}
	}
	return len(ports) == 0
}

func serves(pod *corev1.Pod, name string, protocol corev1.Protocol, port int32) bool {
	containers := pod.Spec.Containers
	for _, c := range pod.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == "Always" {
			containers = append(slices.Clone(containers), c)
		}
	}
	for _, c := range containers {
		for _, p := range c.Ports {
			if p.Name == name && p.ContainerPort == port && (p.Protocol == protocol || p.Protocol == "" && protocol == "TCP") {
				return true
			}
		}
	}
	return false
}

func matches(s *metav1.LabelSelector, labels map[string]string) bool {
	for k, v := range s.MatchLabels {
		if have, has := labels[k]; !has || have != v {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		have, has := labels[e.Key]
		ok := false
		switch e.Operator {
		case "In":
			ok = has && slices.Contains(e.Values, have)
		case "NotIn":
			ok = !has || !slices.Contains(e.Values, have)
		case "Exists":
			ok = has
		case "DoesNotExist":
			ok = !has
		}
		if !ok {
			return false
		}
	}
	return true
}
