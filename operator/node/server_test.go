package node

import (
	"context"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

func newServerClient(t *testing.T, objects ...client.Object) listFirst {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := v1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	return listFirst{watches: make(chan struct{}, 100), WithWatch: fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).WithStatusSubresource(&v1.SriovNetworkNodeState{}).
		WithIndex(&v1.SriovNetworkNodeState{}, "metadata.name", func(o client.Object) []string { return []string{o.GetName()} }).Build()}
}

// listFirst says what the fake client does not: its watches do not begin with
// the objects that there are, nor with what changed since they were listed, but with
// what changes from when it is told in watches.
type listFirst struct {
	client.WithWatch
	watches chan struct{}
}

func (listFirst) IsWatchListSemanticsUnSupported() bool { return true }

func (c listFirst) Watch(ctx context.Context, list client.ObjectList, opts ...client.ListOption) (watch.Interface, error) {
	w, err := c.WithWatch.Watch(ctx, list, opts...)
	c.watches <- struct{}{}
	return w, err
}

func nodeState(name string) *v1.SriovNetworkNodeState {
	return &v1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Namespace: "sluice", Name: name}}
}

func TestServerAppliesTheStatusAlone(t *testing.T) {
	t.Parallel()
	state := nodeState("vm1")
	state.Spec.Interfaces = []v1.Interface{{PciAddress: nic0, NumVfs: 2}}
	c := newServerClient(t, state)
	recorder := record.NewFakeRecorder(1)
	s := NewServer(c, recorder, "sluice", "vm1")
	want := v1.SriovNetworkNodeStateStatus{
		SyncStatus: v1.SyncStatusSucceeded, ObservedGeneration: 3,
		Interfaces: []v1.InterfaceExt{{PciAddress: nic0, TotalVfs: 8, VFs: []v1.VirtualFunction{{PciAddress: "0000:01:10.0", VfID: 0}}}},
	}
	for range 2 {
		if err := s.ApplyStatus(t.Context(), &want); err != nil {
			t.Fatal(err)
		}
	}
	got := nodeState("vm1")
	if err := c.Get(t.Context(), client.ObjectKeyFromObject(got), got); err != nil {
		t.Fatal(err)
	}
	if got.Status.ObservedGeneration != 3 || len(got.Status.Interfaces) != 1 || got.Status.Interfaces[0].TotalVfs != 8 || len(got.Spec.Interfaces) != 1 {
		t.Errorf("%+v", got)
	}
	s.Event(got, "Warning", ReasonRefused, "no")
	if e := <-recorder.Events; e != "Warning KernelRefused no" {
		t.Errorf("event %q", e)
	}
}

func TestServerWatchesItsOwnObject(t *testing.T) {
	t.Parallel()
	c := newServerClient(t, nodeState("vm1"), nodeState("vm2"))
	ctx, cancel := context.WithCancel(t.Context())
	states := NewServer(c, record.NewFakeRecorder(1), "sluice", "vm1").Watch(ctx)
	next := func() *v1.SriovNetworkNodeState {
		t.Helper()
		select {
		case s := <-states:
			return s
		case <-time.After(time.Minute):
			t.Fatal("not told")
			return nil
		}
	}
	if s := next(); s == nil || s.Name != "vm1" {
		t.Fatalf("got %+v", s)
	}
	<-c.watches
	s := nodeState("vm1")
	if err := c.Get(ctx, client.ObjectKeyFromObject(s), s); err != nil {
		t.Fatal(err)
	}
	s.Spec.Interfaces = []v1.Interface{{PciAddress: nic0}}
	if err := c.Update(ctx, s); err != nil {
		t.Fatal(err)
	}
	if got := next(); got == nil || len(got.Spec.Interfaces) != 1 {
		t.Errorf("after a change: %+v", got)
	}
	if err := c.Delete(ctx, s); err != nil {
		t.Fatal(err)
	}
	if got := next(); got != nil {
		t.Errorf("after deletion: %+v", got)
	}
	cancel()
	if _, open := <-states; open {
		t.Error("the channel stays open after its context")
	}
}
