package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/durable"
	"github.com/sluice-network/sluice/internal/host"
)

const (
	// audit is how often everything is looked at that events should have told of.
	audit = time.Minute
	// settled is how long a reason not to be ready must last before STATUS tells it: a
	// runtime takes the whole node for not ready then.
	settled = time.Minute
)

// keep does what no call asks for, until ctx ends: DELs that the shim left in its
// queue, and the end of attachments whose pod is gone, which Multus forwards no GC
// for. It acts on events, and looks at everything once in a while besides.
func (s *Server) keep(ctx context.Context) {
	var queued <-chan fsnotify.Event
	if w, err := s.watchQueue(); err != nil {
		s.log.Error(err, "Queued DELs are done at the next look only", "every", audit)
	} else {
		defer func() { _ = w.Close() }()
		queued = w.Events
	}
	changes := s.watchLinks(ctx)
	look := time.NewTicker(audit)
	defer look.Stop()
	s.drain(ctx) // what came between the start's look and the watch
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			s.tidy(ctx)
			if changes == nil {
				changes = s.watchLinks(ctx)
			}
		case e := <-queued:
			if e.Has(fsnotify.Create) && filepath.Ext(e.Name) == wire.QueueSuffix {
				s.drain(ctx)
			}
		case c, ok := <-changes:
			if !ok {
				changes = nil // until the next look
				break
			}
			if c.All || slices.ContainsFunc(c.Devices, s.attacher.Orphan) {
				s.collect(ctx)
			}
		}
	}
}

// beat tells the shim that this agent lives, until ctx ends.
func (s *Server) beat(ctx context.Context) {
	t := time.NewTicker(wire.Heartbeat)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			if err := os.Chtimes(s.socket, now, now); err != nil {
				s.log.Error(err, "Cannot tell the shim that this agent lives")
			}
		}
	}
}

func (s *Server) watchQueue() (*fsnotify.Watcher, error) {
	if err := os.MkdirAll(s.queue, 0o700); err != nil {
		return nil, fmt.Errorf("watch the queue of DELs: %w", err)
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch the queue of DELs: %w", err)
	}
	if err := w.Add(s.queue); err != nil {
		return nil, errors.Join(fmt.Errorf("watch the queue of DELs: %w", err), w.Close())
	}
	return w, nil
}

func (s *Server) watchLinks(ctx context.Context) <-chan host.Changes {
	if s.changes == nil {
		return nil
	}
	changes, err := s.changes(ctx)
	if err != nil {
		s.log.Error(err, "VFs whose pod died are put right at the next look only", "every", audit)
	}
	return changes
}

// tidy does all that keep does.
func (s *Server) tidy(ctx context.Context) {
	s.drain(ctx)
	s.collect(ctx)
}

// collect ends attachments whose pod is gone, and those an earlier agent left half
// made or half undone.
func (s *Server) collect(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, wire.ServeTimeout)
	defer cancel()
	if s.networks != nil {
		if err := s.networks.Collect(ctx); err != nil {
			s.log.Error(err, "Cannot end the networks of all pods that are gone")
		}
	}
	if err := s.attacher.Recover(ctx); err != nil {
		s.log.Error(err, "Cannot end all attachments whose pods are gone")
	}
}

// drain works off the DELs that the shim could not hand over. One that fails
// stays: its attachment is in the journal as well, or the runtime tries again.
func (s *Server) drain(ctx context.Context) {
	files, _ := filepath.Glob(filepath.Join(s.queue, "*"+wire.QueueSuffix))
	for _, file := range files {
		one, cancel := context.WithTimeout(ctx, wire.ServeTimeout)
		if err := s.workOff(one, file); err != nil {
			s.log.Error(err, "Cannot work off a queued DEL", "file", file)
		}
		cancel()
	}
}

// workOff does one queued DEL, if it is there. It is done once: a second time might
// end what an ADD has made since.
func (s *Server) workOff(ctx context.Context, file string) error {
	if _, err := os.Stat(file); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	s.working.Lock()
	defer s.working.Unlock()
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var req wire.Request
	if err == nil {
		err = wire.Decode(bytes.NewReader(b), &req)
	}
	if err == nil {
		_, err = s.do(ctx, req, nil)
	}
	if err != nil {
		return fmt.Errorf("do the DEL queued in %s: %w", file, err)
	}
	return durable.Remove(file)
}

// lasting tells a reason once it has lasted for a while, so that a kubelet that
// restarts, or a slow start, is not told as a node without a network.
func lasting(ready func() error, now func() time.Time) func() error {
	if ready == nil {
		return nil
	}
	var mu sync.Mutex
	var since time.Time
	return func() error {
		err := ready()
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err == nil:
			since = time.Time{}
			return nil
		case since.IsZero():
			since = now()
		}
		if now().Sub(since) < settled {
			return nil
		}
		return err
	}
}
