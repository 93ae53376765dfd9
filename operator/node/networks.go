package node

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sluice-network/sluice/internal/host"
)

// networkTries is how often a cloud is asked that does not answer, until there are
// other NICs.
const networkTries = 6

// networks is what is known of the networks of a cloud that the NICs are on.
type networks struct {
	mu       sync.Mutex
	of       map[string]string // by MAC address
	nics     string            // those there were when it was asked
	asking   bool
	failures int
	at       time.Time // when to ask again
}

// learnNetworks asks beside the work for the networks of NICs that are new. Nobody
// tells when a NIC goes to another one: a cloud gives the machine another NIC then.
func (p *pass) learnNetworks(ctx context.Context) {
	if p.Networks == nil || len(p.nics) == 0 {
		return
	}
	n := &p.networks
	n.mu.Lock()
	defer n.mu.Unlock()
	if all := strings.Join(slices.Sorted(maps.Keys(p.nics)), " "); all != n.nics {
		n.nics, n.failures, n.at = all, 0, time.Now()
	}
	switch wait := time.Until(n.at); {
	case n.asking || n.at.IsZero() || n.failures == networkTries:
		return
	case wait > 0:
		p.within(wait)
		return
	}
	n.asking, n.at = true, time.Time{}
	go func() {
		of, err := p.Networks(ctx)
		n.mu.Lock()
		if n.asking = false; err == nil {
			n.of = of
		} else if ctx.Err() == nil {
			n.failures++
			n.at = time.Now().Add(backoff(n.failures))
			p.Log.Error(err, "It is not known which networks the NICs are on; a nicSelector.netFilter selects none of them", "try", n.failures, "of", networkTries)
		}
		n.mu.Unlock()
		p.HolderChanged()
	}()
}

// network that the NIC is on, as nicSelector.netFilter names it; empty when not known.
func (n *networks) network(pf host.PF) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return cmp.Or(n.of[pf.PermMAC.String()], n.of[pf.MAC.String()])
}
