package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	strict "sigs.k8s.io/json"
)

// Pod is what policy needs to know of a pod.
type Pod struct {
	Namespace, Name, UID string
	Labels               map[string]string
	Node                 string
	Ended                bool // Succeeded or Failed: its addresses may be another's by now
	HostNetwork          bool
	Ports                []NamedPort
	Interfaces           []Interface
}

// NamedPort is a container port that has a name.
type NamedPort struct {
	Name     string
	Protocol uint8 // IP protocol number
	Port     uint16
}

// Interface is one of a pod's interfaces.
type Interface struct {
	Network string // its NetworkAttachmentDefinition: namespace/name
	Name    string
	MAC     string
	IPs     []netip.Addr
}

// Namespace is what policy needs to know of a namespace.
type Namespace struct {
	Name   string
	Labels map[string]string
	// Isolation is the value of IsolationAnnotation, empty without it.
	Isolation string
}

// Network is what policy needs to know of a NetworkAttachmentDefinition.
type Network struct {
	Name        string // namespace/name
	Enforcement Enforcement
	// Cut says that connections end that policy no longer allows.
	Cut bool
}

// Enforcement is which policies hold on a network.
type Enforcement uint8

const (
	// EnforceMulti is MultiNetworkPolicies that list the network. The default.
	EnforceMulti Enforcement = iota
	// EnforceAll is NetworkPolicies, too. So it is also on a network that nobody knows,
	// whose definition was deleted while pods are on it.
	EnforceAll
	// EnforceNone is no policy whatever.
	EnforceNone
)

// Annotations that are read here.
const (
	// NetworkPolicyAnnotation of a NetworkAttachmentDefinition is "multi", "all" or
	// "none": its Enforcement.
	NetworkPolicyAnnotation = "sluice.dev/network-policy"
	// ExistingConnectionsAnnotation of a NetworkAttachmentDefinition says what becomes of
	// connections that policy no longer allows: "keep", the default, or "cut".
	ExistingConnectionsAnnotation = "sluice.dev/existing-connections"
	// IsolationAnnotation of a namespace is what there was before NetworkPolicy:
	// {"ingress":{"isolation":"DefaultDeny"}}.
	IsolationAnnotation = "net.beta.kubernetes.io/network-policy"
	// PolicyForAnnotation of a MultiNetworkPolicy lists its networks.
	PolicyForAnnotation = "k8s.v1.cni.cncf.io/policy-for"
)

// ReadPod takes from a pod what policy needs. With an error the pod has no interfaces:
// it is nobody's peer.
func ReadPod(p *corev1.Pod) (Pod, error) {
	pod := Pod{
		Namespace: p.Namespace, Name: p.Name, UID: string(p.UID), Labels: p.Labels, Node: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork,
		Ended: p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
	}
	pod.addPorts(p.Spec.Containers)
	for i, c := range p.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways { // a sidecar
			pod.addPorts(p.Spec.InitContainers[i : i+1])
		}
	}
	interfaces, err := ReadNetworkStatus(p.Annotations[nadv1.NetworkStatusAnnot])
	if err != nil {
		return pod, fmt.Errorf("pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	pod.Interfaces = interfaces
	return pod, nil
}

func (p *Pod) addPorts(containers []corev1.Container) {
	for _, c := range containers {
		for _, port := range c.Ports {
			protocol, known := protocols[port.Protocol]
			if port.Name != "" && known && 0 < port.ContainerPort && port.ContainerPort <= 65535 {
				p.Ports = append(p.Ports, NamedPort{port.Name, protocol, uint16(port.ContainerPort)})
			}
		}
	}
}

// protocols are those that have ports, by the names Kubernetes has for them.
var protocols = map[corev1.Protocol]uint8{"": TCP, corev1.ProtocolTCP: TCP, corev1.ProtocolUDP: UDP, corev1.ProtocolSCTP: SCTP}

// ReadNetworkStatus reads a pod's annotation k8s.v1.cni.cncf.io/network-status. The
// cluster's own network, which no NetworkAttachmentDefinition makes, is left out. Keys that
// are not known are for others.
func ReadNetworkStatus(annotation string) ([]Interface, error) {
	if strings.TrimSpace(annotation) == "" {
		return nil, nil
	}
	var all []nadv1.NetworkStatus
	if err := json.Unmarshal([]byte(annotation), &all); err != nil {
		return nil, fmt.Errorf("annotation %s is not a list of networks: %w: whoever attached the pod must write it again", nadv1.NetworkStatusAnnot, err)
	}
	var interfaces []Interface
	for _, s := range all {
		if !strings.Contains(s.Name, "/") {
			continue
		}
		i := Interface{Network: s.Name, Name: s.Interface, MAC: s.Mac}
		for _, text := range s.IPs {
			ip, err := netip.ParseAddr(text)
			if err != nil || ip.Zone() != "" {
				return nil, fmt.Errorf("annotation %s, network %s: ips has %q, which is no address like 192.0.2.1: whoever attached the pod must write it again", nadv1.NetworkStatusAnnot, s.Name, text)
			}
			i.IPs = append(i.IPs, ip.Unmap())
		}
		interfaces = append(interfaces, i)
	}
	return interfaces, nil
}

// ReadNamespace takes from a namespace what policy needs.
func ReadNamespace(n *corev1.Namespace) Namespace {
	return Namespace{Name: n.Name, Labels: n.Labels, Isolation: n.Annotations[IsolationAnnotation]}
}

// ReadNetwork takes from a NetworkAttachmentDefinition what policy needs. An error is of
// an annotation that is not valid; the network is then what the strictest value makes it.
func ReadNetwork(nad *nadv1.NetworkAttachmentDefinition) (Network, error) {
	n := Network{Name: nad.Namespace + "/" + nad.Name}
	var wrong error
	switch value := nad.Annotations[ExistingConnectionsAnnotation]; value {
	case "", "keep":
	case "cut":
		n.Cut = true
	default:
		n.Cut = true
		wrong = fmt.Errorf("NetworkAttachmentDefinition %s: annotation %s is %q, and so connections are cut: write keep (the default) or cut", n.Name, ExistingConnectionsAnnotation, value)
	}
	switch value := nad.Annotations[NetworkPolicyAnnotation]; value {
	case "", "multi":
	case "all":
		n.Enforcement = EnforceAll
	case "none":
		n.Enforcement = EnforceNone
	default:
		n.Enforcement = EnforceAll
		wrong = errors.Join(wrong, fmt.Errorf("NetworkAttachmentDefinition %s: annotation %s is %q, and so all policies hold: write multi (MultiNetworkPolicy, the default), all (NetworkPolicy too) or none", n.Name, NetworkPolicyAnnotation, value))
	}
	return n, wrong
}

// isolation is the policy that a namespace's annotation is; nil when it isolates nothing.
func isolation(n Namespace) *Policy {
	var v struct {
		Ingress struct {
			Isolation string `json:"isolation"`
		} `json:"ingress"`
	}
	if strings.TrimSpace(n.Isolation) == "" {
		return nil
	}
	p := &Policy{Kind: "Namespace", Namespace: n.Name, Name: n.Name, isolates: [2]bool{Ingress: true}, selector: everything, on: optedIn}
	unknown, err := strict.UnmarshalStrict([]byte(n.Isolation), &v)
	if err == nil {
		err = errors.Join(unknown...)
	}
	if value := v.Ingress.Isolation; err == nil && value != "" && value != "DefaultDeny" {
		err = fmt.Errorf("isolation is %q", value)
	}
	if err != nil {
		p.fault(fmt.Errorf(`%w: write {"ingress":{"isolation":"DefaultDeny"}}, or remove it`, err))
	} else if v.Ingress.Isolation == "" {
		return nil
	}
	return p
}
