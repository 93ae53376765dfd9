package admission

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
	"github.com/sluice-network/sluice/operator/render"
)

// Rules are what a Validator needs to be told.
type Rules struct {
	// Namespace is the operator's own.
	Namespace string
	// ResourcePrefix goes before the names of resources, without a slash.
	ResourcePrefix string
	// Unsupported says what of a configuration has no effect.
	Unsupported func(*sriovv1.SriovOperatorConfigSpec) []string
}

// Validator judges objects that somebody is about to write.
type Validator struct {
	client.Reader
	Rules
	decoder admission.Decoder
}

// NewValidator reads from a cache, and decodes with a scheme that has all kinds of ours.
func NewValidator(reader client.Reader, scheme *runtime.Scheme, rules Rules) *Validator {
	return &Validator{Reader: reader, Rules: rules, decoder: admission.NewDecoder(scheme)}
}

// findings is what is said of an object.
type findings struct {
	errors   field.ErrorList
	warnings []string
}

func (f *findings) warn(format string, a ...any) {
	f.warnings = append(f.warnings, fmt.Sprintf(format, a...))
}

// Handle answers one request.
func (v *Validator) Handle(ctx context.Context, request admission.Request) admission.Response {
	object, old, err := v.decode(request)
	if err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	if object.GetDeletionTimestamp() != nil || old != nil && equality.Semantic.DeepEqual(specOf(object), specOf(old)) {
		return admission.Allowed("") // finalizers must come off whatever the spec says
	}
	f := &findings{}
	switch o := object.(type) {
	case *sriovv1.SriovNetworkNodePolicy:
		err = v.policy(ctx, f, o)
	case *sluicev1.MacvlanNodePolicy:
		err = v.macvlanPolicy(ctx, f, o)
	case *sriovv1.SriovOperatorConfig:
		before, _ := old.(*sriovv1.SriovOperatorConfig)
		err = v.operatorConfig(ctx, f, o, before)
	case *sriovv1.SriovNetworkPoolConfig:
		err = v.poolConfig(ctx, f, o)
	case *sluicev1.IPPool:
		err = v.ipPool(ctx, f, o)
	default:
		err = v.network(ctx, f, object)
	}
	if err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "Could not judge", "kind", request.Kind.Kind, "namespace", request.Namespace, "name", request.Name)
		return admission.Errored(http.StatusInternalServerError, err)
	}
	if len(f.errors) == 0 {
		return admission.Allowed("").WithWarnings(f.warnings...)
	}
	status := apierrors.NewInvalid(schema.GroupKind{Group: request.Kind.Group, Kind: request.Kind.Kind}, request.Name, f.errors).Status()
	return admission.Response{AdmissionResponse: admissionv1.AdmissionResponse{Result: &status}}.WithWarnings(f.warnings...)
}

// kinds makes an empty object of each kind that is judged.
var kinds = map[schema.GroupKind]func() client.Object{
	{Group: sriovv1.GroupName, Kind: "SriovNetworkNodePolicy"}: func() client.Object { return &sriovv1.SriovNetworkNodePolicy{} },
	{Group: sriovv1.GroupName, Kind: "SriovOperatorConfig"}:    func() client.Object { return &sriovv1.SriovOperatorConfig{} },
	{Group: sriovv1.GroupName, Kind: "SriovNetworkPoolConfig"}: func() client.Object { return &sriovv1.SriovNetworkPoolConfig{} },
	{Group: sriovv1.GroupName, Kind: "SriovNetwork"}:           func() client.Object { return &sriovv1.SriovNetwork{} },
	{Group: sriovv1.GroupName, Kind: "SriovIBNetwork"}:         func() client.Object { return &sriovv1.SriovIBNetwork{} },
	{Group: sriovv1.GroupName, Kind: "OVSNetwork"}:             func() client.Object { return &sriovv1.OVSNetwork{} },
	{Group: sluicev1.GroupName, Kind: "MacvlanNodePolicy"}:     func() client.Object { return &sluicev1.MacvlanNodePolicy{} },
	{Group: sluicev1.GroupName, Kind: "IPPool"}:                func() client.Object { return &sluicev1.IPPool{} },
	{Group: sluicev1.GroupName, Kind: "MacvlanNetwork"}:        func() client.Object { return &sluicev1.MacvlanNetwork{} },
}

// decode reads the object and, in an update, what it was before. A request may come
// without a namespace in the object.
func (v *Validator) decode(request admission.Request) (object, old client.Object, err error) {
	empty := kinds[schema.GroupKind{Group: request.Kind.Group, Kind: request.Kind.Kind}]
	if empty == nil {
		return nil, nil, fmt.Errorf("kind %s.%s is not judged here", request.Kind.Kind, request.Kind.Group)
	}
	object = empty()
	switch request.Operation {
	case admissionv1.Create:
	case admissionv1.Update:
		old = empty()
		if err = v.decoder.DecodeRaw(request.OldObject, old); err != nil {
			return nil, nil, fmt.Errorf("read the old object: %w", err)
		}
	default:
		return nil, nil, fmt.Errorf("operation %s is not judged here", request.Operation)
	}
	if err = v.decoder.DecodeRaw(request.Object, object); err != nil {
		return nil, nil, fmt.Errorf("read the object: %w", err)
	}
	object.SetNamespace(request.Namespace)
	return object, old, nil
}

func specOf(o client.Object) any {
	switch o := o.(type) {
	case *sriovv1.SriovNetworkNodePolicy:
		return o.Spec
	case *sriovv1.SriovOperatorConfig:
		return o.Spec
	case *sriovv1.SriovNetworkPoolConfig:
		return o.Spec
	case *sriovv1.SriovNetwork:
		return o.Spec
	case *sriovv1.SriovIBNetwork:
		return o.Spec
	case *sriovv1.OVSNetwork:
		return o.Spec
	case *sluicev1.MacvlanNodePolicy:
		return o.Spec
	case *sluicev1.MacvlanNetwork:
		return o.Spec
	case *sluicev1.IPPool:
		return o.Spec
	}
	return o
}

// counts tells whether an object is where the operator looks, and warns when it is not.
func (v *Validator) counts(f *findings, kind string, o client.Object) bool {
	if o.GetNamespace() == v.Namespace {
		return true
	}
	f.warn("metadata.namespace %s: only a %s in namespace %s has an effect: make it there", o.GetNamespace(), kind, v.Namespace)
	return false
}

func (v *Validator) policy(ctx context.Context, f *findings, policy *sriovv1.SriovNetworkNodePolicy) error {
	if !v.counts(f, "SriovNetworkNodePolicy", policy) {
		return nil
	}
	cluster, err := v.cluster(ctx)
	if err != nil {
		return err
	}
	f.errors, f.warnings = cluster.AdmitPolicy(policy)
	return nil
}

func (v *Validator) macvlanPolicy(ctx context.Context, f *findings, policy *sluicev1.MacvlanNodePolicy) error {
	if !v.counts(f, "MacvlanNodePolicy", policy) {
		return nil
	}
	cluster, err := v.cluster(ctx)
	if err != nil {
		return err
	}
	f.errors, f.warnings = cluster.AdmitMacvlanPolicy(policy)
	return nil
}

// cluster reads what a policy would meet.
func (v *Validator) cluster(ctx context.Context) (*plan.Cluster, error) {
	policies, macvlans := &sriovv1.SriovNetworkNodePolicyList{}, &sluicev1.MacvlanNodePolicyList{}
	states := &sriovv1.SriovNetworkNodeStateList{}
	for _, list := range []client.ObjectList{policies, macvlans, states} {
		// They are only read.
		if err := v.List(ctx, list, client.InNamespace(v.Namespace), client.UnsafeDisableDeepCopy); err != nil {
			return nil, fmt.Errorf("list %T: %w", list, err)
		}
	}
	nodes, err := v.nodes(ctx)
	if err != nil {
		return nil, err
	}
	config := &sriovv1.SriovOperatorConfig{}
	if err := v.Get(ctx, client.ObjectKey{Namespace: v.Namespace, Name: sriovv1.DefaultOperatorConfigName}, config); client.IgnoreNotFound(err) != nil {
		return nil, fmt.Errorf("read SriovOperatorConfig %s: %w", sriovv1.DefaultOperatorConfigName, err)
	}
	c := &plan.Cluster{Nodes: nodes, Bridges: config.Spec.FeatureGates[plan.GateBridges]}
	for i := range policies.Items {
		if policies.Items[i].DeletionTimestamp == nil {
			c.Policies = append(c.Policies, policies.Items[i])
		}
	}
	for i := range macvlans.Items {
		if macvlans.Items[i].DeletionTimestamp == nil {
			c.Macvlans = append(c.Macvlans, macvlans.Items[i])
		}
	}
	byName := make(map[string]*sriovv1.SriovNetworkNodeState, len(states.Items))
	for i := range states.Items {
		byName[states.Items[i].Name] = &states.Items[i]
	}
	for i := range c.Nodes {
		if state := byName[c.Nodes[i].Name]; state != nil {
			c.Nodes[i].State = *state
		}
	}
	return c, nil
}

// nodes are those that can have an agent, without their states.
func (v *Validator) nodes(ctx context.Context) ([]plan.Node, error) {
	list := &metav1.PartialObjectMetadataList{}
	list.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NodeList"))
	if err := v.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	var nodes []plan.Node
	for i := range list.Items {
		if n := &list.Items[i]; n.Labels[corev1.LabelOSStable] == "linux" {
			nodes = append(nodes, plan.Node{Name: n.Name, Labels: n.Labels})
		}
	}
	return nodes, nil
}

func (v *Validator) network(ctx context.Context, f *findings, object client.Object) (err error) {
	net, ok := render.Of(object)
	if !ok {
		return fmt.Errorf("%T is no network", object)
	}
	nad, errs := net.Definition(v.ResourcePrefix, v.Namespace)
	if f.errors = errs; len(errs) > 0 {
		return nil
	}
	if f.errors, err = NetworkOverlaps(ctx, v, v.Namespace, net); err != nil || len(f.errors) > 0 {
		return err
	}
	if idle := net.Idle(); idle != "" {
		f.warn("spec: %s", idle)
	}
	namespace := &metav1.PartialObjectMetadata{}
	namespace.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	if err := v.Get(ctx, client.ObjectKey{Name: net.Target}, namespace); apierrors.IsNotFound(err) {
		f.warn("spec.networkNamespace %s: there is no such namespace yet: make it, or change networkNamespace", net.Target)
	} else if err != nil {
		return fmt.Errorf("read namespace %s: %w", net.Target, err)
	}
	if err := v.usesPool(ctx, f, net); err != nil {
		return err
	}
	resource, has := nad.Annotations[sriovv1.AnnotationResourceName]
	if !has {
		return nil
	}
	return v.resource(ctx, f, net, strings.TrimPrefix(resource, v.ResourcePrefix+"/"))
}

// resource warns when no policy, or one of the wrong kind, makes what a network draws
// from, or makes it so that the network cannot use it.
func (v *Validator) resource(ctx context.Context, f *findings, net *render.Network, name string) error {
	policies, macvlans := &sriovv1.SriovNetworkNodePolicyList{}, &sluicev1.MacvlanNodePolicyList{}
	for _, list := range []client.ObjectList{policies, macvlans} {
		if err := v.List(ctx, list, client.InNamespace(v.Namespace), client.UnsafeDisableDeepCopy); err != nil {
			return fmt.Errorf("list %T: %w", list, err)
		}
	}
	vfs := slices.DeleteFunc(slices.Clone(policies.Items), func(p sriovv1.SriovNetworkNodePolicy) bool { return p.Spec.ResourceName != name })
	slots := slices.DeleteFunc(slices.Clone(macvlans.Items), func(p sluicev1.MacvlanNodePolicy) bool { return p.Spec.ResourceName != name })
	need, other, is, isOther := "SriovNetworkNodePolicy", "MacvlanNodePolicy", len(vfs) > 0, len(slots) > 0
	if net.Kind.Kind == "MacvlanNetwork" {
		need, other, is, isOther = other, need, isOther, is
	}
	switch {
	case !is && isOther:
		f.warn("spec.resourceName %s is the resource of a %s, and a %s draws from that of a %s: name another resource", name, other, net.Kind.Kind, need)
		return nil
	case !is:
		f.warn("spec.resourceName %s: no %s makes this resource yet, and until then pods of this network stay Pending: make one, or name another resource", name, need)
		return nil
	}
	switch o := net.Object.(type) {
	case *sluicev1.MacvlanNetwork:
		for _, p := range slots {
			if o.Spec.Mode == "passthru" && p.Spec.Slots > 1 {
				f.warn("spec.mode passthru gives a link to one pod alone, and MacvlanNodePolicy %s offers %d slots of each: set its slots to 1, or mode to bridge, private or vepa", p.Name, p.Spec.Slots)
			}
		}
	case *sriovv1.OVSNetwork:
		for _, p := range vfs {
			if p.Spec.EswitchMode != sriovv1.EswitchModeSwitchdev {
				f.warn("spec.resourceName %s: a VF has a port on a bridge only in switchdev mode: set eSwitchMode to switchdev in SriovNetworkNodePolicy %s", name, p.Name)
			}
		}
	}
	return nil
}

func (v *Validator) operatorConfig(ctx context.Context, f *findings, config, before *sriovv1.SriovOperatorConfig) error {
	if config.Name != sriovv1.DefaultOperatorConfigName || config.Namespace != v.Namespace {
		f.errors = append(f.errors, field.Invalid(field.NewPath("metadata"), config.Namespace+"/"+config.Name,
			fmt.Sprintf("only the SriovOperatorConfig %s in namespace %s has an effect: make that one", sriovv1.DefaultOperatorConfigName, v.Namespace)))
		return nil
	}
	for _, text := range v.Unsupported(&config.Spec) {
		f.warn("spec.%s", text)
	}
	if !config.Spec.DisableDrain || before != nil && before.Spec.DisableDrain {
		return nil
	}
	f.warn("spec.disableDrain true: no pod is evicted, and a change that needs VFs which pods hold waits until they are gone")
	states := &sriovv1.SriovNetworkNodeStateList{}
	if err := v.List(ctx, states, client.InNamespace(v.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("list node states: %w", err)
	}
	var busy []string
	for i := range states.Items {
		if states.Items[i].Status.SyncStatus == sriovv1.SyncStatusInProgress {
			busy = append(busy, states.Items[i].Name)
		}
	}
	if slices.Sort(busy); len(busy) > 0 {
		const most = 5
		more := ""
		if n := len(busy) - most; n > 0 {
			busy, more = busy[:most], fmt.Sprintf(" and %d more", n)
		}
		f.warn("spec.disableDrain true: changes of nodes %s%s are under way and may wait half-way, which their SriovNetworkNodeStates will tell", strings.Join(busy, ", "), more)
	}
	return nil
}

func (v *Validator) poolConfig(ctx context.Context, f *findings, pool *sriovv1.SriovNetworkPoolConfig) error {
	if !v.counts(f, "SriovNetworkPoolConfig", pool) {
		return nil
	}
	pools := &sriovv1.SriovNetworkPoolConfigList{}
	if err := v.List(ctx, pools, client.InNamespace(v.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("list pools: %w", err)
	}
	nodes, err := v.nodes(ctx)
	if err != nil {
		return err
	}
	f.errors, f.warnings = plan.AdmitPool(pool, pools.Items, nodes)
	return nil
}
