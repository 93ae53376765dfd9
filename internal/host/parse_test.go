package host

import (
	"fmt"
	"strings"
	"testing"
)

func FuzzParseGUID(f *testing.F) {
	for _, s := range []string{"506b:4b03:00cc:1234", "0000:0000:0000:0000", "506b:4b03:00cc:123g", "506b:4b03:00cc", "+06b:4b03:00cc:1234", " 06b:4b03:00cc:1234"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		guid, err := parseGUID(s)
		if err != nil {
			return
		}
		if guid == nil {
			guid = make([]byte, 8)
		}
		var groups []string
		for i := 0; i < 8; i += 2 {
			groups = append(groups, fmt.Sprintf("%02x%02x", guid[i], guid[i+1]))
		}
		if !strings.EqualFold(strings.Join(groups, ":"), s) {
			t.Errorf("%q is read as %s", s, guid)
		}
	})
}

// Whatever the names of ports, at most one netdev is the function itself, and none that
// stands for a VF.
func FuzzOwnNetdev(f *testing.F) {
	f.Add("p0", "pf0vf3")
	f.Add("pf0vf0", "c1pf0vf1")
	f.Add("", "pf0vf99999")
	f.Add("pf0vf-1", "pf0vf")
	f.Fuzz(func(t *testing.T, a, b string) {
		own := ownNetdev([]candidate{{name: "a", portName: a}, {name: "b", portName: b}})
		for name, port := range map[string]string{"a": a, "b": b} {
			vf, represents := representedVF(port)
			if represents && (own == name || vf < 0 || fmt.Sprint(vf) != strings.TrimLeft(port[strings.Index(port, "vf")+2:len(port)-1], "0")+port[len(port)-1:]) {
				t.Errorf("%q stands for VF %d, the function itself is %q", port, vf, own)
			}
		}
	})
}

// Each errno is explained once, by words that say what to do.
func TestHints(t *testing.T) {
	for name, hints := range map[string][]hint{
		"sriov_numvfs": numVFsHints, "MTU": mtuHints, "MAC": macHints, "rename": renameHints, "bind": bindHints, "VF settings": vfHints,
		"eswitch": eswitchHints, "RDMA": rdmaHints, "vDPA": vdpaHints, "GUID": guidHints,
	} {
		seen := map[error]bool{}
		for _, h := range hints {
			if seen[h.errno] || h.mend == "" || hintFor(fmt.Errorf("wrapped: %w", h.errno), hints) != h.mend {
				t.Errorf("%s: %v: %q", name, h.errno, h.mend)
			}
			seen[h.errno] = true
		}
	}
}
