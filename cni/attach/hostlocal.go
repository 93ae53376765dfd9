package attach

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
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

	turns Locks // of this process's calls, by folder: they need not ask again and again
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
	unlock, err := h.lock(ctx, filepath.Join(cmp.Or(conf.DataDir, hostLocalDir), conf.Name))
	if err != nil {
		return nil, types.NewError(types.ErrTryAgainLater, err.Error(), "")
	}
	defer unlock()
	switch req.Command {
	case Add:
		return give(conf, unlocked{store}, req)
	case Del:
		return nil, release(store, len(conf.Ranges), req)
	case Check:
		id := strings.TrimSpace(req.ContainerID)
		for _, key := range []string{id + disk.LineBreak + req.IfName, id} {
			if found, err := store.FindByKey(key); found || err != nil {
				return nil, err
			}
		}
		return nil, fmt.Errorf("host-local: Failed to find address added by container %v", req.ContainerID)
	}
	return nil, nil
}

// give takes an address of each range set.
func give(conf *allocator.IPAMConfig, store unlocked, req Request) (*types100.Result, error) {
	asked := map[string]net.IP{}
	for _, ip := range conf.IPArgs {
		asked[ip.String()] = ip
	}
	result := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, Routes: conf.Routes}
	refuse := func(err error) (*types100.Result, error) {
		return nil, errors.Join(err, release(store.Store, len(result.IPs), req))
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
func release(store *disk.Store, ranges int, req Request) error {
	for range ranges {
		if err := store.ReleaseByID(req.ContainerID, req.IfName); err != nil {
			return err
		}
	}
	return nil
}

// unlocked is a store whose lock is held for the whole of a call.
type unlocked struct{ *disk.Store }

// Lock implements backend.Store.
func (unlocked) Lock() error { return nil }

// Unlock implements backend.Store.
func (unlocked) Unlock() error { return nil }

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
