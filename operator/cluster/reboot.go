package cluster

import (
	"context"
	"fmt"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// annotationCordoned is on the state of a node that we made unschedulable, so that
// whoever finishes its reboot makes it schedulable again, and nobody does it for a node
// that people had cordoned.
const annotationCordoned = "sluice.dev/cordoned"

// reasonNoHelp is the reason of a node state's Degraded condition when the change for which
// the node was rebooted did not come with that. The agent does not reboot for it again.
const reasonNoHelp = "RebootDidNotHelp"

func rebootedInVain(state *sriovv1.SriovNetworkNodeState) bool {
	degraded := meta.FindStatusCondition(state.Status.Conditions, sriovv1.ConditionDegraded)
	return degraded != nil && degraded.Reason == reasonNoHelp
}

// cordon keeps new pods off a node that is about to reboot. That we did it is written
// down first, so that it is undone whatever happens.
func (r *eviction) cordon(ctx context.Context, n *evictee) error {
	node := &corev1.Node{}
	if err := r.live.Get(ctx, client.ObjectKey{Name: n.state.Name}, node); err != nil {
		return fmt.Errorf("read node %s: %w", n.state.Name, err)
	}
	if node.Spec.Unschedulable {
		return nil
	}
	if err := r.annotate(ctx, n, map[string]string{annotationCordoned: "true"}); err != nil {
		return err
	}
	return r.setUnschedulable(ctx, node, true)
}

func (r *eviction) uncordon(ctx context.Context, n *evictee) error {
	if n.state.Annotations[annotationCordoned] == "" {
		return nil
	}
	node := &corev1.Node{}
	if err := r.live.Get(ctx, client.ObjectKey{Name: n.state.Name}, node); err != nil {
		return client.IgnoreNotFound(err)
	}
	if !node.Spec.Unschedulable {
		return nil
	}
	return r.setUnschedulable(ctx, node, false)
}

// uncordonForUpstream makes nodes schedulable again that the SR-IOV network operator was
// draining when it was removed. Nobody else would: what it waited for, we do in our own way.
func (r *eviction) uncordonForUpstream(ctx context.Context) error {
	nodes, err := listNodes(ctx, r)
	if err != nil {
		return err
	}
	for i := range nodes {
		if state := nodes[i].Annotations[sriovv1.AnnotationNodeState]; state == "" || state == reasonIdle {
			continue
		}
		node := &corev1.Node{}
		if err := r.live.Get(ctx, client.ObjectKey{Name: nodes[i].Name}, node); apierrors.IsNotFound(err) {
			continue
		} else if err != nil {
			return fmt.Errorf("read node %s: %w", nodes[i].Name, err)
		}
		before := client.MergeFrom(node.DeepCopy())
		node.Spec.Unschedulable, node.Annotations[sriovv1.AnnotationNodeState] = false, reasonIdle
		if err := r.Patch(ctx, node, before, fieldOwner); err != nil {
			return fmt.Errorf("make node %s schedulable: %w", node.Name, err)
		}
		ctrl.LoggerFrom(ctx).Info("Made a node schedulable that the SR-IOV network operator had cordoned", "node", node.Name)
	}
	return nil
}

func (r *eviction) setUnschedulable(ctx context.Context, node *corev1.Node, on bool) error {
	before := client.MergeFrom(node.DeepCopy())
	node.Spec.Unschedulable = on
	if err := r.Patch(ctx, node, before, fieldOwner); err != nil {
		return fmt.Errorf("make node %s unschedulable %t: %w", node.Name, on, err)
	}
	return nil
}

// allowReboot gives the agent the word it waits for: the generation whose goal needs it.
func (r *eviction) allowReboot(ctx context.Context, n *evictee) error {
	return r.annotate(ctx, n, map[string]string{sriovv1.AnnotationRebootAllowed: strconv.FormatInt(n.state.Status.ObservedGeneration, 10)})
}
