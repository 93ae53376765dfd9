package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// inNetns moves the test to a new network namespace. The thread ends with it.
func inNetns(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root for a network namespace of its own")
		}
		t.Skip("needs root for a network namespace of its own")
	}
	runtime.LockOSThread()
	old, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ns.Close()
		if err := netns.Set(old); err == nil {
			runtime.UnlockOSThread()
		}
		old.Close()
	})
}

func open(t *testing.T) *Host {
	t.Helper()
	h, err := Open(DefaultSysfs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// The kernel takes what Host sends, and what it refuses says why.
func TestChangesOfLinks(t *testing.T) {
	inNetns(t)
	h := open(t)
	if err := h.rt.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "nic0"}, PeerName: "peer"}); err != nil {
		t.Fatal(err)
	}
	read := func(name string) *netlink.LinkAttrs {
		l, err := h.rt.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		return l.Attrs()
	}
	l := Link{Index: read("nic0").Index, Name: "nic0"}
	mac := []byte{2, 1, 2, 3, 4, 5}
	for _, err := range []error{
		h.SetMTU(t.Context(), l, 9000), h.SetMAC(t.Context(), l, mac), h.SetLinkUp(t.Context(), l), h.Rename(t.Context(), l, "nic1"),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	got := read("nic1")
	if got.MTU != 9000 || got.HardwareAddr.String() != "02:01:02:03:04:05" || got.RawFlags&unix.IFF_UP == 0 {
		t.Errorf("link is %+v", got)
	}
	if err := h.Rename(t.Context(), l, "lo"); err == nil || hintFor(err, renameHints) == "" {
		t.Errorf("a name in use: %v", err)
	}
	if err := h.SetMTU(t.Context(), l, 1); err == nil || hintFor(err, mtuHints) == "" {
		t.Errorf("MTU 1: %v", err)
	}
	if err := h.SetVFMAC(t.Context(), l, 0, mac); err == nil {
		t.Error("a veth has no VFs")
	}
}

// Links of pods without a VF cause no work.
func TestVirtualLinksAreNoEvents(t *testing.T) {
	inNetns(t)
	h := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	events, err := h.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err = h.rt.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "a"}, PeerName: "b"}); err != nil {
		t.Fatal(err)
	}
	lo, err := h.rt.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.rt.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	select {
	case <-events:
		t.Error("a veth, or loopback, was taken for a NIC")
	case <-time.After(100 * time.Millisecond):
	}
	cancel()
	if _, open := <-events; open {
		t.Error("the channel stays open after its context")
	}
}

// When the kernel had to drop messages, the watcher looks again.
func TestDroppedMessagesMeanLookAgain(t *testing.T) {
	inNetns(t)
	h := open(t)
	socket, err := listen(unix.NETLINK_ROUTE, unix.RTMGRP_LINK)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var optErr error
	err = conn.Control(func(fd uintptr) { optErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 2048) })
	if err != nil || optErr != nil {
		t.Fatal(err, optErr)
	}
	for range 50 {
		d := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "a"}, PeerName: "b"}
		if err := h.rt.LinkAdd(d); err != nil {
			t.Fatal(err)
		}
		if err := h.rt.LinkDel(d); err != nil {
			t.Fatal(err)
		}
	}
	told := make(chan Changes, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		receive(socket, func([]byte) Changes { return Changes{} }, func(c Changes) { told <- c })
	}()
	select {
	case c := <-told:
		if !c.All {
			t.Errorf("told %+v", c)
		}
	case <-time.After(time.Minute):
		t.Error("messages were lost in silence")
	}
	socket.Close()
	<-done
}

func TestMessagesOfProcessesAreRefused(t *testing.T) {
	if fromKernel(&unix.SockaddrNetlink{Pid: 1234}) || fromKernel(nil) || !fromKernel(&unix.SockaddrNetlink{}) {
		t.Error("only the kernel has port 0")
	}
}

// linkMessage is one rtnetlink message about link 7, with a link info of the
// kind and a parent device, or none.
func linkMessage(kind, parent string, flags uint32) []byte {
	attr := func(t uint16, payload []byte) []byte {
		b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(payload)))
		b = binary.NativeEndian.AppendUint16(b, t)
		b = append(b, payload...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
		return b
	}
	body := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(body[4:], 7)
	binary.NativeEndian.PutUint32(body[8:], flags)
	body = append(body, attr(unix.IFLA_IFNAME, []byte("x\x00"))...)
	if kind != "" {
		body = append(body, attr(unix.IFLA_LINKINFO, attr(unix.IFLA_INFO_KIND, append([]byte(kind), 0)))...)
	}
	if parent != "" {
		body = append(body, attr(unix.IFLA_PARENT_DEV_NAME, append([]byte(parent), 0))...)
	}
	m := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	m = binary.NativeEndian.AppendUint16(m, unix.RTM_NEWLINK)
	m = append(m, make([]byte, 10)...)
	return append(m, body...)
}

func TestLinkChanges(t *testing.T) {
	const nic = "0000:01:00.0"
	for name, c := range map[string]struct {
		in   []byte
		want Changes
	}{
		"NIC":              {linkMessage("", nic, 0), Changes{Devices: []string{nic}}},
		"NIC, old kernel":  {linkMessage("", "", 0), Changes{Links: []int{7}}},
		"NIC of no PCI":    {linkMessage("", "virtio0", 0), Changes{Parents: true}},
		"veth":             {linkMessage("veth", "", 0), Changes{}},
		"loopback":         {linkMessage("", "", unix.IFF_LOOPBACK), Changes{}},
		"veth, then NIC":   {append(linkMessage("veth", "", 0), linkMessage("", nic, 0)...), Changes{Devices: []string{nic}}},
		"bridge":           {linkMessage("bridge", "", 0), Changes{Parents: true}},
		"VLAN device":      {linkMessage("vlan", "", 0), Changes{Parents: true}},
		"bridge's port":    {ofBridge(linkMessage("", nic, 0)), Changes{}},
		"broken":           {append([]byte{255, 255, 0, 0}, make([]byte, 20)...), Changes{All: true}},
		"NIC, then broken": {append(linkMessage("", nic, 0), 1, 0, 0, 0), Changes{Devices: []string{nic}}},
	} {
		if d := cmp.Diff(c.want, (linkFilter{}).changes(c.in)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

// ofBridge makes it the message that a bridge sends of its port.
func ofBridge(m []byte) []byte {
	m[unix.SizeofNlMsghdr] = unix.AF_BRIDGE
	return m
}

// A bridge is told of each time that a pod comes; that matters only if it changed.
func TestUnchangedLinksDoNotMatter(t *testing.T) {
	f := linkFilter{}
	gone := linkMessage("bridge", "", 0)
	binary.NativeEndian.PutUint16(gone[4:], unix.RTM_DELLINK)
	for i, c := range []struct {
		in   []byte
		want bool
	}{
		{linkMessage("bridge", "", 0), true},
		{linkMessage("bridge", "", unix.IFF_RUNNING), false},
		{linkMessage("bridge", "", unix.IFF_UP), true},
		{linkMessage("bridge", "", unix.IFF_UP), false},
		{gone, true},
		{linkMessage("bridge", "", unix.IFF_UP), true},
	} {
		if got := f.changes(c.in).Parents; got != c.want {
			t.Errorf("message %d: %t", i, got)
		}
	}
}

func TestDeviceChanges(t *testing.T) {
	for in, want := range map[string]Changes{
		"bind@/devices/pci0000:00/0000:01:00.0\x00ACTION=bind\x00SUBSYSTEM=pci\x00PCI_SLOT_NAME=0000:01:00.0\x00": {Devices: []string{"0000:01:00.0"}},
		"add@/x\x00SUBSYSTEM=pci\x00":                               {All: true},
		"add@/x\x00SUBSYSTEM=net\x00PCI_SLOT_NAME=0000:01:00.0\x00": {},
		"": {},
	} {
		if d := cmp.Diff(want, deviceChanges([]byte(in))); d != "" {
			t.Errorf("%q: %s", in, d)
		}
	}
}

func TestChangesAddUp(t *testing.T) {
	got := Changes{Devices: []string{"b"}, Links: []int{3}}.With(Changes{Devices: []string{"a", "b"}, Links: []int{1}, Parents: true, All: true})
	if d := cmp.Diff(Changes{Devices: []string{"a", "b"}, Links: []int{1, 3}, Parents: true, All: true}, got); d != "" {
		t.Error(d)
	}
}

func FuzzLinkFilter(f *testing.F) {
	f.Add(linkMessage("", "", 0))
	f.Add(linkMessage("veth", "", 1))
	f.Add(append(linkMessage("veth", "", 1), linkMessage("", "", unix.IFF_LOOPBACK)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		filter := linkFilter{}
		c := filter.changes(b)
		for _, d := range c.Devices {
			if !ValidPCIAddress(d) {
				t.Errorf("%q", d)
			}
		}
		if !c.empty() {
			return
		}
		// It hides no NIC that comes after it.
		msgs, err := syscall.ParseNetlinkMessage(b)
		if err != nil {
			t.Fatalf("a broken datagram is overlooked: %v", err)
		}
		size := 0
		for _, m := range msgs {
			size += (int(m.Header.Len) + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1)
		}
		if size == len(b) && filter.changes(append(b, linkMessage("", "", 0)...)).empty() {
			t.Fatal("a NIC after it is overlooked")
		}
	})
}

func FuzzAttribute(f *testing.F) {
	f.Add(linkMessage("veth", "", 0)[unix.SizeofNlMsghdr+unix.SizeofIfInfomsg:], uint16(unix.IFLA_LINKINFO))
	f.Add([]byte{5, 0, 1, 0, 9}, uint16(1)) // the last one may lack its padding
	f.Add([]byte{3, 0, 1, 0}, uint16(1))
	f.Fuzz(func(t *testing.T, b []byte, kind uint16) {
		got, ok := attribute(b, kind)
		if len(b)%unix.NLA_ALIGNTO != 0 {
			return // the library's parser panics when the last one lacks its padding
		}
		attrs, err := nl.ParseRouteAttr(b)
		if err != nil {
			return
		}
		i := slices.IndexFunc(attrs, func(a syscall.NetlinkRouteAttr) bool { return a.Attr.Type&nlaTypeMask == kind })
		if ok != (i >= 0) || ok && !bytes.Equal(got, attrs[i].Value) {
			t.Fatalf("% x, %t; want %d of %v", got, ok, i, attrs)
		}
	})
}

func FuzzDeviceChanges(f *testing.F) {
	f.Add([]byte("bind@/devices/pci0000:00/0000:01:00.0\x00ACTION=bind\x00SUBSYSTEM=pci\x00"))
	f.Add([]byte("add@/x\x00SUBSYSTEM=pci_bus"))
	f.Fuzz(func(t *testing.T, b []byte) {
		want := bytes.Contains(slices.Concat([]byte{0}, b, []byte{0}), []byte("\x00SUBSYSTEM=pci\x00"))
		c := deviceChanges(b)
		if c.empty() == want {
			t.Fatalf("%q: %t", b, !want)
		}
		for _, d := range c.Devices {
			if !ValidPCIAddress(d) {
				t.Errorf("%q", d)
			}
		}
	})
}
