package host

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// MacvlanMode says whom the sub-interfaces of a parent reach without the switch.
type MacvlanMode uint32

// The modes (IFLA_MACVLAN_MODE in linux/if_link.h).
const (
	MacvlanPrivate  MacvlanMode = nl.MACVLAN_MODE_PRIVATE
	MacvlanVEPA     MacvlanMode = nl.MACVLAN_MODE_VEPA
	MacvlanBridge   MacvlanMode = nl.MACVLAN_MODE_BRIDGE
	MacvlanPassthru MacvlanMode = nl.MACVLAN_MODE_PASSTHRU
)

// MacvlanModes are the modes by their names.
var MacvlanModes = map[string]MacvlanMode{
	"bridge": MacvlanBridge, "private": MacvlanPrivate, "vepa": MacvlanVEPA, "passthru": MacvlanPassthru,
}

// Macvlan is a MacVLAN sub-interface to be made.
type Macvlan struct {
	Name           string
	MAC            net.HardwareAddr
	MTU            int // bytes
	Mode           MacvlanMode
	BroadcastQueue int    // frames that may wait; 0: the kernel's default
	Group          uint32 // link group, IFLA_GROUP
}

// AddMacvlan makes a MacVLAN sub-interface in namespace ns, up, in one
// RTM_NEWLINK message. parent is a link of the host's namespace, of ns when inPod
// is set. The kernel may keep another MAC than asked for (passthru).
//
// Kernels before 6.14 look in the namespace of the request, which is the
// parent's, for a link of the new one's name (rtnl_newlink). Where there is one,
// the sub-interface is made under a name that is free and renamed in the pod.
func (a *Attacher) AddMacvlan(ctx context.Context, ns *Netns, parent Netdev, inPod bool, m Macvlan) error {
	from, to := (*Netns)(nil), ns
	if inPod {
		from, to = ns, nil
	}
	conn, err := a.rtnl(from)
	if err != nil {
		return err
	}
	err = retry(ctx, func() error { return conn.addMacvlan(parent.Index, to, m, true) })
	if !errors.Is(err, unix.EEXIST) || inPod {
		return err
	}
	named := m
	named.Name = fmt.Sprintf("slu%x", m.Group)
	if retry(ctx, func() error { return conn.addMacvlan(parent.Index, to, named, false) }) != nil {
		return err
	}
	made, err := a.Link(ns, named.Name)
	if err == nil {
		err = a.ChangeLink(ctx, ns, made.Index, LinkChange{Name: m.Name, State: SetUp})
	}
	if err != nil && made.Index != 0 {
		err = errors.Join(err, a.DeleteLink(ns, made.Index))
	}
	return err
}

func (r *rtnl) addMacvlan(parent int, to *Netns, m Macvlan, up bool) error {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	if up {
		msg.Flags, msg.Change = unix.IFF_UP, unix.IFF_UP
	}
	data := []nl.NetlinkRequestData{
		msg,
		nl.NewRtAttr(unix.IFLA_LINK, u32(uint32(parent))),
		nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(m.Name)),
		nl.NewRtAttr(unix.IFLA_ADDRESS, m.MAC),
		nl.NewRtAttr(unix.IFLA_MTU, u32(uint32(m.MTU))),
		nl.NewRtAttr(unix.IFLA_GROUP, u32(m.Group)),
	}
	if to != nil {
		data = append(data, nl.NewRtAttr(unix.IFLA_NET_NS_FD, u32(uint32(to.fd))))
	}
	info := nl.NewRtAttr(unix.IFLA_LINKINFO|unix.NLA_F_NESTED, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, []byte("macvlan"))
	kind := info.AddRtAttr(nl.IFLA_INFO_DATA|unix.NLA_F_NESTED, nil)
	kind.AddRtAttr(nl.IFLA_MACVLAN_MODE, u32(uint32(m.Mode)))
	if m.BroadcastQueue > 0 {
		kind.AddRtAttr(nl.IFLA_MACVLAN_BC_QUEUE_LEN, u32(uint32(m.BroadcastQueue)))
	}
	_, err := r.request(unix.RTM_NEWLINK, create, append(data, info)...)
	return err
}

// create are the flags of a request for something new.
const create = unix.NLM_F_CREATE | unix.NLM_F_EXCL | unix.NLM_F_ACK

// DeleteLink deletes a link of ns. One that is gone is deleted.
func (a *Attacher) DeleteLink(ns *Netns, index int) error {
	conn, err := a.rtnl(ns)
	if err != nil {
		return err
	}
	if _, err := conn.link(unix.RTM_DELLINK, index, nil); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete link: %w", err)
	}
	return nil
}

// AddVeth makes a pair of links: name in the host's namespace, up, and peer in ns,
// which the kernel does not let be up before it knows its other end (veth_open).
func (a *Attacher) AddVeth(ctx context.Context, name string, ns *Netns, peer string, mtu int) error {
	conn, err := a.rtnl(nil)
	if err != nil {
		return err
	}
	return retry(ctx, func() error {
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Flags, msg.Change = unix.IFF_UP, unix.IFF_UP
		info := nl.NewRtAttr(unix.IFLA_LINKINFO|unix.NLA_F_NESTED, nil)
		info.AddRtAttr(nl.IFLA_INFO_KIND, []byte("veth"))
		other := info.AddRtAttr(nl.IFLA_INFO_DATA|unix.NLA_F_NESTED, nil).AddRtAttr(nl.VETH_INFO_PEER|unix.NLA_F_NESTED, nil)
		other.AddChild(nl.NewIfInfomsg(unix.AF_UNSPEC))
		other.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(peer))
		other.AddRtAttr(unix.IFLA_MTU, u32(uint32(mtu)))
		other.AddRtAttr(unix.IFLA_NET_NS_FD, u32(uint32(ns.fd)))
		_, err := conn.request(unix.RTM_NEWLINK, create, msg,
			nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)), nl.NewRtAttr(unix.IFLA_MTU, u32(uint32(mtu))), info)
		return err
	})
}
