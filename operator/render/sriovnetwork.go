package render

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// cniVersion is the version of the CNI specification the configurations are written to.
const cniVersion = "1.0.0"

// sriovPlugin is the configuration of the sriov CNI plugin, in the order it is written.
type sriovPlugin struct {
	CNIVersion   string          `json:"cniVersion,omitempty"` // not inside a list
	Name         string          `json:"name,omitempty"`       // not inside a list
	Type         string          `json:"type"`
	Vlan         int             `json:"vlan"`
	SpoofChk     string          `json:"spoofchk,omitempty"`
	Trust        string          `json:"trust,omitempty"`
	VlanQoS      int             `json:"vlanQoS"`
	VlanProto    string          `json:"vlanProto,omitempty"`
	Capabilities json.RawMessage `json:"capabilities,omitempty"`
	MaxTxRate    *int            `json:"max_tx_rate,omitempty"`
	MinTxRate    *int            `json:"min_tx_rate,omitempty"`
	LinkState    string          `json:"link_state,omitempty"`
	LogLevel     string          `json:"logLevel,omitempty"`
	LogFile      string          `json:"logFile,omitempty"`
	IPAM         json.RawMessage `json:"ipam"`
}

// pluginList is a CNI network configuration list.
type pluginList struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
	Plugins    []any  `json:"plugins"`
}

// OwnerRef names the network that a NetworkAttachmentDefinition is made from, as its
// owner-ref annotation has it.
func OwnerRef(network *sriovv1.SriovNetwork) string {
	return "SriovNetwork." + sriovv1.GroupName + "/" + network.Namespace + "/" + network.Name
}

// TargetNamespace is the namespace a network's NetworkAttachmentDefinition belongs in.
func TargetNamespace(network *sriovv1.SriovNetwork) string {
	return cmp.Or(network.Spec.NetworkNamespace, network.Namespace)
}

// SriovNetwork makes the NetworkAttachmentDefinition of a network. resourcePrefix goes
// before the resource's name, without the slash. The error names the field that is not
// what it must be, and the mend.
func SriovNetwork(network *sriovv1.SriovNetwork, resourcePrefix string) (*nadv1.NetworkAttachmentDefinition, error) {
	config, err := sriovConfig(network)
	if err != nil {
		return nil, fmt.Errorf("SriovNetwork %s/%s: spec.%w", network.Namespace, network.Name, err)
	}
	return &nadv1.NetworkAttachmentDefinition{
		TypeMeta: metav1.TypeMeta{APIVersion: nadv1.SchemeGroupVersion.String(), Kind: "NetworkAttachmentDefinition"},
		ObjectMeta: metav1.ObjectMeta{
			Name:      network.Name,
			Namespace: TargetNamespace(network),
			Annotations: map[string]string{
				sriovv1.AnnotationResourceName: resourcePrefix + "/" + network.Spec.ResourceName,
				sriovv1.AnnotationOwnerRef:     OwnerRef(network),
			},
		},
		Spec: nadv1.NetworkAttachmentDefinitionSpec{Config: config},
	}, nil
}

func sriovConfig(network *sriovv1.SriovNetwork) (string, error) {
	spec := &network.Spec
	plugin := sriovPlugin{
		CNIVersion: cniVersion, Name: network.Name, Type: "sriov",
		Vlan: spec.Vlan, VlanQoS: spec.VlanQoS, VlanProto: spec.VlanProto,
		SpoofChk: spec.SpoofChk, Trust: spec.Trust, LinkState: spec.LinkState,
		MinTxRate: spec.MinTxRate, MaxTxRate: spec.MaxTxRate,
		LogLevel: spec.LogLevel, LogFile: spec.LogFile,
	}
	var err error
	if plugin.IPAM, err = ipam(spec.IPAM); err != nil {
		return "", fmt.Errorf("ipam: %w", err)
	}
	if plugin.Capabilities, err = capabilities(spec.Capabilities); err != nil {
		return "", fmt.Errorf("capabilities: %w", err)
	}
	chained, err := metaPlugins(spec.MetaPluginsConfig)
	if err != nil {
		return "", fmt.Errorf("metaPlugins: %w", err)
	}
	if len(chained) == 0 {
		return marshal(plugin)
	}
	plugin.CNIVersion, plugin.Name = "", ""
	list := pluginList{CNIVersion: cniVersion, Name: network.Name, Plugins: []any{plugin}}
	for _, p := range chained {
		list.Plugins = append(list.Plugins, p)
	}
	return marshal(list)
}

// marshal writes JSON without escaping <, > and & as HTML, which nobody reads here.
func marshal(v any) (string, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return "", fmt.Errorf("write the CNI configuration: %w", err)
	}
	return strings.TrimSuffix(b.String(), "\n"), nil
}

func ipam(text string) (json.RawMessage, error) {
	const mend = `write a JSON object with a type, such as {"type": "host-local", "subnet": "10.1.0.0/24"}`
	if strings.TrimSpace(text) == "" {
		return json.RawMessage("{}"), nil
	}
	keys, err := parseObject(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, mend)
	}
	if len(keys) > 0 && !isText(keys["type"]) {
		return nil, fmt.Errorf("it has no type: %s", mend)
	}
	return json.RawMessage(text), nil
}

func capabilities(text string) (json.RawMessage, error) {
	const mend = `write a JSON object of booleans, such as {"mac": true, "ips": true}`
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	keys, err := parseObject(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, mend)
	}
	for name, value := range keys {
		if v := string(value); v != "true" && v != "false" {
			return nil, fmt.Errorf("%s is %s: %s", name, v, mend)
		}
	}
	return json.RawMessage(text), nil
}

// metaPlugins parses JSON objects with commas between them.
func metaPlugins(text string) ([]json.RawMessage, error) {
	const mend = `write JSON objects with commas between them, such as {"type": "tuning"}, {"type": "vrf"}`
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	var plugins []json.RawMessage
	if err := json.Unmarshal([]byte("["+text+"]"), &plugins); err != nil {
		return nil, fmt.Errorf("%w: %s", position(err, text, 1), mend)
	}
	for i, p := range plugins {
		keys, err := parseObject(string(p))
		if err != nil {
			return nil, fmt.Errorf("plugin %d: %w: %s", i+1, err, mend)
		}
		if !isText(keys["type"]) {
			return nil, fmt.Errorf("plugin %d has no type: %s", i+1, mend)
		}
	}
	return plugins, nil
}

func parseObject(text string) (map[string]json.RawMessage, error) {
	if t := strings.TrimSpace(text); !strings.HasPrefix(t, "{") && json.Valid([]byte(t)) {
		return nil, fmt.Errorf("%s is not a JSON object", t)
	}
	var keys map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &keys); err != nil {
		return nil, position(err, text, 0)
	}
	return keys, nil
}

func isText(value json.RawMessage) bool {
	var s string
	return json.Unmarshal(value, &s) == nil && s != ""
}

// position says where in the text, from which the parser was given what comes after
// the first skip characters, a syntax error is.
func position(err error, text string, skip int64) error {
	var syntax *json.SyntaxError
	if !errors.As(err, &syntax) {
		return err
	}
	// Offset counts the offending byte too. An unfinished value ends past the text.
	at := min(max(syntax.Offset-skip-1, 0), int64(len(text)))
	before := text[:at]
	line := 1 + strings.Count(before, "\n")
	column := 1 + len(before) - (strings.LastIndex(before, "\n") + 1)
	return fmt.Errorf("invalid JSON at line %d, column %d: %w", line, column, err)
}
