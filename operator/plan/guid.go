package plan

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
)

// StableGUID is the InfiniBand GUID a PF assigns to one of its VFs when the
// administrator has set none aside for it: eight bytes, locally administered (the
// second bit of the first octet, as in an EUI-64), and as stable as StableMAC.
func StableGUID(node string, permanent net.HardwareAddr, pfAddress string, index int) net.HardwareAddr {
	sum := sha256.Sum256(fmt.Appendf(nil, "sluice VF GUID %q %s %s %d", node, permanent, pfAddress, index))
	guid := net.HardwareAddr(sum[:8])
	guid[0] = guid[0]&^0x01 | 0x02
	return guid
}

// GUIDs are the InfiniBand GUIDs that the administrator of a node has set aside
// for the VFs of its PFs.
type GUIDs []guidsOfPF

type guidsOfPF struct {
	pciAddress  string
	guid        net.HardwareAddr // of the PF
	list        []uint64
	first, last uint64 // without a list
}

// ParseGUIDs reads the file /etc/sriov-operator/infiniband/guids: a JSON list of
// objects with pciAddress or pfGuid, and guids or guidsRange.
func ParseGUIDs(file []byte) (GUIDs, error) {
	var entries []struct {
		PciAddress string   `json:"pciAddress"`
		PfGUID     string   `json:"pfGuid"`
		GUIDs      []string `json:"guids"`
		Range      *struct {
			Start string `json:"start"`
			End   string `json:"end"`
		} `json:"guidsRange"`
	}
	if err := json.Unmarshal(file, &entries); err != nil {
		return nil, fmt.Errorf("read the GUID file: %w", err)
	}
	var all GUIDs
	for i, e := range entries {
		fail := func(format string, args ...any) error {
			return fmt.Errorf("read the GUID file: entry %d: %s", i, fmt.Sprintf(format, args...))
		}
		g := guidsOfPF{pciAddress: e.PciAddress}
		var err error
		switch {
		case (e.PciAddress == "") == (e.PfGUID == ""):
			return nil, fail("give either pciAddress or pfGuid of the PF")
		case (len(e.GUIDs) == 0) == (e.Range == nil):
			return nil, fail("give either guids or guidsRange")
		case e.PfGUID != "":
			if g.guid, err = net.ParseMAC(e.PfGUID); err != nil || len(g.guid) < 8 {
				return nil, fail("pfGuid %q is not a GUID like 50:6b:4b:03:00:cc:12:34", e.PfGUID)
			}
		}
		for _, s := range e.GUIDs {
			n, err := parseGUID(s)
			if err != nil {
				return nil, fail("%v", err)
			}
			g.list = append(g.list, n)
		}
		if e.Range != nil {
			if g.first, err = parseGUID(e.Range.Start); err != nil {
				return nil, fail("guidsRange.start: %v", err)
			}
			if g.last, err = parseGUID(e.Range.End); err != nil {
				return nil, fail("guidsRange.end: %v", err)
			}
			if g.last < g.first {
				return nil, fail("guidsRange runs backwards, from %s to %s: swap them", e.Range.Start, e.Range.End)
			}
		}
		all = append(all, g)
	}
	return all, nil
}

func parseGUID(s string) (uint64, error) {
	b, err := net.ParseMAC(s)
	if err != nil || len(b) != 8 || binary.BigEndian.Uint64(b) == 0 {
		return 0, fmt.Errorf("%q is not a GUID like 50:6b:4b:03:00:cc:12:34", s)
	}
	return binary.BigEndian.Uint64(b), nil
}

// Of returns the GUID set aside for a VF, nil when none is for its PF. address is
// the link's of the PF, which ends in its GUID. The error says that there are too
// few for so many VFs.
func (g GUIDs) Of(pfAddress string, address net.HardwareAddr, index int) (net.HardwareAddr, error) {
	for _, e := range g {
		if e.pciAddress != pfAddress && (len(e.guid) == 0 || !bytes.HasSuffix(address, e.guid)) {
			continue
		}
		n := uint64(index)
		switch {
		case n < uint64(len(e.list)):
			n = e.list[index]
		case len(e.list) == 0 && n <= e.last-e.first:
			n += e.first
		default:
			return nil, fmt.Errorf("the GUID file has no GUID for VF %d of PF %s: add some", index, pfAddress)
		}
		return binary.BigEndian.AppendUint64(nil, n), nil
	}
	return nil, nil
}
