package admission

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	admissionv1 "k8s.io/api/admission/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/sluice-network/sluice/operator/inject"
)

// Injector gives pods what their networks need, before they are written.
type Injector struct{ live client.Reader }

// NewInjector reads from the API server itself: a definition may be as new as its pod.
func NewInjector(live client.Reader) *Injector { return &Injector{live} }

// A network that is applied together with its pod takes its controller a moment to make
// the NetworkAttachmentDefinition of.
const (
	definitionWait = 2 * time.Second
	definitionLook = 100 * time.Millisecond
)

// Handle answers one request. A pod whose networks are not there is refused, because it
// could never have them: what it asks for cannot be changed later. Whoever made it, if it
// was a controller, tries again.
func (i *Injector) Handle(ctx context.Context, request admission.Request) admission.Response {
	pod, err := inject.Parse(request.Object.Raw, request.Namespace)
	if err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	names, err := pod.Networks()
	if err != nil { // whoever attaches the pod may read it otherwise
		return admission.Allowed("").WithWarnings("the pod is given nothing for its networks: " + err.Error())
	}
	definitions, missing, err := i.definitions(ctx, names)
	switch {
	case meta.IsNoMatchError(err):
		return admission.Allowed("").WithWarnings("the cluster has no kind NetworkAttachmentDefinition, so the pod gets no networks: install Multus and its CustomResourceDefinition")
	case err != nil:
		ctrl.LoggerFrom(ctx).Error(err, "Could not give a pod what its networks need", "namespace", request.Namespace, "name", request.Name)
		return admission.Errored(http.StatusInternalServerError, err)
	case missing != nil && request.DryRun != nil && *request.DryRun: // which makes no networks either
		return admission.Allowed("").WithWarnings(fmt.Sprintf("metadata.annotations: there is no NetworkAttachmentDefinition %s, without which the pod would be refused", missing))
	case missing != nil:
		return admission.Denied(fmt.Sprintf("metadata.annotations: there is no NetworkAttachmentDefinition %s, so nobody can say what the pod must ask for: make it, or the network that makes it, before the pod, or take it out of the annotation", missing))
	}
	patch, warnings, err := pod.Patch(definitions)
	if err != nil {
		return admission.Denied(err.Error())
	}
	response := admission.Allowed("").WithWarnings(warnings...)
	if len(patch) == 0 {
		return response
	}
	if response.Patch, err = json.Marshal(patch); err != nil {
		return admission.Errored(http.StatusInternalServerError, fmt.Errorf("write the patch: %w", err))
	}
	response.PatchType = new(admissionv1.PatchTypeJSONPatch)
	return response
}

// definitions reads the annotations of NetworkAttachmentDefinitions, or names one that is
// missing.
func (i *Injector) definitions(ctx context.Context, names []types.NamespacedName) (all map[types.NamespacedName]map[string]string, missing *types.NamespacedName, err error) {
	all = map[types.NamespacedName]map[string]string{}
	made := time.Now().Add(definitionWait) // by then what was about to be made is
	for _, name := range names {
		if _, read := all[name]; read {
			continue
		}
		definition := &metav1.PartialObjectMetadata{}
		definition.SetGroupVersionKind(nadv1.SchemeGroupVersion.WithKind("NetworkAttachmentDefinition"))
		absent := false
		err = wait.PollUntilContextCancel(ctx, definitionLook, true, func(ctx context.Context) (bool, error) {
			err := i.live.Get(ctx, name, definition)
			absent = apierrors.IsNotFound(err)
			return err == nil || absent && time.Now().After(made), client.IgnoreNotFound(err)
		})
		switch {
		case err != nil:
			return nil, nil, fmt.Errorf("read NetworkAttachmentDefinition %s: %w", name, err)
		case absent:
			return nil, &name, nil
		}
		all[name] = definition.Annotations
	}
	return all, nil, nil
}
