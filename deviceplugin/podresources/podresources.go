package podresources

import (
	"context"
	"fmt"
	"strings"
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
	conn   *grpc.ClientConn
	prefix string
}

// New makes a client for the kubelet's pod-resources socket. It connects when
// it is first used, and again after the kubelet was restarted. Only devices of
// resources below prefix ("openshift.io") count: other device plugins may use
// PCI addresses as IDs, too.
func New(socket, prefix string) (*Client, error) {
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
	return &Client{conn: conn, prefix: prefix + "/"}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Allocated tells which pod, as "namespace/name", the device is allocated to; ok
// is false when there is none. An error means that it is not known.
func (c *Client) Allocated(ctx context.Context, pciAddress string) (pod string, ok bool, err error) {
	all, err := c.Devices(ctx)
	if err != nil {
		return "", false, fmt.Errorf("ask who has device %s: %w", pciAddress, err)
	}
	pod, ok = all[pciAddress]
	return pod, ok, nil
}

// Devices returns the pods, as "namespace/name", of all allocated devices.
func (c *Client) Devices(ctx context.Context) (map[string]string, error) {
	all, err := api.NewPodResourcesListerClient(c.conn).List(ctx, &api.ListPodResourcesRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask the kubelet's pod-resources API: %w", err)
	}
	return holders(all, c.prefix), nil
}

// holders maps the devices of resources below prefix to their pods.
func holders(all *api.ListPodResourcesResponse, prefix string) map[string]string {
	pods := make(map[string]string)
	for _, p := range all.GetPodResources() {
		for _, container := range p.GetContainers() {
			for _, d := range container.GetDevices() {
				if !strings.HasPrefix(d.GetResourceName(), prefix) {
					continue
				}
				for _, id := range d.GetDeviceIds() {
					pods[id] = p.GetNamespace() + "/" + p.GetName()
				}
			}
		}
	}
	return pods
}
