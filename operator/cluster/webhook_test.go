package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	registrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlconfig "sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/cluster/admission"
)

// heard are the warnings of one client's requests.
type heard struct {
	sync.Mutex
	warnings []string
}

func (h *heard) HandleWarningHeaderWithContext(_ context.Context, _ int, _, text string) {
	h.Lock()
	defer h.Unlock()
	h.warnings = append(h.warnings, text)
}

func (h *heard) take() []string {
	h.Lock()
	defer h.Unlock()
	taken := h.warnings
	h.warnings = nil
	return taken
}

// listening is an administrator who heeds warnings.
func listening(t *testing.T) (client.Client, *heard) {
	t.Helper()
	h := &heard{}
	config := rest.CopyConfig(apiConfig)
	config.WarningHandlerWithContext = h
	c, err := client.New(config, client.Options{Scheme: api.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	return c, h
}

// switchWebhook turns the webhook on or off and waits until it is.
func switchWebhook(t *testing.T, on bool) {
	t.Helper()
	config := getConfig(t)
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.EnableOperatorWebhook = on })
	status, reason := metav1.ConditionFalse, "Off"
	if on {
		status, reason = metav1.ConditionTrue, "Serving"
	}
	wantCondition(t, config, func() []metav1.Condition { return config.Status.Conditions }, sriovv1.ConditionWebhookReady, status, reason, "")
}

func getWebhook(t *testing.T) (*registrationv1.ValidatingWebhookConfiguration, error) {
	w := &registrationv1.ValidatingWebhookConfiguration{}
	return w, api.Get(t.Context(), client.ObjectKey{Name: admission.ConfigurationName}, w)
}

func TestWebhook(t *testing.T) {
	needAPI(t)
	makeNamespace(t, "hook-tenant")
	makeNode(t, "wh-1", map[string]string{"test": "wh"})
	eventually(t, func() error { _, err := getState(t, "wh-1"); return err })
	agentReports(t, "wh-1", func(s *sriovv1.SriovNetworkNodeState) {
		s.Status.SyncStatus = sriovv1.SyncStatusInProgress
		s.Status.Interfaces = append(s.Status.Interfaces, sriovv1.InterfaceExt{Name: "ens2f0", PciAddress: "0000:02:00.0", TotalVfs: 7, NumVfs: 2, Mtu: 1500, LinkType: "ETH"})
		s.Status.Links = []sriovv1.Link{{Name: "bond0", Kind: "bond"}}
	})
	makePolicy(t, "wh-a", "wh", 4, func(p *sriovv1.SriovNetworkNodePolicy) {
		p.Spec.NicSelector.PfNames = []sriovv1.PfName{"ens1f0#0-1", "ens2f0#0-1"}
	})
	slots := object(t, "MacvlanNodePolicy", "wh-many", "nodeSelector: {test: nobody}\nresourceName: wh-many\nparentSelector: {pfNames: [bond9]}")
	if err := api.Create(t.Context(), slots); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = api.Delete(t.Context(), slots) }()
	pool := &sriovv1.SriovNetworkPoolConfig{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "wh-pool"}}
	pool.Spec.NodeSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"test": "wh"}}
	if err := api.Create(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = api.Delete(t.Context(), pool) }()

	// What the webhook will refuse, from before it was there.
	if _, err := getWebhook(t); !apierrors.IsNotFound(err) {
		t.Errorf("it is on before it is turned on: %v", err)
	}
	old := object(t, "SriovNetwork", "wh-old", "resourceName: r\nlogFile: /etc/passwd")
	old.SetNamespace("hook-tenant")
	old.SetFinalizers([]string{"example.com/hold"})
	if err := api.Create(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	// And what the SR-IOV network operator leaves behind.
	fail, none := registrationv1.Fail, registrationv1.SideEffectClassNone
	left := &registrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: admission.ConfigurationName}, Webhooks: []registrationv1.MutatingWebhook{{
		Name: "operator-webhook.sriovnetwork.openshift.io", FailurePolicy: &fail, SideEffects: &none, AdmissionReviewVersions: []string{"v1"},
		ClientConfig: registrationv1.WebhookClientConfig{Service: &registrationv1.ServiceReference{Namespace: operatorNamespace, Name: "operator-webhook-service"}},
	}}}
	if err := api.Create(t.Context(), left); err != nil {
		t.Fatal(err)
	}

	switchWebhook(t, true)
	defer func() {
		switchWebhook(t, false)
		if _, err := getWebhook(t); !apierrors.IsNotFound(err) {
			t.Errorf("it is on after it is turned off: %v", err)
		}
	}()
	wantGone(t, left)
	hook, err := getWebhook(t)
	if err != nil {
		t.Fatal(err)
	}
	if len(hook.OwnerReferences) != 1 || hook.OwnerReferences[0].Kind != "ClusterRole" || hook.OwnerReferences[0].Name != "sluice-operator" || *hook.Webhooks[0].FailurePolicy != registrationv1.Ignore {
		t.Errorf("the configuration is %+v", hook)
	}

	t.Run("refuses and warns", testVerdicts)

	t.Run("lets go of what is wrong", func(t *testing.T) {
		change(t, old, func(o *unstructured.Unstructured) { o.SetLabels(map[string]string{"a": "b"}) })
		if err := api.Delete(t.Context(), old); err != nil {
			t.Fatal(err)
		}
		change(t, old, func(o *unstructured.Unstructured) { o.SetFinalizers(nil) })
		wantGone(t, old)
	})

	t.Run("is put right", func(t *testing.T) {
		change(t, hook, func(w *registrationv1.ValidatingWebhookConfiguration) {
			w.Webhooks[0].Rules, w.Webhooks[0].ClientConfig.CABundle = nil, nil
		})
		eventually(t, func() error {
			if hook, err = getWebhook(t); err == nil && (len(hook.Webhooks[0].Rules) != 2 || hook.Webhooks[0].ClientConfig.CABundle == nil) {
				err = errors.New("it is not put right")
			}
			return err
		})
	})

	t.Run("is served by the replica that waits", testOtherReplica)
	t.Run("gets another certificate", testRotation)
}

// refusedAs says how an error differs from a refusal of these fields.
func refusedAs(err error, causes map[string]string) error {
	var status apierrors.APIStatus
	if !errors.As(err, &status) || status.Status().Reason != metav1.StatusReasonInvalid || status.Status().Details == nil {
		return fmt.Errorf("the error is %w", errors.Join(err, errors.New("no refusal with details")))
	}
	got := status.Status().Details.Causes
	for field, want := range causes {
		if !slices.ContainsFunc(got, func(c metav1.StatusCause) bool { return c.Field == field && strings.Contains(c.Message, want) }) {
			return fmt.Errorf("the causes are %+v, want %s: %s", got, field, want)
		}
	}
	if len(got) != len(causes) {
		return fmt.Errorf("the causes are %+v, want %v", got, causes)
	}
	return nil
}

func testVerdicts(t *testing.T) {
	c, h := listening(t)
	const on = "nodeSelector: {test: wh}\n"
	type causes = map[string]string
	for i, v := range []struct {
		kind, namespace, spec string
		refused               causes
		warnings              []string
	}{
		{"SriovNetworkNodePolicy", "", on + "resourceName: wh-b\nnumVfs: 4\nnicSelector: {pfNames: ['ens1f0#2-3', 'ens2f0#2-3']}", nil, nil},
		{"SriovNetworkNodePolicy", "", on + "resourceName: wh-b\nnumVfs: 8\nnicSelector: {pfNames: [ens1f0]}",
			causes{"spec.numVfs": "Invalid value: 8: numVfs 8 is above the 7 VFs (totalvfs) that PF ens1f0 (0000:01:00.0) can have: set numVfs to 7 or less (on node wh-1)"}, nil},
		{"SriovNetworkNodePolicy", "", on + "resourceName: wh-b\nnumVfs: 4\nnicSelector: {pfNames: ['ens1f0#2-3', 'ens2f0#1-2']}", // the second PF only
			causes{"spec.nicSelector": "VFs 1 of PF ens2f0 (0000:02:00.0) stay with policy wh-a (resourceName wh-a, not wh-b): policies wh-a and verdict have the same priority 99 and wh-a was there first"}, nil},
		{"SriovNetworkNodePolicy", "", on + "resourceName: wh-b\nnumVfs: 4\nnicSelector: {rootDevices: ['0000:01:00.0']}", // all VFs over a range, by address
			causes{"spec.nicSelector": "VFs 0-1 of PF ens1f0 (0000:01:00.0) stay with policy wh-a"}, nil},
		{"SriovNetworkNodePolicy", "", on + "resourceName: wh-b\nnumVfs: 4\npriority: 1\nnicSelector: {pfNames: [ens1f0]}", nil,
			[]string{"SriovNetworkNodePolicy wh-a would not have what it asks for: VFs 0-1 of PF ens1f0"}},
		{"SriovNetworkNodePolicy", "", on + "resourceName: wh-a\nnumVfs: 4\nexcludeTopology: true\nnicSelector: {pfNames: ['ens1f0#2-3']}",
			causes{"spec.excludeTopology": "excludeTopology is true here and false in policy wh-a, which has the same resourceName wh-a"}, nil},
		{"SriovNetworkNodePolicy", "", on + "resourceName: wh-b\nnumVfs: 4\nexternallyManaged: true\nnicSelector: {pfNames: ['ens2f0#2-3']}",
			causes{"spec.numVfs": "numVfs 4 with externallyManaged: PF ens2f0 (0000:02:00.0) has only 2 VFs"}, nil},
		{"SriovNetworkNodePolicy", "", on + "resourceName: wh-b\nnumVfs: 4\nlinkType: ib\nnicSelector: {pfNames: ['ens2f0#2-3']}",
			causes{"spec.linkType": "linkType ib: PF ens2f0 (0000:02:00.0) is ETH"}, nil},
		{"SriovNetworkNodePolicy", "", on + "resourceName: wh-b\nnumVfs: 4\nnicSelector: {pfNames: [eth9]}", nil,
			[]string{"nicSelector selects no PF of the node: not PF ens1f0 (0000:01:00.0): its name is not among nicSelector.pfNames eth9"}},
		{"SriovNetworkNodePolicy", "", "nodeSelector: {test: nobody}\nresourceName: wh-b\nnumVfs: 4\nnicSelector: {pfNames: [eth9]}", nil,
			[]string{"spec.nodeSelector selects no Linux node"}},
		{"SriovNetworkNodePolicy", "hook-tenant", on + "resourceName: wh-b\nnumVfs: 99\nnicSelector: {pfNames: [ens1f0]}", nil,
			[]string{"metadata.namespace hook-tenant: only a SriovNetworkNodePolicy in namespace sriov-network-operator has an effect: make it there"}},

		{"MacvlanNodePolicy", "", on + "resourceName: wh-slots\nparentSelector: {pfNames: [bond0]}", nil, nil},
		{"MacvlanNodePolicy", "", on + "resourceName: wh-a\nparentSelector: {pfNames: [bond0]}",
			causes{"spec.resourceName": "resourceName wh-a is that of SriovNetworkNodePolicy wh-a, which has VFs on the node"}, nil},
		{"MacvlanNodePolicy", "", on + "resourceName: wh-slots\nparentSelector: {pfNames: [bond9]}", nil, []string{"parentSelector selects no link of the node: not bond0"}},
		{"MacvlanNodePolicy", "hook-tenant", on + "resourceName: wh-slots\nparentSelector: {pfNames: [bond0]}", nil, []string{"only a MacvlanNodePolicy in namespace"}},

		{"SriovNetwork", "", "resourceName: wh-a\nipam: '{\"type\": \"static\", \"addresses\": [{\"address\": \"10.0.0.200/30\"}]}'",
			causes{"spec.ipam": `Invalid value: "10.0.0.200/30": it overlaps 10.0.0.0/24, which the cluster uses for Services (ServiceCIDR kubernetes)`}, nil},
		{"SriovNetwork", "", "resourceName: wh-a\nlogLevel: debug\nlogFile: /var/log/x\nnetworkNamespace: hook-tenant", nil, []string{"spec: logLevel debug and logFile /var/log/x without effect: "}},
		{"SriovNetwork", "hook-tenant", "resourceName: wh-a\nlogFile: /var/log/x\nnetworkNamespace: default", causes{
			"spec.networkNamespace": "it is default, and only networks in namespace sriov-network-operator may name another namespace: remove networkNamespace",
			"spec.logFile":          "it is /var/log/x, a path on the node that root writes to"}, nil},
		{"SriovNetwork", "", "resourceName: wh-a\nipam: '{'\ncapabilities: '[]'\nmetaPlugins: x", causes{
			"spec.ipam": `Invalid value: "{": invalid JSON at line 1, column 1`, "spec.capabilities": "[] is not a JSON object", "spec.metaPlugins": "invalid JSON at line 1, column 1"}, nil},
		{"SriovNetwork", "", "resourceName: wh-none\nnetworkNamespace: nowhere", nil, []string{
			"spec.networkNamespace nowhere: there is no such namespace yet", "spec.resourceName wh-none: no SriovNetworkNodePolicy makes this resource yet"}},
		{"SriovIBNetwork", "hook-tenant", "resourceName: wh-a\nnetworkNamespace: default", causes{"spec.networkNamespace": "only networks in namespace"}, nil},
		{"OVSNetwork", "hook-tenant", "resourceName: wh-a\nipam: '{}}'", causes{"spec.ipam": "invalid JSON at line 1, column 3"}, nil},
		{"MacvlanNetwork", "hook-tenant", "resourceName: wh-a", nil, []string{"spec.resourceName wh-a is the resource of a SriovNetworkNodePolicy, and a MacvlanNetwork draws from that of a MacvlanNodePolicy"}},
		{"MacvlanNetwork", "hook-tenant", "resourceName: wh-many\nmode: passthru", nil, []string{"spec.mode passthru gives a link to one pod alone, and MacvlanNodePolicy wh-many offers 64 slots of each: set its slots to 1"}},
		{"OVSNetwork", "", "resourceName: wh-a", nil, []string{"spec.resourceName wh-a: a VF has a port on a bridge only in switchdev mode: set eSwitchMode to switchdev in SriovNetworkNodePolicy wh-a"}},
		{"MacvlanNetwork", "hook-tenant", `{master: bond0, ipam: '{"type": "sluice", "pool": "nosuch"}'}`, nil, []string{"spec.ipam: there is no IPPool nosuch in namespace " + operatorNamespace + " yet"}},
		{"MacvlanNetwork", "hook-tenant", `{master: bond0, ipam: '{"type": "sluice"}'}`, causes{"spec.ipam": "type sluice takes its addresses from an IPPool"}, nil},
		{"IPPool", operatorNamespace, "ipv4: {cidr: 10.1.0.0/24, gateway: 10.2.0.1}", causes{"spec.ipv4.gateway": "write an address that an interface in 10.1.0.0/24 can have"}, nil},
		{"IPPool", "hook-tenant", "ipv4: {cidr: 10.1.0.0/24}", nil, []string{"only a IPPool in namespace " + operatorNamespace + " has an effect"}},
		{"MacvlanNetwork", "hook-tenant", "master: bond0\nmetaPlugins: '{}'", causes{"spec.metaPlugins": "plugin 1 has no type"}, nil},

		{"SriovOperatorConfig", "hook-tenant", "{}", causes{"metadata": "only the SriovOperatorConfig default in namespace sriov-network-operator has an effect"}, nil},

		{"SriovNetworkPoolConfig", "", "nodeSelector: {matchLabels: {test: wh}}",
			causes{"spec.nodeSelector": "nodeSelector selects nodes that SriovNetworkPoolConfig wh-pool selects too, and a node in two pools is in neither"}, nil},
		{"SriovNetworkPoolConfig", "", "nodeSelector: {matchLabels: {test: nobody}}\nmaxUnavailable: 0", nil, []string{"spec.maxUnavailable 0: no pod", "spec.nodeSelector selects no Linux node"}},
		{"SriovNetworkPoolConfig", "", "ovsHardwareOffloadConfig: {name: worker}", nil, []string{"spec.ovsHardwareOffloadConfig has no effect"}},
		{"SriovNetworkPoolConfig", "hook-tenant", "{}", nil, []string{"only a SriovNetworkPoolConfig in namespace"}},
	} {
		o := object(t, v.kind, "verdict", v.spec)
		if v.kind == "SriovOperatorConfig" {
			o.SetName(sriovv1.DefaultOperatorConfigName)
		}
		if v.namespace != "" {
			o.SetNamespace(v.namespace)
		}
		// The operator's cache is a moment behind.
		eventually(t, func() error {
			h.take()
			err := c.Create(t.Context(), o.DeepCopy(), client.DryRunAll)
			if v.refused != nil {
				err = refusedAs(err, v.refused)
			}
			warnings := h.take()
			ok := len(warnings) == len(v.warnings)
			for i := 0; ok && i < len(warnings); i++ {
				ok = strings.Contains(warnings[i], v.warnings[i])
			}
			if !ok {
				err = errors.Join(err, fmt.Errorf("the warnings are %q, want %q", warnings, v.warnings))
			}
			if err != nil {
				err = fmt.Errorf("%d: %s: %w", i, v.spec, err)
			}
			return err
		})
	}

	// An update is judged by what it changes.
	config := getConfig(t)
	h.take()
	config.Spec.DisableDrain, config.Spec.ConfigurationMode = true, sriovv1.ConfigurationModeSystemd
	if err := c.Update(t.Context(), config, client.DryRunAll); err != nil {
		t.Error(err)
	}
	said := strings.Join(h.take(), "\n")
	for _, want := range []string{"configurationMode systemd", "spec.disableDrain true: no pod is evicted", "spec.disableDrain true: changes of nodes wh-1 are under way"} {
		if !strings.Contains(said, want) {
			t.Errorf("the warnings are %q, want %q", said, want)
		}
	}
}

// testOtherReplica asks an operator that does not lead: the Service sends it requests too.
func testOtherReplica(t *testing.T) {
	config := Config{Namespace: operatorNamespace, ResourcePrefix: "openshift.io", AgentImage: "example.com/sluice:test"}
	address, err := serveWebhook(&config)
	if err != nil {
		t.Fatal(err)
	}
	mgr, err := ctrl.NewManager(as("sluice-operator", nil), ctrl.Options{
		Scheme: api.Scheme(), Cache: CacheOptions(config), Metrics: server.Options{BindAddress: "0"}, WebhookServer: config.Webhook,
		LeaderElection: true, LeaderElectionID: "sluice-operator", LeaderElectionNamespace: operatorNamespace,
		Controller: ctrlconfig.Controller{SkipNameValidation: new(true)},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err = Setup(mgr, config); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error, 1)
	go func() { stopped <- mgr.Start(ctx) }()
	defer func() { cancel(); <-stopped }()

	hook, err := getWebhook(t)
	if err != nil {
		t.Fatal(err)
	}
	trusted := x509.NewCertPool()
	trusted.AppendCertsFromPEM(hook.Webhooks[0].ClientConfig.CABundle)
	caller := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trusted, ServerName: "operator-webhook-service." + operatorNamespace + ".svc"}}}
	defer caller.CloseIdleConnections()
	policy := object(t, "SriovNetworkNodePolicy", "other-replica", "nodeSelector: {test: wh}\nresourceName: wh-b\nnumVfs: 8\nnicSelector: {pfNames: [ens1f0]}")
	raw, err := policy.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	review := admissionv1.AdmissionReview{TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"}, Request: &admissionv1.AdmissionRequest{
		UID: "1", Namespace: operatorNamespace, Name: policy.GetName(), Operation: admissionv1.Create,
		Kind: metav1.GroupVersionKind(sriovv1.SchemeGroupVersion.WithKind("SriovNetworkNodePolicy")), Object: runtime.RawExtension{Raw: raw},
	}}
	body, err := json.Marshal(review)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		answer, err := caller.Post("https://"+address+"/validate", "application/json", bytes.NewReader(body))
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		var got admissionv1.AdmissionReview
		if err := json.NewDecoder(answer.Body).Decode(&got); err != nil {
			return err
		}
		if got.Response == nil || got.Response.Allowed || !strings.Contains(got.Response.Result.Message, "numVfs 8 is above the 7 VFs") {
			return fmt.Errorf("the answer is %+v", got.Response)
		}
		return nil
	})
}

// testRotation takes the certificate away while somebody asks without pause: nothing that
// shall be refused may get through, as it would if the API server found nobody it trusts.
func testRotation(t *testing.T) {
	served := func() (string, error) {
		c, err := tls.Dial("tcp", webhookAddress, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			return "", err
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.String(), nil
	}
	before, err := served()
	if err != nil {
		t.Fatal(err)
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: admission.SecretName}}
	stop, gaps := make(chan struct{}), make(chan error, 1)
	go func() {
		o := object(t, "SriovNetwork", "rotation", "resourceName: r\nipam: '{'")
		for {
			select {
			case <-stop:
				gaps <- nil
				return
			default:
			}
			if err := refusedWith(api.Create(t.Context(), o.DeepCopy(), client.DryRunAll), "spec.ipam"); err != nil {
				gaps <- err
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	for _, how := range []func() error{
		func() error { return api.Delete(t.Context(), secret) },
		func() error {
			change(t, secret, func(s *corev1.Secret) { s.Data[corev1.TLSCertKey] = []byte("nonsense") })
			return nil
		},
	} {
		if err := how(); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			after, err := served()
			if err == nil && after == before {
				err = errors.New("the old certificate is served still")
			}
			return err
		})
		if before, err = served(); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if err := <-gaps; err != nil {
		t.Errorf("while the certificate changed: %v", err)
	}
}

// Somebody else's configuration of the same name is not touched, and that is told.
func TestWebhookOfAnother(t *testing.T) {
	needAPI(t)
	ignore, none := registrationv1.Ignore, registrationv1.SideEffectClassNone
	theirs := &registrationv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: admission.ConfigurationName}, Webhooks: []registrationv1.ValidatingWebhook{{
		Name: "a.example.com", FailurePolicy: &ignore, SideEffects: &none, AdmissionReviewVersions: []string{"v1"},
		ClientConfig: registrationv1.WebhookClientConfig{Service: &registrationv1.ServiceReference{Namespace: "elsewhere", Name: "operator-webhook-service"}},
	}}}
	if err := api.Create(t.Context(), theirs); err != nil {
		t.Fatal(err)
	}
	config := getConfig(t)
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.EnableOperatorWebhook = true })
	wantCondition(t, config, func() []metav1.Condition { return config.Status.Conditions }, sriovv1.ConditionWebhookReady, metav1.ConditionFalse, "Failed",
		"ValidatingWebhookConfiguration sriov-operator-webhook-config calls another service than sriov-network-operator/operator-webhook-service and is left as it is")
	if hook, err := getWebhook(t); err != nil || hook.UID != theirs.UID || hook.Webhooks[0].Name != "a.example.com" {
		t.Errorf("it is %+v: %v", hook, err)
	}
	if err := api.Delete(t.Context(), theirs); err != nil {
		t.Fatal(err)
	}
	switchWebhook(t, true)
	switchWebhook(t, false)
	if ready := meta.FindStatusCondition(getConfig(t).Status.Conditions, sriovv1.ConditionReady); ready == nil {
		t.Error("the configuration's own conditions are gone")
	}
}

// With a certificate that somebody mounted, the operator makes none, and asks for trust as
// it is told to.
func TestWebhookWithMountedCertificate(t *testing.T) {
	needAPI(t)
	const namespace = "hook-mounted"
	makeNamespace(t, namespace)
	if err := api.Create(t.Context(), &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "operator-webhook-service"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 443}}}}); err != nil {
		t.Fatal(err)
	}
	config := &sriovv1.SriovOperatorConfig{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "default"}, Spec: sriovv1.SriovOperatorConfigSpec{EnableOperatorWebhook: true}}
	if err := api.Create(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	// A certificate that fits, of the operator's own making.
	stop := mountedOperator(t, namespace, "/nonexistent", nil)
	wantCondition(t, config, func() []metav1.Condition { return config.Status.Conditions }, sriovv1.ConditionWebhookReady, metav1.ConditionTrue, "Serving", "")
	stop()
	secret := &corev1.Secret{}
	if err := api.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: admission.SecretName}, secret); err != nil {
		t.Fatal(err)
	}
	hook, err := getWebhook(t)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(api.Delete(t.Context(), secret), api.Delete(t.Context(), hook)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name        string
		files       []string
		annotations map[string]string
		reason      string
	}{
		{"with its CA", []string{"tls.crt", "tls.key", "ca.crt"}, nil, "Serving"},
		{"whose CA is injected", []string{"tls.crt", "tls.key"}, map[string]string{"cert-manager.io/inject-ca-from": "ns/name"}, "Serving"},
		{"by whoever also configures the webhook", []string{"tls.crt", "tls.key"}, nil, "ConfiguredElsewhere"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, file := range c.files {
				if err := os.WriteFile(filepath.Join(dir, file), secret.Data[file], 0o600); err != nil {
					t.Fatal(err)
				}
			}
			stop := mountedOperator(t, namespace, dir, c.annotations)
			defer stop()
			wantCondition(t, config, func() []metav1.Condition { return config.Status.Conditions }, sriovv1.ConditionWebhookReady, metav1.ConditionTrue, c.reason, "mounted")
			hook, err := getWebhook(t)
			if c.reason != "Serving" {
				if !apierrors.IsNotFound(err) {
					t.Errorf("there are two configurations: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = api.Delete(context.WithoutCancel(t.Context()), hook) }()
			defer stop() // first, or it would be made again
			if len(c.annotations) > 0 {
				if hook.Annotations["cert-manager.io/inject-ca-from"] != "ns/name" || hook.Webhooks[0].ClientConfig.CABundle != nil {
					t.Errorf("it is %+v", hook)
				}
				change(t, hook, func(w *registrationv1.ValidatingWebhookConfiguration) {
					w.Webhooks[0].ClientConfig.CABundle = secret.Data["ca.crt"]
					w.Webhooks[0].Rules = nil
				})
			}
			o := object(t, "SriovNetwork", "mounted", "resourceName: r\nipam: '{'")
			o.SetNamespace(namespace)
			eventually(t, func() error { return refusedWith(api.Create(t.Context(), o.DeepCopy(), client.DryRunAll), "spec.ipam") })
			if err := api.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: admission.SecretName}, &corev1.Secret{}); !apierrors.IsNotFound(err) {
				t.Errorf("a certificate was made all the same: %v", err)
			}
		})
		// What is left of one is nothing to the next.
		change(t, config, func(c *sriovv1.SriovOperatorConfig) {
			c.Spec.LogLevel = (c.Spec.LogLevel + 1) % 3
		})
	}
}

// mountedOperator runs the webhook's part of an operator with a mounted certificate.
func mountedOperator(t *testing.T, namespace, dir string, annotations map[string]string) (stop func()) {
	t.Helper()
	config := Config{Namespace: namespace}
	address, err := serveWebhook(&config)
	if err != nil {
		t.Fatal(err)
	}
	if err = wireWebhook(t.Context(), namespace, address); err != nil {
		t.Fatal(err)
	}
	port, err := strconv.Atoi(address[strings.LastIndex(address, ":")+1:])
	if err != nil {
		t.Fatal(err)
	}
	hook, err := admission.NewServer(port, dir)
	if err != nil {
		t.Fatal(err)
	}
	mgr, err := ctrl.NewManager(apiConfig, ctrl.Options{
		Scheme: api.Scheme(), Cache: CacheOptions(config), Metrics: server.Options{BindAddress: "0"}, WebhookServer: hook,
		Controller: ctrlconfig.Controller{SkipNameValidation: new(true)},
	})
	if err != nil {
		t.Fatal(err)
	}
	rules := admission.Rules{Namespace: namespace, ResourcePrefix: "openshift.io", Unsupported: unsupported}
	if err := admission.Setup(mgr, hook, rules, annotations); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	stopped := make(chan error, 1)
	go func() { stopped <- mgr.Start(ctx) }()
	return sync.OnceFunc(func() { cancel(); <-stopped })
}
