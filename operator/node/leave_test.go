package node

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// An agent that shall leave gives the NICs back, takes its files off the node when
// nobody needs them any more, and says so; when it is wanted again it ends, for
// a new one to begin.
func TestLeaves(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := rigWith(t)
		var inUse atomic.Bool
		inUse.Store(true)
		r.uninstall = func() error {
			if inUse.Load() {
				return errors.New("pod ns/p has an interface")
			}
			return nil
		}
		r.start()
		want := wants(nic0, 2, of("left", "0-1", 0))
		want.Mtu = 9000
		r.server.spec(want)
		r.ready()
		annotate := func(value string) {
			r.server.mu.Lock()
			defer r.server.mu.Unlock()
			r.server.state.Annotations = map[string]string{v1.AnnotationRemoval: value}
			r.server.state.Spec.Interfaces = nil
			r.server.state.Generation++
			r.server.send()
		}
		reason := func(status metav1.ConditionStatus, reason string) {
			t.Helper()
			r.eventually(func() error {
				if c := r.condition(v1.ConditionReady); c.Status != status || c.Reason != reason {
					return fmt.Errorf("Ready is %+v", c)
				}
				return nil
			})
		}
		annotate("true")
		reason(metav1.ConditionFalse, ReasonLeaving)
		if pf := r.kernel.PF(nic0); pf.NumVFs != 0 || pf.MTU != 1500 {
			t.Errorf("not given back: %+v", pf)
		}
		inUse.Store(false)
		reason(metav1.ConditionTrue, ReasonRemoved)
		if entries, err := os.ReadDir(r.state); err != nil || len(entries) > 0 {
			t.Errorf("left in the state directory: %v, %v", entries, err)
		}
		annotate("")
		if err := <-r.ended; !errors.Is(err, errWantedAgain) {
			t.Errorf("ended with %v", err)
		}
	})
}
