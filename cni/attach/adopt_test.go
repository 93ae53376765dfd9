package attach

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/go-logr/logr"

	"github.com/sluice-network/sluice/internal/holder"
	"github.com/sluice-network/sluice/internal/host"
)

// beforeSluice leaves a VF in a pod, and sriov-cni's files of it, as that leaves them.
func beforeSluice(t *testing.T, w *world) (dir string) {
	t.Helper()
	dir = t.TempDir()
	i, err := w.find(nil, func(l host.Netdev) bool { return l.PCIAddress == vf0 })
	if err != nil {
		t.Fatal(err)
	}
	link := w.links[hostNS][i]
	pod := &host.Netns{ID: w.netns[pod1]}
	if err := w.ChangeLink(t.Context(), nil, link.Index, host.LinkChange{To: pod, Name: "net1", MAC: []byte{2, 0, 0, 0, 0, 0x77}, MTU: 9000, State: host.SetUp}); err != nil {
		t.Fatal(err)
	}
	w.settings[vf0] = host.VFSettings{MAC: []byte{2, 0, 0, 0, 0, 0x77}, VLAN: 100, VLANProto: host.Dot1Q, Trust: true}
	w.leases["c1/net1"] = true
	for file, content := range map[string]string{
		"c1-net1": fmt.Sprintf(`{"cniVersion":"1.0.0","name":"blue","type":"sriov","ipam":{"type":"static"},"dns":{},"vlan":100,"trust":"on","deviceID":%q,"VFID":0,"Master":"ens1f0",
			"OrigVfState":{"HostIFName":%q,"SpoofChk":true,"Trust":false,"AdminMAC":"00:00:00:00:00:00","EffectiveMAC":%q,"Vlan":5,"MTU":1500}}`, vf0, link.Name, link.MAC),
		"pci/" + vf0: pod1,
		"c2-net1":    "{torn",
		"c3-net1":    fmt.Sprintf(`{"name":"blue","deviceID":%q}`, vf1), // not down as in use
	} {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestPodsFromBeforeSluice(t *testing.T) {
	ctx := context.Background()
	del := request(Del, "c1", pod1, vf0, `"ipam":{"type":"static"}`)
	for name, end := range map[string]func(w *world, a *Attacher) error{
		"DEL": func(_ *world, a *Attacher) error { return a.Del(ctx, del, nil) },
		"the pod dies": func(w *world, a *Attacher) error {
			w.end(pod1)
			if err := a.Recover(ctx); err != nil {
				return err
			}
			return a.Del(ctx, del, nil)
		},
	} {
		w := newWorld()
		before := w.state()
		dir, journal := beforeSluice(t, w), t.TempDir()
		start := func() *Attacher {
			a, err := New(Options{Kernel: w, Baselines: w, IPAM: w, Dir: journal, SriovCNI: dir, Log: logr.Discard()})
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		a := start()
		running := w.state()
		if err := a.Recover(ctx); err != nil || w.state() != running {
			t.Errorf("%s: a running pod's VF was touched: %v\n%s", name, err, w.state())
		}
		if _, held := a.Holder(vf0); !held {
			t.Errorf("%s: the VF has no holder", name)
		}
		if _, held := a.Holder(vf1); held {
			t.Errorf("%s: a VF that is not in use has a holder", name)
		}
		if _, ok := a.Attached(vf0); ok {
			t.Errorf("%s: settings are said to be known", name)
		}
		if _, err := a.Add(ctx, request(Add, "c9", pod2, vf0, ""), nil); codeOf(err) != CodeHeld {
			t.Errorf("%s: another pod's ADD: %v", name, err)
		}
		a = start() // another agent: nothing is taken over twice
		if err := end(w, a); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if now := w.state(); now != before {
			t.Errorf("%s: left\n%s\nwant\n%s", name, now, before)
		}
		for _, gone := range []string{"c1-net1", "pci/" + vf0} {
			if _, err := os.Stat(filepath.Join(dir, gone)); err == nil {
				t.Errorf("%s: sriov-cni's %s is left", name, gone)
			}
		}
		if _, held := start().Holder(vf0); held {
			t.Errorf("%s: taken over again", name)
		}
	}
}

// Policy holds on what sriov-cni attached, from when the kubelet has told whose it is.
func TestPolicyOnPodsFromBeforeSluice(t *testing.T) {
	w := newWorld()
	before := w.state()
	dir, journal := beforeSluice(t, w), t.TempDir()
	i, err := w.find(&host.Netns{ID: w.netns[pod1]}, func(l host.Netdev) bool { return l.PCIAddress == vf0 })
	if err != nil {
		t.Fatal(err)
	}
	link := w.links[w.netns[pod1]][i]
	for _, a := range []string{"10.1.0.5/24", "fe80::1/64", "fd00::5/64"} {
		ip, n, err := net.ParseCIDR(a)
		if err != nil {
			t.Fatal(err)
		}
		w.addrs[link.Index] = append(w.addrs[link.Index], net.IPNet{IP: ip, Mask: n.Mask})
	}
	var pod string
	var unreachable error
	start := func() *Attacher {
		a, err := New(Options{
			Kernel: w, Baselines: w, IPAM: w, Enforcer: w, Dir: journal, SriovCNI: dir, Log: logr.Discard(),
			Allocated: func(context.Context, string) (string, bool, error) { return pod, pod != "", unreachable },
		})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	a := start()
	for _, c := range []struct {
		pod  string
		err  error
		says string
	}{{"", errors.New("kubelet is away"), "which sriov-cni attached, for network policy to hold there: kubelet is away"}, {"", nil, "does not tell it yet"}, {holder.Unnamed("7"), nil, "does not tell it yet"}} {
		pod, unreachable = c.pod, c.err
		if err := a.Recover(t.Context()); err == nil || !strings.Contains(err.Error(), c.says) || len(w.loaded) > 0 {
			t.Errorf("%+v: %v, %v", c, err, w.loaded)
		}
	}
	pod, unreachable = "ns/c1", nil
	is := func(when string) {
		t.Helper()
		want := Interface{
			Key: Key{"blue", "c1", "net1"}, Generation: 1, Pod: "ns/c1", Device: vf0, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 0x77},
			IPs: []netip.Addr{netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("fd00::5")}, NetnsPath: pod1, Netns: w.netns[pod1], Unchecked: true,
		}
		if !reflect.DeepEqual(w.loaded, []Interface{want}) {
			t.Errorf("%s: %#v, not %#v", when, w.loaded, want)
		}
	}
	if err := a.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	is("told by the kubelet")
	w.loaded = nil
	if err := a.Recover(t.Context()); err != nil || w.loaded != nil {
		t.Errorf("told twice: %v, %v", w.loaded, err)
	}
	a = start()
	is("next agent")
	w.policed[w.loaded[0].Key] = policed{generation: 1, enforced: true}
	if err := a.Del(t.Context(), request(Del, "c1", pod1, vf0, `"ipam":{"type":"static"}`), nil); err != nil {
		t.Error(err)
	}
	delete(w.addrs, link.Index) // the kernel's, when a link moves
	if now := w.state(); now != before {
		t.Errorf("left\n%s\nwant\n%s", now, before)
	}
}

// What else is known of such a VF: that packets go past the kernel, and how its address comes.
func TestAdoptedVFsThatDiffer(t *testing.T) {
	w := newWorld()
	dir, journal := beforeSluice(t, w), t.TempDir()
	file := filepath.Join(dir, "c1-net1")
	if err := os.WriteFile(file, fmt.Appendf(nil, `{"name":"blue","deviceID":%q,"ipam":{"type":"dhcp"}}`, vf0), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := New(Options{
		Kernel: w, Baselines: w, IPAM: w, Enforcer: w, Dir: journal, SriovCNI: dir, Log: logr.Discard(),
		Allocated: func(context.Context, string) (string, bool, error) { return "ns/c1", true, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(w.loaded) != 1 || !w.loaded[0].DHCP || w.loaded[0].Bypass != "its driver gives the VF to user space" {
		t.Errorf("%+v", w.loaded)
	}
}
