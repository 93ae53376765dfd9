package enforce

import (
	"context"
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apitypes "k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
)

// API is where the state of enforcement is shown.
type API interface {
	// Annotate gives the pod the annotation Annotation, or removes it where value is
	// empty. A pod that is gone is no error.
	Annotate(ctx context.Context, namespace, name, uid, value string) error
	// Event is about a pod or a policy.
	Event(about corev1.ObjectReference, warning bool, reason, message string)
}

// server is API at an API server.
type server struct {
	core   corev1client.CoreV1Interface
	events record.EventRecorder
}

// Connect returns the API; it connects when it is first used.
func Connect(config *rest.Config, events record.EventRecorder) (API, error) {
	core, err := corev1client.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("reach the API server: %w", err)
	}
	return &server{core, events}, nil
}

// Annotate implements API.
func (s *server) Annotate(ctx context.Context, namespace, name, uid, value string) error {
	annotations := map[string]any{Annotation: nil}
	if value != "" {
		annotations[Annotation] = value
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": uid, "annotations": annotations}})
	if err != nil {
		return err
	}
	_, err = s.core.Pods(namespace).Patch(ctx, name, apitypes.MergePatchType, patch, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) { // gone, or another has its name
		return nil
	}
	if err != nil {
		return fmt.Errorf("write %s of pod %s/%s: %w", Annotation, namespace, name, err)
	}
	return nil
}

// Event implements API.
func (s *server) Event(about corev1.ObjectReference, warning bool, reason, message string) {
	kind := corev1.EventTypeNormal
	if warning {
		kind = corev1.EventTypeWarning
	}
	s.events.Event(&about, kind, reason, message)
}
