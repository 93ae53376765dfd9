package node

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// FieldOwner owns the status of SriovNetworkNodeStates in server-side apply.
const FieldOwner = "sluice-agent"

// Server is States at an API server.
type Server struct {
	client client.WithWatch
	events record.EventRecorder
	key    types.NamespacedName
}

// NewServer returns the States of the node's object in the namespace. The
// client's scheme has the sriovnetwork group.
func NewServer(c client.WithWatch, events record.EventRecorder, namespace, node string) *Server {
	return &Server{client: c, events: events, key: types.NamespacedName{Namespace: namespace, Name: node}}
}

// Connect returns the States of the node's object in the namespace, and a
// function that ends the sending of events.
func Connect(config *rest.Config, namespace, node string) (*Server, func(), error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{v1.AddToScheme, clientgoscheme.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, nil, fmt.Errorf("register API types: %w", err)
		}
	}
	c, err := client.NewWithWatch(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, nil, fmt.Errorf("connect to the API server: %w", err)
	}
	core, err := typedcorev1.NewForConfig(config)
	if err != nil {
		return nil, nil, fmt.Errorf("connect to the API server: %w", err)
	}
	broadcaster := record.NewBroadcaster()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: core.Events("")})
	recorder := broadcaster.NewRecorder(scheme, corev1.EventSource{Component: FieldOwner, Host: node})
	return NewServer(c, recorder, namespace, node), broadcaster.Shutdown, nil
}

// Watch follows the one object, whatever else there is in the namespace.
func (s *Server) Watch(ctx context.Context) <-chan *v1.SriovNetworkNodeState {
	own := func(o metav1.ListOptions) *client.ListOptions {
		return &client.ListOptions{Raw: &o, Namespace: s.key.Namespace, FieldSelector: fields.OneTermEqualSelector("metadata.name", s.key.Name)}
	}
	newest := make(chan *v1.SriovNetworkNodeState, 1)
	send := func(state *v1.SriovNetworkNodeState) {
		select {
		case <-newest: // older, and not taken yet
		default:
		}
		newest <- state
	}
	take := func(obj any) {
		if state, ok := obj.(*v1.SriovNetworkNodeState); ok {
			send(state.DeepCopy())
		}
	}
	_, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				list := &v1.SriovNetworkNodeStateList{}
				return list, s.client.List(ctx, list, own(o))
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				return s.client.Watch(ctx, &v1.SriovNetworkNodeStateList{}, own(o))
			},
		}, s.client),
		ObjectType: &v1.SriovNetworkNodeState{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    take,
			UpdateFunc: func(_, obj any) { take(obj) },
			DeleteFunc: func(any) { send(nil) },
		},
	})
	go func() {
		controller.RunWithContext(ctx)
		close(newest)
	}()
	return newest
}

// ApplyStatus applies the status as the agent's own, whoever else wrote it.
func (s *Server) ApplyStatus(ctx context.Context, status *v1.SriovNetworkNodeStateStatus) error {
	fields, err := runtime.DefaultUnstructuredConverter.ToUnstructured(status)
	if err != nil {
		return fmt.Errorf("encode the status of SriovNetworkNodeState %s: %w", s.key, err)
	}
	object := &unstructured.Unstructured{Object: map[string]any{"status": fields}}
	object.SetGroupVersionKind(v1.SchemeGroupVersion.WithKind("SriovNetworkNodeState"))
	object.SetNamespace(s.key.Namespace)
	object.SetName(s.key.Name)
	err = s.client.SubResource("status").Apply(ctx, client.ApplyConfigurationFromUnstructured(object), client.FieldOwner(FieldOwner), client.ForceOwnership)
	if err != nil {
		return fmt.Errorf("apply the status of SriovNetworkNodeState %s: %w", s.key, err)
	}
	return nil
}

// Recorder makes events about other objects, in the agent's name.
func (s *Server) Recorder() record.EventRecorder { return s.events }

// Event records an event about the object.
func (s *Server) Event(state *v1.SriovNetworkNodeState, eventType, reason, message string) {
	s.events.Event(state, eventType, reason, message)
}
