package plan

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// Pools tells which SriovNetworkPoolConfig a node is in.
type Pools struct {
	pools     []*sriovv1.SriovNetworkPoolConfig // sorted by name
	selectors []labels.Selector
	invalid   map[string]error
}

// NewPools reads the selectors of pools. Pools that are being deleted, and those that
// only name an OpenShift machine config pool, have no nodes. Neither has one whose
// selector cannot be read: Invalid tells.
func NewPools(pools []sriovv1.SriovNetworkPoolConfig) *Pools {
	p := &Pools{invalid: map[string]error{}}
	var sorted []*sriovv1.SriovNetworkPoolConfig
	for i := range pools {
		if pools[i].DeletionTimestamp == nil && pools[i].Spec.OvsHardwareOffloadConfig.Name == "" {
			sorted = append(sorted, &pools[i])
		}
	}
	slices.SortFunc(sorted, func(a, b *sriovv1.SriovNetworkPoolConfig) int { return cmp.Compare(a.Name, b.Name) })
	for _, pool := range sorted {
		selector, err := labels.Everything(), error(nil)
		if pool.Spec.NodeSelector != nil {
			selector, err = metav1.LabelSelectorAsSelector(pool.Spec.NodeSelector)
		}
		if err != nil {
			p.invalid[pool.Name] = fmt.Errorf("nodeSelector: %w", err)
			continue
		}
		if _, err := MaxUnavailable(pool, 1); err != nil {
			p.invalid[pool.Name] = err
		}
		p.pools, p.selectors = append(p.pools, pool), append(p.selectors, selector)
	}
	return p
}

// Invalid says what is wrong with the pool of that name, whatever the nodes.
func (p *Pools) Invalid(name string) error { return p.invalid[name] }

// Of gives the pools that select a node with these labels, sorted by name. A node with
// more than one is in none of them: which one's limits hold is not for us to guess.
func (p *Pools) Of(nodeLabels map[string]string) []*sriovv1.SriovNetworkPoolConfig {
	var all []*sriovv1.SriovNetworkPoolConfig
	for i, selector := range p.selectors {
		if selector.Matches(labels.Set(nodeLabels)) {
			all = append(all, p.pools[i])
		}
	}
	return all
}

// MaxUnavailable is how many of a pool's n nodes may be disturbed at the same time. A
// percentage is rounded down, but not to less than one; unset is no limit. Nodes in no
// pool, a nil one, are disturbed one at a time. An error means none.
func MaxUnavailable(pool *sriovv1.SriovNetworkPoolConfig, n int) (int, error) {
	switch {
	case pool == nil:
		return 1, nil
	case pool.Spec.MaxUnavailable == nil:
		return n, nil
	}
	limit, err := intstr.GetScaledValueFromIntOrPercent(pool.Spec.MaxUnavailable, n, false)
	if err != nil || limit < 0 {
		return 0, fmt.Errorf("maxUnavailable %s is not a number of nodes or a percentage: write 0 or more, or 1%% to 100%%", pool.Spec.MaxUnavailable.String())
	}
	if pool.Spec.MaxUnavailable.Type == intstr.String && n > 0 && pool.Spec.MaxUnavailable.StrVal != "0%" {
		limit = max(limit, 1)
	}
	return limit, nil
}

// RdmaMode is the RDMA mode of a node in these pools: its only pool's, or what it was
// while more than one claim the node.
func RdmaMode(pools []*sriovv1.SriovNetworkPoolConfig, prior string) string {
	switch len(pools) {
	case 0:
		return ""
	case 1:
		return pools[0].Spec.RdmaMode
	}
	return prior
}

// Contender is a node of a pool, as the decision who may be disturbed sees it.
type Contender struct {
	Node      string
	Pool      string // empty for nodes in no pool
	Disturbed bool   // has been allowed to be, and is not done yet
	Waits     bool   // for being allowed
}

// Grant picks the nodes that may be disturbed now, sorted: in each pool as many of those
// that wait as the limit leaves room for beside those that are disturbed already. A pool
// without a limit lets none.
func Grant(contenders []Contender, limits map[string]int) []string {
	room := map[string]int{}
	for pool, limit := range limits {
		room[pool] = limit
	}
	var waiting []Contender
	for _, c := range contenders {
		switch {
		case c.Disturbed:
			room[c.Pool]--
		case c.Waits:
			waiting = append(waiting, c)
		}
	}
	slices.SortFunc(waiting, func(a, b Contender) int { return strings.Compare(a.Node, b.Node) })
	var granted []string
	for _, c := range waiting {
		if room[c.Pool] > 0 {
			room[c.Pool]--
			granted = append(granted, c.Node)
		}
	}
	return granted
}
