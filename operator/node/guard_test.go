package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/operator/plan"
)

// lifeline is the way to an API server, open unless cut says otherwise.
type lifeline struct {
	mu  sync.Mutex
	cut func() error
}

func (*lifeline) Addresses(context.Context) ([]net.IP, error) { return nil, nil }

func (l *lifeline) Reach(context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut == nil {
		return nil
	}
	return l.cut()
}

func (l *lifeline) when(cut func() error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = cut
}

func TestRisk(t *testing.T) {
	t.Parallel()
	onPF, onVF, none := carriers{pf: true}, carriers{vfs: []int{1}}, carriers{}
	for _, c := range []struct {
		op             plan.Operation
		none, pf, onVF risk
	}{
		{plan.Operation{Kind: plan.SetNumVFs, VF: -1}, harmless, risky, cutting},
		{plan.Operation{Kind: plan.SetPFMTU, VF: -1}, harmless, risky, risky},
		{plan.Operation{Kind: plan.SetPFUp, VF: -1}, harmless, harmless, harmless},
		{plan.Operation{Kind: plan.SetEswitchMode, VF: -1}, harmless, cutting, cutting},
		{plan.Operation{Kind: plan.SetBridge, VF: -1}, harmless, cutting, harmless},
		{plan.Operation{Kind: plan.BindVFDriver, VF: 0}, harmless, harmless, harmless},
		{plan.Operation{Kind: plan.BindVFDriver, VF: 1}, harmless, harmless, cutting},
		{plan.Operation{Kind: plan.SetVFAdminMAC, VF: 1}, harmless, harmless, cutting},
		{plan.Operation{Kind: plan.ResetVFSettings, VF: 1}, harmless, harmless, cutting},
	} {
		if a, b, d := none.risk(c.op), onPF.risk(c.op), onVF.risk(c.op); a != c.none || b != c.pf || d != c.onVF {
			t.Errorf("%s: %d %d %d", c.op, a, b, d)
		}
	}
}

// The only NIC of a node may have VFs and another MTU; its mode is changed only
// by force.
func TestManagementNIC(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := rigWith(t)
		r.kernel.Path(3)
		r.kernel.Change(func(pfs []host.PF) { pfs[0].Eswitch = host.Legacy })
		r.start()
		want := wants(nic0, 2, of("left", "0-1", 0))
		want.Mtu = 9000
		r.server.spec(want)
		r.ready()
		r.kernel.Calls()
		want.EswitchMode = v1.EswitchModeSwitchdev
		r.server.spec(want)
		r.degraded(ReasonManagement, "switchdev", "carries the node's way to the API server", v1.AnnotationForceManagementNIC)
		if calls := r.kernel.Calls(); len(calls) > 0 {
			t.Errorf("touched: %v", calls)
		}
		r.server.mu.Lock()
		r.server.state.Annotations = map[string]string{v1.AnnotationForceManagementNIC: "true"}
		r.server.send()
		r.server.mu.Unlock()
		r.ready()
		if pf := r.kernel.PF(nic0); pf.Eswitch != host.Switchdev {
			t.Errorf("mode %s", pf.Eswitch)
		}
	})
}

// A VF that the node itself uses is neither changed nor given to a pod.
func TestManagementVF(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.server.spec(wants(nic0, 3, of("left", "0-2", 0)))
		r.ready()
		r.kernel.Path(r.kernel.PF(nic0).VFs[1].IfIndex)
		time.Sleep(pathAge)
		r.kernel.Calls()
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[0].MTU, pfs[0].VFs[1].MTU = 1300, 1300 })
		r.server.spec(wants(nic0, 3, of("left", "0-2", 1400)))
		r.degraded(ReasonManagement, "VF 1 of ens1f0", "SetVFMTU 1400")
		if pf := r.kernel.PF(nic0); pf.VFs[0].MTU != 1400 || pf.VFs[1].MTU != 1300 {
			t.Errorf("%+v", pf.VFs)
		}
		if got := r.plugin.healthy("left"); len(got) != 2 {
			t.Errorf("left offers %v", got)
		}
		r.server.spec(wants(nic0, 1, of("left", "0-0", 1400)))
		r.degraded(ReasonManagement, "SetNumVFs 1")
		r.server.spec()
		r.degraded(ReasonManagement, "SetNumVFs 0")
		for _, call := range r.kernel.Calls() {
			if strings.Contains(call, vfAddress(nic0, 1)) || strings.Contains(call, "create") {
				t.Errorf("%s", call)
			}
		}
	})
}

// A change that cuts the node off is taken back, told, and not tried again, not
// by a new agent either, until something else is asked for.
func TestCutIsTakenBack(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(*v1.Interface)
		what   string
	}{
		"VFs": {func(want *v1.Interface) { want.NumVfs = 4 }, "SetNumVFs 4"},
		"MTU": {func(want *v1.Interface) { want.Mtu = 9000 }, "SetPFMTU 9000"},
		// Only by force.
		"mode": {func(want *v1.Interface) { want.EswitchMode = v1.EswitchModeSwitchdev }, "SetEswitchMode switchdev"},
	} {
		t.Run(name, func(t *testing.T) {
			simulated(t, func(t *testing.T) {
				r := newRig(t)
				good := wants(nic0, 2, of("left", "0-1", 0))
				r.server.spec(good)
				r.ready()
				r.stop()
				r.kernel.Path(3)
				r.line.when(func() error {
					if pf := r.kernel.PF(nic0); pf.NumVFs == 4 || pf.MTU == 9000 || pf.Eswitch == host.Switchdev {
						return errors.New("no route to host")
					}
					return nil
				})
				r.server.mu.Lock()
				r.server.state.Annotations = map[string]string{v1.AnnotationForceManagementNIC: "true"}
				r.server.mu.Unlock()
				r.restart()
				r.kernel.Calls()
				bad := good
				c.change(&bad)
				r.server.spec(bad)
				r.degraded(ReasonLost, c.what, "no route to host")
				if pf := r.kernel.PF(nic0); pf.NumVFs != 2 || pf.MTU != 1500 || pf.Eswitch != host.Legacy || pf.VFs[1].Driver == "" {
					t.Fatalf("not taken back: %+v", pf)
				}
				r.kernel.Calls()
				r.restart()
				r.kernel.Tell(host.Changes{All: true})
				r.degraded(ReasonLost, c.what)
				for _, call := range r.kernel.Calls() {
					if strings.HasPrefix(call, "create") || strings.HasPrefix(call, "set MTU 9000") {
						t.Errorf("tried again: %s", call)
					}
				}
				r.server.spec(good)
				r.ready()
				r.eventually(func() error {
					if got := r.plugin.healthy("left"); len(got) != 2 {
						return fmt.Errorf("left offers %v", got)
					}
					return nil
				})
			})
		})
	}
}

// While the API server is away nobody can tell whether a change cuts the node
// off: it waits. Other NICs do not.
func TestManagementNICWaitsForTheAPIServer(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.ready()
		r.kernel.Path(3)
		time.Sleep(pathAge)
		r.line.when(func() error { return errors.New("connection refused") })
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)), wants(nic1, 2, of("right", "0-1", 0)))
		r.degraded(ReasonUnverified, "SetNumVFs 2", "connection refused")
		if a, b := r.kernel.PF(nic0), r.kernel.PF(nic1); a.NumVFs != 0 || b.NumVFs != 2 {
			t.Errorf("%d and %d VFs", a.NumVFs, b.NumVFs)
		}
		r.line.when(nil)
		r.ready()
	})
}
