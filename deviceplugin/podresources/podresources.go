package podresources

import (
	"context"
	"fmt"
	"slices"
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

// Devices returns the pods of all allocated devices, as "namespace/name", or for a
// device that only the checkpoint tells of as life.UnnamedPod and the UID. Of these some may
// be of pods that are gone, until the kubelet writes the checkpoint anew.
func (c *Client) Devices(ctx context.Context) (map[string]string, error) {
	// First: of what is allocated in between List tells the name.
	written, err := readCheckpoint(c.checkpoint)
	if err != nil {
		return nil, err
	}
	all, err := api.NewPodResourcesListerClient(c.conn).List(ctx, &api.ListPodResourcesRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask the kubelet's pod-resources API: %w", err)
	}
	if !slices.ContainsFunc(all.GetPodResources(), func(p *api.PodResources) bool { return p.GetNamespace() == c.namespace }) {
		return nil, fmt.Errorf("the kubelet has just started: it does not tell of the agent's own pod in namespace %s yet", c.namespace)
	}
	devices, live := holders(all, c.ours)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pods.unnamed(devices, live, written, c.ours)
	return devices, nil
}

// Pod returns the devices of one pod by resource, of whatever prefix: those of its
// first container first, and those of one container sorted. That is the order in
// which networks take them.
func (c *Client) Pod(ctx context.Context, namespace, name string) (map[string][]string, error) {
	all, err := api.NewPodResourcesListerClient(c.conn).List(ctx, &api.ListPodResourcesRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask the kubelet's pod-resources API for the devices of pod %s/%s: %w", namespace, name, err)
	}
	return devices(all, namespace, name), nil
}

func devices(all *api.ListPodResourcesResponse, namespace, name string) map[string][]string {
	byResource := make(map[string][]string)
	for _, p := range all.GetPodResources() {
		if p.GetNamespace() != namespace || p.GetName() != name {
			continue
		}
		for _, container := range p.GetContainers() {
			// The kubelet tells the devices of a resource once for each NUMA node.
			own := make(map[string][]string)
			for _, d := range container.GetDevices() {
				own[d.GetResourceName()] = append(own[d.GetResourceName()], d.GetDeviceIds()...)
			}
			for resource, ids := range own {
				slices.Sort(ids)
				for _, id := range ids {
					// A restartable init container's devices are its successors', too.
					if !slices.Contains(byResource[resource], id) {
						byResource[resource] = append(byResource[resource], id)
					}
				}
			}
		}
	}
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
