package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/meta"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/ovsdb"
	"github.com/sluice-network/sluice/operator/plan"
)

var _ Switch = (*ovsdb.Client)(nil)

// ovs is Open vSwitch. Each call tells the mode that the first NIC is in at that moment.
type ovs struct {
	*rig
	mu      sync.Mutex
	bridges map[string]*ovsdb.Found
	calls   []string
	fail    map[string]error // once, by method
	away    error
	slow    bool // uplinks are not opened by themselves
	watches []chan struct{}
}

// call does what a method does, unless it shall fail.
func (o *ovs) call(method string, do func()) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.away != nil {
		return o.away
	}
	if method != "ReadBridge" {
		o.calls = append(o.calls, method+" in "+string(o.kernel.PF(nic0).Eswitch))
	}
	if err := o.fail[method]; err != nil {
		delete(o.fail, method)
		return err
	}
	do()
	return nil
}

func (o *ovs) ReadBridge(_ context.Context, name string) (found *ovsdb.Found, err error) {
	err = o.call("ReadBridge", func() {
		if b := o.bridges[name]; b != nil {
			copied := *b
			found = &copied
		}
	})
	return found, err
}

func (o *ovs) SetBridge(_ context.Context, want ovsdb.Bridge, adopt bool) error {
	return o.call("SetBridge", func() {
		if is := o.bridges[want.Name]; adopt != (is != nil && is.Foreign) {
			o.t.Errorf("adopt is %t of %+v", adopt, is)
		}
		o.bridges[want.Name] = &ovsdb.Found{Bridge: want, Opened: !o.slow}
	})
}

func (o *ovs) DetachUplink(_ context.Context, name string) error {
	return o.call("DetachUplink", func() { o.bridges[name].Uplink, o.bridges[name].Opened = ovsdb.Interface{}, false })
}

func (o *ovs) RemoveBridge(_ context.Context, name string) error {
	return o.call("RemoveBridge", func() { delete(o.bridges, name) })
}

func (o *ovs) Watch(context.Context) <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	ch := make(chan struct{}, 1)
	o.watches = append(o.watches, ch)
	return ch
}

// change lets somebody else change something, and tells.
func (o *ovs) change(f func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f()
	for _, w := range o.watches {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

// called gives the calls so far, and forgets them.
func (o *ovs) called() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	calls := o.calls
	o.calls = nil
	return calls
}

func (o *ovs) wantCalls(want ...string) {
	o.t.Helper()
	if got := o.called(); !slices.Equal(got, want) {
		o.t.Errorf("called %q, want %q", got, want)
	}
}

// has waits until the bridge is there, or with nil is not.
func (o *ovs) has(want *v1.OVSConfigExt) {
	o.t.Helper()
	o.eventually(func() error {
		o.mu.Lock()
		is := o.bridges[plan.BridgeName(nic0)]
		o.mu.Unlock()
		if (is == nil) != (want == nil) || is != nil && cmp.Diff(toSwitch(want), is.Bridge) != "" {
			return fmt.Errorf("the bridge is %+v, want %+v", is, want)
		}
		return nil
	})
}

const onBridge = "br-0000_01_00.0"

func switched() v1.Interface {
	return with(wants(nic0, 2, of("left", "0-1", 0)), func(i *v1.Interface) { i.EswitchMode = v1.EswitchModeSwitchdev })
}

func onNIC0(mode string) *v1.OVSConfigExt {
	return &v1.OVSConfigExt{
		Name: onBridge, Bridge: v1.OVSBridgeConfig{FailMode: mode, ExternalIDs: map[string]string{"a": "1"}},
		Uplinks: []v1.OVSUplinkConfigExt{{PciAddress: nic0, Name: "ens1f0", Interface: v1.OVSInterfaceConfig{Type: "system"}}},
	}
}

// newOVS is a node with Open vSwitch whose first NIC has an eswitch.
func newOVS(t *testing.T) *ovs {
	o := &ovs{rig: rigWith(t), bridges: map[string]*ovsdb.Found{}, fail: map[string]error{}}
	o.ovs = o
	o.kernel.Change(func(pfs []host.PF) { pfs[0].Eswitch = host.Legacy })
	return o
}

// spec asks for the bridge, if it is any, and the interfaces.
func (o *ovs) spec(b *v1.OVSConfigExt, interfaces ...v1.Interface) {
	o.server.mu.Lock()
	o.server.state.Spec.Bridges.OVS = nil
	if b != nil {
		o.server.state.Spec.Bridges.OVS = []v1.OVSConfigExt{*b}
	}
	o.server.mu.Unlock()
	o.server.spec(interfaces...)
}

func TestBridge(t *testing.T) {
	simulated(t, func(t *testing.T) {
		o := newOVS(t)
		o.slow = true
		o.start()
		secure := onNIC0("secure")
		o.spec(secure, switched())
		o.has(secure)
		o.eventually(func() error {
			s := o.server.status()
			if len(s.Interfaces) == 0 || len(s.Interfaces[0].VFs) != 2 || !strings.Contains(s.Interfaces[0].VFs[1].Message, "waits for bridge "+onBridge+": ovs-vswitchd has yet to open ens1f0") {
				return fmt.Errorf("nothing is told of what is waited for")
			}
			return nil
		})
		if got := o.plugin.healthy("left"); len(got) > 0 || o.condition(v1.ConditionReady).Status == "True" {
			t.Errorf("offered before the bridge is ready: %v", got)
		}
		o.change(func() { o.bridges[onBridge].Error = "No such device" })
		o.degraded(ReasonNoUplink, onBridge, "says of ens1f0: No such device")
		o.change(func() { o.bridges[onBridge].Error, o.bridges[onBridge].Opened, o.slow = "", true, false })
		o.ready()
		o.wantCalls("SetBridge in switchdev")
		if d := cmp.Diff([]v1.OVSConfigExt{*secure}, o.server.status().Bridges.OVS); d != "" {
			t.Error(d)
		}
		o.eventually(func() error {
			if got := o.plugin.healthy("left"); len(got) != 2 {
				return fmt.Errorf("offered are %v", got)
			}
			return nil
		})

		// What is right is left alone; what others change is put right.
		o.restart()
		o.ready()
		o.wantCalls()
		o.change(func() { o.bridges[onBridge].FailMode = "standalone" })
		o.has(secure)
		o.change(func() { delete(o.bridges, onBridge) })
		o.has(secure)
		standalone := onNIC0("standalone")
		o.spec(standalone, switched())
		o.has(standalone)
		o.ready()
		o.wantCalls("SetBridge in switchdev", "SetBridge in switchdev", "SetBridge in switchdev")

		// A pod keeps its bridge.
		o.usage.set(vfAddress(nic0, 1), "default/p")
		o.spec(nil, switched())
		o.eventually(func() error {
			pending := o.server.status().Pending
			if len(pending) != 1 || pending[0].Cost != v1.CostEvict || pending[0].Operation != "RemoveBridge "+onBridge+" on "+nic0 || len(pending[0].Pods) != 1 {
				return fmt.Errorf("pending is %+v", pending)
			}
			return nil
		})
		o.wantCalls()
		o.usage.set(vfAddress(nic0, 1), "")
		o.agent.HolderChanged()
		o.has(nil)
		o.ready()
		o.wantCalls("RemoveBridge in switchdev")

		// The NIC is given back without its bridge.
		o.spec(secure, switched())
		o.has(secure)
		o.ready()
		o.called()
		o.spec(nil)
		o.has(nil)
		o.ready()
		o.wantCalls("RemoveBridge in switchdev")
		if pf := o.kernel.PF(nic0); pf.Eswitch != host.Legacy || pf.NumVFs != 0 {
			t.Errorf("not what it was: %+v", pf)
		}
		if _, recorded := o.agent.records.get(nic0); recorded {
			t.Error("it is still recorded")
		}
	})
}

// Open vSwitch keeps bridges over a reboot, the NIC neither mode nor VFs.
func TestBridgeAfterReboot(t *testing.T) {
	simulated(t, func(t *testing.T) {
		o := newOVS(t)
		o.start()
		want := onNIC0("")
		o.spec(want, switched())
		o.ready()
		o.called()
		o.stop()
		o.kernel.Change(func(pfs []host.PF) { pfs[0].Eswitch, pfs[0].NumVFs, pfs[0].VFs = host.Legacy, 0, nil })
		o.restart()
		o.eventually(func() error {
			if pf := o.kernel.PF(nic0); pf.NumVFs != 2 || pf.Eswitch != host.Switchdev {
				return fmt.Errorf("the NIC is %+v", pf)
			}
			return nil
		})
		o.has(want)
		o.ready()
		o.wantCalls("DetachUplink in legacy", "SetBridge in switchdev")
	})
}

// Without Open vSwitch there are VFs and no bridge, and what it takes is told. Nothing
// is forgotten meanwhile.
func TestOpenVSwitchAway(t *testing.T) {
	simulated(t, func(t *testing.T) {
		o := newOVS(t)
		o.away = errors.New("reach Open vSwitch: no such file: start it")
		o.start()
		want := onNIC0("")
		o.spec(want, switched())
		o.degraded(ReasonUnsupported, "SetBridge "+onBridge, "start it")
		o.eventually(func() error {
			if pf := o.kernel.PF(nic0); pf.NumVFs != 2 || pf.Eswitch != host.Switchdev {
				return fmt.Errorf("the NIC is %+v", pf)
			}
			return nil
		})
		if got := o.plugin.healthy("left"); len(got) > 0 {
			t.Errorf("offered without the bridge: %v", got)
		}
		away := o.away
		o.change(func() { o.away = nil })
		o.has(want)
		o.ready()

		o.change(func() { o.away = away })
		o.degraded(ReasonUnsupported, "SetBridge "+onBridge, "start it")
		o.spec(nil)
		o.degraded(ReasonUnsupported, "RemoveBridge "+onBridge, "start it")
		o.restart()
		o.degraded(ReasonUnsupported, "RemoveBridge "+onBridge, "start it")
		if is := o.server.status().Bridges.OVS; len(is) != 1 || is[0].Name != onBridge {
			t.Errorf("a bridge that is still to be removed is not told of: %+v", is)
		}
		if pf := o.kernel.PF(nic0); pf.Eswitch != host.Switchdev {
			t.Errorf("the mode changed with the uplink in the bridge: %+v", pf)
		}
		o.change(func() { o.away = nil })
		o.has(nil)
		o.ready()
		if is := o.server.status().Bridges.OVS; len(is) > 0 {
			t.Errorf("the status has %+v", is)
		}
		if pf := o.kernel.PF(nic0); pf.Eswitch != host.Legacy {
			t.Errorf("not what it was: %+v", pf)
		}
	})
}

// What fails once is told, and done the next time.
func TestEachBridgeOperationFailsOnce(t *testing.T) {
	t.Parallel()
	for method, c := range map[string]struct {
		reason string
		change func(o *ovs)
		want   *v1.OVSConfigExt
	}{
		"SetBridge":    {ReasonRefused, func(o *ovs) { o.spec(onNIC0("secure"), switched()) }, onNIC0("secure")},
		"RemoveBridge": {ReasonRefused, func(o *ovs) { o.spec(nil, switched()) }, nil},
		"DetachUplink": {ReasonRefused, func(o *ovs) {
			o.kernel.Change(func(pfs []host.PF) {
				pfs[0].Eswitch = host.Legacy
				for i := range pfs[0].VFs {
					pfs[0].VFs[i].Driver = ""
				}
			})
		}, onNIC0("")},
		"ReadBridge": {ReasonUnsupported, func(o *ovs) { o.change(func() { o.bridges[onBridge].FailMode = "secure" }) }, onNIC0("")},
	} {
		t.Run(method, func(t *testing.T) {
			simulated(t, func(t *testing.T) {
				o := newOVS(t)
				o.start()
				o.spec(onNIC0(""), switched(), wants(nic1, 2, of("right", "0-1", 0)))
				o.ready()
				o.mu.Lock()
				o.fail[method] = errors.New("the mend of " + method)
				o.mu.Unlock()
				c.change(o)
				o.eventually(func() error {
					o.server.mu.Lock()
					defer o.server.mu.Unlock()
					for _, s := range o.server.applied {
						d := meta.FindStatusCondition(s.Conditions, v1.ConditionDegraded)
						if d.Status == "True" && d.Reason == c.reason && strings.Contains(d.Message, "the mend of "+method) && strings.Contains(s.Interfaces[0].Message, method) {
							return nil
						}
					}
					return errors.New("no status tells")
				})
				if method == "ReadBridge" {
					o.change(func() {}) // it answers again
				}
				o.has(c.want)
				o.ready()
			})
		})
	}
}

// A bridge of somebody else is neither changed nor removed.
func TestForeignBridge(t *testing.T) {
	simulated(t, func(t *testing.T) {
		o := newOVS(t)
		o.bridges[onBridge] = &ovsdb.Found{Bridge: ovsdb.Bridge{Name: onBridge}, Foreign: true}
		o.start()
		o.spec(onNIC0(""), switched())
		o.degraded(ReasonUnsupported, "SetBridge "+onBridge, "ovs-vsctl del-br "+onBridge)
		o.spec(nil, switched())
		o.ready()
		o.wantCalls()
		// The SR-IOV network operator's is taken over, with what is in it.
		if err := os.WriteFile(filepath.Join(o.upstream, "managed-ovs-bridges.json"), []byte(`{"`+onBridge+`":{"name":"`+onBridge+`"}}`), 0o600); err != nil {
			t.Fatal(err)
		}
		o.spec(onNIC0(""), switched())
		o.ready()
		o.has(onNIC0(""))
		o.wantCalls("SetBridge in switchdev")
	})
}

// An uplink would lose the addresses by which the API server is reached.
func TestManagementNICIsNoUplink(t *testing.T) {
	simulated(t, func(t *testing.T) {
		o := newOVS(t)
		o.kernel.Path(3)
		o.kernel.Change(func(pfs []host.PF) { pfs[0].Eswitch = host.Switchdev })
		o.start()
		o.spec(onNIC0(""), switched())
		o.degraded(ReasonManagement, "SetBridge "+onBridge, v1.AnnotationForceManagementNIC)
		o.wantCalls()
		// By force it is tried, and taken back when it did cut the way; without the bridge the
		// rest goes on.
		o.line.when(func() error {
			o.mu.Lock()
			defer o.mu.Unlock()
			if b := o.bridges[onBridge]; b != nil && b.Uplink.Name != "" {
				return errors.New("no way")
			}
			return nil
		})
		o.server.mu.Lock()
		o.server.state.Annotations = map[string]string{v1.AnnotationForceManagementNIC: "true"}
		o.server.send()
		o.server.mu.Unlock()
		o.degraded(ReasonLost, "SetBridge "+onBridge, "no way")
		o.wantCalls("SetBridge in switchdev", "DetachUplink in switchdev")
		o.spec(nil, switched())
		o.has(nil)
		o.ready()
		o.line.when(nil)
		o.spec(onNIC0(""), with(switched(), func(i *v1.Interface) { i.Mtu = 1500 }))
		o.has(onNIC0(""))
		o.ready()
	})
}
