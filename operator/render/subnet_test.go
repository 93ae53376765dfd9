package render

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/validation/field"
	"pgregory.net/rapid"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

func used(texts ...string) (all []Range) {
	for i, text := range texts {
		all = append(all, Range{netip.MustParsePrefix(text), fmt.Sprint("use ", i)})
	}
	return all
}

func overlapping(ipam string, ranges []Range) string {
	n, _ := Of(network(sriovv1.SriovNetworkSpec{IPAM: ipam}))
	var all []string
	for _, e := range Overlapping(field.NewPath("spec", "ipam"), n.Subnets(), ranges) {
		all = append(all, e.Error())
	}
	return strings.Join(all, "; ")
}

func TestOverlapping(t *testing.T) {
	cluster := used("10.96.0.0/12", "10.244.1.0/24", "10.244.2.0/24", "fd00:10::/108")
	for ipam, want := range map[string]string{
		`{"type": "host-local", "subnet": "10.97.1.0/24"}`:                                                       `spec.ipam: Invalid value: "10.97.1.0/24": it overlaps 10.96.0.0/12, which the cluster uses for use 0: pods`,
		`{"type": "host-local", "ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00:10::/64"}]]}`:          `"fd00:10::/64": it overlaps fd00:10::/108`,
		`{"type": "host-local", "ranges": [[{"subnet": "10.244.0.0/16", "rangeStart": "10.244.9.1"}]]}`:          `"10.244.0.0/16": it overlaps 10.244.1.0/24, which the cluster uses for use 1, and 1 more such ranges: pods`,
		`{"type": "static", "addresses": [{"address": "10.1.0.1/24"}, {"address": "10.244.2.9/30"}]}`:            `"10.244.2.8/30": it overlaps 10.244.2.0/24`,
		`{"type": "whereabouts", "range": "10.100.0.225/28"}`:                                                    `"10.100.0.224/28": it overlaps 10.96.0.0/12`,
		`{"type": "whereabouts", "ipRanges": [{"range": "10.1.0.0/24"}, {"range": "10.111.0.5-10.111.0.9/24"}]}`: `"10.111.0.0/24": it overlaps 10.96.0.0/12`,
		`{"type": "host-local", "subnet": "10.1.0.0/16", "routes": [{"dst": "10.96.0.0/12", "gw": "10.1.0.1"}]}`: "",
		`{"type": "host-local", "subnet": "10.112.0.0/12", "ranges": [[{"subnet": "fd00:10::1:0:0/108"}]]}`:      "",
		`{"type": "dhcp"}`: "",
		`{"type": "other", "subnet": "10.96.0.0/12"}`: "", // in whose words it may mean anything
		`{"type": "host-local", "subnet": 7}`:         "",
		`{"type": "host-local", "subnet": "10.96"}`:   "",
		`{"type": "static", "addresses": "x"}`:        "",
		`{"type": "whereabouts", "range": []}`:        "",
		`{`:                                           "",
		"":                                            "",
	} {
		if got := overlapping(ipam, cluster); (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", ipam, got, want)
		}
	}
}

// A subnet is refused exactly when an address of it is one of the cluster's, whichever
// plugin it is written for.
func TestOverlappingProperty(t *testing.T) {
	// Small enough to try all addresses: 10.0.0.0/24.
	prefix := rapid.Custom(func(t *rapid.T) netip.Prefix {
		address := netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(0, 255).Draw(t, "address"))})
		return netip.PrefixFrom(address, rapid.IntRange(24, 32).Draw(t, "bits"))
	})
	rapid.Check(t, func(t *rapid.T) {
		own := prefix.Draw(t, "subnet")
		var ranges []Range
		for _, p := range rapid.SliceOfN(prefix, 0, 4).Draw(t, "cluster") {
			ranges = append(ranges, Range{p.Masked(), "x"})
		}
		ipam := rapid.SampledFrom([]string{
			`{"type": "host-local", "subnet": %q}`, `{"type": "host-local", "ranges": [[{"subnet": %q}]]}`,
			`{"type": "static", "addresses": [{"address": %q}]}`, `{"type": "whereabouts", "range": %q}`, `{"type": "whereabouts", "ipRanges": [{"range": %q}]}`,
		}).Draw(t, "ipam")
		want := false
		for i := range 256 {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
			want = want || own.Contains(a) && slices.ContainsFunc(ranges, func(r Range) bool { return r.Contains(a) })
		}
		if got := overlapping(fmt.Sprintf(ipam, own), ranges); (got != "") != want {
			t.Fatalf("%s with %v: %q, want a refusal: %t", own, ranges, got, want)
		}
	})
}

// Whatever ipam is, the subnets found in it are subnets, and written in it.
func FuzzSubnets(f *testing.F) {
	f.Add(`{"type": "host-local", "subnet": "10.1.0.0/24", "ranges": [[{"subnet": "fd00::/64"}], []]}`)
	f.Add(`{"type": "static", "addresses": [{"address": "10.1.0.7/24"}]}`)
	f.Add(`{"type": "whereabouts", "range": "10.1.0.5-10.1.0.9/24", "ipRanges": [{"range": "-"}]}`)
	f.Fuzz(func(t *testing.T, ipam string) {
		for _, s := range subnets(ipam) {
			if !s.IsValid() || s.Masked() != s || !json.Valid([]byte(ipam)) {
				t.Fatalf("%q has subnet %v", ipam, s)
			}
		}
	})
}
