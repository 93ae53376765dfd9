package ipam

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/sluice-network/sluice/apis/sluice/v1alpha1"
)

// Server is Claims at an API server, and follows the pools there.
type Server struct {
	client    client.WithWatch
	namespace string
}

// Connect returns the claims and pools of the operator's namespace.
func Connect(config *rest.Config, namespace string) (*Server, error) {
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("register API types: %w", err)
	}
	c, err := client.NewWithWatch(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("connect to the API server: %w", err)
	}
	return &Server{c, namespace}, nil
}

// Of implements Claims.
func (s *Server) Of(ctx context.Context, pool string) ([]v1alpha1.IPBlock, error) {
	return s.list(ctx, client.MatchingFields{"spec.pool": pool})
}

// Own implements Claims.
func (s *Server) Own(ctx context.Context, node string) ([]v1alpha1.IPBlock, error) {
	return s.list(ctx, client.MatchingFields{"spec.node": node})
}

// list has no resource version, so that nothing is missing which was written before.
func (s *Server) list(ctx context.Context, which client.MatchingFields) ([]v1alpha1.IPBlock, error) {
	list := &v1alpha1.IPBlockList{}
	err := s.client.List(ctx, list, client.InNamespace(s.namespace), which)
	return list.Items, err
}

// Get implements Claims.
func (s *Server) Get(ctx context.Context, name string) (*v1alpha1.IPBlock, error) {
	b := &v1alpha1.IPBlock{}
	return b, s.client.Get(ctx, client.ObjectKey{Namespace: s.namespace, Name: name}, b)
}

// Create implements Claims.
func (s *Server) Create(ctx context.Context, b *v1alpha1.IPBlock) error {
	b.Namespace = s.namespace
	return s.client.Create(ctx, b)
}

// Update implements Claims. The object has the version that was read.
func (s *Server) Update(ctx context.Context, b *v1alpha1.IPBlock) error {
	return s.client.Update(ctx, b)
}

// Delete implements Claims.
func (s *Server) Delete(ctx context.Context, name, uid string) error {
	b := &v1alpha1.IPBlock{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name}}
	id := types.UID(uid)
	err := s.client.Delete(ctx, b, client.Preconditions{UID: &id})
	if apierrors.IsConflict(err) { // another one has this name by now
		return nil
	}
	return client.IgnoreNotFound(err)
}

// Report implements Claims.
func (s *Server) Report(ctx context.Context, name string, status v1alpha1.IPBlockStatus) error {
	b := &v1alpha1.IPBlock{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name}}
	patch := fmt.Appendf(nil, `{"status":{"allocated":%d,"resting":%d}}`, status.Allocated, status.Resting)
	return client.IgnoreNotFound(s.client.Status().Patch(ctx, b, client.RawPatch(types.MergePatchType, patch)))
}

// Follow tells the node of all pools, as they come, change and go, until ctx ends.
func (s *Server) Follow(ctx context.Context, n *Node) {
	in := func(o metav1.ListOptions) *client.ListOptions {
		return &client.ListOptions{Raw: &o, Namespace: s.namespace, FieldSelector: fields.Everything()}
	}
	_, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				list := &v1alpha1.IPPoolList{}
				return list, s.client.List(ctx, list, in(o))
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				return s.client.Watch(ctx, &v1alpha1.IPPoolList{}, in(o))
			},
		}, s.client),
		ObjectType: &v1alpha1.IPPool{}, Handler: told(n),
	})
	controller.RunWithContext(ctx)
}

// told tells the node of what an informer says of pools.
func told(n *Node) cache.ResourceEventHandlerFuncs {
	set := func(obj any) {
		if p, ok := obj.(*v1alpha1.IPPool); ok {
			n.SetPool(p.Name, p.Spec.DeepCopy())
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc: set,
		UpdateFunc: func(was, is any) {
			a, known := was.(*v1alpha1.IPPool)
			b, ok := is.(*v1alpha1.IPPool)
			// One made anew while nobody watched has another UID, and may have the generation.
			if !known || !ok || a.UID != b.UID || a.Generation != b.Generation {
				set(is)
			}
		},
		DeleteFunc: func(obj any) {
			if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = gone.Obj
			}
			if p, ok := obj.(*v1alpha1.IPPool); ok {
				n.SetPool(p.Name, nil)
			}
		},
	}
}
