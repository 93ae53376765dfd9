package node

import (
	"context"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

const (
	// writeTimeout bounds one try to write the status.
	writeTimeout = 10 * time.Second
	// lastRewrite bounds how long after an outage the status is written.
	lastRewrite = 10 * time.Second
)

// told is what the worker has to tell; the object is nil when it is gone.
type told struct {
	object *v1.SriovNetworkNodeState
	status v1.SriovNetworkNodeStateStatus
}

// teller writes the newest status, until it is written, beside the worker: an API
// server that does not answer holds up no work.
type teller struct {
	states States
	log    logr.Logger
	newest chan told // holds one
}

// tell replaces what is not written yet. It is called by one goroutine.
func (t *teller) tell(news told) {
	select {
	case <-t.newest: // older
	default:
	}
	t.newest <- news
}

// run writes, and sends events for transitions, until ctx ends.
func (t *teller) run(ctx context.Context) {
	last := told{object: &v1.SriovNetworkNodeState{}}
	for {
		var news told
		select {
		case <-ctx.Done():
			return
		case news = <-t.newest:
		}
		for failures := 1; news.object != nil; failures++ {
			err := t.write(ctx, &news.status)
			if err == nil {
				if last.object.UID != news.object.UID {
					last = told{news.object, news.object.Status}
				}
				t.events(last.status.Conditions, news)
				last = news
				break
			}
			if ctx.Err() != nil {
				return
			}
			t.log.Error(err, "The status could not be written; it is tried again")
			for again := time.After(min(backoff(failures), lastRewrite)); again != nil; {
				select {
				case <-ctx.Done():
					return
				case news = <-t.newest:
				case <-again:
					again = nil
				}
			}
		}
	}
}

func (t *teller) write(ctx context.Context, s *v1.SriovNetworkNodeStateStatus) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	return t.states.ApplyStatus(ctx, s)
}

// events tells of transitions: to Ready, to Degraded, and of what is told besides the
// agent's own conditions, from what it should be and back.
func (t *teller) events(before []metav1.Condition, news told) {
	for _, is := range news.status.Conditions {
		was := meta.FindStatusCondition(before, is.Type)
		if was != nil && was.Status == is.Status && was.Reason == is.Reason {
			continue
		}
		good := is.Status == metav1.ConditionTrue
		warning := false
		switch is.Type {
		case v1.ConditionReady, v1.ConditionDegraded:
			if !good {
				continue
			}
			warning = is.Type == v1.ConditionDegraded
		case v1.ConditionProgressing, v1.ConditionRebootRequired:
			continue
		default:
			if good && (was == nil || was.Status != metav1.ConditionFalse) {
				continue
			}
			warning = !good
		}
		eventType := corev1.EventTypeNormal
		if warning {
			eventType = corev1.EventTypeWarning
		}
		t.states.Event(news.object, eventType, is.Reason, is.Message)
	}
}
