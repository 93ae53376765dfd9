package attach

import (
	"context"
	"fmt"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// noIPAM stands where no call may come.
type noIPAM struct{ t *testing.T }

func (n noIPAM) Find(plugin string, _ Request) error { return n.fail(plugin) }

func (n noIPAM) Exec(_ context.Context, plugin string, _ Request) (*types100.Result, error) {
	return nil, n.fail(plugin)
}

func (n noIPAM) fail(plugin string) error {
	n.t.Errorf("IPAM %s is asked of the wrong one", plugin)
	return fmt.Errorf("no IPAM %s", plugin)
}

// The agent's own IPAM learns from the journal what attachments have, and which may have
// something: at each step one or the other is told, before the address is asked for and
// until it is given back.
func TestLeasesOfTheOwnIPAM(t *testing.T) {
	w := newWorld()
	var a *Attacher
	seen := map[string]string{}
	a = newAttacher(t, w, t.TempDir(), func(step string) {
		for _, l := range a.Leases() {
			seen[step] = fmt.Sprint(l.Pool, " ", l.Namespace, " ", l.Addresses, " ", l.Done)
		}
	})
	a.IPAM = ByType{Own: w, Others: noIPAM{t}}
	const config = `"ipam":{"type":"sluice","pool":"blue"}`
	if _, err := a.Add(t.Context(), request(Add, "c1", pod1, vf0, config), nil); err != nil {
		t.Fatal(err)
	}
	if err := a.Del(t.Context(), request(Del, "c1", pod1, vf0, config), nil); err != nil {
		t.Fatal(err)
	}
	const half, whole = "blue ns [] false", "blue ns [10.1.0.5 fd00::5] true"
	for step, want := range map[string]string{
		"add: write intent": "", "add: ask IPAM": half, "add: answer": whole, "del: ask IPAM": half, "del: answer": "",
	} {
		if seen[step] != want {
			t.Errorf("at %q the leases are %q, want %q", step, seen[step], want)
		}
	}
	if left := a.Leases(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
