package hostfake

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"reflect"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/internal/host"
)

// Op names an operation of the kernel, as its method is named.
type Op string

// The operations that can fail.
const (
	Inventory       Op = "Inventory"
	ReadPF          Op = "ReadPF"
	ReadVFSettings  Op = "ReadVFSettings"
	RDMAMode        Op = "RDMAMode"
	SetNumVFs       Op = "SetNumVFs"
	RestoreVFs      Op = "RestoreVFs"
	BindDriver      Op = "BindDriver"
	SetVFMAC        Op = "SetVFMAC"
	SetMAC          Op = "SetMAC"
	SetMTU          Op = "SetMTU"
	SetLinkUp       Op = "SetLinkUp"
	Rename          Op = "Rename"
	UnbindDriver    Op = "UnbindDriver"
	SetEswitchMode  Op = "SetEswitchMode"
	SetVFGUID       Op = "SetVFGUID"
	ResetVFSettings Op = "ResetVFSettings"
	SetVDPA         Op = "SetVDPA"
	SetRDMAMode     Op = "SetRDMAMode"
	PathLinks       Op = "PathLinks"
	Watch           Op = "Watch"
)

// Kernel is the fake. The zero value has no NICs. It is safe for concurrent use.
type Kernel struct {
	mu       sync.Mutex
	pfs      []host.PF
	links    []host.ParentLink // but those of the NICs
	users    map[string]string // what stands on a link, by name
	rdma     string
	fail     map[Op][]unix.Errno
	ignore   map[Op]bool
	path     []int
	reads    map[Op]int
	noReset  bool
	tried    map[Op]int
	calls    []string
	lastLink int
	watchers []chan host.Changes
}

// New returns a kernel with the NICs.
func New(pfs ...host.PF) *Kernel {
	k := &Kernel{users: map[string]string{}, rdma: "shared", reads: map[Op]int{}, tried: map[Op]int{}, fail: map[Op][]unix.Errno{}, ignore: map[Op]bool{}, lastLink: 100}
	k.pfs = clone(pfs)
	return k
}

// NIC is a PF with a netdev and no VFs.
func NIC(address, name string, index, totalVFs int) host.PF {
	return host.PF{
		PCIAddress: address, Name: name, IfIndex: index, Driver: "fakenic", Vendor: "1af4", DeviceID: "10f5", VFDeviceID: "10f6",
		MAC: net.HardwareAddr{0, 0, 0x5e, 0, 0, byte(index)}, PermMAC: net.HardwareAddr{0, 0, 0x5e, 0, 0, byte(index)},
		MTU: 1500, LinkSpeed: 25000, LinkType: host.Ethernet, Eswitch: host.Legacy, AdminUp: true, Carrier: true, NUMANode: -1, TotalVFs: totalVFs,
	}
}

// Fail makes the next calls of op fail, one for each errno.
func (k *Kernel) Fail(op Op, errnos ...unix.Errno) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fail[op] = append(k.fail[op], errnos...)
}

// Tried counts the calls of op.
func (k *Kernel) Tried(op Op) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.tried[op]
}

// Ignore makes op succeed and do nothing, as some drivers do.
func (k *Kernel) Ignore(op Op, on bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ignore[op] = on
}

// Calls returns the changes tried since the last call of Calls.
func (k *Kernel) Calls() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	calls := k.calls
	k.calls = nil
	return calls
}

// Path makes the links with these indexes the way to every address.
func (k *Kernel) Path(links ...int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.path = links
}

// PathLinks is host.Host's.
func (k *Kernel) PathLinks(context.Context, []net.IP) ([]int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.path), k.failing(PathLinks, "find the links to", "the API server")
}

// Reads counts what was read since the last call of Reads, by operation.
func (k *Kernel) Reads() map[Op]int {
	k.mu.Lock()
	defer k.mu.Unlock()
	reads := k.reads
	k.reads = map[Op]int{}
	return reads
}

// Change lets somebody else change the NICs; watchers are told of each that is
// another than before.
func (k *Kernel) Change(f func(pfs []host.PF)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	before := clone(k.pfs)
	f(k.pfs)
	for i, pf := range k.pfs {
		if !reflect.DeepEqual(pf, before[i]) {
			k.tell(host.Changes{Devices: []string{pf.PCIAddress}})
		}
	}
}

// Tell tells the watchers of changes.
func (k *Kernel) Tell(c host.Changes) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tell(c)
}

// PF returns the NIC as it is, nil when there is none of that address.
func (k *Kernel) PF(address string) *host.PF {
	k.mu.Lock()
	defer k.mu.Unlock()
	pfs := clone(k.pfs)
	for i := range pfs {
		if pfs[i].PCIAddress == address {
			return &pfs[i]
		}
	}
	return nil
}

func (k *Kernel) tell(c host.Changes) {
	for _, w := range k.watchers {
		told := c
		select {
		case waiting := <-w:
			told = waiting.With(c)
		default:
		}
		w <- told
	}
}

// Watch is host.Host's.
func (k *Kernel) Watch(ctx context.Context) (<-chan host.Changes, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.failing(Watch, "watch", "events"); err != nil {
		return nil, err
	}
	w := make(chan host.Changes, 1)
	k.watchers = append(k.watchers, w)
	context.AfterFunc(ctx, func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.watchers = slices.DeleteFunc(k.watchers, func(o chan host.Changes) bool { return o == w })
		close(w)
	})
	return w, nil
}

// Inventory is host.Host's.
func (k *Kernel) Inventory(context.Context) ([]host.PF, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reads[Inventory]++
	if err := k.failing(Inventory, "list", "PCI devices"); err != nil {
		return nil, err
	}
	return withoutSettings(k.pfs), nil
}

// ReadPF is host.Host's.
func (k *Kernel) ReadPF(_ context.Context, address string) (host.PF, bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reads[ReadPF]++
	if err := k.failing(ReadPF, "read NIC", address); err != nil {
		return host.PF{}, false, err
	}
	pf := k.pf(address)
	if pf == nil {
		return host.PF{}, false, nil
	}
	return withoutSettings([]host.PF{*pf})[0], true, nil
}

func withoutSettings(pfs []host.PF) []host.PF {
	pfs = clone(pfs)
	for i := range pfs {
		for j := range pfs[i].VFs {
			pfs[i].VFs[j].Admin = host.VFSettings{}
		}
	}
	return pfs
}

// ReadVFSettings is host.Host's.
func (k *Kernel) ReadVFSettings(_ context.Context, pf *host.PF) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reads[ReadVFSettings]++
	if err := k.failing(ReadVFSettings, "read the VF settings", pf.PCIAddress); err != nil {
		return err
	}
	for _, have := range k.pfs {
		if have.PCIAddress != pf.PCIAddress {
			continue
		}
		for i := range pf.VFs {
			if i < len(have.VFs) {
				pf.VFs[i].Admin = have.VFs[i].Admin
			}
		}
	}
	return nil
}

// SetNumVFs is host.Host's: the new VFs have no driver.
func (k *Kernel) SetNumVFs(_ context.Context, address string, n int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.change(SetNumVFs, fmt.Sprintf("create %d VFs", n), address, func() unix.Errno {
		pf := k.pf(address)
		if pf == nil {
			return unix.ENOENT
		}
		if n > pf.TotalVFs {
			return unix.ERANGE
		}
		pf.NumVFs, pf.VFs = n, nil
		for i := range n {
			pf.VFs = append(pf.VFs, host.VF{
				Index: i, PCIAddress: fmt.Sprintf("%s%02x.%d", address[:len(address)-4], 0x10+i/8, i%8),
				Vendor: pf.Vendor, DeviceID: pf.VFDeviceID, NUMANode: -1,
				IOMMUGroup: strconv.Itoa(i), Admin: host.Baseline(),
			})
			pf.VFs[i].Admin.MAC = make(net.HardwareAddr, 6)
		}
		return 0
	})
}

// UnbindDriver is host.Host's.
func (k *Kernel) UnbindDriver(_ context.Context, address string) error {
	return k.onVF(UnbindDriver, "unbind the driver", address, func(vf *host.VF) {
		vf.Driver, vf.Name, vf.IfIndex, vf.MAC, vf.MTU, vf.RDMADevice, vf.GUID = "", "", 0, nil, 0, "", nil
	})
}

// SetVDPA is host.Host's.
func (k *Kernel) SetVDPA(_ context.Context, address, kind string) error {
	return k.onVF(SetVDPA, "set the vDPA device to "+kind, address, func(vf *host.VF) { vf.VDPA = kind })
}

// SetVFGUID is host.Host's.
func (k *Kernel) SetVFGUID(_ context.Context, pf host.Link, index int, guid net.HardwareAddr) error {
	return k.onVFOf(SetVFGUID, fmt.Sprintf("set the GUID of VF %d to %s", index, guid), pf, index, func(vf *host.VF) {
		vf.Admin.NodeGUID, vf.Admin.PortGUID = slices.Clone(guid), slices.Clone(guid)
	})
}

// ResetVFSettings is host.Host's.
func (k *Kernel) ResetVFSettings(_ context.Context, pf host.Link, index int, have host.VFSettings, attrs host.VFAttrs) (host.VFAttrs, error) {
	var unsupported host.VFAttrs
	err := k.onVFOf(ResetVFSettings, fmt.Sprintf("reset VF %d from %s", index, have.Text(attrs)), pf, index, func(vf *host.VF) {
		if k.noReset {
			unsupported = attrs
			return
		}
		mac, node, port := vf.Admin.MAC, vf.Admin.NodeGUID, vf.Admin.PortGUID
		vf.Admin = host.Baseline()
		vf.Admin.MAC, vf.Admin.NodeGUID, vf.Admin.PortGUID = mac, node, port
	})
	return unsupported, err
}

// NoReset makes ResetVFSettings find a driver that supports nothing of it.
func (k *Kernel) NoReset() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.noReset = true
}

// SetEswitchMode is host.Host's.
func (k *Kernel) SetEswitchMode(_ context.Context, address string, mode host.EswitchMode) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.change(SetEswitchMode, "set eswitch mode "+string(mode), address, func() unix.Errno {
		pf := k.pf(address)
		switch {
		case pf == nil:
			return unix.ENOENT
		case pf.Eswitch == "":
			return unix.EOPNOTSUPP
		case slices.ContainsFunc(pf.VFs, func(vf host.VF) bool { return vf.Driver != "" }):
			return unix.EBUSY
		}
		pf.Eswitch = mode
		for i := range pf.VFs {
			pf.VFs[i].Representor = ""
			if mode == host.Switchdev {
				pf.VFs[i].Representor = fmt.Sprintf("%s_%d", pf.Name, i)
			}
		}
		return 0
	})
}

// RDMAMode is host.Host's.
func (k *Kernel) RDMAMode(context.Context) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.rdma, k.failing(RDMAMode, "ask for the RDMA mode", "the node")
}

// SetRDMAMode is host.Host's.
func (k *Kernel) SetRDMAMode(_ context.Context, mode string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.change(SetRDMAMode, "set RDMA mode "+mode, "the node", func() unix.Errno { k.rdma = mode; return 0 })
}

// RestoreVFs is host.Host's: the VFs have the default driver.
func (k *Kernel) RestoreVFs(ctx context.Context, address string, n int, autoprobe bool) error {
	k.mu.Lock()
	err := k.change(RestoreVFs, fmt.Sprintf("restore %d VFs", n), address, func() unix.Errno {
		pf := k.pf(address)
		if pf == nil || pf.NumVFs > 0 && n > 0 {
			return unix.EBUSY
		}
		pf.AutoprobeOff = !autoprobe
		return 0
	})
	k.mu.Unlock()
	if err != nil || n == 0 {
		return err
	}
	if err = k.SetNumVFs(ctx, address, n); err != nil {
		return err
	}
	for _, vf := range k.PF(address).VFs {
		if err = k.BindDriver(ctx, vf.PCIAddress, host.DefaultDriver); err != nil {
			return err
		}
	}
	return nil
}

// BindDriver is host.Host's: a VF with the default driver has a netdev at once.
func (k *Kernel) BindDriver(_ context.Context, address, driver string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.change(BindDriver, "bind driver "+driver, address, func() unix.Errno {
		pf, vf := k.vf(address)
		if vf == nil {
			return unix.ENOENT
		}
		vf.Driver, vf.Name, vf.IfIndex, vf.MAC, vf.MTU, vf.RDMADevice, vf.GUID = driver, "", 0, nil, 0, "", nil
		if driver != host.DefaultDriver {
			return 0
		}
		k.lastLink++
		vf.Driver, vf.Name, vf.IfIndex, vf.MTU = "fakenicvf", fmt.Sprintf("%sv%d", pf.Name, vf.Index), k.lastLink, 1500
		if vf.MAC = slices.Clone(vf.Admin.MAC); vf.MAC.String() == "00:00:00:00:00:00" {
			_, _ = rand.Read(vf.MAC)
			vf.MAC[0] = vf.MAC[0]&^0x01 | 0x02
		}
		if pf.LinkType == host.InfiniBand {
			vf.RDMADevice, vf.GUID = fmt.Sprintf("fake_%d", k.lastLink), slices.Clone(vf.Admin.NodeGUID)
		}
		return 0
	})
}

// SetVFMAC is host.Host's.
func (k *Kernel) SetVFMAC(_ context.Context, pf host.Link, index int, mac net.HardwareAddr) error {
	return k.onVFOf(SetVFMAC, fmt.Sprintf("set the MAC of VF %d to %s", index, mac), pf, index, func(vf *host.VF) {
		vf.Admin.MAC = slices.Clone(mac)
	})
}

// SetMAC is host.Host's.
func (k *Kernel) SetMAC(_ context.Context, l host.Link, mac net.HardwareAddr) error {
	return k.onLink(SetMAC, "set the MAC to "+mac.String(), l, func(f fields) { *f.mac = slices.Clone(mac) })
}

// SetMTU is host.Host's.
func (k *Kernel) SetMTU(_ context.Context, l host.Link, mtu int) error {
	return k.onLink(SetMTU, fmt.Sprintf("set MTU %d", mtu), l, func(f fields) { *f.mtu = mtu })
}

// SetLinkUp is host.Host's.
func (k *Kernel) SetLinkUp(_ context.Context, l host.Link) error {
	return k.onLink(SetLinkUp, "set the link up", l, func(f fields) { *f.up = true })
}

// Rename is host.Host's.
func (k *Kernel) Rename(_ context.Context, l host.Link, name string) error {
	return k.onLink(Rename, "rename to "+name, l, func(f fields) { *f.name = name })
}

func (k *Kernel) onVF(op Op, what, address string, do func(*host.VF)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.change(op, what, address, func() unix.Errno {
		_, vf := k.vf(address)
		if vf == nil {
			return unix.ENOENT
		}
		do(vf)
		return 0
	})
}

func (k *Kernel) onVFOf(op Op, what string, pf host.Link, index int, do func(*host.VF)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.change(op, what, pf.PCIAddress, func() unix.Errno {
		p := k.pf(pf.PCIAddress)
		if p == nil || index >= len(p.VFs) {
			return unix.EINVAL
		}
		do(&p.VFs[index])
		return 0
	})
}

// fields are those of a netdev, of a PF or a VF.
type fields struct {
	name *string
	mac  *net.HardwareAddr
	mtu  *int
	up   *bool
}

func (k *Kernel) onLink(op Op, what string, l host.Link, do func(fields)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.change(op, what, cmp.Or(l.PCIAddress, l.Name), func() unix.Errno {
		for i := range k.pfs {
			pf := &k.pfs[i]
			if l.Index != 0 && pf.IfIndex == l.Index {
				do(fields{&pf.Name, &pf.MAC, &pf.MTU, &pf.AdminUp})
				return 0
			}
			for j := range pf.VFs {
				if vf := &pf.VFs[j]; l.Index != 0 && vf.IfIndex == l.Index {
					do(fields{&vf.Name, &vf.MAC, &vf.MTU, new(bool)})
					return 0
				}
			}
		}
		if f, ok := k.linkFields(l.Index); ok && l.Index != 0 {
			do(f)
			return 0
		}
		return unix.ENODEV
	})
}

func (k *Kernel) change(op Op, what, object string, do func() unix.Errno) error {
	k.calls = append(k.calls, what+" on "+object)
	if err := k.failing(op, what, object); err != nil {
		return err
	}
	if k.ignore[op] {
		return nil
	}
	if errno := do(); errno != 0 {
		return &host.KernelError{Op: what, Object: object, Err: errno}
	}
	if host.ValidPCIAddress(object) {
		k.tell(host.Changes{Devices: []string{object}})
	} else {
		k.tell(host.Changes{Parents: true})
	}
	return nil
}

func (k *Kernel) failing(op Op, what, object string) error {
	k.tried[op]++
	if len(k.fail[op]) == 0 {
		return nil
	}
	errno := k.fail[op][0]
	k.fail[op] = k.fail[op][1:]
	return &host.KernelError{Op: what, Object: object, Err: errno, Hint: "the mend of " + string(op)}
}

func (k *Kernel) pf(address string) *host.PF {
	for i := range k.pfs {
		if k.pfs[i].PCIAddress == address {
			return &k.pfs[i]
		}
	}
	return nil
}

func (k *Kernel) vf(address string) (*host.PF, *host.VF) {
	for i := range k.pfs {
		for j := range k.pfs[i].VFs {
			if k.pfs[i].VFs[j].PCIAddress == address {
				return &k.pfs[i], &k.pfs[i].VFs[j]
			}
		}
	}
	return nil, nil
}

func clone(pfs []host.PF) []host.PF {
	out := slices.Clone(pfs)
	for i := range out {
		out[i].VFs = slices.Clone(out[i].VFs)
	}
	return out
}
