package attach

import (
	"context"
	"fmt"

	"github.com/sluice-network/sluice/internal/host"
)

// kind is what is particular to one kind of devices. Record, ownership, locks,
// addresses, order of the steps and their undoing are the same for all kinds.
type kind interface {
	// prepare finds the device that cfg names and checks, before anything is
	// changed, that it can become r's interface. It completes r by all that the
	// other methods need, in another agent's life as well.
	prepare(cfg *Config, ns *host.Netns, r *Record) (create, error)

	// restore undoes whatever create has done, and may find it half done or not
	// done. The record's namespace may be gone; ns is it, or nil.
	restore(ctx context.Context, r Record, ns *host.Netns) error

	// differences lists what of the device, outside the pod, is not as in r.
	differences(r Record) ([]error, error)

	// is tells why the link, which has the name of r's interface, is not r's, nil
	// when it is.
	is(link host.Netdev, r Record) error
}

// create makes the device r's interface and returns the link as it is in the
// pod; a link without index for a device that has none.
type create func(ctx context.Context, r Record, ns *host.Netns) (host.Netdev, error)

// kind returns the kind of what is a MacVLAN sub-interface, or else a VF.
func (a *Attacher) kind(m *Macvlan) kind {
	if m != nil {
		return macvlans{a}
	}
	return vfs{a}
}

// device says what the configuration wants attached, for a message.
func (c *Config) device() string { return device(c.DeviceID, c.Macvlan) }

// device says what is attached, for a message.
func (r *Record) device() string { return device(r.Device, r.Macvlan) }

func device(id string, m *Macvlan) string {
	if id == "" && m != nil {
		return fmt.Sprintf("master %q", m.Parent)
	}
	return "deviceID " + id
}

// noun is what a device is called in messages.
func noun(deviceID string) string {
	if host.ValidPCIAddress(deviceID) {
		return "VF"
	}
	return "slot"
}

// taken returns the links of the pod, with an error when one of them has the
// wanted name.
func (a *Attacher) taken(cfg *Config, ns *host.Netns, ifName string) ([]host.Netdev, error) {
	links, err := a.Kernel.Links(ns)
	if err != nil {
		return nil, fail(CodeKernel, "network %q: %s: %w", cfg.Network, cfg.device(), err)
	}
	for _, l := range links {
		if l.Has(ifName) {
			return nil, fail(CodeNameTaken, "network %q: the pod has an interface %s already (%s): choose another name", cfg.Network, ifName, l.Name)
		}
	}
	return links, nil
}

// refusal makes an error of prepare.
func refusal(cfg *Config, code uint, format string, args ...any) error {
	return fail(code, "network %q: %s: %w", cfg.Network, cfg.device(), fmt.Errorf(format, args...))
}
