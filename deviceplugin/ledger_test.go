package deviceplugin

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr/testr"

	"github.com/sluice-network/sluice/deviceplugin/life"
	"github.com/sluice-network/sluice/internal/holder"
)

const vf1, vf2 = "0000:01:00.1", "0000:01:00.2"

// authorities are who a ledger asks.
type authorities struct {
	attached, allocated map[string]string
	err                 error
	asked               int
}

func (a *authorities) ledger(t *testing.T) *Ledger {
	t.Helper()
	return a.open(t, filepath.Join(t.TempDir(), "state/devices.json"))
}

func (a *authorities) open(t *testing.T, path string) *Ledger {
	t.Helper()
	l, err := OpenLedger(path,
		func(id string) (string, bool) { pod, ok := a.attached[id]; return pod, ok },
		func(context.Context) (map[string]string, error) { a.asked++; return maps.Clone(a.allocated), a.err },
		testr.New(t))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// giveUp lets the kubelet be asked as often as it takes for it to let go.
func giveUp(l *Ledger) {
	for range 2 {
		pass(fresh + 1)
		l.Holder("none")
	}
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
			if pod, held := c.a.ledger(t).Holder(vf1); pod != c.pod || held != c.held {
				t.Errorf("%q %v, want %q %v", pod, held, c.pod, c.held)
			}
		})
	}
}

// pass lets time pass, until what happens at its end has happened.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestAnAllocationCountsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authorities{}
		u := a.ledger(t)
		if _, held := u.Holder(vf1); held {
			t.Error("held by nobody")
		}
		must(t, u.give([]string{vf1}, "p.io/r", false, false)) // younger than the kubelet's answer
		if _, held := u.Holder(vf1); !held {
			t.Error("not held when it was just allocated")
		}
		pass(time.Duration(life.Grace))
		giveUp(u)
		if _, held := u.Holder(vf1); held {
			t.Error("held although the kubelet never recorded it")
		}
	})
}

func TestHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authorities{allocated: map[string]string{vf1: "ns/b"}}
		u := a.ledger(t)
		u.Holder("none")
		must(t, u.give([]string{"ens1f0-3"}, "p.io/r", false, false))
		want := map[string]string{vf1: "ns/b", "ens1f0-3": ""}
		if held, err := u.Held(); err != nil || !maps.Equal(held, want) {
			t.Errorf("%v, %v", held, err)
		}
		pass(time.Duration(life.Grace))
		giveUp(u)
		delete(want, "ens1f0-3")
		if held, err := u.Held(); err != nil || !maps.Equal(held, want) {
			t.Errorf("the kubelet never recorded it: %v, %v", held, err)
		}
		pass(fresh + 1)
		a.err = errors.New("down")
		if _, err := u.Held(); err == nil {
			t.Error("the kubelet does not answer, and this is not told")
		}
	})
}

func TestACheckpointIsDoubted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authorities{allocated: map[string]string{vf1: "ns/a", vf2: holder.Unnamed("u1")}}
		l := a.ledger(t)
		if pod, held := l.Holder(vf2); pod != holder.Unnamed("u1") || !held {
			t.Errorf("%q %v", pod, held)
		}
		ctx, stop := context.WithCancel(t.Context())
		done, repeated := make(chan struct{}), 0
		go func() { l.Watch(ctx, func() {}, func() { repeated++ }); close(done) }()
		pass(recheck + 1)
		if repeated != 1 {
			t.Errorf("the checkpoint is asked for %d times at first", repeated)
		}
		pass(time.Hour)
		if repeated > 370 || repeated < 350 {
			t.Errorf("asked for %d times in an hour in which it is the same", repeated)
		}
		before := repeated
		must(t, l.give([]string{vf2}, "p.io/r", false, false))
		a.allocated[vf2] = holder.Unnamed("u2")
		pass(recheck + 1)
		if repeated != before+1 {
			t.Errorf("asked for %d times when it is another", repeated-before)
		}
		delete(a.allocated, vf2)
		pass(recheck + 1)
		before = repeated
		pass(time.Hour)
		if repeated != before {
			t.Error("asked for while it tells of nothing else than the kubelet")
		}
		stop()
		<-done
	})
}

func TestTheKubeletIsNotAskedForEachVF(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authorities{}
		u := a.ledger(t)
		for range 100 {
			u.Holder(vf1)
		}
		if a.asked != 1 {
			t.Errorf("asked %d times", a.asked)
		}
		pass(fresh + 1)
		if u.Holder(vf1); a.asked != 2 {
			t.Errorf("asked %d times, want again after %s", a.asked, fresh)
		}
	})
}

func TestReleasesAreNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authorities{attached: map[string]string{vf1: "ns/a"}, allocated: map[string]string{vf1: "ns/a"}}
		u := a.ledger(t)
		u.Holder(vf2) // asks
		changes := 0
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { u.Watch(ctx, func() { changes++ }, func() {}); close(done) }()

		pass(time.Minute)
		if a.asked != 2 || changes != 1 {
			t.Errorf("all is attached: asked %d times, %d changes", a.asked, changes)
		}
		delete(a.attached, vf1) // DEL; the kubelet has it still
		pass(time.Minute)
		if a.asked < 10 || changes != 1 {
			t.Errorf("waiting for the kubelet: asked %d times, %d changes", a.asked, changes)
		}
		delete(a.allocated, vf1)
		pass(2*recheck + 1)
		if changes != 2 {
			t.Errorf("%d changes after the release, want another", changes)
		}
		asked := a.asked
		pass(time.Minute)
		if a.asked != asked {
			t.Error("nothing is held: the kubelet is still asked")
		}
		a.err = errors.New("down")
		u.Holder(vf1)
		a.err = nil
		pass(recheck + 1)
		if changes != 3 {
			t.Errorf("%d changes, want one when the kubelet answers again", changes)
		}
		stop()
		<-done
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestAPromiseSurvivesTheAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, path := &authorities{}, filepath.Join(t.TempDir(), "devices.json")
		must(t, a.open(t, path).give([]string{vf1}, "p.io/r", false, true))
		l := a.open(t, path)
		if !l.RDMA(vf1) || l.RDMA(vf2) {
			t.Error("the next agent does not know who has RDMA")
		}
		if _, held := l.Holder(vf1); !held {
			t.Error("the next agent does not know of the promise")
		}
		must(t, l.give([]string{vf2}, "p.io/r", false, false))
		if g := l.record(vf2, true).generation; g != 2 {
			t.Errorf("generation %d, want 2", g)
		}
	})
}

func TestRecordsThatCannotBeReadAreSetAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "devices.json")
	must(t, os.WriteFile(path, []byte("{"), 0o600))
	a := &authorities{}
	must(t, a.open(t, path).give([]string{vf1}, "p.io/r", false, false))
	if b, err := os.ReadFile(path + ".unreadable"); err != nil || string(b) != "{" {
		t.Errorf("%q, %v", b, err)
	}
}

// What cannot be written down is not given.
func TestNoPromiseWithoutRecord(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	l := (&authorities{}).open(t, filepath.Join(dir, "devices.json"))
	must(t, os.RemoveAll(dir))
	if err := l.give([]string{vf1}, "p.io/r", false, false); err == nil || !strings.Contains(err.Error(), "write allocation records") {
		t.Error(err)
	}
}

func TestADDAsksAnew(t *testing.T) {
	a := &authorities{}
	l := a.ledger(t)
	if pod, ok, err := l.Allocated(t.Context(), vf1); pod != "" || ok || err != nil {
		t.Errorf("%q %v %v", pod, ok, err)
	}
	a.allocated = map[string]string{vf1: "ns/a"}
	if pod, ok, err := l.Allocated(t.Context(), vf1); pod != "ns/a" || !ok || err != nil {
		t.Errorf("%q %v %v", pod, ok, err)
	}
	a.err = errors.New("down")
	if _, ok, err := l.Allocated(t.Context(), vf1); err == nil || ok || !strings.Contains(err.Error(), vf1) {
		t.Errorf("%v %v", ok, err)
	}
}

// A kubelet that lost its checkpoint would give an attached device to another pod.
func TestForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authorities{attached: map[string]string{vf1: "ns/a", vf2: "ns/b"}, allocated: map[string]string{vf1: "ns/a"}}
		l := a.ledger(t)
		is := func(id, pod string, want bool) {
			t.Helper()
			if p, forgotten := l.Forgotten(id); forgotten != want || p != pod {
				t.Errorf("%s of %q: forgotten %v, want %v of %q", id, p, forgotten, want, pod)
			}
		}
		l.Holder("none")
		is(vf1, "ns/a", false)
		is(vf2, "ns/b", false) // after one answer
		giveUp(l)
		is(vf1, "ns/a", false)
		is(vf2, "ns/b", true) // attached before there was a ledger
		a.allocated = nil
		giveUp(l)
		is(vf1, "ns/a", true)
		a.err = errors.New("down")
		giveUp(l)
		is(vf1, "ns/a", false)
		delete(a.attached, vf1)
		is(vf1, "", false)
	})
}
