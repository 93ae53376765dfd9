package host

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"

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
		return h.vf.setVF(ctx, pf.Index, "", index, VFSettings{}, set(nl.IFLA_VF_IB_NODE_GUID), set(nl.IFLA_VF_IB_PORT_GUID))
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
	guid, err := hex.DecodeString(strings.ReplaceAll(s, ":", ""))
	if err != nil || !guidForm.MatchString(s) {
		return nil, fmt.Errorf("%q is not a GUID like 506b:4b03:00cc:1234", s)
	}
	if binary.BigEndian.Uint64(guid) == 0 {
		return nil, nil
	}
	return guid, nil
}

var guidForm = regexp.MustCompile(`^[0-9a-fA-F]{4}(:[0-9a-fA-F]{4}){3}$`)
