package nft

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
)

// Interface is a pod's interface as enforcement sees it.
type Interface struct {
	// Name in the pod.
	Name string
	// Index in the pod, 0 as long as it is not there. With it a rename changes nothing.
	Index int
	// MAC it must send from.
	MAC [6]byte
	// Addresses it may send from, besides IPv6 link-local ones.
	Addresses []netip.Addr
	// AnyAddress says that nobody gave the interface addresses, or nobody yet: it is
	// held to its MAC only.
	AnyAddress bool
	// DHCP says that the addresses come by DHCP, which must be let through.
	DHCP bool
	// Cut says that connections that policy no longer allows end, and TCP connections
	// from before there were rules. Else the pod's own table lets them go on.
	Cut bool
	// Node are the addresses of the pod's own node on this network. Traffic with them
	// is always allowed.
	Node []netip.Addr
	// Beside is another link of the pod by which the interface's addresses are reached.
	// In the pod the same holds on it. Without an index it is not there.
	Beside Beside
}

// Beside is a link beside an interface.
type Beside struct {
	Name  string
	Index int
	MAC   [6]byte
}

func (i Interface) equal(o Interface) bool {
	return i.Name == o.Name && i.Index == o.Index && i.MAC == o.MAC && i.AnyAddress == o.AnyAddress && i.DHCP == o.DHCP && i.Cut == o.Cut && i.Beside == o.Beside &&
		slices.Equal(i.Addresses, o.Addresses) && slices.Equal(i.Node, o.Node)
}

// What rules look at. Offsets are of RFC 791, 826, 8200, 4443, 9293, 768 and 9260.
var (
	linkDestination   = load{from: link, at: 0, len: 6}
	linkSource        = load{from: link, at: 6, len: 6}
	etherType         = load{from: link, at: 12, len: 2}
	linkSourceAndType = load{from: link, at: 6, len: 8}
	protocol          = load{from: meta, at: unix.NFT_META_PROTOCOL, len: 2}
	nfProto           = load{from: meta, at: unix.NFT_META_NFPROTO, len: 1}
	l4Proto           = load{from: meta, at: unix.NFT_META_L4PROTO, len: 1}
	ctState           = load{from: ct, at: unix.NFT_CT_STATE, len: 4}
	routeClass        = load{from: meta, at: unix.NFT_META_RTCLASSID, len: 4}
	ctDirection       = load{from: ct, at: unix.NFT_CT_DIRECTION, len: 1}
	fragment4         = load{from: network, at: 6, len: 2}
	fragment6         = load{from: fragment, at: 2, len: 2}
	hopLimit          = load{from: network, at: 7, len: 1}
	icmpType          = load{from: transport, at: 0, len: 1}
	ndTarget          = load{from: transport, at: 8, len: 16}
	sourcePort        = load{from: transport, at: 0, len: 2}
	destinationPort   = load{from: transport, at: 2, len: 2}
	bothPorts         = load{from: transport, at: 0, len: 4}
	tcpFlags          = load{from: transport, at: 13, len: 1}
	sctpChunk         = load{from: transport, at: 12, len: 1} // type of the first one
	arpSenderMAC      = load{from: network, at: 8, len: 6}
	arpSenderIP       = load{from: network, at: 14, len: 4}
	sources           = [2]load{{from: network, at: 12, len: 4}, {from: network, at: 8, len: 16}}
	destinations      = [2]load{{from: network, at: 16, len: 4}, {from: network, at: 24, len: 16}}
	addressTypes      = [2]keyType{ipv4Addr, ipv6Addr}
)

const (
	etherIPv4, etherARP, etherIPv6 = "\x08\x00", "\x08\x06", "\x86\xdd"
	etherVLAN, etherQinQ           = "\x81\x00", "\x88\xa8"
	icmp, tcp, udp, icmp6, sctp    = "\x01", "\x06", "\x11", "\x3a", "\x84"
	ackOrReset                     = "\x14"
	sctpInit                       = "\x01"
	connecting                     = "\x02" // SYN, and of finAckRstSyn no other
	finAckRstSyn                   = "\x17"
	replying                       = "\x01" // IP_CT_DIR_REPLY
)

var etherTypes = [2]string{etherIPv4, etherIPv6} // by family

// Bits of conntrack's state, include/uapi/linux/netfilter/nf_conntrack_common.h, in the
// byte order of this machine, as nft_ct has them.
var (
	none        = "\x00\x00\x00\x00"
	established = string(binary.NativeEndian.AppendUint32(nil, 2))
	related     = string(binary.NativeEndian.AppendUint32(nil, 4))
	untracked   = string(binary.NativeEndian.AppendUint32(nil, 64))
)

// routed says that a packet has been routed: of one that has not, the class of its route
// cannot be read (nft_meta_get_eval in net/netfilter/nft_meta.c).
var routed = match{load: routeClass, op: atLeast, value: none}

// Counters of dropped packets, objects of the tables.
const (
	droppedIn, droppedOut, droppedSpoofed = "dropped-ingress", "dropped-egress", "dropped-spoofed"
)

// HitsCounter is the name of the counter of a policy's hits in a direction: of packets that
// begin a connection, and pass because the policy allows it. The policy is named as in its
// Verdicts.
func HitsCounter(d policy.Direction, of string) string { return "hits-" + d.String() + "-" + hash(of) }

// hitsCounters are those of the policies that isolate an interface.
func hitsCounters(verdicts [2]*policy.Verdicts) (names []string) {
	for d, v := range verdicts {
		for _, p := range v.Policies {
			names = append(names, HitsCounter(policy.Direction(d), p))
		}
	}
	return names
}

// hash is short enough for a name, and long enough that no two things of a table share it.
func hash(what string) string {
	sum := sha256.Sum256([]byte(what))
	return hex.EncodeToString(sum[:8])
}

// layout is a generation's rules but for its peers: what must be there before it is in
// force, and the base chains that put it in force.
type layout struct {
	tables   []table
	sets     []set
	fill     map[string][]element // of sets, by name
	chains   []chain
	base     []chain // those without rules are not wanted
	counters []string
}

// renderer makes the names and rules of one version of an interface's rules.
type renderer struct {
	Interface
	prefix string
	table  table
	layout layout
	tally  string // begins the names of counters
}

func (r *renderer) name(what string) string { return r.prefix + what }

// peerMap is a map of peers.
func peerMap(t table, prefix string, d policy.Direction, family, side int) set {
	name := fmt.Sprintf("%s%s%d%c", prefix, d, 4+2*family, "sab"[side])
	return set{table: t, name: name, key: addressTypes[family], interval: side != single, verdicts: true}
}

// portsChain is the chain of a set of ports, whose name is that of its rules.
func portsChain(t table, prefix string, d policy.Direction, rules []rule) chain {
	return chain{table: t, name: prefix + d.String() + "-ports-" + hash(fmt.Sprintf("%#v", rules)), rules: rules}
}

// family says that a packet is of the family 0, IPv4, or 1, IPv6.
func (r *renderer) family(f int) expr {
	if r.table.family == unix.NFPROTO_INET {
		return is(nfProto, string([]byte{[2]byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6}[f]}))
	}
	return is(protocol, etherTypes[f])
}

// addressSets makes sets of addresses, one for each family, and returns their names.
func (r *renderer) addressSets(what string, addresses []netip.Addr) (names [2]string) {
	for f := range names {
		names[f] = r.name(what + [2]string{"4", "6"}[f])
		r.layout.sets = append(r.layout.sets, set{table: r.table, name: names[f], key: addressTypes[f]})
		r.layout.fill[names[f]] = nil
	}
	for _, a := range addresses {
		f := 0
		if a.Is6() {
			f = 1
		}
		r.layout.fill[names[f]] = append(r.layout.fill[names[f]], element{key: bytesOf(a)})
	}
	return names
}

// oneOf says that the load is one of the addresses of a family, which are in the set. One
// alone is compared, which is faster.
func oneOf(l load, f int, addresses []netip.Addr, set string) expr {
	ofFamily := slices.DeleteFunc(slices.Clone(addresses), func(a netip.Addr) bool { return a.Is6() != (f == 1) })
	if len(ofFamily) == 1 {
		return is(l, bytesOf(ofFamily[0]))
	}
	return lookup{load: l, set: set}
}

// between are the matches for a value in a range, of big-endian numbers.
func between(l load, first, last string) []expr {
	if first == last {
		return []expr{is(l, first)}
	}
	return []expr{match{load: l, op: atLeast, value: first}, match{load: l, op: atMost, value: last}}
}

// on makes a rule of parts.
func on(parts ...any) rule {
	var r rule
	for _, p := range parts {
		if many, ok := p.([]expr); ok {
			r = append(r, many...)
		} else {
			r = append(r, p)
		}
	}
	return r
}

// discovery is what IPv6 cannot be without, as far as a host says and hears it: neighbour
// discovery, whose hop limit shows that it comes from this link (RFC 4861), and multicast
// listeners' reports and the queries for them, without which switches that snoop do not
// pass it on (RFC 2710, 3810).
func (r *renderer) discovery(d policy.Direction) []rule {
	const mld, nd = "\x01", "\xff" // hop limits
	types := [...][][3]string{
		policy.Ingress: {{nd, "\x86", "\x88"}, {mld, "\x82", "\x82"}},
		policy.Egress:  {{nd, "\x85", "\x85"}, {nd, "\x87", "\x88"}, {mld, "\x83", "\x84"}, {mld, "\x8f", "\x8f"}},
	}[d]
	var rules []rule
	for _, t := range types {
		rules = append(rules, on(r.family(1), is(l4Proto, icmp6), is(hopLimit, t[0]), between(icmpType, t[1], t[2]), accept))
	}
	return rules
}

// dhcp lets a client's packets out, or a server's in.
func (r *renderer) dhcp(d policy.Direction) []rule {
	if !r.DHCP {
		return nil
	}
	ports := [...][2]string{policy.Ingress: {"\x00\x43\x00\x44", "\x02\x23\x02\x22"}, policy.Egress: {"\x00\x44\x00\x43", "\x02\x22\x02\x23"}}[d]
	return []rule{
		on(r.family(0), is(l4Proto, udp), is(bothPorts, ports[0]), accept),
		on(r.family(1), is(l4Proto, udp), is(bothPorts, ports[1]), accept),
	}
}

// peers makes the maps of a direction, and the chains that look a peer's address up in
// them, one for each family, to which it returns the jumps, and what looks in the hash alone.
func (r *renderer) peers(d policy.Direction, addresses [2]load) (jumps [2]verdict, often [2]expr) {
	for f, address := range addresses {
		c := chain{table: r.table, name: r.name(d.String() + [2]string{"4", "6"}[f])}
		for side := range len(sides{}) {
			m := peerMap(r.table, r.prefix, d, f, side)
			r.layout.sets = append(r.layout.sets, m)
			c.rules = append(c.rules, on(r.family(f), dispatch{address, m.name})) // without the family, nft cannot read it back
		}
		r.layout.chains = append(r.layout.chains, c)
		jumps[f], often[f] = jump(c.name), dispatch{address, peerMap(r.table, r.prefix, d, f, single).name}
	}
	return jumps, often
}

func bigEndian(port uint16) string { return string(binary.BigEndian.AppendUint16(nil, port)) }

// ports are the rules for the cells of a set of ports, which port is one of, each with
// what else a packet of the protocol must be.
func ports(p *policy.Ports, port load, also func(protocol string) []expr) []rule {
	var rules []rule
	for _, protocol := range []string{tcp, udp, sctp} {
		for _, r := range rangesOf(p, protocol) {
			rules = append(rules, on(within(protocol, port, r), also(protocol), accept))
		}
	}
	return rules
}

func rangesOf(p *policy.Ports, protocol string) []policy.PortRange {
	switch protocol {
	case tcp:
		return p.TCP
	case udp:
		return p.UDP
	}
	return p.SCTP
}

// stretch says whether a port is in the ranges, and up to which one that stays so, last at
// most.
func stretch(ranges []policy.PortRange, port, last int) (in bool, until int) {
	i, _ := slices.BinarySearchFunc(ranges, port, func(r policy.PortRange, port int) int { return int(r.Last) - port })
	switch {
	case i == len(ranges):
		return false, last
	case port < int(ranges[i].First):
		return false, min(last, int(ranges[i].First)-1)
	}
	return true, min(last, int(ranges[i].Last))
}

var allPorts = policy.PortRange{First: 0, Last: 65535}

// within are the matches for ports of a protocol.
func within(protocol string, port load, r policy.PortRange) []expr {
	at := []expr{is(l4Proto, protocol)}
	if r != allPorts {
		at = append(at, between(port, bigEndian(r.First), bigEndian(r.Last))...)
	}
	return at
}

// mostCounters is how many a rule has: it has room for 128 expressions (NFT_RULE_MAXEXPRS).
const mostCounters = 100

// counted are the rules that accept the cells of a set of ports, and count each for the
// policies that allow it.
func counted(d policy.Direction, p *policy.Ports) (rules []rule) {
	add := func(of []expr, counters []expr) {
		for ; len(counters) > mostCounters; counters = counters[mostCounters:] {
			rules = append(rules, on(of, counters[:mostCounters]))
		}
		rules = append(rules, on(of, counters, accept))
	}
	hits := make([]expr, len(p.By))
	var always []expr // of the policies that allow everything
	for i, s := range p.By {
		hits[i] = count{HitsCounter(d, s.Policy)}
		if s.Ports.All {
			always = append(always, hits[i])
		}
	}
	if len(always) > 0 { // neighbour discovery, which passes anyway, begins nothing
		rules = append(rules, on(is(ctState, untracked), accept))
	}
	for _, protocol := range []string{tcp, udp, sctp} {
		whole := rangesOf(p, protocol)
		if p.All {
			whole = []policy.PortRange{allPorts}
		}
		for _, r := range whole {
			for first, last := int(r.First), 0; first <= int(r.Last); first = last + 1 {
				last = int(r.Last)
				var counters []expr
				for i, s := range p.By {
					var in bool
					if in, last = stretch(rangesOf(s.Ports, protocol), first, last); in || s.Ports.All {
						counters = append(counters, hits[i])
					}
				}
				if !p.All || len(counters) > len(always) {
					add(within(protocol, destinationPort, policy.PortRange{First: uint16(first), Last: uint16(last)}), counters)
				}
			}
		}
	}
	if p.All {
		add(nil, always)
	}
	return rules
}

// replies are packets that may be answers from the ports: TCP and others that are as
// said, and SCTP that does not begin an association. From a peer with whom everything is
// allowed they are of any protocol.
func replies(p *policy.Ports, tcpLike, otherLike []expr) []rule {
	like := func(protocol string) []expr {
		switch protocol {
		case tcp:
			return tcpLike
		case sctp:
			return []expr{isnt(sctpChunk, sctpInit)}
		}
		return otherLike
	}
	if !p.All {
		return ports(p, sourcePort, like)
	}
	return []rule{
		on(is(l4Proto, tcp), tcpLike, accept),
		on(is(l4Proto, sctp), like(sctp), accept),
		on(isnt(l4Proto, tcp), isnt(l4Proto, sctp), otherLike, accept),
	}
}

// Packets of a connection. A kernel without CONFIG_NF_CT_PROTO_SCTP knows no ports of SCTP:
// with one association all between the two would be of it, also what begins another one.
var (
	known    = match{load: ctState, mask: established, op: notEqual, value: none}
	sctpData = []expr{is(l4Proto, sctp), isnt(sctpChunk, sctpInit)}
)

// ofConnections are the rules that accept a set of ports for what is of a connection.
func ofConnections(p *policy.Ports) []rule {
	if p.All {
		return []rule{on(isnt(l4Proto, sctp), known, accept), on(sctpData, known, accept)}
	}
	return ports(p, destinationPort, func(protocol string) []expr {
		if protocol == sctp {
			return []expr{isnt(sctpChunk, sctpInit), known}
		}
		return []expr{known}
	})
}

// anything is what also is when nothing else is asked.
func anything(string) []expr { return nil }

// pod renders the rules inside the pod.
func pod(i Interface, ingress, egress bool, prefix string) layout {
	r := renderer{Interface: i, prefix: prefix, table: table{unix.NFPROTO_INET, TablePrefix + i.Name}}
	r.layout.fill = map[string][]element{}
	r.layout.tables = []table{r.table}
	r.layout.counters = []string{droppedIn, droppedOut, droppedSpoofed}
	node := r.addressSets("node", i.Node)
	base := func(name string, number uint32, rules ...rule) {
		r.layout.base = append(r.layout.base, chain{table: r.table, name: name, hook: &hook{number: number}, rules: rules})
	}
	var forward []rule
	for _, side := range []struct {
		direction policy.Direction
		isolated  bool
		hook      string
		number    uint32
		peers     [2]load
		counter   string
	}{
		{policy.Ingress, ingress, "input", unix.NF_INET_LOCAL_IN, sources, droppedIn},
		{policy.Egress, egress, "output", unix.NF_INET_LOCAL_OUT, destinations, droppedOut},
	} {
		answered := [...]bool{policy.Ingress: egress, policy.Egress: ingress}[side.direction] // the other direction is isolated
		if !side.isolated && !(r.Cut && answered) {
			base(side.hook, side.number)
			continue
		}
		name, dropped := r.name(side.direction.String()), []expr{count{side.counter}, drop}
		// What is of a connection passes, or with Cut what is an answer and need not be
		// judged.
		of := known
		if r.Cut {
			of = is(ctDirection, replying)
		}
		var rules []rule
		if !r.Cut || !answered {
			rules = append(rules, on(isnt(l4Proto, sctp), of, accept), on(sctpData, known, accept))
		}
		rules = append(rules,
			on(is(l4Proto, icmp), match{load: ctState, mask: related, op: notEqual, value: none}, accept),
			on(is(l4Proto, icmp6), match{load: ctState, mask: related, op: notEqual, value: none}, accept))
		peers, _ := r.peers(side.direction, side.peers)
		for f, peers := range peers {
			rules = append(rules, on(r.family(f), peers))
		}
		rules = append(rules, r.discovery(side.direction)...)
		rules = append(rules, r.dhcp(side.direction)...)
		for f := range node {
			rules = append(rules, on(r.family(f), lookup{load: side.peers[f], set: node[f]}, accept))
		}
		r.layout.chains = append(r.layout.chains, chain{table: r.table, name: name, rules: append(rules, on(dropped))})
		var first []rule
		for _, through := range r.through(side.direction) {
			if r.Cut {
				// Who began a TCP connection that is seen from its middle on is not known.
				first = append(first, on(through, is(l4Proto, tcp), match{load: ctState, mask: established, op: equal, value: none},
					match{load: tcpFlags, mask: finAckRstSyn, op: notEqual, value: connecting}, dropped))
			}
			if !side.isolated {
				first = append(first,
					on(through, isnt(l4Proto, sctp), is(ctDirection, replying), jump(name)),
					on(through, sctpData, is(ctDirection, replying), jump(name)))
				continue
			}
			first = append(first, on(through, jump(name)))
			// A pod that routes would carry others' traffic past its policy.
			forward = append(forward, on(through, dropped))
		}
		base(side.hook, side.number, first...)
	}
	base("forward", unix.NF_INET_FORWARD, forward...)
	if i.Index != 0 {
		r.table = table{unix.NFPROTO_NETDEV, TablePrefix + i.Name}
		r.layout.tables = append(r.layout.tables, r.table)
		// What the output hook has judged has a route. Packet sockets' frames have none, and
		// did not pass there: of those go what an address takes only.
		var judged []expr
		var others []rule
		if egress {
			judged = []expr{routed}
			others = append(r.dhcp(policy.Egress), on(is(etherType, etherARP), accept), on(routed, accept), on(count{droppedOut}, drop))
		}
		held := func(name, spoofing, link string, mac [6]byte) {
			r.layout.base = append(r.layout.base, chain{
				table: r.table, name: name, hook: &hook{number: unix.NF_NETDEV_EGRESS, device: link},
				rules: append(r.spoofing(spoofing, mac, ingress || egress, judged, [2]expr{accept, accept}), others...),
			})
		}
		held("egress", "spoofing", i.Name, i.MAC)
		if i.Beside.Index != 0 {
			held("egress-beside", "spoofing-beside", i.Beside.Name, i.Beside.MAC)
		}
	}
	return r.layout
}

// through says that a packet comes in or goes out through the interface, or what is
// beside it.
func (r *renderer) through(d policy.Direction) []expr {
	keys := [...][2]uint32{policy.Ingress: {unix.NFT_META_IIF, unix.NFT_META_IIFNAME}, policy.Egress: {unix.NFT_META_OIF, unix.NFT_META_OIFNAME}}[d]
	link := func(name string, index int) expr {
		if index != 0 {
			return is(load{from: meta, at: keys[0], len: 4}, string(binary.NativeEndian.AppendUint32(nil, uint32(index))))
		}
		padded := make([]byte, unix.IFNAMSIZ)
		copy(padded, name)
		return is(load{from: meta, at: keys[1], len: unix.IFNAMSIZ}, string(padded))
	}
	ways := []expr{link(r.Name, r.Index)}
	if r.Beside.Name != "" {
		ways = append(ways, link(r.Beside.Name, r.Beside.Index))
	}
	return ways
}

// portsOf renders the chain of a set of ports inside the pod.
func portsOf(t table, prefix string, cut bool, d policy.Direction, a allowed) chain {
	var rules []rule
	if a.replies != nil {
		answer := []expr{is(ctDirection, replying)}
		rules = replies(a.replies, answer, answer)
	}
	if cut { // an answer begins nothing
		rules = append(rules, on(isnt(l4Proto, sctp), is(ctDirection, replying), goBack))
	}
	if a.new != nil {
		if cut { // what is of a connection has been counted
			rules = append(rules, ofConnections(a.new)...)
		}
		rules = append(rules, counted(d, a.new)...)
	}
	return portsChain(t, prefix, d, rules)
}

// spoofing makes the chain that returns what a link with the sender's MAC may send, and
// drops all else: other MACs and addresses, tagged frames, what only routers say, and of one
// that is isolated other protocols than IP and ARP. A frame that a raw socket sends past the
// queues may have no link layer header as far as nf_tables knows: it matches nothing, and is
// dropped.
// It returns the rules that lead to the chain, behind such as end with its family's often
// for what comes most often, and is as also says.
func (r *renderer) spoofing(name string, sender [6]byte, isolated bool, also []expr, often [2]expr) []rule {
	own, address := r.addressSets(name+"-own", r.Addresses), string(sender[:])
	mac := is(linkSource, address)
	frame := func(kind string, parts ...any) rule { return on(append([]any{mac, is(etherType, kind)}, parts...)...) }
	dropped := []expr{count{r.tally + droppedSpoofed}, drop}
	linkLocal := func(l load, op compare) match {
		return match{load: load{from: l.from, at: l.at, len: 2}, mask: "\xff\xc0", op: op, value: "\xfe\x80"}
	}
	var rules []rule
	for _, kind := range []string{"\x86", "\x89"} { // router advertisement, redirect
		rules = append(rules, frame(etherIPv6, is(l4Proto, icmp6), is(icmpType, kind), dropped))
	}
	if r.AnyAddress {
		rules = append(rules, frame(etherARP, is(arpSenderMAC, address), goBack), frame(etherIPv6, goBack)) // IPv4 has been let through
	} else {
		rules = append(rules,
			frame(etherARP, is(arpSenderMAC, address), lookup{load: arpSenderIP, set: own[0]}, goBack),
			frame(etherARP, is(arpSenderMAC, address), is(arpSenderIP, "\x00\x00\x00\x00"), goBack), // a probe, RFC 5227
			// A neighbour advertisement for somebody else's address.
			frame(etherIPv6, is(l4Proto, icmp6), is(icmpType, "\x88"), lookup{load: ndTarget, set: own[1], not: true}, linkLocal(ndTarget, notEqual), dropped),
			frame(etherIPv4, lookup{load: sources[0], set: own[0]}, goBack),
			frame(etherIPv6, lookup{load: sources[1], set: own[1]}, goBack),
			frame(etherIPv6, linkLocal(sources[1], equal), goBack),
			// Duplicate address detection has no source yet.
			frame(etherIPv6, is(sources[1], string(make([]byte, 16))), is(l4Proto, icmp6), goBack))
		if r.DHCP {
			rules = append(rules, frame(etherIPv4, is(sources[0], "\x00\x00\x00\x00"), is(l4Proto, udp), is(bothPorts, "\x00\x44\x00\x43"), goBack))
		}
	}
	if !isolated {
		others := []any{mac}
		for _, kind := range []string{etherIPv4, etherARP, etherIPv6, etherVLAN, etherQinQ} { // what they tag may have any address
			others = append(others, isnt(etherType, kind))
		}
		rules = append(rules, on(append(others, goBack)...))
	}
	rules = append(rules, on(dropped))
	r.layout.chains = append(r.layout.chains, chain{table: r.table, name: r.name(name), rules: rules})
	var first []rule
	for f, more := range [][]expr{nil, {isnt(l4Proto, icmp6)}} {
		from := []expr{is(linkSourceAndType, address+etherTypes[f]), r.family(f)}
		if !r.AnyAddress {
			from = append(from, oneOf(sources[f], f, r.Addresses, own[f]))
		}
		first = append(first, on(from, more, also, often[f]))
	}
	return append(first, on(jump(r.name(name))))
}
