package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Netdev is a network device in some network namespace.
type Netdev struct {
	Index      int
	Name       string
	AltNames   []string
	MAC        net.HardwareAddr
	MTU        int
	Up         bool   // administratively
	Carrier    bool   // IFF_LOWER_UP
	Promisc    bool   // asked to receive all packets
	AllMulti   bool   // asked to receive all multicast packets
	PCIAddress string // of the PCI function it belongs to (IFLA_PARENT_DEV_NAME, Linux 5.14); empty without one
	Group      uint32
	Kind       string      // "macvlan", "veth"; empty or "device" for a NIC's
	Mode       MacvlanMode // of a MacVLAN sub-interface
}

// Has tells whether name is the link's name or one of its alternative names.
func (n Netdev) Has(name string) bool { return n.Name == name || slices.Contains(n.AltNames, name) }

// Links lists the netdevs of a namespace, without their VFs.
func (a *Attacher) Links(ns *Netns) ([]Netdev, error) {
	conn, err := a.rtnl(ns)
	if err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		links, err := conn.handle.LinkList()
		// A dump that raced with a change is repeated: half a list would look
		// like links that went away.
		if errors.Is(err, netlink.ErrDumpInterrupted) && try < 5 {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list links: %w", err)
		}
		out := make([]Netdev, len(links))
		for i, l := range links {
			out[i] = netdevFrom(l)
		}
		return out, nil
	}
}

// Link reads one netdev by its name. The error wraps ENODEV when there is none.
func (a *Attacher) Link(ns *Netns, name string) (Netdev, error) {
	conn, err := a.rtnl(ns)
	if err != nil {
		return Netdev{}, err
	}
	l, err := conn.handle.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		err = unix.ENODEV
	}
	if err != nil {
		return Netdev{}, fmt.Errorf("find link %s: %w", name, err)
	}
	return netdevFrom(l), nil
}

func netdevFrom(from netlink.Link) Netdev {
	l := from.Attrs()
	out := Netdev{
		Index: l.Index, Name: l.Name, AltNames: l.AltNames, MAC: l.HardwareAddr, MTU: l.MTU,
		Up: l.RawFlags&unix.IFF_UP != 0, Carrier: l.RawFlags&unix.IFF_LOWER_UP != 0,
		Promisc: l.RawFlags&unix.IFF_PROMISC != 0, AllMulti: l.RawFlags&unix.IFF_ALLMULTI != 0,
		Group: l.Group, Kind: from.Type(),
	}
	if m, ok := from.(*netlink.Macvlan); ok {
		out.Mode = macvlanModes[m.Mode]
	}
	if l.ParentDevBus == "pci" {
		out.PCIAddress = l.ParentDev
	}
	return out
}

// macvlanModes are the modes by the library's numbers.
var macvlanModes = map[netlink.MacvlanMode]MacvlanMode{
	netlink.MACVLAN_MODE_PRIVATE: MacvlanPrivate, netlink.MACVLAN_MODE_VEPA: MacvlanVEPA,
	netlink.MACVLAN_MODE_BRIDGE: MacvlanBridge, netlink.MACVLAN_MODE_PASSTHRU: MacvlanPassthru,
}

// AdminState is what to do with a link's administrative state.
type AdminState int

// The changes of a link's administrative state.
const (
	KeepState AdminState = iota
	SetUp
	SetDown
)

// LinkChange says what to change of a link; zero fields stay as they are.
type LinkChange struct {
	To    *Netns // move there
	Name  string
	MAC   net.HardwareAddr
	MTU   int
	State AdminState

	Promisc, AllMulti *bool // nil: as they are
}

// ChangeLink makes all the changes in one RTM_NEWLINK message. The kernel moves
// first and closes the link for that, then sets MAC, MTU, name, flags and state, in
// this order (do_setlink). It is not atomic: when it fails after the move, the
// link is in the new namespace, with some of the changes made.
func (a *Attacher) ChangeLink(ctx context.Context, from *Netns, index int, c LinkChange) error {
	conn, err := a.rtnl(from)
	if err != nil {
		return err
	}
	return retry(ctx, func() error {
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		if c.State != KeepState {
			msg.Change = unix.IFF_UP
			if c.State == SetUp {
				msg.Flags = unix.IFF_UP
			}
		}
		for _, f := range []struct {
			flag uint32
			want *bool
		}{{unix.IFF_PROMISC, c.Promisc}, {unix.IFF_ALLMULTI, c.AllMulti}} {
			if f.want == nil {
				continue
			}
			msg.Change |= f.flag
			if *f.want {
				msg.Flags |= f.flag
			}
		}
		var attrs []*nl.RtAttr
		if c.To != nil {
			attrs = append(attrs, nl.NewRtAttr(unix.IFLA_NET_NS_FD, u32(uint32(c.To.file.Fd()))))
		}
		if c.Name != "" {
			attrs = append(attrs, nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(c.Name)))
		}
		if len(c.MAC) > 0 {
			attrs = append(attrs, nl.NewRtAttr(unix.IFLA_ADDRESS, c.MAC))
		}
		if c.MTU > 0 {
			attrs = append(attrs, nl.NewRtAttr(unix.IFLA_MTU, u32(uint32(c.MTU))))
		}
		a.linkMessages.Add(1)
		_, err := conn.link(unix.RTM_NEWLINK, index, msg, attrs...)
		return err
	})
}

// AdoptMAC gives a link of the host's namespace its MAC. Drivers of VFs whose PF
// just set the same MAC may refuse to take it (igbvf, EADDRNOTAVAIL) until they
// have reset the VF, which they do when the link goes down.
func (a *Attacher) AdoptMAC(ctx context.Context, l Netdev, mac net.HardwareAddr) error {
	if bytes.Equal(l.MAC, mac) {
		return nil
	}
	refused := a.ChangeLink(ctx, nil, l.Index, LinkChange{MAC: mac})
	if refused == nil {
		return nil
	}
	state := SetDown
	if l.Up {
		state = SetUp
	}
	for _, s := range []AdminState{SetUp, SetDown, state} {
		if err := a.ChangeLink(ctx, nil, l.Index, LinkChange{State: s}); err != nil {
			return fmt.Errorf("set MAC of %s to %s: %w", l.Name, mac, errors.Join(refused, err))
		}
	}
	now, err := a.Link(nil, l.Name)
	if err != nil {
		return err
	}
	if !bytes.Equal(now.MAC, mac) {
		return fmt.Errorf("set MAC of %s to %s: %w", l.Name, mac, refused)
	}
	return nil
}

// DeleteAltName takes an alternative name from a link.
func (a *Attacher) DeleteAltName(ns *Netns, index int, name string) error {
	conn, err := a.rtnl(ns)
	if err != nil {
		return err
	}
	props := nl.NewRtAttr(unix.IFLA_PROP_LIST|unix.NLA_F_NESTED, nil)
	props.AddRtAttr(unix.IFLA_ALT_IFNAME, nl.ZeroTerminated(name))
	if _, err := conn.link(unix.RTM_DELLINKPROP, index, nil, props); err != nil {
		return fmt.Errorf("delete alternative name %s: %w", name, err)
	}
	return nil
}

// pollInterval is how often a state the kernel sends no event for is looked at.
const pollInterval = 5 * time.Millisecond

// poll calls f until it is done, fails, or the context ends.
func poll(ctx context.Context, f func() (done bool, err error)) error {
	for {
		if done, err := f(); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollInterval):
		}
	}
}
