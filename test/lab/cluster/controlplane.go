package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Keys are the credentials of one lab.
type Keys struct {
	authority *Authority
	now       time.Time
}

// NewKeys makes the lab's certificate authority.
func NewKeys() (*Keys, error) {
	now := time.Now()
	authority, err := NewAuthority(now)
	if err != nil {
		return nil, err
	}
	return &Keys{authority, now}, nil
}

// ControlPlane is etcd, kube-apiserver, kube-controller-manager and
// kube-scheduler of one lab, as processes of this machine.
type ControlPlane struct {
	Dir     string // state, keys, pid files and logs
	Netns   string // network namespace
	Kubelab string // the multi-call program
}

func (c ControlPlane) pki(name string) string { return filepath.Join(c.Dir, "pki", name) }

// Kubeconfig is the path of the administrator's kubeconfig, which works from
// this machine's own network namespace.
func (c ControlPlane) Kubeconfig() string { return filepath.Join(c.Dir, "kubeconfig") }

// Processes lists the control plane's processes in the order of their start.
func (c ControlPlane) Processes() []Process {
	var all []Process
	for _, name := range []string{"etcd", "kube-apiserver", "relay", "kube-controller-manager", "kube-scheduler"} {
		all = append(all, Process{c.Dir, name})
	}
	return all
}

// arguments are the processes' command lines, without the program.
func (c ControlPlane) arguments() map[string][]string {
	const (
		client = "http://127.0.0.1:2379"
		peer   = "http://127.0.0.1:2380"
	)
	component := func(name string, more ...string) []string {
		config := c.pki(name + ".kubeconfig")
		return append([]string{
			name,
			"--kubeconfig=" + config, "--authentication-kubeconfig=" + config, "--authorization-kubeconfig=" + config,
			"--bind-address=127.0.0.1", "--leader-elect=false",
		}, more...)
	}
	return map[string][]string{
		"etcd": {
			"etcd",
			"--data-dir=" + filepath.Join(c.Dir, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
			"--listen-client-urls=" + client, "--advertise-client-urls=" + client,
			"--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer, "--initial-cluster=default=" + peer,
		},
		"kube-apiserver": {
			"kube-apiserver",
			"--etcd-servers=" + client,
			"--bind-address=" + Gateway.String(), "--advertise-address=" + Gateway.String(), fmt.Sprintf("--secure-port=%d", apiPort),
			"--tls-cert-file=" + c.pki("apiserver.crt"), "--tls-private-key-file=" + c.pki("apiserver.key"),
			"--client-ca-file=" + c.pki("ca.crt"),
			"--service-cluster-ip-range=" + serviceCIDR,
			"--service-account-issuer=https://kubernetes.default.svc",
			"--service-account-key-file=" + c.pki("sa.crt"), "--service-account-signing-key-file=" + c.pki("sa.key"),
			"--kubelet-client-certificate=" + c.pki("admin.crt"), "--kubelet-client-key=" + c.pki("admin.key"),
			"--kubelet-preferred-address-types=InternalIP",
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
			// There is no service proxy where the API server runs: webhooks and
			// aggregated APIs are called at the pods behind their service.
			"--enable-aggregator-routing",
			"--requestheader-client-ca-file=" + c.pki("ca.crt"), "--requestheader-allowed-names=front-proxy",
			"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
			"--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--proxy-client-cert-file=" + c.pki("front-proxy.crt"), "--proxy-client-key-file=" + c.pki("front-proxy.key"),
		},
		"relay": {"relay", netip.AddrPortFrom(Gateway, apiPort).String()},
		"kube-controller-manager": component("kube-controller-manager",
			"--root-ca-file="+c.pki("ca.crt"), "--service-account-private-key-file="+c.pki("sa.key"),
			"--cluster-signing-cert-file="+c.pki("ca.crt"), "--cluster-signing-key-file="+c.pki("ca.key"),
			"--use-service-account-credentials", "--service-cluster-ip-range="+serviceCIDR,
			// A small machine has no reason to be polite to its own API server.
			"--kube-api-qps=500", "--kube-api-burst=1000"),
		"kube-scheduler": component("kube-scheduler"),
	}
}

// write makes the files of the control plane. port is the relay's on loopback.
func (c ControlPlane) write(keys *Keys, relay netip.AddrPort) error {
	ca, err := keys.authority.Key()
	if err != nil {
		return err
	}
	sa, err := serviceAccountKeys()
	if err != nil {
		return err
	}
	pairs := map[string]Pair{"ca": ca, "sa": sa}
	for name, subject := range map[string]Subject{
		"apiserver": {Name: "kube-apiserver", Hosts: []string{
			Gateway.String(), relay.Addr().String(), ServiceIP.String(),
			"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
		}},
		"admin":                   {Name: "admin", Groups: []string{"system:masters"}},
		"front-proxy":             {Name: "front-proxy"},
		"kube-controller-manager": {Name: "system:kube-controller-manager"},
		"kube-scheduler":          {Name: "system:kube-scheduler"},
	} {
		if pairs[name], err = keys.authority.Issue(subject, keys.now); err != nil {
			return err
		}
	}
	files := map[string][]byte{}
	for name, pair := range pairs {
		files["pki/"+name+".crt"], files["pki/"+name+".key"] = pair.Cert, pair.Key
	}
	server := netip.AddrPortFrom(Gateway, apiPort)
	for _, name := range []string{"kube-controller-manager", "kube-scheduler"} {
		if files["pki/"+name+".kubeconfig"], err = Kubeconfig(server, ca.Cert, pairs[name]); err != nil {
			return err
		}
	}
	if files["kubeconfig"], err = Kubeconfig(relay, ca.Cert, pairs["admin"]); err != nil {
		return err
	}
	return writeFiles(c.Dir, files)
}

// Start makes the files of the control plane, starts its processes and returns
// when the API server is ready.
func (c ControlPlane) Start(ctx context.Context, keys *Keys) error {
	// The API server listens in the lab's namespace only. A socket opened here
	// and handed to the relay there makes it reachable from this namespace too,
	// on loopback, by any program that reads a kubeconfig.
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return fmt.Errorf("listen on loopback for the API server: %w", err)
	}
	socket, err := listener.File() // a duplicate
	if err = errors.Join(err, listener.Close()); err != nil {
		return fmt.Errorf("take the relay's socket: %w", err)
	}
	defer func() { _ = socket.Close() }() // the relay has its own
	if err := c.write(keys, listener.Addr().(*net.TCPAddr).AddrPort()); err != nil {
		return err
	}

	arguments := c.arguments()
	ended := make(chan error, len(arguments))
	for _, p := range c.Processes() {
		var files []*os.File
		if p.Name == "relay" {
			files = append(files, socket)
		}
		end, err := p.start(c.Netns, append([]string{c.Kubelab}, arguments[p.Name]...), files...)
		if err != nil {
			return err
		}
		go func() {
			err := <-end
			ended <- fmt.Errorf("%s ended (%w); end of %s:\n%s", p.Name, errors.Join(err, errEnded), p.Log(), p.Tail(15))
		}()
		if p.Name == "relay" {
			// The last two give up when they find no API server.
			if err := c.awaitReady(ctx, ended); err != nil {
				return err
			}
		}
	}
	return nil
}

var errEnded = errors.New("unexpectedly")

func (c ControlPlane) awaitReady(ctx context.Context, ended <-chan error) error {
	client, err := c.Client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		try, done := context.WithTimeout(ctx, 5*time.Second)
		_, err := client.RESTClient().Get().AbsPath("/readyz").DoRaw(try)
		done()
		if err == nil {
			return nil
		}
		select {
		case end := <-ended:
			return end
		case <-ctx.Done():
			apiserver := Process{c.Dir, "kube-apiserver"}
			return fmt.Errorf("wait for the API server: %w; end of %s:\n%s", err, apiserver.Log(), apiserver.Tail(15))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Stop ends the control plane. etcd goes last: without it the API server hangs.
func (c ControlPlane) Stop() error {
	var errs []error
	all := c.Processes()
	for i := len(all) - 1; i >= 0; i-- {
		errs = append(errs, all[i].Stop())
	}
	return errors.Join(errs...)
}

// RESTConfig is the administrator's access to the API server.
func (c ControlPlane) RESTConfig() (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		return nil, fmt.Errorf("read the lab's kubeconfig: %w", err)
	}
	config.QPS, config.Burst = 100, 200 // the API server's own fairness is limit enough
	return config, nil
}

// Client is a client of the API server with the administrator's rights.
func (c ControlPlane) Client() (*kubernetes.Clientset, error) {
	config, err := c.RESTConfig()
	if err != nil {
		return nil, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("make a client for %s: %w", config.Host, err)
	}
	return client, nil
}
