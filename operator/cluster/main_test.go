package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
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
	wires          sync.Map // addresses behind Services, by cluster address and port: what kube-proxy would do
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
	env := &envtest.Environment{ControlPlaneStartTimeout: 3 * time.Minute, ControlPlaneStopTimeout: time.Minute} // a busy machine takes its time
	defer func() { err = errors.Join(err, env.Stop()) }()                                                        // also what a failed start left
	dir, err := os.MkdirTemp("", "sluice-proxy")
	if err != nil {
		return 0, fmt.Errorf("make a directory for the proxy: %w", err)
	}
	defer os.RemoveAll(dir)
	if err = carryToServices(env, dir); err != nil {
		return 0, err
	}
	if apiConfig, err = env.Start(); err != nil {
		return 0, fmt.Errorf("start the API server: %w", err)
	}
	if err = findKubectl(env); err != nil {
		return 0, err
	}
	for _, args := range [][]string{
		{"apply", "-k", filepath.Join("..", "..", "config", "default")},
		{"wait", "--for=condition=Established", "crd", "--all", "--timeout=2m"},
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
	if err = wireWebhook(ctx, operatorNamespace, webhookAddress); err != nil {
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

// carryToServices makes the API server open its connections to Services through a proxy,
// as it does where it is in another network than they are, which looks into wires.
func carryToServices(env *envtest.Environment, dir string) error {
	socket, config := filepath.Join(dir, "proxy"), filepath.Join(dir, "egress.yaml")
	proxy, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("start the proxy: %w", err)
	}
	go func() {
		for {
			c, err := proxy.Accept()
			if err != nil {
				return
			}
			go carry(c)
		}
	}()
	if err = os.WriteFile(config, []byte(`apiVersion: apiserver.k8s.io/v1beta1
kind: EgressSelectorConfiguration
egressSelections:
- name: cluster
  connection: {proxyProtocol: HTTPConnect, transport: {uds: {udsName: `+socket+`}}}
`), 0o600); err != nil {
		return fmt.Errorf("write the proxy's configuration: %w", err)
	}
	env.ControlPlane.GetAPIServer().Configure().Append("egress-selector-config-file", config)
	return nil
}

// carry answers an HTTP CONNECT.
func carry(from net.Conn) {
	defer from.Close()
	in := bufio.NewReader(from)
	request, err := http.ReadRequest(in)
	if err != nil {
		return
	}
	address, ok := wires.Load(request.Host)
	if !ok {
		_, _ = io.WriteString(from, "HTTP/1.1 502 no such Service\r\n\r\n")
		return
	}
	to, err := net.Dial("tcp", address.(string))
	if err != nil {
		_, _ = io.WriteString(from, "HTTP/1.1 502 nobody serves\r\n\r\n")
		return
	}
	defer to.Close()
	_, _ = io.WriteString(from, "HTTP/1.1 200 OK\r\n\r\n")
	go func() {
		_, _ = io.Copy(to, in)
		_ = to.(*net.TCPConn).CloseWrite()
	}()
	_, _ = io.Copy(from, to)
}

// wireWebhook leads what goes to the webhook's Service of a namespace to an address.
func wireWebhook(ctx context.Context, namespace, address string) error {
	s := &corev1.Service{}
	if err := api.Get(ctx, client.ObjectKey{Namespace: namespace, Name: "operator-webhook-service"}, s); err != nil {
		return fmt.Errorf("read the webhook's Service: %w", err)
	}
	wires.Store(net.JoinHostPort(s.Spec.ClusterIP, "443"), address)
	return nil
}

// serveWebhook lets the webhook be served on this machine, at the address.
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
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatal(err)
}
