package attach

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/go-logr/logr"
	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/internal/host"
)

// TestAnyHistory makes up histories of a node: pods come and go, in order and
// out of it, calls fail, agents die. At any time a VF that is attached has its
// pod's VLAN and nobody else's; in the end nothing is left behind.
func TestAnyHistory(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "history")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		ctx := context.Background()
		w := newWorld()
		clear(w.netns)
		before := w.state()
		agent := func() *Attacher {
			a, err := New(Options{Kernel: w, Baselines: w, IPAM: w, Enforcer: w, Dir: dir, Log: logr.Discard()})
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		a := agent()
		vfs := []string{vf0, vf1}
		pods := map[int]string{} // VF asked for, by pod
		path := func(pod int) string { return fmt.Sprintf("/tmp/pod%d", pod) }
		req := func(c Command, pod int) Request {
			return request(c, fmt.Sprint(pod), path(pod), pods[pod], fmt.Sprintf(`"vlan":%d,"mac":"02:00:00:00:01:%02x","ipam":{"type":"static"}`, 100+pod, pod))
		}
		// perform does one call, which may meet an error, and the agent's death.
		perform := func(call func()) {
			if rapid.IntRange(0, 3).Draw(t, "fails") == 0 {
				w.failAt = len(w.calls) + rapid.IntRange(0, 12).Draw(t, "failing call")
			}
			died := ""
			if rapid.IntRange(0, 3).Draw(t, "dies") == 0 {
				died = crashing(a, rapid.IntRange(0, 12).Draw(t, "last step"), call)
			} else {
				call()
			}
			w.failAt = -1
			if died != "" {
				a = agent()
				if err := a.Recover(ctx); err != nil {
					t.Fatalf("recover after death at %q: %v", died, err)
				}
			}
		}
		somePod := func(t *rapid.T) int {
			if len(pods) == 0 {
				t.Skip()
			}
			return rapid.IntRange(0, len(pods)-1).Draw(t, "pod")
		}
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				pod := len(pods)
				if pod > 100 {
					t.Skip()
				}
				pods[pod] = rapid.SampledFrom(vfs).Draw(t, "vf")
				w.netns[path(pod)] = host.NetnsID{Dev: 4, Inode: uint64(100 + pod)}
				perform(func() { _, _ = a.Add(ctx, req(Add, pod), nil) })
			},
			"again": func(t *rapid.T) {
				pod := somePod(t)
				if _, alive := w.netns[path(pod)]; alive {
					perform(func() { _, _ = a.Add(ctx, req(Add, pod), nil) })
				}
			},
			"del": func(t *rapid.T) {
				pod := somePod(t)
				perform(func() { _ = a.Del(ctx, req(Del, pod), nil) })
			},
			"end": func(t *rapid.T) {
				w.end(path(somePod(t)))
			},
			"gc": func(t *rapid.T) {
				valid := fmt.Sprintf(`"cni.dev/valid-attachments":[{"containerID":"%d","ifname":"net1"}]`, somePod(t))
				perform(func() { _ = a.GC(ctx, request(GC, "", "", vf0, valid)) })
			},
			"": func(t *rapid.T) {
				for _, r := range a.journal.all() {
					if r.Phase != Attached || !a.alive(r) {
						continue
					}
					if s := w.settings[r.Device]; fmt.Sprint(s.VLAN-100) != r.ContainerID {
						t.Fatalf("VF %s of pod %s has VLAN %d", r.Device, r.ContainerID, s.VLAN)
					}
					if p := w.policed[r.Key]; p.generation != r.Generation || !p.enforced {
						t.Fatalf("pod %s has policy %+v", r.ContainerID, p)
					}
					links := w.links[r.Netns]
					if len(links) != 1 || links[0].PCIAddress != r.Device || !links[0].Up || links[0].Name != "net1" {
						t.Fatalf("pod %s has %+v", r.ContainerID, links)
					}
				}
			},
		})
		for pod := range pods {
			if err := a.Del(ctx, req(Del, pod), nil); err != nil {
				t.Fatalf("DEL of pod %d: %v", pod, err)
			}
		}
		if w.state() != before || len(a.journal.all()) != 0 {
			t.Fatalf("left behind:\n%s, records %v, was\n%s", w.state(), a.journal.all(), before)
		}
	})
}
