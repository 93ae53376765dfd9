package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/test/lab/guest"
)

// dataMTU lets jumbo frames of the nodes' cards cross the bridges.
const dataMTU = 9216

// AddNetwork makes the network namespace name with the bridges, and taps and
// routes for nodes 1 to n.
func AddNetwork(name string, nodes int) error {
	if err := addNamespace(name); err != nil {
		return fmt.Errorf("make network namespace %s: %w", name, err)
	}
	err := guest.InNetns(name, func() error {
		if err := setUp("lo"); err != nil {
			return err
		}
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
			return fmt.Errorf("forward between nodes: %w", err)
		}
		for _, bridge := range []string{"brm", "brd0", "brd1"} {
			if err := addBridge(bridge); err != nil {
				return err
			}
		}
		brm, err := netlink.LinkByName("brm")
		if err != nil {
			return fmt.Errorf("find brm: %w", err)
		}
		if err := netlink.AddrAdd(brm, &netlink.Addr{IPNet: &net.IPNet{IP: Gateway.AsSlice(), Mask: net.CIDRMask(24, 32)}}); err != nil {
			return fmt.Errorf("give brm the address %s: %w", Gateway, err)
		}
		for n := 1; n <= nodes; n++ {
			if err := addNode(n); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("set up network namespace %s: %w", name, err)
	}
	return nil
}

// RemoveNetwork removes the namespace and all that is in it, once the last
// process there has ended. A namespace that is not there is no error.
func RemoveNetwork(name string) error {
	path := filepath.Join(netnsDir, name)
	for {
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) { // no file, no more mount
			break
		}
		if err != nil {
			return fmt.Errorf("unmount network namespace %s: %w", path, err)
		}
	}
	// The file is busy when someone has since mounted over the directory, and
	// with it over a mount that cannot be reached any more. It is empty then,
	// and addNamespace takes it as it is.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("remove network namespace %s: %w", path, err)
	}
	return nil
}

// netnsDir is where ip-netns(8) looks for namespaces.
const netnsDir = "/run/netns"

// addNamespace makes a named network namespace as ip-netns(8) does, so that
// the two may be used side by side.
func addNamespace(name string) error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	// A shared mount of its own, or the first "ip netns add" makes it one and
	// hides the namespaces that are there.
	err := unix.Mount("", netnsDir, "", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) {
		if err = unix.Mount(netnsDir, netnsDir, "", unix.MS_BIND|unix.MS_REC, ""); err == nil {
			err = unix.Mount("", netnsDir, "", unix.MS_SHARED|unix.MS_REC, "")
		}
	}
	if err != nil {
		return fmt.Errorf("make %s a shared mount: %w", netnsDir, err)
	}
	path := filepath.Join(netnsDir, name)
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		return err
	}
	return guest.InNetns("", func() error { // on a thread of its own
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare (are you root?): %w", err)
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
}

func addBridge(name string) error {
	snooping := false
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
		return fmt.Errorf("add bridge %s: %w", name, err)
	}
	// The bridge itself is no neighbour of the guests on IPv6.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("disable IPv6 on %s: %w", name, err)
	}
	return setUp(name)
}

func addNode(n int) error {
	taps := NodeTaps(n)
	for _, t := range []struct {
		tap, bridge string
		mtu         int
	}{{taps.Mgmt, "brm", 1500}, {taps.Data[0], "brd0", dataMTU}, {taps.Data[1], "brd1", dataMTU}} {
		if err := addTap(t.tap, t.bridge, t.mtu); err != nil {
			return err
		}
	}
	pods := nodePods(n)
	route := &netlink.Route{
		Dst: &net.IPNet{IP: pods.Addr().AsSlice(), Mask: net.CIDRMask(pods.Bits(), 32)},
		Gw:  NodeAddress(n).Addr().AsSlice(),
	}
	if err := netlink.RouteAdd(route); err != nil {
		return fmt.Errorf("add route to %s by %s: %w", pods, route.Gw, err)
	}
	return nil
}

func addTap(name, bridge string, mtu int) error {
	master, err := netlink.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", bridge, err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	// Without packet information, and of one queue, as both kinds of guest open it.
	tap := &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE}
	if err = netlink.LinkAdd(tap); err != nil {
		return fmt.Errorf("add tap %s (is there /dev/net/tun?): %w", name, err)
	}
	for _, fd := range tap.Fds {
		_ = fd.Close() // the tap is persistent; its descriptor is the guest's
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find tap %s: %w", name, err)
	}
	if err := netlink.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("set MTU %d on %s: %w", mtu, name, err)
	}
	if err := netlink.LinkSetMaster(link, master); err != nil {
		return fmt.Errorf("plug %s into %s: %w", name, bridge, err)
	}
	return setUp(name)
}

func setUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}
