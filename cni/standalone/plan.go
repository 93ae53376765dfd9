package standalone

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"

	"github.com/sluice-network/sluice/internal/netselect"
)

// resourceAnnotation ties a network to a device plugin's resource.
const resourceAnnotation = "k8s.v1.cni.cncf.io/resourceName"

// attachment is one network of a pod: what its plugins are run with.
type attachment struct {
	Network      string          `json:"network"` // namespace/name of its definition
	Resource     string          `json:"resource,omitempty"`
	DeviceID     string          `json:"deviceID,omitempty"`
	IfName       string          `json:"ifName"`
	DefaultRoute []netip.Addr    `json:"defaultRoute,omitempty"`
	List         json.RawMessage `json:"list"` // configuration list, with the device in each plugin
	Args         [][2]string     `json:"args"` // CNI_ARGS
	Capabilities map[string]any  `json:"capabilities,omitempty"`
}

// plan makes the attachments of a pod: of its selections, their definitions in the
// same order, the devices that the kubelet gave it by resource, and the CNI_ARGS and
// CNI_IFNAME of the cluster network. ignored are the wishes of the pod that no
// plugin takes, with the reason.
func plan(selections []netselect.Selection, definitions []*nadv1.NetworkAttachmentDefinition, devices map[string][]string, args [][2]string, ifName string) (attachments []attachment, ignored []string, err error) {
	left := map[string][]string{}
	for resource, ids := range devices {
		left[resource] = slices.Clone(ids)
	}
	for i, s := range selections {
		a := attachment{Network: s.Namespace + "/" + s.Name, IfName: s.Interface, DefaultRoute: s.DefaultRoute}
		bad := func(err error) error { return fmt.Errorf("network %s as %s: %w", a.Network, a.IfName, err) }
		if s.Interface == ifName {
			return nil, nil, bad(errors.New("the cluster network has this interface: choose another name"))
		}
		a.Resource = definitions[i].Annotations[resourceAnnotation]
		if a.DeviceID, err = take(left, a.Resource, s.DeviceID, len(devices[a.Resource])); err != nil {
			return nil, nil, bad(err)
		}
		list, err := configurationList(definitions[i])
		if err != nil {
			return nil, nil, bad(err)
		}
		a.Args, a.Capabilities = cniArgs(args, s), capabilities(s, a.DeviceID)
		for name := range a.Capabilities {
			if passed := name == "deviceID" || name == "mac" || name == "ips"; !passed && !slices.ContainsFunc(list.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Capabilities[name] }) {
				ignored = append(ignored, fmt.Sprintf("network %s as %s: %s: no plugin of the network has this capability", a.Network, a.IfName, name))
			}
		}
		slices.Sort(ignored)
		if a.List, err = inject(list, a.DeviceID, s.CNIArgs); err != nil {
			return nil, nil, bad(err)
		}
		attachments = append(attachments, a)
	}
	return attachments, ignored, nil
}

// take takes the wanted device of the resource out of those left, the first
// without a wish.
func take(left map[string][]string, resource, wanted string, had int) (string, error) {
	switch ids := left[resource]; {
	case resource == "" && wanted != "":
		return "", fmt.Errorf("deviceID %s: the network has no annotation %s, so the pod can have no device for it", wanted, resourceAnnotation)
	case resource == "":
		return "", nil
	case len(ids) == 0:
		return "", fmt.Errorf("the pod was given %d devices of resource %s and its networks need more: let it request one for each network", had, resource)
	case wanted != "" && !slices.Contains(ids, wanted):
		return "", fmt.Errorf("deviceID %s is not among the devices of resource %s that the pod was given and that are left: %s", wanted, resource, strings.Join(ids, ", "))
	default:
		i := max(0, slices.Index(ids, wanted))
		id := ids[i]
		left[resource] = slices.Delete(ids, i, i+1)
		return id, nil
	}
}

// configurationList reads a definition. One plugin by itself becomes a list of one.
func configurationList(d *nadv1.NetworkAttachmentDefinition) (*libcni.NetworkConfigList, error) {
	if strings.TrimSpace(d.Spec.Config) == "" {
		return nil, errors.New("spec.config is empty: put the CNI configuration into it, for files of the node are not read")
	}
	var keys map[string]any
	if err := json.Unmarshal([]byte(d.Spec.Config), &keys); err != nil {
		return nil, fmt.Errorf("spec.config is no JSON object: %w", err)
	}
	if keys == nil {
		return nil, errors.New("spec.config is no JSON object but null")
	}
	if keys["name"] == nil {
		keys["name"] = d.Name
	}
	if keys["plugins"] == nil {
		plugin := keys
		keys = map[string]any{"name": plugin["name"], "plugins": []any{plugin}}
		if v := plugin["cniVersion"]; v != nil {
			keys["cniVersion"] = v
		}
	}
	raw, err := json.Marshal(keys)
	if err != nil {
		return nil, fmt.Errorf("spec.config: %w", err)
	}
	list, err := libcni.NetworkConfFromBytes(raw)
	if err != nil {
		return nil, fmt.Errorf("spec.config: %w", err)
	}
	return list, nil
}

// inject puts the device and the pod's own arguments into each plugin, as Multus
// does, which writes the device under two names.
func inject(list *libcni.NetworkConfigList, deviceID string, cniArgs map[string]any) (json.RawMessage, error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(list.Bytes, &keys); err != nil {
		return nil, err
	}
	plugins := make([]json.RawMessage, len(list.Plugins))
	for i, p := range list.Plugins {
		values := map[string]any{}
		if deviceID != "" {
			values["deviceID"], values["pciBusID"] = deviceID, deviceID
		}
		if len(cniArgs) > 0 {
			values["args"] = map[string]any{"cni": cniArgs}
		}
		injected, err := libcni.InjectConf(p, values)
		if err != nil {
			return nil, err
		}
		plugins[i] = injected.Bytes
	}
	var err error
	if keys["plugins"], err = json.Marshal(plugins); err != nil {
		return nil, err
	}
	return json.Marshal(keys)
}

// cniArgs are the CNI_ARGS of a network: those of the cluster network, with the
// network's own addresses.
func cniArgs(args [][2]string, s netselect.Selection) [][2]string {
	own := slices.DeleteFunc(slices.Clone(args), func(kv [2]string) bool { return kv[0] == "MAC" || kv[0] == "IP" })
	if s.MAC != "" {
		own = append(own, [2]string{"MAC", s.MAC})
	}
	if len(s.IPs) > 0 {
		own = append(own, [2]string{"IP", strings.Join(s.IPs, ",")})
	}
	return own
}

// capabilities are what libcni hands to the plugins that have the capability.
func capabilities(s netselect.Selection, deviceID string) map[string]any {
	all := map[string]any{}
	for name, value := range map[string]string{"mac": s.MAC, "infinibandGUID": s.InfinibandGUID, "deviceID": deviceID} {
		if value != "" {
			all[name] = value
		}
	}
	if len(s.IPs) > 0 {
		all["ips"] = s.IPs
	}
	if len(s.PortMappings) > 0 {
		all["portMappings"] = s.PortMappings
	}
	if s.Bandwidth != nil {
		all["bandwidth"] = s.Bandwidth
	}
	return all
}
