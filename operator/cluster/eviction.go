package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
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

// Reasons of the condition Evicting of a node state.
const (
	reasonIdle           = "Idle"           // nothing waits for pods to go
	reasonEvicting       = "Evicting"       // the pods in the way are going
	reasonBlocked        = "Blocked"        // a pod in the way cannot be evicted
	reasonWaitingForPool = "WaitingForPool" // other nodes of the pool come first
	reasonDisabled       = "Disabled"       // disableDrain
)

const (
	// evictionsAtOnce bounds the nodes whose pods are evicted side by side.
	evictionsAtOnce = 16
	// A pod that cannot be evicted is tried again after firstRetry, then ever later.
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
)

// eviction evicts the pods that are in the way of changes to their nodes, exactly those
// that the agents name, and lets only so many nodes be disturbed as their pools allow.
//
// One worker decides for all nodes at once. Which nodes are disturbed is in memory,
// because a cache lags behind what was just written, and in annotations of their states,
// where a new leader finds it.
type eviction struct {
	client.Client
	live      client.Reader // not cached: pods, and what a new leader must not miss
	namespace string
	events    events.EventRecorder

	disturbed map[string]*disturbance // by node; nil before they were read
}

// disturbance is what the worker knows of a node whose pods it evicts.
type disturbance struct {
	tries   int
	next    time.Time                       // when pods that could not be evicted are tried again
	blocked map[sriovv1.PodReference]string // why they could not
	// evicted are pods that were, with the version of the node's state that named them: of
	// a pod of the same name that came since, that state does not speak.
	evicted map[sriovv1.PodReference]evicted
}

type evicted struct {
	uid     types.UID
	version string
}

func newDisturbance() *disturbance {
	return &disturbance{blocked: map[sriovv1.PodReference]string{}, evicted: map[sriovv1.PodReference]evicted{}}
}

func (r *eviction) setup(mgr ctrl.Manager) error {
	all := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return []reconcile.Request{{NamespacedName: types.NamespacedName{Name: "all"}}}
	})
	return ctrl.NewControllerManagedBy(mgr).
		Named("eviction").
		Watches(&sriovv1.SriovNetworkNodeState{}, all, builder.WithPredicates(predicate.Funcs{UpdateFunc: mattersToEviction})).
		Watches(&sriovv1.SriovNetworkPoolConfig{}, all, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&sriovv1.SriovOperatorConfig{}, all, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WatchesMetadata(nodeMetadata(), all, builder.WithPredicates(predicate.LabelChangedPredicate{})).
		Complete(r)
}

// mattersToEviction leaves out the many reports of agents that change nothing here.
func mattersToEviction(e event.UpdateEvent) bool {
	before, after := e.ObjectOld.(*sriovv1.SriovNetworkNodeState), e.ObjectNew.(*sriovv1.SriovNetworkNodeState)
	working := func(s *sriovv1.SriovNetworkNodeState) bool {
		return meta.IsStatusConditionTrue(s.Status.Conditions, sriovv1.ConditionProgressing)
	}
	return before.UID != after.UID || working(before) != working(after) || rebootedInVain(before) != rebootedInVain(after) ||
		!equality.Semantic.DeepEqual(before.Status.Pending, after.Status.Pending) || !maps.Equal(before.Annotations, after.Annotations)
}

// evictee is a node as the eviction sees it.
type evictee struct {
	state *sriovv1.SriovNetworkNodeState // of the cache: not to be written to
	pools []*sriovv1.SriovNetworkPoolConfig
	evict []sriovv1.PendingChange // that wait for pods
	boot  []sriovv1.PendingChange // that wait for a reboot the pool allows
}

// pool is the name of the node's pool; empty for none.
func (n *evictee) pool() string {
	if len(n.pools) == 1 {
		return n.pools[0].Name
	}
	return ""
}

func (n *evictee) waits() bool { return len(n.evict)+len(n.boot) > 0 }

func newEvictee(state *sriovv1.SriovNetworkNodeState, pools []*sriovv1.SriovNetworkPoolConfig) *evictee {
	n := &evictee{state: state, pools: pools}
	for _, change := range state.Status.Pending {
		switch {
		case change.Cost == sriovv1.CostEvict:
			n.evict = append(n.evict, change)
		case change.Cost == sriovv1.CostReboot && !rebootedInVain(state) && len(pools) == 1 && pools[0].Spec.RebootPolicy == sriovv1.RebootWhenRequired:
			n.boot = append(n.boot, change)
		}
	}
	return n
}

// Reconcile decides which nodes may be disturbed, and goes on with those that are.
func (r *eviction) Reconcile(ctx context.Context, _ ctrl.Request) (ctrl.Result, error) {
	nodes, disabled, err := r.look(ctx)
	if err != nil {
		return ctrl.Result{}, err
	}
	failed := []error{r.release(ctx, nodes, disabled)}
	contenders, limits := contend(nodes, r.disturbed, disabled)
	for _, name := range plan.Grant(contenders, limits) {
		n := nodes[name]
		if err := r.annotate(ctx, n, map[string]string{sriovv1.AnnotationCurrentState: "Draining", sriovv1.AnnotationDesiredState: desiredState(n)}); err != nil {
			failed = append(failed, err)
			continue
		}
		r.disturbed[name] = newDisturbance()
	}

	now := time.Now()
	var work errgroup.Group
	work.SetLimit(evictionsAtOnce)
	results := map[string]*result{}
	for name, d := range r.disturbed {
		if n := nodes[name]; n.waits() {
			res := &result{}
			results[name] = res
			work.Go(func() error {
				*res = r.disturb(ctx, n, d, now)
				return nil
			})
		}
	}
	_ = work.Wait() // what fails is in the results
	again := time.Duration(0)
	for name, n := range nodes {
		said := r.say(n, results[name], disabled, nodes, limits)
		failed = append(failed, r.tell(ctx, n, said, results[name]))
		if res := results[name]; res != nil {
			failed = append(failed, res.err)
			if res.retry {
				again = min(cmp.Or(again, lastRetry), max(time.Until(r.disturbed[name].next), 100*time.Millisecond))
			}
		}
	}
	return ctrl.Result{RequeueAfter: again}, errors.Join(failed...)
}

// look reads all nodes that have a state, and whether eviction is turned off.
func (r *eviction) look(ctx context.Context) (map[string]*evictee, bool, error) {
	config := &sriovv1.SriovOperatorConfig{}
	err := r.Get(ctx, client.ObjectKey{Namespace: r.namespace, Name: sriovv1.DefaultOperatorConfigName}, config)
	if client.IgnoreNotFound(err) != nil {
		return nil, false, fmt.Errorf("read SriovOperatorConfig %s: %w", sriovv1.DefaultOperatorConfigName, err)
	}
	list := &sriovv1.SriovNetworkPoolConfigList{}
	if err := r.List(ctx, list, client.InNamespace(r.namespace)); err != nil {
		return nil, false, fmt.Errorf("list pools: %w", err)
	}
	states := &sriovv1.SriovNetworkNodeStateList{}
	if err := r.List(ctx, states, client.InNamespace(r.namespace), client.UnsafeDisableDeepCopy); err != nil {
		return nil, false, fmt.Errorf("list node states: %w", err)
	}
	known, err := listNodes(ctx, r)
	if err != nil {
		return nil, false, err
	}
	labelsOf := make(map[string]map[string]string, len(known))
	for i := range known {
		labelsOf[known[i].Name] = known[i].Labels
	}
	pools := plan.NewPools(list.Items)
	nodes := make(map[string]*evictee, len(states.Items))
	for i := range states.Items {
		if nodeLabels, ok := labelsOf[states.Items[i].Name]; ok {
			nodes[states.Items[i].Name] = newEvictee(&states.Items[i], pools.Of(nodeLabels))
		}
	}
	return nodes, config.Spec.DisableDrain, r.recall(ctx)
}

// recall learns, once, which nodes an earlier leader was disturbing. It asks the API
// server, because the cache may not have its last word yet.
func (r *eviction) recall(ctx context.Context) error {
	if r.disturbed != nil {
		return nil
	}
	list := &metav1.PartialObjectMetadataList{}
	list.SetGroupVersionKind(sriovv1.SchemeGroupVersion.WithKind("SriovNetworkNodeStateList"))
	if err := r.live.List(ctx, list, client.InNamespace(r.namespace)); err != nil {
		return fmt.Errorf("list node states: %w", err)
	}
	if err := r.uncordonForUpstream(ctx); err != nil {
		return err
	}
	r.disturbed = map[string]*disturbance{}
	for i := range list.Items {
		if isDisturbed(&list.Items[i]) {
			r.disturbed[list.Items[i].Name] = newDisturbance()
		}
	}
	return nil
}

func isDisturbed(state client.Object) bool {
	current := state.GetAnnotations()[sriovv1.AnnotationCurrentState]
	return current == "Draining" || current == "DrainComplete"
}

// release lets go of the nodes that have what they waited for. A node whose agent is
// still at work is kept: the next one of its pool waits until this one is well, or failed.
func (r *eviction) release(ctx context.Context, nodes map[string]*evictee, disabled bool) error {
	var failed []error
	for name := range r.disturbed {
		n := nodes[name]
		if n == nil {
			delete(r.disturbed, name)
			continue
		}
		// What waits for a reboot that nobody allows keeps nobody waiting.
		working := len(n.state.Status.Pending) == 0 && meta.IsStatusConditionTrue(n.state.Status.Conditions, sriovv1.ConditionProgressing)
		stopped := disabled || len(n.pools) > 1
		if !stopped && (n.waits() || working) {
			continue
		}
		err := r.uncordon(ctx, n)
		if err == nil {
			err = r.annotate(ctx, n, map[string]string{
				sriovv1.AnnotationCurrentState: reasonIdle, sriovv1.AnnotationDesiredState: desiredState(n),
				annotationCordoned: "", sriovv1.AnnotationRebootAllowed: "",
			})
		}
		if err != nil {
			failed = append(failed, err)
			continue
		}
		delete(r.disturbed, name)
	}
	return errors.Join(failed...)
}

// contend says who contends for being disturbed, and how many of each pool may be.
func contend(nodes map[string]*evictee, disturbed map[string]*disturbance, disabled bool) ([]plan.Contender, map[string]int) {
	var contenders []plan.Contender
	members, pools := map[string]int{}, map[string]*sriovv1.SriovNetworkPoolConfig{"": nil}
	for name, n := range nodes {
		if len(n.pools) == 1 {
			pools[n.pool()] = n.pools[0]
		}
		members[n.pool()]++
		contenders = append(contenders, plan.Contender{
			Node: name, Pool: n.pool(), Disturbed: disturbed[name] != nil,
			Waits: n.waits() && len(n.pools) < 2 && !disabled,
		})
	}
	limits := map[string]int{}
	for name, pool := range pools {
		limits[name], _ = plan.MaxUnavailable(pool, members[name]) // its error, told in the pool's status, lets none
	}
	return contenders, limits
}

func desiredState(n *evictee) string {
	switch {
	case len(n.boot) > 0:
		return "Reboot_Required"
	case len(n.evict) > 0:
		return "Drain_Required"
	}
	return reasonIdle
}

// result is how far a disturbed node is.
type result struct {
	going    []string // pods that are on their way out
	blockers []string // pods that are not, and why
	retry    bool     // for want of an event
	err      error
}

// disturb evicts what is in the way on one node. It touches nothing of other nodes.
func (r *eviction) disturb(ctx context.Context, n *evictee, d *disturbance, now time.Time) result {
	var res result
	refs, err := r.inTheWay(ctx, n)
	if err != nil {
		return result{err: err, retry: true}
	}
	due := !now.Before(d.next)
	for _, ref := range refs {
		r.evictOne(ctx, n, d, ref, due, &res)
	}
	// That the pods in the agent's way are gone its next report tells; that others are,
	// nothing does.
	res.retry = len(res.blockers) > 0 || len(n.boot) > 0 && len(res.going) > 0
	switch {
	case len(res.going)+len(res.blockers) > 0:
		if due {
			d.next = now.Add(min(firstRetry<<min(d.tries, 10), lastRetry))
			d.tries++
		}
	case len(n.boot) > 0:
		res.err = r.allowReboot(ctx, n)
		res.retry = res.err != nil
	}
	return res
}

// inTheWay are the pods that must go: those the agent names, or for a reboot all that do
// not belong to the node.
func (r *eviction) inTheWay(ctx context.Context, n *evictee) ([]sriovv1.PodReference, error) {
	var refs []sriovv1.PodReference
	unnamed := map[types.UID]bool{}
	for _, change := range n.evict {
		for _, p := range change.Pods {
			if p.Name == "" {
				unnamed[p.UID] = p.UID != ""
				continue
			}
			refs = append(refs, sriovv1.PodReference{Namespace: p.Namespace, Name: p.Name})
		}
	}
	if len(n.boot) > 0 {
		if err := r.cordon(ctx, n); err != nil {
			return nil, err
		}
	}
	if len(n.boot)+len(unnamed) > 0 {
		pods := &corev1.PodList{}
		if err := r.live.List(ctx, pods, client.MatchingFields{"spec.nodeName": n.state.Name}); err != nil {
			return nil, fmt.Errorf("list the pods of node %s: %w", n.state.Name, err)
		}
		for i := range pods.Items {
			owner := metav1.GetControllerOf(&pods.Items[i])
			p := &pods.Items[i]
			boot := len(n.boot) > 0 && !isMirror(p) && !isCompleted(p) && (owner == nil || owner.Kind != "DaemonSet")
			if boot || unnamed[p.UID] || unnamed[types.UID(p.Annotations[corev1.MirrorPodAnnotationKey])] {
				refs = append(refs, sriovv1.PodReference{Namespace: p.Namespace, Name: p.Name})
			}
		}
	}
	slices.SortFunc(refs, func(a, b sriovv1.PodReference) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return slices.Compact(refs), nil
}

func isMirror(pod *corev1.Pod) bool {
	_, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]
	return mirror
}

func isCompleted(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// evictOne evicts one pod, if it is due, and notes how that is.
func (r *eviction) evictOne(ctx context.Context, n *evictee, d *disturbance, ref sriovv1.PodReference, due bool, res *result) {
	name := ref.Namespace + "/" + ref.Name
	pod := &corev1.Pod{}
	err := r.live.Get(ctx, client.ObjectKey{Namespace: ref.Namespace, Name: ref.Name}, pod)
	switch {
	case apierrors.IsNotFound(err):
		return // the agent is about to notice
	case err != nil:
		res.blockers = append(res.blockers, fmt.Sprintf("pod %s cannot be read: %v", name, err))
		return
	case pod.Spec.NodeName != n.state.Name || isCompleted(pod):
		return
	case isMirror(pod):
		res.blockers = append(res.blockers, fmt.Sprintf("pod %s is static and cannot be evicted: take its manifest off the node", name))
		return
	case d.evicted[ref].uid != "" && d.evicted[ref].uid != pod.UID && d.evicted[ref].version == n.state.ResourceVersion && len(n.boot) == 0:
		return
	case pod.DeletionTimestamp != nil:
		res.going = append(res.going, fmt.Sprintf("%s (terminating since %s)", name, pod.DeletionTimestamp.UTC().Format(time.TimeOnly)))
		return
	case d.blocked[ref] != "" && !due:
		res.blockers = append(res.blockers, d.blocked[ref])
		return
	}
	delete(d.blocked, ref)
	uid := pod.UID
	err = r.SubResource("eviction").Create(ctx, pod, &policyv1.Eviction{
		ObjectMeta:    metav1.ObjectMeta{Namespace: ref.Namespace, Name: ref.Name},
		DeleteOptions: &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}},
	})
	switch {
	case err == nil:
		d.evicted[ref] = evicted{uid, n.state.ResourceVersion}
		d.tries = 0
		res.going = append(res.going, name)
		evictions.WithLabelValues("evicted").Inc()
		ctrl.LoggerFrom(ctx).Info("Evicted a pod", "pod", name, "node", n.state.Name)
	case apierrors.IsNotFound(err):
	case apierrors.IsConflict(err): // another pod by now: the next look tells
		res.going = append(res.going, name)
	default:
		evictions.WithLabelValues("refused").Inc()
		d.blocked[ref] = fmt.Sprintf("pod %s: %s", name, refusalOfEviction(err))
		res.blockers = append(res.blockers, d.blocked[ref])
	}
}

// refusalOfEviction says why a pod may not be evicted: by which budget, where it is one.
func refusalOfEviction(err error) string {
	var status apierrors.APIStatus
	if errors.As(err, &status) && status.Status().Details != nil {
		for _, cause := range status.Status().Details.Causes {
			if cause.Type == policyv1.DisruptionBudgetCause {
				return cause.Message + ": run more replicas, change the budget, or delete the pod"
			}
		}
	}
	return err.Error()
}

// say is what the condition Evicting says of a node.
func (r *eviction) say(n *evictee, res *result, disabled bool, nodes map[string]*evictee, limits map[string]int) metav1.Condition {
	c := metav1.Condition{Type: sriovv1.ConditionEvicting, Status: metav1.ConditionFalse, Reason: reasonIdle, ObservedGeneration: n.state.Generation}
	var changes []string
	var pods []string
	for _, p := range slices.Concat(n.evict, n.boot) {
		changes = append(changes, p.Operation)
		for _, ref := range p.Pods {
			if ref.Name == "" {
				pods = append(pods, fmt.Sprintf("with UID %s", ref.UID))
				continue
			}
			pods = append(pods, ref.Namespace+"/"+ref.Name)
		}
	}
	slices.Sort(pods)
	what := strings.Join(changes, ", ")
	holders := "the pods in the way"
	if pods = slices.Compact(pods); len(pods) > 0 {
		holders = "pods " + abbreviate(pods)
	}
	switch {
	case !n.waits() && r.disturbed[n.state.Name] != nil:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, reasonEvicting, "the pods are gone, and the agent is at work"
	case !n.waits():
		c.Message = "nothing waits for pods to go"
	case disabled:
		c.Reason = reasonDisabled
		c.Message = fmt.Sprintf("%s waits until %s go by themselves, because SriovOperatorConfig default has disableDrain true", what, holders)
	case len(n.pools) > 1:
		c.Reason = reasonWaitingForPool
		c.Message = fmt.Sprintf("%s waits: the node is in SriovNetworkPoolConfigs %s at once, so it is not known how many nodes may be disturbed: let only one of them select it", what, poolNames(n.pools))
	case res == nil:
		c.Reason = reasonWaitingForPool
		c.Message = fmt.Sprintf("%s waits for its turn: %s", what, r.turn(n, nodes, limits[n.pool()]))
	case res.err != nil:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, reasonBlocked, fmt.Sprintf("%s waits: %v", what, res.err)
	case len(res.blockers) > 0:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, reasonBlocked, fmt.Sprintf("%s waits: %s", what, strings.Join(res.blockers, "; "))
	case len(res.going) > 0:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, reasonEvicting, fmt.Sprintf("%s waits for pods that were evicted: %s", what, abbreviate(res.going))
	case len(n.boot) > 0:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, reasonEvicting, fmt.Sprintf("%s: the pods are gone, and the node may reboot", what)
	default:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, reasonEvicting, what+": the pods are gone, and the agent goes on"
	}
	c.Message = shorten(c.Message, maxMessage)
	return c
}

// turn says for whom a node waits.
func (r *eviction) turn(n *evictee, nodes map[string]*evictee, limit int) string {
	if len(n.pools) == 1 && limit == 0 {
		return fmt.Sprintf("SriovNetworkPoolConfig %s has maxUnavailable 0, which lets no node be disturbed: raise it", n.pool())
	}
	var others []string
	for name := range r.disturbed {
		if o := nodes[name]; o != nil && o.pool() == n.pool() {
			others = append(others, name)
		}
	}
	slices.Sort(others)
	if n.pool() == "" {
		return fmt.Sprintf("nodes in no SriovNetworkPoolConfig are disturbed one at a time, and it is the turn of %s", abbreviate(others))
	}
	return fmt.Sprintf("SriovNetworkPoolConfig %s lets %d nodes be disturbed at the same time, and it is the turn of %s", n.pool(), limit, abbreviate(others))
}

// abbreviate lists names, but not without end.
func abbreviate(names []string) string {
	const most = 8
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

func poolNames(pools []*sriovv1.SriovNetworkPoolConfig) string {
	var names []string
	for _, p := range pools {
		names = append(names, p.Name)
	}
	return abbreviate(names)
}

// tell writes condition and annotations of a node, where they changed.
func (r *eviction) tell(ctx context.Context, n *evictee, said metav1.Condition, res *result) error {
	current := reasonIdle
	if r.disturbed[n.state.Name] != nil {
		current = "DrainComplete"
		if res != nil && len(res.going)+len(res.blockers) > 0 {
			current = "Draining"
		}
	}
	err := r.annotate(ctx, n, map[string]string{sriovv1.AnnotationCurrentState: current, sriovv1.AnnotationDesiredState: desiredState(n)})
	before := n.state.Status.Conditions
	was := meta.FindStatusCondition(before, sriovv1.ConditionEvicting)
	if was == nil && said.Reason == reasonIdle {
		return err // nothing was ever said of it
	}
	all, own := merge(before, []metav1.Condition{said})
	if equality.Semantic.DeepEqual(all, before) {
		return err
	}
	apply := writeStatus(ctx, r, sriovv1.SchemeGroupVersion.WithKind("SriovNetworkNodeState"), client.ObjectKeyFromObject(n.state), &struct {
		Conditions []metav1.Condition `json:"conditions"`
	}{own})
	if client.IgnoreNotFound(apply) != nil {
		return errors.Join(err, apply)
	}
	if was == nil || was.Reason != said.Reason {
		kind := corev1.EventTypeNormal
		if said.Reason == reasonBlocked {
			kind = corev1.EventTypeWarning
		}
		r.events.Eventf(n.state.DeepCopy(), nil, kind, "Eviction"+said.Reason, "Evict", "%s", shorten(said.Message, 1000))
	}
	return err
}

// annotate sets annotations of a node's state, and takes off those with an empty value.
func (r *eviction) annotate(ctx context.Context, n *evictee, want map[string]string) error {
	after := &metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{APIVersion: sriovv1.SchemeGroupVersion.String(), Kind: "SriovNetworkNodeState"}}
	after.Namespace, after.Name, after.Annotations = n.state.Namespace, n.state.Name, maps.Clone(n.state.Annotations)
	before := after.DeepCopy()
	for key, value := range want {
		if value == "" {
			delete(after.Annotations, key)
		} else {
			metav1.SetMetaDataAnnotation(&after.ObjectMeta, key, value)
		}
	}
	if maps.Equal(before.Annotations, after.Annotations) {
		return nil
	}
	annotations := maps.Clone(after.Annotations)
	if err := r.Patch(ctx, after, client.MergeFrom(before), fieldOwner); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("annotate SriovNetworkNodeState %s: %w", n.state.Name, err)
	}
	state := *n.state // the cache's is not ours to change
	state.Annotations = annotations
	n.state = &state
	return nil
}
