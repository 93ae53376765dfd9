package v1alpha1

import (
	"encoding/json"
	"slices"
	"testing"
)

// A key that the selector does not have is never lost: the rest of the selector would select
// more than its author meant.
func FuzzParentSelector(f *testing.F) {
	for _, text := range []string{`{"vendor": "8086"}`, `{"kinds": ["bond"], "kind": "vlan"}`, `{"PfNames": ["x"]}`, `{"pfNames": null, "": 1}`, `null`, `[]`} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var s ParentSelector
		if json.Unmarshal([]byte(text), &s) != nil {
			return
		}
		var keys map[string]json.RawMessage
		if err := json.Unmarshal([]byte(text), &keys); err != nil {
			t.Fatalf("%s is taken for a selector: %v", text, err)
		}
		for key := range keys {
			if !slices.Contains([]string{"vendor", "deviceID", "rootDevices", "pfNames", "kinds"}, key) && !slices.Contains(s.UnknownKeys, key) {
				t.Fatalf("%s: key %q is lost in %+v", text, key, s)
			}
		}
	})
}

// A range that is accepted has as many addresses as it says, each in its subnet, and blocks
// for all of them.
func FuzzIPRange(f *testing.F) {
	f.Add("10.1.0.0/24", "10.1.0.9", "10.1.0.90", "10.1.0.1", "10.1.0.16/29", 8)
	f.Add("fd00::/120", "", "", "fd00::1", "fd00::8%eth0", 0)
	f.Add("10.1.0.0/31", "", "", "10.1.0.1", "", 1)
	f.Add("::ffff:10.1.0.0/120", "::ffff:10.1.0.1", "", "", "0.0.0.0/0", 65536)
	f.Fuzz(func(t *testing.T, cidr, start, end, gateway, exclude string, blockSize int) {
		r := &IPRange{CIDR: cidr, Start: start, End: end, Gateway: gateway, BlockSize: blockSize}
		if exclude != "" {
			r.Exclude = []string{exclude}
		}
		for _, spec := range []IPPoolSpec{{IPv4: r}, {IPv6: r}} {
			pool, errs := spec.Parse()
			if len(errs) > 0 {
				continue
			}
			a := pool.Ranges[0]
			if a.Subnet.Addr().BitLen()-a.Subnet.Bits() > 10 {
				continue // too many to count
			}
			n := uint64(0)
			for addr := a.Subnet.Addr(); a.Subnet.Contains(addr); addr = addr.Next() {
				if !a.Usable(addr) {
					continue
				}
				n++
				if b := a.Block(addr); b.Compare(a.Nth(0)) < 0 || b.Compare(a.Nth(a.Blocks()-1)) > 0 {
					t.Fatalf("%+v: %s is in none of its %d blocks", r, addr, a.Blocks())
				}
			}
			if n == 0 || n != a.Count() {
				t.Fatalf("%+v: %d addresses are usable, %d are told", r, n, a.Count())
			}
		}
	})
}
