package cluster

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/go-logr/logr"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/sluice-network/sluice/cni/policy"
)

// Sink is told what there is, each time that it changes. Calls may come side by side.
type Sink interface {
	SetPod(p *Pod)
	DeletePod(namespace, name string)
	SetNamespace(n policy.Namespace)
	DeleteNamespace(name string)
	SetNetwork(n policy.Network)
	DeleteNetwork(name string)
	SetPolicy(p Policy)
	DeletePolicy(p Policy)
}

// Pod is what is kept of a pod.
type Pod struct {
	policy.Pod
	// Annotations that are used, of pods of the own node. Nil for others.
	Annotations map[string]string
}

// Policy is a policy, and what object it is.
type Policy struct {
	*policy.Policy
	APIVersion, UID string
}

// Object is the policy, for an event about it.
func (p Policy) Object() corev1.ObjectReference {
	return corev1.ObjectReference{Kind: p.Kind, APIVersion: p.APIVersion, Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID)}
}

// MirrorAnnotation of a static pod's object is the UID that the kubelet knows the pod by.
const MirrorAnnotation = corev1.MirrorPodAnnotationKey

// DefaultNetworkAnnotation of a pod names the network that Multus makes its first interface by.
const DefaultNetworkAnnotation = "v1.multus-cni.io/default-network"

// Cluster follows an API server.
type Cluster struct {
	log     logr.Logger
	own     func(*corev1.Pod) bool
	keep    []string // annotations of own pods
	core    kubernetes.Interface
	dynamic dynamic.Interface

	server string // its address
	pods   cache.Store
	kinds  []kind
	custom []*customKind
}

// kind is one of those that are followed.
type kind struct {
	cache.Controller
	resource string
	failure  *failure
}

// failure is why the API server does not tell of a kind, nil while it does.
type failure struct {
	mu  sync.Mutex
	err error
}

func (f *failure) note(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

// missing is why the kind is not known.
func (k kind) missing() error {
	k.failure.mu.Lock()
	defer k.failure.mu.Unlock()
	if k.failure.err == nil {
		return fmt.Errorf("it has not told all %s yet", k.resource)
	}
	return fmt.Errorf("it does not tell %s: %w", k.resource, k.failure.err)
}

// New makes a Cluster. keep are the annotations that are wanted of the node's own pods.
func New(config *rest.Config, node string, keep []string, sink Sink, log logr.Logger) (*Cluster, error) {
	return connect(config, func(p *corev1.Pod) bool { return p.Spec.NodeName == node }, keep, sink, log)
}

// NewForAll makes a Cluster that keeps the annotations of all pods.
func NewForAll(config *rest.Config, keep []string, sink Sink, log logr.Logger) (*Cluster, error) {
	return connect(config, func(*corev1.Pod) bool { return true }, keep, sink, log)
}

func connect(config *rest.Config, own func(*corev1.Pod) bool, keep []string, sink Sink, log logr.Logger) (*Cluster, error) {
	core, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("reach the API server: %w", err)
	}
	custom, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("reach the API server: %w", err)
	}
	c := &Cluster{log: log, own: own, keep: append(keep, MirrorAnnotation, DefaultNetworkAnnotation, nadv1.NetworkAttachmentAnnot), core: core, dynamic: custom, server: config.Host}
	pods, namespaces, policies := kind{resource: "pods", failure: &failure{}}, kind{resource: "namespaces", failure: &failure{}}, kind{resource: "networkpolicies", failure: &failure{}}
	c.pods, pods.Controller = inform(core.CoreV1().RESTClient(), pods, &corev1.Pod{}, c.readPod, sink.SetPod,
		func(p *Pod) { sink.DeletePod(p.Namespace, p.Name) })
	_, namespaces.Controller = inform(core.CoreV1().RESTClient(), namespaces, &corev1.Namespace{},
		func(n *corev1.Namespace) (policy.Namespace, error) { return policy.ReadNamespace(n), nil }, sink.SetNamespace,
		func(n policy.Namespace) { sink.DeleteNamespace(n.Name) })
	_, policies.Controller = inform(core.NetworkingV1().RESTClient(), policies, &networkingv1.NetworkPolicy{}, func(p *networkingv1.NetworkPolicy) (Policy, error) {
		return Policy{policy.ReadNetworkPolicy(p), "networking.k8s.io/v1", string(p.UID)}, nil
	}, sink.SetPolicy, sink.DeletePolicy)
	c.kinds = []kind{pods, namespaces, policies}
	c.custom = []*customKind{
		newCustomKind(c, "network-attachment-definitions", []string{"v1"}, c.readNetwork, sink.SetNetwork, func(n policy.Network) { sink.DeleteNetwork(n.Name) }),
		newCustomKind(c, "multi-networkpolicies", []string{"v1beta2", "v1beta1"}, c.readMultiNetworkPolicy, sink.SetPolicy, sink.DeletePolicy),
	}
	return c, nil
}

// Run follows the API server until ctx ends.
func (c *Cluster) Run(ctx context.Context) {
	for _, k := range c.kinds {
		go k.RunWithContext(ctx)
	}
	for _, k := range c.custom {
		k.run(ctx)
	}
	<-ctx.Done()
}

// Synced tells whether the Sink knows all that there is.
func (c *Cluster) Synced() bool { return c.Missing() == nil }

// Missing says what the Sink does not know yet, why, and what mends it; nil when it knows
// all that there is.
func (c *Cluster) Missing() error {
	var missing error
	for _, k := range c.kinds {
		if missing == nil && !k.HasSynced() {
			missing = k.missing()
		}
	}
	for _, k := range c.custom {
		if missing == nil {
			missing = k.missing()
		}
	}
	if missing == nil {
		return nil
	}
	return fmt.Errorf("of the API server %s: %w: see that the node reaches it, and that ClusterRole sluice-agent lets the agent list them", c.server, missing)
}

// Known returns the pod as it was last seen.
func (c *Cluster) Known(namespace, name string) (*Pod, bool) {
	o, ok, _ := c.pods.GetByKey(namespace + "/" + name)
	if !ok {
		return nil, false
	}
	return o.(*entry[*Pod]).of, true
}

// look is how often a pod is looked for that is not known yet.
const look = 20 * time.Millisecond

// Pod returns the pod that a runtime says it makes an interface for: the API server has
// it, but this node may be told of it a moment later. It answers within the time to wait,
// after half of which it asks. An empty UID is any pod of the name.
func (c *Cluster) Pod(ctx context.Context, namespace, name, uid string, wait time.Duration) (*Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for end := time.Now().Add(wait / 2); ; {
		if p, ok := c.Known(namespace, name); ok && p.Is(uid) {
			return p, nil
		}
		if time.Now().After(end) {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(look):
		}
	}
	o, err := c.core.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("the API server %s has not told this node of pod %s/%s, and asked for it: %w: see that the node reaches it", c.server, namespace, name, err)
	}
	if p, _ := c.readPod(o); p.Is(uid) {
		return p, nil
	}
	return nil, fmt.Errorf("pod %s/%s with UID %s is gone: another one has its name", namespace, name, uid)
}

// Gone tells whether an error of Pod says that there is no such pod.
func Gone(err error) bool { return apierrors.IsNotFound(err) }

// Is tells whether the pod is the one that a runtime knows by the UID.
func (p *Pod) Is(uid string) bool {
	return uid == "" || uid == p.UID || uid == p.Annotations[MirrorAnnotation]
}

func (c *Cluster) readPod(o *corev1.Pod) (*Pod, error) {
	read, err := policy.ReadPod(o)
	if err != nil {
		c.log.Error(err, "A pod is nobody's peer")
	}
	p := &Pod{Pod: read}
	if !c.own(o) {
		if len(p.Interfaces) == 0 { // nobody's peer, as most pods are
			p.Labels, p.Ports = nil, nil
		}
		return p, nil
	}
	for _, key := range c.keep {
		if v, ok := o.Annotations[key]; ok {
			if p.Annotations == nil {
				p.Annotations = map[string]string{}
			}
			p.Annotations[key] = v
		}
	}
	return p, nil
}

func (c *Cluster) readNetwork(o *unstructured.Unstructured) (policy.Network, error) {
	n, err := policy.ReadNetwork(&nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{
		Namespace: o.GetNamespace(), Name: o.GetName(), Annotations: o.GetAnnotations(),
	}})
	if err != nil {
		c.log.Error(err, "A network's annotation is not valid")
	}
	return n, nil
}

func (c *Cluster) readMultiNetworkPolicy(o *unstructured.Unstructured) (Policy, error) {
	raw, err := o.MarshalJSON()
	if err != nil {
		return Policy{}, err
	}
	p, err := policy.ReadMultiNetworkPolicy(raw)
	return Policy{p, o.GetAPIVersion(), string(o.GetUID())}, err
}

// entry is what a store keeps of an object: whose it is, and what was read of it.
type entry[T any] struct {
	metav1.ObjectMeta
	of T
}

// object is a pointer to an API type.
type object interface {
	runtime.Object
	metav1.Object
}

// inform follows a kind of Kubernetes' own.
func inform[O object, T any](client cache.Getter, k kind, empty O, read func(O) (T, error), set, gone func(T)) (cache.Store, cache.Controller) {
	lw := noting(cache.NewListWatchFromClient(client, k.resource, metav1.NamespaceAll, fields.Everything()), k.failure)
	return cache.NewInformerWithOptions(options(cache.ToListWatcherWithWatchListSemantics(lw, client), empty, read, set, gone))
}

// noting has the failure know how the last request ended.
func noting(lw *cache.ListWatch, f *failure) *cache.ListWatch {
	list, watched := lw.ListWithContextFunc, lw.WatchFuncWithContext
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			all, err := list(ctx, o)
			f.note(err)
			return all, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := watched(ctx, o)
			f.note(err)
			return w, err
		},
	}
}

// options are those of an informer that keeps of an object what read makes of it.
func options[O object, T any](lw cache.ListerWatcher, kind O, read func(O) (T, error), set, gone func(T)) cache.InformerOptions {
	return cache.InformerOptions{
		ListerWatcher: lw, ObjectType: kind,
		Transform: func(o any) (any, error) {
			full, ok := o.(O)
			if !ok {
				return o, nil // read before
			}
			of, err := read(full)
			if err != nil {
				return nil, err
			}
			e := &entry[T]{of: of}
			e.Namespace, e.Name, e.UID, e.ResourceVersion = full.GetNamespace(), full.GetName(), full.GetUID(), full.GetResourceVersion()
			return e, nil
		},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { set(o.(*entry[T]).of) },
			UpdateFunc: func(_, o any) { set(o.(*entry[T]).of) },
			DeleteFunc: func(o any) {
				if d, unknown := o.(cache.DeletedFinalStateUnknown); unknown {
					o = d.Obj
				}
				gone(o.(*entry[T]).of)
			},
		},
	}
}
