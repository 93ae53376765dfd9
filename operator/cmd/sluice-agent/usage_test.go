package main

import (
	"context"
	"errors"
	"maps"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr/testr"

	"github.com/sluice-network/sluice/deviceplugin/podresources"
	"github.com/sluice-network/sluice/operator/node"
)

const vf1, vf2 = "0000:01:00.1", "0000:01:00.2"

// authorities are who a usage asks.
type authorities struct {
	attached, allocated map[string]string
	err                 error
	asked, repeated     int
}

func (a *authorities) usage(t *testing.T) *usage {
	return newUsage(
		func(vf string) (string, bool) { pod, ok := a.attached[vf]; return pod, ok },
		func(context.Context) (map[string]string, error) { a.asked++; return maps.Clone(a.allocated), a.err },
		func() { a.repeated++ },
		testr.New(t))
}

func TestHolder(t *testing.T) {
	for _, c := range []struct {
		name string
		a    authorities
		pod  string
		held bool
	}{
		{"nobody", authorities{}, "", false},
		{"attached", authorities{attached: map[string]string{vf1: "ns/a"}}, "ns/a", true},
		{"allocated only", authorities{allocated: map[string]string{vf1: "ns/b"}}, "ns/b", true},
		{"another VF", authorities{allocated: map[string]string{vf2: "ns/b"}}, "", false},
		{"attached to whom only the kubelet knows", authorities{attached: map[string]string{vf1: ""}, allocated: map[string]string{vf1: "ns/b"}}, "ns/b", true},
		{"attached to nobody knows whom", authorities{attached: map[string]string{vf1: ""}}, "", true},
		{"the kubelet does not answer", authorities{err: errors.New("down")}, unknownPod, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if pod, held := c.a.usage(t).Holder(vf1); pod != c.pod || held != c.held {
				t.Errorf("%q %v, want %q %v", pod, held, c.pod, c.held)
			}
		})
	}
}

func TestAnAllocationCountsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authorities{}
		u := a.usage(t)
		if _, held := u.Holder(vf1); held {
			t.Error("held by nobody")
		}
		u.allocated([]string{vf1}) // younger than the kubelet's answer
		if _, held := u.Holder(vf1); !held {
			t.Error("not held when it was just allocated")
		}
		time.Sleep(grace)
		if _, held := u.Holder(vf1); held {
			t.Error("held although the kubelet never recorded it")
		}
	})
}

func TestHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authorities{allocated: map[string]string{vf1: "ns/b"}}
		u := a.usage(t)
		u.allocated([]string{vf1, "ens1f0-3"})
		want := map[string]string{vf1: "ns/b", "ens1f0-3": ""}
		if held, err := u.Held(); err != nil || !maps.Equal(held, want) {
			t.Errorf("%v, %v", held, err)
		}
		time.Sleep(grace)
		delete(want, "ens1f0-3")
		if held, err := u.Held(); err != nil || !maps.Equal(held, want) {
			t.Errorf("the kubelet never recorded it: %v, %v", held, err)
		}
		time.Sleep(fresh + 1)
		a.err = errors.New("down")
		if _, err := u.Held(); err == nil {
			t.Error("the kubelet does not answer, and this is not told")
		}
	})
}

func TestACheckpointIsDoubted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authorities{allocated: map[string]string{vf1: "ns/a", vf2: podresources.UnnamedPod + "u1"}}
		u := a.usage(t)
		if pod, held := u.Holder(vf2); pod != node.UnnamedPod+"u1" || !held {
			t.Errorf("%q %v", pod, held)
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { u.watch(ctx, func() {}); close(done) }()
		time.Sleep(recheck + 1)
		if a.repeated != 1 {
			t.Errorf("the checkpoint is asked for %d times at first", a.repeated)
		}
		time.Sleep(time.Hour)
		if a.repeated > 70 || a.repeated < 50 {
			t.Errorf("asked for %d times in an hour in which it is the same", a.repeated)
		}
		before := a.repeated
		a.allocated[vf2] = podresources.UnnamedPod + "u2"
		time.Sleep(recheck + 1)
		if a.repeated != before+1 {
			t.Errorf("asked for %d times when it is another", a.repeated-before)
		}
		delete(a.allocated, vf2)
		time.Sleep(recheck + 1)
		before = a.repeated
		time.Sleep(time.Hour)
		if a.repeated != before {
			t.Error("asked for while it tells of nothing else than the kubelet")
		}
		stop()
		<-done
	})
}

func TestTheKubeletIsNotAskedForEachVF(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authorities{}
		u := a.usage(t)
		for range 100 {
			u.Holder(vf1)
		}
		if a.asked != 1 {
			t.Errorf("asked %d times", a.asked)
		}
		time.Sleep(fresh + 1)
		if u.Holder(vf1); a.asked != 2 {
			t.Errorf("asked %d times, want again after %s", a.asked, fresh)
		}
	})
}

func TestReleasesAreNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authorities{attached: map[string]string{vf1: "ns/a"}, allocated: map[string]string{vf1: "ns/a"}}
		u := a.usage(t)
		u.Holder(vf2) // asks
		changes := 0
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { u.watch(ctx, func() { changes++ }); close(done) }()

		time.Sleep(time.Minute)
		if a.asked != 1 || changes != 0 {
			t.Errorf("all is attached: asked %d times, %d changes", a.asked, changes)
		}
		delete(a.attached, vf1) // DEL; the kubelet has it still
		time.Sleep(time.Minute)
		if a.asked < 10 || changes != 0 {
			t.Errorf("waiting for the kubelet: asked %d times, %d changes", a.asked, changes)
		}
		delete(a.allocated, vf1)
		time.Sleep(recheck + 1)
		if changes != 1 {
			t.Errorf("%d changes after the release, want 1", changes)
		}
		asked := a.asked
		time.Sleep(time.Minute)
		if a.asked != asked {
			t.Error("nothing is held: the kubelet is still asked")
		}
		a.err = errors.New("down")
		u.Holder(vf1)
		a.err = nil
		time.Sleep(recheck + 1)
		if changes != 2 {
			t.Errorf("%d changes, want one when the kubelet answers again", changes)
		}
		stop()
		<-done
	})
}
