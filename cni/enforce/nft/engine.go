package nft

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// TablePrefix begins the names of the tables that are Sluice's. No others are touched.
const TablePrefix = "sluice-"

// generations is the set that says which generation is in force for which MAC, in the
// comment of its element.
const generations = "generations"

// engine puts generations in force in one network namespace.
type engine struct {
	mu     sync.Mutex
	conn   *conn
	commit func([]op) error // the conn's; tests make it fail
	states map[string]*state
	last   int // version given last
}

// state is what is in force for one interface.
type state struct {
	Interface
	isolated   [2]bool
	verdicts   [2]*policy.Verdicts
	generation uint64
	stale      bool // the kernel may have something else
	rendering
	peers  [2][2]sides      // by direction and family
	chains map[string]chain // of ports
}

// rendering is one version of the rules of an interface.
type rendering struct {
	layout
	prefix string // of all names that are of the version
	table  table  // of the peers and the generation
	// replies says that the maps of a direction have the peers of the other one too,
	// whose answers are judged.
	replies bool
	ports   func(policy.Direction, allowed) chain
	judged  [2]bool  // directions that have maps
	counts  bool     // hits of policies
	hits    []string // the counters of them
	flip    []op     // besides the base chains
	owns    func(name string) bool
}

func openEngine(ns *host.Netns) (*engine, error) {
	c, err := open(ns, 0)
	if err != nil {
		return nil, err
	}
	return &engine{conn: c, commit: c.commit, states: map[string]*state{}}, nil
}

func (e *engine) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.conn.close()
}

// apply puts a generation in force: by changing the peers if nothing else changes, and
// else with a new version of all.
func (e *engine) apply(key string, t table, i Interface, verdicts [2]*policy.Verdicts, generation uint64, render func(version int) (rendering, error)) error {
	was, held, err := e.generation(t, i.MAC)
	if err != nil {
		return err
	}
	i.Addresses, i.Node = slices.Clone(i.Addresses), slices.Clone(i.Node)
	isolated := [2]bool{verdicts[policy.Ingress].Isolated, verdicts[policy.Egress].Isolated}
	old := e.states[key]
	next := &state{Interface: i, isolated: isolated, verdicts: verdicts, generation: generation, chains: map[string]chain{}}
	var prepare, flip, sweep, undo []op
	full := old == nil || old.stale || !old.equal(i) || old.isolated != isolated
	if full {
		r, there, err := e.version(render)
		if err != nil {
			return err
		}
		next.rendering = r
		prepare, flip, sweep = r.make(there)
	} else {
		next.rendering, next.peers = old.rendering, old.peers
		next.setHits(verdicts)
		prepare = next.addHits(old.hits)
	}
	var del, add []op
	for _, d := range []policy.Direction{policy.Ingress, policy.Egress} {
		out, in := next.lead(d)
		del, add = append(del, out...), append(add, in...)
	}
	for name, c := range next.chains {
		if full || !old.has(name) {
			prepare = append(prepare, c.replace()...)
		}
	}
	prepare, flip = append(prepare, add...), append(flip, del...)
	if !full {
		sweep = old.sweep(next)
		for _, o := range add {
			o.do = deleteElements
			undo = append(undo, o)
		}
	}
	flip = append(flip, next.record(was, held)...)
	if !full && (len(add) == 0 || len(del) == 0) {
		prepare, flip = nil, append(prepare, flip...)
	}
	if err := e.force(prepare, flip, undo); err != nil {
		if old != nil {
			old.stale = true // somebody else may have changed it
		}
		return fmt.Errorf("put generation %d of the rules of %s in force: %w", generation, key, err)
	}
	e.states[key] = next
	if now, held, err := e.generation(next.table, i.MAC); err != nil || !held || now != generation {
		next.stale = true
		return errors.Join(err, fmt.Errorf("verify rules of %s: generation %d is in force, not %d", key, now, generation))
	}
	if len(sweep) > 0 {
		if err = gracePeriod(); err == nil {
			err = e.commit(sweep)
		}
	}
	if err != nil {
		// What is left leads nowhere, and the next version takes it away.
		next.stale = true
	}
	return nil
}

// record writes down the generation, in place of the one that was if one is held.
func (s *state) record(was uint64, held bool) (ops []op) {
	in := &set{table: s.table, name: generations, key: etherAddr}
	if held {
		ops = append(ops, op{do: deleteElements, table: s.table, set: in, elements: []element{{key: string(s.MAC[:]), comment: strconv.FormatUint(was, 10)}}})
	}
	return append(ops, op{do: addElements, table: s.table, set: in, elements: []element{{key: string(s.MAC[:]), comment: strconv.FormatUint(s.generation, 10)}}})
}

// sweep takes away the chains of ports and the counters that next has no use for.
func (s *state) sweep(next *state) (ops []op) {
	for name, c := range s.chains {
		if !next.has(name) {
			ops = append(ops, op{do: flushChain, table: c.table, chain: &c}, op{do: deleteChain, table: c.table, chain: &c})
		}
	}
	for _, name := range s.hits {
		if !slices.Contains(next.hits, name) {
			ops = append(ops, op{do: deleteCounter, table: s.table, counter: name})
		}
	}
	return ops
}

// force does the two transactions of a generation. There is an undo if the first one has
// effect already: if the second fails, it takes that back.
func (e *engine) force(prepare, flip, undo []op) error {
	err := e.commit(prepare)
	if err != nil {
		return err
	}
	started := len(prepare) > 0 && len(undo) > 0
	if started {
		err = gracePeriod()
	}
	if err == nil {
		err = e.commit(flip)
	}
	if err == nil || !started {
		return err
	}
	if failed := e.commit(undo); failed != nil {
		err = errors.Join(err, fmt.Errorf("take back what it adds, which is allowed until policy is put in force again: %w", failed))
	}
	return err
}

// Size is how much is in the kernel.
type Size struct{ Rules, Elements int }

// Size counts what this engine has put in force.
func (e *engine) Size() (size Size) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range e.states {
		for _, c := range slices.Concat(s.base, s.layout.chains, slices.Collect(maps.Values(s.chains))) {
			size.Rules += len(c.rules)
		}
		for _, in := range s.fill {
			size.Elements += len(in)
		}
		for _, families := range s.peers {
			for _, sides := range families {
				for _, peers := range sides {
					size.Elements += len(peers)
				}
			}
		}
	}
	return size
}

// gracePeriod waits until no CPU is in the middle of a packet that it began before. Such a
// one may have looked where a peer was not yet, or be on its way into a chain that is no
// longer in use, and would find it empty. The kernel waits so for whoever closes a packet
// socket (packet_release in net/packet/af_packet.c); membarrier(2) would, but refuses where
// CPUs have no tick.
func gracePeriod() error {
	s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("wait for packets under way: %w", err)
	}
	return unix.Close(s)
}

// version renders all under the next number that nothing in the kernel has.
func (e *engine) version(render func(version int) (rendering, error)) (rendering, present, error) {
	for {
		e.last++
		r, err := render(e.last)
		if err != nil {
			return rendering{}, present{}, err
		}
		there, err := e.names(r)
		if err != nil || !there.holds(r.prefix) {
			return r, there, err
		}
	}
}

// lead makes the peers of the direction those of its verdicts, and the chains that they
// lead to; it returns what that takes out of the maps and puts into them.
func (s *state) lead(d policy.Direction) (del, add []op) {
	if !s.judged[d] {
		return nil, nil
	}
	for f, want := range s.peersOf(d, s.verdicts, s.chains) {
		var changes [len(sides{})]change
		s.peers[d][f], changes = s.peers[d][f].diff(want)
		for side, c := range changes {
			in := peerMap(s.table, s.prefix, d, f, side)
			if len(c.del) > 0 {
				del = append(del, op{do: deleteElements, table: in.table, set: &in, elements: elements(c.del)})
			}
			if len(c.add) > 0 {
				add = append(add, op{do: addElements, table: in.table, set: &in, elements: elements(c.add)})
			}
		}
	}
	return del, add
}

// peersOf are the peers of a direction, by family, and puts the chains that they lead to
// into chains.
func (r *rendering) peersOf(d policy.Direction, verdicts [2]*policy.Verdicts, chains map[string]chain) [2][]peer {
	var answered []policy.PeerRange
	if r.replies {
		answered = verdicts[1-d].Peers
	}
	names := map[allowed]string{}
	return byFamily(verdicts[d].Peers, answered, func(a allowed) string {
		name, ok := names[a]
		if !ok {
			c := r.ports(d, a)
			name = c.name
			names[a], chains[name] = name, c
		}
		return name
	})
}

func (s *state) has(chain string) bool {
	_, ok := s.chains[chain]
	return ok
}

func elements(peers []peer) []element {
	all := make([]element, len(peers))
	for i, p := range peers {
		all[i] = p.element()
	}
	return all
}

// setHits makes the counters of hits those of the policies that isolate the interface.
func (r *rendering) setHits(verdicts [2]*policy.Verdicts) {
	if r.counts {
		r.hits = hitsCounters(verdicts)
	}
}

// addHits are the operations that make the counters of hits that are not there yet.
func (r *rendering) addHits(there []string) (ops []op) {
	for _, name := range r.hits {
		if !slices.Contains(there, name) {
			ops = append(ops, op{do: addCounter, table: r.table, counter: name})
		}
	}
	return ops
}

// make are the operations that make a version beside what is present, put it in force,
// and take away what it replaces.
func (r *rendering) make(present present) (prepare, flip, sweep []op) {
	for _, t := range r.tables {
		prepare = append(prepare, op{do: addTable, table: t})
		for _, c := range r.counters {
			prepare = append(prepare, op{do: addCounter, table: t, counter: c})
		}
	}
	prepare = append(prepare, r.addHits(nil)...)
	prepare = append(prepare, op{do: addSet, table: r.table, set: &set{table: r.table, name: generations, key: etherAddr}})
	for _, s := range r.sets {
		prepare = append(prepare, op{do: addSet, table: s.table, set: &s})
		if fill := r.fill[s.name]; len(fill) > 0 {
			prepare = append(prepare, op{do: addElements, table: s.table, set: &s, elements: fill})
		}
	}
	// Rules jump to chains that come later.
	for _, c := range r.chains {
		prepare = append(prepare, op{do: addChain, table: c.table, chain: &c})
	}
	for _, c := range r.chains {
		prepare = append(prepare, c.addRules()...)
	}
	stays := map[table]map[string]bool{}
	for _, c := range r.base {
		if stays[c.table] == nil {
			stays[c.table] = map[string]bool{}
		}
		if len(c.rules) > 0 {
			stays[c.table][c.name] = true
			flip = append(flip, c.replace()...)
		} else if slices.Contains(present.chains[c.table], c.name) {
			stays[c.table][c.name] = true // taken away by the flip
			flip = append(flip, op{do: flushChain, table: c.table, chain: &c}, op{do: deleteChain, table: c.table, chain: &chain{table: c.table, name: c.name}})
		}
	}
	flip = append(flip, r.flip...)
	var flush, sets, chains, counters []op
	for _, t := range r.tables {
		for _, name := range present.chains[t] {
			if c := (&chain{table: t, name: name}); r.owns(name) && !stays[t][name] {
				flush = append(flush, op{do: flushChain, table: t, chain: c})
				chains = append(chains, op{do: deleteChain, table: t, chain: c})
			}
		}
		for _, name := range present.sets[t] {
			if r.owns(name) && name != generations {
				sets = append(sets, op{do: deleteSet, table: t, set: &set{table: t, name: name}})
			}
		}
		for _, name := range present.counters[t] {
			if r.owns(name) && !slices.Contains(r.counters, name) && !(t == r.table && slices.Contains(r.hits, name)) {
				counters = append(counters, op{do: deleteCounter, table: t, counter: name})
			}
		}
	}
	return prepare, flip, slices.Concat(flush, sets, chains, counters)
}

// present are the names of what there is in tables.
type present struct{ chains, sets, counters map[table][]string }

func (p present) holds(prefix string) bool {
	for _, names := range []map[table][]string{p.chains, p.sets} {
		for _, n := range names {
			if slices.ContainsFunc(n, func(s string) bool { return strings.HasPrefix(s, prefix) }) {
				return true
			}
		}
	}
	return false
}

func (e *engine) names(r rendering) (present, error) {
	p := present{map[table][]string{}, map[table][]string{}, map[table][]string{}}
	for _, t := range r.tables {
		if err := e.conn.get(unix.NFT_MSG_GETCHAIN, t, nil, func(a map[uint16][]byte) {
			p.chains[t] = append(p.chains[t], text(a[unix.NFTA_CHAIN_NAME]))
		}); err != nil {
			return p, err
		}
		if err := e.conn.get(unix.NFT_MSG_GETSET, t, nil, func(a map[uint16][]byte) {
			p.sets[t] = append(p.sets[t], text(a[unix.NFTA_SET_NAME]))
		}); err != nil {
			return p, err
		}
		counters, err := e.conn.counters(t)
		if err != nil {
			return p, err
		}
		p.counters[t] = slices.Collect(maps.Keys(counters))
	}
	return p, nil
}

// elements calls f for each element of a set whose keys are MACs.
func (e *engine) elements(t table, set string, f func(mac [6]byte, attributes map[uint16][]byte)) error {
	return e.conn.get(unix.NFT_MSG_GETSETELEM, t, func(b *buffer) { b.string(unix.NFTA_SET_ELEM_LIST_SET, set) }, func(a map[uint16][]byte) {
		each(a[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, v []byte) {
			e := attributes(v)
			var mac [6]byte
			copy(mac[:], attributes(e[unix.NFTA_SET_ELEM_KEY])[unix.NFTA_DATA_VALUE])
			f(mac, e)
		})
	})
}

// all reads which generation is in force for which MAC.
func (e *engine) all(t table) (map[[6]byte]uint64, error) {
	found := map[[6]byte]uint64{}
	var wrong error
	err := e.elements(t, generations, func(mac [6]byte, a map[uint16][]byte) {
		var comment string
		if data := a[unix.NFTA_SET_ELEM_USERDATA]; len(data) > 2 {
			comment = text(data[2:])
		}
		generation, err := strconv.ParseUint(comment, 10, 64)
		if err != nil {
			wrong = fmt.Errorf("read generation of table %s: %w", t.name, err)
		}
		found[mac] = generation
	})
	return found, errors.Join(err, wrong)
}

func (e *engine) generation(t table, mac [6]byte) (generation uint64, held bool, err error) {
	all, err := e.all(t)
	generation, held = all[mac]
	return generation, held, err
}
