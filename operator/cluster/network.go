package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-logr/logr"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/source"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/cluster/admission"
	"github.com/sluice-network/sluice/operator/render"
)

// networkKinds are the kinds that NetworkAttachmentDefinitions are made from.
var networkKinds = []schema.GroupVersionKind{
	sriovv1.SchemeGroupVersion.WithKind("SriovNetwork"),
	sriovv1.SchemeGroupVersion.WithKind("SriovIBNetwork"),
	sriovv1.SchemeGroupVersion.WithKind("OVSNetwork"),
	sluicev1.SchemeGroupVersion.WithKind("MacvlanNetwork"),
}

// apiextensions is the group that defines kinds.
var apiextensions = schema.GroupVersion{Group: "apiextensions.k8s.io", Version: "v1"}

// Indexes of the cache: networks by the namespace they belong in, and
// NetworkAttachmentDefinitions by the owner that their annotation names.
const (
	byTarget   = "target"
	byOwnerRef = "ownerRef"
)

// nadKindPoll is how often the API server is asked whether it has the
// NetworkAttachmentDefinition kind by now.
const nadKindPoll = 5 * time.Second

// networkKey is one network, of any kind.
type networkKey struct {
	kind schema.GroupVersionKind
	client.ObjectKey
}

// everyNetwork stands for all networks, when the cluster uses other addresses than before:
// once for what many nodes that come at a time bring along.
var everyNetwork networkKey

// network keeps the NetworkAttachmentDefinitions of networks of all kinds.
//
// It never touches one that another made, and deletes only what carries the UID of the
// network: a name that a user may write into an annotation is not a proof of ownership.
//
// In the network's own namespace the garbage collector deletes it with the network. In
// another, where no owner reference reaches, it is known by its annotations as an orphan
// when the network is gone: a finalizer would do the same, and would hold networks, and
// their namespaces, for ever where no operator is left. There the network's kind owns it, so
// that it goes with an installation that is deleted as a whole.
type network struct {
	client.Client
	live   client.Reader // not cached: before an orphan is deleted
	config Config
	events events.EventRecorder

	cache      cache.Cache
	controller controller.TypedController[networkKey]
	watched    bool // the NetworkAttachmentDefinition kind; only one worker runs, so nothing guards it
}

func (r *network) setup(mgr ctrl.Manager) error {
	r.cache = mgr.GetCache()
	b := builder.TypedControllerManagedBy[networkKey](mgr).Named("network").
		WithLogConstructor(func(key *networkKey) logr.Logger {
			log := mgr.GetLogger().WithValues("controller", "network")
			if key != nil {
				log = log.WithValues("kind", key.kind.Kind, "namespace", key.Namespace, "name", key.Name)
			}
			return log
		}).
		WatchesMetadata(metadataOf(corev1.SchemeGroupVersion.WithKind("Namespace")), handler.TypedEnqueueRequestsFromMapFunc(
			func(ctx context.Context, namespace client.Object) []networkKey {
				return r.inNamespace(ctx, namespace.GetName(), "")
			}))
	for _, kind := range networkKinds {
		object, err := r.newNetwork(kind)
		if err != nil {
			return err
		}
		if err := r.cache.IndexField(context.Background(), object, byTarget, target); err != nil {
			return fmt.Errorf("index %ss: %w", kind.Kind, err)
		}
		b = b.Watches(object, handler.TypedEnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []networkKey {
			return []networkKey{{kind, client.ObjectKeyFromObject(o)}}
		}))
	}
	every := everyAfter(everyNetwork)
	c, err := watchRanges(mgr, b.Watches(&sluicev1.IPPool{}, every), every).Build(r)
	r.controller = c
	return err
}

func (r *network) newNetwork(kind schema.GroupVersionKind) (client.Object, error) {
	object, err := r.Scheme().New(kind)
	if err != nil {
		return nil, fmt.Errorf("make a %s: %w", kind.Kind, err)
	}
	return object.(client.Object), nil
}

func target(o client.Object) []string {
	net, ok := render.Of(o)
	if !ok {
		return nil
	}
	return []string{net.Target}
}

// inNamespace finds the networks of all kinds that belong in a namespace, or in any; if a
// name is given, only those.
func (r *network) inNamespace(ctx context.Context, namespace, name string) []networkKey {
	var keys []networkKey
	for _, kind := range networkKinds {
		list, err := r.Scheme().New(kind.GroupVersion().WithKind(kind.Kind + "List"))
		if err == nil {
			var in []client.ListOption
			if namespace != "" {
				in = append(in, client.MatchingFields{byTarget: namespace})
			}
			err = r.List(ctx, list.(client.ObjectList), in...)
		}
		if err == nil {
			err = meta.EachListItem(list, func(o runtime.Object) error {
				if key := client.ObjectKeyFromObject(o.(client.Object)); name == "" || name == key.Name {
					keys = append(keys, networkKey{kind, key})
				}
				return nil
			})
		}
		if err != nil {
			ctrl.LoggerFrom(ctx).Error(err, "Lost an event", "kind", kind.Kind, "namespace", namespace)
		}
	}
	return keys
}

// watchNADs begins to watch NetworkAttachmentDefinitions once the API server has the
// kind. It is not watched from the start because a manager does not start while a kind
// it watches is missing, and Multus may be installed later than we are.
func (r *network) watchNADs(ctx context.Context) error {
	if r.watched {
		return nil
	}
	kind := nadv1.SchemeGroupVersion.WithKind("NetworkAttachmentDefinition")
	if _, err := r.RESTMapper().RESTMapping(kind.GroupKind(), kind.Version); err != nil {
		return err
	}
	err := r.cache.IndexField(ctx, &nadv1.NetworkAttachmentDefinition{}, byOwnerRef, func(o client.Object) []string {
		return []string{o.GetAnnotations()[sriovv1.AnnotationOwnerRef]}
	})
	if err != nil {
		return fmt.Errorf("index NetworkAttachmentDefinitions: %w", err)
	}
	// Whoever made it: when one that was in a network's way goes, the network's turn comes.
	err = r.controller.Watch(source.TypedKind(r.cache, &nadv1.NetworkAttachmentDefinition{}, handler.TypedEnqueueRequestsFromMapFunc(
		func(ctx context.Context, nad *nadv1.NetworkAttachmentDefinition) []networkKey {
			keys := r.inNamespace(ctx, nad.Namespace, nad.Name)
			if maker, ok := r.elsewhere(nad); ok {
				keys = append(keys, maker)
			}
			return keys
		})))
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
func (r *network) Reconcile(ctx context.Context, key networkKey) (ctrl.Result, error) {
	if key == everyNetwork {
		var failed []error
		for _, key := range r.inNamespace(ctx, "", "") {
			_, err := r.Reconcile(ctx, key)
			failed = append(failed, err)
		}
		return ctrl.Result{}, errors.Join(failed...)
	}
	object, err := r.newNetwork(key.kind)
	if err != nil {
		return ctrl.Result{}, err
	}
	err = r.Get(ctx, key.ObjectKey, object)
	if client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("read %s %s: %w", key.kind.Kind, key.ObjectKey, err)
	}
	gone := err != nil
	noKind := false
	if err = r.watchNADs(ctx); meta.IsNoMatchError(err) {
		noKind = true
	} else if err != nil {
		return ctrl.Result{}, err
	}
	if gone {
		return ctrl.Result{}, r.deleteOrphans(ctx, key, noKind)
	}
	if object.GetDeletionTimestamp() != nil {
		return ctrl.Result{}, r.remove(ctx, object, noKind)
	}
	if noKind {
		err = r.report(ctx, object, &refusal{sriovv1.ReasonNADNotFound,
			"the cluster has no kind NetworkAttachmentDefinition: install Multus and its CustomResourceDefinition; it will be noticed"})
		return ctrl.Result{RequeueAfter: nadKindPoll}, err
	}
	err = r.ensure(ctx, object)
	var refused *refusal
	if errors.As(err, &refused) {
		return ctrl.Result{}, r.report(ctx, object, refused)
	}
	if err != nil && !apierrors.IsConflict(err) { // a conflict is settled by the next try
		return ctrl.Result{}, errors.Join(err, r.report(ctx, object, &refusal{sriovv1.ReasonNADNotFound, err.Error()}))
	}
	if err != nil {
		return ctrl.Result{}, err
	}
	return ctrl.Result{}, r.report(ctx, object, nil)
}

// ensure makes the NetworkAttachmentDefinition as the network wants it, and removes
// those of the same network elsewhere.
func (r *network) ensure(ctx context.Context, object client.Object) error {
	net, _ := render.Of(object)
	want, errs := net.Definition(r.config.ResourcePrefix, r.config.Namespace)
	if len(errs) > 0 {
		return &refusal{sriovv1.ReasonNADInvalid, errs.ToAggregate().Error()}
	}
	errs, err := admission.NetworkOverlaps(ctx, r, r.config.Namespace, net)
	if err != nil {
		return err
	}
	if len(errs) > 0 {
		return &refusal{sriovv1.ReasonNADInvalid, errs.ToAggregate().Error()}
	}
	want.Annotations[sriovv1.AnnotationOwnerUID] = string(net.GetUID())
	namespace := metadataOf(corev1.SchemeGroupVersion.WithKind("Namespace"))
	if err := r.Get(ctx, client.ObjectKey{Name: net.Target}, namespace); apierrors.IsNotFound(err) {
		return &refusal{sriovv1.ReasonNamespaceNotFound, fmt.Sprintf("spec.networkNamespace %s: there is no such namespace: make it, or change networkNamespace; it will be noticed", net.Target)}
	} else if err != nil {
		return fmt.Errorf("read namespace %s: %w", net.Target, err)
	}
	if net.Target == net.GetNamespace() {
		if err := controllerutil.SetControllerReference(object, want, r.Scheme()); err != nil {
			return fmt.Errorf("own NetworkAttachmentDefinition %s/%s: %w", want.Namespace, want.Name, err)
		}
	}
	if err := r.write(ctx, net, want); err != nil {
		return err
	}
	if err := r.deleteMade(ctx, net, net.Target); err != nil {
		return err
	}
	return r.dropFinalizer(ctx, object)
}

// write creates or mends the NetworkAttachmentDefinition.
func (r *network) write(ctx context.Context, net *render.Network, want *nadv1.NetworkAttachmentDefinition) error {
	have := &nadv1.NetworkAttachmentDefinition{}
	err := r.Get(ctx, client.ObjectKeyFromObject(want), have)
	if client.IgnoreNotFound(err) == nil && net.Target != net.GetNamespace() {
		var failed error
		if want.OwnerReferences, failed = r.ownedByKind(ctx, net.Kind, have); failed != nil {
			return failed
		}
	}
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
	if owner := have.Annotations[sriovv1.AnnotationOwnerRef]; owner != net.OwnerRef() {
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

// ownedByKind names the CustomResourceDefinition of a network as the owner of what it makes.
// If one is named there already it is trusted to be that of now: of what another one owned
// the garbage collector has left nothing.
func (r *network) ownedByKind(ctx context.Context, kind schema.GroupKind, have *nadv1.NetworkAttachmentDefinition) ([]metav1.OwnerReference, error) {
	mapping, err := r.RESTMapper().RESTMapping(kind)
	if err != nil {
		return nil, fmt.Errorf("find the resource of kind %s: %w", kind, err)
	}
	definition := metadataOf(apiextensions.WithKind("CustomResourceDefinition"))
	name := mapping.Resource.GroupResource().String()
	for _, o := range have.OwnerReferences {
		if o.Kind == definition.Kind && o.Name == name {
			return []metav1.OwnerReference{o}, nil
		}
	}
	if err = r.live.Get(ctx, client.ObjectKey{Name: name}, definition); err != nil {
		return nil, fmt.Errorf("read CustomResourceDefinition %s: %w", name, err)
	}
	return []metav1.OwnerReference{{APIVersion: apiextensions.String(), Kind: definition.Kind, Name: name, UID: definition.UID}}, nil
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
func (r *network) remove(ctx context.Context, object client.Object, noKind bool) error {
	if !noKind {
		net, _ := render.Of(object)
		if err := r.deleteMade(ctx, net, ""); err != nil {
			return err
		}
	}
	return r.dropFinalizer(ctx, object)
}

// elsewhere tells by which network a NetworkAttachmentDefinition was made in another
// namespace than its own, as only one in the operator's namespace can have done. What
// the annotations say is the word of whoever may write that object, and concerns no other.
func (r *network) elsewhere(nad *nadv1.NetworkAttachmentDefinition) (networkKey, bool) {
	maker := networkKey{ObjectKey: client.ObjectKey{Namespace: r.config.Namespace, Name: nad.Name}}
	if nad.Namespace == r.config.Namespace || nad.Annotations[sriovv1.AnnotationOwnerUID] == "" {
		return networkKey{}, false
	}
	for _, maker.kind = range networkKinds {
		if nad.Annotations[sriovv1.AnnotationOwnerRef] == maker.ownerRef() {
			return maker, true
		}
	}
	return networkKey{}, false
}

// ownerRef is what the owner-ref annotation of what the network makes says.
func (k networkKey) ownerRef() string {
	return render.OwnerRef(k.kind.GroupKind(), k.Namespace, k.Name)
}

// deleteOrphans deletes what a network that is gone had made in other namespaces.
func (r *network) deleteOrphans(ctx context.Context, key networkKey, noKind bool) error {
	if noKind || key.Namespace != r.config.Namespace {
		return nil
	}
	made := &nadv1.NetworkAttachmentDefinitionList{}
	if err := r.List(ctx, made, client.MatchingFields{byOwnerRef: key.ownerRef()}); err != nil {
		return fmt.Errorf("list NetworkAttachmentDefinitions: %w", err)
	}
	for i := range made.Items {
		nad := &made.Items[i]
		if maker, ok := r.elsewhere(nad); !ok || maker != key {
			continue
		}
		// The cache may not have a network yet that has just been made.
		if err := r.live.Get(ctx, key.ObjectKey, metadataOf(key.kind)); !apierrors.IsNotFound(err) {
			return err
		}
		if err := r.delete(ctx, nad); err != nil {
			return err
		}
	}
	return nil
}

func (r *network) delete(ctx context.Context, nad *nadv1.NetworkAttachmentDefinition) error {
	uid, version := nad.UID, nad.ResourceVersion
	if err := r.Delete(ctx, nad, client.Preconditions{UID: &uid, ResourceVersion: &version}); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete NetworkAttachmentDefinition %s/%s: %w", nad.Namespace, nad.Name, err)
	}
	return nil
}

// deleteMade deletes the NetworkAttachmentDefinitions that the network made in all
// namespaces but one.
func (r *network) deleteMade(ctx context.Context, net *render.Network, except string) error {
	made := &nadv1.NetworkAttachmentDefinitionList{}
	if err := r.List(ctx, made, client.MatchingFields{byOwnerRef: net.OwnerRef()}); err != nil {
		return fmt.Errorf("list NetworkAttachmentDefinitions: %w", err)
	}
	for i := range made.Items {
		nad := &made.Items[i]
		if nad.Namespace == except || !r.made(net, nad) {
			continue
		}
		if err := r.delete(ctx, nad); err != nil {
			return err
		}
	}
	return nil
}

// made tells whether this very network made the NetworkAttachmentDefinition, or one of
// the same name that is gone and can have left it. The SR-IOV network operator wrote no
// UID; what it made is known by the owner it wrote, and could be in another namespace
// only for networks in the operator's own.
func (r *network) made(net *render.Network, nad *nadv1.NetworkAttachmentDefinition) bool {
	if nad.Name != net.GetName() || nad.Annotations[sriovv1.AnnotationOwnerRef] != net.OwnerRef() {
		return false
	}
	uid := nad.Annotations[sriovv1.AnnotationOwnerUID]
	_, elsewhere := r.elsewhere(nad)
	return uid == string(net.GetUID()) || elsewhere || uid == "" && slices.Contains([]string{nad.Namespace, r.config.Namespace}, net.GetNamespace())
}

// dropFinalizer takes off the finalizer that the SR-IOV network operator put on.
func (r *network) dropFinalizer(ctx context.Context, object client.Object) error {
	before := client.MergeFromWithOptions(object.DeepCopyObject().(client.Object), client.MergeFromWithOptimisticLock{})
	if !controllerutil.RemoveFinalizer(object, sriovv1.FinalizerNetAttDef) {
		return nil
	}
	if err := r.Patch(ctx, object, before, fieldOwner); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("take the finalizer off network %s: %w", client.ObjectKeyFromObject(object), err)
	}
	return nil
}

// report writes the conditions, if they changed. No refusal means ready.
func (r *network) report(ctx context.Context, object client.Object, refused *refusal) error {
	net, _ := render.Of(object)
	var unready why // for good or ill it is done at once, so that nothing ever goes on
	if refused != nil {
		unready = why{refused.reason, refused.message}
	}
	fine := why{sriovv1.ReasonNetworkReady, fmt.Sprintf("NetworkAttachmentDefinition %s/%s is as this network wants it", net.Target, net.GetName())}
	if idle := net.Idle(); idle != "" {
		fine.message += "; " + idle
	}
	all, own := merge(net.Status.Conditions, conditions(net.GetGeneration(), unready, why{}, unready, fine))
	status := &sriovv1.NetworkStatus{Conditions: own, ObservedGeneration: net.GetGeneration()}
	if equality.Semantic.DeepEqual(all, net.Status.Conditions) && status.ObservedGeneration == net.Status.ObservedGeneration {
		return nil
	}
	kind, err := r.GroupVersionKindFor(object)
	if err != nil {
		return err
	}
	if err := writeStatus(ctx, r, kind, client.ObjectKeyFromObject(object), status); err != nil {
		return client.IgnoreNotFound(err)
	}
	reportTransition(r.events, object, net.Status.Conditions, all)
	return nil
}
