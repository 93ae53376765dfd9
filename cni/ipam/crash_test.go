package ipam

import (
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/go-logr/logr"

	"github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/internal/durable"
)

// TestAgentDiesAtEachStep ends the agent before each change of its journal on the disk, and
// before and after each request to the API server, in a history that has all that writes
// the journal. Its successors give no address twice, and none before it has rested; in the
// end all addresses can be had, and all blocks come back.
func TestAgentDiesAtEachStep(t *testing.T) {
	for at, done := 0, false; !done; at++ {
		h := newHistory(t, at)
		h.play(nil)
		done = h.died == ""
		h.end(h.m)
	}
}

// TestAnotherNodeAfterADeath has another node take all that it can get, as soon as the
// agent of the first has died: what the first one's journal says is its own, the other
// cannot have.
func TestAnotherNodeAfterADeath(t *testing.T) {
	for at, done := 0, false; !done; at++ {
		h := newHistory(t, at)
		rival := &machine{name: "n2", dir: t.TempDir(), records: map[Key]attach.Lease{}, links: map[Key][]netip.Addr{}}
		h.play(func() {
			h.at = -1
			h.start(rival)
			for h.tryAdd(rival, "p") == nil {
			}
			for range 3 {
				_ = h.tryAdd(h.m, "p") // before it compares its blocks with the API server's
			}
		})
		done = h.died == ""
		h.start(rival)
		h.end(h.m, rival)
	}
}

// play does all that writes the journal. Once the agent has died there is another, which
// goes on, or with after, what that does is all.
func (h *history) play(after func()) {
	h.start(h.m)
	durable.OnStep = func(step string) { h.step("journal: " + step) }
	defer func() { h.at, durable.OnStep = -1, nil }()
	for _, do := range []struct {
		name string
		do   func()
	}{
		{"first pods", func() { h.add("p"); h.add("p") }},
		{"a reserved address", func() { h.add("own") }},
		{"an asked address", func() { h.add("p", netip.MustParsePrefix("10.1.0.21/32")) }},
		{"one pod goes", func() { h.del(h.m) }},
		{"another address is reserved", func() {
			h.spec.Reservations = append(h.spec.Reservations[:1:1], v1alpha1.IPReservation{Address: "10.1.0.20", Namespace: "a", Pod: "later"})
			h.m.agent.SetPool("blue", h.spec.DeepCopy())
			h.m.agent.Tend(h.t.Context())
		}},
		{"its pod comes", func() { h.add("later") }},
		{"the rest is over", func() { h.now += restTime; h.m.agent.Tend(h.t.Context()); h.add("p") }},
		{"an upgrade", func() {
			if err := h.m.agent.Close(); err != nil {
				h.t.Error(err)
			}
			h.start(h.m)
		}},
		{"all pods go", func() { h.delAll(h.m) }},
		{"blocks are idle", func() {
			for range 2 {
				h.now += 6 * time.Minute
				h.m.agent.Tend(h.t.Context())
			}
		}},
	} {
		h.doing = do.name
		for h.dies(do.do) {
			if after != nil {
				after()
				return
			}
		}
	}
}

// end looks whether an address is lost: as many as there are can be had, but for those
// reserved for others, and all blocks come back.
func (h *history) end(machines ...*machine) {
	tend := func(wait time.Duration) {
		h.now += wait
		for _, m := range machines {
			m.agent.SetPool("blue", h.spec.DeepCopy())
			m.agent.Tend(h.t.Context())
		}
	}
	for _, m := range machines {
		h.delAll(m)
	}
	for range 3 {
		tend(restTime)
	}
	had := 0
	for _, m := range machines {
		for h.tryAdd(m, "p") == nil {
			had++
		}
	}
	for _, m := range machines {
		h.delAll(m)
	}
	for range 6 {
		tend(11 * time.Minute)
	}
	left, _ := filepath.Glob(filepath.Join(h.m.dir, "*"))
	h.t.Logf("dead before %-28q in %-29q %d addresses to be had, then %d blocks, %d files", h.died, h.diedIn, had, len(h.api.objects), len(left))
	if want := 32 - 2 - len(h.spec.Reservations); had != want {
		h.errorf("%d addresses can be had, want %d", had, want)
	}
	if len(h.api.objects) > 0 {
		h.errorf("blocks %v are left", slices.Sorted(maps.Keys(h.api.objects)))
	}
	if len(left) > 1 {
		h.errorf("left %v", left)
	}
}

// restTime is how long an address rests.
const restTime = time.Minute

// history is one node, whose agent dies once, before the step with the number at.
type history struct {
	t    *testing.T
	api  *apiServer
	m    *machine
	spec *v1alpha1.IPPoolSpec
	now  time.Duration
	used map[netip.Addr]time.Duration // when an interface that had it went
	has  map[netip.Addr]string        // interfaces
	pods int

	at, n        int
	doing        string
	died, diedIn string // the step and what was done, "" while it lives
}

func newHistory(t *testing.T, at int) *history {
	h := &history{
		t: t, api: newAPIServer(), now: time.Hour, at: at, used: map[netip.Addr]time.Duration{}, has: map[netip.Addr]string{},
		m: &machine{name: "n1", dir: t.TempDir(), records: map[Key]attach.Lease{}, links: map[Key][]netip.Addr{}},
		spec: &v1alpha1.IPPoolSpec{
			IPv4:         &v1alpha1.IPRange{CIDR: "10.1.0.0/27", BlockSize: 16},
			Reservations: []v1alpha1.IPReservation{{Address: "10.1.0.9", Namespace: "a", Pod: "own"}},
			Quotas:       []v1alpha1.IPQuota{{Namespace: "a", Interfaces: 40}},
		},
	}
	h.api.fail = func(written bool) error {
		h.step(map[bool]string{false: "ask the API server", true: "the API server has written"}[written])
		return nil
	}
	return h
}

func (h *history) errorf(format string, args ...any) {
	h.t.Helper()
	h.t.Errorf("dead before %q in %q: %s: %s", h.died, h.diedIn, h.doing, fmt.Sprintf(format, args...))
}

type death struct{}

func (h *history) step(name string) {
	if h.n++; h.n-1 == h.at {
		h.died, h.diedIn = name, h.doing
		panic(death{})
	}
}

// dies tells whether the agent died in do. Then its successor has started, and undone what
// was half done.
func (h *history) dies(do func()) (died bool) {
	defer func() {
		switch p := recover(); p {
		case nil:
		case any(death{}):
			died = true
			h.start(h.m)
			for key, r := range maps.Clone(h.m.records) {
				if !r.Done {
					h.undo(h.m, key)
				}
			}
		default:
			panic(p)
		}
	}()
	do()
	return false
}

func (h *history) start(m *machine) {
	m.agent = New(Options{
		Name: m.name, Dir: m.dir, Claims: h.api, Boot: "b", Log: logr.Discard(),
		Now: func() (time.Duration, error) { return h.now, nil },
	})
	if err := m.agent.Load(m.leases); err != nil {
		h.t.Fatal(err)
	}
	m.agent.SetPool("blue", h.spec.DeepCopy())
}

// add is an ADD that waits for addresses that rest.
func (h *history) add(pod string, ips ...netip.Prefix) {
	err := h.tryAdd(h.m, pod, ips...)
	for range 3 {
		if err == nil {
			return
		}
		h.now += restTime
		h.m.agent.Tend(h.t.Context())
		err = h.tryAdd(h.m, pod, ips...)
	}
	if err != nil {
		h.errorf("an ADD fails: %v", err)
	}
}

// tryAdd is an ADD: first there is a record.
func (h *history) tryAdd(m *machine, pod string, ips ...netip.Prefix) error {
	h.pods++
	key := Key{Network: "net", ContainerID: fmt.Sprintf("%04d", h.pods), IfName: "net1"}
	m.records[key] = attach.Lease{Key: key, Pool: "blue", Namespace: "a"}
	h.step("ADD")
	g, err := m.agent.Add(h.t.Context(), Ask{Key: key, Pool: "blue", Namespace: "a", Pod: pod, IPs: ips})
	if err != nil {
		h.undo(m, key)
		return err
	}
	m.links[key] = g.Addresses
	for _, a := range g.Addresses {
		if other := h.has[a]; other != "" {
			h.errorf("%s of %s is given to %s on %s", a, other, key, m.name)
		}
		h.has[a] = key.String() + " on " + m.name
		_, reserved := m.agent.stores["blue"].pool.Reservations[a]
		if since, was := h.used[a]; was && h.now-since < restTime && !reserved {
			h.errorf("%s rested for %s only", a, h.now-since)
		}
	}
	h.step("ADD has its address")
	m.records[key] = attach.Lease{Key: key, Pool: "blue", Namespace: "a", Addresses: g.Addresses, Done: true}
	return nil
}

// del is a DEL of the oldest pod.
func (h *history) del(m *machine) {
	key := slices.SortedFunc(maps.Keys(m.records), func(a, b Key) int { return cmpString(a.ContainerID, b.ContainerID) })[0]
	m.records[key] = attach.Lease{Key: key, Pool: "blue", Namespace: "a"}
	h.step("DEL")
	h.undo(m, key)
}

func (h *history) delAll(m *machine) {
	for len(m.records) > 0 {
		h.del(m)
	}
}

// undo ends an attachment: the link goes first, the record last.
func (h *history) undo(m *machine, key Key) {
	for _, a := range m.links[key] {
		h.used[a] = h.now
		delete(h.has, a)
	}
	delete(m.links, key)
	h.step("the link is gone")
	m.agent.Del(key)
	h.step("the address rests")
	delete(m.records, key)
	h.step("the record is gone")
}
