package life

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/internal/holder"
)

const second Instant = 1e9

func nobody(string) (string, bool) { return "", false }

func TestPhases(t *testing.T) {
	b, now := New(), Instant(0)
	attachedTo := map[string]string{}
	attached := func(id string) (string, bool) { pod, ok := attachedTo[id]; return pod, ok }
	listed := map[string]string{}
	hear := func() { now += 2 * second; b.Hear(listed, now, attached) }
	want := func(p Phase, generation uint64, pod string) {
		t.Helper()
		_, is := attached("a")
		h, _ := b.Hand("a")
		if got := b.PhaseOf("a", true, is); got != p || h.Generation != generation || h.Pod != pod {
			t.Errorf("%s, generation %d of %q; want %s, %d of %q", got, h.Generation, h.Pod, p, generation, pod)
		}
	}
	want(Advertised, 0, "")
	if got := b.PhaseOf("a", false, false); got != Configured {
		t.Errorf("not offered: %s", got)
	}
	b.Give("a", "r", false, now)
	want(Allocated, 1, "")
	listed["a"] = "ns/p"
	hear()
	want(Allocated, 1, "ns/p")
	attachedTo["a"] = "ns/p"
	hear()
	want(Attached, 1, "ns/p")
	delete(attachedTo, "a")
	want(Returned, 1, "ns/p")
	attachedTo["a"] = "ns/p" // another sandbox
	want(Attached, 1, "ns/p")
	delete(attachedTo, "a")
	delete(listed, "a")
	hear()
	want(Returned, 1, "ns/p") // one answer is none
	hear()
	want(Advertised, 0, "")
	listed["a"] = "ns/q" // given while nobody looked
	hear()
	want(Allocated, 2, "ns/q")
	listed["a"] = "ns/r"
	hear()
	want(Allocated, 3, "ns/r")
	listed["a"] = holder.Unnamed("1") // nothing says that it is not ns/r
	hear()
	want(Allocated, 3, "ns/r")
	b.Give("a", "r", false, now)
	hear()
	want(Allocated, 4, holder.Unnamed("1"))
	listed["a"] = "ns/s"
	hear()
	want(Allocated, 4, "ns/s")
}

func TestAnAnswerOlderThanThePromiseSaysNothing(t *testing.T) {
	b := New()
	b.Hear(map[string]string{"a": "ns/old"}, 5, nobody)
	b.Give("a", "r", false, 10)
	b.Hear(map[string]string{"a": "ns/old"}, 9, nobody)
	if h, _ := b.Hand("a"); h.Generation != 2 || h.Pod != "" {
		t.Errorf("%+v", h)
	}
}

func TestAPromiseCountsForItsGrace(t *testing.T) {
	b := New()
	b.Give("a", "r", false, 0)
	for now := second; now < Grace; now += second {
		b.Hear(nil, now, nobody)
	}
	if _, ok := b.Hand("a"); !ok {
		t.Fatal("ended before the kubelet must have taken it down")
	}
	b.Hear(nil, Grace, nobody)
	b.Hear(nil, Grace+Apart/2, nobody)
	if _, ok := b.Hand("a"); !ok {
		t.Fatal("ended after one answer")
	}
	b.Hear(nil, Grace+Apart, nobody)
	if h, ok := b.Hand("a"); ok {
		t.Fatalf("still in hand: %+v", h)
	}
}

func TestWhatIsAttachedAndForgottenStaysInHand(t *testing.T) {
	b := New()
	attached := func(string) (string, bool) { return "ns/p", true }
	b.Hear(map[string]string{"a": "ns/p"}, 0, attached)
	for now := second; now < 5*second; now += second {
		b.Hear(nil, now, attached)
	}
	if h, ok := b.Hand("a"); !ok || !h.Forgotten() || h.Generation != 1 {
		t.Fatalf("%+v", h)
	}
	if b.Hear(map[string]string{"a": "ns/p"}, 6*second, attached); b.hands["a"].Forgotten() {
		t.Error("forgotten although the kubelet knows it again")
	}
	b.Hear(nil, 7*second, nobody)
	if b.Hear(nil, 8*second, nobody); len(b.Hands()) > 0 {
		t.Errorf("%v", b.Hands())
	}
}

func TestLoadRefusesWhatItCannotRead(t *testing.T) {
	if _, err := Load([]byte("{"), 0); err == nil || !strings.Contains(err.Error(), "allocation records") {
		t.Error(err)
	}
}

// world is a kubelet, a journal, pods and an agent with a book.
type world struct {
	book     *Book
	disk     []byte
	now      Instant
	devices  []string
	taken    map[string]string  // the kubelet's record
	promised map[string]promise // answers of ours that the kubelet has not taken down
	journal  map[string]string
	partial  Instant // until then the kubelet, just started, may tell of some pods only
	pods     int
	last     map[string]Hand
	owner    map[uint64]string // by generation

	forgotten map[string]int // answers, Apart, without a device that is attached
	heard     map[string]Instant
}

type promise struct {
	pod string
	due Instant // 0: lost
	at  Instant
}

func (w *world) attached(id string) (string, bool) { pod, ok := w.journal[id]; return pod, ok }

// answer is what the kubelet tells now.
func (w *world) answer(t *rapid.T) map[string]string {
	all := maps.Clone(w.taken)
	if w.now < w.partial {
		maps.DeleteFunc(all, func(id, _ string) bool { return rapid.Bool().Draw(t, "not told yet "+id) })
	}
	return all
}

func (w *world) hear(t *rapid.T) {
	for _, id := range w.devices {
		_, taken := w.taken[id]
		_, promised := w.promised[id]
		_, isAttached := w.journal[id]
		switch h, known := w.book.Hand(id); {
		case taken, promised, !isAttached, !known, w.now-h.given < Grace:
			w.forgotten[id], w.heard[id] = 0, w.now
		case w.forgotten[id] == 0 || w.now-w.heard[id] >= Apart:
			w.forgotten[id], w.heard[id] = w.forgotten[id]+1, w.now
		}
	}
	w.book.Hear(w.answer(t), w.now, w.attached)
	w.save()
}

func (w *world) save() {
	var err error
	if w.disk, err = w.book.Save(); err != nil {
		panic(err)
	}
}

// check is what must be so at any time.
func (w *world) check(t *rapid.T) {
	held := func(id string) bool {
		_, inHand := w.book.Hand(id)
		_, attached := w.journal[id]
		return inHand || attached
	}
	for id, pod := range w.taken {
		// What the kubelet counts as a pod's is in a hand, or would be changed under it.
		if !held(id) {
			t.Fatalf("device %s of pod %s is in nobody's hand", id, pod)
		}
	}
	for id, p := range w.promised {
		if p.due > 0 && !held(id) {
			t.Fatalf("device %s was promised to %s and is in nobody's hand", id, p.pod)
		}
	}
	for id := range w.journal {
		// The kubelet may have forgotten it; then it must not give it to others for long.
		if h, _ := w.book.Hand(id); w.forgotten[id] >= 2 && !h.Forgotten() {
			t.Fatalf("device %s is attached, the kubelet has forgotten it, and it stays on offer", id)
		}
	}
	for _, id := range w.devices {
		h, ok := w.book.Hand(id)
		before := w.last[id]
		if !ok {
			continue
		}
		if h.Generation < before.Generation {
			t.Fatalf("device %s went back from generation %d to %d", id, before.Generation, h.Generation)
		}
		if pod := w.owner[h.Generation]; pod != "" && h.Pod != pod {
			t.Fatalf("generation %d was of pod %s and is of %q", h.Generation, pod, h.Pod)
		}
		if h.Pod != "" {
			w.owner[h.Generation] = h.Pod
		}
		w.last[id] = h
	}
}

// Whatever order things happen in, and whoever is killed: what a pod has, or is about to
// get, is in its hand and in no other; and when all pods are gone, everything is on offer.
func TestNoDeviceIsInTwoHands(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &world{
			book: New(), devices: []string{"a", "b", "c"}, taken: map[string]string{}, promised: map[string]promise{}, journal: map[string]string{},
			last: map[string]Hand{}, owner: map[uint64]string{}, now: 1,
			forgotten: map[string]int{}, heard: map[string]Instant{},
		}
		w.save()
		device := func(what string, ok func(string) bool) (string, bool) {
			fit := slices.DeleteFunc(slices.Clone(w.devices), func(id string) bool { return !ok(id) })
			if len(fit) == 0 {
				return "", false
			}
			return rapid.SampledFrom(fit).Draw(t, what), true
		}
		free := func(id string) bool {
			_, taken := w.taken[id]
			_, promised := w.promised[id]
			h, _ := w.book.Hand(id)
			return !taken && !promised && !h.Forgotten() // a forgotten one is told as unhealthy
		}
		held := func(id string) bool { _, ok := w.taken[id]; return ok }
		isAttached := func(id string) bool { _, ok := w.journal[id]; return ok }
		t.Repeat(map[string]func(*rapid.T){
			"": w.check,
			"allocate": func(t *rapid.T) {
				id, ok := device("device", free)
				if !ok {
					t.Skip("none free")
				}
				w.pods++
				p := promise{pod: fmt.Sprintf("ns/p%d", w.pods), at: w.now}
				w.book.Give(id, "r", false, w.now)
				w.save()
				if !rapid.Bool().Draw(t, "the answer is lost") {
					p.due = w.now + Instant(rapid.Int64Range(1, int64(Grace)-1).Draw(t, "taken down after"))
				}
				w.promised[id] = p
			},
			"a moment passes": func(*rapid.T) { w.pass(1) },
			"the kubelet is asked": func(t *rapid.T) {
				w.pass(Instant(rapid.Int64Range(1, int64(3*second)).Draw(t, "passed")))
				w.hear(t)
			},
			"and again": func(t *rapid.T) {
				w.pass(Instant(rapid.Int64Range(int64(second)/2, int64(3*second)).Draw(t, "passed")))
				w.hear(t)
			},
			"add": func(t *rapid.T) {
				// ADD asks the kubelet anew, and the journal has one owner for each device.
				id, ok := device("device", func(id string) bool { return held(id) && !isAttached(id) })
				if !ok {
					t.Skip("none")
				}
				answer := w.answer(t)
				w.book.Hear(answer, w.now, w.attached)
				w.save()
				if answer[id] == w.taken[id] {
					w.journal[id] = w.taken[id]
				}
			},
			"del": func(t *rapid.T) {
				if id, ok := device("device", isAttached); ok {
					delete(w.journal, id)
				}
			},
			"the pod goes": func(t *rapid.T) {
				if id, ok := device("device", func(id string) bool { return held(id) && !isAttached(id) }); ok {
					delete(w.taken, id)
				}
			},
			"the pod is deleted by force, its DEL comes late": func(t *rapid.T) {
				if id, ok := device("device", held); ok {
					delete(w.taken, id)
				}
			},
			"the kubelet forgets all": func(*rapid.T) { clear(w.taken); clear(w.promised) },
			"the kubelet restarts":    func(*rapid.T) { w.partial = w.now + Apart; w.dropPromises() },
			"the agent restarts": func(t *rapid.T) {
				var err error
				if w.book, err = Load(w.disk, w.now); err != nil {
					t.Fatal(err)
				}
				clear(w.forgotten)
			},
		})
		for id := range w.journal {
			delete(w.journal, id)
		}
		clear(w.taken)
		clear(w.promised)
		w.pass(Grace + Apart)
		w.hear(t)
		w.pass(Apart)
		w.hear(t)
		for _, id := range w.devices {
			if p := w.book.PhaseOf(id, true, false); p != Advertised {
				t.Fatalf("nobody has device %s, and it is %s", id, p)
			}
		}
	})
}

// pass lets time pass; promises that are due are taken down.
func (w *world) pass(d Instant) {
	w.now += d
	for id, p := range w.promised {
		switch {
		case p.due > 0 && p.due <= w.now:
			w.taken[id] = p.pod
			delete(w.promised, id)
		case p.due == 0 && w.now-p.at >= Grace:
			delete(w.promised, id)
		}
	}
}

// dropPromises: calls in progress end with the kubelet.
func (w *world) dropPromises() { clear(w.promised) }
