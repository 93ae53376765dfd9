package plan

import (
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/util/intstr"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

func FuzzParseVfRange(f *testing.F) {
	for _, s := range []string{"0-3", "5-2", "-2", "2-", "a-b", "0-0", "+1-2", "0-99999", "1-2-3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if first, last, err := ParseVfRange(s); err == nil && (first < 0 || last < first || last >= maxVF) {
			t.Errorf("%q gives %d to %d", s, first, last)
		}
	})
}

func FuzzParsePfName(f *testing.F) {
	for _, s := range []string{"ens1f0", "ens1f0#0-3", "ens1f0#3", "ens1f0#0-3,8", "#1", "a#", "a#1#2", "a#3-1", "a#0-9999,0-9999", "a#8,0-3,2-5,4", "a#,"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		name, vfs, err := ParsePfName(s)
		if err != nil {
			return
		}
		if name == "" || (vfs == nil) == strings.Contains(s, "#") || !slices.IsSorted(vfs) || len(slices.Compact(slices.Clone(vfs))) != len(vfs) {
			t.Fatalf("%q gives %q %v", s, name, vfs)
		}
		if vfs == nil {
			return
		}
		if again, same, err := ParsePfName(name + "#" + formatVFs(vfs)); err != nil || again != name || !slices.Equal(same, vfs) {
			t.Errorf("%q gives %v and comes back as %q %v, %v", s, vfs, again, same, err)
		}
	})
}

func FuzzGroups(f *testing.F) {
	f.Add(8, "0-3", "4-7")
	f.Add(8, "0-3", "3-4")
	f.Add(2, "0-3", "")
	f.Add(-1, "0", "1")
	f.Fuzz(func(t *testing.T, numVfs int, a, b string) {
		groups, err := Groups(v1.Interface{NumVfs: numVfs, VfGroups: []v1.VfGroup{{VfRange: a}, {VfRange: b}}})
		if err != nil {
			return
		}
		for i := range numVfs {
			in := 0
			for _, g := range groups {
				if g.First <= i && i <= g.Last {
					in++
				}
			}
			if _, ok := groups.Of(i); in > 1 || ok != (in == 1) {
				t.Fatalf("VF %d is in %d of %+v", i, in, groups)
			}
			if i == maxVF {
				break
			}
		}
		if last := max(groups[0].Last, groups[1].Last); last >= numVfs {
			t.Errorf("%+v reach beyond %d VFs", groups, numVfs)
		}
	})
}

func FuzzNetFilter(f *testing.F) {
	for _, s := range []string{"openstack/NetworkID:abc", " aws/NetworkID : x ", ":", "a:b:c", "\t:\n", "\xc2 \xa0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if !utf8.ValidString(s) {
			return // no API server takes it; halves of a rune may become a blank
		}
		plain := netFilter(s)
		if netFilter(plain) != plain || netFilter("  "+s+" ") != plain {
			t.Errorf("%q gives %q", s, plain)
		}
	})
}

// A limit is within the pool, and a share of it that is not none lets one node at least.
func FuzzMaxUnavailable(f *testing.F) {
	for _, s := range []string{"1", "0", "30%", "0%", "100%", "-1", "101%", "%", "1.5%", "9999999999999999999%"} {
		f.Add(s, 7)
	}
	f.Fuzz(func(t *testing.T, s string, n int) {
		if n < 1 || n > 100000 {
			return
		}
		pool := &v1.SriovNetworkPoolConfig{}
		pool.Spec.MaxUnavailable = new(intstr.Parse(s))
		limit, err := MaxUnavailable(pool, n)
		if err != nil && limit != 0 {
			t.Errorf("%q of %d nodes lets %d: %v", s, n, limit, err)
		}
		if err == nil && (limit < 0 || limit == 0 && strings.Trim(s, "0+-%") != "") {
			t.Errorf("%q of %d nodes lets %d", s, n, limit)
		}
	})
}
