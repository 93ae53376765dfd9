package attach

import (
	"context"
	"crypto/sha256"
	"errors"
	"sync"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

const (
	// statusFresh is how long an IPAM plugin's good answer counts. Container runtimes
	// ask every few seconds, and each answer is a process.
	statusFresh = 30 * time.Second
	// statusTimeout bounds one question to an IPAM plugin: a runtime that waits for
	// STATUS tells the kubelet nothing meanwhile.
	statusTimeout = 5 * time.Second
)

// Status tells whether ADD can work: the configuration is valid, the agent is ready,
// and the IPAM plugin is there and says so itself. It changes nothing, asks no API
// server, and runs no process more often than every statusFresh while all is well.
// Code 50 says that no ADD can work; pods that run keep their interfaces, so 51 is
// said only when the IPAM plugin says it.
func (a *Attacher) Status(ctx context.Context, req Request) error {
	req.Command = Status
	cfg, err := Parse(req)
	if err != nil {
		return err
	}
	if a.Ready != nil {
		if err := a.Ready(); err != nil {
			return fail(types.ErrPluginNotAvailable, "network %q: the Sluice agent is not ready: %w", cfg.Network, err)
		}
	}
	if cfg.IPAM == "" {
		return nil
	}
	if err := a.IPAM.Find(cfg.IPAM, req); err != nil {
		return fail(types.ErrPluginNotAvailable, "network %q: ipam.type %q: %w", cfg.Network, cfg.IPAM, err)
	}
	key := sha256.Sum256(append([]byte(req.Path+"\x00"), req.Stdin...))
	if a.wasGood(key) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	_, err = a.IPAM.Exec(ctx, cfg.IPAM, req)
	var coded *codedError
	if errors.As(err, &coded) && coded.code == CodeIPAM {
		return fail(types.ErrPluginNotAvailable, "network %q: %w", cfg.Network, err)
	}
	if err == nil {
		a.good(key)
	}
	return err
}

// answers are the good answers of IPAM plugins, by the question.
type answers struct {
	mu   sync.Mutex
	good map[[sha256.Size]byte]time.Time
}

func (a *Attacher) wasGood(key [sha256.Size]byte) bool {
	a.answers.mu.Lock()
	defer a.answers.mu.Unlock()
	at, ok := a.answers.good[key]
	return ok && time.Since(at) < statusFresh
}

func (a *Attacher) good(key [sha256.Size]byte) {
	a.answers.mu.Lock()
	defer a.answers.mu.Unlock()
	for k, at := range a.answers.good {
		if time.Since(at) >= statusFresh {
			delete(a.answers.good, k)
		}
	}
	if a.answers.good == nil {
		a.answers.good = map[[sha256.Size]byte]time.Time{}
	}
	a.answers.good[key] = time.Now()
}
