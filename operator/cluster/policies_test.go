package cluster

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	followed "github.com/sluice-network/sluice/cni/enforce/cluster"
	"github.com/sluice-network/sluice/cni/policy"
)

// seen is a Sink that keeps what there is, by kind and name.
type seen struct{ sync.Map }

func (s *seen) SetPod(p *followed.Pod) {
	s.Store("Pod "+p.Namespace+"/"+p.Name, fmt.Sprint(p.Labels, p.Annotations))
}
func (s *seen) DeletePod(namespace, name string) { s.Delete("Pod " + namespace + "/" + name) }
func (s *seen) SetNamespace(n policy.Namespace)  { s.Store("Namespace "+n.Name, "") }
func (s *seen) DeleteNamespace(name string)      { s.Delete("Namespace " + name) }
func (s *seen) SetNetwork(n policy.Network)      { s.Store("Network "+n.Name, fmt.Sprint(n.Enforcement)) }
func (s *seen) DeleteNetwork(name string)        { s.Delete("Network " + name) }
func (s *seen) SetPolicy(p followed.Policy) {
	s.Store(p.String(), p.APIVersion+" "+strings.Join(p.Faults, ""))
}
func (s *seen) DeletePolicy(p followed.Policy) { s.Delete(p.String()) }
func (s *seen) is(key, want string) func() error {
	return func() error {
		if got, ok := s.Load(key); !ok || !strings.Contains(got.(string), want) {
			return fmt.Errorf("%s is %v, not %q", key, got, want)
		}
		return nil
	}
}
func (s *seen) gone(key string) func() error {
	return func() error {
		if got, ok := s.Load(key); ok {
			return fmt.Errorf("%s is there: %v", key, got)
		}
		return nil
	}
}

// An agent, with the rights it has, follows all that network policy depends on, also kinds
// that are installed later, served in other versions, and removed.
func TestAgentFollowsPolicies(t *testing.T) {
	needAPI(t)
	definition := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{
		"group": "k8s.cni.cncf.io", "scope": "Namespaced",
		"names":    map[string]any{"kind": "MultiNetworkPolicy", "plural": "multi-networkpolicies", "singular": "multi-networkpolicy"},
		"versions": []any{version("v1beta1", true), version("v1beta2", false)},
	}}}
	definition.SetGroupVersionKind(schema.GroupVersionKind{Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinition"})
	definition.SetName("multi-networkpolicies.k8s.cni.cncf.io")

	config := as("sluice-agent", map[string][]string{"authentication.kubernetes.io/node-name": {"pol-1"}})
	s := &seen{}
	follow, err := followed.New(config, "pol-1", []string{"sluice.dev/enforcement"}, s, testr.New(t))
	if err != nil {
		t.Fatal(err)
	}
	go follow.Run(t.Context())
	eventually(t, func() error {
		if !follow.Synced() {
			return fmt.Errorf("not all is known")
		}
		return nil
	})
	eventually(t, s.is("Namespace "+operatorNamespace, ""))

	pod := func(name, node, status string) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: name, Labels: map[string]string{"a": "1"}, Annotations: map[string]string{
			"sluice.dev/enforcement": "y", "other": "x", nadv1.NetworkStatusAnnot: status,
		}}}
		p.Spec.NodeName, p.Spec.Containers = node, []corev1.Container{{Name: "c", Image: "i"}}
		if err := api.Create(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	own := pod("pol-own", "pol-1", "[]")
	pod("pol-peer", "pol-2", `[{"name":"default/blue","interface":"net1","ips":["192.0.2.1"],"mac":"02:00:00:00:00:01"}]`)
	pod("pol-other", "pol-2", "[]")
	eventually(t, s.is("Pod "+operatorNamespace+"/pol-own", "map[a:1] map[sluice.dev/enforcement:y]"))
	eventually(t, s.is("Pod "+operatorNamespace+"/pol-peer", "map[a:1] map[]"))
	eventually(t, s.is("Pod "+operatorNamespace+"/pol-other", "map[] map[]")) // is nobody's peer
	if p, err := follow.Pod(t.Context(), own.Namespace, own.Name, string(own.UID), time.Minute); err != nil || p.UID != string(own.UID) {
		t.Errorf("%v, %v", p, err)
	}
	if _, err := follow.Pod(t.Context(), own.Namespace, "nosuch", "", 10*time.Second); err == nil || !strings.Contains(err.Error(), "pod "+operatorNamespace+"/nosuch") || !strings.Contains(err.Error(), "not found") {
		t.Errorf("%v", err)
	}
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "pol"}}
	if err := api.Create(t.Context(), np); err != nil {
		t.Fatal(err)
	}
	eventually(t, s.is("NetworkPolicy "+operatorNamespace+"/pol", "networking.k8s.io/v1"))

	// MultiNetworkPolicies
	if err := api.Create(t.Context(), definition); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = api.Delete(t.Context(), definition) })
	mnp := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"podSelector": map[string]any{}}}}
	mnp.SetGroupVersionKind(schema.GroupVersionKind{Group: "k8s.cni.cncf.io", Version: "v1beta1", Kind: "MultiNetworkPolicy"})
	mnp.SetNamespace(operatorNamespace)
	mnp.SetName("pol")
	eventually(t, func() error { return api.Create(t.Context(), mnp) })
	name := "MultiNetworkPolicy " + operatorNamespace + "/pol"
	eventually(t, s.is(name, "k8s.cni.cncf.io/v1beta1 "))
	eventually(t, func() error { // the API server writes its status beside
		if err := api.Get(t.Context(), client.ObjectKeyFromObject(definition), definition); err != nil {
			return err
		}
		if err := unstructured.SetNestedSlice(definition.Object, []any{version("v1beta1", false), version("v1beta2", true)}, "spec", "versions"); err != nil {
			return err
		}
		return api.Update(t.Context(), definition)
	})
	eventually(t, s.is(name, "k8s.cni.cncf.io/v1beta2 "))
	if !follow.Synced() {
		t.Error("not synced")
	}
	if err := api.Delete(t.Context(), definition); err != nil {
		t.Fatal(err)
	}
	eventually(t, s.gone(name))
	for _, o := range []client.Object{own, np} {
		if err := api.Delete(t.Context(), o, client.GracePeriodSeconds(0)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, s.gone("Pod "+operatorNamespace+"/pol-own"))
	eventually(t, s.gone("NetworkPolicy "+operatorNamespace+"/pol"))
}

// version is one of a CustomResourceDefinition, of which any object is valid.
func version(name string, served bool) map[string]any {
	return map[string]any{"name": name, "served": served, "storage": name == "v1beta1",
		"schema": map[string]any{"openAPIV3Schema": map[string]any{"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}
}
