package cluster

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

const (
	reasonRestoring = "Restoring"
	// reasonRemoved is the reason of a node state's Ready condition when its agent has
	// given back all NICs, and taken its files off the node.
	reasonRemoved = "Removed"
)

// giveUpAfter is how long a node that is not ready is waited for before its NICs are left
// as they are: a machine that is switched off must not hold a removal for ever.
const giveUpAfter = 5 * time.Minute

// removalPoll is how often nodes that are waited for are asked after.
const removalPoll = 5 * time.Second

// isRestoring tells whether the NICs are being given back before the agents go.
func isRestoring(config *sriovv1.SriovOperatorConfig) bool {
	return config.DeletionTimestamp != nil && config.Spec.OnRemoval == sriovv1.OnRemovalRestore &&
		controllerutil.ContainsFinalizer(config, sriovv1.FinalizerOperatorConfig)
}

// remove lets a configuration that is being deleted go: at once, or when the nodes have
// given back their NICs. The agents go with it, by their owner reference.
func (r *operatorConfig) remove(ctx context.Context, config *sriovv1.SriovOperatorConfig) (ctrl.Result, error) {
	if !isRestoring(config) {
		return ctrl.Result{}, r.setFinalizer(ctx, config, false)
	}
	states := &sriovv1.SriovNetworkNodeStateList{}
	if err := r.List(ctx, states, client.InNamespace(r.settings.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return ctrl.Result{}, fmt.Errorf("list node states: %w", err)
	}
	done := 0
	var open, lost []string
	for i := range states.Items {
		state := &states.Items[i]
		if isRemoved(state) {
			done++
			continue
		}
		given, err := r.isLost(ctx, state.Name, config.DeletionTimestamp.Time)
		if err != nil {
			return ctrl.Result{}, err
		}
		if given {
			lost = append(lost, state.Name)
		} else {
			open = append(open, fmt.Sprintf("node %s: %s", state.Name, whyNotRemoved(state)))
		}
	}
	slices.Sort(open)
	slices.Sort(lost)
	text := fmt.Sprintf("the NICs of %d of %d nodes are given back", done, len(states.Items))
	if len(lost) > 0 {
		text += fmt.Sprintf("; nodes that have not been ready for %s keep theirs as they are: %s", giveUpAfter, abbreviate(lost))
	}
	if len(open) == 0 {
		if len(lost) > 0 {
			r.events.Eventf(config, nil, corev1.EventTypeWarning, "NotRestored", "Remove", "%s", shorten(text, 1000))
		}
		return ctrl.Result{}, r.setFinalizer(ctx, config, false)
	}
	const most = 4
	if len(open) > most {
		open = append(open[:most], fmt.Sprintf("and %d more", len(open)-most))
	}
	text += "; waiting for " + strings.Join(open, "; ") + "; to leave the NICs as they are, set onRemoval to Keep"
	wait := why{reasonRestoring, text}
	return ctrl.Result{RequeueAfter: removalPoll}, r.report(ctx, config, outcome{unready: wait, progressing: wait, matched: len(states.Items), running: config.Status.ReadyNodeCount})
}

// isRemoved tells whether the agent has given back all that its node had.
func isRemoved(state *sriovv1.SriovNetworkNodeState) bool {
	ready := meta.FindStatusCondition(state.Status.Conditions, sriovv1.ConditionReady)
	return state.Annotations[sriovv1.AnnotationRemoval] != "" && ready != nil && ready.Status == metav1.ConditionTrue && ready.Reason == reasonRemoved
}

func whyNotRemoved(state *sriovv1.SriovNetworkNodeState) string {
	if evicting := meta.FindStatusCondition(state.Status.Conditions, sriovv1.ConditionEvicting); evicting != nil && evicting.Reason != reasonIdle {
		return shorten(evicting.Message, maxVerdict)
	}
	if ready := readyMessage(state); ready != "" {
		return shorten(ready, maxVerdict)
	}
	return "its agent has not reported"
}

// isLost tells whether a node is gone or has, since the removal began, not been ready for
// too long to be waited for.
func (r *operatorConfig) isLost(ctx context.Context, name string, since time.Time) (bool, error) {
	node := &corev1.Node{}
	if err := r.live.Get(ctx, client.ObjectKey{Name: name}, node); apierrors.IsNotFound(err) {
		return true, nil
	} else if err != nil {
		return false, fmt.Errorf("read node %s: %w", name, err)
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
			if c.LastTransitionTime.After(since) {
				since = c.LastTransitionTime.Time
			}
			return time.Since(since) > giveUpAfter, nil
		}
	}
	return false, nil
}

// setFinalizer puts our finalizer on the configuration, or takes it off. It is there only
// while it is wanted, so that without it nothing waits for an operator.
func (r *operatorConfig) setFinalizer(ctx context.Context, config *sriovv1.SriovOperatorConfig, on bool) error {
	if controllerutil.ContainsFinalizer(config, sriovv1.FinalizerOperatorConfig) == on {
		return nil
	}
	before := client.MergeFromWithOptions(config.DeepCopy(), client.MergeFromWithOptimisticLock{})
	if on {
		controllerutil.AddFinalizer(config, sriovv1.FinalizerOperatorConfig)
	} else {
		controllerutil.RemoveFinalizer(config, sriovv1.FinalizerOperatorConfig)
	}
	if err := r.Patch(ctx, config, before, fieldOwner); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("set the finalizer of SriovOperatorConfig %s: %w", config.Name, err)
	}
	return nil
}
