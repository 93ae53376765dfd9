package server

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	cnitypes "github.com/containernetworking/cni/pkg/types"
	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/record"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/wire"
)

// events is what a recorder was told.
type events struct {
	record.EventRecorder
	all []string
}

func (e *events) Event(object runtime.Object, kind, reason, message string) {
	o := object.(*corev1.ObjectReference)
	e.all = append(e.all, fmt.Sprintf("%s %s/%s %s: %s %s %s", o.Kind, o.Namespace, o.Name, o.UID, kind, reason, message))
}

func TestPodsHearOfTransitions(t *testing.T) {
	e := &events{}
	now := time.Unix(0, 0)
	tell := teller{events: e, now: func() time.Time { return now }, failing: map[failing]failure{}}
	containers := 0
	call := func(command, ifName string, err error) []string {
		containers++
		before := len(e.all)
		tell.called(wire.Request{
			Command: command, ContainerID: fmt.Sprint(containers), IfName: ifName, Stdin: []byte(`{"name":"blue"}`),
			Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_UID=u",
		}, err)
		return e.all[before:]
	}
	held := cnitypes.NewError(attach.CodeHeld, "the VF is held", "")
	gone := cnitypes.NewError(attach.CodeUnusable, "the VF has no driver", "")
	for i, c := range []struct {
		command, ifName string
		err             error
		wait            time.Duration
		want            string
	}{
		{"ADD", "net1", nil, 0, ""},
		{"ADD", "net1", held, 0, "Warning FailedAttach interface net1: the VF is held (CNI error code 100)"},
		{"ADD", "net1", held, time.Second, ""},
		{"ADD", "net2", held, 0, "Warning FailedAttach interface net2: the VF is held (CNI error code 100)"},
		{"ADD", "net1", gone, time.Second, "Warning FailedAttach interface net1: the VF has no driver (CNI error code 101)"},
		{"CHECK", "net1", gone, 0, ""},
		{"ADD", "net1", gone, tellAgain, "Warning FailedAttach interface net1: the VF has no driver (CNI error code 101)"},
		{"ADD", "net1", nil, 0, `Normal Attached interface net1 of network "blue", after 4 failures`},
		{"ADD", "net1", nil, 0, ""},
		{"DEL", "net1", errors.New("no"), 0, "Warning FailedDetach interface net1: no (CNI error code 999)"},
		{"DEL", "net1", nil, 0, `Normal Detached interface net1 of network "blue", after 1 failures`},
	} {
		now = now.Add(c.wait)
		var want []string
		if c.want != "" {
			want = []string{"Pod ns/p u: " + c.want}
		}
		if got := call(c.command, c.ifName, c.err); !slices.Equal(got, want) {
			t.Errorf("%d: %q, want %q", i, got, want)
		}
	}

	// However much fails, little is remembered, and a message has an end.
	long := cnitypes.NewError(attach.CodeHeld, strings.Repeat("ä", longestMessage), "")
	for i := range 3 * mostFailing {
		if got := call("ADD", fmt.Sprint("if", i), long); len(got) != 1 || len(got[0]) > longestMessage+60 {
			t.Fatalf("%q", got)
		}
	}
	if len(tell.failing) > mostFailing {
		t.Errorf("%d failures are remembered", len(tell.failing))
	}
	before := len(e.all)
	tell.called(wire.Request{Command: "ADD", Args: "IgnoreUnknown=1"}, held) // of no pod
	(&teller{now: time.Now}).called(wire.Request{Command: "ADD", Args: "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p"}, held)
	if len(e.all) != before {
		t.Errorf("%q", e.all[before:])
	}
}

// A pod is told of what becomes of its VF only while it has that.
func TestPodsHearOfTheirVFs(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "attachments"), 0o700); err != nil {
		t.Fatal(err)
	}
	for vf, phase := range map[string]attach.Phase{"0000:01:10.0": attach.Attached, "0000:01:10.1": attach.Intent} {
		r := attach.Record{
			Key: attach.Key{Network: "blue", ContainerID: "c" + vf, IfName: "net1"}, Device: vf, Phase: phase, Config: json.RawMessage("{}"),
			Args: "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_UID=u",
		}
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		name := sha256.Sum256([]byte(r.Network + "\x00" + r.ContainerID + "\x00" + r.IfName))
		if err := os.WriteFile(filepath.Join(dir, "attachments", hex.EncodeToString(name[:12])+".json"), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	e := &events{}
	s, err := New(Options{StateDir: dir, Kernel: noVFs{}, Baselines: noBaselines{}, Log: logr.Discard(), Events: e})
	if err != nil {
		t.Fatal(err)
	}
	for _, vf := range []string{"0000:01:10.0", "0000:01:10.1", "0000:01:10.2"} {
		s.Tell(vf, true, "ChangedByOthers", "trust is on")
	}
	s.Tell("0000:01:10.0", false, "AsAttached", "again")
	if want := []string{"Pod ns/p u: Warning ChangedByOthers trust is on", "Pod ns/p u: Normal AsAttached again"}; !slices.Equal(e.all, want) {
		t.Errorf("%q, want %q", e.all, want)
	}
}
