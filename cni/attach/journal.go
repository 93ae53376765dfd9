package attach

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/sluice-network/sluice/internal/durable"
	"github.com/sluice-network/sluice/internal/host"
)

// Phase says how far an attachment has come.
type Phase string

// The phases.
const (
	Intent   Phase = "intent"   // being made or undone: the device may be anywhere, in any state
	Attached Phase = "attached" // in the pod, complete
	Returned Phase = "returned" // the device is free again; only IPAM is left to be told
)

// Key names an attachment, as the CNI specification does.
type Key struct {
	Network     string `json:"network"`
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
}

func (k Key) String() string {
	return fmt.Sprintf("network %q, container %s, interface %s", k.Network, k.ContainerID, k.IfName)
}

// file is the name of the key's record. Container IDs may be longer than a file
// name, and networks may contain anything.
func (k Key) file() string {
	sum := sha256.Sum256([]byte(k.Network + "\x00" + k.ContainerID + "\x00" + k.IfName))
	return hex.EncodeToString(sum[:12]) + ".json"
}

// Baseline is the state a VF of a pool is in while no pod has it. The rest of
// it is the same for all: no VLAN, no rates, spoof check on, trust off, link
// state auto, link down.
type Baseline struct {
	MAC      string   `json:"mac"`
	MTU      int      `json:"mtu,omitempty"`      // bytes, of the netdev
	Name     string   `json:"name,omitempty"`     // of the netdev in the host's namespace
	AltNames []string `json:"altNames,omitempty"` // that the netdev may have
}

// Settings are the baseline's settings at the PF.
func (b Baseline) Settings() host.VFSettings {
	mac, _ := net.ParseMAC(b.MAC) // written by us; empty leaves the MAC as it is
	s := host.Baseline()
	s.MAC = mac
	return s
}

// Record is what the journal keeps of one attachment: enough to check it, and
// to undo it without the help of whoever asked for it.
type Record struct {
	Key
	Pod         string       `json:"pod,omitempty"` // namespace/name
	Device      string       `json:"device"`        // PCI address of the VF, or MacVLAN slot; empty for a sub-interface without a slot
	Generation  uint64       `json:"generation"`    // grows with every ADD of this node
	Phase       Phase        `json:"phase"`
	NetnsPath   string       `json:"netnsPath"`
	Netns       host.NetnsID `json:"netns"`
	Baseline    Baseline     `json:"baseline"`
	MAC         string       `json:"mac,omitempty"` // of the interface in the pod
	MTU         int          `json:"mtu,omitempty"`
	Userspace   bool         `json:"userspace,omitempty"`   // the VF has no netdev
	Representor string       `json:"representor,omitempty"` // of the VF, set up for the attachment
	RDMA        string       `json:"rdma,omitempty"`        // RDMA device that is in the pod with the VF
	Promisc     *bool        `json:"promisc,omitempty"`
	AllMulti    *bool        `json:"allMulti,omitempty"`

	Settings host.VFSettings `json:"settings"`          // intended at the PF
	Macvlan  *Macvlan        `json:"macvlan,omitempty"` // nil for a VF

	Adopted     []string `json:"adopted,omitempty"`     // sriov-cni's files of the attachment, which is sriov-cni's then
	AdoptedDHCP bool     `json:"adoptedDHCP,omitempty"` // it has its address by DHCP

	Definition string `json:"definition,omitempty"` // NetworkAttachmentDefinition, namespace/name
	Bypass     string `json:"bypass,omitempty"`     // why packets go past the pod's kernel

	Only       bool      `json:"only,omitempty"`       // the pod had no other interface
	HostLink   string    `json:"hostLink,omitempty"`   // the host's end of the host interface, if one is asked for
	HostRoutes []network `json:"hostRoutes,omitempty"` // that lead there

	IPAM   string          `json:"ipam,omitempty"` // plugin type
	Config json.RawMessage `json:"config"`         // as received
	Args   string          `json:"args,omitempty"`
	Path   string          `json:"path,omitempty"`
	Result json.RawMessage `json:"result,omitempty"` // in the newest version; when attached
}

// holder says who has the VF, for a message.
func (r *Record) holder() string {
	pod := r.Pod
	if pod == "" {
		pod = "unknown"
	}
	return fmt.Sprintf("pod %s (%s)", pod, r.Key)
}

// journal is the set of records, on disk and in memory. A change is written before it is
// in memory and before its method returns, so that an agent that dies is succeeded by one
// that knows it. A new record is on the disk by then, file and folder. After a power
// failure a record may be as it was before its last change, or before it was removed, as
// long as there is no newer one: its pod is gone as well, and all that is done
// with any of these is to undo it, which can be repeated.
type journal struct {
	dir string

	mu         sync.Mutex
	records    map[Key]*Record
	generation uint64
}

// openJournal reads the journal in dir. Files that are no records, which only a
// failing disk or a curious hand can leave, are set aside and returned.
func openJournal(dir string) (*journal, []string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("open journal: %w", err)
	}
	if err := durable.Sweep(dir); err != nil {
		return nil, nil, fmt.Errorf("open journal: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("open journal: %w", err)
	}
	j := &journal{dir: dir, records: map[Key]*Record{}}
	var aside []string
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if filepath.Ext(e.Name()) != ".json" {
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, nil, fmt.Errorf("open journal: %w", err)
		}
		// The device of a record of an agent that knew VFs only is under "vf".
		var old struct {
			VF string `json:"vf"`
		}
		r := &Record{}
		if json.Unmarshal(b, &old) == nil {
			r.Device = old.VF
		}
		if json.Unmarshal(b, r) != nil || r.file() != e.Name() || r.Device == "" && r.Macvlan == nil {
			if err := os.Rename(path, path+".unreadable"); err != nil {
				return nil, nil, fmt.Errorf("open journal: %w", err)
			}
			aside = append(aside, path+".unreadable")
			continue
		}
		j.records[r.Key] = r
		j.generation = max(j.generation, r.Generation)
	}
	return j, aside, nil
}

// put writes the record. The caller must not change it afterwards.
func (j *journal) put(r Record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	write := durable.WriteFile
	if _, known := j.get(r.Key); known {
		write = durable.Replace
	}
	if err := write(filepath.Join(j.dir, r.file()), b); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.records[r.Key] = &r
	return nil
}

// next is the generation of the next attachment.
func (j *journal) next() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.generation++
	return j.generation
}

// remove forgets the record.
func (j *journal) remove(k Key) error {
	if err := durable.Forget(filepath.Join(j.dir, k.file())); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.records, k)
	return nil
}

// get returns a copy of the key's record.
func (j *journal) get(k Key) (Record, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if r, ok := j.records[k]; ok {
		return *r, true
	}
	return Record{}, false
}

// owner returns the record that holds the device. Nobody holds no device.
func (j *journal) owner(device string) (Record, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, r := range j.records {
		if device != "" && r.Device == device && r.Phase != Returned {
			return *r, true
		}
	}
	return Record{}, false
}

// all returns the records, oldest first.
func (j *journal) all() []Record {
	j.mu.Lock()
	defer j.mu.Unlock()
	out := make([]Record, 0, len(j.records))
	for _, r := range slices.SortedFunc(maps.Values(j.records), func(a, b *Record) int {
		return cmp.Compare(a.Generation, b.Generation)
	}) {
		out = append(out, *r)
	}
	return out
}
