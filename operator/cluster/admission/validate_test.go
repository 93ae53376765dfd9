package admission

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// empty is a cluster of one Linux node with nothing else in it, or one that cannot be read.
type empty struct{ err error }

func (e empty) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return e.err
}

func (e empty) List(_ context.Context, list client.ObjectList, _ ...client.ListOption) error {
	if nodes, ok := list.(*metav1.PartialObjectMetadataList); ok {
		nodes.Items = []metav1.PartialObjectMetadata{{ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: map[string]string{corev1.LabelOSStable: "linux"}}}}
	}
	return e.err
}

func validator(t testing.TB, reader client.Reader) *Validator {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{sriovv1.AddToScheme, sluicev1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	return NewValidator(reader, scheme, Rules{Namespace: "ops", ResourcePrefix: "openshift.io", Unsupported: func(*sriovv1.SriovOperatorConfigSpec) []string { return nil }})
}

func request(kind, operation, object, old string) admission.Request {
	r := admission.Request{AdmissionRequest: admissionv1.AdmissionRequest{Namespace: "ops", Operation: admissionv1.Operation(operation)}}
	r.Kind.Kind, r.Kind.Group = kind, sriovv1.GroupName
	if strings.HasPrefix(kind, "Macvlan") {
		r.Kind.Group = sluicev1.GroupName
	}
	r.Object.Raw, r.OldObject.Raw = []byte(object), []byte(old)
	return r
}

func TestHandle(t *testing.T) {
	const bad, good = `{"metadata": {"name": "a"}, "spec": {"resourceName": "r", "ipam": "{"}}`, `{"metadata": {"name": "a"}, "spec": {"resourceName": "r"}}`
	for _, c := range []struct {
		name    string
		request admission.Request
		reader  empty
		code    int32 // 0: allowed
	}{
		{"a good network", request("SriovNetwork", "CREATE", good, ""), empty{}, 0},
		{"a bad network", request("SriovNetwork", "CREATE", bad, ""), empty{}, http.StatusUnprocessableEntity},
		{"one made bad", request("SriovNetwork", "UPDATE", bad, good), empty{}, http.StatusUnprocessableEntity},
		{"one that was bad", request("SriovNetwork", "UPDATE", bad, bad), empty{}, 0},
		{"one that goes", request("SriovNetwork", "UPDATE", strings.Replace(bad, `"a"`, `"a", "deletionTimestamp": "2026-01-01T00:00:00Z"`, 1), good), empty{}, 0},
		{"no JSON", request("SriovNetwork", "CREATE", "{", ""), empty{}, http.StatusBadRequest},
		{"nothing", request("SriovNetwork", "CREATE", "", ""), empty{}, http.StatusBadRequest},
		{"an update of nothing", request("SriovNetwork", "UPDATE", good, ""), empty{}, http.StatusBadRequest},
		{"a delete", request("SriovNetwork", "DELETE", "", good), empty{}, http.StatusBadRequest},
		{"another kind", request("SriovNetworkNodeState", "CREATE", good, ""), empty{}, http.StatusBadRequest},
		{"a cluster that cannot be read", request("SriovNetworkPoolConfig", "CREATE", good, ""), empty{errors.New("no cache")}, http.StatusInternalServerError},
	} {
		response := validator(t, c.reader).Handle(t.Context(), c.request)
		if response.Allowed != (c.code == 0) || !response.Allowed && (response.Result.Code != c.code || response.Result.Message == "") {
			t.Errorf("%s: the answer is %+v %+v", c.name, response.AdmissionResponse, response.Result)
		}
	}
}

// Whatever an API server sends, there is an answer, and a refusal says why.
func FuzzHandle(f *testing.F) {
	for kind, spec := range map[string]string{
		"SriovNetworkNodePolicy": `{"resourceName": "r", "nodeSelector": {}, "numVfs": 1, "nicSelector": {"pfNames": ["a#0-1,3"], "x": 1}}`,
		"SriovNetwork":           `{"ipam": "{", "metaPlugins": "x", "capabilities": "[]"}`,
		"OVSNetwork":             `{"trunk": [null, {"id": 1}]}`,
		"SriovIBNetwork":         `{"networkNamespace": "x"}`,
		"SriovOperatorConfig":    `{"disableDrain": true}`,
		"SriovNetworkPoolConfig": `{"maxUnavailable": "x", "nodeSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}`,
		"MacvlanNodePolicy":      `{"parentSelector": {"kinds": ["bond"], "x": null}, "slots": 1}`,
		"MacvlanNetwork":         `{"master": "a"}`,
	} {
		f.Add(kind, "CREATE", `{"metadata": {"name": "a"}, "spec": `+spec+`}`, "")
		f.Add(kind, "UPDATE", `{"metadata": {"name": "a"}, "spec": `+spec+`}`, `{"metadata": {"name": "a"}}`)
	}
	f.Fuzz(func(t *testing.T, kind, operation, object, old string) {
		response := validator(t, empty{}).Handle(t.Context(), request(kind, operation, object, old))
		if !response.Allowed && response.Result.Message == "" {
			t.Errorf("%s is refused without a word", object)
		}
		if _, err := json.Marshal(response.AdmissionResponse); err != nil {
			t.Error(err)
		}
	})
}

func TestMountedCertificate(t *testing.T) {
	dir := t.TempDir()
	s, err := NewServer(0, dir)
	if err != nil || s.mounted {
		t.Fatalf("an empty directory has a certificate: %v", err)
	}
	for _, file := range []string{"tls.crt", "tls.key"} {
		if err := os.WriteFile(filepath.Join(dir, file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if s, err = NewServer(0, dir); err != nil || !s.mounted {
		t.Fatalf("the certificate is not seen: %v", err)
	}
	if ca, err := s.mountedCA(); err != nil || ca != nil {
		t.Errorf("the CA is %q: %v", ca, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if ca, err := s.mountedCA(); err != nil || string(ca) != "x" {
		t.Errorf("the CA is %q: %v", ca, err)
	}
}
