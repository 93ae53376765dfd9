package attach

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/go-logr/logr"

	"github.com/sluice-network/sluice/internal/host"
)

// Kernel is what attachments need of the kernel; *host.Attacher is it. A nil
// *host.Netns is the host's namespace.
type Kernel interface {
	VF(pciAddress string) (host.VFRef, error)
	VFSettings(vf host.VFRef) (host.VFSettings, error)
	SetVFSettings(ctx context.Context, vf host.VFRef, want host.VFSettings, required host.VFAttrs) error

	HostNetns() *host.Netns
	OpenNetns(path string) (*host.Netns, error)
	Links(ns *host.Netns) ([]host.Netdev, error)
	Link(ns *host.Netns, name string) (host.Netdev, error)
	ChangeLink(ctx context.Context, from *host.Netns, index int, c host.LinkChange) error
	AdoptMAC(ctx context.Context, l host.Netdev, mac net.HardwareAddr) error
	DeleteAltName(ns *host.Netns, index int, name string) error

	PrepareIPv6(ns *host.Netns, link string) error
	AddAddress(ns *host.Netns, index int, address net.IPNet) error
	WaitIPv6(ctx context.Context, ns *host.Netns, index int) error
	Addresses(ns *host.Netns, index int) ([]net.IPNet, error)
	AddRoute(ns *host.Netns, index int, r host.Route) error
	HasRoute(ns *host.Netns, index int, r host.Route) (bool, error)
	Announce(ctx context.Context, ns *host.Netns, link string, addresses []net.IPNet) error
}

// Baselines knows the state that a VF of a pool has while no pod has it.
type Baselines interface {
	// Baseline returns the stable MAC and the MTU in bytes of the VF, not ok
	// when the VF is in no pool.
	Baseline(pciAddress string) (mac net.HardwareAddr, mtu int, ok bool)
}

// Options are what an Attacher stands on.
type Options struct {
	Kernel    Kernel
	Baselines Baselines
	IPAM      IPAM
	Dir       string // of the journal
	Log       logr.Logger

	// Allocated returns the pod, as namespace/name, that the kubelet has given
	// the VF to, not ok when it has given it to none. Nil leaves the VF to
	// whoever names it: there is no kubelet.
	Allocated func(ctx context.Context, pciAddress string) (pod string, ok bool, err error)

	// OnStep, unless nil, is called before each step of making and undoing an
	// attachment, with the step's name. Tests end the process in it.
	OnStep func(step string)
}

// Attacher makes and undoes attachments. It is safe for concurrent use: calls
// for one attachment or one VF follow one another, others run side by side.
type Attacher struct {
	Options
	journal *journal
	locks   locks
}

const (
	undoTimeout = 20 * time.Second // for undoing a failed ADD, beyond the request's own deadline
	homeTimeout = 10 * time.Second // for the kernel to give back the links of a namespace that ended
	dadTimeout  = 5 * time.Second  // for IPv6 duplicate address detection
)

// New opens the journal. Recover should follow before any request.
func New(o Options) (*Attacher, error) {
	j, aside, err := openJournal(o.Dir)
	if err != nil {
		return nil, err
	}
	for _, path := range aside {
		o.Log.Error(nil, "A file of the journal is no record and was set aside; its VF keeps its settings until the node is configured anew", "file", path)
	}
	return &Attacher{Options: o, journal: j}, nil
}

// Attached returns the settings that the VF was given at its PF for the pod it is
// attached to; ok is false while it is attached to none, or not yet.
func (a *Attacher) Attached(pciAddress string) (settings host.VFSettings, ok bool) {
	r, held := a.journal.owner(pciAddress)
	return r.Settings, held && r.Phase == Attached
}

// Attachments are the pods that have attachments, in the order these were made.
func (a *Attacher) Attachments() []string {
	var pods []string
	for _, r := range a.journal.all() {
		pods = append(pods, r.holder())
	}
	return pods
}

// Holder returns the pod that has the VF, as namespace/name, "" when its name is
// not known.
func (a *Attacher) Holder(pciAddress string) (pod string, held bool) {
	r, held := a.journal.owner(pciAddress)
	return r.Pod, held
}

func (a *Attacher) step(name string) {
	if a.OnStep != nil {
		a.OnStep(name)
	}
}

// lock takes the lock of the attachment and then that of its VF. A VF's lock
// guards the records that name the VF.
func (a *Attacher) lock(ctx context.Context, names ...string) (unlock func(), err error) {
	var unlocks []func()
	unlock = func() {
		for _, u := range slices.Backward(unlocks) {
			u()
		}
	}
	for _, name := range names {
		u, err := a.locks.lock(ctx, name)
		if err != nil {
			unlock()
			return nil, fail(types.ErrTryAgainLater, "wait for %s: %w", name, err)
		}
		unlocks = append(unlocks, u)
	}
	return unlock, nil
}

func keyLock(k Key) string    { return "attachment of " + k.String() }
func vfLock(vf string) string { return "VF " + vf }
func pfLock(pf string) string { return "PF " + pf }

// Add makes the VF that the configuration names an interface of the pod and
// returns the result in the configuration's version. ns is the pod's namespace;
// nil opens it by its path. After an error everything is as it was before, or
// the error says that it is not and DEL will try again.
func (a *Attacher) Add(ctx context.Context, req Request, ns *host.Netns) ([]byte, error) {
	req.Command = Add
	a.step("add: read configuration")
	cfg, err := Parse(req)
	if err != nil {
		return nil, err
	}
	if ns == nil {
		if ns, err = a.Kernel.OpenNetns(req.Netns); err != nil {
			return nil, fail(types.ErrInvalidNetNS, "network %q: %w", cfg.Network, err)
		}
		defer ns.Close()
	}
	if ns.ID == a.Kernel.HostNetns().ID {
		return nil, fail(types.ErrInvalidNetNS, "network %q: CNI_NETNS %s is the host's own network namespace", cfg.Network, req.Netns)
	}
	key := Key{cfg.Network, req.ContainerID, req.IfName}
	unlock, err := a.lock(ctx, keyLock(key))
	if err != nil {
		return nil, err
	}
	defer unlock()
	done, err := a.repeated(ctx, key, cfg, ns)
	if done != nil || err != nil {
		return done, err
	}
	unlockVF, err := a.lock(ctx, vfLock(cfg.DeviceID))
	if err != nil {
		return nil, err
	}
	defer unlockVF()
	if err := a.allocated(ctx, cfg); err != nil {
		return nil, err
	}
	if err := a.claim(ctx, cfg); err != nil {
		return nil, err
	}
	return a.attach(ctx, key, cfg, req, ns)
}

// repeated answers an ADD that was done before and whose answer was lost. What
// is left of another attempt of the same attachment is undone.
func (a *Attacher) repeated(ctx context.Context, key Key, cfg *Config, ns *host.Netns) ([]byte, error) {
	r, ok := a.journal.get(key)
	if !ok {
		return nil, nil
	}
	if r.Phase == Attached && a.alive(r) {
		if r.VF != cfg.DeviceID || r.Netns != ns.ID {
			return nil, fail(types.ErrInvalidNetworkConfig, "network %q: the attachment exists already with VF %s: DEL it first", cfg.Network, r.VF)
		}
		return convert(r.Result, cfg.CNIVersion)
	}
	if err := a.finish(ctx, r, ns); err != nil {
		return nil, fail(types.ErrTryAgainLater, "network %q: undo an earlier attempt: %w", cfg.Network, err)
	}
	return nil, nil
}

// allocated makes sure that the VF is for this pod: whoever may write a network
// definition can name any VF in it, also one the kubelet has just promised to
// another pod, or will.
func (a *Attacher) allocated(ctx context.Context, cfg *Config) error {
	if a.Allocated == nil || cfg.Pod == "" {
		return nil
	}
	pod, ok, err := a.Allocated(ctx, cfg.DeviceID)
	_, _, pooled := a.Baselines.Baseline(cfg.DeviceID)
	switch {
	case err != nil:
		return fail(types.ErrTryAgainLater, "network %q: deviceID %s: %w", cfg.Network, cfg.DeviceID, err)
	case ok && pod != cfg.Pod:
		return fail(CodeVFHeld, "network %q: deviceID %s: the VF is allocated to pod %s, not to %s: take deviceID out of the network definition", cfg.Network, cfg.DeviceID, pod, cfg.Pod)
	case !ok && pooled:
		return fail(CodeVFHeld, "network %q: deviceID %s: the VF is in a pool and not allocated to pod %s: let the pod request the pool's resource, and take deviceID out of the network definition", cfg.Network, cfg.DeviceID, cfg.Pod)
	}
	return nil
}

// claim makes sure that nobody has the VF. An owner whose network namespace has
// ended has lost it.
func (a *Attacher) claim(ctx context.Context, cfg *Config) error {
	r, held := a.journal.owner(cfg.DeviceID)
	if !held {
		return nil
	}
	if a.alive(r) {
		return fail(CodeVFHeld, "network %q: deviceID %s: the VF is held by %s", cfg.Network, cfg.DeviceID, r.holder())
	}
	err := a.release(ctx, r, nil)
	if r, held = a.journal.owner(cfg.DeviceID); held {
		return fail(CodeVFHeld, "network %q: deviceID %s: the VF was held by %s, which is gone, and cannot be taken back yet: %w",
			cfg.Network, cfg.DeviceID, r.holder(), err)
	}
	if err != nil {
		a.Log.Error(err, "Cannot finish an attachment whose pod is gone", "attachment", r.Key)
	}
	return nil
}

// attach does the work of Add on a VF that is free.
func (a *Attacher) attach(ctx context.Context, key Key, cfg *Config, req Request, ns *host.Netns) ([]byte, error) {
	vf, link, stale, err := a.inspect(cfg, req, ns)
	if err != nil {
		return nil, err
	}
	if cfg.IPAM != "" {
		if err = a.IPAM.Find(cfg.IPAM, req); err != nil {
			return nil, fmt.Errorf("network %q: ipam.type %q: %w", cfg.Network, cfg.IPAM, err)
		}
	}
	r := Record{
		Key: key, Pod: cfg.Pod, VF: cfg.DeviceID, Phase: Intent,
		NetnsPath: req.Netns, Netns: ns.ID, Userspace: vf.Userspace,
		IPAM: cfg.IPAM, Config: req.Stdin, Args: req.Args, Path: req.Path,
	}
	if r.Baseline, err = a.baseline(vf, link); err != nil {
		return nil, fail(CodeKernel, "network %q: deviceID %s: %w", cfg.Network, cfg.DeviceID, err)
	}
	r.Baseline.AltNames = slices.DeleteFunc(r.Baseline.AltNames, func(n string) bool { return slices.Contains(stale, n) })
	var asked host.VFAttrs
	r.Settings, asked = cfg.Settings(r.Baseline)
	r.MAC, r.MTU = r.Settings.MAC.String(), r.Baseline.MTU
	if cfg.MTU != 0 {
		r.MTU = cfg.MTU
	}

	a.step("add: write intent")
	r.Generation = a.journal.next()
	if err = a.journal.put(r); err != nil {
		return nil, fail(types.ErrIOFailure, "network %q: %w", cfg.Network, err)
	}
	undo := r
	undo.IPAM = "" // until it has been asked
	result, err := a.make(ctx, &undo, r, cfg, vf, link, stale, asked, ns)
	if err == nil {
		return result, nil
	}
	err = fmt.Errorf("network %q: deviceID %s: %w", cfg.Network, cfg.DeviceID, err)
	rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if undone := a.release(rest, undo, ns); undone != nil {
		return nil, fail(CodeNotUndone, "%w; then undo failed: %w", err, undone)
	}
	return nil, err
}

// inspect finds the VF and its link and checks, before anything is changed,
// that the link can go to the pod under the wanted name. stale are alternative
// names of the link that stand in the way and that no one else has.
func (a *Attacher) inspect(cfg *Config, req Request, ns *host.Netns) (vf host.VFRef, link host.Netdev, stale []string, err error) {
	bad := func(code uint, format string, args ...any) error {
		return fail(code, "network %q: deviceID %s: %w", cfg.Network, cfg.DeviceID, fmt.Errorf(format, args...))
	}
	vf, err = a.Kernel.VF(cfg.DeviceID)
	switch {
	case errors.Is(err, host.ErrNoVF):
		return vf, link, nil, bad(types.ErrInvalidNetworkConfig, "%w", err)
	case err != nil:
		return vf, link, nil, bad(CodeVFUnusable, "%w", err)
	case vf.Driver == "":
		return vf, link, nil, bad(CodeVFUnusable, "the VF has no driver: bind one")
	case vf.Userspace:
		return vf, link, nil, nil
	case vf.Name == "":
		return vf, link, nil, bad(CodeVFUnusable, "driver %s has no netdev for the VF in the host's network namespace: a container that is not known here may have it", vf.Driver)
	}
	if link, err = a.Kernel.Link(nil, vf.Name); err != nil {
		return vf, link, nil, bad(CodeVFUnusable, "%w", err)
	}
	others, err := a.Kernel.Links(ns)
	if err != nil {
		return vf, link, nil, bad(CodeKernel, "%w", err)
	}
	for _, o := range others {
		names := append([]string{o.Name}, o.AltNames...)
		if slices.Contains(names, req.IfName) {
			return vf, link, nil, fail(CodeNameTaken, "network %q: the pod has an interface %s already (%s): choose another name", cfg.Network, req.IfName, o.Name)
		}
		// The kernel moves a link with all its names or not at all.
		for _, alt := range link.AltNames {
			if slices.Contains(names, alt) {
				return vf, link, nil, bad(CodeNameTaken, "alternative name %s of %s is a name of %s in the pod already", alt, vf.Name, o.Name)
			}
		}
	}
	for _, alt := range link.AltNames {
		if alt == req.IfName {
			stale = append(stale, alt)
		}
	}
	return vf, link, stale, nil
}

// baseline is the state the VF comes back to: its pool's, or for a VF that is
// in no pool the MAC and MTU it has now.
func (a *Attacher) baseline(vf host.VFRef, link host.Netdev) (Baseline, error) {
	b := Baseline{MTU: link.MTU, Name: link.Name, AltNames: slices.Clone(link.AltNames)}
	mac, mtu, ok := a.Baselines.Baseline(vf.PCIAddress)
	if ok && mtu > 0 && !vf.Userspace {
		b.MTU = mtu
	}
	if !ok || len(mac) == 0 {
		s, err := a.Kernel.VFSettings(vf)
		if err != nil {
			return b, err
		}
		mac = s.MAC
		if bytes.Equal(mac, make([]byte, len(mac))) {
			mac = link.MAC
		}
	}
	b.MAC = mac.String()
	return b, nil
}

// make does everything that has to be undone when it fails. undo tells what.
func (a *Attacher) make(ctx context.Context, undo *Record, r Record, cfg *Config, vf host.VFRef, link host.Netdev, stale []string, asked host.VFAttrs, ns *host.Netns) ([]byte, error) {
	a.step("add: set VF")
	if err := a.setVF(ctx, vf, r.Settings, asked); err != nil {
		return nil, refused("%w", err)
	}
	if !r.Userspace {
		a.step("add: move link")
		var err error
		if link, err = a.move(ctx, r, link, stale, ns); err != nil {
			return nil, refused("%w", err)
		}
	}
	result := &types100.Result{DNS: cfg.DNS}
	if r.IPAM != "" {
		a.step("add: ask IPAM")
		undo.IPAM = r.IPAM
		ips, err := a.IPAM.Exec(ctx, r.IPAM, r.request(Add))
		if err != nil {
			return nil, err
		}
		if len(ips.IPs) == 0 {
			return nil, fail(CodeIPAM, "IPAM plugin %s gave no address", r.IPAM)
		}
		result.IPs, result.Routes = ips.IPs, ips.Routes
		if !ips.DNS.IsEmpty() {
			result.DNS = ips.DNS
		}
	}
	iface := &types100.Interface{Name: r.IfName, Mac: r.MAC, PciID: r.VF}
	if !r.Userspace {
		iface.Mtu, iface.Sandbox = link.MTU, r.NetnsPath
		a.step("add: set addresses")
		if err := a.address(ctx, ns, link, result); err != nil {
			return nil, refused("%w", err)
		}
	}
	result.Interfaces = []*types100.Interface{iface}
	for _, ip := range result.IPs {
		ip.Interface = types100.Int(0)
	}

	a.step("add: write result")
	result.CNIVersion = types100.ImplementedSpecVersion
	raw, err := json.Marshal(result)
	if err != nil {
		return nil, err
	}
	answer, err := convert(raw, cfg.CNIVersion)
	if err != nil {
		return nil, err
	}
	r.Phase, r.Result = Attached, raw
	if err := a.journal.put(r); err != nil {
		return nil, fail(types.ErrIOFailure, "%w", err)
	}
	if !r.Userspace && len(result.IPs) > 0 {
		a.step("add: announce")
		// Neighbours without it find out by themselves, later.
		if err := a.Kernel.Announce(ctx, ns, r.IfName, nets(result.IPs)); err != nil {
			a.Log.Error(err, "Cannot announce the addresses of an interface", "attachment", r.Key)
		}
	}
	a.step("add: answer")
	return answer, nil
}

// setVF changes a VF through its PF, one VF of a PF after the other: firmware
// and mailbox of a PF are shared, and some drivers fail calls that overlap.
func (a *Attacher) setVF(ctx context.Context, vf host.VFRef, want host.VFSettings, asked host.VFAttrs) error {
	unlock, err := a.lock(ctx, pfLock(vf.PF))
	if err != nil {
		return err
	}
	defer unlock()
	return a.Kernel.SetVFSettings(ctx, vf, want, asked)
}

// move takes the link from the host to the pod, complete and up, and returns it
// as it is there.
func (a *Attacher) move(ctx context.Context, r Record, link host.Netdev, stale []string, ns *host.Netns) (host.Netdev, error) {
	for _, alt := range stale {
		if err := a.Kernel.DeleteAltName(nil, link.Index, alt); err != nil {
			return link, err
		}
	}
	change := host.LinkChange{To: ns, Name: r.IfName, State: host.SetUp}
	mac := r.Settings.MAC
	if len(mac) > 0 && !bytes.Equal(mac, link.MAC) {
		change.MAC = mac
	}
	if r.MTU != link.MTU {
		change.MTU = r.MTU
	}
	err := a.Kernel.ChangeLink(ctx, nil, link.Index, change)
	if err != nil && change.MAC != nil {
		// Some drivers take a new MAC only by a reset of the VF, which needs the
		// link at home again.
		vf, home := a.bringHome(ctx, r, ns)
		if home != nil {
			return link, fmt.Errorf("move %s to the pod as %s: %w", link.Name, r.IfName, errors.Join(err, home))
		}
		if link, home = a.Kernel.Link(nil, vf.Name); home == nil {
			home = a.Kernel.AdoptMAC(ctx, link, mac)
		}
		if home != nil {
			return link, fmt.Errorf("move %s to the pod as %s: %w", link.Name, r.IfName, errors.Join(err, home))
		}
		change.MAC = nil
		err = a.Kernel.ChangeLink(ctx, nil, link.Index, change)
	}
	if err != nil {
		return link, fmt.Errorf("move %s to the pod as %s with MAC %s and MTU %d: %w", link.Name, r.IfName, r.MAC, r.MTU, err)
	}
	now, err := a.Kernel.Link(ns, r.IfName)
	if err != nil {
		return link, err
	}
	if len(mac) > 0 && !bytes.Equal(now.MAC, mac) {
		return now, fmt.Errorf("driver kept MAC %s of %s where %s was set", now.MAC, r.IfName, mac)
	}
	return now, nil
}

// address puts the addresses and routes of the result on the link.
func (a *Attacher) address(ctx context.Context, ns *host.Netns, link host.Netdev, result *types100.Result) error {
	var gateway4, gateway6 net.IP
	var six bool
	for _, ip := range result.IPs {
		if ip.Address.IP.To4() != nil {
			if gateway4 == nil {
				gateway4 = ip.Gateway
			}
		} else {
			if gateway6 == nil {
				gateway6 = ip.Gateway
			}
			if !six {
				six = true
				if err := a.Kernel.PrepareIPv6(ns, link.Name); err != nil {
					return err
				}
			}
		}
		if err := a.Kernel.AddAddress(ns, link.Index, ip.Address); err != nil {
			return err
		}
	}
	if gateway6 != nil {
		wait, cancel := context.WithTimeout(ctx, dadTimeout)
		defer cancel()
		if err := a.Kernel.WaitIPv6(wait, ns, link.Index); err != nil {
			return err
		}
	}
	for _, r := range result.Routes {
		route := routeOf(r)
		if route.Gateway == nil {
			route.Gateway = gateway6
			if r.Dst.IP.To4() != nil {
				route.Gateway = gateway4
			}
		}
		if err := a.Kernel.AddRoute(ns, link.Index, route); err != nil {
			return err
		}
	}
	return nil
}

func routeOf(r *types.Route) host.Route {
	out := host.Route{Dst: r.Dst, Gateway: r.GW, MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority, Scope: r.Scope}
	if r.Table != nil {
		out.Table = *r.Table
	}
	return out
}

func nets(ips []*types100.IPConfig) []net.IPNet {
	out := make([]net.IPNet, len(ips))
	for i, ip := range ips {
		out[i] = ip.Address
	}
	return out
}

// request is a call of the IPAM plugin for the attachment.
func (r *Record) request(c Command) Request {
	return Request{Command: c, ContainerID: r.ContainerID, Netns: r.NetnsPath, IfName: r.IfName, Args: r.Args, Path: r.Path, Stdin: r.Config}
}

// convert turns a result of the newest version into one of another version.
func convert(raw []byte, cniVersion string) ([]byte, error) {
	result := &types100.Result{}
	if err := json.Unmarshal(raw, result); err != nil {
		return nil, fmt.Errorf("read result: %w", err)
	}
	if cniVersion != "1.1.0" {
		for _, i := range result.Interfaces {
			i.PciID = ""
		}
	}
	r, err := result.GetAsVersion(cniVersion)
	if err != nil {
		return nil, fmt.Errorf("convert result: %w", err)
	}
	return json.Marshal(r)
}

// alive tells whether the record's network namespace still exists. When that
// cannot be seen it does: taking a VF from a running pod is worse than keeping
// one too long.
func (a *Attacher) alive(r Record) bool {
	ns, err := a.Kernel.OpenNetns(r.NetnsPath)
	switch {
	case err == nil:
		defer ns.Close()
		return ns.ID == r.Netns
	case errors.Is(err, host.ErrNotNetns):
		return false
	case errors.Is(err, fs.ErrNotExist):
		// Without the folder of the namespaces the agent lacks a mount, and then
		// it cannot see any.
		_, err := os.Stat(filepath.Dir(r.NetnsPath))
		return err != nil && !strings.HasPrefix(r.NetnsPath, "/proc/")
	}
	return true
}
