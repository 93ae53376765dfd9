package node

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/test/apiserver"
)

// Some tests of this package share one real API server, found through KUBEBUILDER_ASSETS.
func TestMain(m *testing.M) { apiserver.Main(m) }

// newState makes the node's object in a namespace of its own, and a client that
// may do everything.
func newState(t *testing.T, namespace string) (client.Client, *v1.SriovNetworkNodeState) {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{v1.AddToScheme, clientgoscheme.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	c, err := client.New(apiserver.Config(t), client.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	state := &v1.SriovNetworkNodeState{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "vm1"}}
	for _, o := range []client.Object{&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, state} {
		if err := c.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	return c, state
}

// The agent's conditions and the operator's, in one list, survive each other.
func TestConditionsOfTwoWriters(t *testing.T) {
	t.Parallel()
	c, state := newState(t, "conditions")
	agent, stop, err := Connect(apiserver.Config(t), state.Namespace, state.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	condition := func(kind, message string) metav1.Condition {
		return metav1.Condition{Type: kind, Status: metav1.ConditionTrue, Reason: "R", Message: message, LastTransitionTime: metav1.Now()}
	}
	operate := func(message string) {
		t.Helper()
		evicting := condition("Evicting", message)
		patch := fmt.Appendf(nil, `{"apiVersion": "sriovnetwork.openshift.io/v1", "kind": "SriovNetworkNodeState", "status": {"conditions": [
			{"type": "Evicting", "status": "True", "reason": "R", "message": %q, "lastTransitionTime": %q}]}}`, evicting.Message, evicting.LastTransitionTime.Format(time.RFC3339))
		if err := c.Status().Patch(t.Context(), state.DeepCopy(), client.RawPatch("application/apply-patch+yaml", patch), client.FieldOwner("sluice-operator"), client.ForceOwnership); err != nil {
			t.Fatal(err)
		}
	}
	apply := func(message string) {
		t.Helper()
		s := v1.SriovNetworkNodeStateStatus{Conditions: []metav1.Condition{condition(v1.ConditionReady, message)}}
		if err := agent.ApplyStatus(t.Context(), &s); err != nil {
			t.Fatal(err)
		}
	}
	want := func(ready, evicting string) {
		t.Helper()
		got := &v1.SriovNetworkNodeState{}
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(state), got); err != nil {
			t.Fatal(err)
		}
		for kind, message := range map[string]string{v1.ConditionReady: ready, "Evicting": evicting} {
			if has := meta.FindStatusCondition(got.Status.Conditions, kind); has == nil || has.Message != message {
				t.Errorf("%s is %+v, want %q", kind, has, message)
			}
		}
	}
	apply("a")
	operate("1")
	want("a", "1")
	apply("b")
	want("b", "1")
	operate("2")
	want("b", "2")
}

// wire is a TCP way to an API server that can be cut.
type wire struct {
	to     string
	at     string
	mu     sync.Mutex
	server net.Listener
	open   map[net.Conn]bool
}

func (w *wire) join() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	server, err := net.Listen("tcp", w.at)
	if err != nil {
		return err
	}
	w.server, w.at, w.open = server, server.Addr().String(), map[net.Conn]bool{}
	go func() {
		for {
			a, err := server.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", w.to)
			if err != nil {
				a.Close()
				continue
			}
			w.mu.Lock()
			w.open[a], w.open[b] = true, true
			w.mu.Unlock()
			for from, to := range map[net.Conn]net.Conn{a: b, b: a} {
				go func() {
					_, _ = io.Copy(to, from)
					to.Close()
				}()
			}
		}
	}()
	return nil
}

func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.server.Close()
	for c := range w.open {
		c.Close()
	}
}

// While the API server is away the agent works from the last spec it has seen;
// when it is back, the status is written and a newer spec is done.
func TestLongOutageOfTheAPIServer(t *testing.T) {
	t.Parallel()
	c, state := newState(t, "outage")
	config := apiserver.Config(t)
	to, err := url.Parse(config.Host)
	if err != nil {
		t.Fatal(err)
	}
	if to.Host == "" {
		to.Host = config.Host
	}
	w := &wire{to: to.Host, at: "127.0.0.1:0"}
	if err := w.join(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.cut)
	config.Host = "https://" + w.at
	states, stopEvents, err := Connect(config, state.Namespace, state.Name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stopEvents)
	r := rigWith(t)
	agent := New(Config{
		Node: "vm1", StateDir: r.state, UpstreamDir: r.upstream, Kernel: r.kernel, States: states, Advertiser: r.plugin,
		Usage: r.usage, Attached: r.usage.Attached, Lifeline: r.line, Log: testr.New(t),
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- agent.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	spec := func(interfaces ...v1.Interface) {
		t.Helper()
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(state), state); err != nil {
			t.Fatal(err)
		}
		state.Spec.Interfaces = interfaces
		if err := c.Update(t.Context(), state); err != nil {
			t.Fatal(err)
		}
	}
	until := func(what string, ok func(v1.SriovNetworkNodeStateStatus) bool) {
		t.Helper()
		start := time.Now()
		for {
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(state), state); err != nil {
				t.Fatal(err)
			}
			if ok(state.Status) {
				t.Logf("%s after %s", what, time.Since(start).Round(time.Millisecond))
				return
			}
			if time.Since(start) > 60*time.Second {
				t.Fatalf("%s: never, status %+v", what, state.Status)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	spec(wants(nic0, 2, of("left", "0-1", 1400)))
	until("2 VFs", func(s v1.SriovNetworkNodeStateStatus) bool {
		return s.VFs == "2/2" && s.SyncStatus == v1.SyncStatusSucceeded
	})

	w.cut()
	r.usage.set(vfAddress(nic0, 1), "default/p") // something to tell
	agent.HolderChanged()
	time.Sleep(2 * time.Second)
	for range 3 {
		start := time.Now()
		r.kernel.Change(func(pfs []host.PF) { pfs[0].VFs[0].MTU = 1300 })
		for r.kernel.PF(nic0).VFs[0].MTU != 1400 {
			if time.Since(start) > time.Minute {
				t.Fatal("drift is not put right while the API server is away")
			}
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Second)
	}
	spec(wants(nic0, 2, of("left", "0-1", 1450)))
	if got := state.Status.Interfaces[0].VFs[1].Assigned; got != "" {
		t.Errorf("the outage is none: status knows of pod %s", got)
	}
	if err := w.join(); err != nil {
		t.Fatal(err)
	}
	until("told what happened", func(s v1.SriovNetworkNodeStateStatus) bool { return s.Interfaces[0].VFs[1].Assigned == "default/p" })
	until("newer spec done", func(s v1.SriovNetworkNodeStateStatus) bool {
		return s.ObservedGeneration == state.Generation && r.kernel.PF(nic0).VFs[0].MTU == 1450
	})
}
