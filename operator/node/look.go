package node

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/sluice-network/sluice/internal/host"
)

const (
	// Reading the settings of a NIC's VFs may hold the kernel's RTNL lock for
	// milliseconds per VF, while each pod that comes or goes causes events. It is
	// done at once as long as it takes no more than this part of the time, and no more
	// than the burst at once; beyond that it waits for its turn.
	lookShare = 20
	lookBurst = 200 * time.Millisecond
	// Other looks cost only the processor.
	lightShare = 4
	// leastLook bounds how often a NIC that answers fast is looked at.
	leastLook = 4 * time.Millisecond
)

// budget is the time that may be spent on looking.
type budget struct {
	share  int // one part in so many; lookShare when it is 0
	credit time.Duration
	at     time.Time // when credit was that
}

// wait returns 0 when a look may be made now, and otherwise how long to wait.
func (b *budget) wait(now time.Time) time.Duration {
	share := time.Duration(cmp.Or(b.share, lookShare))
	if b.at.IsZero() {
		b.credit = lookBurst
	} else {
		b.credit = min(lookBurst, b.credit+now.Sub(b.at)/share)
	}
	b.at = now
	if b.credit > 0 {
		return 0
	}
	return max(leastLook, -b.credit*share)
}

// spend takes down a look that took so long.
func (b *budget) spend(d time.Duration) { b.credit -= max(d, leastLook) }

// nic is what is known of one NIC, and how far that can be relied on.
type nic struct {
	pf      host.PF           // as last read
	bridge  bridge            // as last read
	changed bool              // something of it changed since
	suspect bool              // the settings of its VFs may be others than those last read
	stale   bool              // it could not be read when last looked at
	drift   map[string]string // see differing, when the settings were last read
	looks   budget            // for reading it
	budget  budget            // for reading the settings
}

// has tells whether the device or netdev is the PF's, or one of its VFs'.
func (n *nic) has(device string, link int) (pf, vf bool) {
	is := func(address string, index int) bool {
		return device != "" && address == device || link != 0 && index == link
	}
	return is(n.pf.PCIAddress, n.pf.IfIndex),
		slices.ContainsFunc(n.pf.VFs, func(vf host.VF) bool { return is(vf.PCIAddress, vf.IfIndex) })
}

// mark notes where to look again. A change of a VF through its PF is a change of
// the PF, whatever else that may be.
func (a *Agent) mark(c host.Changes) {
	known := func(device string, link int) bool {
		found := false
		for _, n := range a.nics {
			pf, vf := n.has(device, link)
			n.changed = n.changed || pf || vf
			n.suspect = n.suspect || pf
			found = found || pf || vf
		}
		return found
	}
	for _, device := range c.Devices {
		a.unknown = !known(device, 0) || a.unknown
	}
	for _, link := range c.Links {
		a.unknown = !known("", link) || a.unknown
	}
	// A NIC's netdev can be a parent, too.
	a.parents.changed = true
	if c.All {
		a.unknown = true
		for _, n := range a.nics {
			n.suspect = true
		}
	}
}

// look reads what changed: a NIC that is known alone, and all of them when
// something is new, and as an audit. What must wait for its turn is looked at
// in a later pass.
func (p *pass) look(ctx context.Context) {
	start := time.Now()
	if audit := start.Sub(p.audited) >= resync; p.unknown || audit {
		if wait := p.around.wait(start); wait > 0 {
			p.within(wait)
		} else {
			p.lookAround(ctx, audit)
			p.around.spend(time.Since(start))
			return
		}
	}
	for address, n := range p.nics {
		if !n.changed {
			continue
		}
		if wait := n.looks.wait(time.Now()); wait > 0 {
			p.within(wait)
			continue
		}
		start := time.Now()
		pf, there, err := p.Kernel.ReadPF(ctx, address)
		n.looks.spend(time.Since(start))
		switch {
		case err != nil:
			n.stale, p.unreadable = true, errors.Join(p.unreadable, err)
		case !there:
			delete(p.nics, address)
		default:
			n.take(pf)
			p.looked[address] = true
		}
	}
}

// lookAround reads all NICs. While some cannot be read, those that are missing
// are taken to be as they last were: pods may use them.
func (p *pass) lookAround(ctx context.Context, audit bool) {
	pfs, err := p.Kernel.Inventory(ctx)
	p.unreadable = err
	if p.unknown = err != nil; !p.unknown && audit {
		p.audited = time.Now()
	}
	there := map[string]bool{}
	for _, pf := range pfs {
		there[pf.PCIAddress] = true
		if p.nics[pf.PCIAddress] == nil {
			p.nics[pf.PCIAddress] = &nic{suspect: true, looks: budget{share: lightShare}}
		}
		n := p.nics[pf.PCIAddress]
		n.suspect = n.suspect || audit
		n.bridge.read = n.bridge.read && !audit
		n.take(pf)
		p.looked[pf.PCIAddress] = true
	}
	for address, n := range p.nics {
		switch {
		case there[address]:
		case err == nil:
			delete(p.nics, address)
		default:
			n.stale = true
		}
	}
}

// take replaces what is known by what was read. The settings of its VFs are
// carried over while they are the same VFs.
func (n *nic) take(pf host.PF) {
	same := n.pf.IfIndex == pf.IfIndex && slices.EqualFunc(n.pf.VFs, pf.VFs, func(a, b host.VF) bool { return a.PCIAddress == b.PCIAddress })
	if same {
		for i := range pf.VFs {
			pf.VFs[i].Admin = n.pf.VFs[i].Admin
		}
	}
	n.pf, n.changed, n.stale, n.suspect = pf, false, false, n.suspect || !same
}

// within makes the next pass come no later.
func (p *pass) within(wait time.Duration) {
	if p.soon == 0 || wait < p.soon {
		p.soon = wait
	}
}

// readSettings reads the settings of the PF's VFs if they may have changed.
func (p *pass) readSettings(ctx context.Context, r *report) error {
	n := p.nics[r.have.PCIAddress]
	if !n.suspect {
		return nil
	}
	start := time.Now()
	if wait := n.budget.wait(start); wait > 0 {
		p.within(wait)
		return nil
	}
	err := p.Kernel.ReadVFSettings(ctx, &r.have)
	n.budget.spend(time.Since(start))
	if err != nil {
		return err
	}
	n.pf, n.suspect = r.have, false
	p.fresh[r.have.PCIAddress] = true
	return nil
}

// readNow reads what was not read in this pass of the PF and its VFs' settings.
func (p *pass) readNow(ctx context.Context, r *report) error {
	n := p.nics[r.have.PCIAddress]
	now, err := r.have, error(nil)
	if p.looked[r.have.PCIAddress] {
		err = p.Kernel.ReadVFSettings(ctx, &now)
	} else {
		now, err = p.observe(ctx, r.have.PCIAddress)
	}
	if err != nil {
		return err
	}
	r.have = now
	n.pf, n.changed, n.suspect = now, false, false
	return nil
}
