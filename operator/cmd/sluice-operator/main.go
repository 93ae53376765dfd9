// Command sluice-operator is the cluster half of Sluice: it turns policies and the
// nodes' inventories into what each node shall have, and networks into
// NetworkAttachmentDefinitions. It has no state of its own and needs no privilege on
// any node; of several replicas one works and the others wait.
package main

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"os"

	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/metrics/filters"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/sluice-network/sluice/operator/cluster"
)

// settings is what the operator is told by flags and environment.
type settings struct {
	cluster.Config
	probes, metrics string
	elect           bool
}

func parse(args []string, env func(string) string) (*settings, error) {
	s := &settings{}
	prefix := env("RESOURCE_PREFIX")
	if prefix == "" {
		prefix = "openshift.io"
	}
	f := flag.NewFlagSet("sluice-operator", flag.ContinueOnError)
	klog.InitFlags(f)
	f.StringVar(&s.Namespace, "namespace", env("POD_NAMESPACE"), "namespace of the policies and node states (environment POD_NAMESPACE)")
	f.StringVar(&s.ResourcePrefix, "resource-prefix", prefix, "prefix of the resource names (environment RESOURCE_PREFIX)")
	f.StringVar(&s.probes, "health-probe-bind-address", ":8081", "address for /healthz and /readyz")
	f.StringVar(&s.metrics, "metrics-bind-address", ":8443", "address for /metrics over HTTPS, to clients that may read it; 0 turns it off")
	f.BoolVar(&s.elect, "leader-elect", true, "wait until no other replica works")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q: all settings are flags", f.Arg(0))
	}
	if s.Namespace == "" {
		return nil, errors.New("--namespace is empty: set it, or POD_NAMESPACE from the pod's fields in the Deployment")
	}
	return s, nil
}

func main() {
	err := run()
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		klog.ErrorS(err, "Stopped")
		klog.FlushAndExit(klog.ExitFlushTimeout, 1)
	}
}

func run() error {
	s, err := parse(os.Args[1:], os.Getenv)
	if err != nil {
		return err
	}
	ctrl.SetLogger(klog.Background())
	rest, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find the API server: %w", err)
	}
	scheme, err := cluster.NewScheme()
	if err != nil {
		return err
	}
	mgr, err := ctrl.NewManager(rest, ctrl.Options{
		Scheme:                        scheme,
		Cache:                         cluster.CacheOptions(s.Config),
		LeaderElection:                s.elect,
		LeaderElectionID:              "sluice-operator",
		LeaderElectionNamespace:       s.Namespace,
		LeaderElectionReleaseOnCancel: true, // nothing runs after Start returns
		HealthProbeBindAddress:        s.probes,
		Metrics: server.Options{
			BindAddress:    s.metrics,
			SecureServing:  true,
			FilterProvider: filters.WithAuthenticationAndAuthorization,
			// HTTP/2 lets one client hold many streams open; metrics have no need of it.
			TLSOpts: []func(*tls.Config){func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }},
		},
	})
	if err != nil {
		return fmt.Errorf("make the manager: %w", err)
	}
	if err := cluster.Setup(mgr, s.Config); err != nil {
		return err
	}
	// Ready means able to take over, not leading: a rollout must not wait for the lease.
	for _, add := range []func(string, healthz.Checker) error{mgr.AddHealthzCheck, mgr.AddReadyzCheck} {
		if err := add("ping", healthz.Ping); err != nil {
			return fmt.Errorf("add a health check: %w", err)
		}
	}
	return mgr.Start(ctrl.SetupSignalHandler())
}
