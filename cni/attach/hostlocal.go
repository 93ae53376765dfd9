package attach

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/allocator"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/disk"
	"golang.org/x/sys/unix"
)

// HostLocal is the IPAM plugin host-local without a process: the library that the plugin
// consists of, on the same files and under the same lock, so that it and the host-local
// of other plugins of the node never give the same address.
type HostLocal struct {
	Others IPAM // all other plugins, and what only the program host-local does

	turns Locks    // of this process's calls, by folder: they need not ask again and again
	known sync.Map // *leases by folder, for who has its turn
}

// hostLocalDir is where host-local keeps its addresses unless told otherwise.
const hostLocalDir = "/var/lib/cni/networks"

// has tells whether the library can do it: it does not read resolvConf.
func (h *HostLocal) has(plugin string, req Request) bool {
	if plugin != "host-local" {
		return false
	}
	var conf struct {
		IPAM struct {
			ResolvConf json.RawMessage `json:"resolvConf"`
		} `json:"ipam"`
	}
	return json.Unmarshal(req.Stdin, &conf) == nil && conf.IPAM.ResolvConf == nil
}

// Find implements IPAM.
func (h *HostLocal) Find(plugin string, req Request) error {
	if h.has(plugin, req) {
		return nil
	}
	return h.Others.Find(plugin, req)
}

// Exec implements IPAM.
func (h *HostLocal) Exec(ctx context.Context, plugin string, req Request) (*types100.Result, error) {
	if !h.has(plugin, req) {
		return h.Others.Exec(ctx, plugin, req)
	}
	result, err := h.call(ctx, req)
	if err != nil {
		return nil, ipamError(plugin, req.Command, err)
	}
	return result, nil
}

func (h *HostLocal) call(ctx context.Context, req Request) (*types100.Result, error) {
	perPod := req.Command != Status && req.Command != GC
	if err := utils.ValidateContainerID(req.ContainerID); err != nil && perPod {
		return nil, err
	}
	// It is the name of a folder.
	if err := utils.ValidateNetworkName(KeyOf(req).Network); err != nil {
		return nil, err
	}
	if !perPod {
		return nil, nil // host-local does nothing for the others
	}
	conf, _, err := allocator.LoadIPAMConfig(req.Stdin, req.Args)
	if err != nil {
		return nil, err
	}
	store, err := disk.New(conf.Name, conf.DataDir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = store.Close() }()
	dir := filepath.Join(cmp.Or(conf.DataDir, hostLocalDir), conf.Name)
	unlock, err := h.lock(ctx, dir)
	if err != nil {
		return nil, types.NewError(types.ErrTryAgainLater, err.Error(), "")
	}
	defer unlock()
	l, err := h.leases(store, dir)
	if err != nil {
		return nil, err
	}
	defer l.done()
	switch req.Command {
	case Add:
		return give(conf, l, req)
	case Del:
		return nil, release(l, len(conf.Ranges), req)
	case Check:
		if len(l.of(req.ContainerID, req.IfName)) > 0 {
			return nil, nil
		}
		return nil, fmt.Errorf("host-local: Failed to find address added by container %v", req.ContainerID)
	}
	return nil, nil
}

// give takes an address of each range set.
func give(conf *allocator.IPAMConfig, store *leases, req Request) (*types100.Result, error) {
	asked := map[string]net.IP{}
	for _, ip := range conf.IPArgs {
		asked[ip.String()] = ip
	}
	result := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, Routes: conf.Routes}
	refuse := func(err error) (*types100.Result, error) {
		return nil, errors.Join(err, release(store, len(result.IPs), req))
	}
	for i, set := range conf.Ranges {
		var one net.IP
		for key, ip := range asked {
			if set.Contains(ip) {
				one = ip
				delete(asked, key)
				break
			}
		}
		ip, err := allocator.NewIPAllocator(&set, store, i).Get(req.ContainerID, req.IfName, one)
		if err != nil {
			return refuse(fmt.Errorf("failed to allocate for range %d: %w", i, err))
		}
		result.IPs = append(result.IPs, ip)
	}
	if len(asked) > 0 {
		msg := "failed to allocate all requested IPs:"
		for key := range asked {
			msg += " " + key
		}
		return refuse(errors.New(msg))
	}
	return result, nil
}

// release gives the addresses of the interface back, once for each of the ranges, as the
// plugin does: when none is left, one goes that an old version of the plugin gave to the
// container without a word of the interface.
func release(store *leases, ranges int, req Request) error {
	for range ranges {
		if err := store.ReleaseByID(req.ContainerID, req.IfName); err != nil {
			return err
		}
	}
	return nil
}

// leases are the addresses that a folder's files say are taken. The library reads all files
// in each call, which is most of what a call costs; these are read again only when another
// process has changed the folder. It is a store whose lock is held for the whole of a call.
type leases struct {
	*disk.Store
	dir    string
	owners map[string]string // what the files say, by address
	stamp  unix.Timespec     // time of change that the folder was given after the last call
	dirty  bool              // changed since
	unsure bool              // whether the files are as in owners
}

// leases returns those of a folder whose lock is held.
func (h *HostLocal) leases(store *disk.Store, dir string) (*leases, error) {
	kept, _ := h.known.LoadOrStore(dir, &leases{dir: dir})
	l := kept.(*leases)
	l.Store = store
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", dir, err)
	}
	if l.owners != nil && st.Mtim == l.stamp {
		return l, nil
	}
	l.owners, l.dirty = nil, true
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read addresses that are taken: %w", err)
	}
	owners := map[string]string{}
	for _, e := range entries {
		if net.ParseIP(e.Name()) == nil {
			continue
		}
		b, _ := os.ReadFile(filepath.Join(dir, e.Name())) // taken, whoever has it
		owners[e.Name()] = strings.TrimSpace(string(b))
	}
	l.owners = owners
	return l, nil
}

// done marks the folder as it is. Others that change it give it the time, which is only as
// fine as the kernel's tick; one that nobody would come upon tells any change after this one.
func (l *leases) done() {
	if l.unsure {
		l.owners, l.unsure = nil, false
	}
	if !l.dirty || l.owners == nil {
		return
	}
	l.stamp = unix.NsecToTimespec(time.Now().Truncate(time.Second).UnixNano() + rand.Int64N(int64(time.Second)))
	if unix.UtimesNanoAt(unix.AT_FDCWD, l.dir, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, l.stamp}, 0) != nil {
		l.owners = nil
	}
	l.dirty = false
}

// of are the addresses of an interface; those that an old version of the plugin gave are
// the container's, without a word of the interface.
func (l *leases) of(id, ifname string) []string {
	id = strings.TrimSpace(id)
	var addresses []string
	for address, owner := range l.owners {
		if owner == id+disk.LineBreak+ifname || owner == id {
			addresses = append(addresses, address)
		}
	}
	slices.Sort(addresses)
	return addresses
}

// GetByID implements backend.Store.
func (l *leases) GetByID(id, ifname string) []net.IP {
	var ips []net.IP
	for _, address := range l.of(id, ifname) {
		ips = append(ips, net.ParseIP(address))
	}
	return ips
}

// Reserve implements backend.Store.
func (l *leases) Reserve(id, ifname string, ip net.IP, rangeID string) (bool, error) {
	if _, taken := l.owners[ip.String()]; taken {
		return false, nil
	}
	ok, err := l.Store.Reserve(id, ifname, ip, rangeID)
	// After an error the file may be there: it is the interface's to release, and the
	// next call reads.
	l.dirty, l.unsure = true, l.unsure || !ok
	l.owners[ip.String()] = strings.TrimSpace(id) + disk.LineBreak + ifname
	if !ok && err == nil {
		l.owners[ip.String()] = "" // another's
	}
	return ok, err
}

// ReleaseByID implements backend.Store. What is not the interface's goes only when
// nothing is.
func (l *leases) ReleaseByID(id, ifname string) error {
	own := l.of(id, ifname)
	old := func(address string) bool { return l.owners[address] == strings.TrimSpace(id) }
	if !slices.ContainsFunc(own, func(address string) bool { return !old(address) }) {
		old = func(string) bool { return false }
	}
	for _, address := range slices.DeleteFunc(own, old) {
		l.dirty = true
		if err := os.Remove(filepath.Join(l.dir, address)); err == nil || errors.Is(err, fs.ErrNotExist) {
			delete(l.owners, address)
		}
	}
	return nil
}

// Lock implements backend.Store.
func (*leases) Lock() error { return nil }

// Unlock implements backend.Store.
func (*leases) Unlock() error { return nil }

// lock takes the lock of the store in dir, for which the library would wait without end.
func (h *HostLocal) lock(ctx context.Context, dir string) (unlock func(), err error) {
	done, err := h.turns.Lock(ctx, dir)
	if err != nil {
		return nil, fmt.Errorf("wait for other calls on %s: %w", dir, err)
	}
	fd, err := unix.Open(filepath.Join(dir, "lock"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		done()
		return nil, fmt.Errorf("open the lock of %s: %w", dir, err)
	}
	for {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { unix.Close(fd); done() }, nil
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			select {
			case <-time.After(2 * time.Millisecond):
				continue
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		unix.Close(fd)
		done()
		return nil, fmt.Errorf("wait for the lock of %s, which another process has: %w", dir, err)
	}
}
