package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/test/lab/guest/control"
)

// serve serves the control line, and the network once set up to. It returns
// when the line is closed for good.
func serve() error {
	line, err := openLine()
	if err != nil {
		return err
	}
	var linger bool
	server := &control.Server{SetUp: func(s control.Setup) error {
		linger = s.Linger
		return setUp(s)
	}}
	for {
		err := server.Serve(context.Background(), line)
		if linger {
			select {}
		}
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, unix.EIO) {
			return err
		}
		// The host end closed. A guest that was saved at this point and is
		// restored later finds a new end soon.
		if !line.reopen(5 * time.Second) {
			return nil
		}
	}
}

// line is the byte stream to the process that started the guest.
type line struct {
	*os.File
	port bool // a virtio port, which may get a new end
}

// openLine opens the serial line of User-Mode Linux or the virtio port of QEMU.
func openLine() (*line, error) {
	if f, err := os.OpenFile("/dev/vport0p1", os.O_RDWR, 0); err == nil {
		return &line{f, true}, nil
	}
	path, err := waitFor(5*time.Second, "/dev/ttyS0", "/dev/vport0p1", "/dev/vport1p1")
	if err != nil {
		return nil, fmt.Errorf("find the control line: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("open the control line: %w", err)
	}
	if !strings.Contains(path, "tty") {
		return &line{f, true}, nil
	}
	if err := raw(f); err != nil {
		return nil, fmt.Errorf("make %s raw: %w", path, err)
	}
	return &line{f, false}, nil
}

// raw makes a terminal pass every byte as it is.
func raw(f *os.File) error {
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return err
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = t.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	return unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
}

// reopen waits for a new end of the line.
func (l *line) reopen(limit time.Duration) bool {
	if !l.port {
		return false
	}
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		fds := []unix.PollFd{{Fd: int32(l.Fd()), Events: unix.POLLOUT}}
		if n, err := unix.Poll(fds, 0); err == nil && n == 1 && fds[0].Revents&unix.POLLHUP == 0 {
			return true
		}
	}
	return false
}

// setUp gives the machine its identity, its network and its cards.
func setUp(s control.Setup) error {
	if s.Time != 0 {
		now := time.Unix(0, s.Time)
		if d := time.Since(now); d > time.Second || d < -time.Second {
			tv := unix.NsecToTimeval(s.Time)
			if err := unix.Settimeofday(&tv); err != nil {
				return fmt.Errorf("set the clock to %s: %w", now, err)
			}
		}
	}
	if err := unix.Sethostname([]byte(s.Name)); err != nil {
		return fmt.Errorf("set the host name %s: %w", s.Name, err)
	}
	if err := os.WriteFile("/etc/hosts", []byte("127.0.0.1 localhost "+s.Name+"\n::1 localhost\n"), 0o644); err != nil {
		return err
	}
	for _, h := range s.Host {
		flags := uintptr(0)
		if h.ReadOnly {
			flags = unix.MS_RDONLY
		}
		if err := (mount{kind: "hostfs", from: "host", to: h.To, flags: flags, data: h.From}).do(); err != nil {
			return fmt.Errorf("show the host's %s: %w", h.From, err)
		}
	}
	if err := network(s); err != nil {
		return err
	}
	for _, m := range s.Cards {
		if err := load(m); err != nil {
			return err
		}
	}
	if err := nameCards(); err != nil {
		return err
	}
	for i := range s.Wires {
		if err := wire(i); err != nil {
			return err
		}
	}
	return listen(s.Listen)
}

// load loads a module of the initramfs if it is there, else one of the image.
func load(m control.Module) error {
	own := "/lib/sluice/" + m.Name + ".ko"
	if _, err := os.Stat(own); err == nil {
		return insmod(own, m.Params)
	}
	return modprobe(append([]string{m.Name}, m.Params...)...)
}

func network(s control.Setup) error {
	for path, value := range map[string]string{
		"/proc/sys/net/ipv4/ip_forward":                 "1",
		"/proc/sys/net/ipv6/conf/all/disable_ipv6":      "0",
		"/proc/sys/net/ipv4/conf/all/rp_filter":         "0",
		"/proc/sys/net/bridge/bridge-nf-call-iptables":  "0",
		"/proc/sys/net/bridge/bridge-nf-call-ip6tables": "0",
		"/proc/sys/net/bridge/bridge-nf-call-arptables": "0",
	} {
		// The bridge's switches are there only with its netfilter module.
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("set %s: %w", path, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	if s.Address == "" {
		return nil
	}
	mgmt, err := management()
	if err != nil {
		return err
	}
	if err := netlink.LinkSetName(mgmt, "mgmt"); err != nil {
		return fmt.Errorf("name %s mgmt: %w", mgmt.Attrs().Name, err)
	}
	address, err := netlink.ParseAddr(s.Address)
	if err != nil {
		return fmt.Errorf("parse the management address %q: %w", s.Address, err)
	}
	if err := netlink.AddrAdd(mgmt, address); err != nil {
		return fmt.Errorf("add %s to mgmt: %w", s.Address, err)
	}
	if err := netlink.LinkSetUp(mgmt); err != nil {
		return fmt.Errorf("set mgmt up: %w", err)
	}
	if s.Gateway != "" {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: mgmt.Attrs().Index, Gw: net.ParseIP(s.Gateway)}); err != nil {
			return fmt.Errorf("add the default route via %s: %w", s.Gateway, err)
		}
	}
	return nil
}

// management finds the interface of the management network: the first vector
// device in User-Mode Linux, the virtio card in QEMU.
func management() (netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		if name := l.Attrs().Name; name == "vec0" || driverOf(name) == "virtio_net" {
			return l, nil
		}
	}
	return nil, errors.New("find the management interface: neither vec0 nor a virtio card")
}

// nameCards gives the igb PFs of QEMU the names udev would give them; the
// emulated cards of User-Mode Linux have them from their driver.
func nameCards() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		name := l.Attrs().Name
		if driverOf(name) != "igb" {
			continue
		}
		var bus int
		if _, err := fmt.Sscanf(slotOf(name), "0000:%02x:00.0", &bus); err != nil {
			return fmt.Errorf("read the PCI address %q of %s: %w", slotOf(name), name, err)
		}
		if err := netlink.LinkSetName(l, fmt.Sprintf("ens%df0", bus)); err != nil {
			return fmt.Errorf("rename %s: %w", name, err)
		}
	}
	return nil
}

// wire joins the cable end of emulated card n to the vector device that leads
// to the other guests. The bridge learns nothing and filters nothing.
func wire(n int) error {
	bridge := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs(), AgeingTime: new(uint32)}
	bridge.Name = fmt.Sprintf("cable%d", n)
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("make bridge %s: %w", bridge.Name, err)
	}
	ends := []string{fmt.Sprintf("wire%d", n), fmt.Sprintf("vec%d", n+1)}
	for _, name := range append(ends, bridge.Name) {
		// A cable says nothing of its own.
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0o644); err != nil {
			return fmt.Errorf("prepare cable %d: %w", n, err)
		}
	}
	for _, name := range ends {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s, an end of cable %d: %w", name, n, err)
		}
		if err := netlink.LinkSetMaster(l, bridge); err != nil {
			return fmt.Errorf("put %s into %s: %w", name, bridge.Name, err)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("set %s up: %w", name, err)
		}
	}
	if err := netlink.LinkSetUp(bridge); err != nil {
		return fmt.Errorf("set %s up: %w", bridge.Name, err)
	}
	return nil
}

// listen serves any number of connections at a TCP address.
func listen(address string) error {
	if address == "" {
		return nil
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("listen for commands: %w", err)
	}
	server := &control.Server{SetUp: func(control.Setup) error { return errors.New("set up: only over the control line") }}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				fatal("accept", err)
				return
			}
			go func() {
				_ = server.Serve(context.Background(), c) // ends when the client goes
				_ = c.Close()
			}()
		}
	}()
	return nil
}
