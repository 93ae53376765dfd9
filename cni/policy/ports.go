package policy

import (
	"cmp"
	"encoding/binary"
	"iter"
	"slices"
	"strings"
)

// of is the list of a protocol's ports; nil for a protocol without ports.
func (p *Ports) of(protocol uint8) *[]PortRange {
	switch protocol {
	case TCP:
		return &p.TCP
	case UDP:
		return &p.UDP
	case SCTP:
		return &p.SCTP
	}
	return nil
}

// add and addAll leave p not in its canonical form.
func (p *Ports) add(protocol uint8, r PortRange) {
	list := p.of(protocol)
	*list = append(*list, r)
}

func (p *Ports) addAll(o *Ports) {
	p.All = p.All || o.All
	p.TCP, p.UDP, p.SCTP = append(p.TCP, o.TCP...), append(p.UDP, o.UDP...), append(p.SCTP, o.SCTP...)
	for _, s := range o.By {
		i, known := slices.BinarySearchFunc(p.By, s.Policy, func(s Share, policy string) int { return strings.Compare(s.Policy, policy) })
		if !known {
			p.By = slices.Insert(p.By, i, Share{s.Policy, &Ports{}})
		}
		p.By[i].Ports.addAll(s.Ports)
	}
}

// grantedBy is the ports with the policy that allows them.
func (p *Ports) grantedBy(policy string) *Ports {
	if p.empty() {
		return p
	}
	return &Ports{p.All, p.TCP, p.UDP, p.SCTP, []Share{{policy, p}}}
}

// meanings yields what the names mean at a pod that has these ports. Several containers
// may have given one name: each of them serves it.
func meanings(named []namedPort, ports []NamedPort) iter.Seq[NamedPort] {
	return func(yield func(NamedPort) bool) {
		for _, n := range named {
			for _, port := range ports {
				if port.Name == n.name && port.Protocol == n.protocol && !yield(port) {
					return
				}
			}
		}
	}
}

// with is the ports, and what the names mean at a pod that has these ports.
func (p *Ports) with(named []namedPort, ports []NamedPort) *Ports {
	if len(named) == 0 || p.All {
		return p
	}
	all := &Ports{}
	all.addAll(p)
	for port := range meanings(named, ports) {
		all.add(port.Protocol, PortRange{port.Port, port.Port})
	}
	all.canonical()
	return all
}

func (p *Ports) and(o *Ports) *Ports {
	all := &Ports{}
	all.addAll(p)
	all.addAll(o)
	all.canonical()
	return all
}

func (p *Ports) canonical() {
	for _, s := range p.By {
		s.Ports.canonical()
	}
	if p.All {
		*p = Ports{All: true, By: p.By}
		return
	}
	p.TCP, p.UDP, p.SCTP = merge(p.TCP), merge(p.UDP), merge(p.SCTP)
}

func merge(ranges []PortRange) []PortRange {
	slices.SortFunc(ranges, func(a, b PortRange) int { return cmp.Compare(a.First, b.First) })
	merged := ranges[:0]
	for _, r := range ranges {
		if n := len(merged); n > 0 && int(r.First) <= int(merged[n-1].Last)+1 {
			merged[n-1].Last = max(merged[n-1].Last, r.Last)
		} else {
			merged = append(merged, r)
		}
	}
	return merged
}

func (p *Ports) empty() bool { return !p.All && len(p.TCP)+len(p.UDP)+len(p.SCTP) == 0 }

// interner gives equal sets of ports the same pointer.
type interner map[string]*Ports

// intern takes a canonical set, which is not changed any more. It is nil for the empty set.
func (in interner) intern(p *Ports) *Ports {
	if p.empty() {
		return nil
	}
	key := p.appendKey(make([]byte, 0, 256))
	if same := in[string(key)]; same != nil {
		return same
	}
	in[string(key)] = p
	return p
}

func (p *Ports) appendKey(key []byte) []byte {
	all := byte(0)
	if p.All {
		all = 1
	}
	key = append(key, all)
	for _, list := range [][]PortRange{p.TCP, p.UDP, p.SCTP} {
		key = binary.BigEndian.AppendUint16(key, uint16(len(list))) // at most 32768 ranges do not touch
		for _, r := range list {
			key = binary.BigEndian.AppendUint16(key, r.First)
			key = binary.BigEndian.AppendUint16(key, r.Last)
		}
	}
	for _, s := range p.By {
		key = binary.BigEndian.AppendUint16(key, uint16(len(s.Policy)))
		key = s.Ports.appendKey(append(key, s.Policy...))
	}
	return key
}

// union takes interned sets.
func (in interner) union(sets []*Ports) *Ports {
	switch len(sets) {
	case 0:
		return nil
	case 1:
		return sets[0]
	}
	all := &Ports{}
	for _, s := range sets {
		all.addAll(s)
	}
	all.canonical()
	return in.intern(all)
}
