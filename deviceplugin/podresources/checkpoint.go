package podresources

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"

	"github.com/sluice-network/sluice/internal/holder"
)

// maxCheckpoint bounds the checkpoint: an entry takes some hundred bytes.
const maxCheckpoint = 16 << 20

// allocation is one entry of the checkpoint: what a container of a pod was given of a
// resource.
type allocation struct {
	PodUID       string
	ResourceName string
	DeviceIDs    map[int64][]string // by NUMA node, -1 without one
}

// readCheckpoint reads the kubelet's checkpoint of its device manager. Without the
// file nothing was ever allocated: the kubelet writes it before a container starts.
func readCheckpoint(path string) ([]allocation, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the kubelet's device checkpoint: %w", err)
	}
	defer func() { _ = f.Close() }() // it was only read
	b, err := io.ReadAll(io.LimitReader(f, maxCheckpoint+1))
	if err == nil && len(b) > maxCheckpoint {
		err = fmt.Errorf("it is larger than %d bytes", maxCheckpoint)
	}
	var all []allocation
	if err == nil {
		all, err = parseCheckpoint(b)
	}
	if err != nil {
		return nil, fmt.Errorf("read the kubelet's device checkpoint %s: %w", path, err)
	}
	return all, nil
}

// parseCheckpoint reads what pkg/kubelet/cm/devicemanager/checkpoint writes since
// Kubernetes 1.20. The format has no version: one of another shape is known by what it
// lacks, and must not be taken for one without allocations. The checksum is over the
// text of Go values of the kubelet's own types and is left; the kubelet replaces the
// file whole.
func parseCheckpoint(b []byte) ([]allocation, error) {
	var file struct {
		Data struct {
			PodDeviceEntries json.RawMessage // null for none
		}
	}
	if err := json.Unmarshal(b, &file); err != nil {
		return nil, err
	}
	if file.Data.PodDeviceEntries == nil {
		return nil, errors.New(`it has no "Data" with "PodDeviceEntries": its format is not known`)
	}
	var all []allocation
	if err := json.Unmarshal(file.Data.PodDeviceEntries, &all); err != nil {
		return nil, err
	}
	for i, a := range all {
		if a.PodUID == "" || a.ResourceName == "" || a.DeviceIDs == nil {
			return nil, fmt.Errorf("entry %d of PodDeviceEntries has no PodUID, ResourceName or DeviceIDs: its format is not known", i)
		}
	}
	return all, nil
}

// pods remembers whose UIDs are whose, as far as the kubelet's answers tell.
type pods struct {
	name map[string]string // by UID, "namespace/name"
	uid  map[string]string // by name, the last seen
}

// unnamed adds to holders, which are what the kubelet answered, the devices of the
// checkpoint that nobody there holds, with the UIDs of their pods: of our
// resources, and not of pods that are known to be gone. Live are the names of all pods.
func (p *pods) unnamed(holders map[string]string, live map[string]bool, all []allocation, ours func(string) bool) {
	before := p.name
	p.name, p.uid = map[string]string{}, map[string]string{}
	each := func(do func(uid, device string)) {
		for _, a := range all {
			for _, ids := range a.DeviceIDs {
				for _, id := range ids {
					if ours(a.ResourceName) {
						do(a.PodUID, id)
					}
				}
			}
		}
	}
	each(func(uid, device string) {
		if name, ok := holders[device]; ok {
			p.name[uid], p.uid[name] = name, uid
		} else if before[uid] != "" && p.name[uid] == "" {
			p.name[uid] = before[uid]
		}
	})
	rest := map[string]string{}
	each(func(uid, device string) {
		name := p.name[uid]
		last, seen := p.uid[name]
		gone := name != "" && (!live[name] || seen && last != uid)
		if _, held := holders[device]; !held && !gone {
			rest[device] = holder.Unnamed(uid)
		}
	})
	maps.Copy(holders, rest)
}
