//go:build lab

package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/go-logr/logr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/internal/host"
)

// The most that an ADD may take for what a minimal loop does by the kernel's
// operations alone, as a ratio.
const mostAttachRatio = 2.0

// floor does what an ADD of a VF needs of the kernel, one request for each operation: it
// reads the VF's link, looks in the pod whether the name is free, as the CNI
// specification wants it, sets the VF, moves, names and raises the link, reads what the
// answer has to tell, and gives it an address. It is told the VF's names and number, and
// has no configuration, no owner, no journal and no undoing.
type floor struct {
	socket *nl.NetlinkSocket
	links  *netlink.Handle // in the host's namespace
	kernel *host.Attacher
	pf     string // link of the PF
	vf     uint32 // number of the VF
	name   string // of the VF's link
	mac    []byte
}

func (f *floor) request(kind, index int, flags uint32, attrs ...*nl.RtAttr) error {
	req := nl.NewNetlinkRequest(kind, unix.NLM_F_ACK)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: f.socket}}
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags, msg.Change = int32(index), flags, flags
	req.AddData(msg)
	for _, a := range attrs {
		req.AddData(a)
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func (f *floor) add(pod, name string) error {
	pf, err := f.links.LinkByName(f.pf)
	if err != nil {
		return err
	}
	dev, err := f.links.LinkByName(f.name)
	if err != nil {
		return err
	}
	link := dev.Attrs().Index
	ns, err := netns.GetFromPath(pod)
	if err != nil {
		return err
	}
	defer ns.Close()
	inPod, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer inPod.Close()
	others, err := inPod.LinkList()
	if err != nil {
		return err
	}
	for _, o := range others {
		if o.Attrs().Name == name {
			return unix.EEXIST
		}
	}
	words := func(values ...uint32) []byte {
		var b []byte
		for _, v := range values {
			b = binary.NativeEndian.AppendUint32(b, v)
		}
		return b
	}
	for kind, value := range map[int][]byte{
		nl.IFLA_VF_MAC:        append(append(words(f.vf), f.mac...), make([]byte, 26)...),
		nl.IFLA_VF_VLAN:       words(f.vf, 9, 0),
		nl.IFLA_VF_RATE:       words(f.vf, 0, 0),
		nl.IFLA_VF_SPOOFCHK:   words(f.vf, 1),
		nl.IFLA_VF_LINK_STATE: words(f.vf, 0),
		nl.IFLA_VF_TRUST:      words(f.vf, 1),
	} {
		list := nl.NewRtAttr(unix.IFLA_VFINFO_LIST|unix.NLA_F_NESTED, nil)
		list.AddRtAttr(nl.IFLA_VF_INFO|unix.NLA_F_NESTED, nil).AddRtAttr(kind, value)
		if err := f.request(unix.RTM_SETLINK, pf.Attrs().Index, 0, list); err != nil {
			return fmt.Errorf("VF attribute %d: %w", kind, err)
		}
	}
	if err := errors.Join(
		f.request(unix.RTM_SETLINK, link, 0, nl.NewRtAttr(unix.IFLA_ADDRESS, f.mac)),
		f.request(unix.RTM_SETLINK, link, 0, nl.NewRtAttr(unix.IFLA_NET_NS_FD, words(uint32(ns)))),
		inPod.LinkSetName(dev, name),
		inPod.LinkSetUp(dev),
	); err != nil {
		return err
	}
	dev, err = inPod.LinkByName(name)
	if err != nil {
		return err
	}
	// An address, with the routing that lets answers leave where questions came in.
	index, table := dev.Attrs().Index, 7
	subnet := &net.IPNet{IP: address.IP.Mask(address.Mask), Mask: address.Mask}
	rule := netlink.NewRule()
	rule.Src, rule.Table = &net.IPNet{IP: address.IP, Mask: net.CIDRMask(32, 32)}, table
	if err := errors.Join(
		inPod.AddrAdd(dev, &netlink.Addr{IPNet: &address}),
		inPod.RouteAdd(&netlink.Route{LinkIndex: index, Dst: subnet, Table: table, Scope: netlink.SCOPE_LINK}),
		inPod.RuleAdd(rule),
	); err != nil {
		return err
	}
	there, err := host.OpenNetns(pod)
	if err != nil {
		return err
	}
	defer there.Close()
	return f.kernel.KeepToOwnAddresses(there, index)
}

// silent announces nothing: there is no carrier here, and waiting for one would be all
// there is to see.
type silent struct{ *host.Attacher }

func (silent) Announce(context.Context, *host.Netns, string, []net.IPNet) error { return nil }

var address = net.IPNet{IP: net.IPv4(10, 20, 0, 5).To4(), Mask: net.CIDRMask(16, 32)}

// leases is IPAM without a process: the ratio is not to be that of a foreign plugin.
type leases struct{}

func (leases) Find(string, attach.Request) error { return nil }

func (leases) Exec(_ context.Context, _ string, req attach.Request) (*types100.Result, error) {
	if req.Command != attach.Add {
		return nil, nil
	}
	return &types100.Result{IPs: []*types100.IPConfig{{Address: address}}}, nil
}

// BenchmarkLabAttach takes turns: ADD by the agent's code, journal and all, and the
// kernel's operations alone. DEL brings the VF home in between, untimed.
func BenchmarkLabAttach(b *testing.B) {
	l := newLab(b)
	ref, err := l.kernel.VF(l.vfs[0])
	if err != nil {
		b.Fatal(err)
	}
	stable, mtu, _ := l.Baseline(l.vfs[0])
	a, err := attach.New(attach.Options{Kernel: silent{l.kernel}, Baselines: known{stable, mtu}, IPAM: leases{}, Dir: b.TempDir(), Log: logr.Discard()})
	if err != nil {
		b.Fatal(err)
	}
	socket, err := nl.GetNetlinkSocketAt(-1, -1, unix.NETLINK_ROUTE)
	if err != nil {
		b.Fatal(err)
	}
	defer socket.Close()
	path := newPod(b, b.TempDir(), "pod")
	ns, err := host.OpenNetns(path)
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		b.Fatal(err)
	}
	defer links.Close()
	links.DisableVFInfoCollection()
	mac := []byte{2, 0, 0, 0, 0x0c, 1}
	f := &floor{socket: socket, links: links, kernel: l.kernel, name: ref.Name, pf: ref.PFName, vf: uint32(ref.Index), mac: mac}
	req := attach.Request{Command: attach.Add, ContainerID: "c", IfName: "net1", Netns: path, Stdin: conf(l.vfs[0], `,"vlan":9,"mac":"02:00:00:00:0c:01","trust":"on","ipam":{"type":"leases"}`)}
	var agent, bare []time.Duration
	for b.Loop() {
		for range 20 {
			runtime.GC()
			began := time.Now()
			fresh, err := host.OpenNetns(path)
			if err != nil {
				b.Fatal(err)
			}
			if _, err = a.Add(b.Context(), req, fresh); err != nil {
				b.Fatal(err)
			}
			fresh.Close()
			agent = append(agent, time.Since(began))
			made := l.state(b, l.vfs[0])
			in, err := l.inPod(b, path, "net1")
			if err != nil {
				b.Fatal(err)
			}
			// Home by hand, the record kept: DEL then sees to the floor's VF as well.
			if err := l.kernel.ChangeLink(b.Context(), ns, in.Index, host.LinkChange{To: l.kernel.HostNetns(), Name: ref.Name, State: host.SetDown}); err != nil {
				b.Fatal(err)
			}
			if err := l.kernel.SetVFSettings(b.Context(), ref, attach.Baseline{MAC: stable.String()}.Settings(), 0); err != nil {
				b.Fatal(err)
			}
			runtime.GC()
			began = time.Now()
			if err := f.add(path, "net1"); err != nil {
				b.Fatal(err)
			}
			bare = append(bare, time.Since(began))
			if now, err := l.inPod(b, path, "net1"); err != nil || !now.Up || !bytes.Equal(now.MAC, mac) || l.state(b, l.vfs[0]) != made {
				b.Errorf("the floor made %+v, %s, not %s, %v", now, l.state(b, l.vfs[0]), made, err)
			}
			if err := inside(path, func(h *netlink.Handle) error {
				rule := netlink.NewRule()
				rule.Table = 7
				return h.RuleDel(rule)
			}); err != nil {
				b.Fatal(err)
			}
			if err := a.Del(b.Context(), req, ns); err != nil {
				b.Fatal(err)
			}
		}
	}
	add, low := lowest(agent), lowest(bare)
	ratio := add.Seconds() / low.Seconds()
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(add.Microseconds())/1e3, "agent-ms")
	b.ReportMetric(float64(low.Microseconds())/1e3, "floor-ms")
	b.ReportMetric(ratio, "ratio")
	if ratio > mostAttachRatio {
		b.Errorf("ADD takes %.2f of the time of the kernel's operations alone, more than %.1f", ratio, mostAttachRatio)
	}
}

// known are baselines as the node's configuration has them in memory.
type known struct {
	mac net.HardwareAddr
	mtu int
}

func (k known) Baseline(string) (net.HardwareAddr, int, bool) { return k.mac, k.mtu, true }

// lowest is the first decile: other work of the machine makes times longer, never shorter.
func lowest(times []time.Duration) time.Duration {
	return slices.Sorted(slices.Values(times))[len(times)/10]
}
