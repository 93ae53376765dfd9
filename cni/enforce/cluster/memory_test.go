package cluster

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/go-logr/logr"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/sluice-network/sluice/cni/policy"
)

// aPod is the n-th pod as an API server tells it, with one network besides the cluster's, or
// none.
func aPod(n int, networks bool) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: fmt.Sprintf("team-%d", n%100), Name: fmt.Sprintf("app-%d-7d9c5b8f6d-%05x", n/10, n), UID: "0c3f6a1e-6f0e-4a53-9f5e-" + "000000000000", ResourceVersion: fmt.Sprint(1000000 + n),
			Labels: map[string]string{"app": fmt.Sprintf("app-%d", n/10), "pod-template-hash": "7d9c5b8f6d", "app.kubernetes.io/part-of": "shop", "tier": "back"},
			Annotations: map[string]string{
				nadv1.NetworkAttachmentAnnot: "blue", "large": strings.Repeat("x", 2000),
				nadv1.NetworkStatusAnnot: fmt.Sprintf(`[{"name":"cbr0","interface":"eth0","ips":["10.244.1.2"],"default":true},{"name":"team-%d/blue","interface":"net1","ips":["10.20.%d.%d","fd20::%x"],"mac":"02:00:00:00:00:01"}]`, n%100, n>>8, n&255, n),
			},
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubelet", FieldsV1: &metav1.FieldsV1{}}},
		},
		Spec:   corev1.PodSpec{NodeName: fmt.Sprintf("node-%d", n%500), Containers: []corev1.Container{{Name: "app", Image: strings.Repeat("i", 100), Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 8080}}}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.244.1.2"},
	}
	if !networks {
		delete(p.Annotations, nadv1.NetworkStatusAnnot)
	}
	// Each has its own strings, as what an API server sends has.
	var decoded corev1.Pod
	if raw, err := p.Marshal(); err != nil || decoded.Unmarshal(raw) != nil {
		panic(err)
	}
	return &decoded
}

// Every agent follows all pods, so what it keeps of one decides how large a cluster may
// be: measured are the store and the index of policies.
func TestMemoryOfAPod(t *testing.T) {
	for _, k := range []struct {
		networks bool
		most     int // bytes
	}{{true, 2500}, {false, 800}} {
		each := memoryOfAPod(t, k.networks)
		t.Logf("with a network %t: %d bytes for a pod", k.networks, each)
		if each > k.most {
			t.Errorf("a pod takes %d bytes, more than %d", each, k.most)
		}
	}
}

func memoryOfAPod(t *testing.T, networks bool) int {
	t.Helper()
	const n = 10000
	c := &Cluster{log: logr.Discard(), own: func(*corev1.Pod) bool { return false }}
	o := options(nil, &corev1.Pod{}, c.readPod, func(*Pod) {}, func(*Pod) {})
	index := policy.NewIndex(func(policy.Pod) bool { return false })
	store := cache.NewStore(cache.DeletionHandlingMetaNamespaceKeyFunc)
	used := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := used()
	for i := range n {
		kept, err := o.Transform(aPod(i, networks))
		if err == nil {
			err = store.Add(kept)
		}
		if err != nil {
			t.Fatal(err)
		}
		index.SetPod(kept.(*entry[*Pod]).of.Pod)
	}
	each := int(used()-before) / n
	runtime.KeepAlive(index)
	runtime.KeepAlive(store)
	return each
}
