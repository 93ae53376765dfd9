package standalone

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/sluice-network/sluice/internal/durable"
	"github.com/sluice-network/sluice/internal/host"
)

// sandbox is what is kept on disk of a pod that has networks, from before the
// first of them is made until after the last is gone.
type sandbox struct {
	Cluster     string       `json:"cluster"` // name of the cluster network
	ContainerID string       `json:"containerID"`
	NetnsPath   string       `json:"netnsPath"`
	Netns       host.NetnsID `json:"netns"`
	Path        string       `json:"path,omitempty"` // CNI_PATH
	Complete    bool         `json:"complete"`       // ADD was answered, or may have been
	Attachments []attachment `json:"attachments"`
}

// records are the sandboxes on disk, one file each.
type records struct{ dir string }

// open makes the folder ready. Files that are no records, which only a failing disk or a
// curious hand can leave, are set aside and returned.
func (r records) open() (aside []string, err error) {
	if err := errors.Join(os.MkdirAll(r.dir, 0o700), durable.Sweep(r.dir)); err != nil {
		return nil, fmt.Errorf("open the records of containers: %w", err)
	}
	ids, err := r.all()
	for _, id := range ids {
		if s, bad := r.get(id); bad == nil && s.ContainerID == id {
			continue
		}
		path := r.file(id) + ".unreadable"
		if err := os.Rename(r.file(id), path); err != nil {
			return nil, fmt.Errorf("open the records of containers: %w", err)
		}
		aside = append(aside, path)
	}
	return aside, err
}

func (r records) file(containerID string) string { return filepath.Join(r.dir, containerID+".json") }

func (r records) put(s sandbox) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err == nil {
		err = durable.WriteFile(r.file(s.ContainerID), b)
	}
	if err != nil {
		return fmt.Errorf("write down the networks of container %s: %w", s.ContainerID, err)
	}
	return nil
}

// get returns the container's sandbox, nil when there is none.
func (r records) get(containerID string) (*sandbox, error) {
	b, err := os.ReadFile(r.file(containerID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	s := &sandbox{}
	if err == nil {
		err = json.Unmarshal(b, s)
	}
	if err != nil {
		return nil, fmt.Errorf("read the networks of container %s: %w", containerID, err)
	}
	return s, nil
}

func (r records) remove(containerID string) error { return durable.Remove(r.file(containerID)) }

// all are the IDs of the containers that have a sandbox.
func (r records) all() ([]string, error) {
	files, err := filepath.Glob(filepath.Join(r.dir, "*.json"))
	for i, f := range files {
		files[i] = strings.TrimSuffix(filepath.Base(f), ".json")
	}
	return files, err
}
