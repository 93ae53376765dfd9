package enforce

import (
	"fmt"
	"slices"
)

// audit has what policy says on one network, the next each time, worked out from nothing
// beside the index. It must find nothing. If it does, the index is made anew.
func (e *Enforcer) audit() {
	e.mu.Lock()
	e.take()
	networks := e.index.Networks()
	if !e.synced || len(networks) == 0 {
		e.mu.Unlock()
		return
	}
	i, _ := slices.BinarySearch(networks, e.next)
	network := networks[i%len(networks)]
	e.next = network + "\x00" // those after it
	snapshot := e.index.Snapshot(network)
	e.mu.Unlock()
	wrong := snapshot.Audit()
	if len(wrong) == 0 {
		return
	}
	e.metrics.differences.Add(float64(len(wrong)))
	for _, c := range wrong {
		e.Log.Error(fmt.Errorf("the %s of pod %s/%s on network %s was not what its policies say", c.Direction, c.ID.Namespace, c.ID.Pod, c.ID.Network),
			"Network policy was worked out wrongly; this is a fault of Sluice, please report it. All of it is worked out anew")
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.index = e.index.Snapshot("").Anew()
	e.take()
}
