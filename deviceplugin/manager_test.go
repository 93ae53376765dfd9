package deviceplugin

import (
	"context"
	"errors"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

const nics = "example.com/nics"

func TestAdvertisedDevicesReachTheKubelet(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	sick, nowhere := vf(2), vf(3)
	sick.Healthy = false
	nowhere.NUMANode = -1
	f.advertise(t, pool("nics", nowhere, vf(1), sick)) // out of order on purpose
	eventuallyList(t, k, nics, "00.1 Healthy numa0,00.2 Unhealthy numa0,00.3 Healthy")

	hidden := pool("nics", vf(1))
	hidden.ExcludeTopology = true
	f.advertise(t, hidden)
	eventuallyList(t, k, nics, "00.1 Healthy")
	if n := k.count(k.registrations, nics); n != 1 {
		t.Errorf("registered %d times, want once: devices come and go without registration", n)
	}
}

func TestUnchangedListIsNotSentAgain(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	f.advertise(t, pool("nics", vf(1)))
	eventuallyList(t, k, nics, "00.1 Healthy numa0")
	f.advertise(t, pool("nics", vf(1)))
	f.advertise(t, pool("nics", vf(1), vf(2)))
	eventuallyList(t, k, nics, "00.1 Healthy numa0,00.2 Healthy numa0")
	if n := k.count(k.received, nics); n != 2 {
		t.Errorf("kubelet received %d lists, want 2", n)
	}
}

func TestAnUnchangedListIsRepeatedWhenAsked(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	f.advertise(t, pool("nics", vf(1)))
	eventuallyList(t, k, nics, "00.1 Healthy numa0")
	before := k.count(k.received, nics)
	f.Repeat()
	eventually(t, "the list is repeated", func() bool { return k.count(k.received, nics) == before+1 })
	if got := k.list(nics); got != "00.1 Healthy numa0" {
		t.Errorf("the kubelet was sent %s", got)
	}
}

func TestKubeletStartsLast(t *testing.T) {
	f := newFixture(t)
	f.advertise(t, pool("nics", vf(1)))
	eventually(t, "status tells that the kubelet is absent", func() bool {
		s := f.Status()
		return len(s) == 1 && s[0].Err != nil && strings.Contains(s[0].Err.Error(), "register with the kubelet")
	})
	k := startKubelet(t, f.dir)
	eventuallyList(t, k, nics, "00.1 Healthy numa0")
	eventually(t, "status is good", func() bool { s := f.Status(); return s[0].Err == nil && s[0].Streams == 1 })
}

func TestKubeletRestart(t *testing.T) {
	for _, wipes := range []bool{true, false} {
		f := newFixture(t)
		k := startKubelet(t, f.dir)
		f.advertise(t, pool("nics", vf(1)), pool("more", vf(2)))
		eventuallyList(t, k, nics, "00.1 Healthy numa0")
		eventuallyList(t, k, "example.com/more", "00.2 Healthy numa0")
		k.stop()
		if wipes { // as the kubelet does before it listens
			for _, s := range f.sockets(t) {
				if err := os.Remove(filepath.Join(f.dir, s)); err != nil {
					t.Fatal(err)
				}
			}
		}
		k = startKubelet(t, f.dir)
		eventuallyList(t, k, nics, "00.1 Healthy numa0")
		eventuallyList(t, k, "example.com/more", "00.2 Healthy numa0")
		if _, err := k.allocate(nics, "0000:01:00.1"); err != nil {
			t.Errorf("wipes=%v: %v", wipes, err)
		}
	}
}

// However often the kubelet comes and goes, the last one is told everything, once.
func TestKubeletRestartStorm(t *testing.T) {
	f := newFixture(t)
	f.advertise(t, pool("nics", vf(1)), pool("more", vf(2)))
	var k *kubelet
	for i := range 30 {
		k = startKubelet(t, f.dir)
		if i%3 == 0 {
			eventually(t, "registered", func() bool { return k.client(nics) != nil })
		}
		if i < 29 {
			k.stop()
		}
		if i%2 == 0 {
			for _, s := range f.sockets(t) {
				_ = os.Remove(filepath.Join(f.dir, s)) // the resource may be making it anew
			}
		}
	}
	f.advertise(t, pool("nics", vf(1), vf(3)), pool("more", vf(2)))
	eventuallyList(t, k, nics, "00.1 Healthy numa0,00.3 Healthy numa0")
	eventuallyList(t, k, "example.com/more", "00.2 Healthy numa0")
	eventually(t, "one stream each", func() bool {
		for _, s := range f.Status() {
			if s.Err != nil || s.Streams != 1 {
				return false
			}
		}
		return true
	})
	if _, err := k.allocate(nics, "0000:01:00.3"); err != nil {
		t.Error(err)
	}
}

func TestKubeletSocketReplacedUnderLiveStream(t *testing.T) {
	f := newFixture(t)
	old := startKubelet(t, f.dir)
	f.advertise(t, pool("nics", vf(1)))
	eventuallyList(t, old, nics, "00.1 Healthy numa0")
	if err := os.Remove(filepath.Join(f.dir, kubeletSocket)); err != nil {
		t.Fatal(err)
	}
	k := startKubelet(t, f.dir)
	eventuallyList(t, k, nics, "00.1 Healthy numa0")
	// Both streams are live and both are told.
	f.advertise(t, pool("nics", vf(1), vf(2)))
	eventuallyList(t, old, nics, "00.1 Healthy numa0,00.2 Healthy numa0")
	eventuallyList(t, k, nics, "00.1 Healthy numa0,00.2 Healthy numa0")
	if s := f.Status(); s[0].Streams != 2 {
		t.Errorf("%d streams, want 2", s[0].Streams)
	}
}

func TestOwnSocketRemoved(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	f.advertise(t, pool("nics", vf(1)))
	eventuallyList(t, k, nics, "00.1 Healthy numa0")
	if err := os.Remove(socketPath(f.dir, nics)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "registered again", func() bool { return k.count(k.registrations, nics) == 2 })
	eventually(t, "socket is back", func() bool { return len(f.sockets(t)) == 1 })
	eventually(t, "the old stream ends", func() bool { return k.count(k.ended, nics) == 1 })
}

func TestLostStreamIsRegisteredAgain(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	f.advertise(t, pool("nics", vf(1)))
	eventuallyList(t, k, nics, "00.1 Healthy numa0")
	k.mu.Lock()
	_ = k.conns[0].Close()
	k.mu.Unlock()
	eventually(t, "registered again", func() bool { return k.count(k.registrations, nics) == 2 })
}

func TestWithdrawIsToldAndEndsWithAdvertise(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	f.advertise(t, pool("nics", vf(1), vf(2)))
	eventuallyList(t, k, nics, "00.1 Healthy numa0,00.2 Healthy numa0")
	if err := f.Withdraw(t.Context(), []string{"0000:01:00.1", "0000:09:00.0"}); err != nil {
		t.Fatal(err)
	}
	// What was sent when Withdraw returned may still be on its way.
	eventuallyList(t, k, nics, "00.1 Unhealthy numa0,00.2 Healthy numa0")
	_, err := k.allocate(nics, "0000:01:00.1")
	wantError(t, err, nics, "0000:01:00.1", "withdrawn", "recreate the pod")
	f.advertise(t, pool("nics", vf(1), vf(2)))
	if _, err := k.allocate(nics, "0000:01:00.1"); err != nil {
		t.Error(err)
	}
}

func TestWithdrawWaitsForEveryStream(t *testing.T) {
	f := newFixture(t)
	f.advertise(t, pool("nics", vf(1)))
	// A stream that has not been sent the change yet.
	r := f.resources[nics]
	s := &stream{}
	r.mu.Lock()
	r.streams[s] = struct{}{}
	s.sent = r.version
	r.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := f.Withdraw(ctx, []string{"0000:01:00.1"})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Withdraw: %v, want it to wait", err)
	}
	done := make(chan error)
	go func() { done <- f.Withdraw(t.Context(), []string{"0000:01:00.1"}) }()
	r.mu.Lock()
	s.sent = r.version
	r.notify()
	r.mu.Unlock()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestWithdrawWithoutKubelet(t *testing.T) {
	f := newFixture(t)
	f.advertise(t, pool("nics", vf(1)))
	if err := f.Withdraw(t.Context(), []string{"0000:01:00.1"}); err != nil {
		t.Error(err)
	}
}

func TestPoolDisappears(t *testing.T) {
	f := newFixture(t)
	f.grace = time.Hour
	k := startKubelet(t, f.dir)
	f.advertise(t, pool("nics", vf(1)))
	eventuallyList(t, k, nics, "00.1 Healthy numa0")
	f.advertise(t)
	eventuallyList(t, k, nics, "")
	if n := k.count(k.ended, nics); n != 0 {
		t.Error("stream ended before the grace")
	}
	// It may come back within the grace.
	f.advertise(t, pool("nics", vf(2)))
	eventuallyList(t, k, nics, "00.2 Healthy numa0")
	if n := k.count(k.registrations, nics); n != 1 || len(f.retiring) != 0 {
		t.Errorf("registered %d times, want once: coming back within the grace needs none; to end are %v", n, f.retiring)
	}

	f.grace = time.Millisecond
	f.advertise(t)
	eventually(t, "stream ends after the grace", func() bool { return k.count(k.ended, nics) == 1 })
	eventually(t, "socket and resource are gone", func() bool { return len(f.sockets(t)) == 0 && len(f.Status()) == 0 })
	f.advertise(t, pool("nics", vf(3)))
	eventuallyList(t, k, nics, "00.3 Healthy numa0")
}

func TestAllocateRefuses(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	sick := vf(2)
	sick.Healthy, sick.Reason = false, "PF ens1f0 has no carrier"
	f.missing["0000:01:00.3"] = errors.New("no such device")
	f.advertise(t, pool("nics", vf(1), sick, vf(3)))
	eventually(t, "registered", func() bool { return k.client(nics) != nil })
	for _, c := range []struct {
		name string
		ids  []string
		code codes.Code
		want []string
	}{
		{"unknown", []string{"0000:01:00.7"}, codes.FailedPrecondition, []string{nics, "0000:01:00.7", "not in the pool", "recreate the pod"}},
		{"one of two unknown", []string{"0000:01:00.1", "0000:01:00.7"}, codes.FailedPrecondition, []string{"0000:01:00.7"}},
		{"unhealthy", []string{"0000:01:00.2"}, codes.FailedPrecondition, []string{nics, "0000:01:00.2", "PF ens1f0 has no carrier"}},
		{"gone", []string{"0000:01:00.3"}, codes.FailedPrecondition, []string{nics, "0000:01:00.3", "no such device", "SriovNetworkNodeState"}},
		{"none", nil, codes.InvalidArgument, []string{nics, "no device"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := k.allocate(nics, c.ids...)
			if status.Code(err) != c.code {
				t.Errorf("code %v, want %v", status.Code(err), c.code)
			}
			wantError(t, err, c.want...)
		})
	}
	if got := f.inHand(); got != "" {
		t.Errorf("refused allocations were written down: %s", got)
	}
	if entries, _ := os.ReadDir(f.info); len(entries) > 0 {
		t.Errorf("refused allocations left device-info files: %v", entries)
	}
}

func TestAllocateGivesEachDeviceOnceInOrder(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	f.advertise(t, pool("nics", vf(1), vf(2)))
	eventually(t, "registered", func() bool { return k.client(nics) != nil })
	resp, err := k.allocate(nics, "0000:01:00.2", "0000:01:00.1", "0000:01:00.2")
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.GetEnvs()["PCIDEVICE_EXAMPLE_COM_NICS"]; got != "0000:01:00.1,0000:01:00.2" {
		t.Errorf("environment %q", got)
	}
	if got := f.inHand(); got != "0000:01:00.1 0000:01:00.2" {
		t.Errorf("written down as allocated: %s", got)
	}
}

func TestDeviceInfoLivesAsLongAsTheDeviceIsInThePool(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	f.advertise(t, pool("nics", vf(1), vf(2)))
	eventually(t, "registered", func() bool { return k.client(nics) != nil })
	if _, err := k.allocate(nics, "0000:01:00.1", "0000:01:00.2"); err != nil {
		t.Fatal(err)
	}
	file := func(n string) string { return filepath.Join(f.info, "example.com-nics-0000:01:00."+n+"-device.json") }
	b, err := os.ReadFile(file("1"))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"type":"pci","version":"1.1.0","pci":{"pci-address":"0000:01:00.1","pf-pci-address":"0000:01:00.0"}}`
	if string(b) != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
	if st, err := os.Stat(f.info); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("directory: %v %v", st.Mode(), err)
	}

	f.stop()
	f.start(t)
	if _, err := os.Stat(file("1")); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	other := filepath.Join(f.info, "example.com-nics-fast-0000:01:00.1-device.json")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.advertise(t, pool("nics", vf(2)))
	if _, err := os.Stat(file("1")); !os.IsNotExist(err) {
		t.Errorf("file of a device that left: %v", err)
	}
	for _, path := range []string{file("2"), other} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
}

func TestStopRemovesSockets(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	f.advertise(t, pool("nics", vf(1)), pool("more", vf(2)))
	eventuallyList(t, k, nics, "00.1 Healthy numa0")
	f.stop()
	if left := f.sockets(t); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	eventually(t, "streams end", func() bool { return k.count(k.ended, nics) == 1 })
	if err := f.Advertise(t.Context(), nil); err == nil {
		t.Error("Advertise after shutdown must fail")
	}
}

func TestStaleSocketsOfAKilledAgentAreRemoved(t *testing.T) {
	f := newFixture(t)
	f.stop()
	for _, name := range []string{"sluice_example.com_old.sock", "foreign.sock"} {
		if err := os.WriteFile(filepath.Join(f.dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f.start(t)
	if got := f.sockets(t); len(got) != 1 || got[0] != "foreign.sock" {
		t.Errorf("sockets: %v, want only the foreign one", got)
	}
}

func TestRunFailsWhenTheDirectoryIsRemoved(t *testing.T) {
	dir := t.TempDir() + "/k"
	if err := os.Mkdir(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	m, err := New(Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- m.Run(t.Context()) }()
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	wantError(t, <-done, dir, "restart the agent")
}

func TestBadPoolDoesNotHarmOthers(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	err := f.Advertise(t.Context(), []Pool{pool("nics", vf(1)), pool("a.b", vf(2))})
	wantError(t, err, "example.com/a.b", "resourceName")
	eventuallyList(t, k, nics, "00.1 Healthy numa0")
}

func TestLongNamesAreServed(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	name := strings.Repeat("n", 63)
	f.advertise(t, pool(name, vf(1)))
	eventuallyList(t, k, "example.com/"+name, "00.1 Healthy numa0")
	if p := socketPath("/var/lib/kubelet/device-plugins", "openshift.io/"+name); len(p) > maxSocketPath {
		t.Errorf("socket path %s has %d bytes", p, len(p))
	}
}

func TestPreferredAllocation(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	far := vf(1)
	far.NUMANode = 1
	f.advertise(t, pool("nics", far, vf(2), vf(3)))
	eventually(t, "registered", func() bool { return k.client(nics) != nil })
	resp, err := k.client(nics).GetPreferredAllocation(t.Context(), &api.PreferredAllocationRequest{
		ContainerRequests: []*api.ContainerPreferredAllocationRequest{{
			AvailableDeviceIDs: []string{"0000:01:00.3", "0000:01:00.2", "0000:01:00.1"}, AllocationSize: 2,
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(resp.GetContainerResponses()[0].GetDeviceIDs(), " "); got != "0000:01:00.2 0000:01:00.3" {
		t.Errorf("preferred %s", got)
	}
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

func TestPoolsAndMetrics(t *testing.T) {
	f := newFixture(t)
	f.advertise(t, pool("nics"))
	eventually(t, "a pool says that there is no kubelet", func() bool { return strings.Contains(f.Pools()[0].Message, "register with the kubelet") })
	k := startKubelet(t, f.dir)
	sick := vf(2)
	sick.Healthy, sick.Reason = false, "PF ens1f0 has no carrier"
	f.advertise(t, pool("nics", vf(1), sick, vf(3)))
	eventuallyList(t, k, nics, "00.1 Healthy numa0,00.2 Unhealthy numa0,00.3 Healthy numa0")
	eventually(t, "registered", func() bool { return f.Status()[0].Err == nil })
	if _, err := k.allocate(nics, "0000:01:00.1"); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	f.pods, f.attached["0000:01:00.3"] = map[string]string{"0000:01:00.3": "ns/b"}, "ns/b"
	f.mu.Unlock()
	if _, _, err := f.opts.Ledger.Allocated(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	want := []v1.DevicePool{{
		ResourceName: nics, Devices: 3, Healthy: 2,
		Unhealthy: []v1.UnhealthyDevice{{Device: "0000:01:00.2", Reason: "PF ens1f0 has no carrier"}},
		Held: []v1.HeldDevice{
			{Device: "0000:01:00.1", Phase: "Allocated", Generation: 1},
			{Device: "0000:01:00.3", Phase: "Attached", Pod: "ns/b", Generation: 2},
		},
	}}
	if diff := cmp.Diff(want, f.Pools()); diff != "" {
		t.Error(diff)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(f.Manager)
	rec := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{
		`sluice_deviceplugin_devices{health="healthy",resource="example.com/nics"} 2`,
		`sluice_deviceplugin_devices{health="unhealthy",resource="example.com/nics"} 1`,
		`sluice_deviceplugin_registered{resource="example.com/nics"} 1`,
		`sluice_device_phase{device="0000:01:00.1",phase="Allocated",pod="",resource="example.com/nics"} 1`,
		`sluice_device_phase{device="0000:01:00.2",phase="Configured",pod="",resource="example.com/nics"} 1`,
		`sluice_device_phase{device="0000:01:00.3",phase="Attached",pod="ns/b",resource="example.com/nics"} 1`,
		`sluice_device_generation{device="0000:01:00.2",resource="example.com/nics"} 0`,
		`sluice_device_generation{device="0000:01:00.3",resource="example.com/nics"} 2`,
	} {
		if !strings.Contains(rec.Body.String(), want+"\n") {
			t.Errorf("no %s in\n%s", want, rec.Body)
		}
	}
}

// An allocation is all it takes to use a device by its nodes, and an ADD to use the others.
func TestNoDeviceIsGivenWhileItIsAttached(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	vfio := pool("user", vf(2))
	vfio.DeviceType = DeviceTypeVFIO
	vfio.Devices[0].IOMMUGroup = "7"
	f.attached["0000:01:00.1"], f.attached["0000:01:00.2"] = "ns/former", "ns/former"
	f.advertise(t, pool("nics", vf(1)), vfio)
	eventually(t, "registered", func() bool { return k.client(nics) != nil && k.client("example.com/user") != nil })
	if _, err := k.allocate(nics, "0000:01:00.1"); err != nil {
		t.Error(err)
	}
	_, err := k.allocate("example.com/user", "0000:01:00.2")
	wantError(t, err, "0000:01:00.2", "still attached to pod", "ns/former")
}

func TestForgottenDevicesAreNotOffered(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	f.attached["0000:01:00.1"] = "ns/former"
	for range 2 { // answers of a kubelet that does not know of it
		if _, _, err := f.opts.Ledger.Allocated(t.Context(), "0000:01:00.1"); err != nil {
			t.Fatal(err)
		}
	}
	f.advertise(t, pool("nics", vf(1), vf(2)))
	eventuallyList(t, k, nics, "00.1 Unhealthy numa0,00.2 Healthy numa0")
	_, err := k.allocate(nics, "0000:01:00.1")
	wantError(t, err, "ns/former", "the kubelet does not know")
}
