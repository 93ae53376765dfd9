package attach

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestLocksAreFairAndExclusive(t *testing.T) {
	var l Locks
	ctx := context.Background()
	unlock, err := l.Lock(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	other, err := l.Lock(ctx, "b")
	if err != nil {
		t.Fatal(err)
	}
	other()
	var order []int
	var all sync.WaitGroup
	for i := range 10 {
		all.Go(func() {
			u, err := l.Lock(ctx, "a")
			if err != nil {
				t.Error(err)
				return
			}
			order = append(order, i)
			u()
		})
		l.until(func() bool { return len(l.held["a"].waiting) == i+1 })
	}
	unlock()
	all.Wait()
	for i, n := range order {
		if i != n {
			t.Fatalf("order is %v", order)
		}
	}
	if len(l.held) != 0 {
		t.Errorf("%d locks are left", len(l.held))
	}
}

func (l *Locks) until(ok func() bool) {
	for {
		l.mu.Lock()
		done := ok()
		l.mu.Unlock()
		if done {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// TestLocksWithDeadlines has many that give up at the moment their turn comes.
func TestLocksWithDeadlines(t *testing.T) {
	var l Locks
	var inside, got, gaveUp atomic.Int32
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i%7)*300*time.Microsecond)
			defer cancel()
			u, err := l.Lock(ctx, "a")
			if err != nil {
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
				gaveUp.Add(1)
				return
			}
			if inside.Add(1) != 1 {
				t.Error("two at once")
			}
			time.Sleep(50 * time.Microsecond)
			inside.Add(-1)
			got.Add(1)
			u()
		})
	}
	all.Wait()
	if len(l.held) != 0 {
		t.Errorf("%d locks are left", len(l.held))
	}
	t.Logf("%d got the lock, %d gave up", got.Load(), gaveUp.Load())
}
