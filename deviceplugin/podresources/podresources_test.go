package podresources

import (
	"context"
	"encoding/json"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	api "k8s.io/kubelet/pkg/apis/podresources/v1"

	"github.com/sluice-network/sluice/internal/holder"
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

func below(prefix string) func(string) bool {
	return func(resource string) bool { return strings.HasPrefix(resource, prefix) }
}

func TestDevices(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	checkpoint := filepath.Join(t.TempDir(), "kubelet_internal_checkpoint")
	c, err := New(socket, checkpoint, "agents", below("example.com/"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, err = c.Devices(t.Context()); err == nil || !strings.Contains(err.Error(), "pod-resources") {
		t.Errorf("without a kubelet: %v", err)
	}

	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	api.RegisterPodResourcesListerServer(s, &kubelet{pods: []*api.PodResources{
		{Namespace: "agents", Name: "agent"},
		pod("foreign", "example.community/nics", "0000:01:00.3"),
		pod("a", "example.com/nics", "0000:01:00.1"),
		pod("b", "example.com/more", "0000:02:00.0", "0000:02:00.1"),
	}})
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	// The same client, without being told that the kubelet came.
	want := map[string]string{"0000:01:00.1": "ns/a", "0000:02:00.0": "ns/b", "0000:02:00.1": "ns/b"}
	c.ready(t)
	if got, err := c.Devices(t.Context()); err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}

	if err := os.WriteFile(checkpoint, []byte(written), 0o600); err != nil {
		t.Fatal(err)
	}
	want["0000:05:00.1"], want["0000:05:00.2"] = "uid:1b4e28ba-2fa1-11d2-883f-0016d3cca427", "uid:1b4e28ba-2fa1-11d2-883f-0016d3cca427"
	if got, err := c.Devices(t.Context()); err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	if got, err := c.Pod(t.Context(), "ns", "init", "1b4e28ba-2fa1-11d2-883f-0016d3cca427"); err != nil || !slices.Equal(got["example.com/nics"], []string{"0000:05:00.1", "0000:05:00.2"}) {
		t.Errorf("a pod that only an init container has devices of: %v, %v", got, err)
	}
	if err := os.WriteFile(checkpoint, []byte(written[:len(written)/2]), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Pod(t.Context(), "ns", "a", "u"); err == nil || got != nil {
		t.Errorf("with half a checkpoint: %v, %v", got, err)
	}
	if _, err := c.Devices(t.Context()); err == nil || !strings.Contains(err.Error(), checkpoint) {
		t.Errorf("with half a checkpoint: %v", err)
	}
}

// A kubelet has its socket before it has its pods.
func TestAKubeletThatJustStartedSaysNothing(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	api.RegisterPodResourcesListerServer(s, &kubelet{pods: []*api.PodResources{pod("static", "example.com/nics", "0000:01:00.1")}})
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	c, err := New(socket, filepath.Join(t.TempDir(), "none"), "agents", below("example.com/"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	c.ready(t)
	if got, err := c.Devices(t.Context()); err == nil || got != nil || !strings.Contains(err.Error(), "namespace agents") {
		t.Errorf("%v, %v", got, err)
	}
}

// written is a checkpoint as a kubelet wrote it, but for the answers of plugins.
const written = `{"Data":{"PodDeviceEntries":[` +
	`{"PodUID":"0d1c1f0a-4f4b-4d3f-9c0c-6a2f1f6f3a11","ContainerName":"c","ResourceName":"example.com/nics","DeviceIDs":{"-1":["0000:01:00.1"]},"AllocResp":"CgA="},` +
	`{"PodUID":"1b4e28ba-2fa1-11d2-883f-0016d3cca427","ContainerName":"init","ResourceName":"example.com/nics","DeviceIDs":{"0":["0000:05:00.1"],"1":["0000:05:00.2"]},"AllocResp":"CgA="},` +
	`{"PodUID":"1b4e28ba-2fa1-11d2-883f-0016d3cca427","ContainerName":"init","ResourceName":"example.community/gpus","DeviceIDs":{"0":["gpu-1"]},"AllocResp":null}` +
	`],"RegisteredDevices":{"example.com/nics":["0000:01:00.1","0000:05:00.1","0000:05:00.2"]}},"Checksum":3722385071}`

func TestParseCheckpoint(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       int // entries
		err        string
	}{
		{"a kubelet's", written, 3, ""},
		{"nothing allocated", `{"Data":{"PodDeviceEntries":null,"RegisteredDevices":{}},"Checksum":1}`, 0, ""},
		{"a field more", `{"Data":{"PodDeviceEntries":[{"PodUID":"u","ContainerName":"c","ResourceName":"r","DeviceIDs":{},"New":1}]},"New":1}`, 1, ""},
		{"empty", "", 0, "unexpected end"},
		{"an empty object", "{}", 0, "format is not known"},
		{"null", "null", 0, "format is not known"},
		{"another name", `{"Data":{"Entries":[]}}`, 0, "format is not known"},
		{"without UID", `{"Data":{"PodDeviceEntries":[{"UID":"u","ResourceName":"r","DeviceIDs":{}}]}}`, 0, "entry 0"},
		{"without devices", `{"Data":{"PodDeviceEntries":[{"PodUID":"u","ResourceName":"r"}]}}`, 0, "entry 0"},
		{"devices as before 1.20", `{"Data":{"PodDeviceEntries":[{"PodUID":"u","ResourceName":"r","DeviceIDs":["d"]}]}}`, 0, "cannot unmarshal array"},
		{"two objects", `{"Data":{"PodDeviceEntries":null}}{}`, 0, "after top-level value"},
	} {
		got, err := parseCheckpoint([]byte(c.text))
		if len(got) != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %d entries, %v", c.name, len(got), err)
		}
	}
}

// A pod that is gone stays in the checkpoint for a while. One that the kubelet named
// before, and names no more, holds nothing.
func TestPodsThatAreGone(t *testing.T) {
	entry := func(uid string, devices ...string) allocation {
		return allocation{PodUID: uid, ResourceName: "r/a", DeviceIDs: map[int64][]string{-1: devices}}
	}
	var p pods
	for _, step := range []struct {
		what    string
		listed  map[string]string // devices of the kubelet's answer
		live    string            // another pod of it
		written []allocation
		want    map[string]string // besides those listed
	}{
		{"never seen before: it may be alive", nil, "", []allocation{entry("u1", "d1")}, map[string]string{"d1": "uid:u1"}},
		{"an init container's beside a container's", map[string]string{"d1": "ns/a"}, "", []allocation{entry("u1", "d1", "d2")}, map[string]string{"d2": "uid:u1"}},
		{"its init container only", nil, "ns/a", []allocation{entry("u1", "d2")}, map[string]string{"d2": "uid:u1"}},
		{"gone", nil, "", []allocation{entry("u1", "d2")}, nil},
		{"a namesake that has no device yet", nil, "ns/a", []allocation{entry("u1", "d2")}, map[string]string{"d2": "uid:u1"}},
		{"a namesake", map[string]string{"d3": "ns/a"}, "", []allocation{entry("u1", "d2"), entry("u2", "d3", "d4")}, map[string]string{"d4": "uid:u2"}},
		{"forgotten", nil, "", nil, nil},
		{"not seen for long", nil, "", []allocation{entry("u1", "d2")}, map[string]string{"d2": "uid:u1"}},
	} {
		got, live := maps.Clone(step.listed), map[string]bool{step.live: true}
		if got == nil {
			got = map[string]string{}
		}
		want := maps.Clone(got)
		maps.Copy(want, step.want)
		for _, name := range step.listed {
			live[name] = true
		}
		if p.unnamed(got, live, step.written, below("r/")); !maps.Equal(got, want) {
			t.Errorf("%s: %v, want %v", step.what, got, want)
		}
	}
}

// Whatever the file has, an entry that is taken is whole, and each of its devices is
// held by somebody.
func FuzzParseCheckpoint(f *testing.F) {
	for _, seed := range []string{written, `{"Data":{"PodDeviceEntries":null}}`, `{"Data":{"PodDeviceEntries":[{"PodUID":"u","ResourceName":"r","DeviceIDs":["d"]}]}}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := parseCheckpoint(b)
		if err != nil {
			return
		}
		if !json.Valid(b) {
			t.Fatal("read what is no JSON")
		}
		held := map[string]string{}
		(&pods{}).unnamed(held, nil, all, below(""))
		for _, a := range all {
			for _, ids := range a.DeviceIDs {
				for _, id := range ids {
					if len(held[id]) <= len(holder.Unnamed("")) {
						t.Fatalf("device %q is held by %q", id, held[id])
					}
				}
			}
		}
	})
}

// ready waits for the connection, which gRPC retries by itself.
func (c *Client) ready(t *testing.T) {
	t.Helper()
	c.conn.Connect()
	for state := c.conn.GetState(); state.String() != "READY"; state = c.conn.GetState() {
		if !c.conn.WaitForStateChange(t.Context(), state) {
			t.Fatal("no connection")
		}
		c.conn.Connect()
	}
}

// Networks take devices in this order, whatever the kubelet's is within a container.
func TestDevicesOfOnePod(t *testing.T) {
	answer := &api.ListPodResourcesResponse{PodResources: []*api.PodResources{
		pod("other", "x/nics", "0000:09:00.0"),
		{Namespace: "ns", Name: "p", Containers: []*api.ContainerResources{
			{Name: "z", Devices: []*api.ContainerDevices{{ResourceName: "x/nics", DeviceIds: []string{"0000:02:00.1"}}, {ResourceName: "x/nics", DeviceIds: []string{"0000:02:00.0"}}, {ResourceName: "y/nics", DeviceIds: []string{"a"}}}},
			{Name: "a", Devices: []*api.ContainerDevices{{ResourceName: "x/nics", DeviceIds: []string{"0000:01:00.0", "0000:02:00.0"}}}},
		}},
		pod("p", "x/nics", "0000:05:00.0"), // is ending, and its name is another's
		pod("lone", "x/nics"),
	}}
	entry := func(uid, resource string, ids ...string) allocation {
		return allocation{PodUID: uid, ResourceName: resource, DeviceIDs: map[int64][]string{0: ids[:1], 1: ids[1:]}}
	}
	written := []allocation{
		entry("u1", "x/nics", "0000:02:00.1", "0000:02:00.0"), entry("u1", "x/nics", "0000:02:00.0", "0000:01:00.0"),
		entry("u1", "x/nics", "0000:01:00.0", "0000:03:00.1", "0000:00:00.3"), entry("u1", "z/nics", "only-init"), // of init containers
		entry("u0", "x/nics", "0000:05:00.0"), entry("u2", "z/nics", "b", "a"),
	}
	for _, c := range []struct {
		name, uid string
		want      map[string][]string
	}{
		{"p", "u1", map[string][]string{"x/nics": {"0000:02:00.0", "0000:02:00.1", "0000:01:00.0", "0000:00:00.3", "0000:03:00.1"}, "y/nics": {"a"}, "z/nics": {"only-init"}}},
		{"p", "", map[string][]string{"x/nics": {"0000:02:00.0", "0000:02:00.1", "0000:01:00.0", "0000:05:00.0"}, "y/nics": {"a"}}},
		{"lone", "u2", map[string][]string{"z/nics": {"a", "b"}}},
		{"lone", "u3", map[string][]string{}},
	} {
		if got := devices(answer, written, "ns", c.name, c.uid); !maps.EqualFunc(got, c.want, slices.Equal) {
			t.Errorf("%s with UID %q: %v, want %v", c.name, c.uid, got, c.want)
		}
	}
}

// Whatever the kubelet answers, a device counts only when a container has it from
// a resource of ours, and each that does counts.
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
		got, _ := holders(answer, below("example.com/"))
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
