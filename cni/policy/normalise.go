package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	strict "sigs.k8s.io/json"
)

// Policy is a policy in normal form: defaults filled in, addresses and selectors parsed.
// It is never changed.
type Policy struct {
	Kind            string // NetworkPolicy, MultiNetworkPolicy, or Namespace for its annotation
	Namespace, Name string
	// Faults is why the policy is not valid. It allows nothing then, and isolates
	// all that it may have meant.
	Faults []string

	isolates [2]bool // by Direction
	selector labels.Selector
	on       extent
	networks []string  // namespace/name, when on is listed
	rules    [2][]rule // by Direction, at the places they have in the policy
}

// extent is what networks a policy is for.
type extent uint8

const (
	optedIn extent = iota // those with EnforceAll
	listed
	every // it cannot be read which
)

// rule is one entry of ingress or egress.
type rule struct {
	anyone bool
	blocks []addrRange
	pods   []podPeer
	ports  *Ports      // those given by number
	named  []namedPort // those given by name
}

// podPeer is the pods that a selector selects in some namespaces.
type podPeer struct {
	namespaces labels.Selector // nil: the policy's own namespace
	pods       labels.Selector
}

// namedPort is resolved by the pod that is the destination.
type namedPort struct {
	name     string
	protocol uint8
}

var everything = labels.Everything()

func (p *Policy) String() string {
	if p.Kind == "Namespace" {
		return "annotation " + IsolationAnnotation + " of Namespace " + p.Name
	}
	return p.Kind + " " + p.Namespace + "/" + p.Name
}

func (p *Policy) equal(o *Policy) bool { return reflect.DeepEqual(p, o) }

func (p *Policy) fault(err error) { p.Faults = append(p.Faults, p.String()+": "+err.Error()) }

// What Policy.extents has beside names of networks.
const optedInNetworks, everyNetwork = "", "*"

// extents are what the policy is for: networks that it lists, or what they have in common.
func (p *Policy) extents() []string {
	switch p.on {
	case optedIn:
		return []string{optedInNetworks}
	case listed:
		return p.networks
	}
	return []string{everyNetwork}
}

// covers says whether the policy is for a network.
func (p *Policy) covers(network string, e Enforcement) bool {
	switch p.on {
	case optedIn:
		return e == EnforceAll
	case listed:
		return e != EnforceNone && slices.Contains(p.networks, network)
	}
	return e != EnforceNone
}

// ReadNetworkPolicy brings a NetworkPolicy into normal form.
func ReadNetworkPolicy(np *networkingv1.NetworkPolicy) *Policy {
	p := &Policy{Kind: "NetworkPolicy", Namespace: np.Namespace, Name: np.Name, on: optedIn}
	p.normalise(&np.Spec)
	return p
}

// ReadMultiNetworkPolicy brings a k8s.cni.cncf.io MultiNetworkPolicy, v1beta1 or v1beta2, as
// JSON, into normal form: its spec is field by field that of a NetworkPolicy. Its kind's
// schema checks next to nothing, so that all is checked here. An error is only about an
// object of which not even the metadata can be read.
func ReadMultiNetworkPolicy(object []byte) (*Policy, error) {
	var meta metav1.PartialObjectMetadata
	if err := json.Unmarshal(object, &meta); err != nil {
		return nil, fmt.Errorf("read the metadata of a MultiNetworkPolicy: %w", err)
	}
	p := &Policy{Kind: "MultiNetworkPolicy", Namespace: meta.Namespace, Name: meta.Name, on: listed}
	for item := range strings.SplitSeq(meta.Annotations[PolicyForAnnotation], ",") {
		if item = strings.TrimSpace(item); item == "" {
			continue
		}
		namespace, name, given := strings.Cut(item, "/")
		if !given {
			namespace, name = p.Namespace, item
		}
		if len(validation.IsDNS1123Label(namespace)) > 0 || len(validation.IsDNS1123Subdomain(name)) > 0 {
			p.on = every
			p.fault(fmt.Errorf("annotation %s has %q, and so it is for every network: write name or namespace/name of NetworkAttachmentDefinitions, with commas between them", PolicyForAnnotation, item))
			continue
		}
		p.networks = append(p.networks, namespace+"/"+name)
	}
	slices.Sort(p.networks)
	p.networks = slices.Compact(p.networks)

	// What is around the spec grows with Kubernetes' versions, and is not about policy.
	var body struct {
		Spec json.RawMessage `json:"spec"`
	}
	var spec networkingv1.NetworkPolicySpec
	err := json.Unmarshal(object, &body)
	if err == nil && len(body.Spec) > 0 {
		var unknown []error
		if unknown, err = strict.UnmarshalStrict(body.Spec, &spec); err == nil {
			err = errors.Join(unknown...)
		}
		if err != nil {
			err = fmt.Errorf("spec: %w: write it as that of a NetworkPolicy", err)
		}
	}
	if version := meta.APIVersion; err == nil && version != "k8s.cni.cncf.io/v1beta1" && version != "k8s.cni.cncf.io/v1beta2" {
		err = fmt.Errorf("apiVersion is %q: write k8s.cni.cncf.io/v1beta1 or k8s.cni.cncf.io/v1beta2", version)
	}
	if err != nil {
		// Whom and which direction it is about may be what cannot be read.
		p.fault(err)
		p.selector, p.isolates = everything, [2]bool{true, true}
		return p, nil
	}
	p.normalise(&spec)
	return p, nil
}

// normalise reads the spec. A fault anywhere leaves no rule.
func (p *Policy) normalise(spec *networkingv1.NetworkPolicySpec) {
	var err error
	if p.selector, err = metav1.LabelSelectorAsSelector(&spec.PodSelector); err != nil {
		p.selector = everything
		p.fault(fmt.Errorf("spec.podSelector, and so it selects all pods of the namespace: %w", err))
	}
	for i, t := range spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			p.isolates[Ingress] = true
		case networkingv1.PolicyTypeEgress:
			p.isolates[Egress] = true
		default:
			p.isolates = [2]bool{true, true}
			p.fault(fmt.Errorf("spec.policyTypes[%d] is %q, and so it isolates both ways: write Ingress or Egress", i, t))
		}
	}
	if len(spec.PolicyTypes) == 0 {
		p.isolates = [2]bool{Ingress: true, Egress: len(spec.Egress) > 0}
	}
	for i, r := range spec.Ingress {
		p.addRule(Ingress, fmt.Sprintf("spec.ingress[%d]", i), "from", r.From, r.Ports)
	}
	for i, r := range spec.Egress {
		p.addRule(Egress, fmt.Sprintf("spec.egress[%d]", i), "to", r.To, r.Ports)
	}
	if len(p.Faults) > 0 {
		p.rules = [2][]rule{}
	}
}

func (p *Policy) addRule(d Direction, field, peersField string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) {
	r := rule{anyone: len(peers) == 0, ports: &Ports{All: len(ports) == 0}}
	for i := range peers {
		if err := r.addPeer(&peers[i]); err != nil {
			p.fault(fmt.Errorf("%s.%s[%d]%w", field, peersField, i, err))
		}
	}
	for i := range ports {
		if err := r.addPort(&ports[i]); err != nil {
			p.fault(fmt.Errorf("%s.ports[%d]%w", field, i, err))
		}
	}
	r.ports.canonical()
	p.rules[d] = append(p.rules[d], r)
}

// addPeer and addPort begin their errors with the field, seen from the list's entry.
func (r *rule) addPeer(peer *networkingv1.NetworkPolicyPeer) error {
	if b := peer.IPBlock; b != nil {
		if peer.PodSelector != nil || peer.NamespaceSelector != nil {
			return errors.New(" has an ipBlock and a selector: make them two entries")
		}
		ranges, err := block(b)
		if err != nil {
			return err
		}
		r.blocks = append(r.blocks, ranges...)
		return nil
	}
	if peer.PodSelector == nil && peer.NamespaceSelector == nil {
		return errors.New(" is empty: write a podSelector, a namespaceSelector or an ipBlock; a rule for any peer has no entries")
	}
	selected := podPeer{pods: everything}
	var err error
	if s := peer.PodSelector; s != nil {
		if selected.pods, err = metav1.LabelSelectorAsSelector(s); err != nil {
			return fmt.Errorf(".podSelector: %w", err)
		}
	}
	if s := peer.NamespaceSelector; s != nil {
		if selected.namespaces, err = metav1.LabelSelectorAsSelector(s); err != nil {
			return fmt.Errorf(".namespaceSelector: %w", err)
		}
	}
	r.pods = append(r.pods, selected)
	return nil
}

// block is the addresses of an ipBlock: its cidr without its excepts.
func block(b *networkingv1.IPBlock) ([]addrRange, error) {
	cidr, err := parseCIDR(b.CIDR)
	if err != nil {
		return nil, fmt.Errorf(".ipBlock.cidr%w", err)
	}
	var excepts []addrRange
	for i, text := range b.Except {
		except, err := parseCIDR(text)
		if err != nil {
			return nil, fmt.Errorf(".ipBlock.except[%d]%w", i, err)
		}
		if except.Bits() < cidr.Bits() || !cidr.Contains(except.Addr()) {
			return nil, fmt.Errorf(".ipBlock.except[%d] %s is not inside cidr %s: write a part of it", i, text, b.CIDR)
		}
		excepts = append(excepts, rangeOf(except))
	}
	return subtract(rangeOf(cidr), excepts), nil
}

func parseCIDR(text string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(text)
	if err != nil || prefix.Addr().Is4In6() {
		return prefix, fmt.Errorf(" is %q: write an address block like 192.0.2.0/24 or 2001:db8::/64", text)
	}
	return prefix.Masked(), nil
}

func (r *rule) addPort(port *networkingv1.NetworkPolicyPort) error {
	protocol := uint8(TCP)
	if port.Protocol != nil {
		var known bool
		if protocol, known = protocols[*port.Protocol]; !known || *port.Protocol == "" {
			return fmt.Errorf(".protocol is %q: write TCP, UDP or SCTP", *port.Protocol)
		}
	}
	switch {
	case port.Port == nil && port.EndPort != nil:
		return fmt.Errorf(".endPort is %d, without a port: write the first port of the range", *port.EndPort)
	case port.Port == nil:
		r.ports.add(protocol, PortRange{0, 65535})
	case port.Port.Type == intstr.String:
		if port.EndPort != nil {
			return fmt.Errorf(".endPort is %d, and the port %q has a name: write its number, or remove endPort", *port.EndPort, port.Port.StrVal)
		}
		if problems := validation.IsValidPortName(port.Port.StrVal); len(problems) > 0 {
			return fmt.Errorf(".port is %q, which is neither a port's number nor a name: it %s", port.Port.StrVal, problems[0])
		}
		r.named = append(r.named, namedPort{port.Port.StrVal, protocol})
	default:
		first, last := port.Port.IntVal, port.Port.IntVal
		if port.EndPort != nil {
			last = *port.EndPort
		}
		if first < 1 || first > 65535 {
			return fmt.Errorf(".port is %d: ports are 1-65535", first)
		}
		if last < first || last > 65535 {
			return fmt.Errorf(".endPort is %d: it is %d (the port) to 65535", last, first)
		}
		r.ports.add(protocol, PortRange{uint16(first), uint16(last)})
	}
	return nil
}
