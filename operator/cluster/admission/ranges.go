package admission

import (
	"context"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/controller-runtime/pkg/client"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	"github.com/sluice-network/sluice/operator/render"
)

// ServiceCIDR is the kind that tells what addresses Services have. A cluster before
// Kubernetes 1.33 has none.
var ServiceCIDR = networkingv1.SchemeGroupVersion.WithKind("ServiceCIDR")

// NetworkOverlaps says which subnets of a network, its IPPool's included, the cluster uses
// already. A pool that is not there, or not valid, says nothing.
func NetworkOverlaps(ctx context.Context, reader client.Reader, operatorNamespace string, net *render.Network) (field.ErrorList, error) {
	subnets := net.Subnets()
	if name := net.Pool(); name != "" {
		pool := &sluicev1.IPPool{}
		err := reader.Get(ctx, client.ObjectKey{Namespace: operatorNamespace, Name: name}, pool)
		if client.IgnoreNotFound(err) != nil {
			return nil, fmt.Errorf("read IPPool %s: %w", name, err)
		}
		subnets = append(subnets, poolSubnets(pool)...)
	}
	used, err := UsedRanges(ctx, reader)
	return render.Overlapping(field.NewPath("spec", "ipam"), subnets, used), err
}

// PoolOverlaps does so for a pool.
func PoolOverlaps(ctx context.Context, reader client.Reader, pool *sluicev1.IPPool) (field.ErrorList, error) {
	used, err := UsedRanges(ctx, reader)
	return render.Overlapping(field.NewPath("spec"), poolSubnets(pool), used), err
}

func poolSubnets(pool *sluicev1.IPPool) (all []netip.Prefix) {
	if parsed, errs := pool.Spec.Parse(); len(errs) == 0 {
		for _, r := range parsed.Ranges {
			all = append(all, r.Subnet)
		}
	}
	return all
}

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
