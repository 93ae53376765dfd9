package cluster

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	sluicev1 "github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/render"
)

// nadKind is as much of Multus' kind as matters here.
const nadKind = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: network-attachment-definitions.k8s.cni.cncf.io}
spec:
  group: k8s.cni.cncf.io
  scope: Namespaced
  names: {plural: network-attachment-definitions, singular: network-attachment-definition, kind: NetworkAttachmentDefinition}
  versions:
  - name: v1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        properties: {spec: {type: object, properties: {config: {type: string}}}}
`

// installMultus gives the cluster Multus' kind, if it has not got it.
func installMultus(t *testing.T) {
	t.Helper()
	kind := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(nadKind), &kind.Object); err != nil {
		t.Fatal(err)
	}
	if err := api.Create(t.Context(), kind); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
}

func makeNamespace(t *testing.T, name string) {
	t.Helper()
	if err := api.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}); err != nil {
		t.Fatal(err)
	}
}

// kindOfNetwork is what a test needs to handle networks of one kind alike.
type kindOfNetwork struct {
	name   string
	plugin string // the CNI type of its NetworkAttachmentDefinition
	make   func(meta metav1.ObjectMeta, target string) client.Object
	edit   func(o client.Object, target, ipam string)
}

var kindsOfNetwork = []kindOfNetwork{
	{"SriovNetwork", "sriov",
		func(meta metav1.ObjectMeta, target string) client.Object {
			return &sriovv1.SriovNetwork{ObjectMeta: meta, Spec: sriovv1.SriovNetworkSpec{ResourceName: "r", NetworkNamespace: target}}
		},
		func(o client.Object, target, ipam string) {
			s := &o.(*sriovv1.SriovNetwork).Spec
			s.NetworkNamespace, s.IPAM = target, ipam
		}},
	{"SriovIBNetwork", "ib-sriov",
		func(meta metav1.ObjectMeta, target string) client.Object {
			return &sriovv1.SriovIBNetwork{ObjectMeta: meta, Spec: sriovv1.SriovIBNetworkSpec{ResourceName: "r", NetworkNamespace: target}}
		},
		func(o client.Object, target, ipam string) {
			s := &o.(*sriovv1.SriovIBNetwork).Spec
			s.NetworkNamespace, s.IPAM = target, ipam
		}},
	{"OVSNetwork", "ovs",
		func(meta metav1.ObjectMeta, target string) client.Object {
			return &sriovv1.OVSNetwork{ObjectMeta: meta, Spec: sriovv1.OVSNetworkSpec{ResourceName: "r", NetworkNamespace: target}}
		},
		func(o client.Object, target, ipam string) {
			s := &o.(*sriovv1.OVSNetwork).Spec
			s.NetworkNamespace, s.IPAM = target, ipam
		}},
	{"MacvlanNetwork", "sluice",
		func(meta metav1.ObjectMeta, target string) client.Object {
			return &sluicev1.MacvlanNetwork{ObjectMeta: meta, Spec: sluicev1.MacvlanNetworkSpec{ResourceName: "r", NetworkNamespace: target}}
		},
		func(o client.Object, target, ipam string) {
			s := &o.(*sluicev1.MacvlanNetwork).Spec
			s.NetworkNamespace, s.IPAM = target, ipam
		}},
}

func (k kindOfNetwork) create(t *testing.T, namespace, name, target string, annotations map[string]string) client.Object {
	t.Helper()
	o := k.make(metav1.ObjectMeta{Namespace: namespace, Name: name, Annotations: annotations}, target)
	if err := api.Create(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	return o
}

// wantNetwork waits until a network is ready with this reason, or is not, and degraded.
func wantNetwork(t *testing.T, o client.Object, reason, message string) {
	t.Helper()
	ready, degraded := metav1.ConditionFalse, metav1.ConditionTrue
	if reason == sriovv1.ReasonNetworkReady {
		ready, degraded = degraded, ready
	}
	conditions := func() []metav1.Condition {
		n, _ := render.Of(o)
		return n.Status.Conditions
	}
	wantCondition(t, o, conditions, sriovv1.ConditionReady, ready, reason, message)
	wantCondition(t, o, conditions, sriovv1.ConditionDegraded, degraded, reason, message)
	wantCondition(t, o, conditions, sriovv1.ConditionProgressing, metav1.ConditionFalse, reason, message)
	if n, _ := render.Of(o); n.Status.ObservedGeneration != o.GetGeneration() {
		t.Errorf("%s: status.observedGeneration is %d, want %d", n, n.Status.ObservedGeneration, o.GetGeneration())
	}
}

func getNAD(t *testing.T, namespace, name string) (*nadv1.NetworkAttachmentDefinition, error) {
	nad := &nadv1.NetworkAttachmentDefinition{}
	return nad, api.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: name}, nad)
}

// wantGone waits until an object does not exist.
func wantGone(t *testing.T, o client.Object) {
	t.Helper()
	eventually(t, func() error {
		if err := api.Get(t.Context(), client.ObjectKeyFromObject(o), o); !apierrors.IsNotFound(err) {
			return fmt.Errorf("%T %s is not gone: %w", o, client.ObjectKeyFromObject(o), errors.Join(err))
		}
		return nil
	})
}

func wantNADGone(t *testing.T, namespace, name string) {
	t.Helper()
	wantGone(t, &nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}})
}

func TestNetwork(t *testing.T) {
	needAPI(t)
	for _, ns := range []string{"apps", "more", "tenant", "victim"} {
		makeNamespace(t, ns)
	}
	// Without Multus a network says so, and comes to life when Multus does.
	own := kindsOfNetwork[0].create(t, operatorNamespace, "own", "", nil)
	wantNetwork(t, own, sriovv1.ReasonNADNotFound, "the cluster has no kind NetworkAttachmentDefinition: install Multus")
	installMultus(t)
	wantNetwork(t, own, sriovv1.ReasonNetworkReady, "")
	made, err := getNAD(t, operatorNamespace, "own")
	if err != nil {
		t.Fatal(err)
	}
	if made.Spec.Config != `{"cniVersion":"1.0.0","name":"own","type":"sriov","vlan":0,"vlanQoS":0,"logLevel":"info","ipam":{}}` ||
		made.Annotations[sriovv1.AnnotationResourceName] != "openshift.io/r" || !metav1.IsControlledBy(made, own) {
		t.Errorf("it is %+v", made)
	}
	change(t, own, func(o client.Object) { o.(*sriovv1.SriovNetwork).Spec.LogLevel = "debug" })
	wantNetwork(t, own, sriovv1.ReasonNetworkReady, "logLevel debug without effect: the agent logs each CNI call itself")
	for _, k := range kindsOfNetwork {
		t.Run(k.name, func(t *testing.T) { testNetwork(t, k) })
	}
}

// A network is not made in addresses that the cluster uses, and one that is there when the
// cluster comes to use them is left and told.
func TestNetworkInTheClustersAddresses(t *testing.T) {
	needAPI(t)
	installMultus(t)
	in := func(name, subnet string) client.Object {
		n := &sriovv1.SriovNetwork{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: name}}
		n.Spec.ResourceName, n.Spec.IPAM = "r", fmt.Sprintf(`{"type": "host-local", "subnet": %q}`, subnet)
		if err := api.Create(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = api.Delete(t.Context(), n) })
		return n
	}
	services := in("in-services", "10.0.0.128/25")
	wantNetwork(t, services, sriovv1.ReasonNADInvalid, `spec.ipam: Invalid value: "10.0.0.128/25": it overlaps 10.0.0.0/24, which the cluster uses for Services (ServiceCIDR kubernetes)`)
	if _, err := getNAD(t, operatorNamespace, "in-services"); !apierrors.IsNotFound(err) {
		t.Errorf("it was made all the same: %v", err)
	}
	pool := &sluicev1.IPPool{ObjectMeta: metav1.ObjectMeta{Namespace: operatorNamespace, Name: "in-services"}, Spec: sluicev1.IPPoolSpec{IPv4: &sluicev1.IPRange{CIDR: "10.0.0.64/26"}}}
	if err := api.Create(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = api.Delete(t.Context(), pool) }()
	wantCondition(t, pool, func() []metav1.Condition { return pool.Status.Conditions }, sriovv1.ConditionReady, metav1.ConditionFalse, "PoolInvalid", `spec: Invalid value: "10.0.0.64/26": it overlaps 10.0.0.0/24`)
	change(t, services, func(n client.Object) {
		n.(*sriovv1.SriovNetwork).Spec.IPAM = `{"type": "sluice", "pool": "in-services"}`
	})
	wantNetwork(t, services, sriovv1.ReasonNADInvalid, `spec.ipam: Invalid value: "10.0.0.64/26": it overlaps 10.0.0.0/24, which the cluster uses for Services (ServiceCIDR kubernetes)`)
	pods := in("in-pods", "192.0.2.0/25")
	wantNetwork(t, pods, sriovv1.ReasonNetworkReady, "")
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "in-pods"}, Spec: corev1.NodeSpec{PodCIDR: "192.0.2.64/26", PodCIDRs: []string{"192.0.2.64/26"}}}
	if err := api.Create(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	wantNetwork(t, pods, sriovv1.ReasonNADInvalid, "it overlaps 192.0.2.64/26, which the cluster uses for the pods of node in-pods")
	if _, err := getNAD(t, operatorNamespace, "in-pods"); err != nil {
		t.Errorf("pods that use it would lose it: %v", err)
	}
	if err := api.Delete(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	wantNetwork(t, pods, sriovv1.ReasonNetworkReady, "")
}

func testNetwork(t *testing.T, k kindOfNetwork) {
	t.Run("another namespace", func(t *testing.T) {
		name := k.plugin + "-moving"
		n := k.create(t, operatorNamespace, name, "apps", nil)
		wantNetwork(t, n, sriovv1.ReasonNetworkReady, "")
		made, err := getNAD(t, "apps", name)
		if err != nil {
			t.Fatal(err)
		}
		version := made.ResourceVersion
		plural := strings.ToLower(k.name) + "s."
		if len(made.OwnerReferences) != 1 || made.OwnerReferences[0].Kind != "CustomResourceDefinition" || !strings.HasPrefix(made.OwnerReferences[0].Name, plural) || made.OwnerReferences[0].UID == "" {
			t.Errorf("it is owned by %+v, which the garbage collector would not see go with the network's kind", made.OwnerReferences)
		}

		// Status and metadata changes write nothing; a changed or deleted one is put right.
		change(t, n, func(n client.Object) { n.SetLabels(map[string]string{"touched": "yes"}) })
		time.Sleep(300 * time.Millisecond)
		if made, err = getNAD(t, "apps", name); err != nil || made.ResourceVersion != version {
			t.Errorf("it was written without a change: %v", err)
		}
		change(t, made, func(n *nadv1.NetworkAttachmentDefinition) { n.Spec.Config = "{}" })
		eventually(t, func() error {
			if made, err = getNAD(t, "apps", name); err == nil && made.Spec.Config == "{}" {
				err = errors.New("the configuration is not put right")
			}
			return err
		})
		if err := api.Delete(t.Context(), made); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error { _, err := getNAD(t, "apps", name); return err })

		// Bad JSON leaves what is there.
		change(t, n, func(n client.Object) { k.edit(n, "apps", `{"type": "static"`) })
		wantNetwork(t, n, sriovv1.ReasonNADInvalid, `spec.ipam: Invalid value: "{\"type\": \"static\"": invalid JSON at line 1, column 17`)
		if _, err := getNAD(t, "apps", name); err != nil {
			t.Error(err)
		}

		// It moves, and leaves nothing behind.
		change(t, n, func(n client.Object) { k.edit(n, "more", "") })
		wantNetwork(t, n, sriovv1.ReasonNetworkReady, "more/"+name)
		wantNADGone(t, "apps", name)
		if err := api.Delete(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		wantNADGone(t, "more", name)
		wantGone(t, n)
		eventually(t, func() error {
			list := &eventsv1.EventList{}
			if err := api.List(t.Context(), list, client.InNamespace(operatorNamespace)); err != nil {
				return err
			}
			seen := map[string]int{}
			for _, e := range list.Items {
				if e.Regarding.Name == name && e.Regarding.Kind == k.name {
					seen[e.Type+" "+e.Reason]++
				}
			}
			if len(seen) != 2 || seen["Normal "+sriovv1.ReasonNetworkReady] == 0 || seen["Warning "+sriovv1.ReasonNADInvalid] == 0 {
				return fmt.Errorf("the events are %v", seen)
			}
			return nil
		})
	})

	t.Run("home again", func(t *testing.T) {
		name := k.plugin + "-home"
		n := k.create(t, operatorNamespace, name, "apps", nil)
		wantNetwork(t, n, sriovv1.ReasonNetworkReady, "")
		if len(n.GetFinalizers()) != 0 {
			t.Errorf("nothing must hold a network, and the finalizers are %v", n.GetFinalizers())
		}
		change(t, n, func(n client.Object) { n.SetFinalizers([]string{sriovv1.FinalizerNetAttDef}) }) // of another operator
		change(t, n, func(n client.Object) { k.edit(n, "", "") })
		wantNetwork(t, n, sriovv1.ReasonNetworkReady, operatorNamespace+"/"+name)
		wantNADGone(t, "apps", name)
		eventually(t, func() error {
			if err := api.Get(t.Context(), client.ObjectKeyFromObject(n), n); err != nil || len(n.GetFinalizers()) != 0 {
				return fmt.Errorf("the finalizers are %v: %w", n.GetFinalizers(), errors.Join(err))
			}
			return nil
		})
	})

	// What a network made while no operator saw it go is found by its annotations.
	t.Run("orphans", func(t *testing.T) {
		group := "sriovnetwork.openshift.io"
		if k.name == "MacvlanNetwork" {
			group = "sluice.dev"
		}
		orphan := func(name string, annotations map[string]string) *nadv1.NetworkAttachmentDefinition {
			nad := &nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Namespace: "apps", Name: k.plugin + "-" + name, Annotations: annotations}}
			if err := api.Create(t.Context(), nad); err != nil {
				t.Fatal(err)
			}
			return nad
		}
		owner := k.name + "." + group + "/" + operatorNamespace + "/" + k.plugin + "-"
		gone := orphan("ghost", map[string]string{sriovv1.AnnotationOwnerRef: owner + "ghost", sriovv1.AnnotationOwnerUID: "u"})
		var kept []*nadv1.NetworkAttachmentDefinition
		for name, annotations := range map[string]map[string]string{
			"no-uid":   {sriovv1.AnnotationOwnerRef: owner + "no-uid"},
			"renamed":  {sriovv1.AnnotationOwnerRef: owner + "other-name", sriovv1.AnnotationOwnerUID: "u"},
			"tenantry": {sriovv1.AnnotationOwnerRef: k.name + "." + group + "/tenant/" + k.plugin + "-tenantry", sriovv1.AnnotationOwnerUID: "u"},
		} {
			kept = append(kept, orphan(name, annotations))
		}
		wantGone(t, gone)
		for _, nad := range kept {
			if _, err := getNAD(t, nad.Namespace, nad.Name); err != nil {
				t.Errorf("%s: %v", nad.Name, err)
			}
		}
	})

	t.Run("a namespace that comes later", func(t *testing.T) {
		later := k.plugin + "-later"
		n := k.create(t, operatorNamespace, k.plugin+"-early", later, nil)
		wantNetwork(t, n, sriovv1.ReasonNamespaceNotFound, "spec.networkNamespace "+later+": there is no such namespace")
		makeNamespace(t, later)
		wantNetwork(t, n, sriovv1.ReasonNetworkReady, "")
	})

	t.Run("a tenant's network", func(t *testing.T) {
		n := k.create(t, "tenant", k.plugin+"-tenants", "", nil)
		wantNetwork(t, n, sriovv1.ReasonNetworkReady, "")
		n = k.create(t, "tenant", k.plugin+"-reaching", "apps", nil)
		wantNetwork(t, n, sriovv1.ReasonNADInvalid, "spec.networkNamespace: Forbidden: it is apps, and only networks in namespace "+operatorNamespace+" may name another namespace")
		wantNADGone(t, "apps", k.plugin+"-reaching")
	})

	// The SR-IOV network operator deletes, with its own rights, what a tenant names in the
	// annotation last-network-namespace.
	t.Run("a tenant cannot steer a delete", func(t *testing.T) {
		name := k.plugin + "-prey"
		steer := map[string]string{"operator.sriovnetwork.openshift.io/last-network-namespace": "victim"}
		group := "sriovnetwork.openshift.io"
		if k.name == "MacvlanNetwork" {
			group = "sluice.dev"
		}
		var preys []*nadv1.NetworkAttachmentDefinition
		for i, annotations := range []map[string]string{
			nil,
			{sriovv1.AnnotationOwnerRef: k.name + "." + group + "/victim/" + name, sriovv1.AnnotationOwnerUID: "1b4e28ba-2fa1-11d2-883f-0016d3cca427"},
			{sriovv1.AnnotationOwnerRef: k.name + "." + group + "/tenant/" + name + "-2"}, // even so it is not in the tenant's namespace
		} {
			prey := &nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Namespace: "victim", Name: fmt.Sprintf("%s-%d", name, i), Annotations: annotations}}
			prey.Spec.Config = `{"type":"bridge"}`
			if err := api.Create(t.Context(), prey); err != nil {
				t.Fatal(err)
			}
			preys = append(preys, prey)
		}
		for i := range preys {
			n := k.create(t, "tenant", fmt.Sprintf("%s-%d", name, i), "", steer)
			wantNetwork(t, n, sriovv1.ReasonNetworkReady, "")
			change(t, n, func(n client.Object) { k.edit(n, "tenant", "{}") })
			wantNetwork(t, n, sriovv1.ReasonNetworkReady, "")
			change(t, n, func(n client.Object) { n.SetFinalizers([]string{sriovv1.FinalizerNetAttDef}) })
			if err := api.Delete(t.Context(), n); err != nil {
				t.Fatal(err)
			}
			wantGone(t, n)
		}
		for _, prey := range preys {
			if left, err := getNAD(t, "victim", prey.Name); err != nil || left.UID != prey.UID || left.Spec.Config != prey.Spec.Config {
				t.Errorf("%s is %+v: %v", prey.Name, left, err)
			}
		}
	})

	t.Run("what is another's is left alone", func(t *testing.T) {
		name := k.plugin + "-taken"
		foreign := &nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Namespace: "apps", Name: name}}
		foreign.Spec.Config = `{"type":"bridge"}`
		if err := api.Create(t.Context(), foreign); err != nil {
			t.Fatal(err)
		}
		n := k.create(t, operatorNamespace, name, "apps", nil)
		wantNetwork(t, n, sriovv1.ReasonNADInvalid, "NetworkAttachmentDefinition apps/"+name+" belongs to somebody else and is left as it is")
		if err := api.Delete(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		wantGone(t, n)
		if left, err := getNAD(t, "apps", name); err != nil || left.Spec.Config != `{"type":"bridge"}` {
			t.Errorf("it is %+v: %v", left, err)
		}

		// Once it is gone, the network has its turn.
		n = k.create(t, operatorNamespace, name, "apps", nil)
		wantNetwork(t, n, sriovv1.ReasonNADInvalid, "belongs to somebody else")
		if err := api.Delete(t.Context(), foreign); err != nil {
			t.Fatal(err)
		}
		wantNetwork(t, n, sriovv1.ReasonNetworkReady, "")
	})

	// The SR-IOV network operator wrote no UID.
	t.Run("taken over", func(t *testing.T) {
		name := k.plugin + "-old"
		old := func(namespace string) *nadv1.NetworkAttachmentDefinition {
			n, _ := render.Of(k.make(metav1.ObjectMeta{Namespace: operatorNamespace, Name: name}, ""))
			nad := &nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Annotations: map[string]string{
				sriovv1.AnnotationOwnerRef: n.OwnerRef(), sriovv1.AnnotationResourceName: "openshift.io/r"}}}
			nad.Spec.Config = "{\n  \"type\": \"" + k.plugin + "\"\n}"
			if err := api.Create(t.Context(), nad); err != nil {
				t.Fatal(err)
			}
			return nad
		}
		inUse := old("apps")
		old("more") // left where the network was before
		n := k.create(t, operatorNamespace, name, "apps", map[string]string{"operator.sriovnetwork.openshift.io/last-network-namespace": "apps"})
		wantNetwork(t, n, sriovv1.ReasonNetworkReady, "")
		nad, err := getNAD(t, "apps", name)
		if err != nil || nad.UID != inUse.UID || nad.Annotations[sriovv1.AnnotationOwnerUID] != string(n.GetUID()) {
			t.Errorf("it is %+v: %v", nad, err)
		}
		wantNADGone(t, "more", name)
		if err := api.Delete(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		wantNADGone(t, "apps", name)
	})
}
