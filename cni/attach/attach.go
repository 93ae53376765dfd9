package attach

import (
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

	"github.com/sluice-network/sluice/internal/holder"
	"github.com/sluice-network/sluice/internal/host"
)

// Kernel is what attachments need of the kernel; *host.Attacher is it. A nil
// *host.Netns is the host's namespace.
type Kernel interface {
	VF(pciAddress string) (host.VFRef, error)
	VFSettings(vf host.VFRef) (host.VFSettings, error)
	SetVFSettings(ctx context.Context, vf host.VFRef, want host.VFSettings, required host.VFAttrs) error

	RDMADevice(pciAddress string) (name string, err error)
	RDMAExclusive() (bool, error)
	MoveRDMA(from *host.Netns, name string, to *host.Netns) error

	HostNetns() *host.Netns
	OpenNetns(path string) (*host.Netns, error)
	Links(ns *host.Netns) ([]host.Netdev, error)
	Link(ns *host.Netns, name string) (host.Netdev, error)
	ChangeLink(ctx context.Context, from *host.Netns, index int, c host.LinkChange) error
	AdoptMAC(ctx context.Context, l host.Netdev, mac net.HardwareAddr) error
	DeleteAltName(ns *host.Netns, index int, name string) error

	AddMacvlan(ctx context.Context, ns *host.Netns, parent host.Netdev, inPod bool, m host.Macvlan) error
	AddVeth(ctx context.Context, name string, ns *host.Netns, peer string, mtu int) error
	DeleteLink(ns *host.Netns, index int) error

	PrepareIPv6(ns *host.Netns, link string) error
	RefuseAdvertisedDefault(ns *host.Netns, link string) error
	AddAddress(ns *host.Netns, index int, address net.IPNet, asked bool) error
	WaitIPv6(ctx context.Context, ns *host.Netns, index int) error
	Addresses(ns *host.Netns, index int) ([]net.IPNet, error)
	AddRoute(ns *host.Netns, index int, r host.Route) error
	HasRoute(ns *host.Netns, index int, r host.Route) (bool, error)
	DefaultLink(ns *host.Netns) (string, error)
	HasDefaultRoute(ns *host.Netns, index int, v6 bool) (bool, error)
	AddSourceRule(ns *host.Netns, ip net.IP, table int) error
	HasSourceRule(ns *host.Netns, ip net.IP, table int) (bool, error)
	DeleteSourceRules(ns *host.Netns, table int) error
	KeepToOwnAddresses(ns *host.Netns, index int) error
	KeepsToOwnAddresses(ns *host.Netns, index int) (bool, error)
	AddNeighbour(ns *host.Netns, index int, ip net.IP, mac net.HardwareAddr) error
	Source(v6 bool) (net.IP, error)
	Probe(ctx context.Context, ns *host.Netns, link string, addresses []net.IPNet, wait time.Duration) (asked bool, err error)
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
	Enforcer  Enforcer // of network policy; nil for none
	Dir       string   // of the journal
	SriovCNI  string   // folder of sriov-cni's state, to take its attachments over; empty for none
	Log       logr.Logger

	// Allocated returns the pod, as package holder names it, that the kubelet has given
	// the device to, not ok when it has given it to none. Nil leaves a device to
	// whoever names it: there is no kubelet.
	Allocated func(ctx context.Context, deviceID string) (pod string, ok bool, err error)

	// RDMA tells whether the pod that is given the device can use RDMA with it, whose packets
	// go past the kernel. Nil is none.
	RDMA func(deviceID string) bool

	// Ready tells why no ADD can work, nil when one can. Nil is ready.
	Ready func() error

	// OnStep, unless nil, is called before each step of making and undoing an
	// attachment, with the step's name. Tests end the process in it.
	OnStep func(step string)
}

// Attacher makes and undoes attachments. It is safe for concurrent use: calls
// for one attachment or one device follow one another, others run side by side.
type Attacher struct {
	Options
	journal *journal
	locks   Locks
	answers answers
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
		o.Log.Error(nil, "A file of the journal is no record and was set aside; if it was of a VF, that keeps its settings until the node is configured anew", "file", path)
	}
	a := &Attacher{Options: o, journal: j}
	if o.SriovCNI != "" {
		for _, err := range a.adopt(o.SriovCNI) {
			o.Log.Error(err, "An attachment from before is not known; if its pod runs, its VF is returned as the kernel gives it back")
		}
	}
	if o.Enforcer != nil {
		o.Enforcer.Load(a.interfaces())
	}
	return a, nil
}

// Attached returns the settings that the VF was given at its PF for the pod it is
// attached to; ok is false while it is attached to none, or not yet, or by sriov-cni.
func (a *Attacher) Attached(pciAddress string) (settings host.VFSettings, ok bool) {
	r, held := a.journal.owner(pciAddress)
	return r.Settings, held && r.Phase == Attached && r.Adopted == nil
}

// Attachments are the pods that have attachments, in the order these were made.
func (a *Attacher) Attachments() []string {
	var pods []string
	for _, r := range a.journal.all() {
		pods = append(pods, r.holder())
	}
	return pods
}

// Holder returns the pod that has the device, as namespace/name, "" when its name is
// not known.
func (a *Attacher) Holder(deviceID string) (pod string, held bool) {
	r, held := a.journal.owner(deviceID)
	return r.Pod, held
}

// AttachedArgs returns the CNI_ARGS with which the device was attached, if it is.
func (a *Attacher) AttachedArgs(deviceID string) (args string, attached bool) {
	r, held := a.journal.owner(deviceID)
	return r.Args, held && r.Phase == Attached
}

// Phases counts the attachments by how far they have come.
func (a *Attacher) Phases() map[Phase]int {
	n := map[Phase]int{}
	for _, r := range a.journal.all() {
		n[r.Phase]++
	}
	return n
}

// Alive tells whether the path is still that of the network namespace.
func (a *Attacher) Alive(path string, id host.NetnsID) bool {
	return a.alive(Record{NetnsPath: path, Netns: id})
}

func (a *Attacher) step(name string) {
	if a.OnStep != nil {
		a.OnStep(name)
	}
}

// lock takes the lock of the attachment and then that of its device. A device's
// lock guards the records that name the device.
func (a *Attacher) lock(ctx context.Context, names ...string) (unlock func(), err error) {
	var unlocks []func()
	unlock = func() {
		for _, u := range slices.Backward(unlocks) {
			u()
		}
	}
	for _, name := range names {
		if name == "" {
			continue
		}
		u, err := a.locks.Lock(ctx, name)
		if err != nil {
			unlock()
			return nil, fail(types.ErrTryAgainLater, "wait for %s: %w", name, err)
		}
		unlocks = append(unlocks, u)
	}
	return unlock, nil
}

func keyLock(k Key) string { return "attachment of " + k.String() }

// deviceLock is no lock for a sub-interface without a slot: that has no device that
// anybody else could have.
func deviceLock(id string) string {
	if id == "" {
		return ""
	}
	return noun(id) + " " + id
}

func pfLock(pf string) string { return "PF " + pf }

// Add makes the device that the configuration names an interface of the pod and
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
	unlockDevice, err := a.lock(ctx, deviceLock(cfg.DeviceID))
	if err != nil {
		return nil, err
	}
	defer unlockDevice()
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
		if r.Device != cfg.DeviceID || r.Netns != ns.ID {
			return nil, fail(types.ErrInvalidNetworkConfig, "network %q: the attachment exists already with %s: DEL it first", cfg.Network, r.device())
		}
		return convert(r.Result, cfg.CNIVersion)
	}
	if err := a.finish(ctx, r, ns); err != nil {
		return nil, fail(types.ErrTryAgainLater, "network %q: undo an earlier attempt: %w", cfg.Network, err)
	}
	return nil, nil
}

// allocated makes sure that the device is for this pod: whoever may write a network
// definition can name any device in it, also one the kubelet has just promised to
// another pod, or will.
func (a *Attacher) allocated(ctx context.Context, cfg *Config) error {
	if a.Allocated == nil || cfg.Pod == "" || cfg.DeviceID == "" {
		return nil
	}
	pod, ok, err := a.Allocated(ctx, cfg.DeviceID)
	pooled := cfg.Macvlan != nil // a slot is nothing outside of one
	if !pooled {
		_, _, pooled = a.Baselines.Baseline(cfg.DeviceID)
	}
	switch {
	case err != nil:
		return fail(types.ErrTryAgainLater, "network %q: deviceID %s: %w", cfg.Network, cfg.DeviceID, err)
	case ok && pod != cfg.Pod && (cfg.PodUID == "" || pod != holder.Unnamed(cfg.PodUID)):
		return fail(CodeHeld, "network %q: deviceID %s: the %s is allocated to pod %s, not to %s: take deviceID out of the network definition", cfg.Network, cfg.DeviceID, noun(cfg.DeviceID), pod, cfg.Pod)
	case !ok && pooled:
		return fail(CodeHeld, "network %q: deviceID %s: the %s is in a pool and not allocated to pod %s: let the pod request the pool's resource, and take deviceID out of the network definition", cfg.Network, cfg.DeviceID, noun(cfg.DeviceID), cfg.Pod)
	}
	return nil
}

// claim makes sure that nobody has the device. An owner whose network namespace has
// ended has lost it.
func (a *Attacher) claim(ctx context.Context, cfg *Config) error {
	r, held := a.journal.owner(cfg.DeviceID)
	if !held {
		return nil
	}
	if a.alive(r) {
		return fail(CodeHeld, "network %q: deviceID %s: the %s is held by %s", cfg.Network, cfg.DeviceID, noun(cfg.DeviceID), r.holder())
	}
	err := a.release(ctx, r, nil)
	if r, held = a.journal.owner(cfg.DeviceID); held {
		return fail(CodeHeld, "network %q: deviceID %s: the %s was held by %s, which is gone, and cannot be taken back yet: %w",
			cfg.Network, cfg.DeviceID, noun(cfg.DeviceID), r.holder(), err)
	}
	if err != nil {
		a.Log.Error(err, "Cannot finish an attachment whose pod is gone", "attachment", r.Key)
	}
	return nil
}

// attach does the work of Add on a device that is free.
func (a *Attacher) attach(ctx context.Context, key Key, cfg *Config, req Request, ns *host.Netns) ([]byte, error) {
	r := Record{
		Key: key, Pod: cfg.Pod, Device: cfg.DeviceID, Phase: Intent, NetnsPath: req.Netns, Netns: ns.ID,
		IPAM: cfg.IPAM, Config: req.Stdin, Args: req.Args, Path: req.Path,
	}
	if cfg.HostInterface {
		r.HostLink, r.HostRoutes = key.hostLink(), cfg.HostRoutes
	}
	create, err := a.kind(cfg.Macvlan).prepare(cfg, ns, &r)
	if err != nil {
		return nil, err
	}
	if cfg.IPAM != "" {
		if err = a.IPAM.Find(cfg.IPAM, req); err != nil {
			return nil, fmt.Errorf("network %q: ipam.type %q: %w", cfg.Network, cfg.IPAM, err)
		}
	}

	if err = a.definition(ctx, &r, cfg); err != nil {
		return nil, err
	}

	a.step("add: write intent")
	r.Generation = a.journal.next()
	if err = a.journal.put(r); err != nil {
		return nil, fail(types.ErrIOFailure, "network %q: %w", cfg.Network, err)
	}
	undo := r
	undo.IPAM = "" // until it has been asked
	result, err := a.make(ctx, &undo, r, cfg, create, ns)
	if err == nil {
		return result, nil
	}
	err = fmt.Errorf("network %q: %s: %w", cfg.Network, cfg.device(), err)
	rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if undone := a.release(rest, undo, ns); undone != nil {
		return nil, fail(CodeNotUndone, "%w; then undo failed: %w", err, undone)
	}
	return nil, err
}

// make does everything that has to be undone when it fails. undo tells what.
func (a *Attacher) make(ctx context.Context, undo *Record, r Record, cfg *Config, create create, ns *host.Netns) ([]byte, error) {
	if err := a.deny(ctx, r, ns); err != nil {
		return nil, refused("%w", err)
	}
	link, err := create(ctx, r, ns)
	if err != nil {
		return nil, refused("%w", err)
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
	iface := &types100.Interface{Name: r.IfName, Mac: r.MAC}
	if host.ValidPCIAddress(r.Device) {
		iface.PciID = r.Device
	}
	if link.Index != 0 {
		iface.Mtu, iface.Sandbox = link.MTU, r.NetnsPath
		if err := a.address(ctx, r, cfg, ns, link, result); err != nil {
			return nil, refused("%w", err)
		}
		if r.HostLink != "" {
			if err := a.connectHost(ctx, r, link.MTU, ns, result); err != nil {
				return nil, refused("%w", err)
			}
		}
	}
	if err := a.enforce(ctx, r, ns, result.IPs); err != nil {
		return nil, refused("%w", err)
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
	if link.Index != 0 && len(result.IPs) > 0 {
		a.step("add: announce")
		// Neighbours without it find out by themselves, later.
		if err := a.Kernel.Announce(ctx, ns, r.IfName, nets(result.IPs)); err != nil {
			a.Log.Error(err, "Cannot announce the addresses of an interface", "attachment", r.Key)
		}
	}
	a.step("add: answer")
	return answer, nil
}

// address puts the addresses and routes of the result on the link.
func (a *Attacher) address(ctx context.Context, r Record, cfg *Config, ns *host.Netns, link host.Netdev, result *types100.Result) error {
	if !r.Only {
		if err := a.Kernel.RefuseAdvertisedDefault(ns, link.Name); err != nil {
			return err
		}
	}
	if len(result.IPs) == 0 && len(result.Routes) == 0 {
		return nil
	}
	prepared, wait6 := false, false
	for _, ip := range result.IPs {
		if ip.Address.IP.To4() == nil {
			wait6 = wait6 || ip.Gateway != nil
			if !prepared {
				if err := a.Kernel.PrepareIPv6(ns, link.Name); err != nil {
					return err
				}
				prepared = true
			}
		}
	}
	asked := false
	if cfg.ConflictProbe > 0 {
		a.step("add: probe")
		var err error
		asked, err = a.Kernel.Probe(ctx, ns, link.Name, nets(result.IPs), cfg.ConflictProbe)
		if conflict := (*host.AddressConflictError)(nil); errors.As(err, &conflict) {
			return fail(CodeConflict, "probe on %s: %w: give that station another address, or exclude this one from the network's range", link.Name, err)
		}
		if err != nil {
			return err
		}
	}
	a.step("add: set addresses")
	for _, ip := range result.IPs {
		if err := a.Kernel.AddAddress(ns, link.Index, ip.Address, asked); err != nil {
			return err
		}
	}
	if wait6 && !asked {
		wait, cancel := context.WithTimeout(ctx, dadTimeout)
		defer cancel()
		if err := a.Kernel.WaitIPv6(wait, ns, link.Index); err != nil {
			return err
		}
	}
	a.step("add: set routes")
	return a.route(r, ns, link, result)
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
	mac, _ := net.ParseMAC(r.MAC) // written by us
	return Request{Command: c, ContainerID: r.ContainerID, Netns: r.NetnsPath, IfName: r.IfName, Args: r.Args, Path: r.Path, Stdin: r.Config, MAC: mac}
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
// cannot be seen it does: taking a device from a running pod is worse than keeping
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
