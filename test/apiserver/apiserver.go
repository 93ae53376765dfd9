package apiserver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

var config *rest.Config

// Main runs a package's tests, and ends the process: with an API server when
// KUBEBUILDER_ASSETS tells where one is.
func Main(m *testing.M) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		os.Exit(m.Run())
	}
	ctrl.SetLogger(klog.Background())
	root := ".."
	for range 8 {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			break
		}
		root = filepath.Join(root, "..")
	}
	env := &envtest.Environment{
		CRDDirectoryPaths: []string{filepath.Join(root, "config", "crd", "bases")}, ErrorIfCRDPathMissing: true,
		// A busy machine takes its time.
		ControlPlaneStartTimeout: 3 * time.Minute, ControlPlaneStopTimeout: time.Minute, CRDInstallOptions: envtest.CRDInstallOptions{MaxTime: time.Minute},
	}
	started, err := env.Start()
	code := 1
	if err == nil {
		config = started
		config.QPS = -1
		code = m.Run()
	}
	if err = errors.Join(err, env.Stop()); err != nil {
		fmt.Fprintln(os.Stderr, "API server for the tests:", err)
		code = 1
	}
	os.Exit(code)
}

// Config leads to the API server, with the right to do everything. Without one the test
// is skipped, in CI it fails.
func Config(t testing.TB) *rest.Config {
	t.Helper()
	if config == nil {
		const why = "KUBEBUILDER_ASSETS is not set: point it at a directory with kube-apiserver and etcd"
		if os.Getenv("CI") == "true" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	return rest.CopyConfig(config)
}
