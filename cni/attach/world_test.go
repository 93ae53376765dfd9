package attach

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/go-logr/logr"
	"github.com/go-logr/logr/testr"

	"github.com/sluice-network/sluice/internal/host"
)

// world is a node in memory: VFs, network namespaces, an IPAM plugin. It can
// fail any one call.
type world struct {
	mu       sync.Mutex
	vfs      map[string]*host.VFRef
	settings map[string]host.VFSettings
	links    map[host.NetnsID][]host.Netdev
	addrs    map[int][]net.IPNet
	routes   map[int][]host.Route
	netns    map[string]host.NetnsID // by path, the living
	leases   map[string]bool
	rules    map[host.NetnsID][]string
	kept     map[int]bool // links that keep to their own addresses
	neighs   map[int][]string
	stations map[string]string       // MAC by address, of other stations
	rdma     map[string]host.NetnsID // where the RDMA device of a VF is
	shared   bool                    // all namespaces see all RDMA devices
	policed  map[Key]policed
	loaded   []Interface // by an Enforcer, from before
	left     []Key
	index    int
	blind    bool // namespaces cannot be opened

	calls  []string
	failAt int    // index into calls, -1 for none
	failOn string // a call
	errno  error
}

var hostNS = host.NetnsID{Dev: 4, Inode: 1}

const (
	vf0, vf1 = "0000:01:10.0", "0000:01:10.1"
	mac0     = "02:00:00:00:00:10"
	pod1     = "/tmp/pod1"
	pod2     = "/tmp/pod2"
)

func newWorld() *world {
	w := &world{
		vfs: map[string]*host.VFRef{}, settings: map[string]host.VFSettings{}, links: map[host.NetnsID][]host.Netdev{},
		addrs: map[int][]net.IPNet{}, routes: map[int][]host.Route{},
		netns:  map[string]host.NetnsID{pod1: {Dev: 4, Inode: 11}, pod2: {Dev: 4, Inode: 12}},
		leases: map[string]bool{}, rules: map[host.NetnsID][]string{}, policed: map[Key]policed{}, kept: map[int]bool{}, neighs: map[int][]string{}, index: 100, failAt: -1, errno: syscall.EIO,
	}
	for i, pci := range []string{vf0, vf1} {
		mac := net.HardwareAddr{2, 0, 0, 0, 0, byte(0x10 + i)}
		name := fmt.Sprintf("ens1f0v%d", i)
		w.vfs[pci] = &host.VFRef{PCIAddress: pci, PF: "0000:01:00.0", PFName: "ens1f0", Index: i, Driver: "iavf", Representor: fmt.Sprintf("ens1f0npf0vf%d", i)}
		w.settings[pci] = host.VFSettings{MAC: mac, VLANProto: host.Dot1Q, SpoofChk: true}
		w.links[hostNS] = append(w.links[hostNS], host.Netdev{Index: 10 + i, Name: name, AltNames: []string{"enp1s0f0v" + fmt.Sprint(i)}, MAC: mac, MTU: 1500, PCIAddress: pci})
	}
	w.rdma = map[string]host.NetnsID{vf0: hostNS, vf1: hostNS}
	w.links[hostNS] = append(w.links[hostNS], host.Netdev{Index: 5, Name: "ens1f0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 5}, MTU: 9000, Up: true})
	for i := range 2 {
		w.links[hostNS] = append(w.links[hostNS], host.Netdev{Index: 20 + i, Name: fmt.Sprintf("ens1f0npf0vf%d", i), MTU: 1500})
	}
	return w
}

// The world is not made for several at once, and a history drawn again has to be the same.
func init() { sideBySide = 1 }

// call counts a call and fails it when it is its turn.
func (w *world) call(format string, args ...any) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls = append(w.calls, fmt.Sprintf(format, args...))
	if len(w.calls)-1 == w.failAt || w.failOn != "" && w.calls[len(w.calls)-1] == w.failOn {
		return w.errno
	}
	return nil
}

func byInode(a, b host.NetnsID) int { return int(a.Inode) - int(b.Inode) }

// state is everything a pod can leave behind.
func (w *world) state() string {
	var b strings.Builder
	for _, ns := range slices.SortedFunc(maps.Keys(w.links), byInode) {
		for _, l := range slices.SortedFunc(slices.Values(w.links[ns]), func(a, b host.Netdev) int { return a.Index - b.Index }) {
			fmt.Fprintf(&b, "ns %d link %+v addrs %v routes %v %v\n", ns.Inode, l, w.addrs[l.Index], w.routes[l.Index], w.neighs[l.Index])
		}
	}
	for _, pci := range slices.Sorted(maps.Keys(w.settings)) {
		fmt.Fprintf(&b, "vf %s %+v RDMA in %v\n", pci, w.settings[pci], w.rdma[pci])
	}
	for _, ns := range slices.SortedFunc(maps.Keys(w.rules), byInode) {
		if rules := w.rules[ns]; len(rules) > 0 {
			fmt.Fprintf(&b, "ns %d rules %q\n", ns.Inode, rules)
		}
	}
	fmt.Fprintf(&b, "leases %v\npolicy %v\n", w.leases, w.policed)
	return b.String()
}

func nsID(ns *host.Netns) host.NetnsID {
	if ns == nil {
		return hostNS
	}
	return ns.ID
}

func (w *world) find(ns *host.Netns, is func(host.Netdev) bool) (int, error) {
	i := slices.IndexFunc(w.links[nsID(ns)], is)
	if i < 0 {
		return 0, syscall.ENODEV
	}
	return i, nil
}

func (w *world) VF(pci string) (host.VFRef, error) {
	if err := w.call("find VF"); err != nil {
		return host.VFRef{}, err
	}
	vf, ok := w.vfs[pci]
	if !ok {
		return host.VFRef{}, fmt.Errorf("%w: there is no PCI device %s on this node", host.ErrNoVF, pci)
	}
	ref := *vf
	if i, err := w.find(nil, func(l host.Netdev) bool { return l.PCIAddress == pci }); err == nil {
		ref.Name = w.links[hostNS][i].Name
	}
	return ref, nil
}

func (w *world) VFSettings(vf host.VFRef) (host.VFSettings, error) {
	return w.settings[vf.PCIAddress], w.call("read VF settings")
}

func (w *world) SetVFSettings(_ context.Context, vf host.VFRef, want host.VFSettings, _ host.VFAttrs) error {
	if len(want.MAC) == 0 {
		want.MAC = w.settings[vf.PCIAddress].MAC
	}
	// A failing driver has set the first half.
	half := w.settings[vf.PCIAddress]
	half.MAC, half.VLAN = want.MAC, want.VLAN
	w.settings[vf.PCIAddress] = half
	if err := w.call("set VF %s vlan %d", vf.PCIAddress, want.VLAN); err != nil {
		return err
	}
	w.settings[vf.PCIAddress] = want
	return nil
}

func (w *world) HostNetns() *host.Netns { return &host.Netns{ID: hostNS} }

func (w *world) OpenNetns(path string) (*host.Netns, error) {
	id, ok := w.netns[path]
	if w.blind {
		return nil, fmt.Errorf("open %s: %w", path, syscall.EMFILE)
	}
	if !ok {
		return nil, fmt.Errorf("open %s: %w", path, fs.ErrNotExist)
	}
	return &host.Netns{ID: id}, nil
}

func (w *world) Links(ns *host.Netns) ([]host.Netdev, error) {
	return slices.Clone(w.links[nsID(ns)]), w.call("list links of %d", nsID(ns).Inode)
}

func (w *world) Link(ns *host.Netns, name string) (host.Netdev, error) {
	if err := w.call("read link %s", name); err != nil {
		return host.Netdev{}, err
	}
	i, err := w.find(ns, func(l host.Netdev) bool { return l.Name == name })
	if err != nil {
		return host.Netdev{}, err
	}
	return w.links[nsID(ns)][i], nil
}

func (w *world) ChangeLink(_ context.Context, from *host.Netns, index int, c host.LinkChange) error {
	i, err := w.find(from, func(l host.Netdev) bool { return l.Index == index })
	if err != nil {
		return err
	}
	id := nsID(from)
	l := w.links[id][i]
	taken := func(in host.NetnsID, name string) bool {
		return slices.ContainsFunc(w.links[in], func(o host.Netdev) bool {
			return o.Index != l.Index && (o.Name == name || slices.Contains(o.AltNames, name))
		}) ||
			slices.Contains(l.AltNames, name)
	}
	if c.To != nil {
		if slices.ContainsFunc(l.AltNames, func(n string) bool { return taken(c.To.ID, n) && !slices.Contains(l.AltNames, n) }) {
			return syscall.EEXIST
		}
		// A name that is taken there is replaced by the new one before the move
		// (__dev_change_net_namespace in net/core/dev.c).
		name := l.Name
		if taken(c.To.ID, name) {
			if name = c.Name; name == "" || taken(c.To.ID, name) {
				return syscall.EEXIST
			}
		}
		w.links[id] = slices.Delete(slices.Clone(w.links[id]), i, i+1)
		id, l.Up, l.Name = c.To.ID, false, name
		delete(w.addrs, l.Index)
		delete(w.routes, l.Index)
	} else {
		w.links[id] = slices.Delete(slices.Clone(w.links[id]), i, i+1)
	}
	// The kernel moves first; a failure leaves the link in the new namespace
	// under the old name.
	err = w.call("change link %s to %s", l.Name, c.Name)
	switch {
	case err != nil:
	case c.Name != "" && c.Name != l.Name && taken(id, c.Name):
		err = syscall.EEXIST
	default:
		if c.Name != "" {
			l.Name = c.Name
		}
		if c.MAC != nil {
			l.MAC = c.MAC
		}
		if c.MTU != 0 {
			l.MTU = c.MTU
		}
		if c.State != host.KeepState {
			l.Up = c.State == host.SetUp
		}
		if c.Promisc != nil {
			l.Promisc = *c.Promisc
		}
		if c.AllMulti != nil {
			l.AllMulti = *c.AllMulti
		}
	}
	w.links[id] = append(slices.Clone(w.links[id]), l)
	return err
}

func (w *world) AdoptMAC(_ context.Context, l host.Netdev, mac net.HardwareAddr) error {
	if bytes.Equal(l.MAC, mac) {
		return nil
	}
	if err := w.call("adopt MAC %s", mac); err != nil {
		return err
	}
	i, err := w.find(nil, func(o host.Netdev) bool { return o.Index == l.Index })
	if err == nil {
		w.links[hostNS][i].MAC = mac
	}
	return err
}

func (w *world) DeleteAltName(ns *host.Netns, index int, name string) error {
	i, err := w.find(ns, func(l host.Netdev) bool { return l.Index == index })
	if err != nil {
		return err
	}
	if err := w.call("delete altname %s", name); err != nil {
		return err
	}
	l := &w.links[nsID(ns)][i]
	l.AltNames = slices.DeleteFunc(slices.Clone(l.AltNames), func(n string) bool { return n == name })
	return nil
}

func (w *world) PrepareIPv6(*host.Netns, string) error { return w.call("prepare IPv6") }

func (w *world) AddAddress(_ *host.Netns, index int, a net.IPNet, _ bool) error {
	if err := w.call("add address %s", a.String()); err != nil {
		return err
	}
	w.addrs[index] = append(w.addrs[index], a)
	return nil
}

func (w *world) WaitIPv6(context.Context, *host.Netns, int) error { return w.call("wait for DAD") }

func (w *world) Addresses(_ *host.Netns, index int) ([]net.IPNet, error) {
	return w.addrs[index], w.call("list addresses")
}

func (w *world) AddRoute(_ *host.Netns, index int, r host.Route) error {
	if err := w.call("add route %s", r.Dst.String()); err != nil {
		return err
	}
	for other := range w.routes {
		if other != index && w.sameNetns(other, index) && w.hasRoute(other, r) {
			return syscall.EEXIST
		}
	}
	w.routes[index] = append(w.routes[index], r)
	return nil
}

func (w *world) sameNetns(a, b int) bool {
	for _, links := range w.links {
		if has := func(i int) bool { return slices.ContainsFunc(links, func(l host.Netdev) bool { return l.Index == i }) }; has(a) && has(b) {
			return true
		}
	}
	return false
}

func (w *world) HasRoute(_ *host.Netns, index int, r host.Route) (bool, error) {
	has := w.hasRoute(index, r)
	for other := range w.routes {
		has = has || index == 0 && w.hasRoute(other, r)
	}
	return has, w.call("list routes")
}

func (w *world) hasRoute(index int, r host.Route) bool {
	return slices.ContainsFunc(w.routes[index], func(h host.Route) bool { return h.Dst.String() == r.Dst.String() && h.Table == r.Table })
}

func (w *world) add(ns *host.Netns, l host.Netdev) error {
	if slices.ContainsFunc(w.links[nsID(ns)], func(o host.Netdev) bool { return o.Has(l.Name) }) {
		return syscall.EEXIST
	}
	w.index++
	l.Index, l.Up = w.index, true
	w.links[nsID(ns)] = append(slices.Clone(w.links[nsID(ns)]), l)
	return nil
}

func (w *world) AddMacvlan(_ context.Context, ns *host.Netns, parent host.Netdev, _ bool, m host.Macvlan) error {
	if err := w.call("add macvlan"); err != nil {
		return err
	}
	mac := m.MAC
	if m.Mode == host.MacvlanPassthru {
		mac = parent.MAC
	}
	return w.add(ns, host.Netdev{Name: m.Name, MAC: mac, MTU: m.MTU, Group: m.Group, Kind: "macvlan", Mode: m.Mode})
}

func (w *world) AddVeth(_ context.Context, name string, ns *host.Netns, peer string, mtu int) error {
	if err := w.call("add veth"); err != nil {
		return err
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 1, byte(w.index)}
	return errors.Join(w.add(nil, host.Netdev{Name: name, MAC: mac, MTU: mtu, Kind: "veth"}), w.add(ns, host.Netdev{Name: peer, MAC: mac, MTU: mtu, Kind: "veth"}))
}

func (w *world) DeleteLink(ns *host.Netns, index int) error {
	if err := w.call("delete link"); err != nil {
		return err
	}
	at := func(id host.NetnsID) int {
		return slices.IndexFunc(w.links[id], func(l host.Netdev) bool { return l.Index == index })
	}
	i := at(nsID(ns))
	if i < 0 {
		return nil
	}
	l := w.links[nsID(ns)][i]
	for id := range w.links {
		w.links[id] = slices.DeleteFunc(slices.Clone(w.links[id]), func(o host.Netdev) bool {
			return o.Index == index || l.Kind == "veth" && o.Kind == "veth" && bytes.Equal(o.MAC, l.MAC)
		})
		if len(w.links[id]) == 0 {
			delete(w.links, id)
		}
	}
	return nil
}

func (w *world) RefuseAdvertisedDefault(*host.Netns, string) error { return nil }

func (w *world) DefaultLink(*host.Netns) (string, error) {
	return "ens1f0", w.call("find default link")
}

func (w *world) HasDefaultRoute(ns *host.Netns, index int, v6 bool) (bool, error) {
	for _, l := range w.links[nsID(ns)] {
		if l.Index != index && slices.ContainsFunc(w.routes[l.Index], func(r host.Route) bool {
			ones, _ := r.Dst.Mask.Size()
			return ones == 0 && r.Table == 0 && (r.Dst.IP.To4() == nil) == v6
		}) {
			return true, w.call("find default route")
		}
	}
	return false, w.call("find default route")
}

func (w *world) AddSourceRule(ns *host.Netns, ip net.IP, table int) error {
	if err := w.call("add rule from %s", ip); err != nil {
		return err
	}
	w.rules[ns.ID] = append(w.rules[ns.ID], fmt.Sprintf("%s %d", ip, table))
	return nil
}

func (w *world) HasSourceRule(ns *host.Netns, ip net.IP, table int) (bool, error) {
	return slices.Contains(w.rules[ns.ID], fmt.Sprintf("%s %d", ip, table)), w.call("list rules")
}

func (w *world) DeleteSourceRules(ns *host.Netns, table int) error {
	if err := w.call("delete rules"); err != nil {
		return err
	}
	w.rules[ns.ID] = slices.DeleteFunc(w.rules[ns.ID], func(r string) bool { return strings.HasSuffix(r, fmt.Sprintf(" %d", table)) })
	return nil
}

func (w *world) KeepToOwnAddresses(_ *host.Netns, index int) error {
	w.kept[index] = true
	return w.call("set arp_ignore")
}

func (w *world) KeepsToOwnAddresses(_ *host.Netns, index int) (bool, error) {
	return w.kept[index], w.call("read arp_ignore")
}

func (w *world) AddNeighbour(_ *host.Netns, index int, ip net.IP, mac net.HardwareAddr) error {
	w.neighs[index] = append(w.neighs[index], fmt.Sprint(ip, mac))
	return w.call("add neighbour %s", ip)
}

func (w *world) Source(v6 bool) (net.IP, error) {
	if v6 {
		return nil, w.call("find source")
	}
	return net.IPv4(192, 168, 0, 1), w.call("find source")
}

func (w *world) Probe(_ context.Context, _ *host.Netns, _ string, addresses []net.IPNet, _ time.Duration) (bool, error) {
	for _, a := range addresses {
		if mac, ok := w.stations[a.IP.String()]; ok {
			return false, &host.AddressConflictError{IP: a.IP, MAC: must(net.ParseMAC(mac))}
		}
	}
	return true, w.call("probe")
}

func (w *world) Announce(context.Context, *host.Netns, string, []net.IPNet) error { return nil }

// Find finds every plugin but one.
func (w *world) Find(plugin string, _ Request) error {
	if plugin == "nosuch" {
		return fail(CodeIPAM, "find IPAM plugin: nosuch")
	}
	return nil
}

// Exec is the world's IPAM plugin.
func (w *world) Exec(_ context.Context, plugin string, req Request) (*types100.Result, error) {
	lease := req.ContainerID + "/" + req.IfName
	if req.Command == Add {
		w.leases[lease] = true // also when the answer is lost
	}
	if err := w.call("IPAM %s", req.Command); err != nil {
		return nil, fail(CodeIPAM, "%s of IPAM plugin %s: %w", req.Command, plugin, err)
	}
	if req.Command == Del {
		delete(w.leases, lease)
	}
	if req.Command != Add {
		return nil, nil
	}
	return types100.NewResultFromResult(must(types100.NewResult([]byte(`{"cniVersion":"1.1.0",
		"ips":[{"address":"10.1.0.5/24","gateway":"10.1.0.1"},{"address":"fd00::5/64","gateway":"fd00::1"}],
		"routes":[{"dst":"10.9.0.0/16"},{"dst":"fd09::/64"}]}`))))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Baseline knows vf0 and not vf1.
func (w *world) Baseline(pci string) (net.HardwareAddr, int, bool) {
	if pci == vf0 {
		return must(net.ParseMAC(mac0)), 1500, true
	}
	return nil, 0, false
}

// end makes the kernel end a namespace: its links come home, under another name
// where theirs is taken (default_device_exit_net in net/core/dev.c).
func (w *world) end(path string) {
	id := w.netns[path]
	delete(w.netns, path)
	for _, l := range w.links[id] {
		if l.Kind != "" {
			// A virtual link ends with its namespace.
			_ = w.DeleteLink(&host.Netns{ID: id}, l.Index)
			continue
		}
		l.Up = false
		for i := 0; slices.ContainsFunc(w.links[hostNS], func(o host.Netdev) bool {
			return o.Name == l.Name || slices.Contains(o.AltNames, l.Name)
		}); i++ {
			l.Name = fmt.Sprintf("dev%d", i)
		}
		delete(w.addrs, l.Index)
		delete(w.routes, l.Index)
		w.links[hostNS] = append(w.links[hostNS], l)
	}
	delete(w.links, id)
	delete(w.rules, id)
	for vf, in := range w.rdma {
		if in == id {
			w.rdma[vf] = hostNS
		}
	}
}

func rdmaName(vf string) string { return "rdma" + vf[len(vf)-1:] }

func (w *world) RDMADevice(vf string) (string, error) {
	if w.rdma[vf] == hostNS || w.shared {
		return rdmaName(vf), w.call("find RDMA device")
	}
	return "", w.call("find RDMA device")
}

func (w *world) RDMAExclusive() (bool, error) { return !w.shared, w.call("ask for RDMA mode") }

func (w *world) MoveRDMA(from *host.Netns, name string, to *host.Netns) error {
	if err := w.call("move RDMA device %s", name); err != nil {
		return err
	}
	for vf, in := range w.rdma {
		if rdmaName(vf) == name && in == nsID(from) && !w.shared {
			w.rdma[vf] = nsID(to)
			return nil
		}
	}
	return syscall.ENODEV
}

func newAttacher(t *testing.T, w *world, dir string, onStep func(string)) *Attacher {
	t.Helper()
	log := logr.Discard()
	if testing.Verbose() {
		log = testr.New(t)
	}
	a, err := New(Options{Kernel: w, Baselines: w, IPAM: w, Enforcer: w, Dir: dir, Log: log, OnStep: onStep})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// request is a call with the given configuration keys on top of the least.
func request(c Command, container, netns, vf, more string) Request {
	if more != "" {
		more = "," + more
	}
	return Request{
		Command: c, ContainerID: container, Netns: netns, IfName: "net1",
		Args:  "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=" + container,
		Stdin: fmt.Appendf(nil, `{"cniVersion":"1.1.0","name":"blue","type":"sriov","deviceID":%q%s}`, vf, more),
	}
}

const full = `"vlan":100,"vlanQoS":3,"mac":"02:00:00:00:00:99","mtu":9000,"spoofchk":"off","trust":"on","max_tx_rate":100,"promisc":true,"allmulti":true,"rdma":true,"ipam":{"type":"static"}`

func codeOf(err error) uint {
	if err == nil {
		return 0
	}
	return CNIError(err).Code
}

func injected(w *world, err error) bool { return errors.Is(err, w.errno) }
