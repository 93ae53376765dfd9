package standalone

import (
	"encoding/json"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	nadutils "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/utils"
)

// attached is an attachment that was made.
type attached struct {
	attachment
	result types.Result
	device *nadv1.DeviceInfo // nil without one
}

// networkStatus is the value of the pod's annotation k8s.v1.cni.cncf.io/network-status:
// the cluster network's result first, then the others in their order.
func networkStatus(cluster string, prev types.Result, others []attached) (string, error) {
	all, err := nadutils.CreateNetworkStatuses(prev, cluster, true, nil)
	if err != nil {
		return "", fmt.Errorf("read prevResult: %w", err)
	}
	for _, o := range others {
		result, err := types100.NewResultFromResult(o.result)
		if err != nil {
			return "", fmt.Errorf("read the result of network %s: %w", o.Network, err)
		}
		s, err := nadutils.CreateNetworkStatus(result, o.Network, len(o.DefaultRoute) > 0, o.device)
		if err != nil {
			return "", fmt.Errorf("read the result of network %s: %w", o.Network, err)
		}
		// A device that a process of the pod drives has no interface in the pod's
		// namespace, and yet its name and MAC there.
		for _, i := range result.Interfaces {
			if i.Name == o.IfName {
				s.Interface, s.Mac, s.Mtu = i.Name, i.Mac, i.Mtu
			}
		}
		for _, gateway := range o.DefaultRoute {
			s.Gateway = append(s.Gateway, gateway.String())
		}
		if s.Default {
			for _, c := range all {
				c.Default = false
			}
		}
		all = append(all, s)
	}
	b, err := json.Marshal(all)
	return string(b), err
}
