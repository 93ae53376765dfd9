package admission

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"time"

	registrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/webhook"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// Names of objects. Configuration and Service have those of the SR-IOV network operator,
// whose own are thereby replaced when its cluster moves to Sluice.
const (
	ConfigurationName = "sriov-operator-webhook-config"
	SecretName        = "operator-webhook-certificate"
	serviceName       = "operator-webhook-service"
	roleName          = "sluice-operator"
	webhookName       = "operator-webhook.sriovnetwork.openshift.io"
	path              = "/validate"
)

// fieldOwner is the field manager of what the Configuration writes, its condition included.
const fieldOwner = client.FieldOwner("sluice-operator-webhook")

// Reasons of the condition WebhookReady.
const (
	reasonServing = "Serving"
	reasonOff     = "Off"
	reasonFailed  = "Failed"
	reasonMounted = "ConfiguredElsewhere"
)

// Settings say how the API server gets at the webhook.
type Settings struct {
	// URL is where the server is; empty means the Service in the operator's namespace.
	URL string
	// Annotations are for the ValidatingWebhookConfiguration, such as
	// cert-manager.io/inject-ca-from, with which somebody else is asked to write the CA of
	// a mounted certificate.
	Annotations map[string]string
}

// configuration keeps the ValidatingWebhookConfiguration, and the certificate if none is
// mounted, while the SriovOperatorConfig wants the webhook.
type configuration struct {
	client.Client
	live     client.Reader // for what is read too seldom to be cached
	rules    Rules
	settings Settings
	server   *Server
}

// Setup serves the webhook on every replica, and keeps its configuration on the one that
// works. The server must be the manager's.
func Setup(mgr ctrl.Manager, server *Server, rules Rules, settings Settings) error {
	validator := NewValidator(mgr.GetClient(), mgr.GetScheme(), rules)
	mgr.GetWebhookServer().Register(path, &webhook.Admission{Handler: validator, RecoverPanic: new(true)})
	// A replica that waits has no controllers that would begin these watches.
	node, namespace := &metav1.PartialObjectMetadata{}, &metav1.PartialObjectMetadata{}
	node.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Node"))
	namespace.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	for _, object := range []client.Object{node, namespace, &sriovv1.SriovNetworkNodePolicy{}, &sriovv1.SriovNetworkNodeState{},
		&sriovv1.SriovNetworkPoolConfig{}, &sluicev1.MacvlanNodePolicy{}} {
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
	r := &configuration{Client: mgr.GetClient(), live: mgr.GetAPIReader(), rules: rules, settings: settings, server: server}
	one := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return []reconcile.Request{{NamespacedName: client.ObjectKey{Namespace: rules.Namespace, Name: sriovv1.DefaultOperatorConfigName}}}
	})
	return ctrl.NewControllerManagedBy(mgr).Named("webhook").
		Watches(&sriovv1.SriovOperatorConfig{}, one).
		Watches(&corev1.Secret{}, one).
		Watches(&registrationv1.ValidatingWebhookConfiguration{}, one).
		Complete(r)
}

// Reconcile makes or removes the ValidatingWebhookConfiguration.
func (r *configuration) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	config := &sriovv1.SriovOperatorConfig{}
	err := r.Get(ctx, request.NamespacedName, config)
	if client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("read SriovOperatorConfig %s: %w", request.Name, err)
	}
	gone := err != nil || config.DeletionTimestamp != nil
	ready, next, err := r.ensure(ctx, !gone && config.Spec.EnableOperatorWebhook)
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return ctrl.Result{RequeueAfter: time.Second}, nil // what is cached is old
	}
	if err != nil {
		ready = metav1.Condition{Status: metav1.ConditionFalse, Reason: reasonFailed, Message: err.Error()}
	}
	if !gone {
		ready.Type, ready.ObservedGeneration = sriovv1.ConditionWebhookReady, config.Generation
		if reportErr := r.report(ctx, config, ready); err == nil {
			err = reportErr
		}
	}
	if err != nil {
		return ctrl.Result{}, err
	}
	return ctrl.Result{RequeueAfter: next}, nil
}

// ensure brings all about and says how it is, and when to look again.
func (r *configuration) ensure(ctx context.Context, wanted bool) (ready metav1.Condition, next time.Duration, err error) {
	if err = r.removeMutating(ctx); err != nil {
		return ready, 0, err
	}
	have := &registrationv1.ValidatingWebhookConfiguration{}
	err = r.Get(ctx, client.ObjectKey{Name: ConfigurationName}, have)
	if client.IgnoreNotFound(err) != nil {
		return ready, 0, fmt.Errorf("read ValidatingWebhookConfiguration %s: %w", ConfigurationName, err)
	}
	missing := err != nil
	foreign := slices.ContainsFunc(have.Webhooks, func(w registrationv1.ValidatingWebhook) bool { return !r.ours(w.ClientConfig) })
	if !wanted {
		if !missing && !foreign {
			if err = r.Delete(ctx, have, client.Preconditions{UID: &have.UID}); client.IgnoreNotFound(err) != nil {
				return ready, 0, fmt.Errorf("delete ValidatingWebhookConfiguration %s: %w", ConfigurationName, err)
			}
		}
		return metav1.Condition{Status: metav1.ConditionFalse, Reason: reasonOff, Message: "spec.enableOperatorWebhook is false: what a webhook would refuse is accepted and then told in its status"}, 0, nil
	}
	if foreign {
		return metav1.Condition{Status: metav1.ConditionFalse, Reason: reasonFailed, Message: fmt.Sprintf(
			"ValidatingWebhookConfiguration %s calls another service than %s/%s and is left as it is: delete it if nobody needs it, or set enableOperatorWebhook to false",
			ConfigurationName, r.rules.Namespace, serviceName)}, 0, nil
	}
	if r.server.mounted {
		return r.ensureMounted(ctx, have, missing)
	}
	secret, next, err := r.certificate(ctx, have, missing)
	if err != nil {
		return ready, 0, err
	}
	if err = r.write(ctx, have, missing, secret.ca); err != nil {
		return ready, 0, err
	}
	return metav1.Condition{Status: metav1.ConditionTrue, Reason: reasonServing, Message: "objects are judged before they are written"}, next, nil
}

// ensureMounted does without a Secret. When nobody says whom the API server shall trust,
// whoever mounted the certificate makes the configuration as well.
func (r *configuration) ensureMounted(ctx context.Context, have *registrationv1.ValidatingWebhookConfiguration, missing bool) (ready metav1.Condition, next time.Duration, err error) {
	const look = time.Minute // for another CA
	ca, err := r.server.mountedCA()
	if err != nil {
		return ready, 0, err
	}
	if len(ca) == 0 && len(r.settings.Annotations) == 0 {
		return metav1.Condition{Status: metav1.ConditionTrue, Reason: reasonMounted,
			Message: "the certificate is mounted without ca.crt, so whoever mounted it makes the webhook configuration, too"}, look, nil
	}
	if len(ca) == 0 && len(have.Webhooks) > 0 {
		ca = have.Webhooks[0].ClientConfig.CABundle // as it was injected
	}
	if err = r.write(ctx, have, missing, ca); err != nil {
		return ready, 0, err
	}
	return metav1.Condition{Status: metav1.ConditionTrue, Reason: reasonServing, Message: "objects are judged before they are written; the certificate is mounted"}, look, nil
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

// ours tells whether a webhook is at our Service or URL.
func (r *configuration) ours(c registrationv1.WebhookClientConfig) bool {
	if s := c.Service; s != nil {
		return s.Namespace == r.rules.Namespace && s.Name == serviceName
	}
	return r.settings.URL != "" && c.URL != nil && *c.URL == r.settings.URL+path
}

// certificate gives the Secret's certificate, made or renewed if need be. The API server
// is told of a new CA before anything is served that only that CA vouches for.
func (r *configuration) certificate(ctx context.Context, have *registrationv1.ValidatingWebhookConfiguration, missing bool) (*pair, time.Duration, error) {
	secret := &corev1.Secret{}
	err := r.Get(ctx, client.ObjectKey{Namespace: r.rules.Namespace, Name: SecretName}, secret)
	if client.IgnoreNotFound(err) != nil {
		return nil, 0, fmt.Errorf("read Secret %s: %w", SecretName, err)
	}
	first := err != nil
	old := pairOf(secret)
	names, err := r.names()
	if err != nil {
		return nil, 0, err
	}
	left, why := old.check(time.Now(), names)
	if why == nil {
		return old, left, nil
	}
	var trusted []byte // now, by API servers: replicas serve what that vouches for
	if len(have.Webhooks) > 0 {
		trusted = have.Webhooks[0].ClientConfig.CABundle
	}
	p, err := issue(time.Now(), names, trusted)
	if err != nil {
		return nil, 0, err
	}
	if !missing {
		if err := r.write(ctx, have, missing, p.ca); err != nil {
			return nil, 0, err
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

// names are what the API server calls the server.
func (r *configuration) names() ([]string, error) {
	if r.settings.URL == "" {
		return []string{serviceName + "." + r.rules.Namespace + ".svc"}, nil
	}
	u, err := url.Parse(r.settings.URL)
	if err != nil {
		return nil, fmt.Errorf("read the webhook's URL: %w", err)
	}
	return []string{u.Hostname()}, nil
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

// write makes the ValidatingWebhookConfiguration as it shall be, all of it: of the SR-IOV
// network operator's nothing may stay.
func (r *configuration) write(ctx context.Context, have *registrationv1.ValidatingWebhookConfiguration, missing bool, ca []byte) error {
	owner, err := r.owner(ctx)
	if err != nil {
		return err
	}
	want := have.DeepCopy()
	want.Name, want.OwnerReferences = ConfigurationName, owner
	for key, value := range r.settings.Annotations {
		metav1.SetMetaDataAnnotation(&want.ObjectMeta, key, value)
	}
	want.Webhooks = []registrationv1.ValidatingWebhook{r.webhook(ca)}
	if missing {
		if err = r.Create(ctx, want, fieldOwner); err != nil {
			return fmt.Errorf("create ValidatingWebhookConfiguration %s: %w", want.Name, err)
		}
	} else if !equality.Semantic.DeepEqual(have, want) {
		if err = r.Update(ctx, want, fieldOwner); err != nil {
			return fmt.Errorf("update ValidatingWebhookConfiguration %s: %w", want.Name, err)
		}
	}
	*have = *want
	return nil
}

// webhook has every field that the API server would fill in.
func (r *configuration) webhook(ca []byte) registrationv1.ValidatingWebhook {
	rule := func(version metav1.GroupVersion, resources ...string) registrationv1.RuleWithOperations {
		return registrationv1.RuleWithOperations{
			// DELETE is not among them: what is wrong must be easy to be rid of.
			Operations: []registrationv1.OperationType{registrationv1.Create, registrationv1.Update},
			Rule: registrationv1.Rule{APIGroups: []string{version.Group}, APIVersions: []string{version.Version}, Resources: resources,
				Scope: new(registrationv1.NamespacedScope)},
		}
	}
	w := registrationv1.ValidatingWebhook{
		Name: webhookName,
		Rules: []registrationv1.RuleWithOperations{
			rule(metav1.GroupVersion(sriovv1.SchemeGroupVersion), "sriovnetworknodepolicies", "sriovoperatorconfigs", "sriovnetworkpoolconfigs", "sriovnetworks", "sriovibnetworks", "ovsnetworks"),
			rule(metav1.GroupVersion(sluicev1.SchemeGroupVersion), "macvlannodepolicies", "macvlannetworks"),
		},
		// What the webhook refuses the controllers refuse again. So nothing is gained by
		// refusing all while nobody serves.
		FailurePolicy:     new(registrationv1.Ignore),
		MatchPolicy:       new(registrationv1.Equivalent),
		NamespaceSelector: &metav1.LabelSelector{}, ObjectSelector: &metav1.LabelSelector{},
		SideEffects: new(registrationv1.SideEffectClassNone), TimeoutSeconds: new(int32(5)), AdmissionReviewVersions: []string{"v1"},
		// Labels and finalizers are nobody's business here, and must not wait for us.
		MatchConditions: []registrationv1.MatchCondition{{Name: "spec-changes", Expression: "request.operation == 'CREATE' || object.?spec != oldObject.?spec"}},
	}
	w.ClientConfig.CABundle = ca
	if r.settings.URL != "" {
		w.ClientConfig.URL = new(r.settings.URL + path)
	} else {
		w.ClientConfig.Service = &registrationv1.ServiceReference{Namespace: r.rules.Namespace, Name: serviceName, Path: new(path), Port: new(int32(443))}
	}
	return w
}

// report writes the condition, if it changed.
func (r *configuration) report(ctx context.Context, config *sriovv1.SriovOperatorConfig, ready metav1.Condition) error {
	conditions := slices.Clone(config.Status.Conditions)
	if !meta.SetStatusCondition(&conditions, ready) {
		return nil
	}
	value, err := runtime.DefaultUnstructuredConverter.ToUnstructured(meta.FindStatusCondition(conditions, ready.Type))
	if err != nil {
		return fmt.Errorf("convert condition %s: %w", ready.Type, err)
	}
	status := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": sriovv1.SchemeGroupVersion.String(), "kind": "SriovOperatorConfig",
		"metadata": map[string]any{"name": config.Name, "namespace": config.Namespace},
		"status":   map[string]any{"conditions": []any{value}},
	}}
	if err := r.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(status), fieldOwner, client.ForceOwnership); err != nil {
		return client.IgnoreNotFound(fmt.Errorf("apply condition %s of SriovOperatorConfig %s: %w", ready.Type, config.Name, err))
	}
	return nil
}
