package nft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/cni/policy"
)

// kernel is a model of nf_tables: it does operations, and walks the rules for packets.
type kernel map[table]*modelTable

type modelTable struct {
	chains   map[string]*chain
	sets     map[string]map[string]element // by set and key
	kinds    map[string]set
	counters map[string]int // packets, by name
}

// do does a transaction as the kernel would, and complains where the kernel would.
func (k kernel) do(t failer, ops []op) {
	t.Helper()
	for _, o := range ops {
		tab := k[o.table]
		if o.do == addTable {
			if tab == nil {
				k[o.table] = &modelTable{map[string]*chain{}, map[string]map[string]element{}, map[string]set{}, map[string]int{}}
			}
			continue
		}
		if tab == nil {
			t.Fatalf("%v: no such table", o)
		}
		var c *chain
		if o.chain != nil && o.do != addChain {
			if c = tab.chains[o.chain.name]; c == nil {
				t.Fatalf("%v: no such chain", o)
			}
		}
		var s map[string]element
		if o.set != nil && o.do != addSet {
			if s = tab.sets[o.set.name]; s == nil {
				t.Fatalf("%v: no such set", o)
			}
		}
		switch o.do {
		case deleteTable:
			delete(k, o.table)
		case addChain:
			if tab.chains[o.chain.name] == nil {
				tab.chains[o.chain.name] = &chain{name: o.chain.name, hook: o.chain.hook}
			}
		case deleteChain:
			if used := tab.used(); used[o.chain.name] || len(c.rules) > 0 {
				t.Fatalf("%v: busy", o)
			}
			delete(tab.chains, o.chain.name)
		case flushChain:
			c.rules = nil
		case addRule:
			for _, e := range o.rule {
				switch e := e.(type) {
				case verdict:
					if e.chain != "" && tab.chains[e.chain] == nil {
						t.Fatalf("%v: jumps to %s, which is not there", o, e.chain)
					}
				case lookup:
					if tab.sets[e.set] == nil {
						t.Fatalf("%v: looks into %s, which is not there", o, e.set)
					}
				case dispatch:
					if tab.sets[e.set] == nil {
						t.Fatalf("%v: looks into %s, which is not there", o, e.set)
					}
				case count:
					if _, there := tab.counters[e.counter]; !there {
						t.Fatalf("%v: counts with %s, which is not there", o, e.counter)
					}
				}
			}
			c.rules = append(c.rules, o.rule)
		case addSet:
			if tab.sets[o.set.name] == nil {
				tab.sets[o.set.name], tab.kinds[o.set.name] = map[string]element{}, *o.set
			}
		case deleteSet:
			if tab.used()[o.set.name] {
				t.Fatalf("%v: busy", o)
			}
			delete(tab.sets, o.set.name)
		case addCounter:
			if _, there := tab.counters[o.counter]; !there {
				tab.counters[o.counter] = 0
			}
		case deleteCounter:
			if _, there := tab.counters[o.counter]; !there || tab.used()[o.counter] {
				t.Fatalf("%v: busy, or not there", o)
			}
			delete(tab.counters, o.counter)
		case addElements:
			for _, e := range o.elements {
				if e.verdict != nil && tab.chains[e.verdict.chain] == nil {
					t.Fatalf("%v: leads to %s, which is not there", o, e.verdict.chain)
				}
				for _, other := range s {
					if other.key == e.key || tab.kinds[o.set.name].interval && e.key <= other.last && other.key <= e.last {
						t.Fatalf("%v: %x is there", o, e.key)
					}
				}
				s[e.key] = e
			}
		case deleteElements:
			for _, e := range o.elements {
				if old, ok := s[e.key]; !ok || old.last != e.last {
					t.Fatalf("%v: %x is not there", o, e.key)
				}
				delete(s, e.key)
			}
		}
	}
}

// used are the names that rules and elements lead to.
func (m *modelTable) used() map[string]bool {
	used := map[string]bool{}
	for _, c := range m.chains {
		for _, r := range c.rules {
			for _, e := range r {
				switch e := e.(type) {
				case verdict:
					used[e.chain] = true
				case lookup:
					used[e.set] = true
				case dispatch:
					used[e.set] = true
				case count:
					used[e.counter] = true
				}
			}
		}
	}
	for _, s := range m.sets {
		for _, e := range s {
			if e.verdict != nil {
				used[e.verdict.chain] = true
			}
		}
	}
	return used
}

// packet is what the model's rules see. Without a header its bytes are nil.
type packet struct {
	in, out                  int // index of the interface
	inName, outName          string
	state                    uint32
	direction                byte // of conntrack: 1 for an answer
	link, network, transport []byte
	protocol                 uint8
	fragment                 uint16 // offset and flags of an IPv6 fragment header
	fragmented               bool
	routed                   bool // else it is a packet socket's
}

func (p packet) load(t table, l load) ([]byte, bool) {
	at := func(b []byte) ([]byte, bool) {
		if int(l.at+l.len) > len(b) {
			return nil, false
		}
		return b[l.at : l.at+l.len], true
	}
	native := func(v int) ([]byte, bool) { return binary.NativeEndian.AppendUint32(nil, uint32(v)), true }
	name := func(s string) ([]byte, bool) { return append([]byte(s), make([]byte, 16-len(s))...), true }
	v6 := len(p.network) > 0 && p.network[0]>>4 == 6
	switch l.from {
	case link:
		return at(p.link)
	case network:
		return at(p.network)
	case transport:
		return at(p.transport)
	case fragment:
		return binary.BigEndian.AppendUint16(nil, p.fragment), p.fragmented && v6
	case ct:
		if t.family != unix.NFPROTO_INET {
			panic("conntrack in family netdev")
		}
		if l.at == unix.NFT_CT_DIRECTION {
			return []byte{p.direction}, p.state&(2|4|8) != 0
		}
		return native(int(p.state))
	}
	switch l.at {
	case unix.NFT_META_RTCLASSID:
		return []byte(none), p.routed
	case unix.NFT_META_IIF:
		return native(p.in)
	case unix.NFT_META_OIF:
		return native(p.out)
	case unix.NFT_META_IIFNAME:
		return name(p.inName)
	case unix.NFT_META_OIFNAME:
		return name(p.outName)
	case unix.NFT_META_PROTOCOL:
		return p.link[12:14], true
	case unix.NFT_META_L4PROTO:
		return []byte{p.protocol}, len(p.network) > 0
	case unix.NFT_META_NFPROTO:
		if v6 {
			return []byte{unix.NFPROTO_IPV6}, true
		}
		return []byte{unix.NFPROTO_IPV4}, true
	}
	panic(fmt.Sprintf("meta %d", l.at))
}

// walk says whether the packet passes a base chain, and by which counter it does not.
func (k kernel) walk(t table, base string, p packet) (passes bool, counter string) {
	if k[t] == nil || k[t].chains[base] == nil {
		return true, ""
	}
	code, counter := k.chain(t, base, p)
	return code != drop.code, counter
}

const goOn = -1

func (k kernel) chain(t table, name string, p packet) (code int32, counter string) {
	tab := k[t]
rules:
	for _, r := range tab.chains[name].rules {
		for _, e := range r {
			v := verdict{code: goOn}
			switch e := e.(type) {
			case count:
				counter = e.counter
				tab.counters[counter]++
			case verdict:
				v = e
			case match:
				got, ok := p.load(t, e.load)
				if !ok {
					continue rules
				}
				got = bytes.Clone(got)
				for i := range e.mask {
					got[i] &= e.mask[i]
				}
				c := strings.Compare(string(got), e.value)
				if !map[compare]bool{equal: c == 0, notEqual: c != 0, atMost: c <= 0, atLeast: c >= 0}[e.op] {
					continue rules
				}
			case lookup:
				got, ok := p.load(t, e.load)
				if !ok {
					continue rules
				}
				if _, in := tab.find(e.set, string(got)); in == e.not {
					continue rules
				}
			case dispatch:
				got, ok := p.load(t, e.load)
				if !ok {
					continue rules
				}
				found, in := tab.find(e.set, string(got))
				if !in {
					continue rules
				}
				v = *found.verdict
			}
			switch v.code {
			case goOn:
			case codeJump:
				c, n := k.chain(t, v.chain, p)
				if n != "" {
					counter = n
				}
				if c != goOn {
					return c, counter
				}
			case codeReturn:
				return goOn, counter
			default:
				return v.code, counter
			}
		}
	}
	return goOn, counter
}

func (m *modelTable) find(set, key string) (element, bool) {
	if !m.kinds[set].interval {
		e, ok := m.sets[set][key]
		return e, ok
	}
	for _, e := range m.sets[set] {
		if e.key <= key && key <= e.last {
			return e, true
		}
	}
	return element{}, false
}

type failer interface {
	Helper()
	Fatalf(string, ...any)
}

// flow is a packet's ends, as the tests draw them.
type flow struct {
	source, destination         netip.Addr
	protocol                    uint8
	sourcePort, destinationPort uint16
	flags                       byte // of TCP; of SCTP 1 for INIT
	sourceMAC, destinationMAC   [6]byte
	lateFragment                bool
}

func (f flow) packet() packet {
	p := packet{protocol: f.protocol, routed: true}
	kind := etherIPv4
	if f.source.Is6() {
		kind = etherIPv6
		p.network = make([]byte, 40)
		p.network[0], p.network[7] = 0x60, 64
		copy(p.network[8:], f.source.AsSlice())
		copy(p.network[24:], f.destination.AsSlice())
	} else {
		p.network = make([]byte, 20)
		p.network[0], p.network[9] = 0x45, f.protocol
		copy(p.network[12:], f.source.AsSlice())
		copy(p.network[16:], f.destination.AsSlice())
	}
	p.link = slices.Concat(f.destinationMAC[:], f.sourceMAC[:], []byte(kind))
	p.transport = make([]byte, 40)
	if f.protocol == policy.TCP || f.protocol == policy.UDP || f.protocol == policy.SCTP {
		binary.BigEndian.PutUint16(p.transport, f.sourcePort)
		binary.BigEndian.PutUint16(p.transport[2:], f.destinationPort)
		switch f.protocol {
		case policy.TCP:
			p.transport[13] = f.flags
		case policy.SCTP:
			p.transport[12] = f.flags
		}
	} else {
		p.transport[0] = byte(f.destinationPort) // ICMP's type
	}
	if f.lateFragment {
		p.transport = nil
		if f.source.Is6() {
			p.fragmented, p.fragment = true, 0x0100
		} else {
			p.network[6] = 0x01
		}
	}
	return p
}

// The peers of the tests: few, so that draws meet.
var (
	peers4       = []netip.Addr{netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("10.0.1.0"), netip.MustParseAddr("255.255.255.255")}
	peers6       = []netip.Addr{netip.MustParseAddr("::"), netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fd00::3"), netip.MustParseAddr("fd00::1:0"), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")}
	ownAddresses = []netip.Addr{netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fd00::9")}
	ownMAC       = [6]byte{2, 0, 0, 0, 0, 9}
)

// drawPorts draws the shares of up to three policies, and of nobody: that is the node's.
func drawPorts(t *rapid.T) *policy.Ports {
	var all policy.Ports
	for _, by := range []string{"", "p", "q", "r"} {
		if (by == "") != rapid.Bool().Draw(t, "share of "+by) {
			continue
		}
		s := drawShare(t)
		if all.All = all.All || s.All; by != "" {
			all.By = append(all.By, policy.Share{Policy: by, Ports: s})
		}
		all.TCP, all.UDP, all.SCTP = union(all.TCP, s.TCP), union(all.UDP, s.UDP), union(all.SCTP, s.SCTP)
	}
	if all.All {
		return &policy.Ports{All: true, By: all.By}
	}
	return &all
}

// union is all ports of both, as ranges that do not touch.
func union(a, b []policy.PortRange) (all []policy.PortRange) {
	for _, r := range slices.SortedFunc(slices.Values(slices.Concat(a, b)), func(a, b policy.PortRange) int { return int(a.First) - int(b.First) }) {
		if n := len(all); n > 0 && int(r.First) <= int(all[n-1].Last)+1 {
			all[n-1].Last = max(all[n-1].Last, r.Last)
		} else {
			all = append(all, r)
		}
	}
	return all
}

func drawShare(t *rapid.T) *policy.Ports {
	ranges := func(label string) []policy.PortRange {
		return rapid.SampledFrom([][]policy.PortRange{nil, {{First: 80, Last: 80}}, {{First: 0, Last: 65535}}, {{First: 79, Last: 81}, {First: 1000, Last: 65535}}, {{First: 0, Last: 0}}}).Draw(t, label)
	}
	if rapid.IntRange(0, 3).Draw(t, "all") == 0 {
		return &policy.Ports{All: true}
	}
	return &policy.Ports{TCP: ranges("tcp"), UDP: ranges("udp"), SCTP: ranges("sctp")}
}

func drawVerdicts(t *rapid.T, label string) *policy.Verdicts {
	if rapid.IntRange(0, 3).Draw(t, label+" open") == 0 {
		return &policy.Verdicts{}
	}
	v := &policy.Verdicts{Isolated: true, Policies: []string{"p", "q", "r", "s"}}
	for _, family := range [][]netip.Addr{peers4, peers6} {
		for i := 0; i < len(family); i++ {
			if rapid.Bool().Draw(t, label+" peer") {
				continue
			}
			last := rapid.IntRange(i, len(family)-1).Draw(t, label+" last")
			v.Peers = append(v.Peers, policy.PeerRange{First: family[i], Last: family[last], Ports: drawPorts(t)})
			i = last
		}
	}
	return v
}

// drawFlow draws a packet between the pod and a peer.
func drawFlow(t *rapid.T, d policy.Direction) (f flow, peer netip.Addr) {
	v6 := rapid.IntRange(0, 1).Draw(t, "family")
	peer = rapid.SampledFrom([][]netip.Addr{peers4, peers6}[v6]).Draw(t, "peer")
	port := rapid.SampledFrom([]uint16{0, 1, 79, 80, 81, 82, 999, 1000, 65535})
	f = flow{
		source: peer, destination: ownAddresses[v6], destinationMAC: ownMAC, sourceMAC: [6]byte{2, 0, 0, 0, 0, 1},
		protocol:   rapid.SampledFrom([]uint8{policy.TCP, policy.UDP, policy.SCTP, 47, 1, 58}).Draw(t, "protocol"),
		sourcePort: port.Draw(t, "source port"), destinationPort: port.Draw(t, "destination port"),
		flags: rapid.SampledFrom([]byte{1, 2, 0x12, 0x10, 4, 0}).Draw(t, "flags"),
	}
	if f.protocol == 1 || f.protocol == 58 {
		f.destinationPort = rapid.SampledFrom([]uint16{8, 128}).Draw(t, "ICMP type")
	}
	if d == policy.Egress {
		f.source, f.destination, f.sourceMAC, f.destinationMAC = f.destination, f.source, f.destinationMAC, f.sourceMAC
	}
	return f, peer
}

// versions puts a rendering with its peers into the model.
func versions(t failer, k kernel, r rendering, verdicts [2]*policy.Verdicts) {
	t.Helper()
	chains := map[string]chain{}
	var fill []op
	for d := range verdicts {
		if !r.judged[d] {
			continue
		}
		for f, want := range r.peersOf(policy.Direction(d), verdicts, chains) {
			next, _ := sides{}.diff(want)
			for side, peers := range next {
				in := peerMap(r.table, r.prefix, policy.Direction(d), f, side)
				fill = append(fill, op{do: addElements, table: r.table, set: &in, elements: elements(peers)})
			}
		}
	}
	prepare, flip, _ := r.make(present{})
	k.do(t, prepare)
	for _, c := range chains {
		k.do(t, c.replace())
	}
	k.do(t, fill)
	k.do(t, flip)
}

// hits are the counters of those whose shares allow it. Of peers of whom somebody allows
// everything that is not tracked is not counted.
func hits(v *policy.Verdicts, d policy.Direction, peer netip.Addr, protocol uint8, port uint16, state uint32) map[string]int {
	counters := map[string]int{}
	for _, r := range v.Peers {
		if r.Ports.All && state == 64 && slices.ContainsFunc(r.Ports.By, func(s policy.Share) bool { return s.Ports.All }) {
			continue
		}
		for _, s := range r.Ports.By {
			of := policy.Verdicts{Isolated: true, Peers: []policy.PeerRange{{First: r.First, Last: r.Last, Ports: s.Ports}}}
			if of.Allows(peer, protocol, port) {
				counters[HitsCounter(d, s.Policy)] = 1
			}
		}
	}
	return counters
}

// counts does the walk, and says what hits it counted.
func (k kernel) counts(t table, walk func()) map[string]int {
	var before map[string]int
	if k[t] != nil {
		before = maps.Clone(k[t].counters)
	}
	walk()
	counted := map[string]int{}
	for name, n := range before {
		if now := k[t].counters[name]; now != n && strings.HasPrefix(name, "hits-") {
			counted[name] = now - n
		}
	}
	return counted
}

// What the rules in the pod say of a new connection is what the verdicts say, for every
// packet; of the rest conntrack's word counts. A new one is counted for the policies that
// allow it, and nothing else is.
func TestPodRulesSayWhatVerdictsSay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		i := Interface{Name: "net1", Index: rapid.IntRange(0, 1).Draw(t, "index") * 7, MAC: ownMAC, Addresses: ownAddresses}
		verdicts := [2]*policy.Verdicts{drawVerdicts(t, "ingress"), drawVerdicts(t, "egress")}
		k := kernel{}
		r := podRendering(i, verdicts, 3)
		versions(t, k, r, verdicts)
		for range 30 {
			d := policy.Direction(rapid.IntRange(0, 1).Draw(t, "direction"))
			f, peer := drawFlow(t, d)
			p := f.packet()
			base := "input"
			if d == policy.Ingress {
				p.in, p.inName = 7, "net1"
			} else {
				base, p.out, p.outName = "output", 7, "net1"
			}
			p.state = rapid.SampledFrom([]uint32{1, 2, 4, 8, 64}).Draw(t, "state")
			icmpError := f.protocol == 1 || f.protocol == 58
			init := f.protocol == policy.SCTP && f.flags == 1 // judged always: it begins an association
			want := verdicts[d].Allows(peer, f.protocol, f.destinationPort) || p.state == 2 && !init || p.state == 4 && icmpError
			var got bool
			var counter string
			counted := k.counts(r.table, func() { got, counter = k.walk(r.table, base, p) })
			if got != want {
				t.Fatalf("%s %+v in state %d: rules say %v, verdicts %v", d, f, p.state, got, want)
			}
			wantCounted := hits(verdicts[d], d, peer, f.protocol, f.destinationPort, p.state)
			if p.state == 2 && !init || p.state == 4 && icmpError {
				clear(wantCounted)
			}
			if !maps.Equal(counted, wantCounted) {
				t.Fatalf("%s %+v in state %d is counted by %v, should be by %v", d, f, p.state, counted, wantCounted)
			}
			if want := [2]string{droppedIn, droppedOut}[d]; !got && counter != want {
				t.Fatalf("dropped packet is counted by %q", counter)
			}
			// What a packet socket sends has not been judged.
			if at := (table{unix.NFPROTO_NETDEV, r.table.name}); d == policy.Egress && i.Index != 0 {
				for _, p.routed = range []bool{true, false} {
					got, counter := k.walk(at, "egress", p)
					if want := p.routed || !verdicts[d].Isolated; got != want || !got && counter != droppedOut {
						t.Fatalf("routed %v, isolated %v: passes %v, counted by %q", p.routed, verdicts[d].Isolated, got, counter)
					}
				}
			}
			// Other interfaces are none of its business.
			p.in, p.out, p.inName, p.outName = 8*min(p.in, 1), 8*min(p.out, 1), "net2", "net2"
			if got, _ := k.walk(r.table, base, p); !got {
				t.Fatalf("%s %+v of another interface is dropped", d, f)
			}
		}
	})
}
