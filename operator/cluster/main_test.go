package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/sluice-network/sluice/operator/cluster/admission"
)

// The tests of this package share one real kube-apiserver and etcd, found through
// KUBEBUILDER_ASSETS, on which Sluice is installed as a user would: by
// kubectl apply -k config/default. The controllers run with the rights that this gives
// them and no more. There is no kubelet, no garbage collector and, at first, no Multus.
var (
	apiConfig      *rest.Config
	api            client.Client // may do everything
	webhookAddress string
	kubectl        func(ctx context.Context, args ...string) ([]byte, error)

	operator ctrl.Manager // runs the controllers
	wrote    writes       // what they asked the API server to change
)

const operatorNamespace = "sriov-network-operator"

func TestMain(m *testing.M) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		os.Exit(m.Run())
	}
	code, err := withCluster(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, "set up the test cluster:", err)
		code = 1
	}
	os.Exit(code)
}

func withCluster(run func() int) (code int, err error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ctrl.SetLogger(klog.Background())
	env := &envtest.Environment{}
	defer func() { err = errors.Join(err, env.Stop()) }() // also what a failed start left
	if apiConfig, err = env.Start(); err != nil {
		return 0, fmt.Errorf("start the API server: %w", err)
	}
	if err = findKubectl(env); err != nil {
		return 0, err
	}
	for _, args := range [][]string{
		{"apply", "-k", filepath.Join("..", "..", "config", "default")},
		{"wait", "--for=condition=Established", "crd", "--all", "--timeout=30s"},
	} {
		var out []byte
		if out, err = kubectl(ctx, args...); err != nil {
			return 0, fmt.Errorf("install: kubectl %s: %w\n%s", args[0], err, out)
		}
	}
	scheme, err := NewScheme()
	if err != nil {
		return 0, err
	}
	if api, err = client.New(apiConfig, client.Options{Scheme: scheme}); err != nil {
		return 0, fmt.Errorf("make a client: %w", err)
	}
	config := Config{Namespace: operatorNamespace, ResourcePrefix: "openshift.io", AgentImage: "example.com/sluice:test"}
	if webhookAddress, err = serveWebhook(&config); err != nil {
		return 0, err
	}
	account := as("sluice-operator", nil)
	account.QPS = -1 // as the operator has it
	account.Wrap(wrote.count)
	mgr, err := ctrl.NewManager(account, ctrl.Options{
		Scheme: scheme, Cache: CacheOptions(config), Metrics: server.Options{BindAddress: "0"}, WebhookServer: config.Webhook,
		LeaderElection: true, LeaderElectionID: "sluice-operator", LeaderElectionNamespace: operatorNamespace, LeaderElectionReleaseOnCancel: true,
		// On a busy machine an answer may take long, and there is nobody else to lead.
		LeaseDuration: new(2 * time.Minute), RenewDeadline: new(100 * time.Second),
	})
	if err != nil {
		return 0, fmt.Errorf("make the manager: %w", err)
	}
	if err = Setup(mgr, config); err != nil {
		return 0, err
	}
	operator = mgr
	stopped := make(chan error, 1)
	go func() { stopped <- mgr.Start(ctx) }()
	code = run()
	cancel()
	return code, <-stopped
}

// serveWebhook lets the API server get at the webhook on this machine, at the address.
func serveWebhook(config *Config) (address string, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("find a port for the webhook: %w", err)
	}
	address = listener.Addr().String()
	if err = listener.Close(); err != nil {
		return "", fmt.Errorf("find a port for the webhook: %w", err)
	}
	if config.Webhook, err = admission.NewServer(listener.Addr().(*net.TCPAddr).Port, "/nonexistent"); err != nil {
		return "", err
	}
	config.Webhook.Settle = 2 * time.Second
	config.WebhookSettings.URL = "https://" + address
	return address, nil
}

// findKubectl makes kubectl speak to the API server with all rights.
func findKubectl(env *envtest.Environment) error {
	admin, err := env.AddUser(envtest.User{Name: "admin", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		return fmt.Errorf("make an administrator: %w", err)
	}
	kubeconfig, err := admin.KubeConfig()
	if err != nil {
		return fmt.Errorf("write a kubeconfig: %w", err)
	}
	path := filepath.Join(env.ControlPlane.APIServer.CertDir, "admin.kubeconfig")
	if err := os.WriteFile(path, kubeconfig, 0o600); err != nil {
		return fmt.Errorf("write a kubeconfig: %w", err)
	}
	kubectl = func(ctx context.Context, args ...string) ([]byte, error) {
		c := exec.CommandContext(ctx, filepath.Join(os.Getenv("KUBEBUILDER_ASSETS"), "kubectl"), args...)
		c.Env = append(os.Environ(), "KUBECONFIG="+path)
		return c.CombinedOutput()
	}
	return nil
}

// as speaks to the API server with the rights of a service account of the installation.
func as(serviceAccount string, extra map[string][]string) *rest.Config {
	config := rest.CopyConfig(apiConfig)
	config.Impersonate = rest.ImpersonationConfig{
		UserName: "system:serviceaccount:" + operatorNamespace + ":" + serviceAccount,
		Groups:   []string{"system:serviceaccounts", "system:serviceaccounts:" + operatorNamespace, "system:authenticated"},
		Extra:    extra,
	}
	return config
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

// eventually waits until check has nothing to complain about.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatal(err)
}
