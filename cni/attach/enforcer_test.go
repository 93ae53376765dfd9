package attach

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/sluice-network/sluice/internal/host"
)

// policed is what the world's Enforcer has in force on an interface.
type policed struct {
	generation uint64
	enforced   bool // else nothing can pass
	cut        bool // its VF's link is taken
}

func (w *world) Load(interfaces []Interface) { w.loaded = interfaces }

func (w *world) Definition(_ context.Context, pod, _, ifName string) (string, error) {
	return "ns/net-of-" + ifName, w.call("find definition")
}

func (w *world) Deny(_ context.Context, i Interface, ns *host.Netns) error {
	if slices.ContainsFunc(w.links[ns.ID], func(l host.Netdev) bool { return l.Has(i.IfName) }) {
		return fmt.Errorf("%s is open in the pod", i.IfName)
	}
	w.policed[i.Key] = policed{generation: i.Generation} // also when it fails
	return w.call("deny all")
}

func (w *world) Enforce(_ context.Context, i Interface, _ *host.Netns) error {
	if i.Definition != "ns/net-of-"+i.IfName || i.Pod != "ns/"+i.ContainerID || len(i.MAC) != 6 || len(i.IPs) > 0 != w.leases[i.ContainerID+"/"+i.IfName] {
		return fmt.Errorf("enforce on %s: definition %q, pod %s, MAC %s, addresses %v", i.IfName, i.Definition, i.Pod, i.MAC, i.IPs)
	}
	if err := w.call("enforce policy"); err != nil {
		return err
	}
	w.policed[i.Key] = policed{generation: i.Generation, enforced: true}
	return nil
}

func (w *world) Cut(i Interface) bool { return w.policed[i.Key].cut }

func (w *world) Leave(i Interface) { w.left = append(w.left, i.Key) }

func (w *world) Remove(_ context.Context, i Interface, ns *host.Netns) error {
	if !slices.Contains(w.left, i.Key) {
		return fmt.Errorf("the namespace of %s is held", i.IfName)
	}
	if ns != nil && slices.ContainsFunc(w.links[ns.ID], func(l host.Netdev) bool { return l.Has(i.IfName) }) {
		return fmt.Errorf("%s is still in the pod", i.IfName)
	}
	if err := w.call("remove policy"); err != nil {
		return err
	}
	if w.policed[i.Key].generation == i.Generation {
		delete(w.policed, i.Key)
	}
	return nil
}

func (w *world) Differences(_ context.Context, i Interface, _ *host.Netns) (wrong []error, err error) {
	if !w.policed[i.Key].enforced {
		wrong = append(wrong, errors.New("policy is not in force"))
	}
	return wrong, w.call("compare policy")
}

// What the Enforcer needs to know of each kind, and what a successor tells its own.
func TestWhatAnEnforcerIsTold(t *testing.T) {
	forEachKind(t, func(t *testing.T, add, _ Request) {
		w, dir := newWorld(), t.TempDir()
		if _, err := newAttacher(t, w, dir, nil).Add(t.Context(), add, nil); err != nil {
			t.Fatal(err)
		}
		newAttacher(t, w, dir, nil)
		all := w.loaded
		if len(all) != 1 {
			t.Fatalf("%+v", all)
		}
		i := all[0]
		macvlan := strings.Contains(string(add.Stdin), "ens1f0")
		if (i.Parent == "ens1f0") != macvlan || (i.Bypass == "rdma is true") == macvlan || i.Unchecked == macvlan {
			t.Errorf("parent %q, bypass %q, unchecked %t", i.Parent, i.Bypass, i.Unchecked)
		}
		if !slices.Equal(i.IPs, []netip.Addr{netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("fd00::5")}) || i.Definition != "ns/net-of-net1" ||
			i.Pod != "ns/c1" || (i.PodUID == "uid-c1") != macvlan || i.Netns != w.netns[pod1] || i.DHCP {
			t.Errorf("%+v", i)
		}
	})
}

func TestUncheckedVF(t *testing.T) {
	for conf, want := range map[string]bool{"": false, `"spoofchk":"on","trust":"off"`: false, `"spoofchk":"off"`: true, `"trust":"on"`: true} {
		w := newWorld()
		a := newAttacher(t, w, t.TempDir(), nil)
		if _, err := a.Add(t.Context(), request(Add, "c1", pod1, vf0, conf), nil); err != nil {
			t.Fatal(err)
		}
		if i := a.interfaces(); i[0].Unchecked != want {
			t.Errorf("%s: %+v", conf, i)
		}
	}
}

// Whether a pod has RDMA by its VF's pool is written down: an agent that has just started
// knows of no pool.
func TestVFOfAnRDMAPool(t *testing.T) {
	w, dir := newWorld(), t.TempDir()
	a := newAttacher(t, w, dir, nil)
	a.RDMA = func(id string) bool { return id == vf0 }
	for i, vf := range []string{vf0, vf1} {
		if _, err := a.Add(t.Context(), request(Add, fmt.Sprintf("c%d", i+1), []string{pod1, pod2}[i], vf, ""), nil); err != nil {
			t.Fatal(err)
		}
	}
	newAttacher(t, w, dir, nil)
	for _, i := range w.loaded {
		if (i.Bypass == ofRDMAPool) != (i.Device == vf0) {
			t.Errorf("%s: %q", i.Device, i.Bypass)
		}
	}
	if len(w.loaded) != 2 {
		t.Errorf("%+v", w.loaded)
	}
}

// A container that is no pod has no policy, and a parent in the pod is filtered there.
func TestWithoutPolicy(t *testing.T) {
	w := newWorld()
	req := request(Add, "c1", pod1, vf0, full)
	req.Args = ""
	a := newAttacher(t, w, t.TempDir(), nil)
	if _, err := a.Add(t.Context(), req, nil); err != nil {
		t.Fatal(err)
	}
	if i := a.interfaces(); len(w.policed) > 0 || len(i) > 0 {
		t.Errorf("%v, %v", w.policed, i)
	}
	r := Record{Macvlan: &Macvlan{Parent: "eth0", InPod: true}}
	if i := r.policed(); i.Parent != "" {
		t.Errorf("%+v", i)
	}
}

func TestPolicyThatCannotBeEnforced(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		code uint
	}{
		"refused":       {WithCode(CodePolicy, errors.New("NetworkPolicy ns/p")), CodePolicy},
		"not known yet": {WithCode(types.ErrTryAgainLater, errors.New("wait")), types.ErrTryAgainLater},
		"kernel":        {errors.New("netlink"), CodeKernel},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			before := w.state()
			w.failOn, w.errno = "deny all", c.err
			a := newAttacher(t, w, t.TempDir(), nil)
			if _, err := a.Add(t.Context(), request(Add, "c1", pod1, vf0, full), nil); codeOf(err) != c.code || !errors.Is(err, c.err) {
				t.Errorf("code %d, %v", codeOf(err), err)
			}
			if w.state() != before || len(a.journal.all()) > 0 {
				t.Errorf("left %s", w.state())
			}
		})
	}
}
