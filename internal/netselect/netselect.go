package netselect

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	strict "sigs.k8s.io/json"
)

// Annotation is the key of the pod's annotation.
const Annotation = nadv1.NetworkAttachmentAnnot

// Selection is one network that a pod asks for.
type Selection struct {
	Namespace, Name string // of the NetworkAttachmentDefinition
	Interface       string // in the pod: as asked for, or net1 for the first selection, net2 for the second
	MAC             string
	InfinibandGUID  string
	IPs             []string     // addresses, with prefix lengths or without
	DefaultRoute    []netip.Addr // gateways: the pod's default routes go through this interface
	DeviceID        string       // one of the devices the kubelet gave to the pod
	IPAMClaim       string       // name of an IPAMClaim, which others read
	CNIArgs         map[string]any
	PortMappings    []nadv1.PortMapEntry
	Bandwidth       *nadv1.BandwidthEntry // bits per second and bits
}

// element is a selection as it is written in JSON.
type element struct {
	Name             string                `json:"name"`
	Namespace        string                `json:"namespace"`
	Interface        string                `json:"interface"`
	InterfaceRequest string                `json:"interfaceRequest"` // its older name
	MAC              string                `json:"mac"`
	InfinibandGUID   string                `json:"infiniband-guid"`
	IPs              []string              `json:"ips"`
	DefaultRoute     []string              `json:"default-route"`
	DeviceID         string                `json:"deviceID"`
	IPAMClaim        string                `json:"ipam-claim-reference"`
	CNIArgs          map[string]any        `json:"cni-args"`
	PortMappings     []nadv1.PortMapEntry  `json:"portMappings"`
	Bandwidth        *nadv1.BandwidthEntry `json:"bandwidth"`
}

// Parse reads the annotation of a pod in the given namespace. An empty annotation
// selects nothing. An error names the selection, the key, its value and the mend.
func Parse(annotation, namespace string) ([]Selection, error) {
	if strings.TrimSpace(annotation) == "" {
		return nil, nil
	}
	elements, err := read(annotation)
	if err != nil {
		return nil, fmt.Errorf("annotation %s: %w", Annotation, err)
	}
	selections := make([]Selection, len(elements))
	names := map[string]int{}
	route := 0 // the selection with the default route
	for i, e := range elements {
		n := i + 1
		s, err := e.selection(namespace, n)
		if err != nil {
			return nil, fmt.Errorf("annotation %s, network %d (%q): %w", Annotation, n, e.Name, err)
		}
		if other, taken := names[s.Interface]; taken {
			return nil, fmt.Errorf("annotation %s: networks %d and %d both make interface %s: name one of them otherwise", Annotation, other, n, s.Interface)
		}
		names[s.Interface] = n
		if len(s.DefaultRoute) > 0 && route > 0 {
			return nil, fmt.Errorf("annotation %s: networks %d and %d both have default-route: a pod has one default route", Annotation, route, n)
		} else if len(s.DefaultRoute) > 0 {
			route = n
		}
		selections[i] = s
	}
	return selections, nil
}

func read(annotation string) ([]element, error) {
	if !strings.ContainsAny(annotation, `[{"`) {
		return short(annotation)
	}
	var elements []element
	if !strings.HasPrefix(strings.TrimSpace(annotation), "[") {
		return nil, errors.New("is JSON but no list: put the network into [ ]")
	}
	unknown, err := strict.UnmarshalStrict([]byte(annotation), &elements)
	if err == nil {
		err = errors.Join(unknown...)
	}
	if err != nil {
		return nil, fmt.Errorf("is not a list of networks: %w", err)
	}
	return elements, nil
}

// short reads the short form: [namespace/]name[@interface], with commas between.
func short(annotation string) ([]element, error) {
	var elements []element
	for item := range strings.SplitSeq(annotation, ",") {
		item = strings.TrimSpace(item)
		var e element
		name, ifName, at := strings.Cut(item, "@")
		namespace, rest, slash := strings.Cut(name, "/")
		e.Name, e.Interface = name, ifName
		if slash {
			e.Namespace, e.Name = namespace, rest
		}
		if item == "" || at && ifName == "" || slash && namespace == "" {
			return nil, fmt.Errorf("%q is not [namespace/]name[@interface]", item)
		}
		elements = append(elements, e)
	}
	return elements, nil
}

// selection checks the element, which is the nth of the annotation.
func (e element) selection(namespace string, n int) (Selection, error) {
	s := Selection{
		Namespace: e.Namespace, Name: e.Name, MAC: e.MAC, InfinibandGUID: e.InfinibandGUID, IPs: e.IPs, DeviceID: e.DeviceID,
		IPAMClaim: e.IPAMClaim, CNIArgs: e.CNIArgs, PortMappings: e.PortMappings, Bandwidth: e.Bandwidth,
	}
	if s.Namespace == "" {
		s.Namespace = namespace
	}
	if e.Interface != "" && e.InterfaceRequest != "" {
		return s, fmt.Errorf("has interface %q and interfaceRequest %q: remove the second, which is the first one's old name", e.Interface, e.InterfaceRequest)
	}
	switch s.Interface = e.Interface + e.InterfaceRequest; {
	case s.Interface == "":
		s.Interface = fmt.Sprintf("net%d", n)
	case !ValidInterface(s.Interface):
		return s, fmt.Errorf("interface %q is not a name of an interface: at most 15 characters, no / or : or blank", s.Interface)
	}
	if problems := validation.IsDNS1123Subdomain(s.Name); len(problems) > 0 {
		return s, fmt.Errorf("name %q is not a name of a NetworkAttachmentDefinition: %s", s.Name, problems[0])
	}
	if problems := validation.IsDNS1123Label(s.Namespace); len(problems) > 0 {
		return s, fmt.Errorf("namespace %q is not a name of a namespace: %s", s.Namespace, problems[0])
	}
	if s.MAC != "" {
		if _, err := ParseMAC("mac", s.MAC); err != nil {
			return s, err
		}
	}
	if guid, err := net.ParseMAC(s.InfinibandGUID); s.InfinibandGUID != "" && (err != nil || len(guid) != 8 || bytes.Equal(guid, make([]byte, 8))) {
		return s, fmt.Errorf("infiniband-guid %q is not a GUID like 02:00:00:00:00:00:00:01", s.InfinibandGUID)
	}
	for _, ip := range s.IPs {
		_, err := netip.ParseAddr(ip)
		if _, prefixErr := netip.ParsePrefix(ip); err != nil && prefixErr != nil {
			return s, fmt.Errorf("ips has %q, which is no address like 192.0.2.1 or 192.0.2.1/24", ip)
		}
	}
	if len(s.IPs) > 0 && s.IPAMClaim != "" {
		return s, fmt.Errorf("has ips and ipam-claim-reference %q: only one can choose the addresses", s.IPAMClaim)
	}
	if err := s.setDefaultRoute(e.DefaultRoute); err != nil {
		return s, err
	}
	return s, s.checkRates()
}

// ValidInterface tells whether an interface can have the name: as dev_valid_name of the
// kernel has it, without the % that makes a name a pattern.
func ValidInterface(name string) bool {
	return name != "" && len(name) <= 15 && name != "." && name != ".." && !strings.ContainsAny(name, "/:% \t\n\v\f\r\x00")
}

// ParseMAC reads the Ethernet address of one interface; where is what an error calls it.
func ParseMAC(where, text string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(text)
	switch {
	case err != nil || len(mac) != 6:
		return nil, fmt.Errorf("%s %q is not a MAC address like 02:00:00:00:00:01", where, text)
	case mac[0]&1 != 0:
		return nil, fmt.Errorf("%s %q is a multicast address: the second digit must be even", where, text)
	case bytes.Equal(mac, make([]byte, 6)):
		return nil, fmt.Errorf("%s %q is no address of an interface", where, text)
	}
	return mac, nil
}

// setDefaultRoute takes at most one gateway of each family: a pod has no use for
// two default routes of one metric.
func (s *Selection) setDefaultRoute(gateways []string) error {
	for _, text := range gateways {
		gateway, err := netip.ParseAddr(text)
		if err != nil || gateway.IsUnspecified() || gateway.IsMulticast() || gateway.Zone() != "" {
			return fmt.Errorf("default-route has %q, which is no address of a gateway", text)
		}
		gateway = gateway.Unmap()
		if slices.ContainsFunc(s.DefaultRoute, func(g netip.Addr) bool { return g.Is4() == gateway.Is4() }) {
			return fmt.Errorf("default-route has %s as a second gateway of its family: give one for IPv4 and one for IPv6 at most", gateway)
		}
		s.DefaultRoute = append(s.DefaultRoute, gateway)
	}
	return nil
}

func (s *Selection) checkRates() error {
	for _, m := range s.PortMappings {
		if m.HostPort < 1 || m.HostPort > 65535 || m.ContainerPort < 1 || m.ContainerPort > 65535 {
			return fmt.Errorf("portMappings has hostPort %d and containerPort %d: ports are 1-65535", m.HostPort, m.ContainerPort)
		}
	}
	if b := s.Bandwidth; b != nil && min(b.IngressRate, b.IngressBurst, b.EgressRate, b.EgressBurst) < 0 {
		text, _ := json.Marshal(b)
		return fmt.Errorf("bandwidth %s has a negative number", text)
	}
	return nil
}

// Network returns the NetworkAttachmentDefinition, as namespace/name, that an annotation
// names for the interface; empty when it names none. It reads what meta plugins accept:
// keys and values of the others that Parse refuses do not matter to it.
func Network(annotation, namespace, ifName string) (string, error) {
	if strings.TrimSpace(annotation) == "" {
		return "", nil
	}
	var elements []element
	var err error
	if strings.ContainsAny(annotation, `[{"`) {
		var named []struct{ Name, Namespace, Interface, InterfaceRequest string }
		err = json.Unmarshal([]byte(annotation), &named)
		for _, n := range named {
			elements = append(elements, element{Name: n.Name, Namespace: n.Namespace, Interface: n.Interface, InterfaceRequest: n.InterfaceRequest})
		}
	} else {
		elements, err = short(annotation)
	}
	if err != nil {
		return "", fmt.Errorf("annotation %s: is not a list of networks: %w", Annotation, err)
	}
	for i, e := range elements {
		if cmp.Or(e.Interface, e.InterfaceRequest, fmt.Sprintf("net%d", i+1)) == ifName {
			return cmp.Or(e.Namespace, namespace) + "/" + e.Name, nil
		}
	}
	return "", nil
}
