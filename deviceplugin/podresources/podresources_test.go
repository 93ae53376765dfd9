package podresources

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	api "k8s.io/kubelet/pkg/apis/podresources/v1"
)

type kubelet struct {
	api.UnimplementedPodResourcesListerServer
	pods []*api.PodResources
}

func (k *kubelet) List(context.Context, *api.ListPodResourcesRequest) (*api.ListPodResourcesResponse, error) {
	return &api.ListPodResourcesResponse{PodResources: k.pods}, nil
}

func pod(name, resource string, ids ...string) *api.PodResources {
	return &api.PodResources{Namespace: "ns", Name: name, Containers: []*api.ContainerResources{
		{Name: "none"},
		{Name: "some", Devices: []*api.ContainerDevices{{ResourceName: resource, DeviceIds: ids}}},
	}}
}

func TestAllocated(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	c, err := New(socket, "example.com")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, _, err = c.Allocated(t.Context(), "0000:01:00.1"); err == nil || !strings.Contains(err.Error(), "0000:01:00.1") {
		t.Errorf("without a kubelet: %v", err)
	}

	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	api.RegisterPodResourcesListerServer(s, &kubelet{pods: []*api.PodResources{
		pod("foreign", "example.community/nics", "0000:01:00.3"),
		pod("a", "example.com/nics", "0000:01:00.1"),
		pod("b", "example.com/more", "0000:02:00.0", "0000:02:00.1"),
	}})
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	// The same client, without being told that the kubelet came.
	for id, want := range map[string]string{
		"0000:01:00.1": "ns/a true", "0000:02:00.1": "ns/b true", "0000:01:00.3": " false", "0000:09:00.0": " false",
	} {
		name, ok, err := c.allocatedWhenReady(t, id)
		if got := name + map[bool]string{true: " true", false: " false"}[ok]; err != nil || got != want {
			t.Errorf("%s: %s, %v; want %s", id, got, err, want)
		}
	}
}

// allocatedWhenReady waits for the connection, which gRPC retries by itself.
func (c *Client) allocatedWhenReady(t *testing.T, id string) (string, bool, error) {
	t.Helper()
	c.conn.Connect()
	for state := c.conn.GetState(); state.String() != "READY"; state = c.conn.GetState() {
		if !c.conn.WaitForStateChange(t.Context(), state) {
			t.Fatal("no connection")
		}
		c.conn.Connect()
	}
	return c.Allocated(t.Context(), id)
}
