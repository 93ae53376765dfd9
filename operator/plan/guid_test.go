package plan

import (
	"net"
	"strings"
	"testing"
)

const guidFile = `[
 {"pciAddress":"0000:3b:00.0","guids":["02:00:00:00:00:00:00:01","02:00:00:00:00:00:00:02"]},
 {"pfGuid":"50:6b:4b:03:00:cc:12:34","guidsRange":{"start":"02:00:00:00:00:00:01:00","end":"02:00:00:00:00:00:01:ff"}}
]`

func TestGUIDs(t *testing.T) {
	guids, err := ParseGUIDs([]byte(guidFile))
	if err != nil {
		t.Fatal(err)
	}
	// An IPoIB link's address is queue pair, subnet prefix and GUID.
	address, _ := net.ParseMAC("00:00:10:48:fe:80:00:00:00:00:00:00:50:6b:4b:03:00:cc:12:34")
	for _, c := range []struct {
		pf      string
		address net.HardwareAddr
		index   int
		want    string
	}{
		{"0000:3b:00.0", nil, 0, "02:00:00:00:00:00:00:01"},
		{"0000:3b:00.0", nil, 1, "02:00:00:00:00:00:00:02"},
		{"0000:3b:00.0", nil, 2, "the GUID file has no GUID for VF 2 of PF 0000:3b:00.0: add some"},
		{"0000:5e:00.0", address, 255, "02:00:00:00:00:00:01:ff"},
		{"0000:5e:00.0", address, 256, "the GUID file has no GUID for VF 256 of PF 0000:5e:00.0: add some"},
		{"0000:5e:00.0", address[:19], 0, ""},
	} {
		guid, err := guids.Of(c.pf, c.address, c.index)
		got := guid.String()
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("VF %d of %s: %q, want %q", c.index, c.pf, got, c.want)
		}
	}
}

func TestBadGUIDFiles(t *testing.T) {
	for file, want := range map[string]string{
		`{}`:   "read the GUID file: json",
		`[{}]`: "entry 0: give either pciAddress or pfGuid",
		`[{"pciAddress":"x","pfGuid":"50:6b:4b:03:00:cc:12:34","guids":["02:00:00:00:00:00:00:01"]}]`: "give either pciAddress or pfGuid",
		`[{"pciAddress":"x"}]`:                                                                                  "give either guids or guidsRange",
		`[{"pfGuid":"x","guids":["1"]}]`:                                                                        `pfGuid "x" is not a GUID`,
		`[{"pciAddress":"x","guids":["02:00:00:00:00"]}]`:                                                       `"02:00:00:00:00" is not a GUID`,
		`[{"pciAddress":"x","guids":["00:00:00:00:00:00:00:00"]}]`:                                              "is not a GUID",
		`[{"pciAddress":"x","guidsRange":{"start":"02:00:00:00:00:00:00:01"}}]`:                                 `guidsRange.end: "" is not a GUID`,
		`[{"pciAddress":"x","guidsRange":{"start":"02:00:00:00:00:00:00:02","end":"02:00:00:00:00:00:00:01"}}]`: "runs backwards",
	} {
		if _, err := ParseGUIDs([]byte(file)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", file, err, want)
		}
	}
}

func TestStableGUID(t *testing.T) {
	a, b := StableGUID("vm1", nil, pfAddress, 0), StableGUID("vm1", nil, pfAddress, 1)
	if a.String() == b.String() || len(a) != 8 || a[0]&3 != 2 {
		t.Errorf("%s, %s", a, b)
	}
	if a.String() != "b6:bc:45:c4:11:33:a9:9b" {
		t.Errorf("the rule changed: %s", a)
	}
}

func FuzzParseGUIDs(f *testing.F) {
	f.Add([]byte(guidFile))
	f.Add([]byte(`[{"pciAddress":"x","guidsRange":{"start":"02:00:00:00:00:00:00:01","end":"ff:ff:ff:ff:ff:ff:ff:ff"}}]`))
	f.Fuzz(func(t *testing.T, file []byte) {
		guids, err := ParseGUIDs(file)
		if err != nil {
			return
		}
		for _, e := range guids {
			for _, index := range []int{0, 1, 65535} {
				guid, err := guids.Of(e.pciAddress, e.guid, index)
				if err == nil && len(guid) != 8 {
					t.Errorf("VF %d gets %q", index, guid)
				}
			}
		}
	})
}
