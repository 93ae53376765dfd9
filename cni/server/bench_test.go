package server

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

const (
	// The most CPU time that ADD and DEL may take, as a ratio to the reference plugin's.
	mostRatio = 0.6
	// The most CPU time of a shim that the agent answers: as a ratio to one that only
	// says its version, and by itself.
	mostShim     = 1.6
	mostShimTime = 3 * time.Millisecond
)

// built compiles packages as they are shipped, from a module's folder, and returns
// the folder of the programs.
func built(b testing.TB, module string, packages ...string) string {
	b.Helper()
	out := b.TempDir()
	c := exec.Command("go", append([]string{"build", "-ldflags=-s -w", "-o", out + "/"}, packages...)...)
	c.Dir = module
	if text, err := c.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, text)
	}
	return out
}

// plugin is a CNI plugin as a runtime calls it, in the namespace of the node.
type plugin struct {
	program, netns, path string
	env                  []string
	conf                 string
}

// call runs the plugin and returns the CPU time of the process and of those it waited
// for.
func (p plugin) call(b *testing.B, command, pod string) time.Duration {
	b.Helper()
	c := exec.Command(p.program)
	c.Env = append([]string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=bench", "CNI_IFNAME=net1", "CNI_NETNS=" + pod, "CNI_PATH=" + p.path,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=bench",
	}, p.env...)
	c.Stdin = strings.NewReader(p.conf)
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := in(p.netns, c.Run); err != nil {
		b.Fatalf("%s %s: %v: %s%s", p.program, command, err, stdout.String(), stderr.String())
	}
	return c.ProcessState.UserTime() + c.ProcessState.SystemTime()
}

// cpu is the CPU time that a process has taken, and those it waited for.
func cpu(b *testing.B, pid int) (self, children time.Duration) {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var times [4]time.Duration
	for i, f := range fields[11:15] { // utime, stime, cutime, cstime
		ticks, err := strconv.Atoi(f)
		if err != nil {
			b.Fatal(err)
		}
		times[i] = time.Duration(ticks) * time.Second / 100 // USER_HZ
	}
	return times[0] + times[1], times[2] + times[3]
}

// BenchmarkMacvlan takes turns: the reference plugin macvlan and ours each attach a
// sub-interface, with an address by host-local, and delete it, as processes that a
// runtime starts. What the agent does, and host-local under it, counts for ours.
func BenchmarkMacvlan(b *testing.B) {
	if os.Getuid() != 0 {
		b.Fatal("needs root")
	}
	reference := built(b, "../../test/lab/node", "github.com/containernetworking/plugins/plugins/ipam/host-local", "github.com/containernetworking/plugins/plugins/main/macvlan")
	own := built(b, "../..", "./cni/cmd/sluice-cni")
	dir, pods := b.TempDir(), b.TempDir()
	netns, pod := newPod(b, pods, "node"), newPod(b, pods, "pod")
	if err := inside(netns, func(h *netlink.Handle) error {
		return h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "p0", Flags: net.FlagUp}, PeerName: "p0p"})
	}); err != nil {
		b.Fatal(err)
	}
	if err := inside(netns, func(h *netlink.Handle) error {
		for _, name := range []string{"p0", "p0p"} {
			l, err := h.LinkByName(name)
			if err != nil {
				return err
			}
			if err := h.LinkSetUp(l); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	var agent *agentProcess
	if err := in(netns, func() error { agent = startAgent(b, dir, -1); return nil }); err != nil {
		b.Fatal(err)
	}
	conf := func(kind string) string {
		return fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"type":%q,"master":"p0","mode":"bridge","ipam":{"type":"host-local","subnet":"10.20.0.0/16","dataDir":%q}}`, kind, kind, b.TempDir())
	}
	theirs := plugin{filepath.Join(reference, "macvlan"), netns, reference, nil, conf("macvlan")}
	ours := plugin{filepath.Join(own, "sluice-cni"), netns, reference, []string{"SLUICE_CNI_SOCKET=" + filepath.Join(dir, "cni.sock"), "SLUICE_CNI_DEL_QUEUE=" + filepath.Join(dir, "queue")}, conf("sluice")}
	for range 5 { // caches of programs
		for _, p := range []plugin{theirs, ours} {
			p.call(b, "ADD", pod)
			p.call(b, "DEL", pod)
		}
	}
	const rounds = 100
	var they, shim, start time.Duration
	self0, children0 := cpu(b, agent.cmd.Process.Pid)
	for range rounds {
		for _, command := range []string{"ADD", "DEL"} {
			they += theirs.call(b, command, pod)
		}
		for _, command := range []string{"ADD", "DEL"} {
			shim += ours.call(b, command, pod)
			start += ours.call(b, "VERSION", pod)
		}
	}
	self, children := cpu(b, agent.cmd.Process.Pid)
	self, children = self-self0, children-children0
	we := shim + self + children
	ms := func(d time.Duration, n int) float64 { return float64(d.Microseconds()) / 1000 / float64(n) }
	ratio := float64(we) / float64(they)
	b.ReportMetric(ms(they, rounds), "reference-ms")
	b.ReportMetric(ms(we, rounds), "own-ms")
	b.ReportMetric(ms(shim, 2*rounds), "shim-ms")
	b.ReportMetric(ms(start, 2*rounds), "shim-start-ms")
	b.ReportMetric(ratio, "ratio")
	b.ReportMetric(0, "ns/op")
	b.Logf("reference %.2f ms; own %.2f ms: shims %.2f, agent %.2f, its IPAM plugin %.2f", ms(they, rounds), ms(we, rounds), ms(shim, rounds), ms(self, rounds), ms(children, rounds))
	if ratio > mostRatio {
		b.Errorf("ADD and DEL take %.2f of the reference plugin's CPU time, more than %.2f", ratio, mostRatio)
	}
	if one := shim / (2 * rounds); one > mostShimTime {
		b.Errorf("a shim takes %s of CPU time, more than %s", one, mostShimTime)
	}
	if r := float64(shim) / float64(start); r > mostShim {
		b.Errorf("a shim takes %.2f of the CPU time of its start alone, more than %.2f", r, mostShim)
	}
}
