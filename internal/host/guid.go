package host

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

var guidHints = []hint{
	{unix.EOPNOTSUPP, "the link is not InfiniBand, or its driver does not set GUIDs of VFs"},
	{unix.EINVAL, "the driver does not take this GUID, or the VF is gone: see the kernel log of the node"},
	{unix.EPERM, "the driver refuses while the VF is in use: see the kernel log of the node"},
}

// SetVFGUID sets node and port GUID, eight bytes, that the PF assigns to the VF of
// the given index (IFLA_VF_IB_NODE_GUID, IFLA_VF_IB_PORT_GUID). The VF takes it
// when its driver starts.
func (h *Host) SetVFGUID(ctx context.Context, pf Link, index int, guid net.HardwareAddr) error {
	return pf.change(ctx, fmt.Sprintf("set the GUID of VF %d to %s", index, guid), guidHints, func(netlink.Link) error {
		if len(guid) != 8 {
			return fmt.Errorf("%q is not a GUID of eight bytes", guid)
		}
		set := func(kind int) vfAttr {
			return vfAttr{encode: func(info *nl.RtAttr, vf uint32, _ VFSettings) {
				m := nl.VfGUID{Vf: vf, GUID: binary.BigEndian.Uint64(guid)}
				info.AddRtAttr(kind, m.Serialize())
			}}
		}
		return h.vf.setVF(ctx, pf.Index, index, VFSettings{}, set(nl.IFLA_VF_IB_NODE_GUID), set(nl.IFLA_VF_IB_PORT_GUID))
	})
}

// rdmaOf reads the name of the function's RDMA device and its node GUID; both are
// empty without one.
func rdmaOf(device string) (name string, guid net.HardwareAddr) {
	dir := filepath.Join(device, "infiniband")
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		return "", nil
	}
	name = entries[0].Name()
	text, err := readText(filepath.Join(dir, name, "node_guid"))
	if err != nil {
		return name, nil
	}
	guid, _ = parseGUID(text)
	return name, guid
}

// parseGUID reads a GUID as sysfs prints it: four groups of four hexadecimal
// digits, "506b:4b03:00cc:1234". All zero is none.
func parseGUID(s string) (net.HardwareAddr, error) {
	var words [4]uint16
	if _, err := fmt.Sscanf(s, "%4x:%4x:%4x:%4x", &words[0], &words[1], &words[2], &words[3]); err != nil || len(s) != 19 {
		return nil, fmt.Errorf("%q is not a GUID like 506b:4b03:00cc:1234", s)
	}
	var guid net.HardwareAddr
	for _, w := range words {
		guid = binary.BigEndian.AppendUint16(guid, w)
	}
	if binary.BigEndian.Uint64(guid) == 0 {
		return nil, nil
	}
	return guid, nil
}
