package node

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/host/hostfake"
)

func (s *server) macvlans(parents ...v1.MacvlanParent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.Generation++
	s.state.Spec.Macvlans = parents
	s.send()
}

func parent(resource, link string, vlan, mtu, slots int) v1.MacvlanParent {
	return v1.MacvlanParent{PolicyName: "p-" + resource, ResourceName: resource, Link: link, Vlan: vlan, Mtu: mtu, Slots: slots}
}

// slots lists the slots of a resource that are offered, and with "!" those that are not.
func (p *plugin) slots(resource string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for _, pool := range p.pools {
		for _, d := range pool.Devices {
			switch {
			case pool.Resource != resource || d.Slot == "":
			case d.Healthy:
				out = append(out, d.Slot)
			default:
				out = append(out, d.Slot+"!")
			}
		}
	}
	return strings.Join(out, " ")
}

func (r *rig) offers(resource, want string) {
	r.t.Helper()
	r.eventually(func() error {
		if got := r.plugin.slots(resource); got != want {
			return fmt.Errorf("%s offers %q, want %q", resource, got, want)
		}
		return nil
	})
}

// link gives the link as the kernel has it now, nil when there is none.
func (r *rig) link(name string) *host.ParentLink {
	r.t.Helper()
	links, err := r.kernel.Links(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	at := slices.IndexFunc(links, func(l host.ParentLink) bool { return l.Name == name })
	if at < 0 {
		return nil
	}
	return &links[at]
}

func virtualLinks() []host.ParentLink {
	return []host.ParentLink{
		{Name: "bond0", Kind: host.BondLink, MTU: 1500, NUMANode: 1, AltNames: []string{"uplink"}},
		{Name: "br0", Kind: host.BridgeLink, MTU: 1500, AdminUp: true, NUMANode: -1},
		{Name: "storage", Kind: host.VLANLink, Lower: "br0", VLAN: 7, MTU: 1400, AdminUp: true, NUMANode: -1},
		{Name: "port0", Kind: host.PhysicalLink, Master: "bond0", MTU: 1500, AdminUp: true, NUMANode: 1},
	}
}

func newMacvlanRig(t *testing.T) *rig {
	r := newRig(t)
	r.kernel.SetLinks(func([]host.ParentLink) []host.ParentLink { return virtualLinks() })
	return r
}

func TestMacvlanFromNothingToSlots(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newMacvlanRig(t)
		r.ready()
		r.eventually(func() error {
			if n := len(r.server.status().Links); n != 6 {
				return fmt.Errorf("%d links", n)
			}
			return nil
		})
		if diff := cmp.Diff(v1.Link{Name: "bond0", Kind: "bond", Mtu: 1500, LinkAdminState: "down", AltNames: []string{"uplink"}}, r.server.status().Links[0]); diff != "" {
			t.Error(diff)
		}
		before := *r.link("br0")
		r.server.macvlans(parent("plain", "ens1f0", 0, 0, 2), parent("jumbo", "bond0", 100, 9000, 2), parent("jumbo", "storage", 0, 1450, 1))
		r.ready()
		r.offers("plain", "ens1f0-0 ens1f0-1")
		r.offers("jumbo", "bond0.100-0 bond0.100-1 storage-0")
		if l := r.link("bond0.100"); l == nil || !l.Managed || l.MTU != 9000 || !l.AdminUp {
			t.Errorf("%+v", l)
		}
		if l := r.link("bond0"); l.MTU != 9000 || !l.AdminUp {
			t.Errorf("%+v", l)
		}
		if l := r.link("storage"); l.MTU != 1450 || l.Managed || !cmp.Equal(before, *r.link("br0")) {
			t.Errorf("storage is %+v, the link below %+v", l, r.link("br0"))
		}
		for _, pool := range r.plugin.pools {
			if d := pool.Devices[0]; d.Slot == "bond0.100-0" && d.NUMANode != 1 {
				t.Errorf("%+v", d)
			}
		}
		s := r.server.status()
		want := []v1.MacvlanParentStatus{
			{PolicyName: "p-plain", ResourceName: "plain", Link: "ens1f0", Parent: "ens1f0", Ready: true, Slots: 2},
			{PolicyName: "p-jumbo", ResourceName: "jumbo", Link: "bond0", Parent: "bond0.100", Ready: true, Slots: 2},
			{PolicyName: "p-jumbo", ResourceName: "jumbo", Link: "storage", Parent: "storage", Ready: true, Slots: 1},
		}
		if diff := cmp.Diff(want, s.Macvlans); diff != "" {
			t.Error(diff)
		}
		if c := r.condition(v1.ConditionReady); !strings.Contains(c.Message, "the slots of 3 MacVLAN parents are offered") {
			t.Errorf("%+v", c)
		}

		// Nothing changes, nothing is written or done; not after a restart either.
		r.kernel.Calls()
		n := len(r.server.applied)
		r.kernel.Tell(host.Changes{All: true})
		time.Sleep(700 * time.Millisecond)
		r.restart()
		time.Sleep(700 * time.Millisecond)
		if calls := r.kernel.Calls(); len(calls) > 0 || len(r.server.applied) != n {
			t.Errorf("%d writes, calls %v", len(r.server.applied)-n, calls)
		}
	})
}

// What is made goes with its policy: not what others made, not what is in use, and not
// before the spec can be known.
func TestMacvlanParentsGo(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newMacvlanRig(t)
		r.server.macvlans(parent("a", "ens1f0", 100, 0, 2), parent("b", "br0", 7, 0, 2), parent("c", "ens1f0", 200, 0, 2))
		r.ready()
		r.usage.set("ens1f0.100-1", "default/pod")
		r.kernel.SetUser("ens1f0.200", "an address")
		r.agent.HolderChanged()
		r.eventually(func() error {
			if used := r.server.status().Macvlans[0].Used; used != 1 {
				return fmt.Errorf("%d used", used)
			}
			return nil
		})
		r.server.macvlans()
		r.ready()
		r.offers("a", "")
		time.Sleep(100 * time.Millisecond)
		for _, name := range []string{"ens1f0.100", "ens1f0.200", "storage"} {
			if r.link(name) == nil {
				t.Errorf("%s is gone", name)
			}
		}
		r.usage.mu.Lock()
		r.usage.err = errors.New("the kubelet is away")
		r.usage.mu.Unlock()
		r.usage.set("ens1f0.100-1", "")
		r.agent.HolderChanged()
		time.Sleep(200 * time.Millisecond)
		if r.link("ens1f0.100") == nil {
			t.Error("it went while nobody knew who holds what")
		}
		r.usage.mu.Lock()
		r.usage.err = nil
		r.usage.mu.Unlock()
		r.kernel.SetUser("ens1f0.200", "")
		r.agent.HolderChanged()
		r.eventually(func() error {
			if r.link("ens1f0.100") != nil || r.link("ens1f0.200") != nil {
				return errors.New("what was made is still there")
			}
			return nil
		})
		if r.link("storage") == nil {
			t.Error("somebody else's device is gone")
		}

		// A new agent knows its own, and an object that was not rendered yet asks for nothing.
		r.server.macvlans(parent("a", "ens1f0", 100, 0, 2))
		r.ready()
		r.stop()
		r.server.mu.Lock()
		r.server.state = &v1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Name: "vm1", Namespace: "sluice", Generation: 1, UID: "2"}}
		r.server.mu.Unlock()
		r.restart()
		r.eventually(func() error {
			if len(r.server.status().Links) == 0 {
				return errors.New("no inventory")
			}
			return nil
		})
		time.Sleep(100 * time.Millisecond)
		if r.link("ens1f0.100") == nil {
			t.Error("it went before the spec was rendered")
		}
		r.server.macvlans()
		r.eventually(func() error {
			if r.link("ens1f0.100") != nil {
				return errors.New("what was made is still there")
			}
			return nil
		})
	})
}

func TestFewerSlots(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newMacvlanRig(t)
		r.server.macvlans(parent("a", "br0", 0, 0, 3))
		r.ready()
		r.usage.set("br0-0", "default/x")
		r.usage.set("br0-2", "default/y")
		r.server.macvlans(parent("a", "br0", 0, 0, 1))
		r.offers("a", "br0-0 br0-2!")
		r.ready()
		if got := r.server.status().Macvlans[0]; got.Used != 2 || got.Slots != 1 {
			t.Errorf("%+v", got)
		}
		r.usage.set("br0-2", "")
		r.agent.HolderChanged()
		r.offers("a", "br0-0")
		if calls := r.kernel.Calls(); len(calls) > 0 {
			t.Errorf("slots are nothing to the kernel: %v", calls)
		}
	})
}

// Each operation fails once: the status tells, other parents are not held up, and it
// comes right by itself.
func TestMacvlanTellsErrno(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		op   hostfake.Op
		want string
	}{
		{hostfake.SetMTU, "set MTU 9000 on bond0"},
		{hostfake.SetLinkUp, "set the link up on bond0"},
		{hostfake.AddVLAN, "make VLAN device bond0.100 on bond0"},
	} {
		t.Run(string(c.op), func(t *testing.T) {
			simulated(t, func(t *testing.T) {
				r := newMacvlanRig(t)
				r.ready()
				r.kernel.Fail(c.op, unix.EBUSY)
				r.server.macvlans(parent("bad", "bond0", 100, 9000, 1), parent("good", "br0", 0, 0, 1))
				r.degraded(ReasonRefused, "MacVLAN parent bond0.100 (policy p-bad): "+c.want, "(EBUSY)")
				r.offers("good", "br0-0")
				if got := r.plugin.slots("bad"); got != "bond0.100-0!" {
					t.Errorf("offered: %s", got)
				}
				m := r.server.status().Macvlans
				if m[0].Ready || !strings.Contains(m[0].Message, "(EBUSY)") || !m[1].Ready {
					t.Errorf("%+v", m)
				}
				r.ready()
				r.offers("bad", "bond0.100-0")
				if l := r.link("bond0.100"); l == nil || l.MTU != 9000 {
					t.Errorf("%+v", l)
				}
			})
		})
	}
	t.Run("put right by somebody else", func(t *testing.T) {
		simulated(t, func(t *testing.T) {
			r := newMacvlanRig(t)
			r.ready()
			r.kernel.Fail(hostfake.SetMTU, unix.EBUSY, unix.EBUSY, unix.EBUSY, unix.EBUSY, unix.EBUSY)
			r.server.macvlans(parent("a", "br0", 0, 9000, 1))
			r.degraded(ReasonRefused, "(EBUSY)")
			r.kernel.SetLinks(func(links []host.ParentLink) []host.ParentLink {
				links[1].MTU = 9000
				return links
			})
			start := time.Now()
			r.ready()
			if waited := time.Since(start); waited > firstRetry/2 {
				t.Errorf("noticed after %s", waited)
			}
		})
	})
	t.Run("RemoveVLAN", func(t *testing.T) {
		simulated(t, func(t *testing.T) {
			r := newMacvlanRig(t)
			r.server.macvlans(parent("a", "br0", 100, 0, 1))
			r.ready()
			r.kernel.Fail(hostfake.RemoveVLAN, unix.EPERM)
			r.server.macvlans()
			r.degraded(ReasonRefused, "VLAN device br0.100, which no policy asks for any more", "(EPERM)")
			r.ready()
			if r.link("br0.100") != nil {
				t.Error("it is still there")
			}
		})
	})
	t.Run("Links", func(t *testing.T) {
		simulated(t, func(t *testing.T) {
			r := newMacvlanRig(t)
			r.server.macvlans(parent("a", "br0", 100, 0, 1))
			r.ready()
			time.Sleep(200 * time.Millisecond) // its own events are over
			r.kernel.Fail(hostfake.Links, unix.ENOBUFS)
			r.kernel.Tell(host.Changes{Parents: true})
			r.degraded(ReasonUnreadable, "list on links: no buffer space available (ENOBUFS)")
			r.offers("a", "br0.100-0")
			r.ready()
		})
	})
	t.Run("nothing happens", func(t *testing.T) {
		simulated(t, func(t *testing.T) {
			r := newMacvlanRig(t)
			r.kernel.Ignore(hostfake.SetMTU, true)
			r.server.macvlans(parent("a", "br0", 0, 9000, 1))
			r.degraded(ReasonRefused, "RaiseLinkMTU 9000 on br0: the kernel reported success and nothing changed")
		})
	})
}

func TestMacvlanDrift(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newMacvlanRig(t)
		r.server.macvlans(parent("a", "br0", 100, 1500, 1), parent("b", "ens1f0", 0, 0, 1))
		r.ready()
		drop := func(links []host.ParentLink) []host.ParentLink {
			return slices.DeleteFunc(links, func(l host.ParentLink) bool { return l.Name == "br0.100" })
		}
		was := r.link("br0.100").IfIndex
		r.kernel.SetLinks(drop)
		r.eventually(func() error {
			if l := r.link("br0.100"); l == nil || l.IfIndex == was {
				return fmt.Errorf("not made again: %+v", l)
			}
			return nil
		})
		r.kernel.SetLinks(func(links []host.ParentLink) []host.ParentLink {
			for i := range links {
				if links[i].Name == "br0.100" {
					links[i].MTU, links[i].AdminUp = 1300, false
				}
			}
			return links
		})
		r.kernel.Change(func(pfs []host.PF) { pfs[0].AdminUp = false })
		r.eventually(func() error {
			if l := r.link("br0.100"); l.MTU != 1500 || !l.AdminUp || !r.link("ens1f0").AdminUp {
				return fmt.Errorf("%+v, %+v", l, r.link("ens1f0"))
			}
			return nil
		})

		// What is gone, or has become a port, is not offered, until it is back.
		r.kernel.SetLinks(func([]host.ParentLink) []host.ParentLink { return nil })
		r.degraded(ReasonNoParent, "MacVLAN parent br0.100 (policy p-a): link br0: the node has no such link now")
		r.offers("a", "br0.100-0!")
		r.kernel.SetLinks(func([]host.ParentLink) []host.ParentLink {
			links := virtualLinks()
			links[1].Master = "ovs-system"
			return links
		})
		r.degraded(ReasonNoParent, "link br0 is a port of ovs-system", "EBUSY")
		r.kernel.SetLinks(func([]host.ParentLink) []host.ParentLink { return virtualLinks() })
		r.ready()
		r.offers("a", "br0.100-0")
		r.offers("b", "ens1f0-0")
	})
}

// VFs in a pool are no parents; others are.
func TestPooledVFsAreNoLinks(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newMacvlanRig(t)
		r.server.spec(wants(nic0, 3, of("left", "0-1", 0)))
		r.ready()
		var names []string
		r.eventually(func() error {
			names = nil
			for _, l := range r.server.status().Links {
				if l.PciAddress != "" {
					names = append(names, l.Name)
				}
			}
			if strings.Join(names, " ") != "ens1f0 ens1f0v2 ens2f0" {
				return fmt.Errorf("links %v", names)
			}
			return nil
		})
	})
}

// The MTU of a PF is not taken back while a parent needs it: pods would lose theirs.
func TestParentsKeepTheirMTU(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newMacvlanRig(t)
		jumbo := wants(nic0, 1, of("left", "0-0", 9000))
		jumbo.Mtu = 9000
		r.server.macvlans(parent("a", "ens1f0", 100, 8000, 1))
		r.server.spec(jumbo)
		r.ready()
		r.server.spec()
		r.eventually(func() error {
			if l := r.link("ens1f0"); l.MTU != 8000 {
				return fmt.Errorf("MTU %d", l.MTU)
			}
			return nil
		})
		for _, call := range r.kernel.Calls() {
			if strings.HasPrefix(call, "set MTU 1500 on "+nic0) {
				t.Error(call)
			}
		}
	})
}

func TestParentMTU(t *testing.T) {
	a := New(Config{})
	a.state = &v1.SriovNetworkNodeState{}
	a.state.Spec.Macvlans = []v1.MacvlanParent{parent("a", "storage", 0, 9000, 1), parent("b", "uplink", 5, 4000, 1), parent("c", "bond0", 6, 3000, 1)}
	a.parents.links = virtualLinks()
	for link, want := range map[string]int{"storage": 9000, "br0": 9000, "bond0": 4000, "port0": 4000, "ens1f0": 0} {
		if got := a.parentMTU(link); got != want {
			t.Errorf("%s: %d, want %d", link, got, want)
		}
	}
}
