package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/render"
)

// byOwnerUID indexes NetworkAttachmentDefinitions by the network that made them, so
// that one left behind in another namespace is found without trusting any annotation
// that a user may write on the network.
const byOwnerUID = "ownerUID"

// nadKindPoll is how often the API server is asked whether it has the
// NetworkAttachmentDefinition kind by now.
const nadKindPoll = 5 * time.Second

// network keeps the NetworkAttachmentDefinition of a SriovNetwork.
//
// It never touches one that another made, and deletes only what carries the UID of the
// network: a name in an annotation is not a proof of ownership.
type network struct {
	client.Client
	config Config
	events events.EventRecorder

	cache      cache.Cache
	controller controller.Controller
	watching   sync.Mutex // guards watched
	watched    bool       // the NetworkAttachmentDefinition kind is being watched
}

func (r *network) setup(mgr ctrl.Manager) error {
	r.cache = mgr.GetCache()
	c, err := ctrl.NewControllerManagedBy(mgr).
		Named("sriovnetwork").
		For(&sriovv1.SriovNetwork{}).
		WatchesMetadata(metadataOf(corev1.SchemeGroupVersion.WithKind("Namespace")), handler.EnqueueRequestsFromMapFunc(r.ofNamespace)).
		Build(r)
	r.controller = c
	return err
}

func (r *network) ofNamespace(ctx context.Context, namespace client.Object) []reconcile.Request {
	networks := &sriovv1.SriovNetworkList{}
	if err := r.List(ctx, networks); err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "Lost an event of a namespace", "namespace", namespace.GetName())
		return nil
	}
	var requests []reconcile.Request
	for i := range networks.Items {
		if n := &networks.Items[i]; render.TargetNamespace(n) == namespace.GetName() {
			requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(n)})
		}
	}
	return requests
}

// ofNAD finds the network by the owner annotation: what is not in there is not ours.
func ofNAD(_ context.Context, nad *nadv1.NetworkAttachmentDefinition) []reconcile.Request {
	rest, ok := strings.CutPrefix(nad.Annotations[sriovv1.AnnotationOwnerRef], "SriovNetwork."+sriovv1.GroupName+"/")
	namespace, name, slash := strings.Cut(rest, "/")
	if !ok || !slash {
		return nil
	}
	return []reconcile.Request{{NamespacedName: client.ObjectKey{Namespace: namespace, Name: name}}}
}

// watchNADs begins to watch NetworkAttachmentDefinitions once the API server has the
// kind. It is not watched from the start because a manager does not start while a kind
// it watches is missing, and Multus may be installed later than we are.
func (r *network) watchNADs(ctx context.Context) error {
	r.watching.Lock()
	defer r.watching.Unlock()
	if r.watched {
		return nil
	}
	kind := nadv1.SchemeGroupVersion.WithKind("NetworkAttachmentDefinition")
	if _, err := r.RESTMapper().RESTMapping(kind.GroupKind(), kind.Version); err != nil {
		return err
	}
	err := r.cache.IndexField(ctx, &nadv1.NetworkAttachmentDefinition{}, byOwnerUID, func(o client.Object) []string {
		return []string{o.GetAnnotations()[sriovv1.AnnotationOwnerUID]}
	})
	if err != nil {
		return fmt.Errorf("index NetworkAttachmentDefinitions: %w", err)
	}
	err = r.controller.Watch(source.Kind(r.cache, &nadv1.NetworkAttachmentDefinition{}, handler.TypedEnqueueRequestsFromMapFunc(ofNAD)))
	if err != nil {
		return fmt.Errorf("watch NetworkAttachmentDefinitions: %w", err)
	}
	r.watched = true
	return nil
}

// refusal is an outcome that trying again does not change.
type refusal struct{ reason, message string }

func (e *refusal) Error() string { return e.message }

// Reconcile makes, mends or removes the NetworkAttachmentDefinition of one network.
func (r *network) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	net := &sriovv1.SriovNetwork{}
	if err := r.Get(ctx, request.NamespacedName, net); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	noKind := false
	if err := r.watchNADs(ctx); meta.IsNoMatchError(err) {
		noKind = true
	} else if err != nil {
		return ctrl.Result{}, err
	}
	if net.DeletionTimestamp != nil {
		return ctrl.Result{}, r.remove(ctx, net, noKind)
	}
	if noKind {
		err := r.report(ctx, net, &refusal{sriovv1.ReasonNADNotFound,
			"the cluster has no kind NetworkAttachmentDefinition: install Multus and its CustomResourceDefinition; it will be noticed"})
		return ctrl.Result{RequeueAfter: nadKindPoll}, err
	}
	err := r.ensure(ctx, net)
	var refused *refusal
	if errors.As(err, &refused) {
		return ctrl.Result{}, r.report(ctx, net, refused)
	}
	if err != nil && !apierrors.IsConflict(err) { // a conflict is settled by the next try
		return ctrl.Result{}, errors.Join(err, r.report(ctx, net, &refusal{sriovv1.ReasonNADNotFound, err.Error()}))
	}
	if err != nil {
		return ctrl.Result{}, err
	}
	return ctrl.Result{}, r.report(ctx, net, nil)
}

// ensure makes the NetworkAttachmentDefinition as the network wants it, and removes
// those of the same network elsewhere.
func (r *network) ensure(ctx context.Context, net *sriovv1.SriovNetwork) error {
	target := render.TargetNamespace(net)
	if target != net.Namespace && net.Namespace != r.config.Namespace {
		return &refusal{sriovv1.ReasonNADInvalid, fmt.Sprintf("spec.networkNamespace %s: only networks in namespace %s may name another namespace: remove networkNamespace, or make the network in %s",
			target, r.config.Namespace, r.config.Namespace)}
	}
	want, err := render.SriovNetwork(net, r.config.ResourcePrefix)
	if err != nil {
		return &refusal{sriovv1.ReasonNADInvalid, err.Error()}
	}
	want.Annotations[sriovv1.AnnotationOwnerUID] = string(net.UID)
	namespace := metadataOf(corev1.SchemeGroupVersion.WithKind("Namespace"))
	if err := r.Get(ctx, client.ObjectKey{Name: target}, namespace); apierrors.IsNotFound(err) {
		return &refusal{sriovv1.ReasonNamespaceNotFound, fmt.Sprintf("spec.networkNamespace %s: there is no such namespace: make it, or change networkNamespace; it will be noticed", target)}
	} else if err != nil {
		return fmt.Errorf("read namespace %s: %w", target, err)
	}
	if target == net.Namespace {
		if err := controllerutil.SetControllerReference(net, want, r.Scheme()); err != nil {
			return fmt.Errorf("own NetworkAttachmentDefinition %s/%s: %w", target, want.Name, err)
		}
	} else if err := r.setFinalizer(ctx, net, true); err != nil {
		return err
	}
	if err := r.write(ctx, net, want); err != nil {
		return err
	}
	if err := r.deleteOwned(ctx, net, target); err != nil {
		return err
	}
	if target == net.Namespace {
		return r.setFinalizer(ctx, net, false)
	}
	return nil
}

// write creates or mends the NetworkAttachmentDefinition.
func (r *network) write(ctx context.Context, net *sriovv1.SriovNetwork, want *nadv1.NetworkAttachmentDefinition) error {
	have := &nadv1.NetworkAttachmentDefinition{}
	err := r.Get(ctx, client.ObjectKeyFromObject(want), have)
	if apierrors.IsNotFound(err) {
		// Create, not apply: it must fail if somebody else was faster.
		if err = r.Create(ctx, want, fieldOwner); err != nil {
			return fmt.Errorf("create NetworkAttachmentDefinition %s/%s: %w", want.Namespace, want.Name, err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("read NetworkAttachmentDefinition %s/%s: %w", want.Namespace, want.Name, err)
	}
	if owner := have.Annotations[sriovv1.AnnotationOwnerRef]; owner != render.OwnerRef(net) {
		if owner == "" {
			owner = "somebody else"
		}
		return &refusal{sriovv1.ReasonNADInvalid, fmt.Sprintf("NetworkAttachmentDefinition %s/%s belongs to %s and is left as it is: delete it, or give this network another name or networkNamespace",
			want.Namespace, want.Name, owner)}
	}
	if asWanted(have, want) {
		return nil
	}
	// An object with another resourceVersion than the one judged here must not be written.
	want.ResourceVersion = have.ResourceVersion
	object, err := runtime.DefaultUnstructuredConverter.ToUnstructured(want)
	if err != nil {
		return fmt.Errorf("convert NetworkAttachmentDefinition %s/%s: %w", want.Namespace, want.Name, err)
	}
	desired := client.ApplyConfigurationFromUnstructured(&unstructured.Unstructured{Object: object})
	if err := r.Apply(ctx, desired, fieldOwner, client.ForceOwnership); err != nil {
		return fmt.Errorf("apply NetworkAttachmentDefinition %s/%s: %w", want.Namespace, want.Name, err)
	}
	return nil
}

func asWanted(have, want *nadv1.NetworkAttachmentDefinition) bool {
	for key, value := range want.Annotations {
		if have.Annotations[key] != value {
			return false
		}
	}
	for _, owner := range want.OwnerReferences {
		if !slices.ContainsFunc(have.OwnerReferences, func(o metav1.OwnerReference) bool { return equality.Semantic.DeepEqual(o, owner) }) {
			return false
		}
	}
	return have.Spec.Config == want.Spec.Config
}

// remove deletes what the network made and lets it go.
func (r *network) remove(ctx context.Context, net *sriovv1.SriovNetwork, noKind bool) error {
	if !noKind {
		if err := r.deleteOwned(ctx, net, ""); err != nil {
			return err
		}
	}
	return r.setFinalizer(ctx, net, false)
}

// deleteOwned deletes the NetworkAttachmentDefinitions that carry the network's UID in
// all namespaces but one.
func (r *network) deleteOwned(ctx context.Context, net *sriovv1.SriovNetwork, except string) error {
	made := &nadv1.NetworkAttachmentDefinitionList{}
	if err := r.List(ctx, made, client.MatchingFields{byOwnerUID: string(net.UID)}); err != nil {
		return fmt.Errorf("list NetworkAttachmentDefinitions: %w", err)
	}
	for i := range made.Items {
		nad := &made.Items[i]
		if nad.Namespace == except || nad.Name != net.Name || nad.Annotations[sriovv1.AnnotationOwnerRef] != render.OwnerRef(net) {
			continue
		}
		uid, version := nad.UID, nad.ResourceVersion
		if err := r.Delete(ctx, nad, client.Preconditions{UID: &uid, ResourceVersion: &version}); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("delete NetworkAttachmentDefinition %s/%s: %w", nad.Namespace, nad.Name, err)
		}
	}
	return nil
}

// setFinalizer puts our finalizer on the network, or takes it off.
func (r *network) setFinalizer(ctx context.Context, net *sriovv1.SriovNetwork, on bool) error {
	if controllerutil.ContainsFinalizer(net, sriovv1.FinalizerNetAttDef) == on {
		return nil
	}
	before := client.MergeFromWithOptions(net.DeepCopy(), client.MergeFromWithOptimisticLock{})
	if on {
		controllerutil.AddFinalizer(net, sriovv1.FinalizerNetAttDef)
	} else {
		controllerutil.RemoveFinalizer(net, sriovv1.FinalizerNetAttDef)
	}
	if err := r.Patch(ctx, net, before, fieldOwner); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("set the finalizer of SriovNetwork %s/%s: %w", net.Namespace, net.Name, err)
	}
	return nil
}

// report writes the Ready condition, if it changed. No refusal means ready.
func (r *network) report(ctx context.Context, net *sriovv1.SriovNetwork, refused *refusal) error {
	condition := metav1.Condition{
		Type: sriovv1.ConditionReady, Status: metav1.ConditionTrue, Reason: sriovv1.ReasonNetworkReady, ObservedGeneration: net.Generation,
		Message: fmt.Sprintf("NetworkAttachmentDefinition %s/%s is as this network wants it", render.TargetNamespace(net), net.Name),
	}
	if refused != nil {
		condition.Status, condition.Reason, condition.Message = metav1.ConditionFalse, refused.reason, shorten(refused.message, 32768)
	}
	status := *net.Status.DeepCopy()
	if !meta.SetStatusCondition(&status.Conditions, condition) {
		return nil
	}
	key := client.ObjectKeyFromObject(net)
	desired, err := applyPart("SriovNetwork", key, "status", &status)
	if err != nil {
		return err
	}
	if err := r.Status().Apply(ctx, desired, fieldOwner, client.ForceOwnership); err != nil {
		return client.IgnoreNotFound(fmt.Errorf("apply the status of SriovNetwork %s: %w", key, err))
	}
	reportTransition(r.events, net, net.Status.Conditions, status.Conditions)
	return nil
}
