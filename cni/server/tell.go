package server

import (
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/wire"
)

const (
	// tellAgain is how long a failure that stays the same is not told again: a runtime
	// tries every few seconds.
	tellAgain = 10 * time.Minute
	// mostFailing bounds the failures that are remembered; a node has fewer pods.
	mostFailing = 1024
	// longestMessage is what the API server takes, in bytes.
	longestMessage = 1024
)

// teller tells pods, by events, what becomes of their interfaces: transitions only. A nil
// recorder tells nobody.
type teller struct {
	events record.EventRecorder
	now    func() time.Time

	mu      sync.Mutex
	failing map[failing]failure
}

// failing is what fails. The container is another at each try.
type failing struct {
	pod                      corev1.ObjectReference
	command, network, ifName string
}

type failure struct {
	code  uint
	told  time.Time
	times int
}

// reasons of the events: of a call that failed, and of one that did not any more.
var reasons = map[attach.Command][2]string{
	attach.Add: {"FailedAttach", "Attached"},
	attach.Del: {"FailedDetach", "Detached"},
}

// called tells of a call's failure when it is another than before, and of its success when
// it failed before.
func (t *teller) called(req wire.Request, err error) {
	reason, wanted := reasons[attach.Command(req.Command)]
	pod, ok := podOf(req.Args)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.events == nil || !wanted || !ok || err == nil && len(t.failing) == 0 {
		return
	}
	network := headOf(req).Name
	key := failing{pod, req.Command, network, req.IfName}
	before, failed := t.failing[key]
	now := t.now()
	switch {
	case err == nil && failed:
		delete(t.failing, key)
		t.tell(pod, false, reason[1], fmt.Sprintf("interface %s of network %q, after %d failures", req.IfName, network, before.times))
	case err == nil:
	default:
		is := failure{attach.CNIError(err).Code, before.told, before.times + 1}
		if !failed || is.code != before.code || now.Sub(before.told) >= tellAgain {
			is.told = now
			t.tell(pod, true, reason[0], fmt.Sprintf("interface %s: %v (CNI error code %d)", req.IfName, err, is.code))
		}
		if len(t.failing) >= mostFailing {
			for key, f := range t.failing { // most of pods that are gone
				if now.Sub(f.told) >= tellAgain || len(t.failing) >= mostFailing {
					delete(t.failing, key)
				}
			}
		}
		t.failing[key] = is
	}
}

func (t *teller) tell(pod corev1.ObjectReference, warning bool, reason, message string) {
	kind := corev1.EventTypeNormal
	if warning {
		kind = corev1.EventTypeWarning
	}
	if len(message) > longestMessage {
		message = strings.ToValidUTF8(message[:longestMessage-3], "") + "..."
	}
	t.events.Event(&pod, kind, reason, message)
}

// podOf is the pod of a call as events name it, not ok when the call is not for one.
func podOf(args string) (pod corev1.ObjectReference, ok bool) {
	namespace, name, uid := attach.PodOf(args)
	return corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: namespace, Name: name, UID: types.UID(uid)}, namespace != "" && name != ""
}

// Tell tells the pod that a VF is attached to what becomes of that, if it is attached.
func (s *Server) Tell(pciAddress string, warning bool, reason, message string) {
	if args, ok := s.attacher.AttachedArgs(pciAddress); ok && s.teller.events != nil {
		if pod, ok := podOf(args); ok {
			s.teller.tell(pod, warning, reason, message)
		}
	}
}
