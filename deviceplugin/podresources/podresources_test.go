package podresources

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
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

// Whatever the kubelet answers, a device counts only when a container has it from
// a resource below the prefix, and each that does counts.
func FuzzHolders(f *testing.F) {
	for _, answer := range []*api.ListPodResourcesResponse{
		{},
		{PodResources: []*api.PodResources{pod("a", "example.com/nics", "0000:01:00.1"), pod("b", "example.community/nics", "0000:01:00.2")}},
		{PodResources: []*api.PodResources{nil, {Containers: []*api.ContainerResources{{Devices: []*api.ContainerDevices{{DeviceIds: []string{""}}}}}}}},
	} {
		b, err := proto.Marshal(answer)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		answer := &api.ListPodResourcesResponse{}
		if proto.Unmarshal(b, answer) != nil {
			return
		}
		got := holders(answer, "example.com/")
		want := map[string]bool{}
		for _, p := range answer.GetPodResources() {
			for _, c := range p.GetContainers() {
				for _, d := range c.GetDevices() {
					for _, id := range d.GetDeviceIds() {
						if strings.HasPrefix(d.GetResourceName(), "example.com/") {
							want[id] = true
						}
					}
				}
			}
		}
		for id, pod := range got {
			if !want[id] || !strings.Contains(pod, "/") {
				t.Fatalf("device %q is said to be of pod %q", id, pod)
			}
		}
		if len(got) != len(want) {
			t.Fatalf("%d devices, want %d", len(got), len(want))
		}
	})
}
