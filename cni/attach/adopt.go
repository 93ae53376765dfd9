package attach

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/sluice-network/sluice/internal/host"
)

// sriovConf is as much as is needed of what sriov-cni keeps of an attachment, in the
// file <container ID>-<interface>.
type sriovConf struct {
	Name     string `json:"name"`
	DeviceID string `json:"deviceID"`
	SpoofChk string `json:"spoofchk"` // all but "on" is off; empty leaves it as it is
	Trust    string `json:"trust"`
	State    struct {
		HostIFName, AdminMAC, EffectiveMAC string
		MTU                                int
	} `json:"OrigVfState"`
	IPAM struct {
		Type string `json:"type"`
	} `json:"ipam"`
}

// adopt takes over the attachments of sriov-cni in dir, so that the pods that run from
// before Sluice keep their VFs, and these come home with Sluice's baseline. A VF counts
// when sriov-cni has it down as allocated (pci/<address>, which holds the path of the
// pod's namespace) and no record of ours names it. It returns what could not be read.
func (a *Attacher) adopt(dir string) (unread []error) {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return []error{fmt.Errorf("take over from sriov-cni: %w", err)}
	}
	for _, f := range files {
		containerID, ifName, ok := strings.Cut(f.Name(), "-")
		if f.IsDir() || !ok {
			continue
		}
		r, err := a.adopted(dir, f.Name(), Key{ContainerID: containerID, IfName: ifName})
		if err == nil && r != nil {
			err = a.journal.put(*r)
		}
		if err != nil {
			unread = append(unread, fmt.Errorf("take over %s from sriov-cni: %w", f.Name(), err))
		}
	}
	return unread
}

// adopted reads one file; nil when it is of no VF in use, or of one that is ours.
func (a *Attacher) adopted(dir, file string, key Key) (*Record, error) {
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return nil, err
	}
	var conf sriovConf
	if err = json.Unmarshal(b, &conf); err != nil {
		return nil, err
	}
	if !host.ValidPCIAddress(conf.DeviceID) {
		return nil, fmt.Errorf("deviceID %q is not a PCI address", conf.DeviceID)
	}
	if _, held := a.journal.owner(conf.DeviceID); held {
		return nil, nil
	}
	path, err := os.ReadFile(filepath.Join(dir, "pci", conf.DeviceID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	key.Network = conf.Name
	r := &Record{
		Key: key, Device: conf.DeviceID, Generation: a.journal.next(), Phase: Attached, NetnsPath: strings.TrimSpace(string(path)),
		Adopted:  []string{filepath.Join(dir, file), filepath.Join(dir, "pci", conf.DeviceID)},
		Baseline: Baseline{Name: conf.State.HostIFName, MAC: cmp.Or(conf.State.AdminMAC, conf.State.EffectiveMAC), MTU: conf.State.MTU},
		// Without a netdev there was none to read an MTU or a name of.
		Userspace: conf.State.HostIFName == "",
		Settings:  host.VFSettings{SpoofChk: conf.SpoofChk == "" || conf.SpoofChk == "on", Trust: conf.Trust == "on"},
		Config:    json.RawMessage(b),
	}
	if strings.Trim(r.Baseline.MAC, "0:") == "" {
		r.Baseline.MAC = conf.State.EffectiveMAC
	}
	ns, err := a.Kernel.OpenNetns(r.NetnsPath)
	if err != nil {
		return r, nil // its pod is gone
	}
	defer ns.Close()
	r.Netns = ns.ID
	links, err := a.Kernel.Links(ns)
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if l.PCIAddress == r.Device {
			r.Baseline.AltNames = l.AltNames
		}
	}
	return r, nil
}

// identify finds out whose the attachments of sriov-cni are, which did not write that
// down, and has network policy put in force on them. What of it fails is tried again at
// the next look.
func (a *Attacher) identify(ctx context.Context) error {
	if a.Allocated == nil || a.Enforcer == nil {
		return nil
	}
	var errs []error
	for _, r := range a.journal.all() {
		if r.Adopted == nil || r.Pod != "" || r.Phase != Attached {
			continue
		}
		if err := a.identifyOne(ctx, r); err != nil {
			errs = append(errs, fmt.Errorf("find out which pod has VF %s, which sriov-cni attached, for network policy to hold there: %w", r.Device, err))
		}
	}
	return errors.Join(errs...)
}

func (a *Attacher) identifyOne(ctx context.Context, r Record) error {
	unlock, err := a.lock(ctx, keyLock(r.Key), deviceLock(r.Device))
	if err != nil {
		return err
	}
	defer unlock()
	if now, ok := a.journal.get(r.Key); !ok || now.Generation != r.Generation || now.Phase != Attached || !a.alive(now) {
		return nil
	}
	pod, ok, err := a.Allocated(ctx, r.Device)
	if err != nil {
		return err
	}
	if namespace, name, named := strings.Cut(pod, "/"); !ok || !named || namespace == "" || name == "" {
		return errors.New("the kubelet does not tell it yet")
	}
	ns, err := a.Kernel.OpenNetns(r.NetnsPath)
	if err != nil {
		return err
	}
	defer ns.Close()
	links, err := a.Kernel.Links(ns)
	if err != nil {
		return err
	}
	r.Pod = pod
	if r.Userspace {
		r.Bypass = "its driver gives the VF to user space"
	} else if a.RDMA != nil && a.RDMA(r.Device) {
		r.Bypass = ofRDMAPool
	}
	var conf sriovConf
	if err := json.Unmarshal(r.Config, &conf); err != nil {
		return fmt.Errorf("read journal: %w", err)
	}
	r.AdoptedDHCP = conf.IPAM.Type == "dhcp"
	result := types100.Result{CNIVersion: types100.ImplementedSpecVersion}
	for _, l := range links {
		if l.PCIAddress != r.Device {
			continue
		}
		r.MAC, r.MTU = l.MAC.String(), l.MTU
		all, err := a.Kernel.Addresses(ns, l.Index)
		if err != nil {
			return err
		}
		for _, n := range all {
			if n.IP.IsGlobalUnicast() {
				result.IPs = append(result.IPs, &types100.IPConfig{Address: n})
			}
		}
	}
	if r.Result, err = json.Marshal(result); err != nil {
		return err
	}
	if err := a.journal.put(r); err != nil {
		return err
	}
	a.Enforcer.Load([]Interface{r.policed()})
	return nil
}

// disown removes what sriov-cni kept of the record's attachment: a plugin of its own
// that comes back would think that the VF is in use.
func (r *Record) disown() error {
	var errs []error
	for _, f := range r.Adopted {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
