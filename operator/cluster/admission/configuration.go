package admission

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	registrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/webhook"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/netselect"
	"github.com/sluice-network/sluice/operator/inject"
)

// Names of objects. Configurations and Service have those of the SR-IOV network operator,
// whose own are thereby replaced when its cluster moves to Sluice.
const (
	ConfigurationName = "sriov-operator-webhook-config"
	InjectorName      = "network-resources-injector-config"
	SecretName        = "operator-webhook-certificate"
	serviceName       = "operator-webhook-service"
	injectorService   = "network-resources-injector-service" // theirs
	roleName          = "sluice-operator"
)

// Paths of the server.
const (
	validatePath = "/validate"
	injectPath   = "/inject"
)

// GateInjectorFails is the feature gate by which pods with networks are not made while
// nobody can say what they need.
const GateInjectorFails = "resourceInjectorMatchCondition"

// fieldOwner is the field manager of what the Configuration writes, its condition included.
const fieldOwner = client.FieldOwner("sluice-operator-webhook")

// Reasons of the conditions WebhookReady and InjectorReady.
const (
	reasonServing = "Serving"
	reasonOff     = "Off"
	reasonFailed  = "Failed"
	reasonMounted = "ConfiguredElsewhere"
)

// configuration keeps the webhook configurations, and the certificate if none is mounted,
// while the SriovOperatorConfig wants the webhooks.
type configuration struct {
	client.Client
	live        client.Reader // for what is read too seldom to be cached
	rules       Rules
	annotations map[string]string
	server      *Server
	events      events.EventRecorder
}

// registration is what the API server is told of one webhook.
type registration struct {
	object  client.Object
	missing bool // from the API server
	clients func() []registrationv1.WebhookClientConfig
	fill    func(registrationv1.WebhookClientConfig) // makes it as it shall be
	path    string

	wanted       bool
	serving, off string           // what the condition says then
	ready        metav1.Condition // what became of it
}

func (g *registration) String() string {
	if _, ok := g.object.(*registrationv1.MutatingWebhookConfiguration); ok {
		return "MutatingWebhookConfiguration " + g.object.GetName()
	}
	return "ValidatingWebhookConfiguration " + g.object.GetName()
}

// registrations are those of both webhooks, as yet without what the API server has.
func (r *configuration) registrations(spec *sriovv1.SriovOperatorConfigSpec, gone bool) []*registration {
	validating := &registrationv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: ConfigurationName}}
	mutating := &registrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: InjectorName}}
	return []*registration{{
		object: validating, path: validatePath, wanted: !gone && spec.EnableOperatorWebhook,
		clients: func() (all []registrationv1.WebhookClientConfig) {
			for _, w := range validating.Webhooks {
				all = append(all, w.ClientConfig)
			}
			return all
		},
		fill: func(c registrationv1.WebhookClientConfig) {
			validating.Webhooks = []registrationv1.ValidatingWebhook{validatingWebhook(c)}
		},
		serving: "objects are judged before they are written",
		off:     "spec.enableOperatorWebhook is false: what a webhook would refuse is accepted and then told in its status",
		ready:   metav1.Condition{Type: sriovv1.ConditionWebhookReady},
	}, {
		object: mutating, path: injectPath, wanted: !gone && spec.EnableInjector,
		clients: func() (all []registrationv1.WebhookClientConfig) {
			for _, w := range mutating.Webhooks {
				all = append(all, w.ClientConfig)
			}
			return all
		},
		fill: func(c registrationv1.WebhookClientConfig) {
			mutating.Webhooks = []registrationv1.MutatingWebhook{injectorWebhook(c, spec.FeatureGates[GateInjectorFails])}
		},
		serving: "pods are given what their networks need before they are written",
		off:     "spec.enableInjector is false: pods must ask for the resources of their networks themselves",
		ready:   metav1.Condition{Type: sriovv1.ConditionInjectorReady},
	}}
}

// Setup serves the webhooks on every replica, and keeps their configurations on the one
// that works. The server must be the manager's. Annotations are for the configurations,
// such as cert-manager.io/inject-ca-from, with which somebody else is asked to write the CA
// of a mounted certificate.
func Setup(mgr ctrl.Manager, server *Server, rules Rules, annotations map[string]string) error {
	validator := NewValidator(mgr.GetClient(), mgr.GetScheme(), rules)
	mgr.GetWebhookServer().Register(validatePath, &webhook.Admission{Handler: validator, RecoverPanic: new(true)})
	mgr.GetWebhookServer().Register(injectPath, &webhook.Admission{Handler: NewInjector(mgr.GetAPIReader()), RecoverPanic: new(true)})
	// A replica that waits has no controllers that would begin these watches.
	node, namespace := &metav1.PartialObjectMetadata{}, &metav1.PartialObjectMetadata{}
	node.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Node"))
	namespace.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	watched := []client.Object{node, namespace, &corev1.Node{}, &sriovv1.SriovNetworkNodePolicy{}, &sriovv1.SriovNetworkNodeState{},
		&sriovv1.SriovNetworkPoolConfig{}, &sluicev1.MacvlanNodePolicy{}, &sluicev1.IPPool{}}
	if _, err := mgr.GetRESTMapper().RESTMapping(ServiceCIDR.GroupKind(), ServiceCIDR.Version); err == nil {
		watched = append(watched, &networkingv1.ServiceCIDR{})
	}
	for _, object := range watched {
		if _, err := mgr.GetCache().GetInformer(context.Background(), object); err != nil {
			return fmt.Errorf("watch %T: %w", object, err)
		}
	}
	secrets, err := mgr.GetCache().GetInformer(context.Background(), &corev1.Secret{})
	if err != nil {
		return fmt.Errorf("watch Secret %s: %w", SecretName, err)
	}
	if _, err = secrets.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { server.load(o.(*corev1.Secret)) },
		UpdateFunc: func(_, o any) { server.load(o.(*corev1.Secret)) },
	}); err != nil {
		return fmt.Errorf("watch Secret %s: %w", SecretName, err)
	}
	r := &configuration{
		Client: mgr.GetClient(), live: mgr.GetAPIReader(), rules: rules, annotations: annotations, server: server,
		events: mgr.GetEventRecorder("sluice-operator"),
	}
	one := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return []reconcile.Request{{NamespacedName: client.ObjectKey{Namespace: rules.Namespace, Name: sriovv1.DefaultOperatorConfigName}}}
	})
	return ctrl.NewControllerManagedBy(mgr).Named("webhook").
		Watches(&sriovv1.SriovOperatorConfig{}, one).
		Watches(&corev1.Secret{}, one).
		Watches(&registrationv1.ValidatingWebhookConfiguration{}, one).
		Watches(&registrationv1.MutatingWebhookConfiguration{}, one).
		Complete(r)
}

// Reconcile makes or removes the webhook configurations.
func (r *configuration) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	config := &sriovv1.SriovOperatorConfig{}
	err := r.Get(ctx, request.NamespacedName, config)
	if client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("read SriovOperatorConfig %s: %w", request.Name, err)
	}
	gone := err != nil || config.DeletionTimestamp != nil
	all := r.registrations(&config.Spec, gone)
	next, err := r.ensure(ctx, all)
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return ctrl.Result{RequeueAfter: time.Second}, nil // what is cached is old
	}
	if !gone {
		if reportErr := r.report(ctx, config, all, err); err == nil {
			err = reportErr
		}
	}
	if err != nil {
		return ctrl.Result{}, err
	}
	return ctrl.Result{RequeueAfter: next}, nil
}

// ensure brings all about and says how it is, and when to look again.
func (r *configuration) ensure(ctx context.Context, all []*registration) (next time.Duration, err error) {
	if err = r.removeMutating(ctx); err != nil {
		return 0, err
	}
	var wanted []*registration
	for _, g := range all {
		err = r.Get(ctx, client.ObjectKeyFromObject(g.object), g.object)
		if client.IgnoreNotFound(err) != nil {
			return 0, fmt.Errorf("read %s: %w", g, err)
		}
		g.missing = err != nil
		foreign := slices.ContainsFunc(g.clients(), func(c registrationv1.WebhookClientConfig) bool { return !r.ours(c) })
		switch {
		case g.wanted && foreign:
			g.ready.Status, g.ready.Reason, g.ready.Message = metav1.ConditionFalse, reasonFailed, fmt.Sprintf(
				"%s calls another service than %s/%s and is left as it is: delete it if nobody needs it, or turn this webhook off", g, r.rules.Namespace, serviceName)
			continue
		case g.wanted:
			wanted = append(wanted, g)
			continue
		case !g.missing && !foreign:
			if err = r.Delete(ctx, g.object, client.Preconditions{UID: new(g.object.GetUID())}); client.IgnoreNotFound(err) != nil {
				return 0, fmt.Errorf("delete %s: %w", g, err)
			}
		}
		g.ready.Status, g.ready.Reason, g.ready.Message = metav1.ConditionFalse, reasonOff, g.off
	}
	switch {
	case len(wanted) == 0:
		return 0, nil
	case r.server.mounted:
		return r.ensureMounted(ctx, wanted)
	}
	secret, next, err := r.certificate(ctx, wanted)
	if err != nil {
		return 0, err
	}
	for _, g := range wanted {
		if err = r.write(ctx, g, secret.ca); err != nil {
			return 0, err
		}
		g.ready.Status, g.ready.Reason, g.ready.Message = metav1.ConditionTrue, reasonServing, g.serving
	}
	return next, nil
}

// ensureMounted does without a Secret. When nobody says whom the API server shall trust,
// whoever mounted the certificate makes the configurations as well.
func (r *configuration) ensureMounted(ctx context.Context, wanted []*registration) (next time.Duration, err error) {
	const look = time.Minute // for another CA
	mounted, err := r.server.mountedCA()
	if err != nil {
		return 0, err
	}
	for _, g := range wanted {
		g.ready.Status = metav1.ConditionTrue
		if len(mounted) == 0 && len(r.annotations) == 0 {
			g.ready.Reason = reasonMounted
			g.ready.Message = "the certificate is mounted without ca.crt, so whoever mounted it makes the webhook configuration, too"
			continue
		}
		ca := mounted
		if len(ca) == 0 {
			ca = g.ca() // as it was injected
		}
		if err = r.write(ctx, g, ca); err != nil {
			return 0, err
		}
		g.ready.Reason, g.ready.Message = reasonServing, g.serving+"; the certificate is mounted"
	}
	return look, nil
}

// ca is whom the API server trusts to be the webhook.
func (g *registration) ca() []byte {
	if clients := g.clients(); len(clients) > 0 {
		return clients[0].CABundle
	}
	return nil
}

// removeMutating removes what the SR-IOV network operator leaves: it would send our
// policies to paths that only its own webhook has, and refuse them when that is gone.
func (r *configuration) removeMutating(ctx context.Context) error {
	left := &registrationv1.MutatingWebhookConfiguration{}
	if err := r.live.Get(ctx, client.ObjectKey{Name: ConfigurationName}, left); err != nil {
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("read MutatingWebhookConfiguration %s: %w", ConfigurationName, err)
	}
	for _, w := range left.Webhooks {
		if !r.ours(w.ClientConfig) {
			return nil
		}
	}
	if err := r.Delete(ctx, left, client.Preconditions{UID: &left.UID}); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete MutatingWebhookConfiguration %s: %w", ConfigurationName, err)
	}
	ctrl.LoggerFrom(ctx).Info("Removed the SR-IOV network operator's MutatingWebhookConfiguration")
	return nil
}

// ours tells whether a webhook is at our Service, or at one whose place it takes.
func (r *configuration) ours(c registrationv1.WebhookClientConfig) bool {
	s := c.Service
	return s != nil && s.Namespace == r.rules.Namespace && (s.Name == serviceName || s.Name == injectorService)
}

// certificate gives the Secret's certificate, made or renewed if need be. The API server
// is told of a new CA before anything is served that only that CA vouches for.
func (r *configuration) certificate(ctx context.Context, wanted []*registration) (*pair, time.Duration, error) {
	secret := &corev1.Secret{}
	err := r.Get(ctx, client.ObjectKey{Namespace: r.rules.Namespace, Name: SecretName}, secret)
	if client.IgnoreNotFound(err) != nil {
		return nil, 0, fmt.Errorf("read Secret %s: %w", SecretName, err)
	}
	first := err != nil
	old := pairOf(secret)
	name := serviceName + "." + r.rules.Namespace + ".svc" // as the API server calls the server
	left, why := old.check(time.Now(), name)
	if why == nil {
		return old, left, nil
	}
	var trusted []byte // now, by API servers: replicas serve what that vouches for
	for _, g := range wanted {
		trusted = append(trusted, g.ca()...)
	}
	p, err := issue(time.Now(), name, trusted)
	if err != nil {
		return nil, 0, err
	}
	for _, g := range wanted {
		if !g.missing {
			if err := r.write(ctx, g, p.ca); err != nil {
				return nil, 0, err
			}
		}
	}
	secret.Data = map[string][]byte{corev1.TLSCertKey: p.cert, corev1.TLSPrivateKeyKey: p.key, corev1.ServiceAccountRootCAKey: p.ca}
	if first {
		secret.Namespace, secret.Name, secret.Type = r.rules.Namespace, SecretName, corev1.SecretTypeTLS
		if secret.OwnerReferences, err = r.owner(ctx); err != nil {
			return nil, 0, err
		}
		err = r.Create(ctx, secret, fieldOwner)
	} else {
		err = r.Update(ctx, secret, fieldOwner) // refused if somebody else was faster
	}
	if err != nil {
		return nil, 0, fmt.Errorf("write Secret %s: %w", SecretName, err)
	}
	ctrl.LoggerFrom(ctx).Info("Made the webhook's certificate", "because", why.Error())
	return p, lifetime - renewBefore, nil
}

func pairOf(secret *corev1.Secret) *pair {
	return &pair{cert: secret.Data[corev1.TLSCertKey], key: secret.Data[corev1.TLSPrivateKeyKey], ca: secret.Data[corev1.ServiceAccountRootCAKey]}
}

// owner lets what is made go with the installation.
func (r *configuration) owner(ctx context.Context) ([]metav1.OwnerReference, error) {
	role := &metav1.PartialObjectMetadata{}
	role.SetGroupVersionKind(rbacv1.SchemeGroupVersion.WithKind("ClusterRole"))
	if err := r.live.Get(ctx, client.ObjectKey{Name: roleName}, role); err != nil {
		if apierrors.IsNotFound(err) {
			return nil, nil // OLM gives roles other names, and removes what the operator made by itself
		}
		return nil, fmt.Errorf("read ClusterRole %s: %w", roleName, err)
	}
	return []metav1.OwnerReference{{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "ClusterRole", Name: roleName, UID: role.UID}}, nil
}

// write makes a webhook configuration as it shall be, all of it: of the SR-IOV network
// operator's nothing may stay.
func (r *configuration) write(ctx context.Context, g *registration, ca []byte) error {
	owner, err := r.owner(ctx)
	if err != nil {
		return err
	}
	have := g.object.DeepCopyObject()
	g.object.SetOwnerReferences(owner)
	if len(r.annotations) > 0 {
		all := maps.Clone(g.object.GetAnnotations())
		if all == nil {
			all = map[string]string{}
		}
		maps.Copy(all, r.annotations)
		g.object.SetAnnotations(all)
	}
	g.fill(registrationv1.WebhookClientConfig{CABundle: ca, Service: &registrationv1.ServiceReference{
		Namespace: r.rules.Namespace, Name: serviceName, Path: new(g.path), Port: new(int32(443)),
	}})
	switch {
	case g.missing:
		if err = r.Create(ctx, g.object, fieldOwner); err != nil {
			return fmt.Errorf("create %s: %w", g, err)
		}
		g.missing = false
	case !equality.Semantic.DeepEqual(have, g.object):
		if err = r.Update(ctx, g.object, fieldOwner); err != nil {
			return fmt.Errorf("update %s: %w", g, err)
		}
	}
	return nil
}

// validatingWebhook has every field that the API server would fill in.
func validatingWebhook(at registrationv1.WebhookClientConfig) registrationv1.ValidatingWebhook {
	rule := func(version metav1.GroupVersion, resources ...string) registrationv1.RuleWithOperations {
		return registrationv1.RuleWithOperations{
			// DELETE is not among them: what is wrong must be easy to be rid of.
			Operations: []registrationv1.OperationType{registrationv1.Create, registrationv1.Update},
			Rule: registrationv1.Rule{APIGroups: []string{version.Group}, APIVersions: []string{version.Version}, Resources: resources,
				Scope: new(registrationv1.NamespacedScope)},
		}
	}
	return registrationv1.ValidatingWebhook{
		Name: "operator-webhook.sriovnetwork.openshift.io", ClientConfig: at,
		Rules: []registrationv1.RuleWithOperations{
			rule(metav1.GroupVersion(sriovv1.SchemeGroupVersion), "sriovnetworknodepolicies", "sriovoperatorconfigs", "sriovnetworkpoolconfigs", "sriovnetworks", "sriovibnetworks", "ovsnetworks"),
			rule(metav1.GroupVersion(sluicev1.SchemeGroupVersion), "macvlannodepolicies", "macvlannetworks", "ippools"),
		},
		// What the webhook refuses the controllers refuse again. So nothing is gained by
		// refusing all while nobody serves.
		FailurePolicy:     new(registrationv1.Ignore),
		MatchPolicy:       new(registrationv1.Equivalent),
		NamespaceSelector: &metav1.LabelSelector{}, ObjectSelector: &metav1.LabelSelector{},
		SideEffects: new(registrationv1.SideEffectClassNone), TimeoutSeconds: new(int32(10)), AdmissionReviewVersions: []string{"v1"},
		// Labels and finalizers are nobody's business here, and must not wait for us.
		MatchConditions: []registrationv1.MatchCondition{{Name: "spec-changes", Expression: "request.operation == 'CREATE' || object.?spec != oldObject.?spec"}},
	}
}

// injectorWebhook is called only for pods that name networks. When it cannot be reached they
// are made as they are, unless the configuration asks for the contrary.
func injectorWebhook(at registrationv1.WebhookClientConfig, fail bool) registrationv1.MutatingWebhook {
	policy := registrationv1.Ignore
	if fail {
		policy = registrationv1.Fail
	}
	return registrationv1.MutatingWebhook{
		Name: "network-resources-injector-config.k8s.io", ClientConfig: at,
		Rules: []registrationv1.RuleWithOperations{{
			Operations: []registrationv1.OperationType{registrationv1.Create},
			Rule:       registrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}, Scope: new(registrationv1.NamespacedScope)},
		}},
		FailurePolicy:     &policy,
		MatchPolicy:       new(registrationv1.Equivalent),
		NamespaceSelector: &metav1.LabelSelector{}, ObjectSelector: &metav1.LabelSelector{},
		SideEffects: new(registrationv1.SideEffectClassNone), TimeoutSeconds: new(int32(10)), AdmissionReviewVersions: []string{"v1"},
		// Other webhooks may write the annotation, and what is there is not added again.
		ReinvocationPolicy: new(registrationv1.IfNeededReinvocationPolicy),
		MatchConditions: []registrationv1.MatchCondition{{
			Name:       "names-networks",
			Expression: fmt.Sprintf("['%s', '%s'].exists(key, key in object.metadata.?annotations.orValue({}))", netselect.Annotation, inject.AnnotationDefaultNetwork),
		}},
	}
}

// report writes the conditions, if they changed, and tells when one became another.
func (r *configuration) report(ctx context.Context, config *sriovv1.SriovOperatorConfig, all []*registration, failed error) error {
	conditions := slices.Clone(config.Status.Conditions)
	var own []any
	changed := false
	var tell []func()
	for _, g := range all {
		ready := g.ready
		if failed != nil && (g.wanted || ready.Reason == "") {
			ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, reasonFailed, failed.Error()
		}
		ready.ObservedGeneration = config.Generation
		was := meta.FindStatusCondition(config.Status.Conditions, ready.Type)
		changed = meta.SetStatusCondition(&conditions, ready) || changed
		value, err := runtime.DefaultUnstructuredConverter.ToUnstructured(meta.FindStatusCondition(conditions, ready.Type))
		if err != nil {
			return fmt.Errorf("convert condition %s: %w", ready.Type, err)
		}
		own = append(own, value)
		if was == nil && ready.Reason == reasonOff || was != nil && was.Status == ready.Status && was.Reason == ready.Reason {
			continue
		}
		kind := corev1.EventTypeNormal
		if ready.Reason == reasonFailed {
			kind = corev1.EventTypeWarning
		}
		tell = append(tell, func() {
			r.events.Eventf(config, nil, kind, ready.Type+ready.Reason, "Reconcile", "%.1000s", ready.Message)
		})
	}
	if !changed {
		return nil
	}
	status := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": sriovv1.SchemeGroupVersion.String(), "kind": "SriovOperatorConfig",
		"metadata": map[string]any{"name": config.Name, "namespace": config.Namespace},
		"status":   map[string]any{"conditions": own},
	}}
	if err := r.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(status), fieldOwner, client.ForceOwnership); err != nil {
		return client.IgnoreNotFound(fmt.Errorf("apply the webhooks' conditions of SriovOperatorConfig %s: %w", config.Name, err))
	}
	for _, t := range tell {
		t()
	}
	return nil
}
