package node

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr/testr"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/holder"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/host/hostfake"
	"github.com/sluice-network/sluice/operator/plan"
)

const (
	nic0 = "0000:01:00.0"
	nic1 = "0000:02:00.0"
)

var _ Kernel = (*host.Host)(nil)

// server is the API server's side: one object.
type server struct {
	mu      sync.Mutex
	state   *v1.SriovNetworkNodeState
	watch   chan *v1.SriovNetworkNodeState
	applied []v1.SriovNetworkNodeStateStatus
	events  []string
	fail    int
	hangs   bool // no answer to ApplyStatus
}

func (s *server) send() {
	select {
	case <-s.watch:
	default:
	}
	if s.state == nil {
		s.watch <- nil
		return
	}
	s.watch <- s.state.DeepCopy()
}

func (s *server) Watch(context.Context) <-chan *v1.SriovNetworkNodeState { return s.watch }

func (s *server) ApplyStatus(ctx context.Context, status *v1.SriovNetworkNodeStateStatus) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hangs {
		s.mu.Unlock()
		<-ctx.Done()
		s.mu.Lock()
		return ctx.Err()
	}
	if s.fail > 0 {
		s.fail--
		return fmt.Errorf("the API server is away")
	}
	s.applied = append(s.applied, *status.DeepCopy())
	s.state.Status = *status.DeepCopy()
	s.send()
	return nil
}

func (s *server) Event(_ *v1.SriovNetworkNodeState, kind, reason, message string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, kind+" "+reason+" "+message)
}

func (s *server) spec(interfaces ...v1.Interface) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.Generation++
	s.state.Spec.Interfaces = interfaces
	s.send()
}

func (s *server) status() v1.SriovNetworkNodeStateStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return *s.state.Status.DeepCopy()
}

// plugin is the device plugin.
type plugin struct {
	mu        sync.Mutex
	pools     []Pool
	withdrawn []string
	fail      int
}

func (p *plugin) Withdraw(_ context.Context, addresses []string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fail > 0 {
		p.fail--
		return fmt.Errorf("kubelet is away")
	}
	p.withdrawn = append(p.withdrawn, addresses...)
	return nil
}

func (p *plugin) Advertise(_ context.Context, pools []Pool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pools = pools
	return nil
}

func (p *plugin) Pools() []v1.DevicePool {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []v1.DevicePool
	for _, pool := range p.pools {
		all = append(all, v1.DevicePool{ResourceName: pool.Resource, Devices: len(pool.Devices)})
	}
	return all
}

// healthy lists the addresses offered under the resource.
func (p *plugin) healthy(resource string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for _, pool := range p.pools {
		for _, d := range pool.Devices {
			if pool.Resource == resource && d.Healthy {
				out = append(out, d.PCIAddress)
			}
		}
	}
	return out
}

// usage is who holds what.
type usage struct {
	mu       sync.Mutex
	pods     map[string]string
	attached map[string]host.VFSettings
	err      error    // why Held does not know
	heard    []string // by pods
}

func (u *usage) Attached(address string) (host.VFSettings, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	s, ok := u.attached[address]
	return s, ok
}

func (u *usage) attach(address string, s host.VFSettings) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.attached == nil {
		u.attached = map[string]host.VFSettings{}
	}
	u.attached[address] = s
}

func (u *usage) Holder(address string) (string, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	pod, held := u.pods[address]
	return pod, held
}

func (u *usage) Held() (map[string]string, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return maps.Clone(u.pods), u.err
}

func (u *usage) set(address, pod string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if pod == "" {
		delete(u.pods, address)
		return
	}
	u.pods[address] = pod
}

type rig struct {
	t      *testing.T
	kernel *hostfake.Kernel
	server *server
	plugin *plugin
	usage  *usage
	agent  *Agent
	stop   func()

	uninstall       func() error
	reboot          func(context.Context) error
	networks        func(context.Context) (map[string]string, error)
	modprobe        string
	bootID          string
	ended           chan error // how the agent ended by itself
	line            *lifeline
	ovs             Switch // none where nobody asks for a bridge
	state, upstream string
	others          func([]Candidate) []Pool
	foreign         atomic.Bool // what Conditions tell
}

// simulated runs f beside other tests, and in a time of its own, which goes on only while
// all that f began waits: what f sees does not depend on the machine.
func simulated(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, f)
}

func newRig(t *testing.T) *rig {
	r := rigWith(t)
	r.start()
	return r
}

// rigWith is a rig that is not started yet.
func rigWith(t *testing.T) *rig {
	r := &rig{
		t: t, modprobe: t.TempDir(), bootID: "boot-1", ended: make(chan error, 1), line: &lifeline{}, state: t.TempDir(), upstream: t.TempDir(),
		kernel: hostfake.New(hostfake.NIC(nic0, "ens1f0", 3, 8), hostfake.NIC(nic1, "ens2f0", 4, 8)),
		server: &server{
			watch: make(chan *v1.SriovNetworkNodeState, 1),
			state: &v1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Name: "vm1", Namespace: "sluice", Generation: 1, UID: "1"}},
		},
		plugin: &plugin{}, usage: &usage{pods: map[string]string{}},
	}
	r.server.send()
	return r
}

// start makes a new agent, as after a restart.
func (r *rig) start() {
	r.agent = New(Config{Node: "vm1", StateDir: r.state, UpstreamDir: r.upstream, Kernel: r.kernel, States: r.server, Advertiser: r.plugin, Usage: r.usage, Attached: r.usage.Attached, Lifeline: r.line, Switch: r.ovs, Uninstall: r.uninstall, ModprobeDir: r.modprobe, BootID: r.bootID, Reboot: r.reboot, Networks: r.networks, Log: testr.New(r.t),
		Conditions: func() []metav1.Condition {
			c := metav1.Condition{Type: "Alias", Status: metav1.ConditionTrue, Reason: "Installed"}
			if r.foreign.Load() {
				c = metav1.Condition{Type: "Alias", Status: metav1.ConditionFalse, Reason: "Foreign", Message: "another has it"}
			}
			return []metav1.Condition{c}
		}, Others: r.others, Tell: func(vf string, warning bool, reason, message string) {
			r.usage.mu.Lock()
			defer r.usage.mu.Unlock()
			r.usage.heard = append(r.usage.heard, fmt.Sprint(vf, " ", warning, " ", reason, " ", message))
		}})
	r.agent.regain, r.agent.proof = 200*time.Millisecond, 10*time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := r.agent.Run(ctx)
		if ctx.Err() == nil {
			r.ended <- err
		} else if err != nil {
			r.t.Error(err)
		}
	}()
	r.stop = sync.OnceFunc(func() { cancel(); <-done })
	r.t.Cleanup(r.stop)
}

func (r *rig) restart() {
	r.stop()
	r.server.mu.Lock()
	r.server.send()
	r.server.mu.Unlock()
	r.start()
}

// eventually waits for ok to give nil. It asks only when nothing is under way.
func (r *rig) eventually(ok func() error) {
	r.t.Helper()
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		synctest.Wait()
		if err = ok(); err == nil {
			return
		}
	}
	r.t.Fatalf("%v\nstatus: %+v\ncalls: %v", err, r.server.status(), r.kernel.Calls())
}

func (r *rig) condition(kind string) metav1.Condition {
	c := meta.FindStatusCondition(r.server.status().Conditions, kind)
	if c == nil {
		return metav1.Condition{}
	}
	return *c
}

// ready waits until the newest spec is in effect.
func (r *rig) ready() {
	r.t.Helper()
	r.eventually(func() error {
		s := r.server.status()
		if c := r.condition(v1.ConditionReady); c.Status != metav1.ConditionTrue || s.ObservedGeneration != r.server.state.Generation {
			return fmt.Errorf("not ready: %+v", c)
		}
		return nil
	})
}

// degraded waits until the status says part.
func (r *rig) degraded(reason string, parts ...string) {
	r.t.Helper()
	r.eventually(func() error {
		c := r.condition(v1.ConditionDegraded)
		if c.Status != metav1.ConditionTrue || c.Reason != reason {
			return fmt.Errorf("not degraded by %s: %+v", reason, c)
		}
		for _, part := range parts {
			if !strings.Contains(c.Message, part) {
				return fmt.Errorf("%q lacks %q", c.Message, part)
			}
		}
		s := r.server.status()
		if s.LastSyncError != c.Message {
			return fmt.Errorf("lastSyncError %q", s.LastSyncError)
		}
		return nil
	})
}

func wants(address string, numVfs int, groups ...v1.VfGroup) v1.Interface {
	return v1.Interface{PciAddress: address, NumVfs: numVfs, VfGroups: groups}
}

func of(resource, vfRange string, mtu int) v1.VfGroup {
	return v1.VfGroup{ResourceName: resource, VfRange: vfRange, DeviceType: v1.DeviceTypeNetDevice, PolicyName: resource, Mtu: mtu}
}

func vfAddress(nic string, i int) string { return fmt.Sprintf("%s10.%d", nic[:8], i) }

func TestFromNothingToPools(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.ready()
		if s := r.server.status(); len(s.Interfaces) != 2 || s.Interfaces[0].TotalVfs != 8 || s.SyncStatus != "Succeeded" {
			t.Errorf("inventory: %+v", s)
		}
		jumbo := wants(nic0, 4, of("left", "0-2", 9000), of("spare", "3-3", 0))
		jumbo.Mtu = 9000
		r.server.spec(jumbo, wants(nic1, 2, of("right", "0-1", 0)))
		r.ready()

		s := r.server.status()
		if s.VFs != "6/6" || s.Interfaces[0].NumVfs != 4 || s.Interfaces[0].Mtu != 9000 || s.LastSyncError != "" {
			t.Errorf("status %+v", s)
		}
		pf := r.kernel.PF(nic0)
		for _, vf := range pf.VFs {
			mac, mtu, ok := r.agent.Baseline(vf.PCIAddress)
			wantMTU := 9000
			if vf.Index == 3 {
				wantMTU = 1500
			}
			if !ok || mtu != wantMTU || vf.MAC.String() != mac.String() || vf.Admin.MAC.String() != mac.String() || vf.MTU != wantMTU {
				t.Errorf("VF %+v, baseline %s %d %t", vf, mac, mtu, ok)
			}
		}
		if got := r.plugin.healthy("left"); len(got) != 3 {
			t.Errorf("left offers %v", got)
		}
		if got := r.plugin.healthy("right"); len(got) != 2 {
			t.Errorf("right offers %v", got)
		}
		if len(r.server.events) == 0 || !strings.HasPrefix(r.server.events[len(r.server.events)-1], "Normal Configured 2 NICs are configured, all 6 VFs are ready") {
			t.Errorf("events %v", r.server.events)
		}

		// Nothing changes, nothing is written or done; not after a restart either.
		r.kernel.Calls()
		n := len(r.server.applied)
		r.kernel.Tell(host.Changes{All: true})
		time.Sleep(700 * time.Millisecond)
		r.restart()
		r.kernel.Tell(host.Changes{All: true})
		time.Sleep(700 * time.Millisecond)
		if calls := r.kernel.Calls(); len(calls) > 0 || len(r.server.applied) != n {
			t.Errorf("%d writes, calls %v", len(r.server.applied)-n, calls)
		}
	})
}

func TestOnlyTheChangedPFIsTouched(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)), wants(nic1, 2, of("right", "0-1", 0)))
		r.ready()
		r.kernel.Calls()
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)), wants(nic1, 3, of("right", "0-2", 0)))
		r.ready()
		for _, call := range r.kernel.Calls() {
			if strings.Contains(call, "0000:01:") {
				t.Errorf("%s", call)
			}
		}
		if !slices.Equal(r.plugin.withdrawn, []string{vfAddress(nic1, 0), vfAddress(nic1, 1)}) {
			t.Errorf("withdrawn %v", r.plugin.withdrawn)
		}
		// Another MTU touches the netdevs and nothing else.
		r.server.spec(wants(nic0, 2, of("left", "0-1", 1400)), wants(nic1, 3, of("right", "0-2", 0)))
		r.ready()
		if calls := r.kernel.Calls(); len(calls) != 2 || !strings.HasPrefix(calls[0], "set MTU 1400 on 0000:01:10") {
			t.Errorf("calls %v", calls)
		}
	})
}

func TestNICsThatCannotBeRead(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		for _, op := range []hostfake.Op{hostfake.Inventory, hostfake.ReadVFSettings} {
			r.kernel.Fail(op, unix.EIO)
			r.kernel.Tell(host.Changes{All: true})
			r.degraded(ReasonUnreadable, "EIO")
			if got := r.plugin.healthy("left"); len(got) != 2 {
				t.Errorf("%s: left offers %v while the kernel cannot be read", op, got)
			}
			if s := r.server.status(); len(s.Interfaces) != 2 {
				t.Errorf("%s: the status lost NICs: %+v", op, s)
			}
			r.ready()
		}
		if calls := r.kernel.Calls(); slices.ContainsFunc(calls, func(c string) bool { return strings.HasPrefix(c, "remove") }) {
			t.Errorf("%v", calls)
		}
	})
}

func TestFailureIsNotRetriedByTheEventsItCauses(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.ready()
		r.kernel.Fail(hostfake.SetNumVFs, slices.Repeat([]unix.Errno{unix.ENOMEM}, 100)...)
		r.kernel.Calls()
		r.server.spec(wants(nic0, 2))
		for range 16 {
			r.kernel.Tell(host.Changes{All: true})
			time.Sleep(100 * time.Millisecond)
		}
		if calls := r.kernel.Calls(); len(calls) > 2 { // at once, and after a second
			t.Errorf("%d tries in 1.6 s: %v", len(calls), calls)
		}
	})
}

func TestSuccessThatChangesNothingIsTold(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.kernel.Ignore(hostfake.SetMTU, true)
		r.server.spec(wants(nic0, 1, of("left", "0-0", 9000)))
		r.degraded(ReasonRefused, "SetVFMTU 9000 on VF 0", "nothing changed")
		r.kernel.Ignore(hostfake.SetMTU, false)
		r.ready()
	})
}

// A change that would destroy VFs of pods waits for them, names them, takes
// their neighbours off offer, and happens when they let go.
func TestChangeWaitsForPods(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 4, of("left", "0-3", 0)))
		r.ready()
		held := vfAddress(nic0, 1)
		r.usage.set(held, "default/client")
		r.kernel.Change(func(pfs []host.PF) { vf := &pfs[0].VFs[1]; vf.Name, vf.IfIndex, vf.MAC, vf.MTU = "", 0, nil, 0 })
		r.eventually(func() error {
			s := r.server.status()
			if s.Interfaces[0].VFs[1].Assigned != "default/client" || s.VFs != "4/4" {
				return fmt.Errorf("not shown as held: %+v", s.Interfaces[0].VFs[1])
			}
			return nil
		})
		if got := r.plugin.healthy("left"); !slices.Contains(got, held) {
			t.Errorf("the held VF is off offer: %v", got)
		}
		r.kernel.Calls()
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.eventually(func() error {
			s := r.server.status()
			if len(s.Pending) == 0 {
				return fmt.Errorf("nothing is pending")
			}
			return nil
		})
		s := r.server.status()
		want := []v1.PendingChange{{
			PciAddress: nic0, Operation: "SetNumVFs 2 on " + nic0, Cost: v1.CostEvict, Reason: s.Pending[0].Reason,
			Pods: []v1.PodReference{{Namespace: "default", Name: "client", Device: held}},
		}}
		if d := cmp.Diff(want, s.Pending); d != "" || s.Pending[0].Reason == "" {
			t.Errorf("pending: %s", d)
		}
		ready, progressing, degraded := r.condition(v1.ConditionReady), r.condition(v1.ConditionProgressing), r.condition(v1.ConditionDegraded)
		if ready.Status != metav1.ConditionFalse || ready.Reason != ReasonInUse || !strings.Contains(ready.Message, "default/client (VF 1)") ||
			progressing.Status != metav1.ConditionTrue || degraded.Status != metav1.ConditionFalse || s.SyncStatus != v1.SyncStatusInProgress ||
			!strings.Contains(s.Interfaces[0].Message, "default/client") {
			t.Errorf("%+v", s)
		}
		if calls := r.kernel.Calls(); len(calls) > 0 {
			t.Errorf("touched: %v", calls)
		}
		r.eventually(func() error {
			if got := r.plugin.healthy("left"); len(got) > 0 {
				return fmt.Errorf("new pods would get %v", got)
			}
			return nil
		})
		r.usage.set(held, "")
		r.agent.HolderChanged()
		r.ready()
		if pf := r.kernel.PF(nic0); pf.NumVFs != 2 || len(r.server.status().Pending) > 0 {
			t.Errorf("%d VFs, pending %v", pf.NumVFs, r.server.status().Pending)
		}
	})
}

// The operator's condition in the same status is neither taken over, nor a
// reason to write.
func TestPending(t *testing.T) {
	op := plan.Operation{Kind: plan.SetNumVFs, PCIAddress: nic0, VF: -1, Cost: plan.Evict}
	vf := func(index int, holder string) plan.VF {
		return plan.VF{Index: index, PCIAddress: vfAddress(nic0, index), Holder: holder}
	}
	got := pending([]*report{{have: host.PF{PCIAddress: nic0}, blocked: []plan.Blocked{{
		Operation: op, VFs: []plan.VF{vf(0, "ns/p"), vf(1, holder.Unnamed("u-1")), vf(2, "")},
	}}}})
	want := []v1.PodReference{{UID: "u-1", Device: vfAddress(nic0, 1)}, {Namespace: "ns", Name: "p", Device: vfAddress(nic0, 0)}}
	if len(got) != 1 || !slices.Equal(got[0].Pods, want) {
		t.Errorf("%+v", got)
	}
}

func TestConditionsOfOthersAreTheirs(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.ready()
		n := len(r.server.applied)
		r.server.mu.Lock()
		r.server.state.Status.Conditions = append(r.server.state.Status.Conditions, metav1.Condition{Type: "Evicting", Status: metav1.ConditionFalse, Reason: "Idle"})
		r.server.send()
		r.server.mu.Unlock()
		time.Sleep(50 * time.Millisecond)
		if m := len(r.server.applied); m != n {
			t.Errorf("%d writes because of another's condition", m-n)
		}
		r.server.spec(wants(nic0, 1, of("left", "0-0", 0)))
		r.ready()
		for _, s := range r.server.applied {
			if meta.FindStatusCondition(s.Conditions, "Evicting") != nil || meta.FindStatusCondition(s.Conditions, "Alias") == nil {
				t.Fatalf("applied %+v", s.Conditions)
			}
		}
	})
}

func TestDriftIsPutRightUnlessHeld(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 3, of("left", "0-2", 1400)))
		r.ready()
		right := r.kernel.PF(nic0)
		r.usage.set(vfAddress(nic0, 2), "default/p")
		r.kernel.Change(func(pfs []host.PF) {
			vfs := pfs[0].VFs
			vfs[0].MTU = 1300
			vfs[1].Admin.MAC = []byte{2, 0, 0, 0, 0xaa, 1}
			vfs[2].Admin.MAC = []byte{2, 0, 0, 0, 0xaa, 2}
		})
		r.eventually(func() error {
			got := r.kernel.PF(nic0)
			if got.VFs[0].MTU != 1400 || got.VFs[1].Admin.MAC.String() != right.VFs[1].Admin.MAC.String() {
				return fmt.Errorf("not put right: %+v", got.VFs)
			}
			return nil
		})
		if got := r.kernel.PF(nic0).VFs[2].Admin.MAC.String(); got != "02:00:00:00:aa:02" {
			t.Errorf("the VF of a pod was changed: %s", got)
		}
		r.usage.set(vfAddress(nic0, 2), "")
		r.kernel.Change(func(pfs []host.PF) { pfs[0].NumVFs, pfs[0].VFs = 0, nil })
		r.eventually(func() error {
			if d := cmp.Diff(vfFacts(right), vfFacts(r.kernel.PF(nic0))); d != "" {
				return fmt.Errorf("not as before: %s", d)
			}
			return nil
		})
	})
}

// What somebody changes of a VF in a pod is told, not changed once more; a pod
// that was just attached is no such change.
func TestDriftOfHeldVFsIsTold(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		held := vfAddress(nic0, 1)
		given := r.kernel.PF(nic0).VFs[1].Admin
		given.VLAN, given.VLANProto = 100, host.Dot1Q
		r.usage.set(held, "default/p")
		r.usage.attach(held, given)
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[1].Admin = given })
		r.eventually(func() error {
			if got := r.server.status().Interfaces[0].VFs[1]; got.Assigned != "default/p" || got.Vlan != 100 {
				return fmt.Errorf("%+v", got)
			}
			return nil
		})
		for _, s := range r.server.applied {
			if c := meta.FindStatusCondition(s.Conditions, v1.ConditionDegraded); c.Reason == ReasonDrifted {
				t.Fatalf("an attachment was taken for a change: %s", c.Message)
			}
		}
		r.kernel.Calls()
		start := time.Now()
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[1].Admin.Trust = true })
		r.degraded(ReasonDrifted, "VF 1 of ens1f0", "default/p", "trust of the VF is on, not off")
		if d := time.Since(start); d > 200*time.Millisecond {
			t.Errorf("told after %s", d)
		}
		if got := r.plugin.healthy("left"); len(got) != 2 {
			t.Errorf("left offers %v", got)
		}
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[1].Admin.Trust = false })
		r.ready()
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[1].Driver = "" })
		r.degraded(ReasonDrifted, "unbound from its driver")
		if calls := r.kernel.Calls(); len(calls) > 0 {
			t.Errorf("touched: %v", calls)
		}
		r.eventually(func() error {
			r.usage.mu.Lock()
			defer r.usage.mu.Unlock()
			vf := "VF 1 of ens1f0 (" + held + ")"
			want := []string{
				held + " true ChangedByOthers somebody else changed " + vf + ": trust of the VF is on, not off; set it back, or delete the pod",
				held + " false AsAttached " + vf + " is as it was attached again",
				held + " true ChangedByOthers somebody else changed " + vf + ": it was unbound from its driver; set it back, or delete the pod",
			}
			if d := cmp.Diff(want, r.usage.heard); d != "" {
				return fmt.Errorf("its pod hears: %s", d)
			}
			return nil
		})
	})
}

// A trusted VF's MAC is its pod's to change, and the PF tells the new one: that is no
// change by somebody else, but of its other settings it is.
func TestTrustedVFChangesItsMAC(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		held := vfAddress(nic0, 1)
		given := r.kernel.PF(nic0).VFs[1].Admin
		given.Trust, given.VLAN, given.VLANProto = true, 100, host.Dot1Q
		r.usage.set(held, "default/p")
		r.usage.attach(held, given)
		now := given
		now.MAC = []byte{2, 0, 0, 0, 0xb0, 0xd}
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[1].Admin = now })
		r.eventually(func() error {
			if got := r.server.status().Interfaces[0].VFs[1]; got.Vlan != 100 {
				return fmt.Errorf("%+v", got)
			}
			return nil
		})
		now.VLAN = 7
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[1].Admin = now })
		r.degraded(ReasonDrifted, "vlan of the VF is 7")
		for _, s := range r.server.applied {
			if c := meta.FindStatusCondition(s.Conditions, v1.ConditionDegraded); strings.Contains(c.Message, "mac of the VF") {
				t.Errorf("the pod's own change is told as another's: %s", c.Message)
			}
		}
	})
}

// What the agent tells of itself besides is an event when it is not as it should be, and
// when it is again.
func TestOtherConditionsAreEvents(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		ofAlias := func(want ...string) {
			t.Helper()
			r.eventually(func() error {
				r.server.mu.Lock()
				defer r.server.mu.Unlock()
				got := slices.DeleteFunc(slices.Clone(r.server.events), func(e string) bool { return strings.Contains(e, " Configured ") })
				if !slices.Equal(got, want) {
					return fmt.Errorf("events %q, want %q", got, want)
				}
				return nil
			})
		}
		ofAlias()
		r.foreign.Store(true)
		r.agent.HolderChanged()
		ofAlias("Warning Foreign another has it")
		r.foreign.Store(false)
		r.agent.HolderChanged()
		ofAlias("Warning Foreign another has it", "Normal Installed ")
	})
}

// A storm of events does not make the agent read the NIC for each.
func TestStormOfEventsIsBounded(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		time.Sleep(100 * time.Millisecond)
		r.kernel.Reads()
		start := time.Now()
		for time.Since(start) < time.Second {
			r.kernel.Tell(host.Changes{Devices: []string{nic0}})
			time.Sleep(time.Millisecond)
		}
		reads := r.kernel.Reads()
		if n := reads[hostfake.ReadVFSettings]; n == 0 || n > 80 || reads[hostfake.Inventory] > 0 {
			t.Errorf("read %v in a second of events", reads)
		}
		// The other NIC is seen at once.
		start = time.Now()
		r.kernel.Change(func(pfs []host.PF) { pfs[1].MTU = 1400 })
		r.eventually(func() error {
			if got := r.server.status().Interfaces[1].Mtu; got != 1400 {
				return fmt.Errorf("MTU %d", got)
			}
			return nil
		})
		if d := time.Since(start); d > 200*time.Millisecond {
			t.Errorf("told after %s", d)
		}
	})
}

func TestBudget(t *testing.T) {
	t.Parallel()
	var b budget
	now := time.Unix(1000, 0)
	if b.wait(now) != 0 {
		t.Error("the first look waits")
	}
	b.spend(lookBurst + 50*time.Millisecond)
	wait := b.wait(now)
	if wait != 50*time.Millisecond*lookShare {
		t.Errorf("wait %s", wait)
	}
	if got := b.wait(now.Add(wait / 2)); got != wait/2 {
		t.Errorf("after half of it wait %s", got)
	}
	if got := b.wait(now.Add(wait + time.Second)); got != 0 {
		t.Errorf("after all of it wait %s", got)
	}
	b.wait(now.Add(time.Hour))
	if b.credit != lookBurst {
		t.Errorf("saved up %s", b.credit)
	}
}

func vfFacts(pf *host.PF) []string {
	var out []string
	for _, vf := range pf.VFs {
		out = append(out, fmt.Sprint(vf.Index, vf.Name, vf.MAC, vf.Admin.MAC, vf.MTU))
	}
	return out
}

// The kernel brings a VF back when a pod's namespace ends, under the pod's
// name; udev renames too, and that stays.
func TestNames(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		name := func(i int, want string) {
			t.Helper()
			r.eventually(func() error {
				s := r.server.status()
				if got := r.kernel.PF(nic0).VFs[i].Name; got != want || s.Interfaces[0].VFs[i].Name != want {
					return fmt.Errorf("VF %d is %q, in status %q, want %q", i, got, s.Interfaces[0].VFs[i].Name, want)
				}
				return nil
			})
		}
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[0].Name = "byudev0" })
		name(0, "byudev0")
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[1].Name, pfs[0].VFs[1].IfIndex = "", 0 })
		name(1, "")
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[1].Name, pfs[0].VFs[1].IfIndex = "net1", 77 })
		name(1, "ens1f0v1")

		// A restart knows the names from the status.
		r.stop()
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[0].Name = "net1" })
		r.restart()
		name(0, "byudev0")
	})
}

func TestPolicyGoneVFsGo(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.kernel.Change(func(pfs []host.PF) { // someone else's VFs, on the other NIC
			pfs[1].NumVFs, pfs[1].VFs = 1, []host.VF{{PCIAddress: vfAddress(nic1, 0), Driver: "fakenicvf", Name: "x", IfIndex: 9}}
		})
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		if _, _, ok := r.agent.Baseline(vfAddress(nic1, 0)); ok {
			t.Error("a foreign VF has a baseline")
		}
		r.server.spec()
		r.eventually(func() error {
			if pf := r.kernel.PF(nic0); pf.NumVFs != 0 {
				return fmt.Errorf("%d VFs left", pf.NumVFs)
			}
			return nil
		})
		if pf := r.kernel.PF(nic1); pf.NumVFs != 1 {
			t.Error("VFs that are not ours were removed")
		}
	})
}

// A new object asks for nothing until the operator has rendered it: VFs stay.
func TestNewObjectRemovesNothing(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		r.server.mu.Lock()
		r.server.state = &v1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Name: "vm1", Generation: 1, UID: "2"}}
		r.server.send()
		r.server.mu.Unlock()
		r.eventually(func() error {
			if len(r.server.status().Interfaces) != 2 {
				return fmt.Errorf("no inventory yet")
			}
			return nil
		})
		if pf := r.kernel.PF(nic0); pf.NumVFs != 2 {
			t.Errorf("%d VFs left", pf.NumVFs)
		}
		if _, _, ok := r.agent.Baseline(vfAddress(nic0, 0)); !ok {
			t.Error("the baseline of a VF of ours is not known without a spec")
		}
	})
}

func TestBadSpecIsToldAndChangesNothing(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.ready()
		for name, c := range map[string]struct {
			want   v1.Interface
			reason string
			text   string
		}{
			"too many":  {wants(nic0, 9), ReasonInvalidSpec, "numVfs: 9 is more than the 8 VFs"},
			"bad range": {wants(nic0, 4, of("left", "5-2", 0)), ReasonInvalidSpec, `VF range "5-2" runs backwards: write 2-5`},
			"no NIC":    {wants("0000:09:00.0", 2), ReasonNotFound, "interface 0000:09:00.0"},
		} {
			r.server.spec(c.want)
			r.degraded(c.reason, c.text)
			if calls := r.kernel.Calls(); len(calls) > 0 {
				t.Errorf("%s: %v", name, calls)
			}
		}
	})
}

func TestStatusIsWrittenWhenTheServerIsBack(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.ready()
		r.server.mu.Lock()
		r.server.fail = 2
		r.server.mu.Unlock()
		r.server.spec(wants(nic0, 1, of("left", "0-0", 0)))
		r.ready()
	})
}

// An API server that does not answer holds up no work, and is told once it does.
func TestWorkWaitsForNoAnswer(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 2, of("left", "0-1", 1400)))
		r.ready()
		hang := func(hangs bool) {
			r.server.mu.Lock()
			defer r.server.mu.Unlock()
			r.server.hangs = hangs
		}
		hang(true)
		r.usage.set(vfAddress(nic0, 1), "default/p") // something to tell
		r.agent.HolderChanged()
		for range 3 {
			start := time.Now()
			r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[0].MTU = 1300 })
			r.eventually(func() error {
				if mtu := r.kernel.PF(nic0).VFs[0].MTU; mtu != 1400 {
					return fmt.Errorf("MTU %d", mtu)
				}
				return nil
			})
			if d := time.Since(start); d > 200*time.Millisecond {
				t.Errorf("put right after %s", d)
			}
			time.Sleep(time.Second)
		}
		hang(false)
		time.Sleep(writeTimeout)
		r.eventually(func() error {
			if got := r.server.status().Interfaces[0].VFs[1].Assigned; got != "default/p" {
				return fmt.Errorf("assigned to %q", got)
			}
			return nil
		})
	})
}

func TestNothingIsTouchedBeforeItIsWithdrawn(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		r.kernel.Calls()
		r.plugin.mu.Lock()
		r.plugin.fail = 1
		r.plugin.mu.Unlock()
		r.server.spec(wants(nic0, 3, of("left", "0-2", 0)))
		r.degraded(ReasonUnreadable, "withdraw 2 VFs", "kubelet is away")
		if calls := r.kernel.Calls(); len(calls) > 0 {
			t.Errorf("%v", calls)
		}
		r.ready()
	})
}

// The agent is stopped at any moment of the work; the next one completes it.
func TestRestartAtAnyMoment(t *testing.T) {
	simulated(t, func(t *testing.T) {
		for _, op := range []hostfake.Op{hostfake.SetNumVFs, hostfake.BindDriver, hostfake.SetVFMAC, hostfake.SetMAC, hostfake.SetMTU} {
			r := newRig(t)
			r.ready()
			r.kernel.Change(func(pfs []host.PF) { pfs[0].AdminUp = false })
			r.kernel.Fail(op, unix.EINTR)
			r.server.spec(wants(nic0, 3, of("left", "0-2", 1400)))
			r.eventually(func() error {
				if len(r.kernel.Calls()) == 0 {
					return fmt.Errorf("nothing was tried")
				}
				return nil
			})
			r.restart()
			r.ready()
			if got := r.plugin.healthy("left"); len(got) != 3 {
				t.Errorf("%s: left offers %v", op, got)
			}
			r.stop()
		}
	})
}

// Pools that no policy makes get the VFs that no policy has, are withdrawn like others,
// and are told of what the policies have.
func TestPoolsOfOthers(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := rigWith(t)
		r.others = func(candidates []Candidate) []Pool {
			p := Pool{Prefix: "example.com", Resource: "rest"}
			for _, c := range candidates {
				if c.Resource == "" {
					p.Devices = append(p.Devices, c.Device)
				}
			}
			return []Pool{p}
		}
		r.start()
		r.server.spec(wants(nic0, 4, of("left", "0-1", 0)))
		r.ready()
		r.eventually(func() error {
			if got := r.plugin.healthy("rest"); !slices.Equal(got, []string{vfAddress(nic0, 2), vfAddress(nic0, 3)}) {
				return fmt.Errorf("offered: %v", got)
			}
			return nil
		})
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
		if got := r.plugin.healthy("rest"); len(got) > 0 {
			t.Errorf("offered: %v", got)
		}
		r.plugin.mu.Lock()
		defer r.plugin.mu.Unlock()
		if !slices.Contains(r.plugin.withdrawn, vfAddress(nic0, 3)) {
			t.Errorf("withdrawn: %v", r.plugin.withdrawn)
		}
	})
}

func TestCandidates(t *testing.T) {
	r := &report{
		have: host.PF{PCIAddress: "0000:01:00.0", Name: "ens1f0", NUMANode: 1, LinkType: host.InfiniBand, VFs: []host.VF{
			{Index: 0, PCIAddress: "0000:01:00.1", Vendor: "15b3", DeviceID: "101e", Driver: "mlx5_core", Name: "ens1f0v0", NUMANode: -1, RDMADevice: "mlx5_2"},
			{Index: 1, PCIAddress: "0000:01:00.2", Driver: "vfio-pci", NUMANode: 0},
			{Index: 2, PCIAddress: "0000:01:00.3", Driver: "mlx5_core", VDPA: host.VDPAVhost},
			{Index: 3, PCIAddress: "0000:01:00.4", Driver: "mlx5_core", VDPA: "none"},
			{Index: 4, PCIAddress: "0000:01:00.5", Driver: "mlx5_core", Name: "ens1f0v4"},
		}},
		carries: []int{4},
	}
	var got []string
	for _, c := range candidates([]*report{r}, []Pool{{Resource: "a", Devices: []Device{{PCIAddress: "0000:01:00.2"}}}}) {
		got = append(got, fmt.Sprintf("%d %s:%s %s%d %v %q %v %s", c.VFIndex, c.Vendor, c.DeviceID, c.PFName, c.NUMANode, c.RDMA, c.Resource, c.Healthy, c.VDPA))
		if c.Healthy != (c.Reason == "") {
			t.Errorf("VF %d: %q", c.VFIndex, c.Reason)
		}
	}
	want := []string{`0 15b3:101e ens1f01 true "" true `, `1 : ens1f00 false "a" true `, `2 : ens1f00 false "" true vhost`, `3 : ens1f00 false "" false `, `4 : ens1f00 false "" false `}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// A PF that loses its carrier takes VFs off offer where that is asked for, by an event and
// at once, and the status has the pools as they are offered.
func TestRequireCarrier(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		strict := of("strict", "0-0", 0)
		strict.RequireCarrier, strict.Allocation = true, v1.AllocationSpread
		r.server.spec(wants(nic0, 2, strict, of("left", "1-1", 0)))
		r.ready()
		carrier := func(on bool) {
			r.kernel.Change(func(pfs []host.PF) { pfs[0].Carrier = on })
			r.eventually(func() error {
				if got := r.plugin.healthy("strict"); len(got) == 1 != on {
					return fmt.Errorf("carrier %v: offered %v", on, got)
				}
				return nil
			})
			if got := r.plugin.healthy("left"); len(got) != 1 {
				t.Errorf("carrier %v: who does not ask for it is offered %v", on, got)
			}
		}
		carrier(true)
		carrier(false)
		if c := r.condition(v1.ConditionReady); c.Status != metav1.ConditionTrue {
			t.Errorf("without carrier: %+v", c)
		}
		carrier(true)
		r.eventually(func() error {
			if got := r.server.status().Pools; len(got) != 2 || got[0].ResourceName != "strict" || got[0].Devices != 1 {
				return fmt.Errorf("pools in the status: %+v", got)
			}
			return nil
		})
		r.plugin.mu.Lock()
		defer r.plugin.mu.Unlock()
		if !r.plugin.pools[0].Spread || r.plugin.pools[1].Spread {
			t.Errorf("%+v", r.plugin.pools)
		}
	})
}

func TestPools(t *testing.T) {
	t.Parallel()
	pf := hostfake.NIC(nic0, "ens1f0", 3, 8)
	pf.NUMANode = 1
	vf := func(i int, driver, name string) host.VF {
		return host.VF{Index: i, PCIAddress: vfAddress(nic0, i), Driver: driver, Name: name, NUMANode: -1, IOMMUGroup: "7"}
	}
	pf.VFs = []host.VF{vf(0, "fakenicvf", "v0"), vf(1, "vfio-pci", ""), vf(2, "fakenicvf", ""), vf(3, "", ""), vf(4, "fakenicvf", "")}
	pf.NumVFs = 5
	vfio := of("left", "1-1", 0)
	vfio.DeviceType, vfio.IsRdma = v1.DeviceTypeVfioPci, true
	want := wants(nic0, 5, of("left", "0-0", 0), vfio, of("right", "2-4", 0))
	r := &report{have: pf, want: &want, held: map[string]bool{vfAddress(nic0, 4): true}}
	got := pools([]*report{r})
	if len(got) != 2 || got[0].Resource != "left" || !got[0].RDMA || got[0].DeviceType != "netdevice" {
		t.Fatalf("%+v", got)
	}
	d := got[0].Devices[0]
	if !d.Healthy || d.NUMANode != 1 || d.IOMMUGroup != "7" || d.PFName != "ens1f0" || d.LinkType != host.Ethernet {
		t.Errorf("%+v", d)
	}
	for _, c := range []struct {
		d    Device
		want string
	}{
		{got[0].Devices[1], "has VFs of deviceType netdevice already"},
		{got[1].Devices[0], "no network device"},
		{got[1].Devices[1], "has no driver"},
		{got[1].Devices[2], ""}, // in a pod
	} {
		if c.d.Healthy != (c.want == "") || !strings.Contains(c.d.Reason, c.want) {
			t.Errorf("%+v, want %q", c.d, c.want)
		}
	}
}
