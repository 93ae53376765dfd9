package v1alpha1

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestPoolRefuses(t *testing.T) {
	v4 := func(r IPRange) IPPoolSpec {
		if r.CIDR == "" {
			r.CIDR = "10.1.0.0/24"
		}
		return IPPoolSpec{IPv4: &r}
	}
	with := func(change func(*IPPoolSpec)) IPPoolSpec {
		s := v4(IPRange{})
		change(&s)
		return s
	}
	for want, spec := range map[string]IPPoolSpec{
		"spec: Required value: give ipv4, ipv6 or both":                                     {},
		`spec.ipv4.cidr: Invalid value: "10.1.0.1/24": write a subnet of this family`:       v4(IPRange{CIDR: "10.1.0.1/24"}),
		`spec.ipv4.cidr: Invalid value: "fd00::/64": write a subnet of this family`:         v4(IPRange{CIDR: "fd00::/64"}),
		`spec.ipv6.cidr: Invalid value: "fd00::/48": a subnet of interfaces is no larger`:   {IPv6: &IPRange{CIDR: "fd00::/48"}},
		`spec.ipv6.start: Invalid value: "fd00::": write an address that an interface`:      {IPv6: &IPRange{CIDR: "fd00::/64", Start: "fd00::"}},
		`spec.ipv4.end: Invalid value: "10.1.0.255": write an address that an interface`:    v4(IPRange{End: "10.1.0.255"}),
		`spec.ipv4.end: Invalid value: "10.1.0.3": it is before start`:                      v4(IPRange{Start: "10.1.0.4", End: "10.1.0.3"}),
		`spec.ipv4.gateway: Invalid value: "10.2.0.1": write an address`:                    v4(IPRange{Gateway: "10.2.0.1"}),
		`spec.ipv4.exclude[1]: Invalid value: "10.2.0.0/24": write an address or a subnet`:  v4(IPRange{Exclude: []string{"10.1.0.9", "10.2.0.0/24"}}),
		`spec.ipv4.blockSize: Invalid value: 3: write a power of two`:                       v4(IPRange{BlockSize: 3}),
		`spec.ipv4.cidr: Invalid value: "10.1.0.0/24": no address is left of it`:            v4(IPRange{Exclude: []string{"10.0.0.0/8"}}),
		`spec.restSeconds: Invalid value: -1`:                                               with(func(s *IPPoolSpec) { s.RestSeconds = new(-1) }),
		`spec.quotas[0].interfaces: Invalid value: -1`:                                      with(func(s *IPPoolSpec) { s.Quotas = []IPQuota{{"a", -1}} }),
		`spec.routes[0].gw: Required value: the subnet has no gateway`:                      with(func(s *IPPoolSpec) { s.Routes = []IPPoolRoute{{Dst: "10.9.0.0/16"}} }),
		`spec.routes[0].gw: Invalid value: "10.9.0.1": write an address in 10.1.0.0/24`:     with(func(s *IPPoolSpec) { s.Routes = []IPPoolRoute{{"10.9.0.0/16", "10.9.0.1"}} }),
		`spec.routes[0].dst: Invalid value: "fd09::/64": the pool has no addresses of this`: with(func(s *IPPoolSpec) { s.Routes = []IPPoolRoute{{"fd09::/64", ""}} }),
		`spec.reservations[1].address: Duplicate value: "10.1.0.7"`: with(func(s *IPPoolSpec) {
			s.Reservations = []IPReservation{{"10.1.0.7", "a", "p", ""}, {"10.1.0.7", "a", "q", ""}}
		}),
		`spec.reservations[0].address: Invalid value: "10.1.0.255": it is no address`: with(func(s *IPPoolSpec) { s.Reservations = []IPReservation{{"10.1.0.255", "a", "p", ""}} }),
		`spec.reservations[0]: Required value: it is for nobody`:                      with(func(s *IPPoolSpec) { s.Reservations = []IPReservation{{"10.1.0.7", "a", "", ""}} }),
		`spec.reservations[0].mac: Invalid value: "x": write a MAC address`:           with(func(s *IPPoolSpec) { s.Reservations = []IPReservation{{"10.1.0.7", "a", "", "x"}} }),
		`spec.reservations[0].namespace: Invalid value: "a": it may not use the pool: add it `: with(func(s *IPPoolSpec) {
			s.Reservations, s.Namespaces = []IPReservation{{"10.1.0.7", "a", "p", ""}}, []string{"b"}
		}),
	} {
		_, errs := spec.Parse()
		if got := fmt.Sprint(errs.ToAggregate()); !strings.Contains(got, want) {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
}

func TestBlockSizes(t *testing.T) {
	for cidr, want := range map[string]int{
		"10.0.0.0/8": 64, "10.1.0.0/20": 64, "10.1.0.0/24": 8, "10.1.0.0/28": 1, "10.1.0.0/32": 1,
		"fd00::/64": 65536, "fd00::/112": 2048, "fd00::/120": 8,
	} {
		r, errs := (&IPRange{CIDR: cidr}).parse(nil, !strings.Contains(cidr, ":"))
		if len(errs) > 0 || r.BlockSize != want {
			t.Errorf("%s: blocks of %d, want %d; %v", cidr, r.BlockSize, want, errs)
		}
	}
}

func TestReservationIsForItsOwnerOnly(t *testing.T) {
	mac, _ := net.ParseMAC("02:00:00:00:00:0a")
	for _, c := range []struct {
		r              IPReservation
		namespace, pod string
		mac            net.HardwareAddr
		want           bool
	}{
		{IPReservation{Namespace: "a", Pod: "p"}, "a", "p", nil, true},
		{IPReservation{Namespace: "a", Pod: "p"}, "b", "p", nil, false},
		{IPReservation{Namespace: "a", Pod: "p"}, "a", "q", mac, false},
		{IPReservation{Namespace: "a", MAC: "02:00:00:00:00:0A"}, "a", "q", mac, true},
		{IPReservation{Namespace: "a", MAC: "02:00:00:00:00:0A"}, "b", "q", mac, false},
		{IPReservation{Namespace: "a", MAC: "02:00:00:00:00:0A"}, "a", "q", nil, false},
		{IPReservation{Namespace: "a", Pod: "p", MAC: "02:00:00:00:00:0b"}, "a", "p", mac, false},
		{IPReservation{Namespace: "a"}, "a", "p", mac, false},
	} {
		if got := c.r.For(c.namespace, c.pod, c.mac); got != c.want {
			t.Errorf("%+v for %s/%s %s: %v", c.r, c.namespace, c.pod, c.mac, got)
		}
	}
}

// Count, Usable and the blocks speak of the same addresses.
func TestRangeIsTheSumOfItsBlocks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base, bits := "10.1.2.", rapid.IntRange(24, 32).Draw(t, "bits")
		v4 := rapid.Bool().Draw(t, "v4")
		address := func(name string) string {
			n := rapid.IntRange(0, 255).Draw(t, name)
			if v4 {
				return fmt.Sprint(base, n)
			}
			return fmt.Sprintf("fd00::%x", n)
		}
		full := 32
		if !v4 {
			bits, full = bits+96, 128
		}
		subnet := netip.MustParsePrefix(fmt.Sprintf("%s/%d", address("base"), bits)).Masked()
		r := IPRange{CIDR: subnet.String(), BlockSize: 1 << rapid.IntRange(0, 8).Draw(t, "size")}
		for _, to := range []*string{&r.Start, &r.End, &r.Gateway} {
			if rapid.Bool().Draw(t, "given") {
				*to = address("start, end, gateway")
			}
		}
		for i := range rapid.IntRange(0, 3).Draw(t, "excludes") {
			r.Exclude = append(r.Exclude, fmt.Sprintf("%s/%d", address(fmt.Sprint("exclude", i)), rapid.IntRange(bits, full).Draw(t, "length")))
			if i == 0 {
				r.Exclude[0], _, _ = strings.Cut(r.Exclude[0], "/")
			}
		}
		a, errs := r.parse(nil, v4)
		if len(errs) > 0 {
			t.Skip()
		}
		var byAddress, byBlock uint64
		for x := subnet.Addr(); subnet.Contains(x); x = x.Next() {
			if !a.Usable(x) {
				continue
			}
			byAddress++
			if b := a.Block(x); x.Less(b) || low(x)-low(b) >= uint64(a.BlockSize) {
				t.Fatalf("%s is not in its block %s", x, b)
			}
		}
		for i := range a.Blocks() {
			in := uint64(0)
			for j, x := 0, a.Nth(i); j < a.BlockSize; j, x = j+1, x.Next() {
				if a.Usable(x) {
					in++
				}
			}
			if n := a.CountIn(a.Nth(i), a.BlockSize); n != in {
				t.Fatalf("block %s has %d addresses, and says %d", a.Nth(i), in, n)
			}
			byBlock += in
		}
		if byAddress != a.Count() || byBlock != a.Count() {
			t.Fatalf("%+v has %d addresses, by its blocks %d, and says %d", r, byAddress, byBlock, a.Count())
		}
	})
}
