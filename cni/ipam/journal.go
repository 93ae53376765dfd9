package ipam

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	"github.com/sluice-network/sluice/internal/durable"
)

// image is what the journal keeps of one pool: one file of the pool's name.
type image struct {
	Boot   string               `json:"boot"` // what the times count from
	Spec   *v1alpha1.IPPoolSpec `json:"spec,omitempty"`
	Blocks []blockImage         `json:"blocks"`
}

type blockImage struct {
	Name      string               `json:"name"`
	UID       string               `json:"uid"`
	Kind      v1alpha1.IPBlockKind `json:"kind"`
	First     netip.Addr           `json:"first,omitzero"`
	Size      int                  `json:"size"`
	Namespace string               `json:"namespace,omitempty"`
	Index     int                  `json:"index,omitempty"`
	Excluded  []netip.Addr         `json:"excluded,omitempty"`
	// Quiet: the addresses that are not listed rest, since then.
	Quiet bool          `json:"quiet,omitempty"`
	Since time.Duration `json:"since,omitempty"`
	Units []unitImage   `json:"units,omitempty"` // the addresses that are not free
}

type unitImage struct {
	Address netip.Addr    `json:"address"`
	Since   time.Duration `json:"since"` // it rests, after the boot; -1: it may be in use
}

// image is the ledger as the journal keeps it. What is ready is free again in the image of
// an agent that ends.
func (l *ledger) image(boot string, spec *v1alpha1.IPPoolSpec, ending bool) *image {
	im := &image{Boot: boot, Spec: spec}
	units := map[*block][]unitImage{}
	for a, u := range l.units {
		switch {
		case u.state == resting:
			units[u.block] = append(units[u.block], unitImage{a, u.since})
		case !ending || u.state == inUse || u.state == held:
			units[u.block] = append(units[u.block], unitImage{a, unknown})
		}
	}
	for _, b := range l.blocks {
		if b.leaving {
			continue
		}
		i := blockImage{
			Name: b.name, UID: b.uid, Kind: b.kind, First: b.first, Size: b.size, Namespace: b.namespace, Index: b.index,
			Quiet: b.quiet, Since: b.since, Units: units[b],
		}
		for a := range b.excluded {
			i.Excluded = append(i.Excluded, a)
		}
		slices.SortFunc(i.Excluded, netip.Addr.Compare)
		im.Blocks = append(im.Blocks, i)
	}
	slices.SortFunc(im.Blocks, func(a, b blockImage) int { return strings.Compare(a.Name, b.Name) })
	return im
}

// restore makes a ledger of an image. live are the attachments there are; what may be in
// use and is none of theirs is held. After another boot all rest begins anew.
func restore(im *image, live map[Key]*lease, boot string, now time.Duration) *ledger {
	l := newLedger()
	l.leases = live
	for _, i := range im.Blocks {
		since := func(t time.Duration) time.Duration {
			if im.Boot != boot || t > now {
				return now
			}
			return t
		}
		b := &block{
			name: i.Name, uid: i.UID, kind: i.Kind, first: i.First, size: i.Size, namespace: i.Namespace, index: i.Index,
			excluded: map[netip.Addr]bool{}, quiet: i.Quiet, since: since(i.Since), idle: now, toldAt: now,
		}
		for _, a := range i.Excluded {
			b.excluded[a] = true
		}
		for _, u := range i.Units {
			if u.Since == unknown {
				l.units[u.Address] = &unit{state: held, block: b}
			} else {
				l.units[u.Address] = &unit{state: resting, since: since(u.Since), block: b}
			}
		}
		l.blocks[b.name] = b
	}
	for _, lease := range live {
		for _, a := range lease.addresses {
			l.occupy(a)
		}
	}
	return l
}

// journal is a folder of images.
type journal string

func (j journal) file(pool string) string { return filepath.Join(string(j), pool+".json") }

func (j journal) write(pool string, im *image) error {
	b, err := json.Marshal(im)
	if err == nil {
		err = durable.WriteFile(j.file(pool), b)
	}
	if err != nil {
		return fmt.Errorf("write the journal of pool %s: %w", pool, err)
	}
	return nil
}

func (j journal) remove(pool string) error {
	if err := durable.Remove(j.file(pool)); err != nil {
		return fmt.Errorf("remove the journal of pool %s: %w", pool, err)
	}
	return nil
}

// read reads all images. What is none, which only a failing disk or a curious hand can
// leave, is set aside and returned: its blocks are learnt from the API server, and rest.
func (j journal) read() (images map[string]*image, aside []string, err error) {
	if err := os.MkdirAll(string(j), 0o700); err != nil {
		return nil, nil, fmt.Errorf("open the journal of addresses: %w", err)
	}
	if err := durable.Sweep(string(j)); err != nil {
		return nil, nil, fmt.Errorf("open the journal of addresses: %w", err)
	}
	entries, err := os.ReadDir(string(j))
	if err != nil {
		return nil, nil, fmt.Errorf("open the journal of addresses: %w", err)
	}
	images = map[string]*image{}
	for _, e := range entries {
		path := filepath.Join(string(j), e.Name())
		pool, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		b, bad := os.ReadFile(path)
		im := &image{}
		if bad != nil {
			err = errors.Join(err, bad)
		} else if json.Unmarshal(b, im) != nil {
			err = errors.Join(err, os.Rename(path, path+".unreadable"))
			aside = append(aside, path+".unreadable")
		} else {
			images[pool] = im
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read the journal of addresses: %w", err)
	}
	return images, aside, nil
}
