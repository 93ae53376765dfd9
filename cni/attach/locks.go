package attach

import (
	"context"
	"sync"
)

// Locks are locks by name, given in the order in which they were asked for. The
// zero value is ready.
type Locks struct {
	mu   sync.Mutex
	held map[string]*queue
}

// queue is one lock: the waiting channels, the first of which is next.
type queue struct{ waiting []chan struct{} }

// Lock waits for the named lock and returns its release.
func (l *Locks) Lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	if l.held == nil {
		l.held = map[string]*queue{}
	}
	q, busy := l.held[name]
	if !busy {
		l.held[name] = &queue{}
		l.mu.Unlock()
		return func() { l.unlock(name) }, nil
	}
	turn := make(chan struct{})
	q.waiting = append(q.waiting, turn)
	l.mu.Unlock()
	select {
	case <-turn:
		return func() { l.unlock(name) }, nil
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, w := range q.waiting {
		if w == turn {
			q.waiting = append(q.waiting[:i], q.waiting[i+1:]...)
			return nil, ctx.Err()
		}
	}
	// The turn came in the same moment: pass it on.
	l.next(name)
	return nil, ctx.Err()
}

func (l *Locks) unlock(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.next(name)
}

func (l *Locks) next(name string) {
	q := l.held[name]
	if len(q.waiting) == 0 {
		delete(l.held, name)
		return
	}
	close(q.waiting[0])
	q.waiting = q.waiting[1:]
}
