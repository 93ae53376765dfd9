package lab

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluice-network/sluice/test/lab/guest"
)

func TestOptionsAreCompletedOrRefused(t *testing.T) {
	t.Setenv("SLUICE_LAB_NAME", "mine")
	var o Options
	if err := o.complete(); err != nil {
		t.Fatal(err)
	}
	if o.Name != "mine" || o.Kind != guest.UML || o.Nodes != 2 || o.Card.Count != 2 || o.Progress == nil {
		t.Errorf("defaults are %+v", o)
	}
	for want, o := range map[string]Options{
		`lab name "../x"`:      {Name: "../x"},
		`lab name "-a"`:        {Name: "-a"},
		`kind of guest "kvm"`:  {Kind: "kvm"},
		"number of nodes 100":  {Nodes: 100},
		"number of nodes -1":   {Nodes: -1},
		"image archive: stat ": {Images: []string{filepath.Join(t.TempDir(), "none.tar")}},
	} {
		if err := o.complete(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %q", err, want)
		}
	}
}

func TestALabThatIsNotUpCanBeEndedButNotAttachedTo(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	if _, err := Attach("sluice-none"); err == nil || !strings.Contains(err.Error(), "is not up") {
		t.Errorf("attach: %v", err)
	}
	if err := Down("sluice-none"); err != nil {
		t.Errorf("down: %v", err)
	}
}

func TestALabIsStartedOrEndedByOneProcessAtATime(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	_, unlock, err := lock("sluice-none")
	if err != nil {
		t.Fatal(err)
	}
	if err := Down("sluice-none"); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("down of a locked lab: %v", err)
	}
	unlock()
	if err := Down("sluice-none"); err != nil {
		t.Error(err)
	}
}
