package admission

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	admissionv1 "k8s.io/api/admission/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
)

// answers is an API server that answers reads one after the other.
type answers struct {
	client.Reader
	left []error
	take time.Duration
}

func (a *answers) Get(ctx context.Context, _ client.ObjectKey, o client.Object, _ ...client.GetOption) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(a.take):
	}
	err := a.left[0]
	if len(a.left) > 1 {
		a.left = a.left[1:]
	}
	o.SetAnnotations(map[string]string{"k8s.v1.cni.cncf.io/resourceName": "openshift.io/r"})
	return err
}

func TestInjectorAnswers(t *testing.T) {
	kind := nadv1.SchemeGroupVersion.WithKind("NetworkAttachmentDefinition")
	absent := apierrors.NewNotFound(schema.GroupResource{Resource: "network-attachment-definitions"}, "a")
	for _, c := range []struct {
		name, pod string
		api       []error
		allowed   bool
		code      int32
		says      string
		patches   bool
	}{
		{"a network", `{"metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "a, a"}}, "spec": {"containers": [{"name": "c"}]}}`, []error{nil, errors.New("asked twice")}, true, 0, "", true},
		{"a network that is about to be made", `{"metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "a"}}, "spec": {"containers": [{"name": "c"}]}}`, []error{absent, absent, nil}, true, 0, "", true},
		{"no network", `{"metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "a"}}}`, []error{absent}, false, 403, "there is no NetworkAttachmentDefinition ns/a", false},
		{"a network, of an API server that is slow", `{"metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "a"}}, "spec": {"containers": [{"name": "c"}]}}`, []error{nil}, true, 0, "", true},
		{"no network in a dry run", "", []error{absent}, true, 0, "there is no NetworkAttachmentDefinition ns/a, without which the pod would be refused", false},
		{"no Multus", `{"metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "a"}}}`, []error{&meta.NoKindMatchError{GroupKind: kind.GroupKind()}}, true, 0, "the cluster has no kind NetworkAttachmentDefinition", false},
		{"an API server that fails", `{"metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "a"}}}`, []error{absent, errors.New("busy")}, false, 500, "read NetworkAttachmentDefinition ns/a: busy", false},
		{"nonsense", `{"metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "["}}}`, nil, true, 0, "the pod is given nothing for its networks: annotation k8s.v1.cni.cncf.io/networks: is not a list of networks", false},
		{"no pod", `[]`, nil, false, 400, "read the pod", false},
		{"no annotation", `{"spec": {"containers": [{"name": "c"}]}}`, nil, true, 0, "", false},
	} {
		test := func(t *testing.T) {
			dry := c.pod == ""
			if dry {
				c.pod = `{"metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "a"}}}`
			}
			api := &answers{left: c.api}
			if strings.Contains(c.name, "slow") {
				api.take = 2 * definitionWait
			}
			got := NewInjector(api).Handle(t.Context(), admission.Request{AdmissionRequest: admissionv1.AdmissionRequest{Namespace: "ns", DryRun: &dry, Object: runtime.RawExtension{Raw: []byte(c.pod)}}})
			said := strings.Join(got.Warnings, "; ")
			if got.Result != nil {
				said += got.Result.Message
			}
			if got.Allowed != c.allowed || !c.allowed && got.Result.Code != c.code || !strings.Contains(said, c.says) || (len(got.Patch) > 0) != c.patches {
				t.Errorf("the answer is %+v", got)
			}
		}
		t.Run(c.name, func(t *testing.T) { synctest.Test(t, test) })
	}
}
