package enforce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/enforce/cluster"
	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/netselect"
)

// Definition implements attach.Enforcer.
func (e *Enforcer) Definition(ctx context.Context, pod, uid, ifName string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if !e.await(ctx, wait) {
		return "", attach.WithCode(types.ErrTryAgainLater, fmt.Errorf("which network policies hold for pod %s is not known, because %w", pod, e.Cluster.Missing()))
	}
	p, err := e.pod(ctx, pod, uid)
	if err != nil {
		return "", err
	}
	definition, err := definition(p, ifName)
	if err != nil {
		return "", attach.WithCode(attach.CodePolicy, fmt.Errorf("pod %s: which network %s is on, and so which policies hold, cannot be read: %w", pod, ifName, err))
	}
	return definition, nil
}

// definition is the network that makes the pod's interface.
func definition(p *cluster.Pod, ifName string) (string, error) {
	definition, err := netselect.Network(p.Annotations[nadv1.NetworkAttachmentAnnot], p.Namespace, ifName)
	if err != nil || definition != "" {
		return definition, err
	}
	// Multus makes the pod's first interface by another network then.
	if first := p.Annotations[cluster.DefaultNetworkAnnotation]; first != "" && ifName == "eth0" {
		return netselect.Network(first, p.Namespace, "net1")
	}
	return "", nil
}

func (e *Enforcer) pod(ctx context.Context, pod, uid string) (*cluster.Pod, error) {
	namespace, name, _ := strings.Cut(pod, "/")
	p, err := e.Cluster.Pod(ctx, namespace, name, uid, wait)
	if err != nil {
		return nil, attach.WithCode(types.ErrTryAgainLater, err)
	}
	return p, nil
}

// Deny implements attach.Enforcer.
func (e *Enforcer) Deny(ctx context.Context, i attach.Interface, ns *host.Netns) error {
	if i.Definition == "" {
		return nil
	}
	p, err := e.pod(ctx, i.Pod, i.PodUID)
	if err != nil {
		return err
	}
	e.mu.Lock()
	f := e.add(i)
	f.id.UID = p.UID
	e.setPod(p)
	e.take()
	states := e.stateOf(f)
	e.mu.Unlock()
	if !isolated(states) {
		return nil
	}
	if i.Bypass != "" {
		err := fmt.Errorf("%s on network %s by %s, and this cannot be enforced on %s, because %s: take the pod out of the policy, or annotate the network %s=none",
			isolates(states), i.Definition, strings.Join(policies(states), ", "), i.IfName, i.Bypass, policy.NetworkPolicyAnnotation)
		e.refuse(i.Pod, err.Error())
		return attach.WithCode(attach.CodePolicy, err)
	}
	f.work.Lock()
	defer f.work.Unlock()
	f.rules = true
	return e.Engine.DenyAll(i, ns)
}

// Enforce implements attach.Enforcer.
func (e *Enforcer) Enforce(ctx context.Context, i attach.Interface, ns *host.Netns) error {
	if i.Definition == "" {
		return nil
	}
	e.mu.Lock()
	f := e.faces[i.Key]
	if f == nil {
		e.mu.Unlock()
		return fmt.Errorf("enforce policy on %s: it has not been denied before", i.IfName)
	}
	f.Interface, f.ready = i, true
	if p := e.own[i.Pod]; p != nil {
		e.setPod(p)
	}
	e.take()
	e.mu.Unlock()
	err := e.apply(f, ns)
	if err == nil {
		e.admit(i.Pod)
	}
	return err
}

// Leave implements attach.Enforcer.
func (e *Enforcer) Leave(i attach.Interface) {
	e.mu.Lock()
	f := e.faces[i.Key]
	if f != nil && f.Generation == i.Generation {
		f.ready = false
	}
	e.mu.Unlock()
	if f != nil {
		f.work.Lock()
		defer f.work.Unlock()
		if f.rules && !f.loaded {
			e.count(f, i)
		}
	}
	e.Engine.Close(i)
}

// Remove implements attach.Enforcer.
func (e *Enforcer) Remove(ctx context.Context, i attach.Interface, ns *host.Netns) error {
	e.mu.Lock()
	f := e.faces[i.Key]
	known := f != nil && f.Generation == i.Generation
	if !known && i.Definition == "" { // no policy was asked for
		e.mu.Unlock()
		return nil
	}
	for _, o := range e.faces {
		if o.Key != i.Key && o.Parent == i.Parent && bytes.Equal(o.MAC, i.MAC) {
			i.Parent = "" // a pod that came again has the rules there by now
		}
	}
	e.mu.Unlock()
	if !known {
		return e.Engine.Remove(i, ns) // whatever an earlier agent has left
	}
	f.work.Lock()
	defer f.work.Unlock()
	if f.rules {
		if err := e.Engine.Remove(i, ns); err != nil {
			return err
		}
		f.rules = false
	}
	e.mu.Lock()
	problems := f.status.problems()
	e.drop(f)
	if p := e.own[i.Pod]; p != nil {
		e.setPod(p)
	}
	e.take()
	e.mu.Unlock()
	e.queue.Forget(i.Key)
	e.pods.Add(i.Pod)
	if len(problems) > 0 {
		e.changed()
	}
	return nil
}

// Cut implements attach.Enforcer.
func (e *Enforcer) Cut(i attach.Interface) bool {
	e.mu.Lock()
	f := e.faces[i.Key]
	untold := f != nil && !f.told
	e.mu.Unlock()
	if f == nil {
		return false
	}
	f.work.Lock()
	defer f.work.Unlock()
	return f.cut || f.loaded && untold && i.Bypass != "" // an earlier agent may have
}

// Differences implements attach.Enforcer.
func (e *Enforcer) Differences(ctx context.Context, i attach.Interface, ns *host.Netns) ([]error, error) {
	e.mu.Lock()
	f := e.faces[i.Key]
	e.mu.Unlock()
	if f == nil {
		return nil, nil
	}
	f.work.Lock()
	defer f.work.Unlock()
	e.mu.Lock()
	status := f.status
	e.mu.Unlock()
	var wrong []error
	for name, d := range map[string]*DirectionStatus{"ingress": status.Ingress, "egress": status.Egress} {
		if d != nil && d.Problem != "" {
			wrong = append(wrong, fmt.Errorf("policy of %s: %s", name, d.Problem))
		}
	}
	if !f.rules {
		return wrong, nil
	}
	switch generation, held, err := e.Engine.Generation(i, ns); {
	case err != nil:
		return nil, err
	case !held:
		wrong = append(wrong, errors.New("the rules of policy are gone"))
	case generation != status.Generation && !f.loaded:
		wrong = append(wrong, fmt.Errorf("generation %d of policy is in force, not %d", generation, status.Generation))
	}
	return wrong, nil
}

// add makes the face of an interface. mu is held.
func (e *Enforcer) add(i attach.Interface) *face {
	if old := e.faces[i.Key]; old != nil {
		e.drop(old)
	}
	namespace, name, _ := strings.Cut(i.Pod, "/")
	f := &face{Interface: i, id: policy.ID{Namespace: namespace, Pod: name, UID: i.PodUID, Network: i.Definition, Interface: i.IfName}}
	e.faces[i.Key] = f
	e.of[i.Pod] = append(e.of[i.Pod], f)
	return f
}

// drop forgets a face. mu is held.
func (e *Enforcer) drop(f *face) {
	delete(e.faces, f.Key)
	if left := slices.DeleteFunc(slices.Clone(e.of[f.Pod]), func(o *face) bool { return o == f }); len(left) > 0 {
		e.of[f.Pod] = left
	} else {
		delete(e.of, f.Pod)
	}
}

// stateOf is what policy says of the face, per direction; nil where nothing is known. mu
// is held.
func (e *Enforcer) stateOf(f *face) (states [2]*policy.State) {
	for d := range states {
		states[d], _ = e.index.State(f.id, policy.Direction(d))
	}
	return states
}

func isolated(states [2]*policy.State) bool {
	return slices.ContainsFunc(states[:], func(s *policy.State) bool { return s != nil && s.Verdicts.Isolated })
}

// held says that the interface must send from its own addresses only, though no policy
// isolates it, and that its rules can have it do so.
func held(states [2]*policy.State, i attach.Interface) bool {
	s := states[policy.Egress]
	return s != nil && s.Held && i.Bypass == "" && !i.Unchecked
}

// isolates says in which directions the pod is isolated.
func isolates(states [2]*policy.State) string {
	var directions []string
	for d, s := range states {
		if s != nil && s.Verdicts.Isolated {
			directions = append(directions, policy.Direction(d).String())
		}
	}
	return strings.Join(directions, " and ") + " of the pod is isolated"
}

// policies are those that isolate the pod.
func policies(states [2]*policy.State) (all []string) {
	for _, s := range states {
		if s != nil {
			all = append(all, s.Verdicts.Policies...)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}
