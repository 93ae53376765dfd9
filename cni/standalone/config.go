package standalone

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
	strict "sigs.k8s.io/json"

	"github.com/sluice-network/sluice/cni/attach"
)

// config is the configuration of the chained plugin.
type config struct {
	CNIVersion    string               `json:"cniVersion"`
	Name          string               `json:"name"`
	Type          string               `json:"type"`
	PodNetworks   bool                 `json:"podNetworks"`
	Capabilities  map[string]bool      `json:"capabilities"`
	PrevResult    json.RawMessage      `json:"prevResult"`
	Valid         []types.GCAttachment `json:"cni.dev/valid-attachments"`
	Attachments   []types.GCAttachment `json:"cni.dev/attachments"` // of older specifications
	RuntimeConfig struct {
		Annotations map[string]string `json:"io.kubernetes.cri.pod-annotations"`
	} `json:"runtimeConfig"`
}

// Wanted tells whether the configuration is one of this package.
func Wanted(stdin []byte) bool {
	var c struct {
		PodNetworks json.RawMessage `json:"podNetworks"`
	}
	return json.Unmarshal(stdin, &c) == nil && c.PodNetworks != nil
}

func parse(req attach.Request) (*config, error) {
	c := &config{}
	unknown, err := strict.UnmarshalStrict(req.Stdin, c)
	if err != nil {
		return nil, fail(types.ErrDecodingFailure, "read network configuration: %w", err)
	}
	if err = errors.Join(unknown...); err == nil && !c.PodNetworks {
		err = errors.New("podNetworks is false: set it to true, or take this plugin out of the chain")
	}
	if err == nil && req.Command == attach.Add && len(c.PrevResult) == 0 {
		err = errors.New("prevResult is missing: podNetworks adds networks to the cluster network, so this plugin comes after the cluster network's in its chain")
	}
	if err != nil {
		return nil, fail(types.ErrInvalidNetworkConfig, "network %q: %w", c.Name, err)
	}
	return c, nil
}

func fail(code uint, format string, args ...any) error {
	return attach.WithCode(code, fmt.Errorf(format, args...))
}
