package deviceplugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/go-logr/logr"

	"github.com/sluice-network/sluice/deviceplugin/life"
	"github.com/sluice-network/sluice/internal/durable"
	"github.com/sluice-network/sluice/internal/holder"
)

const (
	// fresh is how old what the kubelet told may be. Younger allocations are known from
	// their promises, so only releases are seen late.
	fresh = time.Second
	// recheck is how often the kubelet is asked while it keeps devices for pods that
	// they are not attached to. It has no way to tell by itself that it let go.
	recheck = 2 * time.Second
	// askTimeout bounds one question to the kubelet.
	askTimeout = 2 * time.Second
	// lastRepeat is the longest time between two requests to write the checkpoint: the
	// kubelet syncs it to the disk.
	lastRepeat = 10 * time.Second
)

// unknownPod stands for the holder while the kubelet does not answer.
const unknownPod = "unknown (the kubelet's pod-resources API does not answer)"

// Ledger tells in whose hands each device is. It is the one place that knows: what the
// kubelet was promised is written down in it, and kept in a file; what it allocated, and what is
// attached, it asks of those who know (package life has the rules). Its methods may be called concurrently.
type Ledger struct {
	path     string
	attached life.Attachments
	kubelet  func(context.Context) (map[string]string, error)
	log      logr.Logger
	started  time.Time

	asking sync.Mutex // held while the kubelet is asked

	mu      sync.Mutex
	book    *life.Book
	dirty   bool              // the file is not what the book is
	asked   time.Time         // when the last answer, or failure, was asked for
	pods    map[string]string // the last answer, by device ID
	err     error             // why there was none
	answers int               // since the last failure

	// When to have the checkpoint written, for what only that tells of, and how long
	// the next wait is. Of Watch alone.
	due   time.Time
	delay time.Duration
}

// OpenLedger reads the ledger kept at path. attached asks the journal of attachments,
// kubelet for the pods, as namespace/name, of all devices that the kubelet has allocated.
func OpenLedger(path string, attached life.Attachments, kubelet func(context.Context) (map[string]string, error), log logr.Logger) (*Ledger, error) {
	l := &Ledger{path: path, attached: attached, kubelet: kubelet, log: log, started: time.Now(), book: life.New()}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("open allocation records: %w", err)
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open allocation records: %w", err)
	}
	book, err := life.Load(data, l.now())
	if err != nil {
		// Only a failing disk or a curious hand can do that. Most of it is learnt again.
		log.Error(err, "the allocation records were set aside", "file", path+".unreadable")
		if err := os.Rename(path, path+".unreadable"); err != nil {
			return nil, fmt.Errorf("open allocation records: %w", err)
		}
		return l, nil
	}
	l.book = book
	return l, nil
}

func (l *Ledger) now() life.Instant { return life.Instant(time.Since(l.started)) }

// give writes down that the kubelet is about to be promised the devices. Those whose
// promise is all it takes to use them (exclusive) are refused while they are still attached
// to a pod, which the kubelet forgot or deleted by force; for the others ADD waits.
func (l *Ledger) give(ids []string, resource string, exclusive, rdma bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, id := range ids {
		if pod, attached := l.attached(id); attached && exclusive {
			return fmt.Errorf("device %s is still attached to pod %q: delete that pod, and recreate this one", id, pod)
		}
	}
	for _, id := range ids {
		l.book.Give(id, resource, rdma, l.now())
	}
	l.dirty = true
	return l.save()
}

// save writes the file if it has to. mu is held.
func (l *Ledger) save() error {
	if !l.dirty {
		return nil
	}
	data, err := l.book.Save()
	if err == nil {
		err = durable.WriteFile(l.path, data)
	}
	if err != nil {
		return fmt.Errorf("write allocation records: %w", err)
	}
	l.dirty = false
	return nil
}

// ask asks the kubelet, unless somebody did since the time given, and tells whether
// what is known now is something else than before.
func (l *Ledger) ask(ctx context.Context, since time.Time) (changed bool, err error) {
	l.asking.Lock()
	defer l.asking.Unlock()
	l.mu.Lock()
	if l.asked.After(since) {
		defer l.mu.Unlock()
		return false, l.err
	}
	l.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	at, asked := time.Now(), l.now()
	pods, err := l.kubelet(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil && l.err == nil {
		l.log.Error(err, "cannot learn which devices the kubelet has allocated: they are left as they are until it answers")
	}
	changed = (err == nil) != (l.err == nil)
	l.asked, l.err = at, err
	if err != nil {
		l.answers = 0
		return changed, err
	}
	l.pods, l.answers = pods, l.answers+1
	changed = changed || l.answers == 2 // see Forgotten
	if l.book.Hear(pods, asked, l.attached) {
		changed, l.dirty = true, true
	}
	if err := l.save(); err != nil {
		l.log.Error(err, "what the kubelet told is not kept if the agent restarts now")
	}
	return changed, nil
}

// Allocated asks the kubelet now which pod, as namespace/name, it gave the device to; ok is
// false when to none. An error means that it is not known.
func (l *Ledger) Allocated(ctx context.Context, id string) (pod string, ok bool, err error) {
	if _, err := l.ask(ctx, time.Now()); err != nil {
		return "", false, fmt.Errorf("ask who has device %s: %w", id, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	pod, ok = l.pods[id]
	return pod, ok, nil
}

// lately has the kubelet asked if that was too long ago.
func (l *Ledger) lately() { _, _ = l.ask(context.Background(), time.Now().Add(-fresh)) }

// Holder tells which pod holds the device: the one it is attached to, or the one it is
// allocated to and will be attached to; empty when that is not known. It fails closed: a
// device of which nothing is known is held.
func (l *Ledger) Holder(id string) (pod string, held bool) {
	if pod, attached := l.attached(id); attached && pod != "" {
		return pod, true
	}
	l.lately()
	l.mu.Lock()
	defer l.mu.Unlock()
	h, inHand := l.book.Hand(id)
	_, attached := l.attached(id)
	switch {
	case inHand, attached:
		return h.Pod, true
	case l.err != nil:
		return unknownPod, true
	}
	return "", false
}

// Held gives the pods of all devices that are in a hand. With an error there may be more.
func (l *Ledger) Held() (map[string]string, error) {
	l.lately()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.book.Hands(), l.err
}

// GivenFrom is the resource, with prefix, that the device was given from to whoever has it;
// empty when nobody has, or that is not known.
func (l *Ledger) GivenFrom(id string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	h, _ := l.book.Hand(id)
	return h.Resource
}

// RDMA tells whether who has the device can use RDMA with it, whatever its pool is now.
func (l *Ledger) RDMA(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	h, _ := l.book.Hand(id)
	return h.RDMA
}

func (l *Ledger) inHand(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.book.Hand(id)
	return ok
}

// Gave tells whether somebody has a device that was given from the resource, which may be
// offered no more.
func (l *Ledger) Gave(resource string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.book.Gave(resource)
}

// Forgotten tells that a device is attached to the pod, and that the kubelet, which answers,
// does not know of it: it would give the device to another.
func (l *Ledger) Forgotten(id string) (pod string, forgotten bool) {
	pod, attached := l.attached(id)
	l.mu.Lock()
	defer l.mu.Unlock()
	h, inHand := l.book.Hand(id)
	return pod, attached && l.err == nil && (h.Forgotten() || !inHand && l.answers >= 2)
}

// Watch calls changed when devices went from one hand to another, until ctx ends. The
// kubelet is asked while it may let go of something, and when it did not answer. repeat makes
// it forget, in its checkpoint, pods that are gone.
func (l *Ledger) Watch(ctx context.Context, changed, repeat func()) {
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if !l.waiting() {
				continue
			}
			news, _ := l.ask(ctx, time.Now())
			if news {
				changed()
			}
			if l.doubt(news) {
				repeat()
			}
		}
	}
}

// doubt tells that the checkpoint should be written anew: there are devices of which only
// the checkpoint says that they are held, and their pods may be gone.
func (l *Ledger) doubt(changed bool) bool {
	if changed || l.delay == 0 {
		l.due, l.delay = time.Now(), recheck
	}
	if time.Now().Before(l.due) {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, pod := range l.pods {
		if _, unnamed := holder.UID(pod); unnamed {
			l.due, l.delay = time.Now().Add(l.delay), min(2*l.delay, lastRepeat)
			return true
		}
	}
	return false
}

// waiting tells whether the kubelet may tell something new: of a device that is in a hand
// and not attached, or of one that is forgotten.
func (l *Ledger) waiting() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil || l.answers < 2 {
		return true
	}
	for id := range l.book.Hands() {
		h, _ := l.book.Hand(id)
		if pod, attached := l.attached(id); !attached || h.Forgotten() || pod != "" && !h.Attached {
			return true
		}
	}
	return false
}

// record is what the ledger knows of one device.
type record struct {
	phase      life.Phase
	generation uint64
	pod        string
}

// record tells how far the device is, which is offered to the kubelet or is not.
func (l *Ledger) record(id string, offered bool) record {
	l.mu.Lock()
	defer l.mu.Unlock()
	pod, attached := l.attached(id)
	h, _ := l.book.Hand(id)
	if !attached || pod == "" {
		pod = h.Pod
	}
	return record{l.book.PhaseOf(id, offered, attached), h.Generation, pod}
}
