package deviceplugin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/go-logr/logr"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/deviceplugin/life"
)

const (
	kubeletSocket = "kubelet.sock"
	retireGrace   = 10 * time.Second
)

// Options are the surroundings of a Manager. All but CDIDir and Log are required.
type Options struct {
	Prefix        string // of resource names without one of their own, e.g. "openshift.io"
	Dir           string // the kubelet's device-plugin directory
	DeviceInfoDir string // where device-info files of device plugins are
	SysFS         string // where sysfs is mounted
	// CDIDir is where device nodes are described for the runtime (Container Device
	// Interface). Empty tells the kubelet of them instead.
	CDIDir string
	// Exists tells whether the device of an ID, a VF or the parent of a MacVLAN
	// slot, is there and fit for use now, with an error that says what is wrong. It
	// is asked at every allocation and must not call back into the Manager.
	Exists func(id string) error
	// Ledger is told of allocations before the kubelet is.
	Ledger *Ledger
	Log    logr.Logger
}

// Manager serves pools of devices to the kubelet. Its methods may be called
// concurrently.
type Manager struct {
	opts    Options
	grace   time.Duration
	watcher *fsnotify.Watcher
	ctx     context.Context // of the resources; ends with Run
	cancel  context.CancelFunc

	mu        sync.Mutex
	closed    bool
	resources map[string]*resource   // by resource name
	retiring  map[string]*time.Timer // resources that are no longer in any pool
}

// New watches the kubelet's directory and removes sockets that an agent which
// was killed left there. Nothing is offered before Advertise.
func New(opts Options) (*Manager, error) {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch the kubelet's device-plugin directory: %w", err)
	}
	if err = watcher.Add(opts.Dir); err != nil {
		return nil, fmt.Errorf("watch the kubelet's device-plugin directory %s: %w", opts.Dir, errors.Join(err, watcher.Close()))
	}
	old, err := filepath.Glob(filepath.Join(opts.Dir, socketPrefix+"*"+socketSuffix))
	for _, path := range old {
		err = errors.Join(err, os.Remove(path))
	}
	if err != nil {
		return nil, fmt.Errorf("remove sockets of a former agent: %w", errors.Join(err, watcher.Close()))
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &Manager{
		opts: opts, grace: retireGrace, watcher: watcher, ctx: ctx, cancel: cancel,
		resources: make(map[string]*resource), retiring: make(map[string]*time.Timer),
	}, nil
}

// Run follows the kubelet until ctx ends, then closes all streams, lets
// allocations finish and removes the sockets. It fails when the kubelet's
// directory itself is removed: a container's mount of it is then of no use.
func (m *Manager) Run(ctx context.Context) error {
	err := m.watch(ctx)
	m.mu.Lock()
	m.closed = true
	m.cancel()
	resources := m.resources
	m.mu.Unlock()
	for _, r := range resources {
		<-r.done
	}
	return errors.Join(err, m.watcher.Close())
}

func (m *Manager) watch(ctx context.Context) error {
	dir := filepath.Clean(m.opts.Dir)
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev := <-m.watcher.Events:
			removed := ev.Has(fsnotify.Remove) || ev.Has(fsnotify.Rename)
			switch {
			case removed && filepath.Clean(ev.Name) == dir:
				return fmt.Errorf("the kubelet's device-plugin directory %s was removed: restart the agent", dir)
			case removed || ev.Has(fsnotify.Create) && filepath.Base(ev.Name) == kubeletSocket:
				m.each((*resource).poke)
			}
		case err := <-m.watcher.Errors:
			// Most likely the queue overflowed; look at everything.
			m.opts.Log.Error(err, "watching the kubelet's device-plugin directory")
			m.each((*resource).poke)
		}
	}
}

func (m *Manager) each(do func(*resource)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.resources {
		do(r)
	}
}

// Advertise replaces the whole set of pools and returns when every live
// ListAndWatch stream has been sent it. A pool that cannot be served is left
// out, which the error explains; the others are served all the same. It ends
// the withdrawal of every device.
func (m *Manager) Advertise(ctx context.Context, pools []Pool) error {
	good, err := checkPools(m.opts.Prefix, pools)
	keys := make([]string, 0, len(good))
	for name := range good {
		keys = append(keys, envKey(name))
	}
	alias := aliases(keys)

	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return errors.New("advertise devices: the device plugin is shut down")
	}
	errs := []error{err}
	for _, name := range sortedKeys(good) {
		r := m.resources[name]
		if r == nil {
			r = newResource(m.ctx, &m.opts, name)
			m.resources[name] = r
			m.opts.Log.Info("offering resource", "resource", r.name, "devices", len(good[name].Devices))
		}
		if t := m.retiring[name]; t != nil {
			t.Stop()
			delete(m.retiring, name)
		}
		key := envKey(name)
		errs = append(errs, r.update(good[name], key, alias[key]))
	}
	for name, r := range m.resources {
		if _, ok := good[name]; ok || m.retiring[name] != nil {
			continue
		}
		m.opts.Log.Info("resource is in no pool any more", "resource", r.name)
		errs = append(errs, r.update(Pool{}, "", ""))
		m.retire(name, r)
	}
	m.mu.Unlock()
	if m.opts.CDIDir != "" {
		errs = append(errs, pruneCDI(m.opts.CDIDir, func(id string) bool { return m.Offers(id) || m.opts.Ledger.inHand(id) }))
	}
	return errors.Join(append(errs, m.told(ctx))...)
}

// retire takes the resource away after the grace, unless it is in a pool again
// by then. mu is held.
func (m *Manager) retire(name string, r *resource) {
	var timer *time.Timer
	timer = time.AfterFunc(m.grace, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.retiring[name] != timer {
			return
		}
		// Within the lock: a new resource of this name needs the socket's path.
		r.stop()
		<-r.done
		delete(m.resources, name)
		delete(m.retiring, name)
	})
	m.retiring[name] = timer
}

// Withdraw marks devices unhealthy, in whichever pools they are, until the next
// Advertise. When it returns without error no later Allocate hands them out,
// and every live stream of the kubelet has been sent the change (there may be
// none). A device that was allocated before stays with its pod: ask who holds
// it after, not before, the withdrawal.
func (m *Manager) Withdraw(ctx context.Context, ids []string) error {
	m.each(func(r *resource) { r.withdraw(ids) })
	return m.told(ctx)
}

// Repeat sends the kubelet its lists again, upon which it writes anew which device it
// gave to whom (see package podresources).
func (m *Manager) Repeat() {
	m.each(func(r *resource) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.version++
		r.notify()
	})
}

func (m *Manager) told(ctx context.Context) error {
	var all []*resource
	m.each(func(r *resource) { all = append(all, r) })
	var errs []error
	for _, r := range all {
		errs = append(errs, r.told(ctx))
	}
	return errors.Join(errs...)
}

// Serves tells whether the resource is one of ours, by its name with prefix.
func (m *Manager) Serves(resource string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.resources[resource] != nil
}

// Offers tells whether the device is in a pool.
func (m *Manager) Offers(id string) bool {
	offers := false
	m.each(func(r *resource) {
		r.mu.Lock()
		defer r.mu.Unlock()
		_, ok := r.devices[id]
		offers = offers || ok
	})
	return offers
}

// RDMA tells whether containers that have the device have its RDMA devices.
func (m *Manager) RDMA(id string) bool {
	rdma := false
	m.each(func(r *resource) {
		r.mu.Lock()
		defer r.mu.Unlock()
		_, ok := r.devices[id]
		rdma = rdma || ok && r.pool.RDMA
	})
	return rdma
}

// Status is the state of one resource towards the kubelet.
type Status struct {
	Resource string // with prefix
	Devices  int
	Healthy  int   // of Devices
	Streams  int   // ListAndWatch calls in progress
	Err      error // why it is not registered; nil when it is

	list    []listed
	reasons map[string]string // of those that are not healthy
}

// Status tells the state of every resource, sorted by name.
func (m *Manager) Status() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]Status, 0, len(m.resources))
	for _, name := range sortedKeys(m.resources) {
		out = append(out, m.resources[name].status())
	}
	return out
}

func (r *resource) status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := Status{Resource: r.name, Devices: len(r.list), Streams: len(r.streams), Err: r.failure, list: r.list, reasons: map[string]string{}}
	for _, l := range r.list {
		if l.healthy {
			s.Healthy++
		} else {
			s.reasons[l.id] = r.devices[l.id].Reason
		}
	}
	if s.Err == nil && r.registered != r.epoch {
		s.Err = errors.New("registration with the kubelet is under way")
	}
	return s
}

// Pools tells people of what is offered, and of who has it.
func (m *Manager) Pools() []v1.DevicePool {
	var all []v1.DevicePool
	for _, s := range m.Status() {
		p := v1.DevicePool{ResourceName: s.Resource, Devices: s.Devices, Healthy: s.Healthy}
		if s.Err != nil {
			p.Message = s.Err.Error()
		}
		for _, l := range s.list {
			if !l.healthy {
				p.Unhealthy = append(p.Unhealthy, v1.UnhealthyDevice{Device: l.id, Reason: s.reasons[l.id]})
			}
			switch r := m.opts.Ledger.record(l.id, l.healthy); r.phase {
			case life.Allocated, life.Attached, life.Returned:
				p.Held = append(p.Held, v1.HeldDevice{Device: l.id, Phase: string(r.phase), Pod: r.pod, Generation: int64(r.generation)})
			}
		}
		all = append(all, p)
	}
	return all
}
