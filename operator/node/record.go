package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/durable"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/operator/plan"
)

// pfRecord is what is kept of a PF from before its first change until it is given
// up: what it goes back to then, which nothing else tells.
type pfRecord struct {
	MTU         int              `json:"mtu,omitempty"`       // bytes; 0 when it had no netdev
	RaisedMTU   int              `json:"raisedMTU,omitempty"` // as last set here
	Eswitch     host.EswitchMode `json:"eswitch,omitempty"`
	NumVFs      int              `json:"numVFs,omitempty"` // VFs that somebody else had made
	AutoprobeNo bool             `json:"autoprobeOff,omitempty"`
	// Bridge tells that a bridge was to be made of it.
	Bridge bool `json:"bridge,omitempty"`
	// TakenOver tells that the VFs are those the SR-IOV network operator made.
	TakenOver bool `json:"takenOver,omitempty"`
	// GivenUp is left of a PF that was given up although the SR-IOV network
	// operator's own file still names it: that file must not be believed again.
	GivenUp bool `json:"givenUp,omitempty"`
	// Lost is the goal that cut the path to the API server and was taken back.
	Lost   *v1.Interface `json:"lost,omitempty"`
	LostBy string        `json:"lostBy,omitempty"` // the operation
}

// records are the records of a node's PFs, one file for each, on disk and in
// memory. A change is on the disk before its method returns.
type records struct {
	dir      string
	upstream string // the SR-IOV network operator's folder of files named after PFs

	mu   sync.Mutex
	byPF map[string]pfRecord
}

// openRecords reads the records. A file that is none, which only a failing disk
// or a curious hand can leave, is set aside and returned.
func openRecords(stateDir, upstreamDir string) (*records, []string, error) {
	r := &records{dir: filepath.Join(stateDir, "nics"), upstream: filepath.Join(upstreamDir, "pci"), byPF: map[string]pfRecord{}}
	if err := errors.Join(os.MkdirAll(r.dir, 0o700), durable.Sweep(r.dir)); err != nil {
		return nil, nil, fmt.Errorf("open the records of NICs: %w", err)
	}
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("open the records of NICs: %w", err)
	}
	var aside []string
	for _, e := range entries {
		path := filepath.Join(r.dir, e.Name())
		address, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, nil, fmt.Errorf("open the records of NICs: %w", err)
		}
		var one pfRecord
		if json.Unmarshal(b, &one) != nil || !host.ValidPCIAddress(address) {
			if err := os.Rename(path, path+".unreadable"); err != nil {
				return nil, nil, fmt.Errorf("open the records of NICs: %w", err)
			}
			aside = append(aside, path+".unreadable")
			continue
		}
		r.byPF[address] = one
	}
	return r, aside, nil
}

// get returns the PF's record; ok is false when it is not managed.
func (r *records) get(address string) (one pfRecord, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	one, ok = r.byPF[address]
	return one, ok && !one.GivenUp
}

// change writes the record that f makes of the PF's.
func (r *records) change(address string, f func(*pfRecord)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	one, before := r.byPF[address], r.byPF[address]
	f(&one)
	if one == before {
		return nil
	}
	b, err := json.Marshal(one)
	if err != nil {
		return fmt.Errorf("record the settings of NIC %s: %w", address, err)
	}
	if err = durable.WriteFile(filepath.Join(r.dir, address+".json"), b); err != nil {
		return fmt.Errorf("record the settings of NIC %s: %w", address, err)
	}
	r.byPF[address] = one
	return nil
}

// begin records the PF as it is, unless it is recorded. VFs that we made, or the
// SR-IOV network operator did, are nothing to go back to.
func (r *records) begin(pf host.PF, ours bool) error {
	if _, ok := r.get(pf.PCIAddress); ok {
		return nil
	}
	return r.change(pf.PCIAddress, func(one *pfRecord) {
		taken := !ours && !one.GivenUp && pf.NumVFs > 0 && r.ofUpstream(pf.PCIAddress)
		*one = pfRecord{MTU: pf.MTU, Eswitch: pf.Eswitch, AutoprobeNo: pf.AutoprobeOff, TakenOver: taken}
		if !ours && !taken {
			one.NumVFs = pf.NumVFs
		}
	})
}

// want records the PF before it is first made what want says. A goal that cut the
// node off is remembered as long as it is the goal.
func (r *records) want(pf host.PF, want v1.Interface, ours bool) error {
	if !want.ExternallyManaged {
		if err := r.begin(pf, ours); err != nil {
			return err
		}
	}
	if was, _ := r.get(pf.PCIAddress); was.Lost == nil || sameWant(*was.Lost, want) {
		return nil
	}
	return r.change(pf.PCIAddress, func(one *pfRecord) { one.Lost, one.LostBy = nil, "" })
}

// end forgets the PF.
func (r *records) end(address string) error {
	if r.ofUpstream(address) {
		return r.change(address, func(one *pfRecord) { *one = pfRecord{GivenUp: true} })
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := durable.Remove(filepath.Join(r.dir, address+".json")); err != nil {
		return fmt.Errorf("forget the settings of NIC %s: %w", address, err)
	}
	delete(r.byPF, address)
	return nil
}

// before records what the operation is about to make untrue.
func (r *records) before(address string, op plan.Operation) error {
	switch op.Kind {
	case plan.SetPFMTU:
		return r.change(address, func(one *pfRecord) { one.RaisedMTU = op.Number })
	case plan.SetBridge:
		return r.change(address, func(one *pfRecord) { one.Bridge = true })
	case plan.SetNumVFs:
		return r.change(address, func(one *pfRecord) { one.TakenOver = false })
	}
	return nil
}

// ofUpstream tells whether the SR-IOV network operator made the PF's VFs: it
// leaves a file with what it last applied, for PFs that others manage too.
func (r *records) ofUpstream(address string) bool {
	b, err := os.ReadFile(filepath.Join(r.upstream, address))
	return err == nil && madeVFs(b, address)
}

// bridgeOfUpstream tells whether the SR-IOV network operator made the bridge: it keeps a
// file of those.
func (r *records) bridgeOfUpstream(name string) bool {
	b, err := os.ReadFile(filepath.Join(filepath.Dir(r.upstream), "managed-ovs-bridges.json"))
	var made map[string]json.RawMessage
	return err == nil && json.Unmarshal(b, &made) == nil && made[name] != nil
}

// madeVFs reads the file that the SR-IOV network operator keeps of a PF. One that does
// not speak of the PF is not believed: its VFs would stay as they are for ever.
func madeVFs(file []byte, address string) bool {
	var applied v1.Interface
	return json.Unmarshal(file, &applied) == nil && applied.PciAddress == address && !applied.ExternallyManaged
}

// fill adds to the PF, as planning sees it, what is recorded of it.
func (r *records) fill(v *plan.PF) {
	one, ok := r.get(v.PCIAddress)
	if ok {
		v.Original = &plan.Original{MTU: one.MTU, RaisedMTU: one.RaisedMTU, Eswitch: string(one.Eswitch)}
		v.TakenOver, v.Bridge.Made = one.TakenOver, one.Bridge
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	v.TakenOver = !r.byPF[v.PCIAddress].GivenUp && v.NumVFs > 0 && r.ofUpstream(v.PCIAddress)
}
