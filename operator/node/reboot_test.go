package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host/hostfake"
	"github.com/sluice-network/sluice/operator/plan"
)

func TestJudgeBoot(t *testing.T) {
	t.Parallel()
	ops := []plan.Operation{{Kind: plan.SetRDMAMode, VF: -1, Value: "exclusive"}}
	other := []plan.Operation{{Kind: plan.SetRDMAMode, VF: -1, Value: "shared"}}
	had := boot{goalOf(ops), "1"}
	for _, c := range []struct {
		ops     []plan.Operation
		last    boot
		bootID  string
		allowed bool
		want    bootVerdict
	}{
		{nil, boot{}, "1", true, bootWait},
		{ops, boot{}, "1", false, bootWait},
		{ops, boot{}, "1", true, bootNow},
		{ops, had, "1", true, bootNow}, // it did not come
		{ops, had, "2", true, bootNoHelp},
		{ops, had, "2", false, bootNoHelp},
		{other, had, "2", true, bootNow},
		{nil, had, "2", false, bootFinished},
	} {
		if got := judgeBoot(c.ops, c.last, c.bootID, c.allowed); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

// A node is rebooted when that was allowed, with the kernel's next start prepared,
// and never again for the same.
func TestReboot(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := rigWith(t)
		var reboots atomic.Int32
		var failing atomic.Bool
		failing.Store(true)
		r.reboot = func(context.Context) error {
			if failing.Load() {
				return errors.New("connect to systemd: no such file")
			}
			reboots.Add(1)
			return nil
		}
		r.kernel.Fail(hostfake.SetRDMAMode, slices.Repeat([]unix.Errno{unix.EBUSY}, 3)...) // one for each agent
		r.start()
		r.server.mu.Lock()
		r.server.state.Spec.System.RdmaMode = "exclusive"
		r.server.state.Generation++
		r.server.send()
		r.server.mu.Unlock()
		r.eventually(func() error {
			c, s := r.condition(v1.ConditionRebootRequired), r.server.status()
			if c.Status != metav1.ConditionTrue || !strings.Contains(c.Message, "SetRDMAMode exclusive") || len(s.Pending) != 1 || s.Pending[0].Cost != v1.CostReboot {
				return fmt.Errorf("%+v, pending %+v", c, s.Pending)
			}
			return nil
		})
		time.Sleep(50 * time.Millisecond)
		if _, err := os.Stat(filepath.Join(r.modprobe, modprobeFile)); err == nil || reboots.Load() != 0 {
			t.Fatal("prepared, or rebooted, without consent")
		}

		r.server.mu.Lock()
		r.server.state.Annotations = map[string]string{v1.AnnotationRebootAllowed: strconv.FormatInt(r.server.state.Generation, 10)}
		r.server.send()
		r.server.mu.Unlock()
		r.degraded(ReasonNotBooted, "no such file")
		failing.Store(false)
		r.eventually(func() error {
			if n := reboots.Load(); n != 1 {
				return fmt.Errorf("%d reboots", n)
			}
			return nil
		})
		b, err := os.ReadFile(filepath.Join(r.modprobe, modprobeFile))
		if err != nil || !strings.Contains(string(b), "\noptions ib_core netns_mode=0\n") {
			t.Errorf("%q, %v", b, err)
		}

		for _, bootID := range []string{"boot-2", "boot-3"} {
			r.stop()
			r.kernel.Calls()
			r.bootID = bootID
			r.restart()
			r.eventually(func() error {
				if len(r.kernel.Calls()) == 0 {
					return errors.New("the new agent has not tried")
				}
				return nil
			})
			r.degraded(ReasonNoHelp, "SetRDMAMode exclusive", "not rebooted for it again")
		}
		if n := reboots.Load(); n != 1 {
			t.Errorf("%d reboots", n)
		}

		r.bootID = "boot-4" // somebody has mended the kernel's start
		r.restart()
		r.ready()
		r.eventually(func() error {
			if _, err := os.Stat(filepath.Join(r.state, bootFile)); err == nil {
				return errors.New("the reboot is not forgotten")
			}
			return nil
		})
	})
}
