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
	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/internal/host"
)

// The most that an ADD may take for what a minimal loop does by the kernel's
// operations alone, as a ratio.
const mostAttachRatio = 2.0

// floor does what an ADD of a VF needs of the kernel as a C program would that does
// nothing else: one request for each operation, sent and answered on a plain socket, which
// it has in the host's namespace and opens in the pod's. It finds the VF's and the PF's
// link, looks in the pod whether the name is free, as the CNI specification wants it,
// sets the VF, moves, names and raises the link, reads what the answer has to tell, and
// gives it an address with its routing. It is told the names and the number of the VF,
// and has no configuration, no owner, no journal and no undoing.
type floor struct {
	home   int // the host's namespace
	socket int // in it
	pf     string
	vf     uint32 // number of the VF
	name   string // of the VF's link
	mac    []byte
	answer []byte
}

// ask sends one request and returns the first message of the answer, without its header.
func (f *floor) ask(socket, kind, flags int, data ...nl.NetlinkRequestData) ([]byte, error) {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Data = data
	if err := unix.Sendto(socket, req.Serialize(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	n, err := unix.Read(socket, f.answer)
	if err != nil {
		return nil, err
	}
	body := f.answer[unix.SizeofNlMsghdr:n]
	if binary.NativeEndian.Uint16(f.answer[4:]) == unix.NLMSG_ERROR {
		if errno := -int32(binary.NativeEndian.Uint32(body)); errno != 0 {
			return nil, unix.Errno(errno)
		}
	}
	return body, nil
}

// link asks for a link by its name and returns its index.
func (f *floor) link(socket int, name string) (int, error) {
	body, err := f.ask(socket, unix.RTM_GETLINK, 0, nl.NewIfInfomsg(unix.AF_UNSPEC),
		nl.NewRtAttr(unix.IFLA_EXT_MASK, words(1<<3)), nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	if err != nil {
		return 0, err
	}
	return int(binary.NativeEndian.Uint32(body[4:])), nil
}

func words(values ...uint32) []byte {
	var b []byte
	for _, v := range values {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b
}

func (f *floor) add(pod, name string) error {
	runtime.LockOSThread() // it goes to the pod's namespace and back
	defer runtime.UnlockOSThread()
	pf, err := f.link(f.socket, f.pf)
	if err != nil {
		return err
	}
	link, err := f.link(f.socket, f.name)
	if err != nil {
		return err
	}
	ns, err := unix.Open(pod, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(ns)
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		return err
	}
	there, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err := errors.Join(err, unix.Setns(f.home, unix.CLONE_NEWNET)); err != nil {
		return err
	}
	defer unix.Close(there)
	if _, err := f.link(there, name); !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%s in the pod: %w", name, err)
	}
	set := func(socket, index int, flags uint32, attrs ...nl.NetlinkRequestData) {
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index, msg.Flags, msg.Change = int32(index), flags, flags
		_, failed := f.ask(socket, unix.RTM_SETLINK, unix.NLM_F_ACK, append([]nl.NetlinkRequestData{msg}, attrs...)...)
		err = errors.Join(err, failed)
	}
	err = nil
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
		set(f.socket, pf, 0, list)
	}
	set(f.socket, link, 0, nl.NewRtAttr(unix.IFLA_ADDRESS, f.mac))
	set(f.socket, link, 0, nl.NewRtAttr(unix.IFLA_NET_NS_FD, words(uint32(ns))))
	set(there, link, 0, nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	set(there, link, unix.IFF_UP)
	if err != nil {
		return err
	}
	index, err := f.link(there, name)
	if err != nil {
		return err
	}
	// An address, with the routing that lets answers leave where questions came in.
	create := func(kind int, data ...nl.NetlinkRequestData) {
		_, failed := f.ask(there, kind, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, data...)
		err = errors.Join(err, failed)
	}
	ones, _ := address.Mask.Size()
	ip, subnet, table := nl.NewRtAttr(unix.IFA_LOCAL, address.IP), address.IP.Mask(address.Mask), nl.NewRtAttr(unix.RTA_TABLE, words(7))
	own := nl.NewIfAddrmsg(unix.AF_INET)
	own.Index, own.Prefixlen = uint32(index), uint8(ones)
	create(unix.RTM_NEWADDR, own, ip)
	route := nl.NewRtMsg()
	route.Family, route.Dst_len, route.Scope, route.Table = unix.AF_INET, uint8(ones), unix.RT_SCOPE_LINK, 7
	create(unix.RTM_NEWROUTE, route, nl.NewRtAttr(unix.RTA_DST, subnet), nl.NewRtAttr(unix.RTA_OIF, words(uint32(index))), table)
	rule := nl.NewRtMsg()
	rule.Family, rule.Src_len, rule.Table = unix.AF_INET, 32, 7
	create(unix.RTM_NEWRULE, rule, nl.NewRtAttr(nl.FRA_SRC, address.IP), table)
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC|unix.NLA_F_NESTED, nil)
	conf := spec.AddRtAttr(unix.AF_INET|unix.NLA_F_NESTED, nil).AddRtAttr(1|unix.NLA_F_NESTED, nil) // IFLA_INET_CONF
	for number, value := range map[int]uint32{19: 1, 18: 2, 8: 2} {                                 // arp_ignore, arp_announce, rp_filter
		conf.AddRtAttr(number, words(value))
	}
	set(there, index, 0, spec)
	return err
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
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(home)
	socket, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(socket)
	path := newPod(b, b.TempDir(), "pod")
	ns, err := host.OpenNetns(path)
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	mac := []byte{2, 0, 0, 0, 0x0c, 1}
	f := &floor{home: home, socket: socket, answer: make([]byte, 64<<10), name: ref.Name, pf: ref.PFName, vf: uint32(ref.Index), mac: mac}
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
