// Command sluice-operator is the cluster half of Sluice: it turns policies and the
// nodes' inventories into what each node shall have, and networks into
// NetworkAttachmentDefinitions. It has no state of its own and needs no privilege on
// any node; of several replicas one works and the others wait.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/metrics/filters"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/sluice-network/sluice/operator/cluster"
	"github.com/sluice-network/sluice/operator/cluster/admission"
)

// settings is what the operator is told by flags and environment.
type settings struct {
	cluster.Config
	probes, metrics string
	pod             string
	elect           bool
	webhookPort     int
	webhookCerts    string
}

func parse(args []string, env func(string) string) (*settings, error) {
	s := &settings{}
	var annotated metav1.ObjectMeta
	prefix := env("RESOURCE_PREFIX")
	if prefix == "" {
		prefix = "openshift.io"
	}
	f := flag.NewFlagSet("sluice-operator", flag.ContinueOnError)
	klog.InitFlags(f)
	f.StringVar(&s.Namespace, "namespace", env("POD_NAMESPACE"), "namespace of the policies and node states (environment POD_NAMESPACE)")
	f.StringVar(&s.ResourcePrefix, "resource-prefix", prefix, "prefix of the resource names (environment RESOURCE_PREFIX)")
	f.StringVar(&s.AgentImage, "agent-image", env("AGENT_IMAGE"), "image of the agents; empty means the operator's own (environment AGENT_IMAGE)")
	f.StringVar(&s.pod, "pod-name", env("POD_NAME"), "name of the operator's own pod (environment POD_NAME)")
	f.StringVar(&s.probes, "health-probe-bind-address", ":8081", "address for /healthz and /readyz")
	f.StringVar(&s.metrics, "metrics-bind-address", ":8443", "address for /metrics over HTTPS, to clients that may read it; 0 turns it off")
	f.BoolVar(&s.elect, "leader-elect", true, "wait until no other replica works")
	f.IntVar(&s.webhookPort, "webhook-port", 9443, "port of the admission webhook")
	f.StringVar(&s.webhookCerts, "webhook-cert-dir", "/tmp/k8s-webhook-server/serving-certs", "where a certificate for the webhook may be mounted: tls.crt, tls.key and, unless somebody else writes it into the webhook configuration, ca.crt; without one the operator makes its own")
	f.Func("webhook-annotation", "key=value for the webhook configuration, such as cert-manager.io/inject-ca-from=<namespace>/<certificate>; may be repeated", func(text string) error {
		key, value, ok := strings.Cut(text, "=")
		if !ok || key == "" {
			return errors.New("write key=value")
		}
		metav1.SetMetaDataAnnotation(&annotated, key, value)
		return nil
	})
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	s.WebhookAnnotations = annotated.Annotations
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q: all settings are flags", f.Arg(0))
	}
	if s.AgentImage == "" && s.pod == "" {
		return nil, errors.New("--pod-name and --agent-image are empty: set the first, or POD_NAME from the pod's fields in the Deployment, to run agents from the operator's image, or the second")
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
	config, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find the API server: %w", err)
	}
	scheme, err := cluster.NewScheme()
	if err != nil {
		return err
	}
	ctx := ctrl.SetupSignalHandler()
	if err = s.findImage(ctx, config); err != nil {
		return err
	}
	if s.Webhook, err = admission.NewServer(s.webhookPort, s.webhookCerts); err != nil {
		return err
	}
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:                        scheme,
		Cache:                         cluster.CacheOptions(s.Config),
		LeaderElection:                s.elect,
		LeaderElectionID:              "sluice-operator",
		LeaderElectionNamespace:       s.Namespace,
		LeaderElectionReleaseOnCancel: true, // nothing runs after Start returns
		HealthProbeBindAddress:        s.probes,
		WebhookServer:                 s.Webhook,
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
	return mgr.Start(ctx)
}

// findImage lets the agents run from what the operator itself runs from, so that there is
// one place where people set image and pull secrets.
func (s *settings) findImage(ctx context.Context, config *rest.Config) error {
	if s.AgentImage != "" {
		return nil
	}
	c, err := client.New(config, client.Options{})
	if err != nil {
		return fmt.Errorf("connect to the API server: %w", err)
	}
	pod := &corev1.Pod{}
	if err := c.Get(ctx, client.ObjectKey{Namespace: s.Namespace, Name: s.pod}, pod); err != nil {
		return fmt.Errorf("read the operator's own pod %s/%s: %w", s.Namespace, s.pod, err)
	}
	s.ImagePullSecrets = pod.Spec.ImagePullSecrets
	for _, c := range pod.Spec.Containers {
		if c.Name == "operator" {
			s.AgentImage = c.Image
			return nil
		}
	}
	return fmt.Errorf("pod %s/%s has no container named operator, whose image the agents would run: name it so, or set --agent-image", s.Namespace, s.pod)
}
