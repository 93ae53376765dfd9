package admission

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	"github.com/sluice-network/sluice/operator/render"
)

// ipPool refuses a pool that is not valid and warns of one that shares addresses with
// another.
func (v *Validator) ipPool(ctx context.Context, f *findings, pool *sluicev1.IPPool) error {
	if !v.counts(f, "IPPool", pool) {
		return nil
	}
	parsed, errs := pool.Spec.Parse()
	if f.errors = errs; len(errs) > 0 {
		return nil
	}
	overlaps, err := PoolOverlaps(ctx, v, pool)
	if f.errors = overlaps; err != nil || len(overlaps) > 0 {
		return err
	}
	others := &sluicev1.IPPoolList{}
	if err := v.List(ctx, others, client.InNamespace(v.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("list IPPools: %w", err)
	}
	for i := range others.Items {
		other, bad := others.Items[i].Spec.Parse()
		if len(bad) > 0 || others.Items[i].Name == pool.Name {
			continue
		}
		for _, a := range parsed.Ranges {
			b := other.Family(a.Start.Is4())
			if b != nil && !b.End.Less(a.Start) && !a.End.Less(b.Start) {
				f.warn("spec: addresses %s to %s are also in IPPool %s, and both may give out the same one: right only where their networks never meet", a.Start, a.End, others.Items[i].Name)
			}
		}
	}
	return nil
}

// usesPool warns when a network's pool gives its pods no addresses.
func (v *Validator) usesPool(ctx context.Context, f *findings, net *render.Network) error {
	name := net.Pool()
	if name == "" {
		return nil
	}
	pool := &sluicev1.IPPool{}
	err := v.Get(ctx, client.ObjectKey{Namespace: v.Namespace, Name: name}, pool)
	switch {
	case apierrors.IsNotFound(err):
		f.warn("spec.ipam: there is no IPPool %s in namespace %s yet, and until then pods of this network do not start: make it, or name another pool", name, v.Namespace)
		return nil
	case err != nil:
		return fmt.Errorf("read IPPool %s: %w", name, err)
	}
	if parsed, errs := pool.Spec.Parse(); len(errs) > 0 {
		f.warn("spec.ipam: IPPool %s is not valid: %s", name, errs.ToAggregate())
	} else if !parsed.Lets(net.Target) {
		f.warn("spec.ipam: IPPool %s is not for pods of namespace %s: add it to the pool's spec.namespaces, or name another pool", name, net.Target)
	}
	return nil
}
