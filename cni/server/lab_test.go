//go:build lab

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/host"
)

// These run in a lab guest, on a kernel with SR-IOV NICs. They have real VFs and
// real agents, which are processes that can be killed.

// lab is the guest: its VFs, and what they look like when they are at home.
type lab struct {
	kernel *host.Attacher
	vfs    []string // PCI addresses, of all PFs
	home   map[string]string
	bin    string
}

const vfsPerPF = 4

func newLab(t testing.TB) *lab { return newLabWith(t, vfsPerPF) }

// newLabWith has so many VFs of each PF, or as many as that can have.
func newLabWith(t testing.TB, most int) *lab {
	t.Helper()
	kernel, err := host.OpenAttacher(host.DefaultSysfs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(kernel.Close)
	h, err := host.Open(host.DefaultSysfs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	l := &lab{kernel: kernel, home: map[string]string{}, bin: pluginDir(t)}
	pfs, err := h.Inventory(t.Context())
	if err != nil || len(pfs) < 2 {
		t.Fatalf("the guest has %d PFs, %v", len(pfs), err)
	}
	for _, pf := range pfs {
		if err = h.SetLinkUp(t.Context(), pf.Link()); err != nil {
			t.Fatal(err)
		}
		numVFs := filepath.Join(host.DefaultSysfs, "bus/pci/devices", pf.PCIAddress, "sriov_numvfs")
		for _, n := range []string{"0", fmt.Sprint(min(most, pf.TotalVFs))} {
			if err = os.WriteFile(numVFs, []byte(n), 0); err != nil {
				t.Fatal(err)
			}
		}
		t.Cleanup(func() { _ = os.WriteFile(numVFs, []byte("0"), 0) })
	}
	var now []host.PF
	eventually(t, "VFs with netdevs", func() error {
		if now, err = h.Inventory(t.Context()); err != nil {
			return err
		}
		for _, pf := range now {
			if len(pf.VFs) != min(most, pf.TotalVFs) || slices.ContainsFunc(pf.VFs, func(v host.VF) bool { return v.Name == "" }) {
				return fmt.Errorf("%s has %+v", pf.Name, pf.VFs)
			}
		}
		return nil
	})
	for _, pf := range now {
		for _, vf := range pf.VFs {
			// The baseline, as the node's configuration sets it.
			ref, err := kernel.VF(vf.PCIAddress)
			if err != nil {
				t.Fatal(err)
			}
			if err := kernel.SetVFSettings(t.Context(), ref, attach.Baseline{MAC: vf.MAC.String()}.Settings(), 0); err != nil {
				t.Fatal(err)
			}
			_ = kernel.ChangeLink(t.Context(), nil, vf.IfIndex, host.LinkChange{State: host.SetDown})
			l.vfs = append(l.vfs, vf.PCIAddress)
			l.home[vf.PCIAddress] = l.state(t, vf.PCIAddress)
		}
	}
	return l
}

// state is all there is to see of a VF in the host.
func (l *lab) state(t testing.TB, vf string) string {
	t.Helper()
	ref, err := l.kernel.VF(vf)
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.kernel.VFSettings(ref)
	if err != nil {
		t.Fatal(err)
	}
	if ref.Name == "" {
		return fmt.Sprintf("%+v, not in the host", s)
	}
	dev, err := l.kernel.Link(nil, ref.Name)
	if errors.Is(err, unix.ENODEV) {
		return fmt.Sprintf("%+v, no more %s in the host", s, ref.Name) // the agent is at it
	}
	if err != nil {
		t.Fatal(err)
	}
	dev.Index, dev.Carrier = 0, false
	return fmt.Sprintf("%+v %+v", s, dev)
}

// atHome fails unless all VFs are at their baseline.
func (l *lab) atHome(t *testing.T, when string) {
	t.Helper()
	for _, vf := range l.vfs {
		if now := l.state(t, vf); now != l.home[vf] {
			t.Errorf("%s: VF %s is\n%s, was\n%s", when, vf, now, l.home[vf])
		}
	}
}

// inPod returns the pod's link of the VF.
func (l *lab) inPod(t testing.TB, pod, name string) (host.Netdev, error) {
	t.Helper()
	ns, err := host.OpenNetns(pod)
	if err != nil {
		return host.Netdev{}, err
	}
	defer ns.Close()
	return l.kernel.Link(ns, name)
}

const labSettings = `,"vlan":100,"vlanQoS":3,"spoofchk":"off","mac":"02:00:00:00:0a:%02x","ipam":{"type":"testipam","dir":%q}`

func (l *lab) request(command string, i int, container, pod, leases string) wire.Request {
	return wire.Request{
		Command: command, ContainerID: container, IfName: "net1", Netns: pod, Path: l.bin,
		Args:  "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=" + container,
		Stdin: conf(l.vfs[i], fmt.Sprintf(labSettings, i, leases)),
	}
}

// TestLabAllVFsAtOnce attaches and deletes all VFs there are at once, again and again.
// Nothing is left behind, no address is given twice, and the agent does not grow.
func TestLabAllVFsAtOnce(t *testing.T) {
	l, dir, leases, pods := newLabWith(t, math.MaxInt), t.TempDir(), t.TempDir(), t.TempDir()
	a := startAgent(t, dir, -1)
	for i := range l.vfs {
		newPod(t, pods, fmt.Sprintf("pod%d", i))
	}
	end := time.Now().Add(soak(t))
	var first, last usage
	var took []time.Duration
	rounds := 0
	for ; rounds < 2 || time.Now().Before(end); rounds++ {
		var mu sync.Mutex
		var all sync.WaitGroup
		owner := map[string]string{} // of addresses
		took = took[:0]
		for i := range l.vfs {
			pod := filepath.Join(pods, fmt.Sprintf("pod%d", i))
			req := l.request("ADD", i, fmt.Sprintf("c%d-%d", rounds, i), pod, leases)
			req.Stdin = conf(l.vfs[i], fmt.Sprintf(`,"vlan":100,"vlanQoS":3,"spoofchk":"off","mac":"02:00:00:00:0a:%02x",
				"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.20.0.0/16"}]]}`, i, leases))
			all.Go(func() {
				begin := time.Now()
				out, err := a.insist(req)
				if err != nil {
					t.Errorf("ADD %d: %v", i, err)
					return
				}
				done := time.Since(begin)
				r, err := types100.NewResult(out)
				if err != nil {
					t.Error(err)
					return
				}
				result := r.(*types100.Result)
				mu.Lock()
				took = append(took, done)
				for _, ip := range result.IPs {
					if other := owner[ip.Address.String()]; other != "" {
						t.Errorf("%s and %s have %s", other, l.vfs[i], ip.Address.String())
					}
					owner[ip.Address.String()] = l.vfs[i]
				}
				mu.Unlock()
				want := result.Interfaces[0]
				dev, err := l.inPod(t, pod, "net1")
				if err != nil || dev.MAC.String() != fmt.Sprintf("02:00:00:00:0a:%02x", i) || dev.MAC.String() != want.Mac || !dev.Up || dev.PCIAddress != l.vfs[i] || dev.MTU != want.Mtu {
					t.Errorf("VF %s in the pod is %+v, result %s, %v", l.vfs[i], dev, out, err)
				}
				ref, _ := l.kernel.VF(l.vfs[i])
				if s, err := l.kernel.VFSettings(ref); err != nil || s.VLAN != 100 || s.VLANQoS != 3 || s.SpoofChk {
					t.Errorf("VF %s has %+v, %v", l.vfs[i], s, err)
				}
				check := req
				check.Command, check.Stdin = "CHECK", []byte(strings.TrimSuffix(string(req.Stdin), "}")+`,"prevResult":`+string(out)+"}")
				if _, err := a.insist(check); err != nil {
					t.Errorf("CHECK: %v", err)
				}
				for range 2 {
					req.Command = "DEL"
					if _, err := a.insist(req); err != nil {
						t.Errorf("DEL: %v", err)
					}
				}
			})
		}
		all.Wait()
		l.atHome(t, fmt.Sprintf("round %d", rounds))
		if t.Failed() {
			return
		}
		last = usageOf(t, a.cmd.Process.Pid)
		if rounds == 0 {
			first = last
		}
	}
	if files, _ := filepath.Glob(filepath.Join(leases, "*", "[0-9]*")); len(files) > 0 {
		t.Errorf("leases left: %v", files)
	}
	slices.Sort(took)
	t.Logf("%d rounds of %d VFs at once; ADDs of the last: median %v, longest %v; %+v after the first round, %+v after the last",
		rounds, len(l.vfs), took[len(took)/2], took[len(took)-1], first, last)
	notGrown(t, first, last)
}

func TestLabRefusals(t *testing.T) {
	l, dir, leases := newLab(t), t.TempDir(), t.TempDir()
	pod := newPod(t, t.TempDir(), "pod")
	a := startAgent(t, dir, -1)
	own, err := os.ReadDir("/sys/bus/pci/devices")
	if err != nil || len(own) == 0 {
		t.Fatal(err)
	}
	pf, err := l.kernel.VF(l.vfs[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		ifName, conf, says string
	}{
		"unknown key":             {"net1", string(conf(l.vfs[0], `,"vlna":100`)), `unknown key \"vlna\" with value 100: did you mean \"vlan\"?`},
		"VLAN 5000":               {"net1", string(conf(l.vfs[0], `,"vlan":5000`)), "vlan 5000 is not in the range 0-4094"},
		"VF that does not exist":  {"net1", string(conf("0000:7f:10.0", "")), "there is no PCI device 0000:7f:10.0"},
		"PF for a VF":             {"net1", string(conf(pf.PF, "")), "is not a virtual function"},
		"name that is in the pod": {"lo", string(conf(l.vfs[0], "")), "has an interface lo already"},
		"no IPAM plugin":          {"net1", string(conf(l.vfs[0], `,"vlan":5,"ipam":{"type":"nosuch"}`)), "nosuch"},
		"IPAM says no":            {"net1", string(conf(l.vfs[0], `,"vlan":5,"ipam":{"type":"testipam","fail":"ADD"}`)), "no address is free"},
		"MTU the driver refuses":  {"net1", string(conf(l.vfs[0], `,"vlan":5,"mtu":65000`)), "MTU 65000"},
	} {
		_, err := a.call(wire.Request{Command: "ADD", ContainerID: "c1", IfName: c.ifName, Netns: pod, Path: l.bin, Stdin: []byte(c.conf)})
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "blue") {
			t.Errorf("%s: %v", name, err)
		}
		l.atHome(t, name)
		if _, err := l.inPod(t, pod, "net1"); !errors.Is(err, unix.ENODEV) {
			t.Errorf("%s: net1 in the pod: %v", name, err)
		}
	}
	// a VF that another pod has
	add := l.request("ADD", 0, "c1", pod, leases)
	if _, err := a.call(add); err != nil {
		t.Fatal(err)
	}
	other := l.request("ADD", 0, "c2", newPod(t, t.TempDir(), "other"), leases)
	if _, err := a.call(other); err == nil || !strings.Contains(err.Error(), "held by pod ns/c1") {
		t.Errorf("held VF: %v", err)
	}
	add.Command = "DEL"
	if _, err := a.call(add); err != nil {
		t.Error(err)
	}
	l.atHome(t, "the end")
}

// TestLabRepresentor attaches VFs in switchdev mode: a VF has a link while its representor
// is up. ADD sets it up and DEL down again, unless it was up before, as a bridge's ports are.
func TestLabRepresentor(t *testing.T) {
	h, err := host.Open(host.DefaultSysfs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	pfs, err := h.Inventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, pf := range pfs {
		if pf.Eswitch == "" {
			t.Skipf("driver %s has no eswitch that devlink can switch", pf.Driver)
		}
		if err := errors.Join(h.SetNumVFs(t.Context(), pf.PCIAddress, 0), h.SetEswitchMode(t.Context(), pf.PCIAddress, host.Switchdev)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := errors.Join(h.SetNumVFs(context.Background(), pf.PCIAddress, 0), h.SetEswitchMode(context.Background(), pf.PCIAddress, host.Legacy)); err != nil {
				t.Error(err)
			}
		})
	}
	l, leases, pods := newLab(t), t.TempDir(), t.TempDir()
	a := startAgent(t, t.TempDir(), -1)
	up := func(i int) (host.Netdev, bool) {
		ref, err := l.kernel.VF(l.vfs[i])
		if err != nil || ref.Representor == "" {
			t.Fatalf("%+v, %v", ref, err)
		}
		representor, err := l.kernel.Link(nil, ref.Representor)
		if err != nil {
			t.Fatal(err)
		}
		return representor, representor.Up
	}
	bridged, _ := up(1)
	if err := l.kernel.ChangeLink(t.Context(), nil, bridged.Index, host.LinkChange{State: host.SetUp}); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		keys          string
		before, after bool // whether the representor is up, without the pod and with it
	}{{"", false, true}, {"", true, true}, {`,"link_state":"disable"`, false, false}} {
		container := fmt.Sprintf("c%d", i)
		pod := newPod(t, pods, container)
		req := l.request("ADD", i, container, pod, leases)
		req.Stdin = conf(l.vfs[i], c.keys+fmt.Sprintf(`,"ipam":{"type":"testipam","dir":%q}`, leases))
		if _, on := up(i); on != c.before {
			t.Errorf("%d: before ADD the representor's up is %v", i, on)
		}
		if _, err := a.call(req); err != nil {
			t.Errorf("%d: %v", i, err)
			continue
		}
		_, on := up(i)
		dev, err := l.inPod(t, pod, "net1")
		if err != nil || on != c.after || dev.Carrier != c.after {
			t.Errorf("%d: the representor's up is %v, in the pod is %+v, %v", i, on, dev, err)
		}
		req.Command = "DEL"
		if _, err := a.call(req); err != nil {
			t.Errorf("%d: %v", i, err)
		}
		if _, on := up(i); on != c.before {
			t.Errorf("%d: after DEL the representor's up is %v", i, on)
		}
	}
	l.atHome(t, "the end")
}

// TestLabPolicy: a pod that a policy isolates does not get a VF with a userspace driver, and
// one that none isolates does. Of the rules of a pod nothing is there for the next one that
// has its VF.
func TestLabPolicy(t *testing.T) {
	l, dir, leases := newLab(t), t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "policies.json"), []byte(ingress("a", "none")), 0o600); err != nil {
		t.Fatal(err)
	}
	n := &node{T: t, kernel: l.kernel, dir: dir, agent: startAgent(t, dir, -1)}
	attach := func(name string) (wire.Request, error) {
		add := l.request("ADD", 0, name, newPod(t, t.TempDir(), name), leases)
		_, err := n.agent.call(add)
		add.Command = "DEL"
		return add, err
	}
	release := func(del wire.Request) {
		t.Helper()
		if _, err := n.agent.call(del); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"a", "b", "a"} {
		del, err := attach(name)
		if err != nil {
			t.Fatal(err)
		}
		if has := n.tables(del.Netns) > 0; has != (name == "a") {
			t.Errorf("pod %s has rules: %t", name, has)
		}
		release(del)
		if n.tables(del.Netns) > 0 {
			t.Errorf("rules are left in pod %s", name)
		}
	}
	l.atHome(t, "after policy")

	device := filepath.Join("/sys/bus/pci/devices", l.vfs[0])
	driver := func(name string) {
		t.Helper()
		for _, write := range [][2]string{{filepath.Join(device, "driver_override"), name + "\n"}, {filepath.Join(device, "driver/unbind"), l.vfs[0]}, {"/sys/bus/pci/drivers_probe", l.vfs[0]}} {
			if err := os.WriteFile(write[0], []byte(write[1]), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	const noIOMMU = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
	if _, err := os.Stat(noIOMMU); err != nil {
		if out, err := exec.Command("modprobe", "vfio-pci").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if _, err := os.Stat(noIOMMU); errors.Is(err, os.ErrNotExist) {
		t.Skip("this kernel binds vfio-pci with an IOMMU only")
	}
	if err := os.WriteFile(noIOMMU, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	driver("vfio-pci")
	t.Cleanup(func() { driver("") })
	_, err := attach("a")
	for _, says := range []string{"NetworkPolicy ns/p", "driver vfio-pci gives the VF to user space", "108"} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("no %q in %v", says, err)
		}
	}
	del, err := attach("b")
	if err != nil {
		t.Fatal(err)
	}
	release(del)
}

// TestLabInjectedErrno makes the driver of the emulated NIC refuse one kind of
// setting after the other.
func TestLabInjectedErrno(t *testing.T) {
	l, dir, leases := newLab(t), t.TempDir(), t.TempDir()
	ref, err := l.kernel.VF(l.vfs[0])
	if err != nil {
		t.Fatal(err)
	}
	debug := filepath.Join("/sys/kernel/debug/sluicenic", ref.PF)
	if _, err := os.Stat(debug); err != nil {
		if ref.Driver == "sluicenicvf" {
			t.Fatal(err)
		}
		t.Skipf("driver %s cannot be told to fail", ref.Driver)
	}
	pod := newPod(t, t.TempDir(), "pod")
	a := startAgent(t, dir, -1)
	for _, attr := range []string{"mac", "vlan", "rate", "spoofchk", "trust", "link_state"} {
		fault := filepath.Join(debug, "fail_vf_"+attr)
		arm := func(s string) {
			if err := os.WriteFile(fault, []byte(s), 0); err != nil {
				t.Fatal(err)
			}
		}
		req := l.request("ADD", 0, "c-"+attr, pod, leases)
		req.Stdin = conf(l.vfs[0], fmt.Sprintf(`,"vlan":7,"mac":"02:00:00:00:0b:01","spoofchk":"off","trust":"on","link_state":"enable","max_tx_rate":50,"ipam":{"type":"testipam","dir":%q}`, leases))
		arm("5 0")
		_, err := a.call(req)
		if err == nil || !strings.Contains(err.Error(), attr) || !strings.Contains(err.Error(), "input/output error") || !strings.Contains(err.Error(), ref.PFName) {
			t.Errorf("%s: %v", attr, err)
		}
		l.atHome(t, attr+" refused")
		arm("0")
		if _, err = a.call(req); err != nil {
			t.Errorf("%s: ADD after it: %v", attr, err)
		}
		// A DEL that cannot reset the VF says so, and the next one does it.
		req.Command = "DEL"
		arm("5 0")
		_, err = a.call(req)
		if err == nil {
			t.Errorf("%s: DEL says nothing of a refused reset", attr)
		}
		arm("0")
		if _, err := a.call(req); err != nil {
			t.Errorf("%s: second DEL: %v", attr, err)
		}
		l.atHome(t, attr+" reset")
	}
}

// TestLabAgentKilledAtEachStep kills the agent (SIGKILL) at each step of ADD and
// DEL, and its successors at each step of the recovery from the worst of them.
func TestLabAgentKilledAtEachStep(t *testing.T) {
	l, dir, leases := newLab(t), t.TempDir(), t.TempDir()
	pods := t.TempDir()
	stride := 1
	if os.Getenv("SLUICE_LAB_KIND") == "qemu" {
		stride = 3 // each step is killed at where processes start fast
	}
	for at, done := 0, false; !done; at += stride {
		pod := newPod(t, pods, fmt.Sprintf("pod%d", at))
		add := l.request("ADD", 0, fmt.Sprintf("c%d", at), pod, leases)
		del := add
		del.Command = "DEL"
		a := startAgent(t, dir, at)
		out, err := a.call(add)
		if err == nil {
			_, err = a.call(del)
		}
		done = err == nil
		step := ""
		if !done {
			_ = a.cmd.Wait()
			if step = a.step(); step == "" {
				t.Fatalf("the agent failed without being killed: %v", err)
			}
		} else {
			a.stop()
		}

		// Kill the successors as well, at each step they take, where there is the
		// most to undo.
		kills := 0
		for died := step == "add: write result"; died; kills++ {
			b := startAgent(t, dir, kills)
			if died = b.died(); died {
				_ = b.cmd.Wait()
				b.step()
			} else {
				b.stop()
			}
			if kills > 20 {
				t.Fatal("recovery does not come to an end")
			}
		}
		b := startAgent(t, dir, -1)
		held := l.holder(t, dir, l.vfs[0])
		if !held {
			l.atHome(t, fmt.Sprintf("killed at %q", step))
		} else if dev, err := l.inPod(t, pod, "net1"); err != nil || !dev.Up {
			t.Errorf("killed at %q: half attached: %+v, %v, %s", step, dev, err, out)
		}
		t.Logf("killed at %-25q then %2d times: attached %v", step, kills, held)
		if _, err := b.call(add); err != nil {
			t.Errorf("killed at %q: retry of ADD: %v", step, err)
		}
		if dev, err := l.inPod(t, pod, "net1"); err != nil || !dev.Up {
			t.Errorf("killed at %q: after the retry: %+v, %v", step, dev, err)
		}
		if _, err := b.call(del); err != nil {
			t.Errorf("killed at %q: DEL after it: %v", step, err)
		}
		l.atHome(t, fmt.Sprintf("killed at %q, deleted", step))
		b.stop()
		endPod(pod)
	}
	if files, _ := filepath.Glob(filepath.Join(leases, "*")); len(files) > 0 {
		t.Errorf("leases left: %v", files)
	}
}

// holder reads the journal on the disk.
func (l *lab) holder(t *testing.T, dir, vf string) bool {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(dir, "attachments", "*.json"))
	for _, file := range files {
		var r attach.Record
		b, err := os.ReadFile(file)
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil {
			t.Fatal(err)
		}
		if r.Device == vf && r.Phase == attach.Attached {
			return true
		}
		t.Errorf("after recovery the journal has %s", b)
	}
	return false
}

// TestLabPodsThatVanish ends network namespaces before, instead of and during
// DEL, and renames things in the pod.
func TestLabPodsThatVanish(t *testing.T) {
	l, dir, leases := newLab(t), t.TempDir(), t.TempDir()
	pods := t.TempDir()
	a := startAgent(t, dir, -1)
	attachTo := func(i int, container string) (pod string, del wire.Request) {
		pod = newPod(t, pods, container)
		del = l.request("ADD", i, container, pod, leases)
		if _, err := a.call(del); err != nil {
			t.Fatal(err)
		}
		del.Command = "DEL"
		return pod, del
	}
	deleted := func(what string, del wire.Request) {
		for range 2 {
			if _, err := a.call(del); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
		l.atHome(t, what)
	}

	pod, del := attachTo(0, "ended")
	endPod(pod)
	deleted("DEL after the end of the pod", del)

	_, del = attachTo(0, "no-path")
	del.Netns = ""
	deleted("DEL without a path", del)

	// both come home as net1: one of them gets another name by the kernel
	pod, del = attachTo(0, "twin-1")
	pod2, del2 := attachTo(1, "twin-2")
	endPod(pod)
	endPod(pod2)
	if _, err := a.call(del); err != nil {
		t.Error(err)
	}
	deleted("two pods at once", del2)

	pod, del = attachTo(0, "renamer")
	if err := inside(pod, func(h *netlink.Handle) error {
		dev, err := h.LinkByName("net1")
		if err != nil {
			return err
		}
		return errors.Join(h.LinkSetName(dev, "mine"), h.LinkAddAltName(dev, "wire0"), h.LinkSetMTU(dev, 1300))
	}); err != nil {
		t.Fatal(err)
	}
	deleted("renamed by the pod", del)

	// the VF goes to another pod, then the DEL of the first comes
	pod, late := attachTo(0, "first")
	endPod(pod)
	second, del := attachTo(0, "second")
	before, err := l.inPod(t, second, "net1")
	if err != nil {
		t.Fatal(err)
	}
	state := l.state(t, l.vfs[0])
	if _, err := a.call(late); err != nil {
		t.Error(err)
	}
	if after, err := l.inPod(t, second, "net1"); err != nil || fmt.Sprint(after) != fmt.Sprint(before) || l.state(t, l.vfs[0]) != state {
		t.Errorf("the late DEL changed %+v to %+v, %v", before, after, err)
	}
	deleted("the second pod", del)

	// the agent is away while the pod ends, and nobody sends a DEL
	pod, _ = attachTo(1, "forgotten")
	a.stop()
	endPod(pod)
	a = startAgent(t, dir, -1)
	l.atHome(t, "pod ended while the agent was away")

	// the runtime says which attachments are valid
	_, keep := attachTo(2, "keep")
	attachTo(3, "collect")
	gc := wire.Request{Command: "GC", Path: l.bin, Stdin: conf("", fmt.Sprintf(`,"ipam":{"type":"testipam","dir":%q},"cni.dev/valid-attachments":[{"containerID":"keep","ifname":"net1"}]`, leases))}
	if _, err := a.call(gc); err != nil {
		t.Error(err)
	}
	if !l.holder(t, dir, l.vfs[2]) || l.state(t, l.vfs[3]) != l.home[l.vfs[3]] {
		t.Errorf("after GC: %s", l.state(t, l.vfs[3]))
	}
	deleted("the kept one", keep)
	if files, _ := filepath.Glob(filepath.Join(leases, "*")); len(files) > 0 {
		t.Errorf("leases left: %v", files)
	}
}

// TestLabOneMessage holds what an ADD costs: VF lists, which drivers answer one
// firmware call at a time, are not read for it.
func TestLabOneMessage(t *testing.T) {
	l := newLab(t)
	ref, err := l.kernel.VF(l.vfs[0])
	if err != nil {
		t.Fatal(err)
	}
	if ref.Driver != "sluicenicvf" {
		t.Skipf("driver %s does not take all settings in one message", ref.Driver)
	}
	a, err := attach.New(attach.Options{Kernel: l.kernel, Baselines: l, IPAM: attach.ExecIPAM{}, Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	pod := newPod(t, t.TempDir(), "pod")
	req := attach.Request{ContainerID: "c", IfName: "net1", Netns: pod, Stdin: conf(l.vfs[0], `,"vlan":9,"mac":"02:00:00:00:0c:01","trust":"on"`)}
	before := l.kernel.Requests()
	if _, err := a.Add(context.Background(), req, nil); err != nil {
		t.Fatal(err)
	}
	after := l.kernel.Requests()
	if want := (host.Requests{VFLists: before.VFLists, VFMessages: before.VFMessages + 1, LinkMessages: before.LinkMessages + 1}); after != want {
		t.Errorf("ADD made of %+v %+v, want %+v", before, after, want)
	}
	if err := a.Del(context.Background(), req, nil); err != nil {
		t.Fatal(err)
	}
	if done := l.kernel.Requests(); done.VFLists != before.VFLists || done.VFMessages != after.VFMessages+1 {
		t.Errorf("DEL made of %+v %+v", after, done)
	}
	l.atHome(t, "DEL")
}

// Baseline is that of the lab's VFs.
func (l *lab) Baseline(vf string) (net.HardwareAddr, int, bool) {
	ref, err := l.kernel.VF(vf)
	if err != nil {
		return nil, 0, false
	}
	dev, err := l.kernel.Link(nil, ref.Name)
	return dev.MAC, dev.MTU, err == nil
}
