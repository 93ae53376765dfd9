package deviceplugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const patience = time.Minute // on a busy machine; a test that works does not need it

// kubelet is the kubelet's side of the protocol: a registration server that
// calls back as the real one does, and keeps the last list of every resource.
type kubelet struct {
	api.UnimplementedRegistrationServer
	t    *testing.T
	dir  string
	grpc *grpc.Server
	gone func() // removes the socket

	mu            sync.Mutex
	registrations map[string]int
	clients       map[string]api.DevicePluginClient
	lists         map[string][]*api.Device
	received      map[string]int
	ended         map[string]int
	conns         []*grpc.ClientConn
}

func startKubelet(t *testing.T, dir string) *kubelet {
	t.Helper()
	k := &kubelet{
		t: t, dir: dir, grpc: grpc.NewServer(),
		registrations: map[string]int{}, clients: map[string]api.DevicePluginClient{},
		lists: map[string][]*api.Device{}, received: map[string]int{}, ended: map[string]int{},
	}
	api.RegisterRegistrationServer(k.grpc, k)
	l, err := net.Listen("unix", filepath.Join(dir, kubeletSocket))
	if err != nil {
		t.Fatal(err)
	}
	// Go would remove the file when it gets to it, which may be the next kubelet's then.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	k.gone = sync.OnceFunc(func() { _ = os.Remove(filepath.Join(dir, kubeletSocket)) })
	go func() { _ = k.grpc.Serve(l) }()
	t.Cleanup(k.stop)
	return k
}

// stop ends it as a dying process does: connections break; the socket file is
// removed as the next kubelet would remove it.
func (k *kubelet) stop() {
	k.grpc.Stop()
	k.gone()
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range k.conns {
		_ = c.Close()
	}
	k.conns = nil
}

func (k *kubelet) Register(_ context.Context, req *api.RegisterRequest) (*api.Empty, error) {
	if req.GetVersion() != api.Version {
		return nil, fmt.Errorf("unsupported version %q", req.GetVersion())
	}
	client, conn, err := dial(filepath.Join(k.dir, req.GetEndpoint()))
	if err != nil {
		return nil, err
	}
	opts, err := client.GetDevicePluginOptions(context.Background(), &api.Empty{})
	if err != nil || !opts.GetGetPreferredAllocationAvailable() {
		return nil, errors.Join(err, errors.New("no preferred allocation"))
	}
	k.mu.Lock()
	k.registrations[req.GetResourceName()]++
	k.clients[req.GetResourceName()] = client
	k.conns = append(k.conns, conn)
	k.mu.Unlock()
	go k.watch(req.GetResourceName(), client)
	return &api.Empty{}, nil
}

func (k *kubelet) watch(resource string, client api.DevicePluginClient) {
	stream, err := client.ListAndWatch(context.Background(), &api.Empty{})
	for err == nil {
		var resp *api.ListAndWatchResponse
		if resp, err = stream.Recv(); err == nil {
			k.mu.Lock()
			k.lists[resource] = resp.GetDevices()
			k.received[resource]++
			k.mu.Unlock()
		}
	}
	k.mu.Lock()
	k.ended[resource]++
	k.mu.Unlock()
}

func dial(path string) (api.DevicePluginClient, *grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return api.NewDevicePluginClient(conn), conn, nil
}

// list renders the last list of a resource: "id health numa" per device.
func (k *kubelet) list(resource string) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	devices, ok := k.lists[resource]
	if !ok {
		return "none"
	}
	var out []string
	for _, d := range devices {
		s := d.GetID()[len(d.GetID())-4:] + " " + d.GetHealth()
		for _, n := range d.GetTopology().GetNodes() {
			s += fmt.Sprintf(" numa%d", n.GetID())
		}
		out = append(out, s)
	}
	return strings.Join(out, ",")
}

func (k *kubelet) count(of map[string]int, resource string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return of[resource]
}

func (k *kubelet) client(resource string) api.DevicePluginClient {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.clients[resource]
}

func (k *kubelet) allocate(resource string, ids ...string) (*api.ContainerAllocateResponse, error) {
	resp, err := k.client(resource).Allocate(context.Background(), &api.AllocateRequest{
		ContainerRequests: []*api.ContainerAllocateRequest{{DevicesIds: ids}},
	})
	if err != nil {
		return nil, err
	}
	return resp.GetContainerResponses()[0], nil
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within %s: %s", patience, what)
}

func eventuallyList(t *testing.T, k *kubelet, resource, want string) {
	t.Helper()
	for end := time.Now().Add(patience); k.list(resource) != want; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("kubelet's list of %s is %q, want %q", resource, k.list(resource), want)
		}
	}
}

// fixture is a Manager over temporary directories.
type fixture struct {
	*Manager
	dir, info, sys string
	stop           func() // ends the Manager

	mu       sync.Mutex
	missing  map[string]error  // answers of Exists
	attached map[string]string // pods, by device
	pods     map[string]string // that the kubelet tells of, by device
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	// Short, because socket addresses are.
	base, err := os.MkdirTemp("", "dp")
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{dir: base + "/k", info: base + "/i/dp", sys: base + "/sys", missing: map[string]error{}, attached: map[string]string{}}
	if err := os.Mkdir(f.dir, 0o750); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	f.start(t)
	return f
}

// start runs a Manager over the fixture's directories.
func (f *fixture) start(t *testing.T) {
	t.Helper()
	ledger, err := OpenLedger(filepath.Join(filepath.Dir(f.dir), "devices.json"), func(id string) (string, bool) {
		f.mu.Lock()
		defer f.mu.Unlock()
		pod, ok := f.attached[id]
		return pod, ok
	}, func(context.Context) (map[string]string, error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		return maps.Clone(f.pods), nil
	}, testr.New(t))
	if err != nil {
		t.Fatal(err)
	}
	m, err := New(Options{
		Prefix: "example.com", Dir: f.dir, DeviceInfoDir: f.info, SysFS: f.sys, Ledger: ledger, Log: testr.New(t),
		Exists: func(pci string) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.missing[pci]
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	f.Manager = m
	m.grace = 50 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(f.stop)
}

func (f *fixture) advertise(t *testing.T, pools ...Pool) {
	t.Helper()
	if err := f.Advertise(t.Context(), pools); err != nil {
		t.Fatal(err)
	}
}

func vf(n int) Device {
	return Device{
		PCIAddress: fmt.Sprintf("0000:01:00.%d", n), PFAddress: "0000:01:00.0", PFName: "ens1f0",
		VFIndex: n - 1, Driver: "testvf", NUMANode: 0, Healthy: true,
	}
}

func pool(name string, devices ...Device) Pool {
	return Pool{Resource: name, DeviceType: "netdevice", Devices: devices}
}

func (f *fixture) sockets(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if e.Name() != kubeletSocket {
			out = append(out, e.Name())
		}
	}
	slices.Sort(out)
	return out
}

// inHand are the devices that somebody has.
func (f *fixture) inHand() string {
	held, _ := f.opts.Ledger.Held()
	return strings.Join(sortedKeys(held), " ")
}
