package main

import (
	"context"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"

	"github.com/sluice-network/sluice/deviceplugin/podresources"
)

const (
	// grace is how long an allocation of ours counts without the kubelet telling
	// of it: the kubelet records it when it has our answer.
	grace = 10 * time.Second
	// fresh is how old what the kubelet told may be. Younger allocations are
	// known from grace, so only releases are seen late.
	fresh = time.Second
	// recheck is how often the kubelet is asked while it keeps VFs for pods that
	// are not attached. It has no way to tell by itself that it let go.
	recheck = 2 * time.Second
	// askTimeout bounds one question to the kubelet.
	askTimeout = 2 * time.Second
	// lastRepeat is the longest time between two requests to write the checkpoint: the
	// kubelet syncs it to the disk.
	lastRepeat = time.Minute
)

// unknownPod stands for the holder while the kubelet does not answer.
const unknownPod = "unknown (the kubelet's pod-resources API does not answer)"

// usage tells who holds a VF: the pod it is attached to, or the pod it is
// allocated to and will be attached to. It implements node.Usage.
type usage struct {
	attached func(pciAddress string) (pod string, held bool)
	kubelet  func(context.Context) (map[string]string, error)
	// repeat makes the kubelet forget, in its checkpoint, pods that are gone.
	repeat func()
	log    logr.Logger

	mu    sync.Mutex
	asked time.Time            // when pods was told
	pods  map[string]string    // by PCI address
	err   error                // why pods is not known
	given map[string]time.Time // allocations of ours, by PCI address
	// When to repeat, for what only the checkpoint tells of, and how long that waits.
	due   time.Time
	delay time.Duration
}

func newUsage(attached func(string) (string, bool), kubelet func(context.Context) (map[string]string, error), repeat func(), log logr.Logger) *usage {
	return &usage{attached: attached, kubelet: kubelet, repeat: repeat, log: log, given: make(map[string]time.Time)}
}

// Holder fails closed: a VF of which nothing is known is held.
func (u *usage) Holder(pciAddress string) (string, bool) {
	pod, held := u.attached(pciAddress)
	if held && pod != "" {
		return pod, true
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if time.Since(u.asked) > fresh {
		u.ask()
	}
	pod, allocated := u.pods[pciAddress]
	switch {
	case held, allocated, time.Since(u.given[pciAddress]) < grace:
		return pod, true
	case u.err != nil:
		return unknownPod, true
	}
	return "", false
}

// Held gives what the kubelet has given away: what Holder tells of each device that is
// not attached.
func (u *usage) Held() (map[string]string, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if time.Since(u.asked) > fresh {
		u.ask()
	}
	held := map[string]string{}
	for id, at := range u.given {
		if time.Since(at) < grace {
			held[id] = ""
		}
	}
	maps.Copy(held, u.pods)
	return held, u.err
}

// ask asks the kubelet. mu is held.
func (u *usage) ask() {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	pods, err := u.kubelet(ctx)
	if err != nil && u.err == nil {
		u.log.Error(err, "cannot learn which VFs the kubelet has allocated: VFs are left as they are until it answers")
	}
	u.asked, u.pods, u.err = time.Now(), pods, err
}

// allocated takes down an allocation that the kubelet is about to be told.
func (u *usage) allocated(pciAddresses []string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, a := range pciAddresses {
		u.given[a] = time.Now()
	}
}

// watch calls changed when the kubelet let go of VFs, or took some, of pods that
// they are not attached to.
func (u *usage) watch(ctx context.Context, changed func()) {
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if u.recheck() {
				changed()
			}
		}
	}
}

// recheck asks the kubelet if it may have let go of something, and tells
// whether its answer is another than before.
func (u *usage) recheck() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	maps.DeleteFunc(u.given, func(_ string, at time.Time) bool { return time.Since(at) >= grace })
	waiting := u.err != nil || len(u.given) > 0
	for a := range u.pods {
		_, held := u.attached(a)
		waiting = waiting || !held
	}
	if !waiting {
		return false
	}
	before, failed := u.pods, u.err != nil
	u.ask()
	changed := failed != (u.err != nil) || !maps.Equal(before, u.pods)
	u.doubt(changed)
	return changed
}

// doubt asks for another checkpoint while there are devices that only the checkpoint
// says are held: their pods may be gone. mu is held.
func (u *usage) doubt(changed bool) {
	if changed || u.delay == 0 {
		u.due, u.delay = time.Now(), recheck
	}
	if time.Now().Before(u.due) {
		return
	}
	for _, pod := range u.pods {
		if strings.HasPrefix(pod, podresources.UnnamedPod) {
			u.repeat()
			u.due, u.delay = time.Now().Add(u.delay), min(2*u.delay, lastRepeat)
			return
		}
	}
}
