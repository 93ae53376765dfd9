package attach

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/sluice-network/sluice/internal/host"
)

// vfs are the VFs, as a kind of devices: settings at the PF, and a netdev that
// moves to the pod and back.
type vfs struct{ *Attacher }

const ofRDMAPool = "the VF is of a pool with isRdma"

// prepare implements kind.
func (a vfs) prepare(cfg *Config, ns *host.Netns, r *Record) (create, error) {
	vf, link, stale, err := a.inspect(cfg, ns, r)
	if err != nil {
		return nil, err
	}
	r.Userspace = vf.Userspace
	switch {
	case vf.Userspace:
		r.Bypass = "driver " + vf.Driver + " gives the VF to user space"
	case cfg.RDMA:
		r.Bypass = "rdma is true"
	case a.RDMA != nil && a.RDMA(cfg.DeviceID):
		r.Bypass = ofRDMAPool
	}
	if r.Baseline, err = a.baseline(vf, link); err != nil {
		return nil, refusal(cfg, CodeKernel, "%w", err)
	}
	r.Baseline.AltNames = slices.DeleteFunc(r.Baseline.AltNames, func(n string) bool { return slices.Contains(stale, n) })
	var asked host.VFAttrs
	r.Settings, asked = cfg.Settings(r.Baseline)
	r.MAC, r.MTU = r.Settings.MAC.String(), r.Baseline.MTU
	if cfg.MTU != 0 {
		r.MTU = cfg.MTU
	}
	if r.RDMA, err = a.rdmaDevice(cfg); err != nil {
		return nil, err
	}
	if vf.Representor != "" && r.Settings.LinkState != host.LinkDisable {
		representor, err := a.Kernel.Link(nil, vf.Representor)
		if err != nil {
			return nil, refusal(cfg, CodeKernel, "look at the VF's representor: %w", err)
		}
		if !representor.Up {
			r.Representor = vf.Representor
		}
	}
	r.Promisc, r.AllMulti = cfg.Promisc, cfg.AllMulti
	return func(ctx context.Context, r Record, ns *host.Netns) (host.Netdev, error) {
		a.step("add: set VF")
		if err := a.setVF(ctx, vf, r.Settings, asked); err != nil {
			return host.Netdev{}, err
		}
		if r.Representor != "" {
			a.step("add: set up representor")
			if err := a.setRepresentor(ctx, r.Representor, host.SetUp); err != nil {
				return host.Netdev{}, err
			}
		}
		if r.Userspace {
			return host.Netdev{}, nil
		}
		if r.RDMA != "" {
			a.step("add: move RDMA device")
			if err := a.Kernel.MoveRDMA(nil, r.RDMA, ns); err != nil {
				return host.Netdev{}, err
			}
		}
		a.step("add: move link")
		return a.move(ctx, r, link, stale, ns)
	}, nil
}

// inspect finds the VF and its link and checks that the link can go to the pod
// under the wanted name. stale are alternative names of the link that stand in
// the way and that no one else has.
func (a vfs) inspect(cfg *Config, ns *host.Netns, r *Record) (vf host.VFRef, link host.Netdev, stale []string, err error) {
	bad := func(code uint, format string, args ...any) error { return refusal(cfg, code, format, args...) }
	vf, err = a.Kernel.VF(cfg.DeviceID)
	switch {
	case errors.Is(err, host.ErrNoVF):
		return vf, link, nil, bad(types.ErrInvalidNetworkConfig, "%w", err)
	case err != nil:
		return vf, link, nil, bad(CodeUnusable, "%w", err)
	case vf.Driver == "":
		return vf, link, nil, bad(CodeUnusable, "the VF has no driver: bind one")
	case vf.Userspace && cfg.HostInterface:
		return vf, link, nil, bad(types.ErrInvalidNetworkConfig, "hostInterface is set, and the VF has no interface that it could stand beside: its driver is %s", vf.Driver)
	case vf.Userspace:
		return vf, link, nil, nil
	case vf.Name == "":
		return vf, link, nil, bad(CodeUnusable, "driver %s has no netdev for the VF in the host's network namespace: a container that is not known here may have it", vf.Driver)
	}
	if link, err = a.Kernel.Link(nil, vf.Name); err != nil {
		return vf, link, nil, bad(CodeUnusable, "%w", err)
	}
	others, err := a.taken(cfg, ns, r.IfName)
	if err != nil {
		return vf, link, nil, err
	}
	r.Only = only(others)
	for _, alt := range link.AltNames {
		// The kernel moves a link with all its names or not at all.
		if i := slices.IndexFunc(others, func(o host.Netdev) bool { return o.Has(alt) }); i >= 0 {
			return vf, link, nil, bad(CodeNameTaken, "alternative name %s of %s is a name of %s in the pod already", alt, vf.Name, others[i].Name)
		}
		if alt == r.IfName {
			stale = append(stale, alt)
		}
	}
	return vf, link, stale, nil
}

// baseline is the state the VF comes back to: its pool's, or for a VF that is
// in no pool the MAC and MTU it has now.
func (a vfs) baseline(vf host.VFRef, link host.Netdev) (Baseline, error) {
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

// setVF changes a VF through its PF, one VF of a PF after the other: firmware
// and mailbox of a PF are shared, and some drivers fail calls that overlap.
func (a vfs) setVF(ctx context.Context, vf host.VFRef, want host.VFSettings, asked host.VFAttrs) error {
	unlock, err := a.lock(ctx, pfLock(vf.PF))
	if err != nil {
		return err
	}
	defer unlock()
	return a.Kernel.SetVFSettings(ctx, vf, want, asked)
}

// setRepresentor sets a VF's representor up, without which the VF has no link, or down.
func (a vfs) setRepresentor(ctx context.Context, name string, state host.AdminState) error {
	link, err := a.Kernel.Link(nil, name)
	if err == nil {
		err = a.Kernel.ChangeLink(ctx, nil, link.Index, host.LinkChange{State: state})
	}
	if err != nil {
		return fmt.Errorf("change the VF's representor %s: %w", name, err)
	}
	return nil
}

// move takes the link from the host to the pod, complete and up, and returns it
// as it is there.
func (a vfs) move(ctx context.Context, r Record, link host.Netdev, stale []string, ns *host.Netns) (host.Netdev, error) {
	for _, alt := range stale {
		if err := a.Kernel.DeleteAltName(nil, link.Index, alt); err != nil {
			return link, err
		}
	}
	change := host.LinkChange{To: ns, Name: r.IfName, State: host.SetUp, Promisc: r.Promisc, AllMulti: r.AllMulti}
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

// restore implements kind: the VF comes home and gets its baseline.
func (a vfs) restore(ctx context.Context, r Record, ns *host.Netns) error {
	if mac, mtu, ok := a.Baselines.Baseline(r.Device); ok && len(mac) > 0 && r.Adopted != nil {
		// sriov-cni keeps what it found, which may be what the pod before had.
		r.Baseline.MAC, r.Baseline.MTU = mac.String(), cmp.Or(mtu, r.Baseline.MTU)
	}
	if err := a.bringRDMAHome(ctx, r, ns); err != nil {
		return refused("take the VF's RDMA device back: %w", err)
	}
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
	if r.Representor != "" && r.Representor == vf.Representor {
		a.step("del: set down representor")
		if err := a.setRepresentor(ctx, r.Representor, host.SetDown); err != nil {
			return refused("%w", err)
		}
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
func (a vfs) bringHome(ctx context.Context, r Record, ns *host.Netns) (host.VFRef, error) {
	pods, done := a.namespaces(r, ns)
	defer done()
	ctx, cancel := context.WithTimeout(ctx, homeTimeout)
	defer cancel()
	for {
		vf, err := a.Kernel.VF(r.Device)
		if err != nil || vf.Name != "" || vf.Driver == "" || vf.Userspace {
			return vf, err
		}
		found := false
		for _, pod := range pods {
			if found {
				break
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

// namespaces are those that the record's pod may be in: ns, unless nil, and the one at
// the record's path if it is still the pod's.
func (a vfs) namespaces(r Record, ns *host.Netns) (pods []*host.Netns, done func()) {
	if ns != nil {
		pods = append(pods, ns)
	}
	byPath, err := a.Kernel.OpenNetns(r.NetnsPath)
	if err != nil {
		return pods, func() {}
	}
	if byPath.ID == r.Netns {
		pods = append(pods, byPath)
	}
	return pods, byPath.Close
}

// moveHome moves the VF's link from the pod's namespace to the host's, whatever
// its name is there by now.
func (a vfs) moveHome(ctx context.Context, r Record, pod *host.Netns) (found bool, err error) {
	links, err := a.Kernel.Links(pod)
	if err != nil {
		return false, err
	}
	i := slices.IndexFunc(links, func(l host.Netdev) bool { return l.PCIAddress == r.Device })
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
func (a vfs) resetLink(ctx context.Context, vf host.VFRef, b Baseline) error {
	if vf.Name == "" {
		return nil // unbound meanwhile
	}
	link, err := a.Kernel.Link(nil, vf.Name)
	if err != nil {
		return err
	}
	change, changed := host.LinkChange{}, link.Up || link.Name != b.Name || link.MTU != b.MTU || link.Promisc || link.AllMulti
	if link.Promisc || link.AllMulti {
		change.Promisc, change.AllMulti = new(bool), new(bool)
	}
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

// differences implements kind.
func (a vfs) differences(r Record) (wrong []error, err error) {
	vf, err := a.Kernel.VF(r.Device)
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
	if a.Enforcer != nil && a.Enforcer.Cut(r.policed()) {
		r.Settings.LinkState = host.LinkDisable
	}
	if r.Settings.Trust && have.Trust { // its MAC is the pod's to change, and drivers tell it to the PF
		r.Settings.MAC = have.MAC
	}
	for _, d := range host.DiffVFSettings(have, r.Settings) {
		wrong = append(wrong, errors.New(d))
	}
	if r.RDMA != "" {
		name, err := a.Kernel.RDMADevice(r.Device)
		if err != nil {
			return nil, err
		}
		if name != "" {
			wrong = append(wrong, fmt.Errorf("RDMA device %s is in the host's network namespace", name))
		}
	}
	return wrong, nil
}

// is implements kind.
func (vfs) is(link host.Netdev, r Record) error {
	switch {
	case link.PCIAddress != r.Device:
		return errors.New("is not the VF's")
	case r.Promisc != nil && link.Promisc != *r.Promisc:
		return fmt.Errorf("is promiscuous: %t, not %t", link.Promisc, *r.Promisc)
	case r.AllMulti != nil && link.AllMulti != *r.AllMulti:
		return fmt.Errorf("receives all multicast: %t, not %t", link.AllMulti, *r.AllMulti)
	}
	return nil
}
