package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Watch tells when links that can be parents (see Links) or PCI devices came,
// went or changed: RTM_NEWLINK and RTM_DELLINK of this network namespace, and the
// kernel's uevents of subsystem pci (add, remove, bind, unbind, change).
//
// A value means "look again", however much happened since the last was taken,
// so nothing is ever missed: when the kernel had to drop messages (ENOBUFS) a
// value is sent as well. The channel closes when ctx ends or a socket fails
// for good.
func (h *Host) Watch(ctx context.Context) (<-chan struct{}, error) {
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
	changed := make(chan struct{}, 1)
	tell := func() {
		select {
		case changed <- struct{}{}:
		default: // one is waiting, and means this change too
		}
	}
	done := make(chan struct{}, 2)
	follow := func(socket *os.File, relevant func([]byte) bool) {
		receive(socket, relevant, tell)
		stop()
		done <- struct{}{}
	}
	go follow(links, linkFilter{}.relevant)
	go follow(uevents, pciChanged)
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
func receive(socket *os.File, relevant func([]byte) bool, tell func()) {
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
			tell()
		case errors.Is(recvErr, unix.EINTR):
		case recvErr != nil:
			return
		case !fromKernel(from):
		case relevant(buf[:n]):
			tell()
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

// relevant tells whether a datagram of rtnetlink messages speaks of a link that may be
// a PF's or VF's, or of one of the kinds above that is not as it was. What is neither
// (veth, macvlan, loopback) is the pods', which cause no work here. What cannot be
// parsed counts.
func (f linkFilter) relevant(datagram []byte) bool {
	msgs, err := syscall.ParseNetlinkMessage(datagram)
	if err != nil {
		return true
	}
	any := false
	for i := range msgs {
		any = f.matters(msgs[i].Header.Type, msgs[i].Data) || any
	}
	return any
}

func (f linkFilter) matters(kind uint16, data []byte) bool {
	if kind != unix.RTM_NEWLINK && kind != unix.RTM_DELLINK {
		return false
	}
	if len(data) < unix.SizeofIfInfomsg {
		return true
	}
	const indexAt, flagsAt = 4, 8 // struct ifinfomsg
	index, flags := int32(binary.NativeEndian.Uint32(data[indexAt:])), binary.NativeEndian.Uint32(data[flagsAt:])
	attributes := data[unix.SizeofIfInfomsg:]
	// A bridge tells of its ports by messages of its own family, which say nothing of
	// the link itself.
	if flags&unix.IFF_LOOPBACK != 0 || data[0] == unix.AF_BRIDGE {
		return false
	}
	info, ok := attribute(attributes, unix.IFLA_LINKINFO)
	if !ok {
		return true
	}
	virtual, ok := attribute(info, unix.IFLA_INFO_KIND)
	if !ok {
		return true
	}
	switch LinkKind(bytes.TrimRight(virtual, "\x00")) {
	case BondLink, BridgeLink, VLANLink, VXLANLink:
	default:
		return false
	}
	if kind == unix.RTM_DELLINK {
		delete(f, index)
		return true
	}
	is := fmt.Sprint(flags & unix.IFF_UP)
	for _, shown := range []uint16{unix.IFLA_IFNAME, unix.IFLA_MTU, unix.IFLA_ADDRESS, unix.IFLA_MASTER, unix.IFLA_LINK, unix.IFLA_PROP_LIST} {
		value, _ := attribute(attributes, shown)
		is += fmt.Sprintf(" %x", value)
	}
	was, known := f[index]
	f[index] = is
	return !known || was != is
}

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

// pciChanged tells whether a uevent, "add@/devices/..." and NUL-ended KEY=value
// pairs, is of a PCI device. Netdevs are followed through rtnetlink.
func pciChanged(uevent []byte) bool {
	for pair := range bytes.SplitSeq(uevent, []byte{0}) {
		if bytes.Equal(pair, []byte("SUBSYSTEM=pci")) {
			return true
		}
	}
	return false
}
