package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

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
	keys, err := object(req.Stdin)
	if err != nil {
		return fail(types.ErrDecodingFailure, "read network configuration: %w", err)
	}
	key := Key{ContainerID: req.ContainerID, IfName: req.IfName}
	_ = json.Unmarshal(keys["name"], &key.Network)
	unlock, err := a.lock(ctx, keyLock(key))
	if err != nil {
		return err
	}
	defer unlock()
	r, ok := a.journal.get(key)
	if ok {
		return a.finish(ctx, r, ns)
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

// finish takes the lock of the record's VF and releases it. The record may have
// changed while waiting for the lock.
func (a *Attacher) finish(ctx context.Context, r Record, ns *host.Netns) error {
	unlock, err := a.lock(ctx, vfLock(r.VF))
	if err != nil {
		return err
	}
	defer unlock()
	r, ok := a.journal.get(r.Key)
	if !ok {
		return nil
	}
	if err := a.release(ctx, r, ns); err != nil {
		return fmt.Errorf("network %q: deviceID %s: %w", r.Network, r.VF, err)
	}
	return nil
}

// release brings the VF home, gives it its baseline, releases the address and
// forgets the record. It can be repeated after any failure, and after the death
// of the agent at any point. ns may be nil. The caller has the VF's lock.
//
// The order matters: out of the pod first, so that the pod never sees the
// baseline's settings and never uses an address that is free again.
func (a *Attacher) release(ctx context.Context, r Record, ns *host.Netns) error {
	if r.Phase == Attached {
		// From here on it is half an attachment, also for the next agent.
		a.step("del: write intent")
		r.Phase, r.Result = Intent, nil
		if err := a.journal.put(r); err != nil {
			return fail(types.ErrIOFailure, "%w", err)
		}
	}
	owner, owned := a.journal.owner(r.VF)
	if owned && owner.Generation == r.Generation {
		if err := a.restore(ctx, r, ns); err != nil {
			return err
		}
	}
	if r.IPAM != "" {
		a.step("del: ask IPAM")
		if _, err := a.IPAM.Exec(ctx, r.IPAM, r.request(Del)); err != nil {
			// The VF need not wait for the address.
			r.Phase, r.Result = Returned, nil
			return errors.Join(err, a.journal.put(r))
		}
	}
	a.step("del: forget")
	if err := a.journal.remove(r.Key); err != nil {
		return fail(types.ErrIOFailure, "%w", err)
	}
	a.step("del: answer")
	return nil
}

// restore brings the record's VF home and gives it its baseline.
func (a *Attacher) restore(ctx context.Context, r Record, ns *host.Netns) error {
	a.step("del: bring link home")
	vf, err := a.bringHome(ctx, r, ns)
	if errors.Is(err, host.ErrNoVF) {
		return nil // nothing left that could have a state
	}
	if err != nil {
		return refused("take the VF back: %w", err)
	}
	a.step("del: reset VF")
	if err := a.setVF(ctx, vf, r.Baseline.Settings(), 0); err != nil {
		return refused("reset the VF: %w", err)
	}
	if r.Userspace {
		return nil
	}
	a.step("del: reset link")
	if err := a.resetLink(ctx, vf, r.Baseline); err != nil {
		return refused("reset the VF's link: %w", err)
	}
	return nil
}

// bringHome makes sure that the VF's netdev, if its driver makes one, is in the
// host's namespace, and returns the VF as it is then.
func (a *Attacher) bringHome(ctx context.Context, r Record, ns *host.Netns) (host.VFRef, error) {
	pods := []*host.Netns{ns}
	if byPath, err := a.Kernel.OpenNetns(r.NetnsPath); err == nil {
		defer byPath.Close()
		if byPath.ID == r.Netns {
			pods = append(pods, byPath)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, homeTimeout)
	defer cancel()
	for {
		vf, err := a.Kernel.VF(r.VF)
		if err != nil || vf.Name != "" || vf.Driver == "" || vf.Userspace {
			return vf, err
		}
		found := false
		for _, pod := range pods {
			if pod == nil || found {
				continue
			}
			if found, err = a.moveHome(ctx, r, pod); err != nil {
				return vf, err
			}
		}
		if found {
			continue
		}
		// The kernel gives links back some time after a namespace has ended.
		select {
		case <-ctx.Done():
			return vf, fmt.Errorf("its link is neither in the host's network namespace nor in the pod's (%s); something may keep that alive, or the link was moved on: %w", r.NetnsPath, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// moveHome moves the VF's link from the pod's namespace to the host's, whatever
// its name is there by now.
func (a *Attacher) moveHome(ctx context.Context, r Record, pod *host.Netns) (found bool, err error) {
	links, err := a.Kernel.Links(pod)
	if err != nil {
		return false, err
	}
	i := slices.IndexFunc(links, func(l host.Netdev) bool { return l.PCIAddress == r.VF })
	if i < 0 {
		return false, nil
	}
	// A name given in the pod may be taken in the host, and would hold up the move.
	for _, alt := range links[i].AltNames {
		if !slices.Contains(r.Baseline.AltNames, alt) {
			if err := a.Kernel.DeleteAltName(pod, links[i].Index, alt); err != nil {
				return true, err
			}
		}
	}
	change := host.LinkChange{To: a.Kernel.HostNetns(), Name: r.Baseline.Name, State: host.SetDown}
	if err := a.Kernel.ChangeLink(ctx, pod, links[i].Index, change); err != nil {
		return true, fmt.Errorf("move %s from the pod to the host as %s: %w", links[i].Name, r.Baseline.Name, err)
	}
	return true, nil
}

// resetLink gives the VF's netdev, which is in the host's namespace, its baseline.
func (a *Attacher) resetLink(ctx context.Context, vf host.VFRef, b Baseline) error {
	if vf.Name == "" {
		return nil // unbound meanwhile
	}
	link, err := a.Kernel.Link(nil, vf.Name)
	if err != nil {
		return err
	}
	change, changed := host.LinkChange{}, link.Up || link.Name != b.Name || link.MTU != b.MTU
	if link.Up {
		change.State = host.SetDown
	}
	if link.Name != b.Name {
		change.Name = b.Name
	}
	if link.MTU != b.MTU {
		change.MTU = b.MTU
	}
	if changed {
		if err = a.Kernel.ChangeLink(ctx, nil, link.Index, change); err != nil {
			return fmt.Errorf("set %s to name %s and MTU %d: %w", link.Name, b.Name, b.MTU, err)
		}
		if link, err = a.Kernel.Link(nil, b.Name); err != nil {
			return err
		}
	}
	for _, alt := range link.AltNames {
		if !slices.Contains(b.AltNames, alt) {
			if err = a.Kernel.DeleteAltName(nil, link.Index, alt); err != nil {
				return err
			}
		}
	}
	mac, err := net.ParseMAC(b.MAC)
	if err != nil {
		return fmt.Errorf("baseline MAC %q: %w", b.MAC, err)
	}
	return a.Kernel.AdoptMAC(ctx, link, mac)
}

// Recover finishes what an earlier agent left: attachments that were being made
// or undone are undone, attachments whose pod is gone are released. The others
// stay as they are. It goes on after a failure; a record that failed is kept.
func (a *Attacher) Recover(ctx context.Context) error {
	records := a.journal.all()
	errs := make([]error, len(records))
	// Side by side, for one may wait for a namespace to end.
	var g errgroup.Group
	g.SetLimit(8)
	for i, r := range records {
		g.Go(func() error {
			if r.Phase == Attached && a.alive(r) {
				return nil
			}
			if err := a.collect(ctx, r); err != nil {
				errs[i] = fmt.Errorf("recover %s: %w", r.Key, err)
			}
			return nil
		})
	}
	_ = g.Wait()
	return errors.Join(errs...)
}

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
		if err := a.collect(ctx, r); err != nil {
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

func (a *Attacher) collect(ctx context.Context, r Record) error {
	unlock, err := a.lock(ctx, keyLock(r.Key))
	if err != nil {
		return err
	}
	defer unlock()
	return a.finish(ctx, r, nil)
}

// Status tells whether ADD can work: the configuration is valid and its IPAM
// plugin is ready.
func (a *Attacher) Status(ctx context.Context, req Request) error {
	req.Command = Status
	cfg, err := Parse(req)
	if err != nil || cfg.IPAM == "" {
		return err
	}
	_, err = a.IPAM.Exec(ctx, cfg.IPAM, req)
	var coded *codedError
	if errors.As(err, &coded) && coded.code == CodeIPAM {
		return fail(types.ErrPluginNotAvailable, "network %q: %w", cfg.Network, err)
	}
	return err
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
	unlock, err := a.lock(ctx, keyLock(key), vfLock(cfg.DeviceID))
	if err != nil {
		return err
	}
	defer unlock()
	r, ok := a.journal.get(key)
	if !ok || r.Phase != Attached || r.VF != cfg.DeviceID {
		return fail(CodeCheckFailed, "network %q: VF %s is not attached as %s to container %s", cfg.Network, cfg.DeviceID, req.IfName, req.ContainerID)
	}
	if ns == nil {
		if ns, err = a.Kernel.OpenNetns(req.Netns); err != nil {
			return fail(types.ErrInvalidNetNS, "network %q: %w", cfg.Network, err)
		}
		defer ns.Close()
	}
	wrong, err := a.compare(r, ns, prev)
	if err != nil {
		return fail(CodeKernel, "network %q: %w", cfg.Network, err)
	}
	if len(wrong) > 0 {
		return fail(CodeCheckFailed, "network %q: deviceID %s: %w", cfg.Network, cfg.DeviceID, errors.Join(wrong...))
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
func (a *Attacher) compare(r Record, ns *host.Netns, prev *types100.Result) (wrong []error, err error) {
	differs := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }
	vf, err := a.Kernel.VF(r.VF)
	if errors.Is(err, host.ErrNoVF) {
		return []error{err}, nil
	}
	if err != nil {
		return nil, err
	}
	have, err := a.Kernel.VFSettings(vf)
	if err != nil {
		return nil, err
	}
	for _, d := range host.DiffVFSettings(have, r.Settings) {
		differs("%s", d)
	}
	if r.Userspace {
		return wrong, nil
	}
	if ns.ID != r.Netns {
		differs("network namespace %s is not the one the VF was attached to", r.NetnsPath)
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
	if link.PCIAddress != r.VF {
		differs("interface %s is not the VF's", r.IfName)
	}
	if link.MAC.String() != r.MAC {
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
	for _, route := range own.Routes {
		has, err := a.Kernel.HasRoute(ns, link.Index, routeOf(route))
		if err != nil {
			return nil, err
		}
		if !has {
			differs("route to %s via %s is missing", route.Dst.String(), r.IfName)
		}
	}
	return wrong, nil
}
