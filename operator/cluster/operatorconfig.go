package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/events"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
)

// Reasons of the conditions of a SriovOperatorConfig.
const (
	reasonConfigReady = "OperatorConfigReady"
	reasonSyncFailed  = "OperatorConfigSyncFailed"
	reasonUnsupported = "UnsupportedConfiguration"
	reasonRollingOut  = "AgentsRollingOut"
)

// operatorName is the name of the operator's Deployment.
const operatorName = "sluice-operator"

// annotationConfigMade is on the operator's own Deployment once the SriovOperatorConfig
// was made, so that one that a user deletes stays deleted.
const annotationConfigMade = "sluice.dev/default-config-created"

// maxMessage is the longest message of a condition that the API server takes.
const maxMessage = 32768

// ignored is said of every configuration but the one that counts.
var ignored = why{"Ignored", "only the SriovOperatorConfig named default, in the operator's namespace, has an effect: remove this one"}

// operatorConfig rolls the agents out as the SriovOperatorConfig named default says, and
// makes that object once, so that an installation needs no further step.
type operatorConfig struct {
	client.Client
	live     client.Reader // not cached: nodes as a whole
	settings Config
	events   events.EventRecorder
}

func (r *operatorConfig) setup(mgr ctrl.Manager) error {
	one := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return []reconcile.Request{{NamespacedName: r.key()}}
	})
	return ctrl.NewControllerManagedBy(mgr).
		Named("operatorconfig").
		For(&sriovv1.SriovOperatorConfig{}).
		Watches(&appsv1.DaemonSet{}, one).
		// Of the nodes' reports only those matter here of NICs that are being given back, and
		// of bridges that came or went.
		Watches(&sriovv1.SriovNetworkNodeState{}, one, builder.WithPredicates(predicate.Or(
			predicate.NewPredicateFuncs(func(o client.Object) bool { return o.GetAnnotations()[sriovv1.AnnotationRemoval] != "" }),
			predicate.Funcs{
				CreateFunc: func(e event.CreateEvent) bool { return hasBridges(e.Object) },
				UpdateFunc: func(e event.UpdateEvent) bool { return hasBridges(e.ObjectOld) != hasBridges(e.ObjectNew) },
				DeleteFunc: func(e event.DeleteEvent) bool { return hasBridges(e.Object) },
			}))).
		// The Deployment tells whether the configuration was made once; it is also what
		// begins everything in a new installation.
		WatchesMetadata(metadataOf(appsv1.SchemeGroupVersion.WithKind("Deployment")), one, builder.WithPredicates(predicate.AnnotationChangedPredicate{})).
		WatchesMetadata(nodeMetadata(), one, builder.WithPredicates(predicate.LabelChangedPredicate{})).
		Complete(r)
}

func (r *operatorConfig) key() client.ObjectKey {
	return client.ObjectKey{Namespace: r.settings.Namespace, Name: sriovv1.DefaultOperatorConfigName}
}

// Reconcile brings the agents' DaemonSet up to date.
func (r *operatorConfig) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	config := &sriovv1.SriovOperatorConfig{}
	err := r.Get(ctx, request.NamespacedName, config)
	if client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("read SriovOperatorConfig %s: %w", request.Name, err)
	}
	if request.NamespacedName != r.key() {
		if err != nil {
			return ctrl.Result{}, nil
		}
		return ctrl.Result{}, r.report(ctx, config, outcome{unready: ignored, degraded: ignored})
	}
	if err != nil {
		return ctrl.Result{}, r.without(ctx)
	}
	if config.DeletionTimestamp != nil {
		return r.remove(ctx, config)
	}
	if err := r.setFinalizer(ctx, config, config.Spec.OnRemoval == sriovv1.OnRemovalRestore); err != nil {
		return ctrl.Result{}, err
	}
	var level klog.Level
	if err := level.Set(strconv.Itoa(config.Spec.LogLevel)); err != nil {
		return ctrl.Result{}, fmt.Errorf("set the log level %d: %w", config.Spec.LogLevel, err)
	}
	nodes, err := listNodes(ctx, r)
	if err != nil {
		return ctrl.Result{}, err
	}
	selector := agentSelector(config, nodes)
	ds, again, err := r.rollOut(ctx, config, selector)
	if err != nil && !apierrors.IsConflict(err) {
		failed := why{reasonSyncFailed, err.Error()}
		return ctrl.Result{}, errors.Join(err, r.report(ctx, config, outcome{unready: failed, degraded: failed, matched: count(nodes, selector)}))
	}
	if err != nil {
		return ctrl.Result{}, err // settled by the next try
	}
	return ctrl.Result{RequeueAfter: again}, r.report(ctx, config, judgeRollOut(config, count(nodes, selector), selector, ds))
}

func count(nodes []metav1.PartialObjectMetadata, selector map[string]string) int {
	n := 0
	for i := range nodes {
		if plan.SelectsNode(selector, nodes[i].Labels) {
			n++
		}
	}
	return n
}

// without makes the configuration if that was never done, and else removes what one that
// is gone has left. The garbage collector does that, too, but does not run everywhere.
func (r *operatorConfig) without(ctx context.Context) error {
	deployment := metadataOf(appsv1.SchemeGroupVersion.WithKind("Deployment"))
	err := r.Get(ctx, client.ObjectKey{Namespace: r.settings.Namespace, Name: operatorName}, deployment)
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("read Deployment %s: %w", operatorName, err)
	}
	if err == nil && deployment.Annotations[annotationConfigMade] == "" {
		config := &sriovv1.SriovOperatorConfig{ObjectMeta: metav1.ObjectMeta{Namespace: r.settings.Namespace, Name: sriovv1.DefaultOperatorConfigName}}
		config.Spec.EnableInjector = true // as it is in that of the SR-IOV network operator
		if err = r.Create(ctx, config, fieldOwner); err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("create SriovOperatorConfig %s: %w", config.Name, err)
		}
		before := client.MergeFrom(deployment.DeepCopy())
		metav1.SetMetaDataAnnotation(&deployment.ObjectMeta, annotationConfigMade, "true")
		if err = r.Patch(ctx, deployment, before, fieldOwner); err != nil {
			return fmt.Errorf("note on Deployment %s that its SriovOperatorConfig was made: %w", operatorName, err)
		}
		ctrl.LoggerFrom(ctx).Info("Made the SriovOperatorConfig")
		return nil
	}
	ds := &appsv1.DaemonSet{}
	if err = r.Get(ctx, client.ObjectKey{Namespace: r.settings.Namespace, Name: agentName}, ds); err != nil {
		return client.IgnoreNotFound(err)
	}
	return deleteOfConfig(ctx, r, ds)
}

// deleteOfConfig deletes an object that a SriovOperatorConfig owns, and none but it.
func deleteOfConfig(ctx context.Context, c client.Client, object client.Object) error {
	owner := metav1.GetControllerOf(object)
	if owner == nil || owner.Kind != "SriovOperatorConfig" || object.GetDeletionTimestamp() != nil {
		return nil
	}
	uid, version := object.GetUID(), object.GetResourceVersion()
	if err := c.Delete(ctx, object, client.Preconditions{UID: &uid, ResourceVersion: &version}); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete %T %s: %w", object, object.GetName(), err)
	}
	return nil
}

// rollOut applies the agents' DaemonSet, if it is not as wanted, and returns it as it is,
// and when to look again.
func (r *operatorConfig) rollOut(ctx context.Context, config *sriovv1.SriovOperatorConfig, selector map[string]string) (*appsv1.DaemonSet, time.Duration, error) {
	have := &appsv1.DaemonSet{}
	bad := r.Get(ctx, client.ObjectKey{Namespace: config.Namespace, Name: agentName}, have)
	if client.IgnoreNotFound(bad) != nil {
		return nil, 0, fmt.Errorf("read DaemonSet %s: %w", agentName, bad)
	}
	bridges, again, err := r.needBridges(ctx, config, have)
	if err != nil {
		return nil, 0, err
	}
	want, err := agentDaemonSet(config, selector, bridges, r.settings)
	if err != nil {
		return nil, 0, err
	}
	desired, err := runtime.DefaultUnstructuredConverter.ToUnstructured(want)
	if err != nil {
		return nil, 0, fmt.Errorf("convert DaemonSet %s: %w", want.Name, err)
	}
	delete(desired, "status")
	unstructured.RemoveNestedField(desired, "metadata", "creationTimestamp")
	if bad == nil {
		is, err := runtime.DefaultUnstructuredConverter.ToUnstructured(have)
		if err != nil {
			return nil, 0, fmt.Errorf("convert DaemonSet %s: %w", want.Name, err)
		}
		delete(desired, "apiVersion") // a cached object does not say
		delete(desired, "kind")
		if covers(is, desired) {
			return have, again, nil
		}
	}
	desired["apiVersion"], desired["kind"] = appsv1.SchemeGroupVersion.String(), "DaemonSet"
	applied := &unstructured.Unstructured{Object: desired}
	if err := r.Apply(ctx, client.ApplyConfigurationFromUnstructured(applied), fieldOwner, client.ForceOwnership); err != nil {
		return nil, 0, fmt.Errorf("apply DaemonSet %s: %w", want.Name, err)
	}
	ctrl.LoggerFrom(ctx).Info("Applied the agents' DaemonSet", "image", r.settings.AgentImage)
	return have, again, nil // its change wakes us again
}

// needBridges tells whether agents make bridges, or still have some to remove, and when to
// look again. Those that could have made some must have said that they have none.
func (r *operatorConfig) needBridges(ctx context.Context, config *sriovv1.SriovOperatorConfig, agents *appsv1.DaemonSet) (bool, time.Duration, error) {
	if config.Spec.FeatureGates[plan.GateBridges] {
		return true, 0, nil
	}
	states := &sriovv1.SriovNetworkNodeStateList{}
	if err := r.List(ctx, states, client.InNamespace(r.settings.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return false, 0, fmt.Errorf("list node states: %w", err)
	}
	could := reachesSwitch(&agents.Spec.Template.Spec)
	for i := range states.Items {
		s := &states.Items[i]
		if hasBridges(s) {
			return true, 0, nil // the last one that goes wakes us
		}
		if could && s.Status.ObservedGeneration != s.Generation {
			return true, bridgesPoll, nil
		}
	}
	return false, 0, nil
}

// bridgesPoll is how often is looked whether agents have seen that there shall be no bridges.
const bridgesPoll = 10 * time.Second

func hasBridges(o client.Object) bool {
	s := o.(*sriovv1.SriovNetworkNodeState)
	return len(s.Spec.Bridges.OVS)+len(s.Status.Bridges.OVS) > 0
}

// why is the reason and message of a condition; zero when there is nothing to say.
type why struct{ reason, message string }

// outcome is what a SriovOperatorConfig's status says.
type outcome struct {
	// What keeps it from being ready, what goes on, and what somebody has to mend.
	unready, progressing, degraded why
	matched, running               int
}

// conditions are Ready, Progressing and Degraded. What they have nothing of their own to
// say of is said as Ready says it, and that as fine when all is well.
func conditions(generation int64, unready, progressing, degraded, fine why) []metav1.Condition {
	var all []metav1.Condition
	for _, c := range []struct {
		kind string
		is   bool
		why  why
	}{
		{sriovv1.ConditionReady, unready == why{}, unready},
		{sriovv1.ConditionProgressing, progressing != why{}, progressing},
		{sriovv1.ConditionDegraded, degraded != why{}, degraded},
	} {
		said := cmp.Or(c.why, unready, fine)
		status := metav1.ConditionFalse
		if c.is {
			status = metav1.ConditionTrue
		}
		all = append(all, metav1.Condition{Type: c.kind, Status: status, Reason: said.reason, Message: shorten(said.message, maxMessage), ObservedGeneration: generation})
	}
	return all
}

// merge sets conditions among others and returns the others with them, and them as they
// are now: with the time of transition they had, where they did not change.
func merge(before, set []metav1.Condition) (all, own []metav1.Condition) {
	all = slices.Clone(before)
	for _, c := range set {
		meta.SetStatusCondition(&all, c)
		own = append(own, *meta.FindStatusCondition(all, c.Type))
	}
	return all, own
}

func judgeRollOut(config *sriovv1.SriovOperatorConfig, matched int, selector map[string]string, ds *appsv1.DaemonSet) outcome {
	s := &ds.Status
	o := outcome{matched: matched, running: int(s.NumberReady)}
	current := ds.Generation > 0 && s.ObservedGeneration == ds.Generation
	switch {
	case matched == 0:
		o.unready = why{reasonNoNodeSelected, fmt.Sprintf("no node has the labels %s, so there is no agent: compare with kubectl get nodes --show-labels", labels.FormatLabels(selector))}
	case !current || int(s.UpdatedNumberScheduled) < matched || int(s.NumberReady) < matched:
		text := fmt.Sprintf("%d of %d selected nodes have a ready agent: see kubectl get pods -o wide -l app.kubernetes.io/component=agent", s.NumberReady, matched)
		if current && int(s.DesiredNumberScheduled) < matched {
			text = fmt.Sprintf("%s; %d nodes take no agent: they have taints that tolerations lacks", text, matched-int(s.DesiredNumberScheduled))
		}
		o.unready = why{reasonRollingOut, text}
		o.progressing = o.unready
	}
	if lacking := unsupported(&config.Spec); len(lacking) > 0 {
		o.degraded = why{reasonUnsupported, strings.Join(lacking, "; ")}
		o.unready = cmp.Or(o.unready, o.degraded)
	}
	return o
}

// report writes the status, if it changed. Conditions of other types are others'.
func (r *operatorConfig) report(ctx context.Context, config *sriovv1.SriovOperatorConfig, o outcome) error {
	status := &config.Status
	all, own := merge(status.Conditions, conditions(config.Generation, o.unready, o.progressing, o.degraded,
		why{reasonConfigReady, fmt.Sprintf("the agent runs on all %d selected nodes", o.matched)}))
	if equality.Semantic.DeepEqual(all, status.Conditions) && status.ObservedGeneration == config.Generation &&
		status.MatchedNodeCount == o.matched && status.ReadyNodeCount == o.running {
		return nil
	}
	err := writeStatus(ctx, r, sriovv1.SchemeGroupVersion.WithKind("SriovOperatorConfig"), client.ObjectKeyFromObject(config), &sriovv1.SriovOperatorConfigStatus{
		Conditions: own, ObservedGeneration: config.Generation, MatchedNodeCount: o.matched, ReadyNodeCount: o.running,
	})
	if err != nil {
		return client.IgnoreNotFound(err)
	}
	reportTransition(r.events, config, status.Conditions, all)
	return nil
}
