package nft

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// Tampering tells that somebody changed rules that are Sluice's.
type Tampering struct {
	Interface Interface
	// Process that did it, empty when the kernel did not tell.
	Process string
	// Err says why the rules could not be put right; nil when they were.
	Err error
}

// A repair is made at once. After one as many times longer is waited for the next, so
// that a pod that does nothing else does not keep the node busy.
const restAfterRepair = 9

// watch repairs the interfaces whose tables others change; keys are the interfaces that
// a table is of.
func (e *engine) watch(ctx context.Context, ns *host.Netns, report func(Tampering), keys func(table string) []string, put func(Interface, [2]*policy.Verdicts, uint64) error) error {
	c, err := open(ns, 1<<(unix.NFNLGRP_NFTABLES-1))
	if err != nil {
		return err
	}
	if err := unix.SetNonblock(c.fd, true); err != nil {
		return fmt.Errorf("watch rules: %w", err)
	}
	f := os.NewFile(uintptr(c.fd), "nf_tables")
	defer f.Close()
	defer context.AfterFunc(ctx, func() { f.Close() })()
	buffer := make([]byte, 65536)
	touched := map[string]bool{} // tables, by the transaction whose messages come
	for {
		n, err := f.Read(buffer)
		process, ended := "", false
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			// Messages were lost: any table may have been touched.
			ended = true
			e.mu.Lock()
			for _, s := range e.states {
				touched[s.table.name] = true
			}
			e.mu.Unlock()
		case err != nil:
			return fmt.Errorf("watch rules: %w", err)
		}
		messages, err := parse(buffer[:max(n, 0)])
		if err != nil {
			return fmt.Errorf("watch rules: %w", err)
		}
		for _, m := range messages {
			if len(m.data) < 4 || m.port == e.conn.port {
				continue
			}
			a := attributes(m.data[4:])
			if m.kind&0xff == unix.NFT_MSG_NEWGEN {
				process, ended = text(a[unix.NFTA_GEN_PROC_NAME]), true
			} else {
				touched[text(a[1])] = true
			}
		}
		if !ended {
			continue
		}
		start := time.Now()
		e.mu.Lock()
		var repaired []Tampering
		for _, table := range slices.Sorted(maps.Keys(touched)) {
			for _, key := range keys(table) {
				s := e.states[key]
				if s == nil {
					continue
				}
				s.stale = true
				repaired = append(repaired, Tampering{s.Interface, process, put(s.Interface, s.verdicts, s.generation)})
			}
		}
		e.mu.Unlock()
		clear(touched)
		if len(repaired) == 0 {
			continue
		}
		rest := restAfterRepair * time.Since(start)
		for _, r := range repaired {
			report(r)
		}
		select {
		case <-ctx.Done():
		case <-time.After(rest):
		}
	}
}
