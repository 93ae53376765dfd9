package admission

import (
	"context"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/sluice-network/sluice/operator/render"
)

// ServiceCIDR is the kind that tells what addresses Services have. A cluster before
// Kubernetes 1.33 has none.
var ServiceCIDR = networkingv1.SchemeGroupVersion.WithKind("ServiceCIDR")

// UsedRanges are the addresses of Services and of the nodes' pods, as far as the API server
// knows them, in no order.
func UsedRanges(ctx context.Context, reader client.Reader) ([]render.Range, error) {
	var all []render.Range
	add := func(text, use string) {
		if prefix, err := netip.ParsePrefix(text); err == nil {
			all = append(all, render.Range{Prefix: prefix, For: use})
		}
	}
	services, nodes := &networkingv1.ServiceCIDRList{}, &corev1.NodeList{}
	if err := reader.List(ctx, services, client.UnsafeDisableDeepCopy); err != nil && !meta.IsNoMatchError(err) {
		return nil, fmt.Errorf("list ServiceCIDRs: %w", err)
	}
	for i := range services.Items {
		for _, cidr := range services.Items[i].Spec.CIDRs {
			add(cidr, "Services (ServiceCIDR "+services.Items[i].Name+")")
		}
	}
	if err := reader.List(ctx, nodes, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	for i := range nodes.Items {
		for _, cidr := range nodes.Items[i].Spec.PodCIDRs {
			add(cidr, "the pods of node "+nodes.Items[i].Name)
		}
	}
	return all, nil
}

// KeepPodCIDRs is for a cache of nodes: of thousands it keeps only what UsedRanges reads.
func KeepPodCIDRs(object any) (any, error) {
	node, ok := object.(*corev1.Node)
	if !ok {
		return object, nil
	}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: node.Name, UID: node.UID, ResourceVersion: node.ResourceVersion},
		Spec:       corev1.NodeSpec{PodCIDRs: node.Spec.PodCIDRs},
	}, nil
}
