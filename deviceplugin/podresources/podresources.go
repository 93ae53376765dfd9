package podresources

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/podresources/v1"
)

// maxAnswer bounds an answer of the kubelet, which lists all pods of the node.
const maxAnswer = 16 << 20

// Client asks one kubelet. It is safe for concurrent use.
type Client struct {
	conn       *grpc.ClientConn
	checkpoint string
	namespace  string
	ours       func(resource string) bool

	mu   sync.Mutex
	pods pods
}

// New makes a client for the kubelet's pod-resources socket and the checkpoint of its
// device manager. It connects when it is first used, and again after the kubelet was
// restarted. Only devices of our resources count: other device plugins may use PCI
// addresses as IDs, too. The caller is a pod in the namespace: a kubelet that tells of no
// pod there has just started and does not know its pods yet.
func New(socket, checkpoint, namespace string, ours func(resource string) bool) (*Client, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(),
		// The default would let minutes pass after a long absence of the kubelet.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
	if err != nil {
		return nil, fmt.Errorf("reach the kubelet at %s: %w", socket, err)
	}
	return &Client{conn: conn, checkpoint: checkpoint, namespace: namespace, ours: ours}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// ask reads the checkpoint and asks the kubelet, in this order: of what is allocated in
// between the kubelet tells the name.
func (c *Client) ask(ctx context.Context) (written []allocation, all *api.ListPodResourcesResponse, err error) {
	if written, err = readCheckpoint(c.checkpoint); err != nil {
		return nil, nil, err
	}
	all, err = api.NewPodResourcesListerClient(c.conn).List(ctx, &api.ListPodResourcesRequest{})
	if err != nil {
		return nil, nil, fmt.Errorf("ask the kubelet's pod-resources API: %w", err)
	}
	if !slices.ContainsFunc(all.GetPodResources(), func(p *api.PodResources) bool { return p.GetNamespace() == c.namespace }) {
		return nil, nil, fmt.Errorf("the kubelet has just started: it does not tell of the agent's own pod in namespace %s yet", c.namespace)
	}
	return written, all, nil
}

// Devices returns the pods of all allocated devices, as "namespace/name", or for a
// device that only the checkpoint tells of as holder.Unnamed has it. Of these some may
// be of pods that are gone, until the kubelet writes the checkpoint anew.
func (c *Client) Devices(ctx context.Context) (map[string]string, error) {
	written, all, err := c.ask(ctx)
	if err != nil {
		return nil, err
	}
	devices, live := holders(all, c.ours)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pods.unnamed(devices, live, written, c.ours)
	return devices, nil
}

// Pod returns the devices of one pod by resource, of whatever prefix: those of its
// first container first, and those of one container sorted; then, sorted, those of init
// containers that end. That is the order in which networks take them. Without the UID
// these are not known, and those of another pod of the name are not told apart.
func (c *Client) Pod(ctx context.Context, namespace, name, uid string) (map[string][]string, error) {
	written, all, err := c.ask(ctx)
	if err != nil {
		return nil, fmt.Errorf("learn the devices of pod %s/%s: %w", namespace, name, err)
	}
	return devices(all, written, namespace, name, uid), nil
}

func devices(all *api.ListPodResourcesResponse, written []allocation, namespace, name, uid string) map[string][]string {
	type device struct{ resource, id string }
	own, others := map[device]bool{}, map[device]bool{} // by the checkpoint
	for _, a := range written {
		of := others
		if a.PodUID == uid {
			of = own
		}
		for _, ids := range a.DeviceIDs {
			for _, id := range ids {
				of[device{a.ResourceName, id}] = true
			}
		}
	}
	byResource := make(map[string][]string)
	add := func(devices map[device]bool) {
		for _, d := range slices.SortedFunc(maps.Keys(devices), func(a, b device) int { return strings.Compare(a.id, b.id) }) {
			// A restartable init container's devices are its successors', too.
			if !slices.Contains(byResource[d.resource], d.id) {
				byResource[d.resource] = append(byResource[d.resource], d.id)
			}
		}
	}
	for _, p := range all.GetPodResources() {
		if p.GetNamespace() != namespace || p.GetName() != name {
			continue
		}
		for _, container := range p.GetContainers() {
			has := map[device]bool{}
			for _, d := range container.GetDevices() {
				for _, id := range d.GetDeviceIds() {
					d := device{d.GetResourceName(), id}
					if uid == "" || own[d] || !others[d] {
						has[d] = true
					}
				}
			}
			add(has)
		}
	}
	add(own)
	return byResource
}

// holders maps the devices of our resources to their pods, and tells of all pods.
func holders(all *api.ListPodResourcesResponse, ours func(string) bool) (devices map[string]string, live map[string]bool) {
	devices, live = make(map[string]string), make(map[string]bool)
	for _, p := range all.GetPodResources() {
		name := p.GetNamespace() + "/" + p.GetName()
		live[name] = true
		for _, container := range p.GetContainers() {
			for _, d := range container.GetDevices() {
				if !ours(d.GetResourceName()) {
					continue
				}
				for _, id := range d.GetDeviceIds() {
					devices[id] = name
				}
			}
		}
	}
	return devices, live
}
