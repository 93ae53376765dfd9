package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sync/errgroup"

	"github.com/sluice-network/sluice/internal/host"
)

// Del undoes an attachment, whatever is left of it. ns is the pod's namespace,
// nil when it is gone or unknown. What does not exist is deleted successfully.
func (a *Attacher) Del(ctx context.Context, req Request, ns *host.Netns) error {
	req.Command = Del
	if err := checkEnvironment(req); err != nil {
		return err
	}
	if _, err := object(req.Stdin); err != nil {
		return fail(types.ErrDecodingFailure, "read network configuration: %w", err)
	}
	key := KeyOf(req)
	unlock, err := a.lock(ctx, keyLock(key))
	if err != nil {
		return err
	}
	defer unlock()
	r, ok := a.journal.get(key)
	if ok {
		if err := a.finish(ctx, r, ns); err != nil || r.Adopted == nil {
			return err
		}
	}
	// Nothing of ours is left. Of the address there may be: a configuration that
	// ADD could have accepted is passed on.
	cfg, err := Parse(req)
	if err != nil || cfg.IPAM == "" {
		return nil
	}
	_, err = a.IPAM.Exec(ctx, cfg.IPAM, req)
	return err
}

// finish takes the lock of the record's device and releases it. The record may have
// changed while waiting for the lock.
func (a *Attacher) finish(ctx context.Context, r Record, ns *host.Netns) error {
	unlock, err := a.lock(ctx, deviceLock(r.Device))
	if err != nil {
		return err
	}
	defer unlock()
	r, ok := a.journal.get(r.Key)
	if !ok {
		return nil
	}
	if err := a.release(ctx, r, ns); err != nil {
		return fmt.Errorf("network %q: %s: %w", r.Network, r.device(), err)
	}
	return nil
}

// release takes the device back, releases the address and
// forgets the record. It can be repeated after any failure, and after the death
// of the agent at any point. ns may be nil. The caller has the device's lock.
//
// The order matters: out of the pod first, so that the pod never sees the
// baseline's settings and never uses an address that is free again. DHCP alone goes
// before: it tells its server over the link, and the socket of its daemon keeps a
// namespace alive that has ended, and the VF in it from coming home.
func (a *Attacher) release(ctx context.Context, r Record, ns *host.Netns) error {
	if r.Phase == Attached {
		// From here on it is half an attachment, also for the next agent.
		a.step("del: write intent")
		r.Phase, r.Result = Intent, nil
		if err := a.journal.put(r); err != nil {
			return fail(types.ErrIOFailure, "%w", err)
		}
	}
	a.leave(r)
	released := false
	if r.IPAM == dhcpIPAM && r.Phase != Returned {
		a.step("del: ask DHCP")
		_, err := a.IPAM.Exec(ctx, r.IPAM, r.request(Del))
		released = err == nil // if not, it is asked again, and its error told, when the device is back
	}
	owner, owned := a.journal.owner(r.Device)
	if owned && owner.Generation == r.Generation || r.Device == "" && r.Phase != Returned {
		if err := a.disconnectHost(r); err != nil {
			return err
		}
		if err := a.kind(r.Macvlan).restore(ctx, r, ns); err != nil {
			return err
		}
		if err := a.unroute(r, ns); err != nil {
			return refused("%w", err)
		}
	}
	if err := a.unenforce(ctx, r, ns); err != nil {
		return err
	}
	if r.IPAM != "" && !released {
		a.step("del: ask IPAM")
		if _, err := a.IPAM.Exec(ctx, r.IPAM, r.request(Del)); err != nil {
			// The device need not wait for the address.
			r.Phase, r.Result = Returned, nil
			return errors.Join(err, a.journal.put(r))
		}
	}
	if err := r.disown(); err != nil {
		return fail(types.ErrIOFailure, "forget what sriov-cni kept: %w", err)
	}
	a.step("del: forget")
	if err := a.journal.remove(r.Key); err != nil {
		return fail(types.ErrIOFailure, "%w", err)
	}
	a.step("del: answer")
	return nil
}

// sideBySide is how many are recovered at a time, for one may wait for a namespace to end.
var sideBySide = 8

// Recover finishes what nobody may ask for any more: attachments that an earlier
// agent was making or undoing, those whose pod is gone, and addresses that could not
// be released. The others stay as they are, but that attachments taken over from sriov-cni
// get their pod's name. It can be called at any time, and goes on
// after a failure; a record that failed is kept.
func (a *Attacher) Recover(ctx context.Context) error {
	records := a.journal.all()
	errs := make([]error, len(records), len(records)+1)
	var g errgroup.Group
	g.SetLimit(sideBySide)
	for i, r := range records {
		g.Go(func() error {
			if !a.garbage(r) {
				return nil
			}
			if err := a.collect(ctx, r, a.garbage); err != nil {
				errs[i] = fmt.Errorf("recover %s: %w", r.Key, err)
			}
			return nil
		})
	}
	_ = g.Wait()
	return errors.Join(append(errs, a.identify(ctx))...)
}

// Orphan tells whether a device is held by a pod that is gone.
func (a *Attacher) Orphan(deviceID string) bool {
	r, held := a.journal.owner(deviceID)
	return held && r.Phase == Attached && !a.alive(r)
}

func (a *Attacher) garbage(r Record) bool { return r.Phase != Attached || !a.alive(r) }

// GC releases the attachments of the request's network that are not in its list
// of valid ones, and has the IPAM plugin do the same.
func (a *Attacher) GC(ctx context.Context, req Request) error {
	req.Command = GC
	cfg, err := Parse(req)
	if err != nil {
		return err
	}
	if cfg.Valid == nil {
		return fail(types.ErrInvalidNetworkConfig, `network %q: key "cni.dev/valid-attachments" is missing: nothing is collected`, cfg.Network)
	}
	var errs []error
	for _, r := range a.journal.all() {
		if r.Network != cfg.Network || slices.Contains(cfg.Valid, types.GCAttachment{ContainerID: r.ContainerID, IfName: r.IfName}) {
			continue
		}
		if err := a.collect(ctx, r, func(Record) bool { return true }); err != nil {
			errs = append(errs, err)
		}
	}
	if cfg.IPAM != "" {
		if _, err := a.IPAM.Exec(ctx, cfg.IPAM, req); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// collect releases the record if it is still garbage when its turn comes: a call may
// be working on it, or have made another of the same key.
func (a *Attacher) collect(ctx context.Context, r Record, garbage func(Record) bool) error {
	unlock, err := a.lock(ctx, keyLock(r.Key))
	if err != nil {
		return err
	}
	defer unlock()
	if now, ok := a.journal.get(r.Key); !ok || now.Generation != r.Generation || !garbage(now) {
		return nil
	}
	return a.finish(ctx, r, nil)
}

// Check compares the attachment with the kernel: link, addresses and routes in
// the pod, settings at the PF.
func (a *Attacher) Check(ctx context.Context, req Request, ns *host.Netns) error {
	req.Command = Check
	cfg, err := Parse(req)
	if err != nil {
		return err
	}
	if len(cfg.PrevResult) == 0 {
		return fail(types.ErrInvalidNetworkConfig, "network %q: prevResult is missing", cfg.Network)
	}
	prev, err := previous(cfg)
	if err != nil {
		return fail(types.ErrDecodingFailure, "network %q: read prevResult: %w", cfg.Network, err)
	}
	key := Key{cfg.Network, req.ContainerID, req.IfName}
	unlock, err := a.lock(ctx, keyLock(key), deviceLock(cfg.DeviceID))
	if err != nil {
		return err
	}
	defer unlock()
	r, ok := a.journal.get(key)
	if !ok || r.Phase != Attached || r.Device != cfg.DeviceID {
		return fail(CodeCheckFailed, "network %q: %s is not attached as %s to container %s", cfg.Network, cfg.device(), req.IfName, req.ContainerID)
	}
	if r.Adopted != nil {
		return nil // what sriov-cni made of the configuration it does not tell
	}
	if ns == nil {
		if ns, err = a.Kernel.OpenNetns(req.Netns); err != nil {
			return fail(types.ErrInvalidNetNS, "network %q: %w", cfg.Network, err)
		}
		defer ns.Close()
	}
	wrong, err := a.compare(ctx, r, ns, prev)
	if err != nil {
		return fail(CodeKernel, "network %q: %w", cfg.Network, err)
	}
	if len(wrong) > 0 {
		return fail(CodeCheckFailed, "network %q: %s: %w", cfg.Network, cfg.device(), errors.Join(wrong...))
	}
	if r.IPAM == "" {
		return nil
	}
	_, err = a.IPAM.Exec(ctx, r.IPAM, req)
	return err
}

func previous(cfg *Config) (*types100.Result, error) {
	conf := types.PluginConf{CNIVersion: cfg.CNIVersion}
	if err := json.Unmarshal(cfg.PrevResult, &conf.RawPrevResult); err != nil {
		return nil, err
	}
	if err := version.ParsePrevResult(&conf); err != nil {
		return nil, err
	}
	return types100.NewResultFromResult(conf.PrevResult)
}

// compare lists what differs from what was attached.
func (a *Attacher) compare(ctx context.Context, r Record, ns *host.Netns, prev *types100.Result) (wrong []error, err error) {
	differs := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }
	k := a.kind(r.Macvlan)
	if wrong, err = k.differences(r); err != nil || r.Userspace {
		return wrong, err
	}
	if ns.ID != r.Netns {
		differs("network namespace %s is not the one of the attachment", r.NetnsPath)
	}
	links, err := a.Kernel.Links(ns)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(links, func(l host.Netdev) bool { return l.Name == r.IfName })
	if i < 0 {
		differs("interface %s is missing in the pod", r.IfName)
		return wrong, nil
	}
	link := links[i]
	if err := k.is(link, r); err != nil {
		differs("interface %s %w", r.IfName, err)
	}
	if link.MAC.String() != r.MAC && !r.Settings.Trust { // a trusted VF's is the pod's to change
		differs("interface %s has MAC %s, not %s", r.IfName, link.MAC, r.MAC)
	}
	if link.MTU != r.MTU {
		differs("interface %s has MTU %d, not %d", r.IfName, link.MTU, r.MTU)
	}
	if !link.Up {
		differs("interface %s is down", r.IfName)
	}
	addresses, err := a.Kernel.Addresses(ns, link.Index)
	if err != nil {
		return nil, err
	}
	for _, ip := range prev.IPs {
		if ip.Interface != nil && *ip.Interface < len(prev.Interfaces) && *ip.Interface >= 0 && prev.Interfaces[*ip.Interface].Name != r.IfName {
			continue // of another plugin of the chain
		}
		if !slices.ContainsFunc(addresses, func(n net.IPNet) bool { return n.String() == ip.Address.String() }) {
			differs("interface %s lacks address %s", r.IfName, ip.Address.String())
		}
	}
	// The routes of prevResult may be another plugin's; those of our own result are ours.
	var own types100.Result
	if err := json.Unmarshal(r.Result, &own); err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	for _, differences := range []func() ([]error, error){
		func() ([]error, error) { return a.policyDifferences(ctx, r, ns) },
		func() ([]error, error) { return a.routeDifferences(r, ns, link, &own) },
		func() ([]error, error) { return a.hostDifferences(r, ns, &own) },
	} {
		more, err := differences()
		if err != nil {
			return nil, err
		}
		wrong = append(wrong, more...)
	}
	return wrong, nil
}
