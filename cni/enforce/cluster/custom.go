package cluster

import (
	"context"
	"slices"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

const group = "k8s.cni.cncf.io"

var definitions = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// customKind follows a kind while its CustomResourceDefinition is there.
type customKind struct {
	kind              // its CustomResourceDefinition
	objects  *failure // of the kind itself
	versions []string // that are known, the best first
	start    func(ctx context.Context, version string) (cache.Store, cache.Controller)
	forget   func(o any)

	mu      sync.Mutex
	ctx     context.Context
	version string // followed; empty for none
	stop    context.CancelFunc
	store   cache.Store
	follow  cache.Controller
}

func newCustomKind[T any](c *Cluster, resource string, versions []string, read func(*unstructured.Unstructured) (T, error), set, gone func(T)) *customKind {
	k := &customKind{kind: kind{resource: resource, failure: &failure{}}, objects: &failure{}, versions: versions, forget: func(o any) { gone(o.(*entry[T]).of) }}
	k.start = func(ctx context.Context, version string) (cache.Store, cache.Controller) {
		lw := c.dynamicListWatch(schema.GroupVersionResource{Group: group, Version: version, Resource: resource}, "", k.objects)
		return cache.NewInformerWithOptions(options(lw, &unstructured.Unstructured{}, read, set, gone))
	}
	k.Controller = definitionInformer(c, k)
	return k
}

func definitionInformer(c *Cluster, k *customKind) cache.Controller {
	served := func(o *unstructured.Unstructured) ([]string, error) {
		versions, _, _ := unstructured.NestedSlice(o.Object, "spec", "versions")
		var names []string
		for _, v := range versions {
			if v, ok := v.(map[string]any); ok && v["served"] == true {
				name, _ := v["name"].(string)
				names = append(names, name)
			}
		}
		return names, nil
	}
	lw := c.dynamicListWatch(definitions, k.resource+"."+group, k.failure)
	_, follow := cache.NewInformerWithOptions(options(lw, &unstructured.Unstructured{}, served, k.serve, func([]string) { k.serve(nil) }))
	return follow
}

// dynamicListWatch lists and watches all objects of a resource, or the one of the name.
func (c *Cluster) dynamicListWatch(resource schema.GroupVersionResource, name string, f *failure) cache.ListerWatcher {
	only := func(o metav1.ListOptions) metav1.ListOptions {
		if name != "" {
			o.FieldSelector = fields.OneTermEqualSelector("metadata.name", name).String()
		}
		return o
	}
	return cache.ToListWatcherWithWatchListSemantics(noting(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return c.dynamic.Resource(resource).List(ctx, only(o))
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return c.dynamic.Resource(resource).Watch(ctx, only(o))
		},
	}, f), c.dynamic)
}

func (k *customKind) run(ctx context.Context) {
	k.mu.Lock()
	k.ctx = ctx
	k.mu.Unlock()
	go k.RunWithContext(ctx)
}

// missing is why not all objects are known, nil when they are.
func (k *customKind) missing() error {
	if !k.HasSynced() {
		return kind{resource: "whether there are " + k.resource, failure: k.failure}.missing()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.version == "" || k.follow.HasSynced() {
		return nil
	}
	return kind{resource: k.resource, failure: k.objects}.missing()
}

// serve follows the best of the versions, all of which have the same objects. A version
// that is followed stays, as long as it is served.
func (k *customKind) serve(served []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.version != "" && slices.Contains(served, k.version) {
		return
	}
	before := k.store
	if k.version != "" {
		k.stop()
	}
	k.version, k.store, k.follow = "", nil, nil
	if i := slices.IndexFunc(k.versions, func(v string) bool { return slices.Contains(served, v) }); i >= 0 {
		var ctx context.Context
		ctx, k.stop = context.WithCancel(k.ctx)
		k.version = k.versions[i]
		k.store, k.follow = k.start(ctx, k.version)
		go k.follow.RunWithContext(ctx)
		go k.clean(ctx, before, k.store, k.follow)
		return
	}
	if before != nil {
		for _, o := range before.List() {
			k.forget(o)
		}
	}
}

// clean forgets what was there under another version and is not under this one.
func (k *customKind) clean(ctx context.Context, before, now cache.Store, follow cache.Controller) {
	if before == nil || !cache.WaitForCacheSync(ctx.Done(), follow.HasSynced) {
		return
	}
	for _, key := range before.ListKeys() {
		if _, still, _ := now.GetByKey(key); !still {
			if o, ok, _ := before.GetByKey(key); ok {
				k.forget(o)
			}
		}
	}
}
