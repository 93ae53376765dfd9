package hostfake

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"reflect"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/internal/host"
)

// Op names an operation of the kernel.
type Op string

// The operations that can fail.
const (
	Inventory      Op = "Inventory"
	ReadPF         Op = "ReadPF"
	ReadVFSettings Op = "ReadVFSettings"
	SetNumVFs      Op = "SetNumVFs"
	BindDriver     Op = "BindDriver"
	SetVFMAC       Op = "SetVFMAC"
	SetMAC         Op = "SetMAC"
	SetMTU         Op = "SetMTU"
	SetLinkUp      Op = "SetLinkUp"
	Rename         Op = "Rename"
	Watch          Op = "Watch"
)

// Changes are the operations that change something.
var Changes = []Op{SetNumVFs, BindDriver, SetVFMAC, SetMAC, SetMTU, SetLinkUp, Rename}

// Kernel is the fake. The zero value has no NICs. It is safe for concurrent use.
type Kernel struct {
	mu       sync.Mutex
	pfs      []host.PF
	links    []host.ParentLink // but those of the NICs
	users    map[string]string // what stands on a link, by name
	fail     map[Op][]unix.Errno
	ignore   map[Op]bool
	reads    map[Op]int
	calls    []string
	lastLink int
	watchers []chan host.Changes
}

// New returns a kernel with the NICs.
func New(pfs ...host.PF) *Kernel {
	k := &Kernel{users: map[string]string{}, fail: map[Op][]unix.Errno{}, ignore: map[Op]bool{}, reads: map[Op]int{}, lastLink: 100}
	k.pfs = clone(pfs)
	return k
}

// NIC is a PF with a netdev and no VFs.
func NIC(address, name string, index, totalVFs int) host.PF {
	return host.PF{
		PCIAddress: address, Name: name, IfIndex: index, Driver: "fakenic", Vendor: "1af4", DeviceID: "10f5", VFDeviceID: "10f6",
		MAC: net.HardwareAddr{0, 0, 0x5e, 0, 0, byte(index)}, PermMAC: net.HardwareAddr{0, 0, 0x5e, 0, 0, byte(index)},
		MTU: 1500, LinkSpeed: 25000, LinkType: host.Ethernet, AdminUp: true, Carrier: true, NUMANode: -1, TotalVFs: totalVFs,
	}
}

// Fail makes the next calls of op fail, one for each errno.
func (k *Kernel) Fail(op Op, errnos ...unix.Errno) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fail[op] = append(k.fail[op], errnos...)
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
				Admin: host.VFSettings{MAC: make(net.HardwareAddr, 6), SpoofChk: true},
			})
		}
		return 0
	})
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
		vf.Driver, vf.Name, vf.IfIndex, vf.MAC, vf.MTU = driver, "", 0, nil, 0
		if driver != host.DefaultDriver {
			return 0
		}
		k.lastLink++
		vf.Driver, vf.Name, vf.IfIndex, vf.MTU = "fakenicvf", fmt.Sprintf("%sv%d", pf.Name, vf.Index), k.lastLink, 1500
		if vf.MAC = slices.Clone(vf.Admin.MAC); vf.MAC.String() == "00:00:00:00:00:00" {
			_, _ = rand.Read(vf.MAC)
			vf.MAC[0] = vf.MAC[0]&^0x01 | 0x02
		}
		return 0
	})
}

// SetVFMAC is host.Host's.
func (k *Kernel) SetVFMAC(_ context.Context, pf host.Link, index int, mac net.HardwareAddr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.change(SetVFMAC, fmt.Sprintf("set the MAC of VF %d to %s", index, mac), pf.PCIAddress, func() unix.Errno {
		p := k.pf(pf.PCIAddress)
		if p == nil || index >= len(p.VFs) {
			return unix.EINVAL
		}
		p.VFs[index].Admin.MAC = slices.Clone(mac)
		return 0
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
	k.tell(host.Changes{Devices: []string{object}})
	return nil
}

func (k *Kernel) failing(op Op, what, object string) error {
	if len(k.fail[op]) == 0 {
		return nil
	}
	errno := k.fail[op][0]
	k.fail[op] = k.fail[op][1:]
	return &host.KernelError{Op: what, Object: object, Err: errno}
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
