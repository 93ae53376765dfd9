package deviceplugin

import (
	"encoding/json"
	"fmt"
	"path/filepath"

	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

// The Container Device Interface: device nodes are described in files that the runtime
// reads, and the kubelet is told names. Version 0.5.0 of its specification is the first
// with hostPath.
const (
	cdiVersion = "0.5.0"
	cdiKind    = "sluice.dev/vf"
	cdiPrefix  = "sluice-vf-"
	cdiSuffix  = ".json"
)

type cdiSpec struct {
	Version string      `json:"cdiVersion"`
	Kind    string      `json:"kind"`
	Devices []cdiDevice `json:"devices"`
}

type cdiDevice struct {
	Name  string   `json:"name"`
	Edits cdiEdits `json:"containerEdits"`
}

type cdiEdits struct {
	Nodes []cdiNode `json:"deviceNodes"`
}

type cdiNode struct {
	Path        string `json:"path"` // in the container
	HostPath    string `json:"hostPath"`
	Permissions string `json:"permissions"`
}

func cdiPath(dir, id string) string { return filepath.Join(dir, cdiPrefix+id+cdiSuffix) }

// writeCDI describes the device's nodes in a file of its own, and returns its name
// towards the kubelet.
func writeCDI(dir, id string, nodes deviceNodes) (*api.CDIDevice, error) {
	d := cdiDevice{Name: id}
	for _, n := range nodes {
		d.Edits.Nodes = append(d.Edits.Nodes, cdiNode{n.GetContainerPath(), n.GetHostPath(), n.GetPermissions()})
	}
	b, err := json.Marshal(cdiSpec{cdiVersion, cdiKind, []cdiDevice{d}})
	if err == nil {
		err = replaceFile(cdiPath(dir, id), b)
	}
	if err != nil {
		return nil, fmt.Errorf("write CDI specification of %s: %w", id, err)
	}
	return &api.CDIDevice{Name: cdiKind + "=" + id}, nil
}

// pruneCDI removes the files of devices that keep does not know. A container that is
// started again is made by its file anew.
func pruneCDI(dir string, keep func(id string) bool) error {
	return prune(dir, cdiPrefix, cdiSuffix, keep)
}
