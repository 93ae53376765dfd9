package hostfake

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/internal/host"
)

// Operations on links that can be parents of MacVLAN sub-interfaces.
const (
	Links      Op = "Links"
	AddVLAN    Op = "AddVLAN"
	RemoveVLAN Op = "RemoveVLAN"
)

// SetLinks lets somebody else make, change and remove links besides those of the NICs;
// watchers are told.
func (k *Kernel) SetLinks(change func([]host.ParentLink) []host.ParentLink) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.links = change(slices.Clone(k.links))
	for i := range k.links {
		if k.links[i].IfIndex == 0 {
			k.lastLink++
			k.links[i].IfIndex = k.lastLink
		}
	}
	k.tell(host.Changes{Parents: true})
}

// SetUser makes something stand on a link, empty for nothing.
func (k *Kernel) SetUser(link, what string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.users[link] = what
}

// Links is host.Host's.
func (k *Kernel) Links(context.Context) ([]host.ParentLink, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.failing(Links, "list", "links"); err != nil {
		return nil, err
	}
	return k.allLinks(), nil
}

func (k *Kernel) allLinks() []host.ParentLink {
	links := slices.Clone(k.links)
	for _, pf := range k.pfs {
		if pf.IfIndex == 0 {
			continue
		}
		links = append(links, host.ParentLink{
			Name: pf.Name, IfIndex: pf.IfIndex, Kind: host.PhysicalLink, AltNames: pf.AltNames, MAC: pf.MAC, MTU: pf.MTU, AdminUp: pf.AdminUp,
			PCIAddress: pf.PCIAddress, Vendor: pf.Vendor, DeviceID: pf.DeviceID, NUMANode: pf.NUMANode,
		})
		for _, vf := range pf.VFs {
			if vf.IfIndex != 0 {
				links = append(links, host.ParentLink{
					Name: vf.Name, IfIndex: vf.IfIndex, Kind: host.PhysicalLink, MAC: vf.MAC, MTU: vf.MTU,
					PCIAddress: vf.PCIAddress, PFAddress: pf.PCIAddress, Vendor: vf.Vendor, DeviceID: vf.DeviceID, NUMANode: vf.NUMANode,
				})
			}
		}
	}
	slices.SortFunc(links, func(a, b host.ParentLink) int { return strings.Compare(a.Name, b.Name) })
	return links
}

// AddVLAN is host.Host's.
func (k *Kernel) AddVLAN(_ context.Context, lower host.Link, name string, id int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.change(AddVLAN, "make VLAN device "+name, lower.Name, func() unix.Errno {
		all := k.allLinks()
		at := slices.IndexFunc(all, func(l host.ParentLink) bool { return l.IfIndex == lower.Index })
		switch {
		case at < 0:
			return unix.ENODEV
		case !all[at].AdminUp:
			return unix.ENETDOWN
		case slices.ContainsFunc(all, func(l host.ParentLink) bool { return l.Name == name || l.Lower == all[at].Name && l.VLAN == id }):
			return unix.EEXIST
		}
		k.lastLink++
		k.links = append(k.links, host.ParentLink{
			Name: name, IfIndex: k.lastLink, Kind: host.VLANLink, MAC: all[at].MAC, MTU: all[at].MTU, AdminUp: true,
			Lower: all[at].Name, VLAN: id, Managed: true, NUMANode: all[at].NUMANode,
		})
		return 0
	})
}

// RemoveVLAN is host.Host's.
func (k *Kernel) RemoveVLAN(_ context.Context, l host.Link) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if user := k.users[l.Name]; user != "" {
		return fmt.Errorf("remove the VLAN device on %s: %w: %s", l.Name, host.ErrLinkInUse, user)
	}
	at := slices.IndexFunc(k.links, func(o host.ParentLink) bool { return o.IfIndex == l.Index })
	if at >= 0 && !k.links[at].Managed {
		return errors.New("it was not made by Sluice")
	}
	return k.change(RemoveVLAN, "remove the VLAN device", l.Name, func() unix.Errno {
		if at < 0 {
			return unix.ENODEV
		}
		k.links = slices.Delete(k.links, at, at+1)
		return 0
	})
}

// linkFields finds a link that is no NIC's.
func (k *Kernel) linkFields(index int) (fields, bool) {
	for i := range k.links {
		if l := &k.links[i]; l.IfIndex == index {
			return fields{&l.Name, &l.MAC, &l.MTU, &l.AdminUp}, true
		}
	}
	return fields{}, false
}
