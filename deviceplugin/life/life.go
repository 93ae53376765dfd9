package life

import (
	"encoding/json"
	"fmt"

	"github.com/sluice-network/sluice/internal/holder"
)

// Phase is how far a device is on its way; see the package's documentation.
type Phase string

// The phases.
const (
	Configured Phase = "Configured"
	Advertised Phase = "Advertised"
	Allocated  Phase = "Allocated"
	Attached   Phase = "Attached"
	Returned   Phase = "Returned"
)

// Instant is a time in nanoseconds of a clock that does not jump.
type Instant int64

const (
	// Grace is how long an allocation counts without the kubelet telling of it: it
	// takes the allocation down when it has our answer.
	Grace Instant = 10e9
	// Apart is the least time between the two answers without which no hand ends. A
	// kubelet that has just started learns of its pods one after the other.
	Apart Instant = 1e9
)

// Hand is one pod's, or soon one pod's, having a device.
type Hand struct {
	Generation uint64 `json:"generation"`         // greater than those of all hands before
	Pod        string `json:"pod,omitempty"`      // namespace/name; empty until the kubelet told
	Resource   string `json:"resource,omitempty"` // it was given from; empty when only the kubelet knows
	RDMA       bool   `json:"rdma,omitempty"`     // given with its RDMA device
	Attached   bool   `json:"attached,omitempty"` // the device has been an interface of Pod

	given   Instant // when the kubelet was promised it, or first told of it
	told    bool    // the kubelet has told of it since
	missed  Instant // when the first answer without it was asked for
	missing bool    // there was one since the last answer with it
	gone    bool    // there were two, Apart
}

// another tells that the kubelet now tells of another pod than before: one without name may be
// any, and a promise to another would have gone through Give.
func another(before, now string) bool {
	return before != "" && before != now && !unnamed(before) && !unnamed(now)
}

func unnamed(pod string) bool {
	_, is := holder.UID(pod)
	return is
}

// Attachments tells which pod a device is attached to; the pod is empty when that is
// attached and nobody knows whose it is.
type Attachments func(id string) (pod string, attached bool)

// Book has the hands of a node's devices. Its zero value is not of use; see New.
type Book struct {
	generation uint64
	hands      map[string]Hand
}

// New returns a book in which nobody has anything.
func New() *Book { return &Book{hands: map[string]Hand{}} }

// saved is a Book as it is written down.
type saved struct {
	Generation uint64          `json:"generation"` // of the newest hand
	Hands      map[string]Hand `json:"hands"`      // by device ID
}

// Save encodes what must survive a restart.
func (b *Book) Save() ([]byte, error) {
	return json.MarshalIndent(saved{b.generation, b.hands}, "", "  ")
}

// Load decodes a book that was saved. All its hands count as given now: clocks of two
// boots cannot be compared.
func Load(data []byte, now Instant) (*Book, error) {
	s := saved{}
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("read allocation records: %w", err)
	}
	b := New()
	b.generation = s.Generation
	for id, h := range s.Hands {
		h.given = now
		b.hands[id] = h
		b.generation = max(b.generation, h.Generation)
	}
	return b, nil
}

// Give takes down that the kubelet is promised the device of a resource, if so with its RDMA
// device. Whose it will be is learnt
// from the kubelet, which also gives a pod's init container what it gives another later.
func (b *Book) Give(id, resource string, rdma bool, now Instant) {
	b.pass(id, Hand{Resource: resource, RDMA: rdma, given: now})
}

func (b *Book) pass(id string, h Hand) {
	b.generation++
	h.Generation = b.generation
	b.hands[id] = h
}

// Hear takes down an answer of the kubelet, asked for at the time given: the pods of all
// devices that it has allocated. It tells whether something changed that others may act upon.
func (b *Book) Hear(allocated map[string]string, asked Instant, attached Attachments) (changed bool) {
	for id, pod := range allocated {
		h, known := b.hands[id]
		switch {
		case known && h.given >= asked:
			continue // older than the promise
		case !known, another(h.Pod, pod):
			b.pass(id, Hand{Pod: pod, Resource: h.Resource, RDMA: h.RDMA, given: asked, told: true})
			changed = true
		default:
			if h.Pod == "" || unnamed(h.Pod) && h.Pod != pod {
				h.Pod, changed = pod, true
			}
			changed = changed || h.gone
			h.told, h.missing, h.gone = true, false, false
			b.hands[id] = h
		}
	}
	for id, h := range b.hands {
		pod, isAttached := attached(id)
		if isAttached && h.Pod != "" && pod == h.Pod && !h.Attached {
			h.Attached, changed = true, true
		}
		if _, told := allocated[id]; !told && (h.told || asked-h.given >= Grace) {
			switch {
			case !h.missing:
				h.missing, h.missed = true, asked
			case !h.gone && asked-h.missed >= Apart:
				h.gone, changed = true, true
			}
		}
		if h.gone && !isAttached {
			delete(b.hands, id)
			changed = true
			continue
		}
		b.hands[id] = h
	}
	return changed
}

// Hand returns the hand that the device is in.
func (b *Book) Hand(id string) (Hand, bool) {
	h, ok := b.hands[id]
	return h, ok
}

// Gave tells whether there is a hand of the resource.
func (b *Book) Gave(resource string) bool {
	for _, h := range b.hands {
		if h.Resource == resource {
			return true
		}
	}
	return false
}

// Hands returns the pods of all hands, by device ID.
func (b *Book) Hands() map[string]string {
	pods := make(map[string]string, len(b.hands))
	for id, h := range b.hands {
		pods[id] = h.Pod
	}
	return pods
}

// Forgotten tells that the kubelet does not know any more of the hand, whose device is still
// attached: it would give the device to another pod.
func (h Hand) Forgotten() bool { return h.gone }

// PhaseOf tells the phase of a device that is offered to the kubelet, or is not.
func (b *Book) PhaseOf(id string, offered, attached bool) Phase {
	h, inHand := b.hands[id]
	switch {
	case attached:
		return Attached
	case inHand && h.Attached:
		return Returned
	case inHand:
		return Allocated
	case offered:
		return Advertised
	}
	return Configured
}
