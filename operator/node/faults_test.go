package node

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/api/meta"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/host/hostfake"
)

// fault is how an operation of the kernel comes to be needed, in a node that has
// what is asked for.
type fault struct {
	errno  unix.Errno
	reason string
	nic    func(*host.PF)            // what the first NIC is like
	before v1.Interface              // what it has; nothing when the operation makes it
	want   v1.Interface              // what the spec asks for then
	system v1.System                 // and for the node
	change func(r *rig, fail func()) // who else does what; fail arms the failure
}

func TestEachOperationFailsOnce(t *testing.T) {
	t.Parallel()
	plain := wants(nic0, 2, of("left", "0-1", 0))
	jumbo := with(wants(nic0, 2, of("left", "0-1", 9000)), func(i *v1.Interface) { i.Mtu = 9000 })
	switchdev := with(plain, func(i *v1.Interface) { i.EswitchMode = v1.EswitchModeSwitchdev })
	vdpa := with(switchdev, func(i *v1.Interface) {
		i.VfGroups = []v1.VfGroup{with(of("left", "0-1", 0), func(g *v1.VfGroup) { g.VdpaType = "vhost" })}
	})
	returned := func(change func(*host.VF)) func(*rig, func()) {
		return func(r *rig, fail func()) {
			address := vfAddress(nic0, 0)
			r.usage.set(address, "default/p")
			r.agent.HolderChanged()
			r.eventually(func() error {
				if got := r.server.status().Interfaces[0].VFs[0].Assigned; got != "default/p" {
					return fmt.Errorf("assigned to %q", got)
				}
				return nil
			})
			fail()
			r.usage.set(address, "")
			r.kernel.Change(func(pfs []host.PF) { change(&pfs[0].VFs[0]) })
		}
	}
	looks := func(at host.Changes) func(*rig, func()) {
		return func(r *rig, fail func()) { fail(); r.kernel.Tell(at) }
	}
	everywhere := host.Changes{All: true}

	faults := map[hostfake.Op]fault{
		hostfake.Inventory:      {errno: unix.EIO, reason: ReasonUnreadable, before: plain, change: looks(everywhere)},
		hostfake.ReadPF:         {errno: unix.EIO, reason: ReasonUnreadable, before: plain, change: looks(host.Changes{Devices: []string{nic0}})},
		hostfake.ReadVFSettings: {errno: unix.EIO, reason: ReasonUnreadable, before: plain, change: looks(everywhere)},
		hostfake.RDMAMode:       {errno: unix.ENOBUFS, reason: ReasonUnreadable, before: plain, change: looks(everywhere)},
		hostfake.SetNumVFs:      {errno: unix.ENOMEM, want: plain},
		hostfake.BindDriver:     {errno: unix.ENODEV, want: plain},
		hostfake.SetVFMAC:       {errno: unix.EINVAL, want: plain},
		hostfake.SetMTU:         {errno: unix.EINVAL, before: plain, want: jumbo},
		hostfake.SetLinkUp:      {errno: unix.EIO, want: plain, nic: func(pf *host.PF) { pf.AdminUp = false }},
		hostfake.SetMAC: {errno: unix.EADDRNOTAVAIL, before: plain, change: returned(func(vf *host.VF) {
			vf.MAC = []byte{2, 0, 0, 0, 0xaa, 1}
		})},
		hostfake.Rename:          {errno: unix.EEXIST, before: plain, change: returned(func(vf *host.VF) { vf.Name = "net1" })},
		hostfake.ResetVFSettings: {errno: unix.EPERM, before: plain, change: returned(func(vf *host.VF) { vf.Admin.VLAN, vf.Admin.Trust = 100, true })},
		hostfake.UnbindDriver:    {errno: unix.EBUSY, before: plain, want: switchdev},
		hostfake.SetEswitchMode:  {errno: unix.EOPNOTSUPP, before: plain, want: switchdev},
		hostfake.SetVFGUID:       {errno: unix.EOPNOTSUPP, want: plain, nic: func(pf *host.PF) { pf.LinkType = host.InfiniBand }},
		hostfake.SetVDPA:         {errno: unix.ENODEV, before: switchdev, want: vdpa},
		hostfake.PathLinks: {errno: unix.ENETUNREACH, reason: ReasonUnverified, before: wants(nic0, 1, of("left", "0-0", 0)), change: func(r *rig, fail func()) {
			time.Sleep(pathAge) // until it is asked again
			fail()
			r.server.spec(plain, wants(nic1, 2, of("right", "0-1", 0)))
		}},
		hostfake.SetRDMAMode: {errno: unix.EPERM, before: plain, want: plain, system: v1.System{RdmaMode: v1.RdmaModeExclusive}},
	}
	// These take another node than all of the above.
	elsewhere := map[hostfake.Op]func(*testing.T){
		hostfake.RestoreVFs: TestPFGoesBackToWhatItWas, hostfake.Watch: TestEventsThatCannotBeFollowed,
		hostfake.Links: TestMacvlanTellsErrno, hostfake.AddVLAN: TestMacvlanTellsErrno, hostfake.RemoveVLAN: TestMacvlanTellsErrno,
	}
	operations := reflect.TypeFor[Kernel]()
	for i := range operations.NumMethod() {
		op := hostfake.Op(operations.Method(i).Name)
		f, listed := faults[op]
		if !listed && elsewhere[op] == nil {
			t.Errorf("nothing is said of %s", op)
		}
		if !listed {
			continue
		}
		t.Run(string(op), func(t *testing.T) {
			simulated(t, func(t *testing.T) {
				// The same without a failure tells what shall be in the end.
				right, _ := f.run(t, op, false)
				got, r := f.run(t, op, true)
				if d := cmp.Diff(right, got); d != "" {
					t.Errorf("not as without the failure: %s", d)
				}
				if c := r.condition(v1.ConditionDegraded); c.Status != "False" || r.server.status().LastSyncError != "" {
					t.Errorf("still told: %+v", c)
				}
			})
		})
	}
}

// Without events the agent would be blind: it ends, and says why. The next one works.
func TestEventsThatCannotBeFollowed(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := rigWith(t)
		r.kernel.Fail(hostfake.Watch, unix.EMFILE)
		r.start()
		if err := <-r.ended; !errors.Is(err, unix.EMFILE) || !strings.Contains(err.Error(), "the mend of Watch") {
			t.Errorf("ended by %v", err)
		}
		r.restart()
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.ready()
	})
}

func with[T any](v T, change func(*T)) T {
	change(&v)
	return v
}

// run brings a node to where the operation is needed, lets it fail, looks at what
// is told and left behind, and returns what there is when all is ready.
func (f fault) run(t *testing.T, op hostfake.Op, fails bool) ([]string, *rig) {
	r := newRig(t)
	defer r.stop()
	r.kernel.Change(func(pfs []host.PF) {
		if f.nic != nil {
			f.nic(&pfs[0])
		}
	})
	other := wants(nic1, 2, of("right", "0-1", 0))
	if f.before.PciAddress != "" {
		r.server.spec(f.before, other)
		r.ready()
	} else {
		r.server.spec(other)
		r.ready()
	}
	tries := 1
	fail := func() {
		if fails {
			r.kernel.Fail(op, f.errno)
			tries++
		}
		tries += r.kernel.Tried(op)
	}
	if f.change != nil {
		f.change(r, fail)
	} else {
		fail()
		r.server.mu.Lock()
		r.server.state.Spec.System = f.system
		r.server.mu.Unlock()
		r.server.spec(f.want, other)
	}
	if fails {
		reason := f.reason
		if reason == "" {
			reason = ReasonRefused
		}
		r.eventually(func() error {
			r.server.mu.Lock()
			defer r.server.mu.Unlock()
			for _, s := range r.server.applied {
				c := meta.FindStatusCondition(s.Conditions, v1.ConditionDegraded)
				if c.Status == "True" && c.Reason == reason && s.LastSyncError == c.Message &&
					strings.Contains(c.Message, unix.ErrnoName(f.errno)) && strings.Contains(c.Message, "the mend of "+string(op)) {
					f.told(t, s)
					return nil
				}
			}
			return fmt.Errorf("no status tells")
		})
		f.offered(r)
	}
	r.eventually(func() error {
		if got := r.kernel.Tried(op); got < tries {
			return fmt.Errorf("tried %d times, want %d", got, tries)
		}
		return nil
	})
	r.ready()
	r.eventually(func() error {
		if a, b := r.plugin.healthy("left"), r.plugin.healthy("right"); len(a) != 2 || len(b) != 2 {
			return fmt.Errorf("left offers %v, right %v", a, b)
		}
		return nil
	})
	if !fails {
		time.Sleep(time.Second) // the status may have been of before the change
		r.ready()
	}
	var out []string
	for _, nic := range []string{nic0, nic1} {
		pf := r.kernel.PF(nic)
		out = append(out, fmt.Sprint(pf.MTU, pf.AdminUp, pf.Eswitch, pf.NumVFs))
		for _, vf := range pf.VFs {
			mac := vf.MAC.String()
			if pf.LinkType == host.InfiniBand {
				mac = "" // the driver's choice
			}
			out = append(out, fmt.Sprintln(vf.Index, vf.Name, vf.Driver, mac, vf.MTU, vf.GUID, vf.VDPA, vf.Admin))
		}
	}
	return append(out, r.server.status().System.RdmaMode), r
}

// told checks the rest of the status that tells of the failure.
func (f fault) told(t *testing.T, s v1.SriovNetworkNodeStateStatus) {
	if s.Interfaces[1].NumVfs != 2 || s.Interfaces[1].Message != "" {
		t.Errorf("the other NIC was held up: %+v", s.Interfaces[1])
	}
	if ready := meta.FindStatusCondition(s.Conditions, v1.ConditionReady); ready.Status != "False" || s.SyncStatus != v1.SyncStatusFailed {
		t.Errorf("%s, Ready is %+v", s.SyncStatus, ready)
	}
	if f.reason == "" && f.system.RdmaMode == "" && !strings.Contains(fmt.Sprint(s.Interfaces[0]), unix.ErrnoName(f.errno)) {
		t.Errorf("no message on PF or VF: %+v", s.Interfaces[0])
	}
}

// offered checks, after the failure, that no VF is offered that is neither as it
// was nor as asked.
func (f fault) offered(r *rig) {
	offered := r.plugin.healthy("left") // before the status: the retry is not far
	s := r.server.status()
	if got := r.plugin.healthy("right"); len(got) != 2 {
		r.t.Errorf("of the other NIC are offered %v", got)
	}
	for _, address := range offered {
		i := slices.IndexFunc(s.Interfaces[0].VFs, func(vf v1.VirtualFunction) bool { return vf.PciAddress == address })
		if i < 0 || s.Interfaces[0].VFs[i].Message != "" || s.Interfaces[0].VFs[i].Driver == "" {
			r.t.Errorf("%s is offered: %+v", address, s.Interfaces[0])
		}
	}
}
