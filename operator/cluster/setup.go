package cluster

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	registrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/cluster/admission"
)

// fieldOwner is the field manager of all that the operator applies.
const fieldOwner = client.FieldOwner("sluice-operator")

// Config is what the controllers need to be told.
type Config struct {
	// Namespace is the operator's own: its policies are the ones that count, and its node
	// states the ones that agents read.
	Namespace string
	// ResourcePrefix goes before the names of resources, without a slash.
	ResourcePrefix string
	// AgentImage is what the agents run: the operator's own image.
	AgentImage string
	// ImagePullSecrets are the agents', in the operator's namespace.
	ImagePullSecrets []corev1.LocalObjectReference
	// Webhook is the manager's webhook server; nil for no webhook.
	Webhook *admission.Server
	// WebhookAnnotations are for the webhooks' configurations.
	WebhookAnnotations map[string]string
}

// NewScheme has every kind the controllers use.
func NewScheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, sriovv1.AddToScheme, sluicev1.AddToScheme, nadv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("register kinds: %w", err)
		}
	}
	return scheme, nil
}

// CacheOptions keep policies and node states of other namespaces out of memory.
// Networks are cached from all, because tenants may have their own.
func CacheOptions(config Config) cache.Options {
	own := cache.ByObject{Namespaces: map[string]cache.Config{config.Namespace: {}}}
	named := func(name string) cache.ByObject {
		only := cache.Config{FieldSelector: fields.OneTermEqualSelector("metadata.name", name)}
		return cache.ByObject{Namespaces: map[string]cache.Config{config.Namespace: only}}
	}
	return cache.Options{ByObject: map[client.Object]cache.ByObject{
		&corev1.Secret{}: named(admission.SecretName),
		&registrationv1.ValidatingWebhookConfiguration{}: {Field: fields.OneTermEqualSelector("metadata.name", admission.ConfigurationName)},
		&registrationv1.MutatingWebhookConfiguration{}:   {Field: fields.OneTermEqualSelector("metadata.name", admission.InjectorName)},
		&corev1.Node{}:                                               {Transform: admission.KeepPodCIDRs},
		&sriovv1.SriovNetworkNodePolicy{}:                            own,
		&sriovv1.SriovNetworkNodeState{}:                             own,
		&sriovv1.SriovOperatorConfig{}:                               own,
		&sluicev1.MacvlanNodePolicy{}:                                own,
		&sluicev1.IPPool{}:                                           own,
		&sluicev1.IPBlock{}:                                          own,
		&sriovv1.SriovNetworkPoolConfig{}:                            own,
		&appsv1.DaemonSet{}:                                          named(agentName),
		metadataOf(appsv1.SchemeGroupVersion.WithKind("Deployment")): named(operatorName),
	}}
}

// Setup adds all controllers of this package to the manager.
func Setup(mgr ctrl.Manager, config Config) error {
	recorder := mgr.GetEventRecorder("sluice-operator")
	if err := (&operatorConfig{Client: mgr.GetClient(), live: mgr.GetAPIReader(), settings: config, events: recorder}).setup(mgr); err != nil {
		return fmt.Errorf("set up the operator configuration controller: %w", err)
	}
	verdicts := newTally()
	if err := (&nodeState{Client: mgr.GetClient(), namespace: config.Namespace, tally: verdicts}).setup(mgr); err != nil {
		return fmt.Errorf("set up the node state controller: %w", err)
	}
	if err := (&pool{Client: mgr.GetClient(), namespace: config.Namespace, events: recorder}).setup(mgr); err != nil {
		return fmt.Errorf("set up the pool controller: %w", err)
	}
	if err := (&eviction{Client: mgr.GetClient(), live: mgr.GetAPIReader(), namespace: config.Namespace, events: recorder}).setup(mgr); err != nil {
		return fmt.Errorf("set up the eviction controller: %w", err)
	}
	if err := (&policyStatus{Client: mgr.GetClient(), namespace: config.Namespace, events: recorder, tally: verdicts}).setup(mgr); err != nil {
		return fmt.Errorf("set up the policy status controller: %w", err)
	}
	if err := (&network{Client: mgr.GetClient(), live: mgr.GetAPIReader(), config: config, events: recorder}).setup(mgr); err != nil {
		return fmt.Errorf("set up the network controller: %w", err)
	}
	if err := (&ipPool{Client: mgr.GetClient(), live: mgr.GetAPIReader(), namespace: config.Namespace, events: recorder}).setup(mgr); err != nil {
		return fmt.Errorf("set up the IP pool controller: %w", err)
	}
	if config.Webhook != nil {
		rules := admission.Rules{Namespace: config.Namespace, ResourcePrefix: config.ResourcePrefix, Unsupported: unsupported}
		if err := admission.Setup(mgr, config.Webhook, rules, config.WebhookAnnotations); err != nil {
			return fmt.Errorf("set up the webhook: %w", err)
		}
	}
	return nil
}

// writeStatus applies what the operator says in an object's status, whoever else says it.
func writeStatus(ctx context.Context, c client.Client, kind schema.GroupVersionKind, key client.ObjectKey, status any) error {
	desired, err := applyStatus(kind, key, status)
	if err != nil {
		return err
	}
	if err := c.Status().Apply(ctx, desired, fieldOwner, client.ForceOwnership); err != nil {
		return fmt.Errorf("apply the status of %s %s: %w", kind.Kind, key, err)
	}
	return nil
}

// applyStatus is the status of an object as an apply configuration.
func applyStatus(kind schema.GroupVersionKind, key client.ObjectKey, status any) (runtime.ApplyConfiguration, error) {
	part, err := runtime.DefaultUnstructuredConverter.ToUnstructured(status)
	if err != nil {
		return nil, fmt.Errorf("convert the status of %s %s: %w", kind.Kind, key, err)
	}
	return client.ApplyConfigurationFromUnstructured(&unstructured.Unstructured{Object: map[string]any{
		"apiVersion": kind.GroupVersion().String(), "kind": kind.Kind,
		"metadata": map[string]any{"name": key.Name, "namespace": key.Namespace},
		"status":   part,
	}}), nil
}

// nodeMetadata is a Node of which only metadata is fetched and cached.
func nodeMetadata() *metav1.PartialObjectMetadata {
	return metadataOf(corev1.SchemeGroupVersion.WithKind("Node"))
}

func metadataOf(kind schema.GroupVersionKind) *metav1.PartialObjectMetadata {
	m := &metav1.PartialObjectMetadata{}
	m.SetGroupVersionKind(kind)
	return m
}

func listNodes(ctx context.Context, c client.Reader) ([]metav1.PartialObjectMetadata, error) {
	list := &metav1.PartialObjectMetadataList{}
	list.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NodeList"))
	// They are only read: copies of thousands would cost more than what they are read for.
	if err := c.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	return list.Items, nil
}

// runsLinux tells whether a node can have an agent.
func runsLinux(node *metav1.PartialObjectMetadata) bool {
	return node.Labels[corev1.LabelOSStable] == "linux"
}

// reportTransition records an event when the Ready condition changed its status or reason.
func reportTransition(recorder events.EventRecorder, object client.Object, before, after []metav1.Condition) {
	was, is := meta.FindStatusCondition(before, sriovv1.ConditionReady), meta.FindStatusCondition(after, sriovv1.ConditionReady)
	if is == nil || was != nil && was.Status == is.Status && was.Reason == is.Reason {
		return
	}
	kind := corev1.EventTypeNormal
	if failed := meta.FindStatusCondition(after, sriovv1.ConditionDegraded); is.Status != metav1.ConditionTrue && (failed == nil || failed.Status == metav1.ConditionTrue) {
		kind = corev1.EventTypeWarning
	}
	recorder.Eventf(object, nil, kind, is.Reason, "Reconcile", "%s", shorten(is.Message, 1000))
}

// shorten cuts text that the API server would refuse for its length.
func shorten(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most-3], "") + "..."
}

// rangesPause is how long what stands for all objects of a kind waits, so that they are
// looked at once for what many nodes that come at a time bring along.
const rangesPause = time.Second

// everyAfter has a controller look at key, which stands for all its objects, rangesPause
// after what addresses are used may have changed.
func everyAfter[K comparable](key K) handler.TypedFuncs[client.Object, K] {
	return handler.TypedFuncs[client.Object, K]{
		CreateFunc: func(_ context.Context, _ event.TypedCreateEvent[client.Object], queue workqueue.TypedRateLimitingInterface[K]) {
			queue.AddAfter(key, rangesPause)
		},
		UpdateFunc: func(_ context.Context, e event.TypedUpdateEvent[client.Object], queue workqueue.TypedRateLimitingInterface[K]) {
			changed := true
			switch before := e.ObjectOld.(type) {
			case *corev1.Node:
				changed = !slices.Equal(before.Spec.PodCIDRs, e.ObjectNew.(*corev1.Node).Spec.PodCIDRs)
			case *sluicev1.IPPool:
				changed = before.Generation != e.ObjectNew.GetGeneration()
			}
			if changed {
				queue.AddAfter(key, rangesPause)
			}
		},
		DeleteFunc: func(_ context.Context, _ event.TypedDeleteEvent[client.Object], queue workqueue.TypedRateLimitingInterface[K]) {
			queue.AddAfter(key, rangesPause)
		},
	}
}

// watchRanges watches what admission.UsedRanges reads.
func watchRanges[K comparable](mgr ctrl.Manager, b *builder.TypedBuilder[K], every handler.TypedFuncs[client.Object, K]) *builder.TypedBuilder[K] {
	b = b.Watches(&corev1.Node{}, every)
	if _, err := mgr.GetRESTMapper().RESTMapping(admission.ServiceCIDR.GroupKind(), admission.ServiceCIDR.Version); err == nil {
		b = b.Watches(&networkingv1.ServiceCIDR{}, every)
	}
	return b
}
