//go:build lab

package node

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os/exec"
	"reflect"
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
)

// The most that the agent may take for what a shell script does by the same
// operations on the kernel, as a ratio.
const mostRatio = 1.2

// bare is what one who knows how would type for one PF: VFs unprobed, their
// addresses, one probe each, their MTU. Everything the shell can do without
// starting a program it does so, and ip runs twice, not once for each VF.
const bare = `
set -e
number=$1 mtu=$2 card=0
shift 2
for pf; do
  card=$((card + 1))
  device=/sys/class/net/$pf/device
  ip link set $pf up
  echo 0 >$device/sriov_drivers_autoprobe
  echo $number >$device/sriov_numvfs
  echo 1 >$device/sriov_drivers_autoprobe
  i=0
  while [ $i -lt $number ]; do
    printf 'link set %s vf %d mac 02:00:00:00:%02x:%02x\n' $pf $i $card $i
    i=$((i + 1))
  done | ip -batch -
  for vf in $device/virtfn*; do
    cd -P $vf
    echo ${PWD##*/} >/sys/bus/pci/drivers_probe
    cd net
    echo "link set $(echo *) mtu $mtu"
  done | ip -batch -
done`

// BenchmarkLabVFs takes turns: the agent brings two PFs from nothing to all VFs
// ready and told, and a shell script brings them to the same by the bare
// operations. It runs in a guest with two cards of at least 32 VFs.
func BenchmarkLabVFs(b *testing.B) {
	const mtu = 1400
	h, err := host.Open(host.DefaultSysfs)
	if err != nil {
		b.Fatal(err)
	}
	defer h.Close()
	s := &server{
		watch: make(chan *v1.SriovNetworkNodeState, 1),
		state: &v1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Name: "guest", Generation: 1, UID: "1"}},
	}
	klog.LogToStderr(false) // written as the program writes it, but not shown
	klog.SetOutput(io.Discard)
	state, holders := b.TempDir(), &usage{pods: map[string]string{}}
	// start runs an agent until stop: while the shell works, none is in its way.
	start := func() (stop func()) {
		s.mu.Lock()
		s.send()
		s.mu.Unlock()
		agent := New(Config{
			Node: "guest", StateDir: state, Kernel: h, States: s, Advertiser: &plugin{}, Usage: holders, Attached: holders.Attached,
			Lifeline: &lifeline{}, Log: klog.Background(),
		})
		ctx, cancel := context.WithCancel(b.Context())
		done := make(chan error)
		go func() { done <- agent.Run(ctx) }()
		return func() {
			cancel()
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		}
	}
	ready := func(vfs string) {
		for start := time.Now(); ; time.Sleep(time.Millisecond) {
			s.mu.Lock()
			status, generation := s.state.Status, s.state.Generation
			s.mu.Unlock()
			if status.ObservedGeneration == generation && status.SyncStatus == v1.SyncStatusSucceeded && status.VFs == vfs {
				return
			}
			if time.Since(start) > time.Minute {
				b.Fatalf("not %s: %+v", vfs, status)
			}
		}
	}
	read := func() []host.PF {
		pfs, err := h.Inventory(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		for i := range pfs {
			if err := h.ReadVFSettings(b.Context(), &pfs[i]); err != nil {
				b.Fatal(err)
			}
		}
		return pfs
	}
	for _, c := range []struct{ pfs, vfs int }{{1, 32}, {2, 16}, {2, 32}} {
		b.Run(fmt.Sprintf("%dx%d", c.pfs, c.vfs), func(b *testing.B) {
			all := fmt.Sprintf("%d/%[1]d", c.pfs*c.vfs)
			spec := []v1.Interface{
				wants(nic0, c.vfs, of("left", fmt.Sprintf("0-%d", c.vfs-1), mtu)), wants(nic1, c.vfs, of("right", fmt.Sprintf("0-%d", c.vfs-1), mtu)),
			}[:c.pfs]
			script := append([]string{"-c", bare, "sh", fmt.Sprint(c.vfs), fmt.Sprint(mtu)}, []string{"ens1f0", "ens2f0"}[:c.pfs]...)
			var byAgent, byShell []time.Duration
			for b.Loop() {
				stop := start()
				s.spec()
				ready("0/0")
				began := time.Now()
				s.spec(spec...)
				ready(all)
				byAgent = append(byAgent, time.Since(began))
				made := read()
				s.spec()
				ready("0/0")
				stop()

				began = time.Now()
				if out, err := exec.Command("sh", script...).CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
					b.Fatalf("%v: %s", err, out)
				}
				byShell = append(byShell, time.Since(began))
				for i, pf := range read() {
					for j, vf := range pf.VFs {
						vf.MAC, vf.Admin.MAC, vf.IfIndex = made[i].VFs[j].MAC, made[i].VFs[j].Admin.MAC, made[i].VFs[j].IfIndex
						if !reflect.DeepEqual(vf, made[i].VFs[j]) {
							b.Errorf("by the shell %+v, by the agent %+v", vf, made[i].VFs[j])
						}
					}
					if err := h.SetNumVFs(b.Context(), pf.PCIAddress, 0); err != nil {
						b.Fatal(err)
					}
				}
			}
			agent, shell := median(byAgent), median(byShell)
			ratio := agent.Seconds() / shell.Seconds()
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(agent.Microseconds())/1e3, "agent-ms")
			b.ReportMetric(float64(shell.Microseconds())/1e3, "shell-ms")
			b.ReportMetric(ratio, "ratio")
			if ratio > mostRatio {
				b.Errorf("the agent takes %.2f of the time of the bare operations, more than %.1f: %v and %v", ratio, mostRatio, byAgent, byShell)
			}
		})
	}
}

func median(times []time.Duration) time.Duration {
	return slices.Sorted(slices.Values(times))[len(times)/2]
}
