package nft

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"maps"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// Parent guards the MacVLAN pods of one parent link, on the host. Unicast between two
// of them passes the parent's ingress hook, as what comes from the wire does; what goes
// to the wire passes its egress hook. Broadcast and multicast between them pass neither:
// those are for the tables in the pods. A sender is known by its MAC: one that takes a
// MAC which has no rules here is held by the table in its pod alone.
//
// The rules go with the link; of one that was made anew a Parent must be opened anew.
// Its methods may be called concurrently.
type Parent struct {
	*engine
	link     string
	asserted bool // the chains that all pods share are as they should be
}

// OpenParent opens the parent link in a namespace, the host's, for enforcement.
func OpenParent(ns *host.Netns, link string) (*Parent, error) {
	e, err := openEngine(ns)
	if err != nil {
		return nil, err
	}
	return &Parent{engine: e, link: link}, nil
}

// Close lets go of the parent. The rules stay in force.
func (p *Parent) Close() { p.close() }

func (p *Parent) table() table { return table{unix.NFPROTO_NETDEV, TablePrefix + p.link} }

// DenyAll puts generation 0 in force for a MAC, which lets only pass what an interface
// needs to get its addresses. The interface need not be there yet.
func (p *Parent) DenyAll(i Interface) error { return p.Apply(i, denied, denied, 0) }

// Apply puts a generation in force for the pod with the interface's MAC, and returns
// when the kernel has acknowledged it. On an error the one before is wholly in force.
//
// It is a guard: what new connections may be is exact, and what has the shape of a
// reply passes if the other direction's policy allows that peer and port. If the other
// direction is not isolated, that is TCP with ACK or RST, SCTP without INIT, and all of
// the protocols that have no such mark, from anyone; the pod's own table, which knows
// connections, is exact for those.
func (p *Parent) Apply(i Interface, ingress, egress *policy.Verdicts, generation uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.put(i, [2]*policy.Verdicts{ingress, egress}, generation)
}

func (p *Parent) put(i Interface, verdicts [2]*policy.Verdicts, generation uint64) error {
	err := p.apply(macPrefix(i.MAC), p.table(), i, verdicts, generation, func(version int) (rendering, error) {
		leads, err := p.leads(i.MAC)
		return parentRendering(p.link, i, verdicts, version, leads, !p.asserted), err
	})
	if err == nil {
		p.asserted = true
	}
	return err
}

// leads are the verdicts that the maps have for the MAC.
func (p *Parent) leads(mac [6]byte) (map[string]verdict, error) {
	found := map[string]verdict{}
	for _, name := range []string{fromPods, toPods, generations} {
		if err := p.elements(p.table(), name, func(key [6]byte, a map[uint16][]byte) {
			if key == mac {
				v := attributes(attributes(a[unix.NFTA_SET_ELEM_DATA])[unix.NFTA_DATA_VERDICT])
				found[name] = verdict{chain: text(v[unix.NFTA_VERDICT_CHAIN])}
				if code := v[unix.NFTA_VERDICT_CODE]; len(code) == 4 {
					found[name] = verdict{int32(binary.BigEndian.Uint32(code)), found[name].chain}
				}
			}
		}); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// Watch puts the rules of the parent's pods right when somebody else changes them, and
// tells so. ns is the same as at opening. It returns when ctx ends or its socket fails.
func (p *Parent) Watch(ctx context.Context, ns *host.Netns, report func(Tampering)) error {
	return p.watch(ctx, ns, report, func(table string) []string {
		if table != p.table().name {
			return nil
		}
		p.asserted = false
		return slices.Collect(maps.Keys(p.states))
	}, p.put)
}

// Generations are those in force, by MAC.
func (p *Parent) Generations() (map[[6]byte]uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.all(p.table())
}

// Dropped reads the counters of a pod.
func (p *Parent) Dropped(mac [6]byte) (d Dropped, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	of, err := p.conn.counters(p.table())
	tally := macPrefix(mac)
	return Dropped{of[tally+droppedIn], of[tally+droppedOut], of[tally+droppedSpoofed]}, err
}

// Remove takes away all that is of a MAC, and with the last one the table. It is no
// error if there is nothing.
func (p *Parent) Remove(mac [6]byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.table()
	held, err := p.all(t)
	if err != nil {
		return err
	}
	delete(p.states, macPrefix(mac))
	leads, err := p.leads(mac)
	if err != nil {
		return err
	}
	delete(held, mac)
	if len(held) == 0 {
		tables, err := p.conn.tables(t.family)
		if err != nil || !slices.Contains(tables, t.name) {
			return err
		}
		p.asserted = false
		return p.commit([]op{{do: deleteTable, table: t}})
	}
	r := rendering{layout: layout{tables: []table{t}}, owns: ownedBy(mac)}
	present, err := p.names(r)
	if err != nil {
		return err
	}
	var ops []op
	for name := range leads {
		ops = append(ops, op{do: deleteElements, table: t, set: &set{table: t, name: name}, elements: []element{{key: string(mac[:])}}})
	}
	_, _, sweep := r.make(present)
	return p.commit(append(ops, sweep...))
}

// The maps from MACs to their chains, which all pods of a parent share.
const fromPods, toPods = "from", "to"

// macPrefix begins the names that are of one MAC.
func macPrefix(mac [6]byte) string { return "m" + hex.EncodeToString(mac[:]) + "." }

func ownedBy(mac [6]byte) func(string) bool {
	return func(name string) bool { return strings.HasPrefix(name, macPrefix(mac)) }
}

func parentRendering(parent string, i Interface, verdicts [2]*policy.Verdicts, version int, leads map[string]verdict, assert bool) rendering {
	r := renderer{Interface: i, prefix: macPrefix(i.MAC) + "v" + strconv.Itoa(version) + ".", table: table{unix.NFPROTO_NETDEV, TablePrefix + parent}, tally: macPrefix(i.MAC)}
	r.layout = layout{
		tables: []table{r.table}, fill: map[string][]element{},
		counters: []string{r.tally + droppedIn, r.tally + droppedOut, r.tally + droppedSpoofed},
		sets:     []set{{table: r.table, name: fromPods, key: etherAddr, verdicts: true}, {table: r.table, name: toPods, key: etherAddr, verdicts: true}},
	}
	if assert {
		at := func(name string, number, priority uint32, by load, in string) {
			r.layout.base = append(r.layout.base, chain{
				table: r.table, name: name, hook: &hook{number: number, priority: priority, device: parent}, rules: []rule{on(dispatch{by, in})},
			})
		}
		// What the sender's chain accepts the receiver's still has to accept.
		at("senders", unix.NF_NETDEV_INGRESS, 0, linkSource, fromPods)
		at("receivers", unix.NF_NETDEV_INGRESS, 1, linkDestination, toPods)
		at("egress", unix.NF_NETDEV_EGRESS, 0, linkSource, fromPods)
	}
	node := r.addressSets("node", i.Node)
	rendered := rendering{prefix: r.prefix, table: r.table, owns: ownedBy(i.MAC), replies: true, ports: r.guardPorts, judged: [2]bool{verdicts[policy.Ingress].Isolated, verdicts[policy.Egress].Isolated}}
	for d, side := range [...]struct {
		in, name, counter string
		peer              [2]load
	}{
		policy.Ingress: {toPods, macPrefix(i.MAC) + toPods, droppedIn, sources},
		policy.Egress:  {fromPods, macPrefix(i.MAC) + fromPods, droppedOut, destinations},
	} {
		d := policy.Direction(d)
		var peers [2]verdict
		often := [2]expr{accept, accept}
		if verdicts[d].Isolated {
			peers, often = r.peers(d, side.peer)
		}
		var rules []rule
		if d == policy.Egress {
			rules = r.spoofing("spoofing", i.MAC, verdicts[policy.Ingress].Isolated || verdicts[policy.Egress].Isolated, nil, often)
		}
		if !verdicts[d].Isolated {
			rules = append(rules, on(accept))
		} else {
			for f := range peers {
				if d == policy.Ingress { // no jump, for what comes most often
					rules = append(rules, on(r.family(f), often[f]))
				}
				rules = append(rules, on(r.family(f), peers[f]))
			}
			if !verdicts[1-d].Isolated {
				rules = append(rules, replies(&policy.Ports{All: true}, inConnection, nil)...)
				rules = append(rules, r.fragments()...)
			}
			for f := range node {
				rules = append(rules, on(r.family(f), lookup{load: side.peer[f], set: node[f]}, accept))
			}
			rules = append(rules, on(is(etherType, etherARP), accept))
			rules = append(rules, r.discovery(d)...)
			rules = append(rules, r.dhcp(d)...)
			// Destination unreachable, time exceeded, parameter problem; packet too big.
			for _, kind := range []string{"\x03", "\x0b", "\x0c"} {
				rules = append(rules, on(r.family(0), is(l4Proto, icmp), is(icmpType, kind), accept))
			}
			rules = append(rules, on(r.family(1), is(l4Proto, icmp6), between(icmpType, "\x01", "\x04"), accept))
			rules = append(rules, on(count{r.tally + side.counter}, drop))
		}
		// The chain that the MAC leads to stays, and its rules are replaced: while an element
		// is replaced, a kernel may find neither (before Linux 6.17), and all would pass.
		r.layout.base = append(r.layout.base, chain{table: r.table, name: side.name, rules: rules})
		lead, led := leads[side.in]
		if v := jump(side.name); lead != v {
			m := &set{table: r.table, name: side.in, key: etherAddr, verdicts: true}
			if led { // by somebody else
				rendered.flip = append(rendered.flip, op{do: deleteElements, table: r.table, set: m, elements: []element{{key: string(i.MAC[:])}}})
			}
			rendered.flip = append(rendered.flip, op{do: addElements, table: r.table, set: m, elements: []element{{key: string(i.MAC[:]), verdict: &v}}})
		}
	}
	rendered.layout = r.layout
	return rendered
}

// guardPorts renders the chain of what peers of a direction are allowed.
func (r *renderer) guardPorts(d policy.Direction, a allowed) chain {
	var rules []rule
	switch {
	case a.new != nil && a.new.All:
		return portsChain(r.table, r.prefix, d, []rule{on(accept)})
	case a.new != nil:
		rules = ports(a.new, destinationPort, anything)
	}
	if a.replies != nil {
		rules = append(rules, replies(a.replies, inConnection, nil)...)
	}
	return portsChain(r.table, r.prefix, d, append(rules, r.fragments()...))
}

// fragments are those that are not the first, and so have no ports. Without a first
// one nobody can do anything with them, and that is judged.
func (r *renderer) fragments() []rule {
	return []rule{
		on(r.family(0), match{load: fragment4, mask: "\x1f\xff", op: notEqual, value: "\x00\x00"}, accept),
		on(r.family(1), match{load: fragment6, mask: "\xff\xf8", op: notEqual, value: "\x00\x00"}, accept),
	}
}

// inConnection is what TCP looks like that does not begin a connection.
var inConnection = []expr{match{load: tcpFlags, mask: ackOrReset, op: notEqual, value: "\x00"}}
