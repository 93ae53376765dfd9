package host

import (
	"bytes"
	"context"
	"encoding/binary"
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
		messages, err := conn.request(unix.RTM_GETLINK, unix.NLM_F_DUMP, nl.NewIfInfomsg(unix.AF_UNSPEC), withoutCounters)
		// A dump that raced with a change is repeated: half a list would look
		// like links that went away.
		if errors.Is(err, netlink.ErrDumpInterrupted) && try < 5 {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list links: %w", err)
		}
		out := make([]Netdev, len(messages))
		for i, m := range messages {
			out[i] = netdevFrom(m)
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
	messages, err := conn.link(unix.RTM_GETLINK, 0, nil, withoutCounters, nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	if err == nil && len(messages) == 0 {
		err = unix.ENODEV
	}
	if err != nil {
		return Netdev{}, fmt.Errorf("find link %s: %w", name, err)
	}
	return netdevFrom(messages[0]), nil
}

// withoutCounters asks for links without their statistics (RTEXT_FILTER_SKIP_STATS), and,
// as it does not ask for them, without their VFs.
var withoutCounters = nl.NewRtAttr(unix.IFLA_EXT_MASK, u32(1<<3))

// netdevFrom reads an RTM_NEWLINK message.
func netdevFrom(m []byte) Netdev {
	var out Netdev
	if len(m) < unix.SizeofIfInfomsg {
		return out
	}
	const indexAt, flagsAt = 4, 8 // struct ifinfomsg
	flags := binary.NativeEndian.Uint32(m[flagsAt:])
	out.Index = int(int32(binary.NativeEndian.Uint32(m[indexAt:])))
	out.Up, out.Carrier = flags&unix.IFF_UP != 0, flags&unix.IFF_LOWER_UP != 0
	out.Promisc, out.AllMulti = flags&unix.IFF_PROMISC != 0, flags&unix.IFF_ALLMULTI != 0
	device, bus := "", ""
	for kind, value := range eachAttribute(m[unix.SizeofIfInfomsg:]) {
		switch kind {
		case unix.IFLA_IFNAME:
			out.Name = text(value)
		case unix.IFLA_PROP_LIST:
			for kind, name := range eachAttribute(value) {
				if kind == unix.IFLA_ALT_IFNAME {
					out.AltNames = append(out.AltNames, text(name))
				}
			}
		case unix.IFLA_ADDRESS:
			if len(bytes.Trim(value, "\x00")) > 0 { // a link without one, such as lo, has zeros
				out.MAC = bytes.Clone(value)
			}
		case unix.IFLA_MTU:
			out.MTU = int(word(value))
		case unix.IFLA_GROUP:
			out.Group = word(value)
		case unix.IFLA_PARENT_DEV_NAME:
			device = text(value)
		case unix.IFLA_PARENT_DEV_BUS_NAME:
			bus = text(value)
		case unix.IFLA_LINKINFO:
			name, _ := attribute(value, nl.IFLA_INFO_KIND)
			if out.Kind = text(name); out.Kind == "macvlan" {
				data, _ := attribute(value, nl.IFLA_INFO_DATA)
				mode, _ := attribute(data, nl.IFLA_MACVLAN_MODE)
				out.Mode = MacvlanMode(word(mode))
			}
		}
	}
	if bus == "pci" {
		out.PCIAddress = device
	}
	return out
}

// word is a 32-bit attribute, 0 when it is not one.
func word(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
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
			attrs = append(attrs, nl.NewRtAttr(unix.IFLA_NET_NS_FD, u32(uint32(c.To.fd))))
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
