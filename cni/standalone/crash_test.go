package standalone

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/internal/durable"
)

type death struct{}

// dies does f in an agent that ends before the step with the number at, and names that
// step; "" when f came to its end before.
func (w *world) dies(at int, f func()) (last string) {
	n := 0
	w.onStep = func(step string) {
		if last = step; n == at {
			panic(death{})
		}
		n++
	}
	durable.OnStep = func(step string) { w.onStep("record: " + step) }
	defer func() {
		w.onStep, durable.OnStep = nil, nil
		if p := recover(); p != nil && p != any(death{}) {
			panic(p)
		}
	}()
	f()
	return ""
}

// TestAgentDiesAtEachStep ends the agent before and after everything that ADD and DEL do
// to the world: its records, the plugins, the API server. Its successor finds all networks
// of the pod there, or ends them; and whoever ends them then, nothing of the pod is left.
func TestAgentDiesAtEachStep(t *testing.T) {
	add := func(w *world) error { _, err := w.call(attach.Add, `,"prevResult":`+prev); return err }
	del := func(w *world) error { _, err := w.call(attach.Del, ""); return err }
	for name, end := range map[string]func(*world) error{
		"DEL": del,
		"ADD and DEL": func(w *world) error {
			if err := add(w); err != nil {
				return err
			}
			if len(w.held) != 2 {
				t.Errorf("ADD made %v", w.held)
			}
			return del(w)
		},
		"GC":  func(w *world) error { _, err := w.call(attach.GC, `,"cni.dev/valid-attachments":[]`); return err },
		"end": func(w *world) error { w.alive = false; return w.networks.Collect(t.Context()) },
	} {
		t.Run("then "+name, func(t *testing.T) {
			for at, done := 0, false; !done; at++ {
				w := newWorld(t)
				w.definitions["other/fast"] = definition("fast", "x/vf", `{"cniVersion":"1.0.0","name":"red","type":"sriov"}`) // no process: there are many runs
				w.annotations["k8s.v1.cni.cncf.io/networks"] = `[{"name":"fast"},{"name":"fast","namespace":"other","interface":"f2","default-route":["10.0.0.254"]}]`
				step := w.dies(at, func() {
					if err := add(w); err != nil {
						t.Error(err)
					}
					if err := del(w); err != nil {
						t.Error(err)
					}
				})
				done = step == ""
				made := len(w.held)
				if record, _ := w.networks.records.get("c1"); record == nil || !record.Complete {
					w.tearResults()
				}
				w.start()
				if err := w.networks.Collect(t.Context()); err != nil {
					t.Errorf("dead before %q: %v", step, err)
				}
				t.Logf("dead before %-28q %d of 2 attached, then %d", step, made, len(w.held))
				switch record, err := w.networks.records.get("c1"); {
				case err != nil:
					t.Errorf("dead before %q: %v", step, err)
				case record == nil:
					w.clean("dead before " + step)
				default:
					if _, err := w.call(attach.Check, `,"prevResult":`+prev); err != nil || len(w.held) != 2 {
						t.Errorf("dead before %q: half attached: %v, %v", step, w.held, err)
					}
				}
				if err := end(w); err != nil {
					t.Errorf("dead before %q: %s after it: %v", step, name, err)
				}
				w.clean("dead before " + step + ", then " + name)
			}
		})
	}
}

// tearResults leaves half of what libcni keeps of each plugin's result, as an end in the
// middle of its write does.
func (w *world) tearResults() {
	files, _ := filepath.Glob(filepath.Join(w.options.Dir, "cache", "results", "*"))
	for _, f := range files {
		st, err := os.Stat(f)
		if err == nil {
			err = os.Truncate(f, st.Size()/2)
		}
		if err != nil {
			w.t.Fatal(err)
		}
	}
}

// What is no record stops no pod for ever.
func TestSetsAsideWhatIsNoRecord(t *testing.T) {
	w := newWorld(t)
	file := w.networks.records.file("c1")
	for _, text := range []string{`{"containerID":`, `{"containerID":"c2"}`, "null"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		w.start()
		if b, err := os.ReadFile(file + ".unreadable"); err != nil || string(b) != text {
			t.Errorf("%s: set aside is %q, %v", text, b, err)
		}
		if _, err := w.call(attach.Del, ""); err != nil {
			t.Errorf("%s: DEL: %v", text, err)
		}
		if _, err := w.call(attach.Add, `,"prevResult":`+prev); err != nil {
			t.Errorf("%s: ADD: %v", text, err)
		}
		if _, err := w.call(attach.Del, ""); err != nil {
			t.Errorf("%s: DEL: %v", text, err)
		}
	}
	if ids, err := w.networks.records.all(); err != nil || len(ids) > 0 {
		t.Errorf("left %v, %v", ids, err)
	}
}
