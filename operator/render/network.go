package render

import (
	"cmp"
	"encoding/json"
	"fmt"
	"strings"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// cniVersion is the version of the CNI specification the configurations are written to.
const cniVersion = "1.0.0"

// defaultLogLevel is what the schema gives a SriovNetwork that says nothing.
const defaultLogLevel = "info"

// Network is a network of any kind: what the kinds have in common, taken out of it.
type Network struct {
	metav1.Object
	Kind schema.GroupKind
	// Target is the namespace its NetworkAttachmentDefinition belongs in.
	Target string
	// Status is the object's own.
	Status *sriovv1.NetworkStatus

	resource, ipam, capabilities, metaPlugins, logFile string
	plugin                                             plugin // its own keys only
}

// Of takes a network apart. ok is false when the object is of none of the kinds.
func Of(object metav1.Object) (n *Network, ok bool) {
	n = &Network{Object: object}
	switch o := object.(type) {
	case *sriovv1.SriovNetwork:
		s := &o.Spec
		n.Kind, n.Status = schema.GroupKind{Group: sriovv1.GroupName, Kind: "SriovNetwork"}, &o.Status
		n.Target, n.resource, n.logFile = s.NetworkNamespace, s.ResourceName, s.LogFile
		n.ipam, n.capabilities, n.metaPlugins = s.IPAM, s.Capabilities, s.MetaPluginsConfig
		n.plugin = sriovConfig(s)
	case *sriovv1.SriovIBNetwork:
		s := &o.Spec
		n.Kind, n.Status = schema.GroupKind{Group: sriovv1.GroupName, Kind: "SriovIBNetwork"}, &o.Status
		n.Target, n.resource = s.NetworkNamespace, s.ResourceName
		n.ipam, n.capabilities, n.metaPlugins = s.IPAM, s.Capabilities, s.MetaPluginsConfig
		n.plugin = ibConfig(s)
	case *sriovv1.OVSNetwork:
		s := &o.Spec
		n.Kind, n.Status = schema.GroupKind{Group: sriovv1.GroupName, Kind: "OVSNetwork"}, &o.Status
		n.Target, n.resource = s.NetworkNamespace, s.ResourceName
		n.ipam, n.capabilities, n.metaPlugins = s.IPAM, s.Capabilities, s.MetaPluginsConfig
		n.plugin = ovsConfig(s)
	case *sluicev1.MacvlanNetwork:
		s := &o.Spec
		n.Kind, n.Status = schema.GroupKind{Group: sluicev1.GroupName, Kind: "MacvlanNetwork"}, &o.Status
		n.Target, n.resource = s.NetworkNamespace, s.ResourceName
		n.ipam, n.capabilities, n.metaPlugins = s.IPAM, s.Capabilities, s.MetaPlugins
		n.plugin = macvlanConfig(s)
	default:
		return nil, false
	}
	n.Target = cmp.Or(n.Target, n.GetNamespace())
	return n, true
}

// Pool is the IPPool that the network's addresses come from, "" when it names none.
func (n *Network) Pool() string {
	var ipam struct{ Type, Pool string }
	if json.Unmarshal([]byte(n.ipam), &ipam) != nil || ipam.Type != "sluice" {
		return ""
	}
	return ipam.Pool
}

// Idle says which fields of the network have no effect, and why; it is empty when all have.
func (n *Network) Idle() string {
	s, ok := n.Object.(*sriovv1.SriovNetwork)
	if !ok {
		return ""
	}
	var fields []string
	if level := s.Spec.LogLevel; level != "" && level != defaultLogLevel {
		fields = append(fields, "logLevel "+level)
	}
	if s.Spec.LogFile != "" {
		fields = append(fields, "logFile "+s.Spec.LogFile)
	}
	if len(fields) == 0 {
		return ""
	}
	return strings.Join(fields, " and ") + " without effect: the agent logs each CNI call itself, all of it with logLevel 1 in SriovOperatorConfig"
}

// String names the network for people.
func (n *Network) String() string {
	return n.Kind.Kind + " " + n.GetNamespace() + "/" + n.GetName()
}

// OwnerRef names the network as the owner-ref annotation of its
// NetworkAttachmentDefinition does.
func (n *Network) OwnerRef() string { return OwnerRef(n.Kind, n.GetNamespace(), n.GetName()) }

// OwnerRef does so for a network of which only the name is known.
func OwnerRef(kind schema.GroupKind, namespace, name string) string {
	return kind.String() + "/" + namespace + "/" + name
}

// Definition makes the network's NetworkAttachmentDefinition, or says what is wrong with
// the network, each with the mend. resourcePrefix goes before the resource's name,
// without the slash. Networks in the operator's namespace may do what tenants may not.
func (n *Network) Definition(resourcePrefix, operatorNamespace string) (*nadv1.NetworkAttachmentDefinition, field.ErrorList) {
	spec := field.NewPath("spec")
	var errs field.ErrorList
	if own := n.GetNamespace(); own != operatorNamespace {
		if n.Target != own {
			errs = append(errs, field.Forbidden(spec.Child("networkNamespace"), fmt.Sprintf(
				"it is %s, and only networks in namespace %s may name another namespace: remove networkNamespace, or make the network in %s", n.Target, operatorNamespace, operatorNamespace)))
		}
		if n.logFile != "" {
			errs = append(errs, field.Forbidden(spec.Child("logFile"), fmt.Sprintf(
				"it is %s, a path on the node that root writes to, and only networks in namespace %s may name one: remove logFile, or make the network in %s", n.logFile, operatorNamespace, operatorNamespace)))
		}
	}
	if m, ok := n.plugin.(*macvlanPlugin); ok && m.Master == "" && n.resource == "" {
		errs = append(errs, field.Required(spec.Child("resourceName"), "give resourceName, that of a MacvlanNodePolicy, or master"))
	}
	main, end := n.plugin.first(), n.plugin.last()
	invalid := func(name, value string, err error) {
		if err != nil {
			errs = append(errs, field.Invalid(spec.Child(name), value, err.Error()))
		}
	}
	var err error
	end.IPAM, err = ipam(n.ipam)
	invalid("ipam", n.ipam, err)
	end.Capabilities, err = capabilities(n.capabilities)
	invalid("capabilities", n.capabilities, err)
	chained, err := metaPlugins(n.metaPlugins)
	invalid("metaPlugins", n.metaPlugins, err)
	if len(errs) > 0 {
		return nil, errs
	}

	main.CNIVersion, main.Name = cniVersion, n.GetName()
	var config any = n.plugin
	if len(chained) > 0 {
		list := pluginList{CNIVersion: cniVersion, Name: n.GetName(), Plugins: []any{n.plugin}}
		main.CNIVersion, main.Name = "", ""
		for _, p := range chained {
			list.Plugins = append(list.Plugins, p)
		}
		config = list
	}
	text, err := marshal(config)
	if err != nil {
		return nil, field.ErrorList{field.InternalError(spec, err)}
	}
	nad := &nadv1.NetworkAttachmentDefinition{
		TypeMeta: metav1.TypeMeta{APIVersion: nadv1.SchemeGroupVersion.String(), Kind: "NetworkAttachmentDefinition"},
		ObjectMeta: metav1.ObjectMeta{
			Name: n.GetName(), Namespace: n.Target,
			Annotations: map[string]string{sriovv1.AnnotationOwnerRef: n.OwnerRef()},
		},
		Spec: nadv1.NetworkAttachmentDefinitionSpec{Config: text},
	}
	if n.resource != "" {
		nad.Annotations[sriovv1.AnnotationResourceName] = resourcePrefix + "/" + n.resource
	}
	return nad, nil
}

// plugin is the configuration of one kind's CNI plugin: a struct that begins with a head
// and ends with a tail, in the order it is written.
type plugin interface {
	first() *head
	last() *tail
}

type head struct {
	CNIVersion string `json:"cniVersion,omitempty"` // not inside a list
	Name       string `json:"name,omitempty"`       // not inside a list
	Type       string `json:"type"`
}

func (h *head) first() *head { return h }

type tail struct {
	Capabilities json.RawMessage `json:"capabilities,omitempty"`
	IPAM         json.RawMessage `json:"ipam"`
}

func (t *tail) last() *tail { return t }

// pluginList is a CNI network configuration list.
type pluginList struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
	Plugins    []any  `json:"plugins"`
}

type sriovPlugin struct {
	head
	Vlan      int    `json:"vlan"`
	SpoofChk  string `json:"spoofchk,omitempty"`
	Trust     string `json:"trust,omitempty"`
	VlanQoS   int    `json:"vlanQoS"`
	VlanProto string `json:"vlanProto,omitempty"`
	MinTxRate *int   `json:"min_tx_rate,omitempty"`
	MaxTxRate *int   `json:"max_tx_rate,omitempty"`
	LinkState string `json:"link_state,omitempty"`
	LogLevel  string `json:"logLevel,omitempty"`
	LogFile   string `json:"logFile,omitempty"`
	tail
}

func sriovConfig(s *sriovv1.SriovNetworkSpec) plugin {
	return &sriovPlugin{
		head: head{Type: "sriov"},
		Vlan: s.Vlan, VlanQoS: s.VlanQoS, VlanProto: s.VlanProto,
		SpoofChk: s.SpoofChk, Trust: s.Trust, LinkState: s.LinkState,
		MinTxRate: s.MinTxRate, MaxTxRate: s.MaxTxRate,
		LogLevel: s.LogLevel, LogFile: s.LogFile,
	}
}

type ibPlugin struct {
	head
	LinkState string `json:"link_state,omitempty"`
	tail
}

func ibConfig(s *sriovv1.SriovIBNetworkSpec) plugin {
	return &ibPlugin{head: head{Type: "ib-sriov"}, LinkState: s.LinkState}
}

type ovsPlugin struct {
	head
	Bridge        string                 `json:"bridge,omitempty"`
	Vlan          uint                   `json:"vlan,omitempty"`
	MTU           uint                   `json:"mtu,omitempty"`
	Trunk         []*sriovv1.TrunkConfig `json:"trunk,omitempty"`
	InterfaceType string                 `json:"interface_type,omitempty"`
	tail
}

func ovsConfig(s *sriovv1.OVSNetworkSpec) plugin {
	return &ovsPlugin{head: head{Type: "ovs"}, Bridge: s.Bridge, Vlan: s.Vlan, MTU: s.MTU, Trunk: s.Trunk, InterfaceType: s.InterfaceType}
}

type macvlanPlugin struct {
	head
	Master        string                  `json:"master,omitempty"`
	Mode          string                  `json:"mode,omitempty"`
	MTU           int                     `json:"mtu,omitempty"`
	ConflictProbe *int                    `json:"conflictProbe,omitempty"`
	HostInterface *sluicev1.HostInterface `json:"hostInterface,omitempty"`
	tail
}

func macvlanConfig(s *sluicev1.MacvlanNetworkSpec) plugin {
	return &macvlanPlugin{
		head: head{Type: "sluice"}, Master: s.Master, Mode: s.Mode, MTU: s.Mtu,
		ConflictProbe: s.ConflictProbe, HostInterface: s.HostInterface,
	}
}
