package deviceplugin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"github.com/sluice-network/sluice/internal/host"
)

const (
	registerTimeout = 10 * time.Second // the kubelet calls back within, with a limit of 10 s itself
	backoffFirst    = 200 * time.Millisecond
	backoffLast     = 10 * time.Second
	// streamWait is how long after a registration the kubelet may take to open
	// its ListAndWatch stream before it is asked again.
	streamWait = 10 * time.Second
	// settle lets a burst of events pass (a starting kubelet empties the
	// directory) and bounds how often we register with a kubelet that hangs up.
	settle = 100 * time.Millisecond
)

// resource is one extended resource: what it offers, and the loop that keeps it
// served and registered.
type resource struct {
	name string // "<prefix>/<resource>"
	path string // of its socket
	opts *Options
	log  logr.Logger
	wake chan struct{} // capacity 1: something happened, look again
	stop context.CancelFunc
	done chan struct{} // closed when run has returned

	mu      sync.Mutex
	pool    Pool
	devices map[string]Device // by ID
	key     string            // environment name
	alias   string            // its shell form, or ""
	list    []listed          // what the kubelet is to know, sorted by ID
	version uint64            // of list; the first is 1
	streams map[*stream]struct{}
	// epoch counts the reasons to register: 1 at start, one more for a new
	// socket of ours and when the last stream ended. Registered means that a
	// registration begun in this epoch succeeded with the kubelet whose socket
	// is there now, so that no reason is lost that comes while one is under way.
	epoch, registered uint64
	kubelet           os.FileInfo   // the socket registered at
	failure           error         // why it is not served or registered
	news              chan struct{} // closed and replaced when anything above changes
}

// listed is what ListAndWatch says about one device.
type listed struct {
	id      string
	healthy bool
	numa    int // -1: not told
}

// stream is one ListAndWatch call in progress.
type stream struct{ sent uint64 }

func newResource(ctx context.Context, opts *Options, name string) *resource {
	ctx, cancel := context.WithCancel(ctx)
	r := &resource{
		name: name, path: socketPath(opts.Dir, name), opts: opts, log: opts.Log.WithValues("resource", name),
		wake: make(chan struct{}, 1), stop: cancel, done: make(chan struct{}),
		streams: make(map[*stream]struct{}), epoch: 1, news: make(chan struct{}),
	}
	go r.run(ctx)
	return r
}

// update sets what the resource offers, tells the streams if that is a change
// for them, and removes the device-info files of devices that left.
func (r *resource) update(pool Pool, key, alias string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pool, r.key, r.alias = pool, key, alias
	r.devices = make(map[string]Device, len(pool.Devices))
	for _, d := range pool.Devices {
		if pod, forgotten := r.opts.Ledger.Forgotten(d.ID()); forgotten && d.Healthy {
			d.Healthy, d.Reason = false, fmt.Sprintf("it is attached to pod %q, of which the kubelet does not know any more: delete that pod", pod)
		}
		r.devices[d.ID()] = d
	}
	r.publish()
	return pruneDeviceInfo(r.opts.DeviceInfoDir, r.name, func(id string) bool { _, ok := r.devices[id]; return ok })
}

// withdraw makes the devices unhealthy until the next update.
func (r *resource) withdraw(ids []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range ids {
		if d, ok := r.devices[id]; ok {
			d.Healthy, d.Reason = false, "withdrawn while it is being configured"
			r.devices[id] = d
		}
	}
	r.publish()
}

// publish computes the list from the devices. mu is held.
func (r *resource) publish() {
	list := make([]listed, 0, len(r.devices))
	for _, id := range sortedKeys(r.devices) {
		l := listed{id: id, healthy: r.devices[id].Healthy, numa: r.devices[id].NUMANode}
		if r.pool.ExcludeTopology {
			l.numa = -1
		}
		list = append(list, l)
	}
	if r.version == 0 || !slices.Equal(list, r.list) {
		r.list = list
		r.version++
		r.notify()
	}
}

// notify wakes everyone who waits for a change. mu is held.
func (r *resource) notify() {
	close(r.news)
	r.news = make(chan struct{})
}

// told returns when every live stream has been sent the present list.
func (r *resource) told(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	want := r.version
	for r.behind(want) {
		news := r.news
		r.mu.Unlock()
		select {
		case <-news:
		case <-ctx.Done():
		}
		r.mu.Lock()
		if ctx.Err() != nil && r.behind(want) {
			return fmt.Errorf("tell the kubelet about the devices of resource %s: %w", r.name, context.Cause(ctx))
		}
	}
	return nil
}

func (r *resource) behind(version uint64) bool {
	for s := range r.streams {
		if s.sent < version {
			return true
		}
	}
	return false
}

// poke makes run look again.
func (r *resource) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// run keeps the resource served and registered until ctx ends.
func (r *resource) run(ctx context.Context) {
	defer close(r.done)
	var serving *session
	defer func() { serving.close() }()
	delay := backoffFirst
	for {
		err := r.converge(ctx, &serving)
		if ctx.Err() != nil {
			return
		}
		var again <-chan time.Time
		if r.report(err) {
			again = time.After(delay)
			delay = min(2*delay, backoffLast)
		} else {
			delay = backoffFirst
			if r.streamless() {
				again = time.After(streamWait)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-again:
			if err == nil {
				r.giveUpOnStream()
			}
		case <-r.wake:
			delay = backoffFirst
			select {
			case <-ctx.Done():
				return
			case <-time.After(settle):
			}
		}
	}
}

// report records the outcome of converge, logs it when it is news, and says
// whether it was a failure.
func (r *resource) report(err error) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil && (r.failure == nil || r.failure.Error() != err.Error()) {
		r.log.Info("not registered with the kubelet, retrying", "reason", err.Error())
	}
	r.failure = err
	return err != nil
}

func (r *resource) streamless() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.streams) == 0
}

// giveUpOnStream asks for a new registration if the last one brought no stream.
func (r *resource) giveUpOnStream() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.streams) == 0 {
		r.epoch++
	}
}

// converge does what is missing: the socket, then the registration.
func (r *resource) converge(ctx context.Context, serving **session) error {
	if !(*serving).intact() {
		(*serving).close()
		*serving = nil
		s, err := serve(r)
		if err != nil {
			return err
		}
		*serving = s
		r.mu.Lock()
		r.epoch++
		r.mu.Unlock()
	}
	kubelet := filepath.Join(r.opts.Dir, kubeletSocket)
	now, err := os.Lstat(kubelet)
	if err != nil {
		return fmt.Errorf("register with the kubelet, is it running? %w", err)
	}
	r.mu.Lock()
	epoch := r.epoch
	done := r.registered == epoch && sameSocket(r.kubelet, now)
	r.mu.Unlock()
	if done {
		return nil
	}
	if err := r.register(ctx, kubelet); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.registered, r.kubelet = epoch, now
	if r.epoch != epoch {
		r.poke()
	}
	return nil
}

// register announces the resource on the kubelet's socket. The kubelet calls
// our server back before it answers.
func (r *resource) register(ctx context.Context, kubelet string) error {
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+kubelet, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return fmt.Errorf("reach the kubelet at %s: %w", kubelet, err)
	}
	_, err = api.NewRegistrationClient(conn).Register(ctx, &api.RegisterRequest{
		Version:      api.Version,
		Endpoint:     filepath.Base(r.path),
		ResourceName: r.name,
		Options:      &api.DevicePluginOptions{GetPreferredAllocationAvailable: true},
	})
	if err = errors.Join(err, conn.Close()); err != nil {
		return fmt.Errorf("register with the kubelet at %s: %w", kubelet, err)
	}
	r.log.Info("registered with the kubelet")
	return nil
}

// listAndWatch sends the list now and whenever it changes.
func (r *resource) listAndWatch(out grpc.ServerStreamingServer[api.ListAndWatchResponse], stop <-chan struct{}) error {
	s := &stream{}
	r.mu.Lock()
	r.streams[s] = struct{}{}
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.streams, s)
		if len(r.streams) == 0 {
			r.epoch++
			r.poke()
		}
		r.notify()
	}()
	for {
		r.mu.Lock()
		list, version, news := r.list, r.version, r.news
		r.mu.Unlock()
		if version != s.sent {
			if err := out.Send(response(list)); err != nil {
				return err
			}
			r.mu.Lock()
			s.sent = version
			r.notify()
			r.mu.Unlock()
			continue
		}
		select {
		case <-news:
		case <-out.Context().Done():
			return nil
		case <-stop:
			return nil
		}
	}
}

func response(list []listed) *api.ListAndWatchResponse {
	out := &api.ListAndWatchResponse{Devices: make([]*api.Device, 0, len(list))}
	for _, l := range list {
		d := &api.Device{ID: l.id, Health: api.Unhealthy}
		if l.healthy {
			d.Health = api.Healthy
		}
		if l.numa >= 0 {
			d.Topology = &api.TopologyInfo{Nodes: []*api.NUMANode{{ID: int64(l.numa)}}}
		}
		out.Devices = append(out.Devices, d)
	}
	return out
}

// allocate answers for one container. It holds mu throughout, so that a
// withdrawal comes wholly before or wholly after it.
func (r *resource) allocate(ids []string) (*api.ContainerAllocateResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(ids) == 0 {
		return nil, status.Errorf(codes.InvalidArgument, "allocate %s: the request names no device", r.name)
	}
	fail := func(err error) error { return status.Errorf(codes.FailedPrecondition, "allocate %s: %v", r.name, err) }
	ids = slices.Compact(slices.Sorted(slices.Values(ids)))
	devices := make([]Device, 0, len(ids))
	known := make(map[string]facts, len(ids))
	for _, id := range ids {
		d, ok := r.devices[id]
		if !ok {
			return nil, fail(fmt.Errorf("device %s is not in the pool: recreate the pod to have it scheduled again", id))
		}
		if !d.Healthy {
			return nil, fail(fmt.Errorf("device %s is not healthy (%s): recreate the pod to have it scheduled again", id, d.Reason))
		}
		if err := r.opts.Exists(id); err != nil {
			return nil, fail(fmt.Errorf("device %s is not usable now (%w): recreate the pod to have it scheduled again, "+
				"and see the status of this node's SriovNetworkNodeState", id, err))
		}
		devices = append(devices, d)
		if d.Slot == "" {
			known[id] = readFacts(r.opts.SysFS, d)
		}
	}
	env, nodes, err := container(r.pool, r.name, r.key, r.alias, devices, known)
	if err != nil {
		return nil, fail(err)
	}
	out := &api.ContainerAllocateResponse{Envs: env}
	if err := r.nodes(out, devices, nodes); err != nil {
		return nil, fail(err)
	}
	exclusive := r.pool.RDMA || slices.ContainsFunc(devices, func(d Device) bool { return r.pool.userspace(d) || d.VDPA == host.VDPAVhost })
	if err := r.opts.Ledger.give(ids, r.name, exclusive, r.pool.RDMA); err != nil {
		return nil, fail(err)
	}
	for _, d := range devices {
		if d.Slot != "" {
			continue // the specification has no type for it
		}
		if err := writeDeviceInfo(r.opts.DeviceInfoDir, r.name, d.PCIAddress, deviceInfo(d, known[d.PCIAddress])); err != nil {
			return nil, fail(err)
		}
	}
	return out, nil
}

// nodes adds the devices' nodes to the answer, by CDI if that is wanted.
func (r *resource) nodes(out *api.ContainerAllocateResponse, devices []Device, nodes []deviceNodes) error {
	var all deviceNodes
	for i, own := range nodes {
		if r.opts.CDIDir == "" {
			for _, n := range own {
				all.add(n.GetHostPath(), n.GetContainerPath())
			}
			continue
		}
		if len(own) == 0 {
			continue // a specification must not be empty
		}
		d, err := writeCDI(r.opts.CDIDir, devices[i].ID(), own)
		if err != nil {
			return err
		}
		out.CdiDevices = append(out.CdiDevices, d)
	}
	out.Devices = all
	return nil
}
