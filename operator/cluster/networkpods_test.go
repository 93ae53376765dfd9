package cluster

import (
	"errors"
	"fmt"
	"testing"

	registrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/cluster/admission"
)

// podOn makes a pod on networks that asks for nothing, and is given some of r or not.
func podOn(t *testing.T, namespace, networks string) (gets string, err error) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, GenerateName: "in-", Annotations: map[string]string{"k8s.v1.cni.cncf.io/networks": networks}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}
	if err = api.Create(t.Context(), pod); err == nil {
		err = api.Delete(t.Context(), pod, client.GracePeriodSeconds(0))
	}
	limit := pod.Spec.Containers[0].Resources.Limits["openshift.io/r"]
	return limit.String(), err
}

// A pod is given what its networks need, also when a network is as new as the pod, and a
// pod on a network that is not there is refused, until the injector is turned off.
func TestInjector(t *testing.T) {
	needAPI(t)
	installMultus(t)
	makeNamespace(t, "injected")
	config := getConfig(t)
	conditions := func() []metav1.Condition { return config.Status.Conditions }
	if !config.Spec.EnableInjector {
		t.Error("the configuration that the operator makes has no injector")
	}
	wantCondition(t, config, conditions, sriovv1.ConditionInjectorReady, metav1.ConditionTrue, "Serving", "")
	hook := &registrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: admission.InjectorName}}
	wantPolicy := func(policy registrationv1.FailurePolicyType) {
		t.Helper()
		eventually(t, func() error {
			err := api.Get(t.Context(), client.ObjectKeyFromObject(hook), hook)
			if err == nil && (*hook.Webhooks[0].FailurePolicy != policy || len(hook.OwnerReferences) != 1 || len(hook.Webhooks[0].MatchConditions) != 1) {
				err = fmt.Errorf("it is %+v", hook)
			}
			return err
		})
	}
	wantPolicy(registrationv1.Ignore)

	network := object(t, "SriovNetwork", "in-net", "resourceName: r\nnetworkNamespace: injected")
	if err := api.Create(t.Context(), network); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = api.Delete(t.Context(), network) }()
	eventually(t, func() error { // the API server takes a moment to act on a webhook's configuration
		gets, err := podOn(t, "injected", "in-net, injected/in-net@eth5")
		if err == nil && gets != "2" {
			err = fmt.Errorf("the pod gets %s", gets)
		}
		return err
	})
	if _, err := podOn(t, "injected", `[{"name": "in-other", "namespace": "injected"}]`); err == nil || refusedWith(err,
		"metadata.annotations: there is no NetworkAttachmentDefinition injected/in-other, so nobody can say what the pod must ask for: make it, or the network that makes it, before the pod") != nil {
		t.Errorf("without its network the error is %v", err)
	}
	second := object(t, "SriovNetwork", "in-other", "resourceName: r\nnetworkNamespace: injected")
	if err := api.Create(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = api.Delete(t.Context(), second) }()
	if gets, err := podOn(t, "injected", "in-other"); err != nil || gets != "1" {
		t.Errorf("together with its network the pod gets %s: %v", gets, err)
	}
	change(t, hook, func(w *registrationv1.MutatingWebhookConfiguration) { w.Webhooks[0].MatchConditions = nil })
	wantPolicy(registrationv1.Ignore)
	change(t, config, func(c *sriovv1.SriovOperatorConfig) {
		c.Spec.FeatureGates = map[string]bool{admission.GateInjectorFails: true}
	})
	wantPolicy(registrationv1.Fail)

	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.EnableInjector, c.Spec.FeatureGates = false, nil })
	wantCondition(t, config, conditions, sriovv1.ConditionInjectorReady, metav1.ConditionFalse, "Off", "spec.enableInjector is false")
	wantGone(t, hook)
	eventually(t, func() error {
		gets, err := podOn(t, "injected", "in-other")
		if err == nil && gets != "0" {
			err = fmt.Errorf("the pod gets %s all the same", gets)
		}
		return err
	})
	// What the SR-IOV network operator leaves is put in its place.
	left := &registrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: admission.InjectorName}, Webhooks: []registrationv1.MutatingWebhook{{
		Name: "network-resources-injector-config.k8s.io", FailurePolicy: new(registrationv1.Fail), SideEffects: new(registrationv1.SideEffectClassNone), AdmissionReviewVersions: []string{"v1"},
		ClientConfig: registrationv1.WebhookClientConfig{Service: &registrationv1.ServiceReference{Namespace: operatorNamespace, Name: "network-resources-injector-service"}},
	}}}
	if err := api.Create(t.Context(), left); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	change(t, config, func(c *sriovv1.SriovOperatorConfig) { c.Spec.EnableInjector = true })
	wantCondition(t, config, conditions, sriovv1.ConditionInjectorReady, metav1.ConditionTrue, "Serving", "")
	wantPolicy(registrationv1.Ignore)

	eventually(t, func() error {
		list := &eventsv1.EventList{}
		if err := api.List(t.Context(), list, client.InNamespace(operatorNamespace)); err != nil {
			return err
		}
		seen := map[string]string{}
		for _, e := range list.Items {
			seen[e.Reason] = e.Type
		}
		if seen["InjectorReadyServing"] != corev1.EventTypeNormal || seen["InjectorReadyOff"] != corev1.EventTypeNormal {
			return errors.New("there are no events of the injector's transitions")
		}
		return nil
	})
}
