package host

import (
	"errors"
	"fmt"
	"sync"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// DefaultSysfs is where sysfs is mounted.
const DefaultSysfs = "/sys"

// Host reads and changes the NICs of the machine it runs on. It is safe for
// concurrent use.
type Host struct {
	// SystemBus is the D-Bus socket at which systemd loads the modules of drivers that
	// are asked for and missing; without it none is loaded. Set it before use.
	SystemBus string

	sysfs string
	rt    *netlink.Handle // rtnetlink and devlink; never asks for VF lists
	vf    *rtnl           // for what the library does not know of VFs
	eth   *ethtool.Ethtool

	// The ioctl's buffer must not move while the kernel writes to it: it is a
	// part of Host, which is on the heap, not a variable on a stack.
	speedMu  sync.Mutex
	speedCmd ethtool.EthtoolCmd

	// What Inventory reads besides sysfs; unit tests on a tree of files replace them.
	links   func() ([]netlink.Link, error)
	link    lookup
	eswitch func(pciAddress string) (EswitchMode, error)
	speed   func(link string) int
}

// Open opens the machine's kernel interfaces. sysfs is the mount point of
// sysfs, usually DefaultSysfs. The sockets belong to the network namespace of
// the calling thread.
func Open(sysfs string) (*Host, error) {
	// Without it an errno comes without the driver's own words (extended ack).
	nl.EnableErrorMessageReporting = true
	h := &Host{sysfs: sysfs}
	var err error
	if h.rt, err = netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_GENERIC); err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	h.rt.DisableVFInfoCollection()
	if h.vf, err = openRtnl(func(f func() error) error { return f() }); err != nil {
		h.Close()
		return nil, err
	}
	if h.eth, err = ethtool.NewEthtool(); err != nil {
		h.Close()
		return nil, fmt.Errorf("open ethtool socket: %w", err)
	}
	h.links = h.dumpLinks
	h.link = h.linkNamed
	h.eswitch = h.readEswitch
	h.speed = h.readSpeed
	return h, nil
}

// Close gives the sockets back.
func (h *Host) Close() {
	if h.rt != nil {
		_ = h.rt.Close() // nothing was written that could be lost
	}
	if h.vf != nil {
		h.vf.close()
	}
	if h.eth != nil {
		h.eth.Close()
	}
}

// dumpLinks lists the netdevs of the namespace in one dump. A dump that raced
// with a change is repeated: half a list would look like links that went away.
func (h *Host) dumpLinks() ([]netlink.Link, error) {
	for try := 1; ; try++ {
		links, err := h.rt.LinkList()
		if err == nil || !errors.Is(err, netlink.ErrDumpInterrupted) || try == 5 {
			return links, err
		}
	}
}

// linkNamed asks for one netdev of the namespace.
func (h *Host) linkNamed(name string) (*netlink.LinkAttrs, error) {
	if name == "" {
		return nil, nil
	}
	l, err := h.rt.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil // renamed or moved since sysfs was read; its event follows
	}
	if err != nil {
		return nil, fmt.Errorf("ask for link %s: %w", name, err)
	}
	return l.Attrs(), nil
}

// readSpeed asks ethtool for the speed in Mb/s, 0 when the driver does not know it.
func (h *Host) readSpeed(link string) int {
	// SPEED_UNKNOWN in uapi/linux/ethtool.h
	const unknown, unknownOld = 0xffffffff, 0xffff
	h.speedMu.Lock()
	defer h.speedMu.Unlock()
	speed, err := h.eth.CmdGet(&h.speedCmd, link)
	if err != nil || speed == unknown || speed == unknownOld {
		return 0
	}
	return int(speed)
}
