package host

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Changes tells where something changed, for who wants to look again.
type Changes struct {
	// Devices are addresses of PCI devices that came, went, got or lost a driver,
	// or whose netdev in this namespace came, went or changed. Sorted.
	Devices []string
	// Links are the indexes of netdevs that changed and whose kernel does not tell
	// their device (IFLA_PARENT_DEV_NAME, since Linux 5.14). Sorted.
	Links []int
	// Parents tells that another link that can be a parent (see Links) came, went or
	// changed.
	Parents bool
	// All tells that it is not known where: messages were lost.
	All bool
}

// With adds the changes of b.
func (c Changes) With(b Changes) Changes {
	return Changes{Devices: union(c.Devices, b.Devices), Links: union(c.Links, b.Links), Parents: c.Parents || b.Parents, All: c.All || b.All}
}

func union[E cmp.Ordered](a, b []E) []E {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

func (c Changes) empty() bool {
	return len(c.Devices) == 0 && len(c.Links) == 0 && !c.Parents && !c.All
}

// Watch tells where links that can be parents (see Links) or PCI devices came,
// went or changed: RTM_NEWLINK and RTM_DELLINK of this network namespace, and the
// kernel's uevents of subsystem pci (add, remove, bind, unbind, change).
//
// A change of a VF through its PF shows as a change of the PF, which tells
// nothing of the VF (do_setlink in net/core/rtnetlink.c), and only while the PF
// is up (netdev_state_change).
//
// A value has all that happened since the last was taken, so nothing is ever
// missed: when the kernel had to drop messages (ENOBUFS) it says All. The
// channel closes when ctx ends or a socket fails for good.
func (h *Host) Watch(ctx context.Context) (<-chan Changes, error) {
	links, err := listen(unix.NETLINK_ROUTE, unix.RTMGRP_LINK)
	if err != nil {
		return nil, fmt.Errorf("subscribe to link events: %w", err)
	}
	const kernelEvents = 1 // group 1 is the kernel's, group 2 udev's
	uevents, err := listen(unix.NETLINK_KOBJECT_UEVENT, kernelEvents)
	if err != nil {
		links.Close()
		return nil, fmt.Errorf("subscribe to device events: %w", err)
	}
	ctx, stop := context.WithCancel(ctx)
	changed := make(chan Changes, 1)
	var mu sync.Mutex
	tell := func(c Changes) {
		mu.Lock()
		defer mu.Unlock()
		select {
		case waiting := <-changed:
			c = waiting.With(c)
		default:
		}
		changed <- c // there is room: only this function, under mu, sends
	}
	done := make(chan struct{}, 2)
	follow := func(socket *os.File, parse func([]byte) Changes) {
		receive(socket, parse, tell)
		stop()
		done <- struct{}{}
	}
	go follow(links, linkFilter{}.changes)
	go follow(uevents, deviceChanges)
	go func() {
		<-ctx.Done()
		stop()
		links.Close()
		uevents.Close()
		<-done
		<-done
		close(changed)
	}()
	return changed, nil
}

// listen opens a netlink socket bound to the groups of the mask. As a
// non-blocking os.File it ends a pending read when it is closed.
func listen(family int, groups uint32) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, family)
	if err != nil {
		return nil, err
	}
	// Room for bursts: 64 VFs make hundreds of messages. Needs CAP_NET_ADMIN;
	// without it a burst costs one more look.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}

// receive reads until the socket is closed or broken.
func receive(socket *os.File, parse func([]byte) Changes, tell func(Changes)) {
	conn, err := socket.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 64<<10)
	for {
		var n int
		var from unix.Sockaddr
		var recvErr error
		err := conn.Read(func(fd uintptr) bool {
			n, from, recvErr = unix.Recvfrom(int(fd), buf, 0)
			return !errors.Is(recvErr, unix.EAGAIN)
		})
		if err != nil {
			return
		}
		switch {
		case errors.Is(recvErr, unix.ENOBUFS):
			tell(Changes{All: true})
		case errors.Is(recvErr, unix.EINTR):
		case recvErr != nil:
			return
		case fromKernel(from):
			if c := parse(buf[:n]); !c.empty() {
				tell(c)
			}
		}
	}
}

// fromKernel refuses messages that a process sent to our socket.
func fromKernel(from unix.Sockaddr) bool {
	a, ok := from.(*unix.SockaddrNetlink)
	return ok && a.Pid == 0
}

// linkFilter tells which link messages matter. It remembers, of each bond, bridge, VLAN
// and VXLAN device, what Links shows of it: the kernel tells of a bridge whenever a
// pod's interface joins or leaves it.
type linkFilter map[int32]string

// changes are those that a datagram of rtnetlink messages tells of: of links that may
// be a PF's or VF's, or of one of the kinds above that is not as it was. What is neither
// (veth, macvlan, loopback) is the pods', which cause no work here. What cannot be
// parsed may be anything.
func (f linkFilter) changes(datagram []byte) Changes {
	msgs, err := syscall.ParseNetlinkMessage(datagram)
	if err != nil {
		return Changes{All: true}
	}
	var c Changes
	for i := range msgs {
		c = c.With(f.change(msgs[i].Header.Type, msgs[i].Data))
	}
	return c
}

func (f linkFilter) change(kind uint16, data []byte) Changes {
	if kind != unix.RTM_NEWLINK && kind != unix.RTM_DELLINK {
		return Changes{}
	}
	if len(data) < unix.SizeofIfInfomsg {
		return Changes{All: true}
	}
	const indexAt, flagsAt = 4, 8 // struct ifinfomsg
	index, flags := int32(binary.NativeEndian.Uint32(data[indexAt:])), binary.NativeEndian.Uint32(data[flagsAt:])
	attributes := data[unix.SizeofIfInfomsg:]
	// A bridge tells of its ports by messages of its own family, which say nothing of
	// the link itself.
	if flags&unix.IFF_LOOPBACK != 0 || data[0] == unix.AF_BRIDGE {
		return Changes{}
	}
	info, _ := attribute(attributes, unix.IFLA_LINKINFO)
	virtual, ok := attribute(info, unix.IFLA_INFO_KIND)
	if !ok {
		switch parent, told := attribute(attributes, unix.IFLA_PARENT_DEV_NAME); {
		case !told:
			return Changes{Links: []int{int(index)}}
		case ValidPCIAddress(text(parent)):
			return Changes{Devices: []string{text(parent)}}
		}
		return Changes{Parents: true} // of another bus than PCI
	}
	name := text(virtual)
	switch LinkKind(name) {
	case BondLink, BridgeLink, VLANLink, VXLANLink:
	default:
		return Changes{}
	}
	if kind == unix.RTM_DELLINK {
		delete(f, index)
		return Changes{Parents: true}
	}
	is := fmt.Sprint(flags & unix.IFF_UP)
	for _, shown := range []uint16{unix.IFLA_IFNAME, unix.IFLA_MTU, unix.IFLA_ADDRESS, unix.IFLA_MASTER, unix.IFLA_LINK, unix.IFLA_PROP_LIST} {
		if shown == unix.IFLA_ADDRESS && LinkKind(name) == BridgeLink {
			continue
		}
		value, _ := attribute(attributes, shown)
		is += fmt.Sprintf(" %x", value)
	}
	was, known := f[index]
	f[index] = is
	return Changes{Parents: !known || was != is}
}

// text is a NUL-ended attribute.
func text(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }

// nlaTypeMask takes the flags off the type of a netlink attribute.
const nlaTypeMask = ^uint16(unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)

// eachAttribute gives netlink attributes, type and payload, up to the end or the first
// that is broken.
func eachAttribute(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofNlAttr {
			size := int(binary.NativeEndian.Uint16(b))
			if size < unix.SizeofNlAttr || size > len(b) || !yield(binary.NativeEndian.Uint16(b[2:])&nlaTypeMask, b[unix.SizeofNlAttr:size]) {
				return
			}
			next := (size + unix.NLA_ALIGNTO - 1) &^ (unix.NLA_ALIGNTO - 1)
			b = b[min(next, len(b)):]
		}
	}
}

// attribute finds the first netlink attribute of the type.
func attribute(b []byte, want uint16) ([]byte, bool) {
	for kind, payload := range eachAttribute(b) {
		if kind == want {
			return payload, true
		}
	}
	return nil, false
}

// deviceChanges is the change that a uevent, "add@/devices/..." and NUL-ended
// KEY=value pairs, tells of a PCI device. Netdevs are followed through rtnetlink.
func deviceChanges(uevent []byte) Changes {
	var pci bool
	var address string
	for pair := range bytes.SplitSeq(uevent, []byte{0}) {
		if bytes.Equal(pair, []byte("SUBSYSTEM=pci")) {
			pci = true
		}
		if slot, ok := bytes.CutPrefix(pair, []byte("PCI_SLOT_NAME=")); ok {
			address = string(slot)
		}
	}
	switch {
	case !pci:
		return Changes{}
	case !ValidPCIAddress(address):
		return Changes{All: true}
	}
	return Changes{Devices: []string{address}}
}
