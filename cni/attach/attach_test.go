package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/sluice-network/sluice/internal/host"
)

func TestAddDel(t *testing.T) {
	w := newWorld()
	before := w.state()
	a := newAttacher(t, w, t.TempDir(), nil)
	ctx := context.Background()

	out, err := a.Add(ctx, request(Add, "c1", pod1, vf0, full), nil)
	if err != nil {
		t.Fatal(err)
	}
	r := must(types100.NewResult(out)).(*types100.Result)
	i := r.Interfaces[0]
	if i.Name != "net1" || i.Mac != "02:00:00:00:00:99" || i.Mtu != 9000 || i.Sandbox != pod1 || i.PciID != vf0 {
		t.Errorf("interface is %+v", i)
	}
	if len(r.IPs) != 2 || *r.IPs[0].Interface != 0 || len(r.Routes) != 2 {
		t.Errorf("result is %s", out)
	}
	s := w.settings[vf0]
	if s.VLAN != 100 || s.VLANQoS != 3 || s.SpoofChk || !s.Trust || s.MaxTxRate != 100 || s.MAC.String() != i.Mac {
		t.Errorf("VF has %+v", s)
	}
	if l := w.links[w.netns[pod1]][0]; !l.Up || l.Name != "net1" || l.MTU != 9000 {
		t.Errorf("link is %+v", l)
	}
	if n := slices.Index(w.calls, "read VF settings"); n >= 0 {
		t.Errorf("ADD with a known baseline read the VF list")
	}
	if pod, held := a.Holder(vf0); !held || pod != "ns/c1" {
		t.Errorf("holder is %q, %v", pod, held)
	}

	// the same again: the same answer, nothing done
	calls := len(w.calls)
	again, err := a.Add(ctx, request(Add, "c1", pod1, vf0, full), nil)
	if err != nil || string(again) != string(out) || len(w.calls) != calls {
		t.Errorf("second ADD: %s, %v, %d calls", again, err, len(w.calls)-calls)
	}

	check := request(Check, "c1", pod1, vf0, full+`,"prevResult":`+string(out))
	if err := a.Check(ctx, check, nil); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	for range 2 {
		if err := a.Del(ctx, request(Del, "c1", pod1, vf0, full), nil); err != nil {
			t.Fatal(err)
		}
		if after := w.state(); after != before {
			t.Errorf("DEL left\n%s, was\n%s", after, before)
		}
	}
	if _, held := a.Holder(vf0); held {
		t.Error("the VF is held after DEL")
	}
}

// A VF is for the pod the kubelet gave it to, whatever a network definition says.
func TestAddOnlyToWhomTheVFIsAllocated(t *testing.T) {
	for name, c := range map[string]struct {
		vf, pod string
		err     error
		code    uint // of the refusal; 0 for none
	}{
		"this pod":                 {vf: vf0, pod: "ns/c1"},
		"another pod":              {vf: vf0, pod: "ns/other", code: CodeHeld},
		"none, VF of a pool":       {vf: vf0, code: CodeHeld},
		"none, VF of no pool":      {vf: vf1},
		"the kubelet is not there": {vf: vf0, err: syscall.ECONNREFUSED, code: types.ErrTryAgainLater},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			before := w.state()
			a := newAttacher(t, w, t.TempDir(), nil)
			a.Allocated = func(_ context.Context, pci string) (string, bool, error) {
				if pci != c.vf {
					t.Errorf("asked for %s", pci)
				}
				return c.pod, c.pod != "", c.err
			}
			_, err := a.Add(t.Context(), request(Add, "c1", pod1, c.vf, ""), nil)
			if c.code == 0 {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || codeOf(err) != c.code || !strings.Contains(err.Error(), c.vf) {
				t.Errorf("code %d, %v; want code %d", codeOf(err), err, c.code)
			}
			if after := w.state(); after != before {
				t.Errorf("changed to\n%s, was\n%s", after, before)
			}
		})
	}
}

// untrusted is full for a VF whose MAC is not the pod's to change.
var untrusted = strings.Replace(full, `"trust":"on"`, `"trust":"off"`, 1)

func TestCheckLeavesATrustedMAC(t *testing.T) {
	for conf, fine := range map[string]bool{full: true, untrusted: false} {
		w := newWorld()
		a := newAttacher(t, w, t.TempDir(), nil)
		out, err := a.Add(context.Background(), request(Add, "c1", pod1, vf0, conf), nil)
		if err != nil {
			t.Fatal(err)
		}
		s := w.settings[vf0]
		s.MAC = []byte{2, 0, 0, 0, 0, 1}
		w.settings[vf0], w.links[w.netns[pod1]][0].MAC = s, s.MAC
		if err = a.Check(context.Background(), request(Check, "c1", pod1, vf0, conf+`,"prevResult":`+string(out)), nil); (err == nil) != fine {
			t.Errorf("CHECK with another MAC, %s: %v", conf, err)
		}
	}
}

func TestCheckFindsEveryChange(t *testing.T) {
	for name, change := range map[string]struct {
		do   func(*world, *host.Netdev)
		says string
	}{
		"renamed":    {func(_ *world, l *host.Netdev) { l.Name = "eth9" }, "interface net1 is missing"},
		"MAC":        {func(_ *world, l *host.Netdev) { l.MAC = []byte{2, 0, 0, 0, 0, 1} }, "MAC 02:00:00:00:00:01"},
		"MTU":        {func(_ *world, l *host.Netdev) { l.MTU = 1400 }, "MTU 1400"},
		"down":       {func(_ *world, l *host.Netdev) { l.Up = false }, "is down"},
		"other link": {func(_ *world, l *host.Netdev) { l.PCIAddress = "" }, "is not the VF's"},
		"address":    {func(w *world, l *host.Netdev) { w.addrs[l.Index] = w.addrs[l.Index][1:] }, "lacks address 10.1.0.5/24"},
		"route":      {func(w *world, l *host.Netdev) { w.routes[l.Index] = nil }, "route to 10.9.0.0/16"},
		"vlan":       {func(w *world, _ *host.Netdev) { s := w.settings[vf0]; s.VLAN = 7; w.settings[vf0] = s }, "vlan of the VF is 7"},
		"trust":      {func(w *world, _ *host.Netdev) { s := w.settings[vf0]; s.Trust = false; w.settings[vf0] = s }, "trust of the VF is off, not on"},
		"link taken": {func(w *world, _ *host.Netdev) {
			w.policed[Key{"blue", "c1", "net1"}] = policed{generation: 1, enforced: true, cut: true}
		}, "link_state of the VF is"},
		"VF gone":       {func(w *world, _ *host.Netdev) { delete(w.vfs, vf0) }, "no such VF"},
		"policy":        {func(w *world, _ *host.Netdev) { clear(w.policed) }, "policy is not in force"},
		"IPAM disagree": {func(w *world, _ *host.Netdev) { w.failOn = "IPAM CHECK" }, "IPAM"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			a := newAttacher(t, w, t.TempDir(), nil)
			conf := full
			if name == "MAC" {
				conf = untrusted
			}
			out, err := a.Add(context.Background(), request(Add, "c1", pod1, vf0, conf), nil)
			if err != nil {
				t.Fatal(err)
			}
			change.do(w, &w.links[w.netns[pod1]][0])
			err = a.Check(context.Background(), request(Check, "c1", pod1, vf0, conf+`,"prevResult":`+string(out)), nil)
			if err == nil || !strings.Contains(err.Error(), change.says) {
				t.Errorf("CHECK says %v, not %q", err, change.says)
			}
		})
	}
}

// attachments are requests of every kind, with every step that there is.
var attachments = map[string]Request{
	"VF":                   request(Add, "c1", pod1, vf0, full+`,"hostInterface":{"routes":["10.96.0.0/12","fd96::/112"]},"conflictProbe":50`),
	"MacVLAN":              macvlanRequest("c1", pod1, `"deviceID":"ens1f0-7","hostInterface":{"routes":["10.96.0.0/12"]}`),
	"MacVLAN without slot": macvlanRequest("c1", pod1, `"master":"ens1f0"`),
}

// forEachKind runs f for each of attachments.
func forEachKind(t *testing.T, f func(t *testing.T, add, del Request)) {
	for name, add := range attachments {
		t.Run(name, func(t *testing.T) {
			del := add
			del.Command = Del
			f(t, add, del)
		})
	}
}

// TestEachFailureOfAdd fails each call of an ADD once: the ADD fails with the
// cause, all is as before, and the next ADD works.
func TestEachFailureOfAdd(t *testing.T) {
	forEachKind(t, func(t *testing.T, req, _ Request) {
		ctx := context.Background()
		// vf1 has no baseline and a stale alternative name, so that every step is taken.
		req.Stdin = []byte(strings.Replace(string(req.Stdin), vf0, vf1, 1))
		prepare := func() *world {
			w := newWorld()
			w.links[hostNS][1].AltNames = append(w.links[hostNS][1].AltNames, "net1")
			return w
		}
		probe := prepare()
		if _, err := newAttacher(t, probe, t.TempDir(), nil).Add(ctx, req, nil); err != nil {
			t.Fatal(err)
		}
		t.Logf("%-45s %-6s %-6s %s", "failing call of ADD", "code", "undone", "retry")
		for i, call := range probe.calls {
			w := prepare()
			before := strings.ReplaceAll(w.state(), " net1]", "]") // a stale name need not come back
			dir := t.TempDir()
			a := newAttacher(t, w, dir, nil)
			w.failAt = i
			_, err := a.Add(ctx, req, nil)
			w.failAt = -1
			undone := strings.ReplaceAll(w.state(), " net1]", "]") == before && len(a.journal.all()) == 0
			files, _ := filepath.Glob(filepath.Join(dir, "*"))
			if strings.HasPrefix(call, "change link ens1f0v1") && err == nil {
				// A move that fails with a MAC in it is done again without.
				t.Logf("%-45s %-6s (second way)", call, "0")
				continue
			}
			_, retry := a.Add(ctx, req, nil)
			t.Logf("%-45s %-6d %-6v %v", call, codeOf(err), undone, retry == nil)
			if !injected(w, err) || !undone || len(files) != 0 || retry != nil {
				t.Errorf("failing %q: error %v, files %v, retry %v, state\n%s, was\n%s", call, err, files, retry, w.state(), before)
			}
		}
	})
}

// TestEachFailureOfDel fails each call of a DEL once: the DEL says so, and the
// next one ends at the baseline.
func TestEachFailureOfDel(t *testing.T) {
	forEachKind(t, func(t *testing.T, add, del Request) {
		ctx := context.Background()
		attached := func() (*world, *Attacher, string) {
			w := newWorld()
			before := w.state()
			a := newAttacher(t, w, t.TempDir(), nil)
			if _, err := a.Add(ctx, add, nil); err != nil {
				t.Fatal(err)
			}
			return w, a, before
		}
		probe, a, _ := attached()
		start := len(probe.calls)
		if err := a.Del(ctx, del, nil); err != nil {
			t.Fatal(err)
		}
		for i := start; i < len(probe.calls); i++ {
			w, a, before := attached()
			w.failAt = i
			err := a.Del(ctx, del, nil)
			w.failAt = -1
			r, _ := a.journal.get(Key{"blue", "c1", "net1"})
			if probe.calls[i] == "IPAM DEL" && r.Phase != Returned {
				t.Errorf("a device waits for IPAM")
			}
			retry := a.Del(ctx, del, nil)
			t.Logf("%-40s error %v, retry %v", probe.calls[i], err != nil, retry)
			if !injected(w, err) || retry != nil || w.state() != before || len(a.journal.all()) != 0 {
				t.Errorf("failing %q: error %v, retry %v, state\n%s", probe.calls[i], err, retry, w.state())
			}
		}
	})
}

// keeper is the daemon of dhcp: its socket keeps a namespace alive that has no path
// any more, until the lease is released.
type keeper struct {
	*world
	of   host.NetnsID
	away bool // once
	told bool // the server of the release, over the link
}

func (k *keeper) Exec(ctx context.Context, plugin string, req Request) (*types100.Result, error) {
	if req.Command == Del && k.away {
		k.away = false
		return nil, fail(CodeIPAM, "dial DHCP daemon: %w", k.errno)
	}
	if req.Command == Del {
		k.told = k.told || slices.ContainsFunc(k.links[k.of], func(l host.Netdev) bool { return l.Name == req.IfName })
		if _, ok := k.netns[pod1]; !ok {
			k.netns[pod1] = k.of
			k.end(pod1)
		}
	}
	return k.world.Exec(ctx, plugin, req)
}

// DHCP releases its lease over the link, also in a namespace that only its daemon keeps
// alive; with the daemon away the device does not wait for it.
func TestDHCPGoesBeforeTheLink(t *testing.T) {
	for name, c := range map[string]struct{ ended, away bool }{"pod": {}, "ended pod": {ended: true}, "daemon away": {away: true}} {
		ctx, w := context.Background(), newWorld()
		before := w.state()
		k := &keeper{world: w, of: w.netns[pod1], away: c.away}
		a := newAttacher(t, w, t.TempDir(), nil)
		a.IPAM = k
		add := request(Add, "c1", pod1, vf0, `"ipam":{"type":"dhcp"}`)
		if _, err := a.Add(ctx, add, nil); err != nil {
			t.Fatal(err)
		}
		if c.ended {
			delete(w.netns, pod1)
		}
		if err := a.Recover(ctx); err != nil {
			t.Errorf("%s: recover: %v", name, err)
		}
		if err := a.Del(ctx, add, nil); err != nil || k.told == c.away {
			t.Errorf("%s: DEL: %v, the server was told: %v", name, err, k.told)
		}
		if w.state() != before && !c.ended || len(w.leases) > 0 || len(a.journal.all()) > 0 || len(w.links[hostNS]) < 2 {
			t.Errorf("%s: state\n%s", name, w.state())
		}
	}
}

type crash struct{ step string }

// crashing runs f until the step with the number at, and names that step; "" when
// f ended before.
func crashing(a *Attacher, at int, f func()) (step string) {
	n := 0
	a.OnStep = func(s string) {
		if n == at {
			panic(crash{s})
		}
		n++
	}
	defer func() {
		a.OnStep = nil
		if p := recover(); p != nil {
			step = p.(crash).step
		}
	}()
	f()
	return ""
}

// TestAgentDiesAtEachStep ends the agent at each step of ADD and of DEL. Its
// successor finds the device properly attached or brings it to the baseline.
func TestAgentDiesAtEachStep(t *testing.T) {
	forEachKind(t, agentDiesAtEachStep)
	t.Run("VF with DHCP", func(t *testing.T) {
		add := request(Add, "c1", pod1, vf0, `"ipam":{"type":"dhcp"}`)
		del := add
		del.Command = Del
		agentDiesAtEachStep(t, add, del)
	})
}

func agentDiesAtEachStep(t *testing.T, add, del Request) {
	ctx := context.Background()
	for at, done := 0, false; !done; at++ {
		w, dir := newWorld(), t.TempDir()
		before := w.state()
		a := newAttacher(t, w, dir, nil)
		var out []byte
		step := crashing(a, at, func() { out, _ = a.Add(ctx, add, nil); _ = a.Del(ctx, del, nil) })
		done = step == ""
		b := newAttacher(t, w, dir, nil)
		err := b.Recover(ctx)
		if err != nil {
			t.Errorf("dead at %q: recover: %v", step, err)
		}
		rec, held := b.journal.get(Key{"blue", "c1", "net1"})
		t.Logf("dead at %-25q held %v", step, held)
		if !held && w.state() != before {
			t.Errorf("dead at %q: state\n%s", step, w.state())
		}
		if held {
			check := add
			check.Command = Check
			check.Stdin = []byte(strings.TrimSuffix(string(add.Stdin), "}") + `,"prevResult":` + string(rec.Result) + "}")
			if err = b.Check(ctx, check, nil); err != nil {
				t.Errorf("dead at %q: half attached: %v", step, err)
			}
		}
		if out, err = b.Add(ctx, add, nil); err != nil || !slices.ContainsFunc(w.links[w.netns[pod1]], func(l host.Netdev) bool { return l.Name == "net1" }) {
			t.Errorf("dead at %q: retry of ADD: %s, %v", step, out, err)
		}
		if err := b.Del(ctx, del, nil); err != nil || w.state() != before {
			t.Errorf("dead at %q: DEL after it: %v, state\n%s", step, err, w.state())
		}
	}
}

func TestLateDelLeavesTheNewOwnerAlone(t *testing.T) {
	ctx := context.Background()
	w := newWorld()
	a := newAttacher(t, w, t.TempDir(), nil)
	if _, err := a.Add(ctx, request(Add, "c1", pod1, vf0, `"vlan":100`), nil); err != nil {
		t.Fatal(err)
	}
	w.end(pod1)
	if _, err := a.Add(ctx, request(Add, "c2", pod2, vf0, `"vlan":200`), nil); err != nil {
		t.Fatal(err)
	}
	now := w.state()
	if err := a.Del(ctx, request(Del, "c1", "", vf0, `"vlan":100`), nil); err != nil {
		t.Fatal(err)
	}
	if w.state() != now || w.settings[vf0].VLAN != 200 {
		t.Errorf("a late DEL changed the VF of another pod: %s", w.state())
	}
	if pod, _ := a.Holder(vf0); pod != "ns/c2" {
		t.Errorf("holder is %q", pod)
	}
}

// TestLateDelAfterFailedIPAM is the same with an address that could not be
// released when the VF changed its owner.
func TestLateDelAfterFailedIPAM(t *testing.T) {
	ctx := context.Background()
	w := newWorld()
	a := newAttacher(t, w, t.TempDir(), nil)
	req := request(Add, "c1", pod1, vf0, full)
	if _, err := a.Add(ctx, req, nil); err != nil {
		t.Fatal(err)
	}
	probe := newWorld()
	b := newAttacher(t, probe, t.TempDir(), nil)
	_, _ = b.Add(ctx, req, nil)
	probe.end(pod1)
	_, _ = b.Add(ctx, request(Add, "c2", pod2, vf0, `"vlan":200`), nil)

	w.end(pod1)
	w.failAt = slices.Index(probe.calls, "IPAM DEL")
	if _, err := a.Add(ctx, request(Add, "c2", pod2, vf0, `"vlan":200`), nil); err != nil {
		t.Fatal(err)
	}
	if !w.leases["c1/net1"] {
		t.Fatal("the IPAM failure did not happen")
	}
	if err := a.Del(ctx, request(Del, "c1", "", vf0, full), nil); err != nil {
		t.Fatal(err)
	}
	if w.leases["c1/net1"] || w.settings[vf0].VLAN != 200 || len(a.journal.all()) != 1 {
		t.Errorf("after the late DEL: %s", w.state())
	}
}

func TestDelWithoutNamespace(t *testing.T) {
	ctx := context.Background()
	home := func(w *world) *host.Netdev { w.end(pod1); return &w.links[hostNS][len(w.links[hostNS])-1] }
	for name, gone := range map[string]func(*world){
		"path not given":           func(*world) {},
		"namespace ended":          func(w *world) { w.end(pod1) },
		"name taken meanwhile":     func(w *world) { home(w).Name = "dev7" },
		"path is another pod's":    func(w *world) { w.end(pod1); w.netns[pod1] = host.NetnsID{Dev: 4, Inode: 99} },
		"renamed by the pod":       func(w *world) { w.links[w.netns[pod1]][0].Name = "eth7" },
		"alternative name by pod":  func(w *world) { w.links[w.netns[pod1]][0].AltNames = []string{"enp1s0f0v0", "ens1f0"} },
		"the VF is no more":        func(w *world) { w.end(pod1); delete(w.vfs, vf0) },
		"set up by the host's NM ": func(w *world) { home(w).Up = true },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			before := w.state()
			a := newAttacher(t, w, t.TempDir(), nil)
			if _, err := a.Add(ctx, request(Add, "c1", pod1, vf0, full), nil); err != nil {
				t.Fatal(err)
			}
			gone(w)
			_, exists := w.vfs[vf0]
			for range 2 {
				if err := a.Del(ctx, request(Del, "c1", "", vf0, full), nil); err != nil {
					t.Fatal(err)
				}
			}
			if exists && w.state() != before {
				t.Errorf("state\n%s, was\n%s", w.state(), before)
			}
			if len(w.leases) > 0 || len(a.journal.all()) > 0 {
				t.Errorf("leases %v, records %v", w.leases, a.journal.all())
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	ctx := context.Background()
	for name, c := range map[string]struct {
		prepare func(*world)
		req     Request
		code    uint
		says    string
	}{
		"no such VF":       {nil, request(Add, "c1", pod1, "0000:0f:10.0", ""), 7, "no PCI device 0000:0f:10.0"},
		"no driver":        {func(w *world) { w.vfs[vf0].Driver = "" }, request(Add, "c1", pod1, vf0, ""), CodeUnusable, "no driver"},
		"netdev elsewhere": {func(w *world) { w.links[hostNS] = nil }, request(Add, "c1", pod1, vf0, ""), CodeUnusable, "a container that is not known here may have it"},
		"name in the pod": {func(w *world) { w.links[w.netns[pod1]] = []host.Netdev{{Index: 3, Name: "net1"}} },
			request(Add, "c1", pod1, vf0, ""), CodeNameTaken, "has an interface net1 already"},
		"altname in the pod": {func(w *world) {
			w.links[w.netns[pod1]] = []host.Netdev{{Index: 3, Name: "eth0", AltNames: []string{"net1"}}}
		},
			request(Add, "c1", pod1, vf0, ""), CodeNameTaken, "has an interface net1 already (eth0)"},
		"altname of the VF in the pod": {func(w *world) { w.links[w.netns[pod1]] = []host.Netdev{{Index: 3, Name: "enp1s0f0v0"}} },
			request(Add, "c1", pod1, vf0, ""), CodeNameTaken, "alternative name enp1s0f0v0"},
		"no namespace":   {nil, request(Add, "c1", "/tmp/none", vf0, ""), 8, "/tmp/none"},
		"host namespace": {func(w *world) { w.netns[pod1] = hostNS }, request(Add, "c1", pod1, vf0, ""), 8, "the host's own"},
		"no IPAM plugin": {nil, request(Add, "c1", pod1, vf0, `"ipam":{"type":"nosuch"}`), CodeIPAM, `network "blue": ipam.type "nosuch": find IPAM plugin`},
		"unknown key":    {nil, request(Add, "c1", pod1, vf0, `"vlna":5`), 7, `network "blue": unknown key "vlna" with value 5: did you mean "vlan"?`},
		"VLAN":           {nil, request(Add, "c1", pod1, vf0, `"vlan":5000`), 7, `network "blue": vlan 5000 is not in the range 0-4094`},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			if c.prepare != nil {
				c.prepare(w)
			}
			before, dir := w.state(), t.TempDir()
			_, err := newAttacher(t, w, dir, nil).Add(ctx, c.req, nil)
			if codeOf(err) != c.code || !strings.Contains(err.Error(), c.says) {
				t.Errorf("code %d, error %v", codeOf(err), err)
			}
			files, _ := filepath.Glob(filepath.Join(dir, "*"))
			if w.state() != before || len(files) > 0 {
				t.Errorf("changed to %s, files %v", w.state(), files)
			}
		})
	}
}

func TestHeldVF(t *testing.T) {
	ctx := context.Background()
	w := newWorld()
	a := newAttacher(t, w, t.TempDir(), nil)
	if _, err := a.Add(ctx, request(Add, "c1", pod1, vf0, ""), nil); err != nil {
		t.Fatal(err)
	}
	now := w.state()
	_, err := a.Add(ctx, request(Add, "c2", pod2, vf0, ""), nil)
	if codeOf(err) != CodeHeld || !strings.Contains(err.Error(), "held by pod ns/c1") || w.state() != now {
		t.Errorf("code %d, error %v, state %s", codeOf(err), err, w.state())
	}
	// the failed ADD's own DEL touches nothing
	if err := a.Del(ctx, request(Del, "c2", pod2, vf0, ""), nil); err != nil || w.state() != now {
		t.Errorf("DEL of the refused: %v, state %s", err, w.state())
	}
}

func TestUndoThatFails(t *testing.T) {
	ctx := context.Background()
	w := newWorld()
	before := w.state()
	dir := t.TempDir()
	a := newAttacher(t, w, dir, nil)
	a.Kernel = brokenDriver{w}
	_, err := a.Add(ctx, request(Add, "c1", pod1, vf0, full), nil)
	if codeOf(err) != CodeNotUndone || !strings.Contains(err.Error(), "then undo failed") || !errors.Is(err, syscall.EIO) {
		t.Errorf("code %d, error %v", codeOf(err), err)
	}
	if _, held := a.Holder(vf0); !held {
		t.Error("a VF in an unknown state is free")
	}
	a.Kernel = w
	if err := a.Del(ctx, request(Del, "c1", pod1, vf0, full), nil); err != nil || w.state() != before {
		t.Errorf("DEL: %v, state %s", err, w.state())
	}
}

type brokenDriver struct{ *world }

func (brokenDriver) SetVFSettings(context.Context, host.VFRef, host.VFSettings, host.VFAttrs) error {
	return syscall.EIO
}

func TestUserspaceVF(t *testing.T) {
	ctx := context.Background()
	w := newWorld()
	w.vfs[vf0].Driver, w.vfs[vf0].Userspace = "vfio-pci", true
	w.links[hostNS] = w.links[hostNS][1:]
	before := w.state()
	a := newAttacher(t, w, t.TempDir(), nil)
	out, err := a.Add(ctx, request(Add, "c1", pod1, vf0, full), nil)
	if err != nil {
		t.Fatal(err)
	}
	r := must(types100.NewResult(out)).(*types100.Result)
	if i := r.Interfaces[0]; i.Sandbox != "" || i.Mac != "02:00:00:00:00:99" || i.Name != "net1" || len(r.IPs) != 2 {
		t.Errorf("result %s", out)
	}
	if w.settings[vf0].VLAN != 100 {
		t.Error("no VLAN")
	}
	if err := a.Del(ctx, request(Del, "c1", "", vf0, full), nil); err != nil || w.state() != before {
		t.Errorf("DEL: %v, state\n%s, was\n%s", err, w.state(), before)
	}
}

func TestGC(t *testing.T) {
	ctx := context.Background()
	w := newWorld()
	a := newAttacher(t, w, t.TempDir(), nil)
	for c, vf := range map[string]string{"c1": vf0, "c2": vf1} {
		if _, err := a.Add(ctx, request(Add, c, map[string]string{"c1": pod1, "c2": pod2}[c], vf, full), nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.GC(ctx, request(GC, "", "", vf0, "")); codeOf(err) != 7 || len(a.journal.all()) != 2 {
		t.Errorf("GC without a list: %v", err)
	}
	gc := request(GC, "", "", vf0, `"ipam":{"type":"static"},"cni.dev/valid-attachments":[{"containerID":"c2","ifname":"net1"}]`)
	other := gc
	other.Stdin = []byte(strings.Replace(string(gc.Stdin), `"blue"`, `"red"`, 1))
	if err := a.GC(ctx, other); err != nil || len(a.journal.all()) != 2 {
		t.Errorf("GC of another network: %v", err)
	}
	if err := a.GC(ctx, gc); err != nil {
		t.Fatal(err)
	}
	if rs := a.journal.all(); len(rs) != 1 || rs[0].ContainerID != "c2" {
		t.Errorf("left: %v", rs)
	}
	if w.calls[len(w.calls)-1] != "IPAM GC" {
		t.Error("GC was not passed to IPAM")
	}
}

func TestStatus(t *testing.T) {
	ctx := context.Background()
	w := newWorld()
	a := newAttacher(t, w, t.TempDir(), nil)
	req := Request{Stdin: []byte(`{"cniVersion":"1.1.0","name":"blue","type":"sriov","ipam":{"type":"static"}}`)}
	w.failAt = len(w.calls)
	if err := a.Status(ctx, req); codeOf(err) != 50 {
		t.Errorf("code %d, %v", codeOf(err), err)
	}
	// A good answer counts for a while: each is a process.
	for range 3 {
		if err := a.Status(ctx, req); err != nil {
			t.Error(err)
		}
	}
	if n := len(w.calls); n != 2 {
		t.Errorf("the IPAM plugin was asked: %v", w.calls)
	}
	missing := Request{Stdin: []byte(`{"cniVersion":"1.1.0","name":"blue","type":"sriov","ipam":{"type":"nosuch"}}`)}
	if err := a.Status(ctx, missing); codeOf(err) != 50 || !strings.Contains(err.Error(), "nosuch") {
		t.Errorf("no IPAM plugin: code %d, %v", codeOf(err), err)
	}
	a.Ready = func() error { return errors.New("resource x is not registered") }
	if err := a.Status(ctx, req); codeOf(err) != 50 || !strings.Contains(err.Error(), "resource x") {
		t.Errorf("not ready: code %d, %v", codeOf(err), err)
	}
}

// A look at everything leaves alone what is being made.
func TestRecoverBesideAdd(t *testing.T) {
	w := newWorld()
	var a *Attacher
	var beside sync.WaitGroup
	a = newAttacher(t, w, t.TempDir(), func(step string) {
		if step == "add: write result" {
			beside.Go(func() {
				if err := a.Recover(context.Background()); err != nil {
					t.Error(err)
				}
			})
			time.Sleep(20 * time.Millisecond)
		}
	})
	if _, err := a.Add(context.Background(), request(Add, "c1", pod1, vf0, full), nil); err != nil {
		t.Fatal(err)
	}
	beside.Wait()
	if _, ok := a.Attached(vf0); !ok || a.Orphan(vf0) {
		t.Error("what was being made was ended")
	}
	w.end(pod1)
	if !a.Orphan(vf0) {
		t.Error("the pod is gone, and its VF no orphan")
	}
	if err := a.Recover(context.Background()); err != nil {
		t.Error(err)
	}
	if pods := a.Attachments(); len(pods) > 0 || len(w.leases) > 0 {
		t.Errorf("left: %v, leases %v", pods, w.leases)
	}
}

// Two networks with one route: the pod gets both, as with the reference plugins.
func TestTwoNetworksWithOneRoute(t *testing.T) {
	ctx := context.Background()
	w := newWorld()
	before := w.state()
	a := newAttacher(t, w, t.TempDir(), nil)
	var calls []Request
	for i, vf := range []string{vf0, vf1} {
		req := request(Add, "c1", pod1, vf, `"ipam":{"type":"static"}`)
		req.IfName = fmt.Sprintf("net%d", i+1)
		out, err := a.Add(ctx, req, nil)
		if err != nil {
			t.Fatal(err)
		}
		calls = append(calls, req)
		req.Stdin = []byte(strings.TrimSuffix(string(req.Stdin), "}") + `,"prevResult":` + string(out) + "}")
		if err := a.Check(ctx, req, nil); err != nil {
			t.Errorf("CHECK of %s: %v", req.IfName, err)
		}
	}
	for _, req := range calls {
		if err := a.Del(ctx, req, nil); err != nil {
			t.Error(err)
		}
	}
	if after := w.state(); after != before {
		t.Errorf("left:\n%s", after)
	}
}

func TestRDMA(t *testing.T) {
	const asks = `"rdma":true`
	ctx := context.Background()
	add := func(w *world, keys string) (*Attacher, error) {
		a := newAttacher(t, w, t.TempDir(), nil)
		_, err := a.Add(ctx, request(Add, "c1", pod1, vf0, keys), nil)
		return a, err
	}
	w := newWorld()
	if _, err := add(w, ""); err != nil || w.rdma[vf0] != hostNS {
		t.Errorf("a network that does not ask: %v, RDMA in %v", err, w.rdma[vf0])
	}
	w = newWorld()
	w.shared = true
	if _, err := add(w, asks); err != nil || w.rdma[vf0] != hostNS {
		t.Errorf("shared by all namespaces: %v, RDMA in %v", err, w.rdma[vf0])
	}
	w = newWorld()
	delete(w.rdma, vf0)
	if _, err := add(w, asks); codeOf(err) != CodeUnusable || !strings.Contains(err.Error(), "has no RDMA device") {
		t.Errorf("a VF without one: %v", err)
	}
	w = newWorld()
	before := w.state()
	a, err := add(w, asks)
	if err != nil || w.rdma[vf0] != w.netns[pod1] {
		t.Errorf("exclusive: %v, RDMA in %v", err, w.rdma[vf0])
	}
	// Its pod dies, and the kernel gives it back.
	w.end(pod1)
	if err := a.Recover(ctx); err != nil || w.state() != before {
		t.Errorf("%v, state\n%s", err, w.state())
	}
}

func TestResultVersions(t *testing.T) {
	for _, v := range Versions {
		w := newWorld()
		req := request(Add, "c1", pod1, vf0, full)
		req.Stdin = []byte(strings.Replace(string(req.Stdin), "1.1.0", v, 1))
		out, err := newAttacher(t, w, t.TempDir(), nil).Add(context.Background(), req, nil)
		if err != nil {
			t.Fatal(err)
		}
		var got struct{ CNIVersion string }
		if json.Unmarshal(out, &got) != nil || got.CNIVersion != v || strings.Contains(string(out), "pciID") != (v == "1.1.0") {
			t.Errorf("%s: %s", v, out)
		}
	}
}

func TestJournalSetsAsideWhatIsNoRecord(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"torn.json", "x.json.123.tmp"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(`{"vf":`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, aside, err := openJournal(dir)
	if err != nil || len(aside) != 1 || !strings.HasSuffix(aside[0], "torn.json.unreadable") {
		t.Errorf("aside %v, error %v", aside, err)
	}
	if files, _ := filepath.Glob(filepath.Join(dir, "*")); fmt.Sprint(files) != fmt.Sprint(aside) {
		t.Errorf("files %v", files)
	}
}

// A record of an agent that knew VFs only names its VF under another key.
func TestReadsRecordsOfEarlierAgents(t *testing.T) {
	w, dir := newWorld(), t.TempDir()
	before := w.state()
	if _, err := newAttacher(t, w, dir, nil).Add(t.Context(), request(Add, "c1", pod1, vf0, full), nil); err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*.json"))
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files[0], []byte(strings.Replace(string(b), `"device":`, `"vf":`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	a := newAttacher(t, w, dir, nil)
	if pod, held := a.Holder(vf0); !held || pod != "ns/c1" {
		t.Errorf("holder is %q, %v", pod, held)
	}
	if err := a.Del(t.Context(), request(Del, "c1", pod1, vf0, full), nil); err != nil || w.state() != before {
		t.Errorf("DEL: %v, state\n%s", err, w.state())
	}
}
