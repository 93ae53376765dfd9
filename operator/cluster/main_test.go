package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// The tests of this package that need an API server share one real kube-apiserver and
// etcd, found through KUBEBUILDER_ASSETS.
var (
	apiConfig *rest.Config
	api       client.Client
)

const operatorNamespace = "sriov-network-operator"

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		return m.Run()
	}
	env := &envtest.Environment{
		CRDDirectoryPaths:     []string{filepath.Join("..", "..", "config", "crd", "bases")},
		ErrorIfCRDPathMissing: true,
	}
	config, err := env.Start()
	if err != nil {
		fmt.Fprintln(os.Stderr, "start the API server:", err)
		return 1
	}
	defer env.Stop() //nolint:errcheck // the process ends
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, sriovv1.AddToScheme} {
		if err := add(scheme); err != nil {
			fmt.Fprintln(os.Stderr, "register kinds:", err)
			return 1
		}
	}
	apiConfig = config
	if api, err = client.New(config, client.Options{Scheme: scheme}); err != nil {
		fmt.Fprintln(os.Stderr, "make a client:", err)
		return 1
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: operatorNamespace}}
	if err := api.Create(context.Background(), ns); err != nil {
		fmt.Fprintln(os.Stderr, "create the operator's namespace:", err)
		return 1
	}
	return m.Run()
}

// needAPI skips a test that needs an API server when there is none, except in CI, where
// its absence is a failure.
func needAPI(t *testing.T) {
	t.Helper()
	if api != nil {
		return
	}
	const why = "KUBEBUILDER_ASSETS is not set: point it at a directory with kube-apiserver, etcd and kubectl"
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}
