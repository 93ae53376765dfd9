package enforce

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/client-go/util/workqueue"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/enforce/cluster"
	"github.com/sluice-network/sluice/cni/enforce/nft"
	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// Cluster is what is asked of the API server; *cluster.Cluster is it.
type Cluster interface {
	Synced() bool
	// Missing says what is not known, and why; nil when Synced.
	Missing() error
	Known(namespace, name string) (*cluster.Pod, bool)
	Pod(ctx context.Context, namespace, name, uid string, wait time.Duration) (*cluster.Pod, error)
}

// Options are what an Enforcer stands on.
type Options struct {
	Node      string
	Cluster   Cluster
	Engine    Engine
	OpenNetns func(path string) (*host.Netns, error)
	// Addresses are the node's own.
	Addresses func() ([]netip.Addr, error)
	API       API // where it is shown; nil for nowhere
	// Changed is called when Condition may be another one. Nil is nobody.
	Changed func()
	Log     logr.Logger
}

const (
	wait    = 2 * time.Second  // for what the API server has to tell to an ADD
	look    = time.Minute      // between looks at what no event tells of
	resync  = 10 * time.Minute // between audits of the index, of one network each
	workers = 4                // that apply generations
)

// Enforcer puts policy in force on the interfaces of one node. It is safe for concurrent
// use. It implements attach.Enforcer and cluster.Sink.
type Enforcer struct {
	Options
	queue   workqueue.TypedRateLimitingInterface[attach.Key]
	pods    workqueue.TypedRateLimitingInterface[string] // to be shown, namespace/name
	flush   chan struct{}
	metrics metrics

	mu     sync.Mutex
	index  *policy.Index
	own    map[string]*cluster.Pod // the node's, by namespace/name
	faces  map[attach.Key]*face
	faulty map[string]faulty  // policies, by what they are called in a State
	of     map[string][]*face // by pod
	cut    map[string]bool    // networks where connections are cut, by name
	synced bool               // the index knows all there is
	denied map[string]string  // pods that were refused, by namespace/name, and why
	next   string             // network, to be audited
	since  time.Time          // the first event that is not flushed; zero for none
}

// face is an interface of a pod.
type face struct {
	work sync.Mutex // on its rules; taken before the Enforcer's mu
	// Guarded by work.
	rules   bool             // there may be some
	cut     bool             // the VF may have no link
	loaded  bool             // they are an earlier agent's
	applied [2]*policy.State // what is in force; nil when that is not known
	counted nft.Counted      // as far as the metrics have it

	// Guarded by the Enforcer's mu.
	attach.Interface
	id      policy.ID
	ready   bool      // from then on it follows the policies
	told    bool      // status is true; else an earlier agent's may be
	changed time.Time // the first event that is not in force yet; zero for none
	status  InterfaceStatus
}

// New makes an Enforcer. Load, SetCluster and Run make it work.
func New(o Options) *Enforcer {
	e := &Enforcer{
		Options: o,
		queue:   workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[attach.Key](50*time.Millisecond, time.Minute)),
		pods:    workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](100*time.Millisecond, time.Minute)),
		flush:   make(chan struct{}, 1), metrics: newMetrics(),
		own: map[string]*cluster.Pod{}, faces: map[attach.Key]*face{}, faulty: map[string]faulty{}, of: map[string][]*face{}, denied: map[string]string{}, cut: map[string]bool{},
	}
	e.Engine.Report(e.tampered)
	e.index = policy.NewIndex(func(p policy.Pod) bool { return p.Node == e.Node })
	return e
}

// Load takes up interfaces that were there before this agent, or this call. What is in
// force on them stays so until the policies are known.
func (e *Enforcer) Load(interfaces []attach.Interface) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, i := range interfaces {
		f := e.add(i)
		f.rules, f.loaded, f.ready = true, true, true
		e.queue.Add(f.Key) // for nothing, as long as not all is known
	}
}

// Run keeps policy in force until ctx ends. Rules stay.
func (e *Enforcer) Run(ctx context.Context) error {
	var group sync.WaitGroup
	defer group.Wait()
	defer e.queue.ShutDown()
	defer e.pods.ShutDown()
	for range workers {
		group.Go(func() { work(ctx, e.queue, e.follow) })
	}
	if e.API != nil {
		group.Go(func() { work(ctx, e.pods, e.show) })
	}
	e.setNode()
	if !e.await(ctx, -1) {
		return nil
	}
	nodes, anew := time.NewTicker(look), time.NewTicker(resync)
	defer nodes.Stop()
	defer anew.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-e.flush:
			e.mu.Lock()
			e.take()
			e.mu.Unlock()
		case <-nodes.C:
			e.setNode()
		case <-anew.C:
			e.audit()
		}
	}
}
