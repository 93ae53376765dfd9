package cluster

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/sluice-network/sluice/cni/policy"
)

// told is a Sink.
type told struct {
	mu   sync.Mutex
	pods map[string]*Pod
}

func (s *told) SetPod(p *Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pods[p.Namespace+"/"+p.Name] = p
}

func (s *told) DeletePod(namespace, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pods, namespace+"/"+name)
}

func (*told) SetNamespace(policy.Namespace) {}
func (*told) DeleteNamespace(string)        {}
func (*told) SetNetwork(policy.Network)     {}
func (*told) DeleteNetwork(string)          {}
func (*told) SetPolicy(Policy)              {}
func (*told) DeletePolicy(Policy)           {}

// api is an API server that has the pod a, and no kinds but Kubernetes' own. It answers
// what refuse does not.
type api struct {
	mu     sync.Mutex
	refuse func(w http.ResponseWriter, r *http.Request) (refused bool)
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	refuse := a.refuse
	a.mu.Unlock()
	if refuse(w, r) {
		return
	}
	w.Header().Set("Content-Type", "application/json")
	pod := corev1.Pod{TypeMeta: metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"}, ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "a", UID: "uid", Annotations: map[string]string{"keep": "1", "other": "2"}}, Spec: corev1.PodSpec{NodeName: "here"}}
	var answer any = metav1.List{TypeMeta: metav1.TypeMeta{Kind: "List", APIVersion: "v1"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
	switch {
	case strings.HasSuffix(r.URL.Path, "/pods/a"):
		answer = pod
	case strings.HasSuffix(r.URL.Path, "/pods/b"):
		w.WriteHeader(http.StatusNotFound)
	case strings.Contains(r.URL.RawQuery, "watch="):
		if strings.Contains(r.URL.RawQuery, "sendInitialEvents") { // an older server
			w.WriteHeader(http.StatusUnprocessableEntity)
			return
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return
	case strings.HasSuffix(r.URL.Path, "/pods"):
		answer = corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}, Items: []corev1.Pod{pod}}
	case strings.HasSuffix(r.URL.Path, "/namespaces"):
		answer = corev1.NamespaceList{TypeMeta: metav1.TypeMeta{Kind: "NamespaceList", APIVersion: "v1"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
	case strings.HasSuffix(r.URL.Path, "/networkpolicies"):
		answer = map[string]any{"kind": "NetworkPolicyList", "apiVersion": "networking.k8s.io/v1", "metadata": map[string]any{"resourceVersion": "1"}, "items": []any{}}
	case strings.HasSuffix(r.URL.Path, "/customresourcedefinitions"):
		answer = map[string]any{"kind": "CustomResourceDefinitionList", "apiVersion": "apiextensions.k8s.io/v1", "metadata": map[string]any{"resourceVersion": "1"}, "items": []any{}}
	}
	_ = json.NewEncoder(w).Encode(answer)
}

func (a *api) set(refuse func(w http.ResponseWriter, r *http.Request) bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refuse = refuse
}

func refuseNothing(http.ResponseWriter, *http.Request) bool { return false }

func follow(t *testing.T, server string) (*Cluster, *told) {
	t.Helper()
	sink := &told{pods: map[string]*Pod{}}
	c, err := New(&rest.Config{Host: server}, "here", []string{"keep"}, sink, testr.New(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		c.Run(ctx)
		close(done)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		time.Sleep(50 * time.Millisecond) // the informers log until they end
	})
	return c, sink
}

// While the API server is away it is said which kind is missing and why, and within the
// time that is waited that a pod is not known.
func TestAPIServerAway(t *testing.T) {
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	away := "http://" + nobody.Addr().String()
	nobody.Close()
	a := &api{refuse: refuseNothing}
	server := httptest.NewServer(a)
	t.Cleanup(server.CloseClientConnections)
	for name, c := range map[string]struct {
		server string
		refuse func(w http.ResponseWriter, r *http.Request) bool
		says   string
		pod    string
	}{
		"no server": {away, refuseNothing, "it does not tell pods: Get", "connection refused"},
		"no answer": {server.URL, func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true }, "it has not told all pods yet", "context deadline exceeded"},
		"no right": {server.URL, func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, "/networkpolicies") {
				return false
			}
			w.WriteHeader(http.StatusForbidden)
			return true
		}, "it does not tell networkpolicies: ", ""},
	} {
		t.Run(name, func(t *testing.T) {
			a.set(c.refuse)
			defer server.CloseClientConnections()
			k, _ := follow(t, c.server)
			begin := time.Now()
			for {
				err := k.Missing()
				if err != nil && strings.Contains(err.Error(), c.says) {
					if text := err.Error(); !strings.HasPrefix(text, "of the API server "+c.server+": ") || !strings.HasSuffix(text, ": see that the node reaches it, and that ClusterRole sluice-agent lets the agent list them") {
						t.Error(text)
					}
					break
				}
				if time.Since(begin) > 20*time.Second {
					t.Fatalf("%v", err)
				}
				time.Sleep(5 * time.Millisecond)
			}
			const wait = 400 * time.Millisecond
			begin = time.Now()
			_, err := k.Pod(t.Context(), "ns", "b", "", wait)
			if took := time.Since(begin); took > 10*time.Second { // a busy machine may need some
				t.Errorf("answered after %v", took)
			}
			if err == nil || !strings.Contains(err.Error(), "has not told this node of pod ns/b") || !strings.Contains(err.Error(), c.pod) {
				t.Error(err)
			}
		})
	}
}

// An API server that comes back is followed, and what was not told yet is asked for.
func TestAPIServerBack(t *testing.T) {
	a := &api{}
	a.set(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/pods/a") {
			return false
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	server := httptest.NewServer(a)
	c, sink := follow(t, server.URL)
	t.Cleanup(server.CloseClientConnections)
	p, err := c.Pod(t.Context(), "ns", "a", "uid", 4*time.Second)
	if err != nil || len(p.Annotations) != 1 || p.Annotations["keep"] != "1" {
		t.Fatalf("%+v, %v", p, err)
	}
	if _, err := c.Pod(t.Context(), "ns", "a", "other", 400*time.Millisecond); err == nil || !strings.Contains(err.Error(), "with UID other is gone") {
		t.Error(err)
	}
	if c.Synced() {
		t.Error("all is known")
	}
	a.set(refuseNothing)
	for end := time.Now().Add(time.Minute); !c.Synced(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(c.Missing())
		}
	}
	sink.mu.Lock()
	defer sink.mu.Unlock()
	if _, known := c.Known("ns", "a"); !known || sink.pods["ns/a"] == nil {
		t.Errorf("%v", sink.pods)
	}
}
