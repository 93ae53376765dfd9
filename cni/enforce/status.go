package enforce

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/enforce/nft"
	"github.com/sluice-network/sluice/cni/policy"
)

// Annotation of a pod tells, as JSON, a PodStatus. A pod that no policy isolates on any of
// its interfaces has none.
const Annotation = "sluice.dev/enforcement"

// PodStatus is what is in force on a pod's interfaces, by their names.
type PodStatus map[string]InterfaceStatus

// ReadStatus reads a pod's annotations. What no agent wrote tells nothing.
func ReadStatus(annotations map[string]string) PodStatus {
	var s PodStatus
	if json.Unmarshal([]byte(annotations[Annotation]), &s) != nil {
		return nil
	}
	return s
}

// InterfaceStatus is what is in force on an interface.
type InterfaceStatus struct {
	Network    string           `json:"network"`              // NetworkAttachmentDefinition, namespace/name
	Generation uint64           `json:"generation,omitempty"` // of the rules: how many there have been, since the agent started
	Ingress    *DirectionStatus `json:"ingress,omitempty"`    // nil when no policy isolates it
	Egress     *DirectionStatus `json:"egress,omitempty"`     // of an interface that no policy isolates, that it is held to its addresses
}

// DirectionStatus is what is in force in one direction.
type DirectionStatus struct {
	Engine   string   `json:"engine"`             // who filters
	Policies []string `json:"policies,omitempty"` // that isolate the pod
	Problem  string   `json:"problem,omitempty"`  // what is not as it should be
	Notes    []string `json:"notes,omitempty"`    // why it is stricter than was meant, or what holds without a policy
	held     bool     // there are rules without a policy
}

// The engines.
const (
	EngineNone = "none"
	EnginePod  = "nft-pod"  // nftables in the pod's namespace
	EngineHost = "nft-host" // nftables on the host, at the parent
	EngineLink = "vf-link"  // nobody can filter it: the VF has no link
)

func engineOf(i attach.Interface) string {
	if i.Parent != "" {
		return EngineHost
	}
	return EnginePod
}

// direction is what is to be said of a state, nil for nothing.
func direction(s *policy.State) *DirectionStatus {
	switch {
	case s == nil:
		return nil
	case s.OptedOut:
		return &DirectionStatus{Engine: EngineNone, Notes: []string{"the network is annotated " + policy.NetworkPolicyAnnotation + "=none"}}
	case s.Held:
		return &DirectionStatus{held: true, Notes: []string{"sends from its own addresses only, because its network has policies"}}
	case !s.Verdicts.Isolated:
		return nil
	}
	return &DirectionStatus{Policies: s.Verdicts.Policies, Notes: s.Faults}
}

// each calls f for the directions that rules are for.
func (s *InterfaceStatus) each(f func(*DirectionStatus)) {
	for _, d := range []*DirectionStatus{s.Ingress, s.Egress} {
		if d != nil && (len(d.Policies) > 0 || d.held) {
			f(d)
		}
	}
}

// problems are what is not as it should be.
func (s *InterfaceStatus) problems() (all []string) {
	s.each(func(d *DirectionStatus) { all = append(all, d.Problem) })
	all = slices.DeleteFunc(all, func(p string) bool { return p == "" })
	slices.Sort(all)
	return slices.Compact(all)
}

// policies are those that isolate the interface.
func (s *InterfaceStatus) policies() (all []string) {
	s.each(func(d *DirectionStatus) { all = append(all, d.Policies...) })
	slices.Sort(all)
	return slices.Compact(all)
}

// isolated says that there are rules for a policy. What is there else keeps nobody out.
func (s *InterfaceStatus) isolated() bool {
	isolated := false
	s.each(func(d *DirectionStatus) {
		isolated = isolated || len(d.Policies) > 0 && d.Engine != "" && d.Engine != EngineNone
	})
	return isolated
}

// notes are why it is stricter than was meant.
func (s *InterfaceStatus) notes() (all []string) {
	s.each(func(d *DirectionStatus) {
		if len(d.Policies) > 0 {
			all = append(all, d.Notes...)
		}
	})
	slices.Sort(all)
	return slices.Compact(all)
}

func (s InterfaceStatus) equal(o InterfaceStatus) bool {
	same := func(a, b *DirectionStatus) bool {
		return a == b || a != nil && b != nil && a.Engine == b.Engine && a.Problem == b.Problem && slices.Equal(a.Notes, b.Notes) && slices.Equal(a.Policies, b.Policies)
	}
	return s.Network == o.Network && s.Generation == o.Generation && same(s.Ingress, o.Ingress) && same(s.Egress, o.Egress)
}

// show writes a pod's annotation, when it has another.
func (e *Enforcer) show(ctx context.Context, pod string) error {
	e.mu.Lock()
	p := e.own[pod]
	status, waits := PodStatus{}, false
	for _, f := range e.of[pod] {
		waits = waits || f.ready && !f.told
		if f.ready && p != nil && f.id.UID == p.UID && (f.status.Ingress != nil || f.status.Egress != nil) {
			status[f.IfName] = f.status
		}
	}
	e.mu.Unlock()
	if p == nil || waits {
		return nil // gone, or told of later; what an earlier agent said still holds
	}
	value := ""
	if len(status) > 0 {
		raw, err := json.Marshal(status)
		if err != nil {
			return err
		}
		value = string(raw)
	}
	if value == p.Annotations[Annotation] {
		return nil
	}
	err := e.API.Annotate(ctx, p.Namespace, p.Name, p.UID, value)
	if err != nil {
		e.Log.Error(err, "Cannot tell what policy is in force", "pod", pod)
	}
	return err
}

// tell makes events of what people must know.
func (e *Enforcer) tell(id policy.ID, before, now InterfaceStatus) {
	if e.API == nil {
		return
	}
	pod := reference(id)
	switch was, is := before.problems(), now.problems(); {
	case slices.Equal(was, is):
	case len(is) > 0:
		e.API.Event(pod, true, "PolicyNotEnforced", fmt.Sprintf("interface %s: %s", id.Interface, strings.Join(is, "; ")))
	default:
		e.API.Event(pod, false, "PolicyEnforced", fmt.Sprintf("interface %s: policy is in force again", id.Interface))
	}
	e.tellFaults(pod, id.Interface, before, now)
}

// tampered tells that somebody changed an interface's rules, which have been put right, or
// could not be.
func (e *Enforcer) tampered(i attach.Interface, t nft.Tampering) {
	message := fmt.Sprintf("interface %s: %s changed the rules of network policy, and they were put right", i.IfName, cmp.Or(t.Process, "somebody"))
	if t.Err != nil {
		message = fmt.Sprintf("interface %s: %s changed the rules of network policy, and they cannot be put right: %v", i.IfName, cmp.Or(t.Process, "somebody"), t.Err)
	}
	e.Log.Info("Rules were tampered with", "pod", i.Pod, "what", message)
	e.metrics.tampered.Inc()
	e.mu.Lock()
	f := e.faces[i.Key]
	if f == nil || !f.ready {
		e.mu.Unlock()
		return
	}
	id := f.id
	e.mu.Unlock()
	if t.Err != nil {
		go e.anew(f) // whoever reports holds the engine
	}
	if e.API != nil {
		e.API.Event(reference(id), true, "PolicyTampered", message)
	}
}

// anew has all rules of an interface made again.
func (e *Enforcer) anew(f *face) {
	f.work.Lock()
	f.applied = [2]*policy.State{}
	f.work.Unlock()
	e.queue.Add(f.Key)
}

// reference is the pod of an interface, for an event.
func reference(id policy.ID) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: id.Namespace, Name: id.Pod, UID: types.UID(id.UID)}
}

// faulty is a policy that is not valid.
type faulty struct {
	object corev1.ObjectReference
	faults []string
}

// tellFaults makes events about policies that are not valid, and about a pod that they
// close.
func (e *Enforcer) tellFaults(pod corev1.ObjectReference, ifName string, before, now InterfaceStatus) {
	was, is := before.notes(), now.notes()
	if len(is) == 0 || slices.Equal(was, is) {
		return
	}
	e.API.Event(pod, true, "PolicyNotValid", fmt.Sprintf("interface %s is closed more than was meant: %s", ifName, strings.Join(is, "; ")))
	e.mu.Lock()
	defer e.mu.Unlock()
	told := map[string]bool{}
	now.each(func(d *DirectionStatus) {
		for _, name := range d.Policies {
			if p, not := e.faulty[name]; not && !told[name] {
				told[name] = true
				e.API.Event(p.object, true, "PolicyNotValid", strings.Join(p.faults, "; "))
			}
		}
	})
}
