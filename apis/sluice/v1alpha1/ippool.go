package v1alpha1

import (
	"encoding/binary"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Pool is the spec of an IPPool, read and found valid.
//
// +kubebuilder:object:generate=false
type Pool struct {
	Ranges       []AddressRange // IPv4 before IPv6, one or both
	Reservations map[netip.Addr]IPReservation
	Rest         time.Duration
	spec         *IPPoolSpec
}

// AddressRange is an IPRange, read and found valid. Inside it addresses are told apart
// by their last 64 bits, as no subnet is larger.
//
// +kubebuilder:object:generate=false
type AddressRange struct {
	Subnet     netip.Prefix
	Start, End netip.Addr
	Gateway    netip.Addr // not valid when there is none
	BlockSize  int        // addresses
	excluded   []interval // disjoint, ascending, without the gateway's
}

type interval struct{ first, last uint64 }

// maxBlockSize is the most addresses of a block that was not given a size.
var maxBlockSize = map[bool]uint64{true: 64, false: 65536} // by being IPv4

// Parse reads the spec. What it finds wrong it says with the mend.
func (s *IPPoolSpec) Parse() (*Pool, field.ErrorList) {
	path := field.NewPath("spec")
	p := &Pool{Reservations: map[netip.Addr]IPReservation{}, Rest: time.Minute, spec: s}
	var errs field.ErrorList
	for _, f := range []struct {
		name string
		v4   bool
		r    *IPRange
	}{{"ipv4", true, s.IPv4}, {"ipv6", false, s.IPv6}} {
		if f.r == nil {
			continue
		}
		r, bad := f.r.parse(path.Child(f.name), f.v4)
		errs = append(errs, bad...)
		p.Ranges = append(p.Ranges, r)
	}
	if len(p.Ranges) == 0 {
		errs = append(errs, field.Required(path, "give ipv4, ipv6 or both"))
	}
	if len(errs) > 0 {
		return nil, errs // the rest is judged by the ranges
	}
	if s.RestSeconds != nil {
		p.Rest = time.Duration(*s.RestSeconds) * time.Second
		if *s.RestSeconds < 0 || *s.RestSeconds > 86400 {
			errs = append(errs, field.Invalid(path.Child("restSeconds"), *s.RestSeconds, "set it to 0 to 86400"))
		}
	}
	errs = append(errs, p.reserve(path.Child("reservations"))...)
	for i, r := range s.Routes {
		at := path.Child("routes").Index(i)
		dst, err := netip.ParsePrefix(r.Dst)
		if err != nil {
			errs = append(errs, field.Invalid(at.Child("dst"), r.Dst, "write a subnet, for example 10.0.0.0/8"))
			continue
		}
		own := p.Family(dst.Addr().Is4())
		gw, err := netip.ParseAddr(r.Gw)
		switch {
		case own == nil:
			errs = append(errs, field.Invalid(at.Child("dst"), r.Dst, "the pool has no addresses of this family: remove the route"))
		case r.Gw == "" && !own.Gateway.IsValid():
			errs = append(errs, field.Required(at.Child("gw"), "the subnet has no gateway: give gw, or the range's gateway"))
		case r.Gw != "" && (err != nil || !own.Subnet.Contains(gw)):
			errs = append(errs, field.Invalid(at.Child("gw"), r.Gw, fmt.Sprintf("write an address in %s", own.Subnet)))
		}
	}
	for i, q := range s.Quotas {
		if q.Interfaces < 0 || q.Interfaces > 1000000 {
			errs = append(errs, field.Invalid(path.Child("quotas").Index(i).Child("interfaces"), q.Interfaces, "set it to 0 to 1000000"))
		}
	}
	if len(errs) > 0 {
		return nil, errs
	}
	return p, nil
}

func (p *Pool) reserve(path *field.Path) (errs field.ErrorList) {
	for i, r := range p.spec.Reservations {
		at := path.Index(i)
		addr, err := netip.ParseAddr(r.Address)
		if err != nil {
			errs = append(errs, field.Invalid(at.Child("address"), r.Address, "write an IP address"))
			continue
		}
		own := p.Family(addr.Is4())
		_, mac := net.ParseMAC(r.MAC)
		_, twice := p.Reservations[addr]
		switch {
		case twice:
			errs = append(errs, field.Duplicate(at.Child("address"), r.Address))
		case own == nil || !own.assignable(addr):
			errs = append(errs, field.Invalid(at.Child("address"), r.Address, "it is no address that a pod of this pool's subnets can have: take another one"))
		case r.Pod == "" && r.MAC == "":
			errs = append(errs, field.Required(at, "it is for nobody: give pod, mac or both"))
		case r.MAC != "" && mac != nil:
			errs = append(errs, field.Invalid(at.Child("mac"), r.MAC, "write a MAC address like 02:00:00:00:00:01"))
		case !p.Lets(r.Namespace):
			errs = append(errs, field.Invalid(at.Child("namespace"), r.Namespace, "it may not use the pool: add it to spec.namespaces"))
		}
		p.Reservations[addr] = r
	}
	return errs
}

// Family is the range of a family, nil when there is none.
func (p *Pool) Family(v4 bool) *AddressRange {
	for i := range p.Ranges {
		if p.Ranges[i].Start.Is4() == v4 {
			return &p.Ranges[i]
		}
	}
	return nil
}

// Lets tells whether pods of the namespace may have addresses.
func (p *Pool) Lets(namespace string) bool {
	return len(p.spec.Namespaces) == 0 || slices.Contains(p.spec.Namespaces, namespace)
}

// Quota is how many interfaces the namespace may have; ok is false when there is no limit.
func (p *Pool) Quota(namespace string) (limit int, ok bool) {
	for _, q := range p.spec.Quotas {
		if q.Namespace == namespace {
			return q.Interfaces, true
		}
		if q.Namespace == "*" {
			limit, ok = q.Interfaces, true
		}
	}
	return limit, ok
}

// For tells whether the reservation is for an interface. No MAC is nobody's.
func (r IPReservation) For(namespace, pod string, mac net.HardwareAddr) bool {
	return r.Namespace == namespace && (r.Pod == "" || r.Pod == pod) &&
		(r.MAC == "" || len(mac) > 0 && strings.EqualFold(r.MAC, mac.String())) && (r.Pod != "" || r.MAC != "")
}

func (r *IPRange) parse(path *field.Path, v4 bool) (a AddressRange, errs field.ErrorList) {
	invalid := func(name, value, mend string) {
		errs = append(errs, field.Invalid(path.Child(name), value, mend))
	}
	subnet, err := netip.ParsePrefix(r.CIDR)
	example, most := "fd00:1::/64", 64
	if v4 {
		example, most = "10.1.0.0/20", 8
	}
	switch {
	case err != nil || subnet != subnet.Masked() || subnet.Addr().Is4() != v4 || subnet.Addr().Is4In6():
		invalid("cidr", r.CIDR, "write a subnet of this family, for example "+example)
		return a, errs
	case subnet.Bits() < most:
		invalid("cidr", r.CIDR, fmt.Sprintf("a subnet of interfaces is no larger than /%d", most))
		return a, errs
	}
	a.Subnet = subnet
	first, last := low(subnet.Addr()), low(subnet.Addr())|(1<<(subnet.Addr().BitLen()-subnet.Bits())-1)
	low0, high0 := first, last
	// What no interface has: the network and broadcast addresses (RFC 922; not of /31,
	// RFC 3021), and the routers' anycast address (RFC 4291, 2.6.1; not of /127, RFC 6164).
	if subnet.Addr().BitLen()-subnet.Bits() > 1 {
		low0++
		if v4 {
			high0--
		}
	}
	in := func(name, value string, otherwise uint64) uint64 {
		if value == "" {
			return otherwise
		}
		addr, err := netip.ParseAddr(value)
		if err != nil || !subnet.Contains(addr) || low(addr) < low0 || low(addr) > high0 {
			invalid(name, value, fmt.Sprintf("write an address that an interface in %s can have", subnet))
			return otherwise
		}
		return low(addr)
	}
	start, end := in("start", r.Start, low0), in("end", r.End, high0)
	if start > end {
		invalid("end", r.End, "it is before start")
	}
	a.Start, a.End = a.at(start), a.at(end)
	if gw := in("gateway", r.Gateway, math.MaxUint64); r.Gateway != "" && gw != math.MaxUint64 {
		a.Gateway = a.at(gw)
	}
	errs = append(errs, a.exclude(path.Child("exclude"), r.Exclude)...)
	if a.BlockSize = r.BlockSize; r.BlockSize == 0 {
		a.BlockSize = int(min(max((last-first)/32+1, 1), maxBlockSize[v4]))
		for a.BlockSize&(a.BlockSize-1) != 0 {
			a.BlockSize &= a.BlockSize - 1 // down to a power of two
		}
	} else if r.BlockSize < 1 || r.BlockSize > 65536 || r.BlockSize&(r.BlockSize-1) != 0 {
		errs = append(errs, field.Invalid(path.Child("blockSize"), r.BlockSize, "write a power of two from 1 to 65536"))
	}
	if len(errs) == 0 && a.Count() == 0 {
		invalid("cidr", r.CIDR, "no address is left of it: exclude less, or take a larger subnet")
	}
	return a, errs
}

func (a *AddressRange) exclude(path *field.Path, list []string) (errs field.ErrorList) {
	for i, text := range list {
		p, err := netip.ParsePrefix(text)
		if addr, bad := netip.ParseAddr(text); bad == nil {
			p, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err != nil || !a.Subnet.Overlaps(p) {
			errs = append(errs, field.Invalid(path.Index(i), text, fmt.Sprintf("write an address or a subnet in %s", a.Subnet)))
			continue
		}
		if p = p.Masked(); p.Bits() < a.Subnet.Bits() {
			p = a.Subnet
		}
		a.excluded = append(a.excluded, interval{low(p.Addr()), low(p.Addr()) | (1<<(p.Addr().BitLen()-p.Bits()) - 1)})
	}
	a.excluded = merge(a.excluded)
	return errs
}

// low is the last 64 bits of an address.
func low(a netip.Addr) uint64 {
	if a.Is4() {
		b := a.As4()
		return uint64(binary.BigEndian.Uint32(b[:]))
	}
	b := a.As16()
	return binary.BigEndian.Uint64(b[8:])
}

// at is the subnet's address with these last 64 bits.
func (a *AddressRange) at(n uint64) netip.Addr {
	if a.Subnet.Addr().Is4() {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(n))
		return netip.AddrFrom4(b)
	}
	b := a.Subnet.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], n)
	return netip.AddrFrom16(b)
}

// merge sorts intervals and joins those that touch.
func merge(in []interval) (out []interval) {
	slices.SortFunc(in, func(a, b interval) int {
		if a.first < b.first {
			return -1
		}
		return 1
	})
	for _, i := range in {
		if n := len(out); n > 0 && (out[n-1].last == math.MaxUint64 || i.first <= out[n-1].last+1) {
			out[n-1].last = max(out[n-1].last, i.last)
			continue
		}
		out = append(out, i)
	}
	return out
}

// assignable tells whether an interface can have the address at all.
func (a *AddressRange) assignable(addr netip.Addr) bool {
	n, first := low(addr), low(a.Subnet.Addr())
	host := a.Subnet.Addr().BitLen() - a.Subnet.Bits()
	switch {
	case !a.Subnet.Contains(addr), addr == a.Gateway:
		return false
	case host > 1 && n == first, host > 1 && addr.Is4() && n == first|(1<<host-1):
		return false
	}
	return true
}

// Usable tells whether the address may be given out, unless it is reserved.
func (a *AddressRange) Usable(addr netip.Addr) bool {
	n := low(addr)
	return addr.BitLen() == a.Start.BitLen() && a.assignable(addr) && n >= low(a.Start) && n <= low(a.End) && !slices.ContainsFunc(a.excluded, func(i interval) bool { return i.first <= n && n <= i.last })
}

// Count is the number of usable addresses.
func (a *AddressRange) Count() uint64 { return a.count(low(a.Start), low(a.End)) }

// CountIn is the number of usable addresses in a block.
func (a *AddressRange) CountIn(first netip.Addr, size int) uint64 {
	if first.BitLen() != a.Start.BitLen() {
		return 0
	}
	return a.count(max(low(a.Start), low(first)), min(low(a.End), low(first)+uint64(size-1)))
}

func (a *AddressRange) count(start, end uint64) uint64 {
	if start > end {
		return 0
	}
	without := slices.Clone(a.excluded)
	if a.Gateway.IsValid() {
		without = append(without, interval{low(a.Gateway), low(a.Gateway)})
	}
	n := end - start + 1 // not 2^64: the first address of a /64 is nobody's
	for _, i := range merge(without) {
		if i.first > end || i.last < start {
			continue
		}
		n -= min(i.last, end) - max(i.first, start) + 1
	}
	return n
}

// Blocks is the number of blocks.
func (a *AddressRange) Blocks() uint64 {
	return (low(a.Block(a.End))-low(a.Block(a.Start)))/uint64(a.BlockSize) + 1
}

// Nth is the first address of a block, counted from 0.
func (a *AddressRange) Nth(i uint64) netip.Addr {
	return a.at(low(a.Block(a.Start)) + i*uint64(a.BlockSize))
}

// Block is the first address of the block that the address is in. Blocks begin at
// multiples of their size, wherever the subnet begins.
func (a *AddressRange) Block(addr netip.Addr) netip.Addr {
	return a.at(low(addr) &^ uint64(a.BlockSize-1))
}

// NewBlock is the claim of a node to a block of addresses, or to one reserved address.
func NewBlock(pool, node string, kind IPBlockKind, first netip.Addr, size int) *IPBlock {
	b := &IPBlock{Spec: IPBlockSpec{Pool: pool, Node: node, Kind: kind, First: first.StringExpanded(), Size: size}}
	b.Name = pool + "."
	if kind == BlockReserved {
		b.Name += "r."
	}
	b.Name += strings.ReplaceAll(b.Spec.First, ":", "-")
	return b
}

// Shares of a quota: so many of one interface, then so many of middle size, then large
// ones. Small quotas can be spread over many nodes, large ones take few claims. What a
// share is does not depend on the limit, which can change.
const (
	smallShares, middleShares = 64, 56
	middleShare, largeShare   = 8, 64
)

// Share is which interfaces of a quota the share is, counted from 0.
func Share(index int) (first, size int) {
	switch {
	case index < smallShares:
		return index, 1
	case index < smallShares+middleShares:
		return smallShares + (index-smallShares)*middleShare, middleShare
	}
	return smallShares + middleShares*middleShare + (index-smallShares-middleShares)*largeShare, largeShare
}

// NewShare is the claim of a node to a share of a namespace's quota.
func NewShare(pool, node, namespace string, index int) *IPBlock {
	_, size := Share(index)
	b := &IPBlock{Spec: IPBlockSpec{Pool: pool, Node: node, Kind: BlockQuota, Size: size, Namespace: namespace, Index: index}}
	b.Name = fmt.Sprintf("%s.q.%s.%d", pool, namespace, index)
	return b
}
