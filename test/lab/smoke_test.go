//go:build lab

package lab

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/sluice-network/sluice/test/lab/guest"
)

// pods are one on each node, with an interface on the node's first card.
const pods = `
apiVersion: k8s.cni.cncf.io/v1
kind: NetworkAttachmentDefinition
metadata: {name: macvlan}
spec:
  config: '{"cniVersion": "1.0.0", "type": "macvlan", "master": "ens1f0", "mode": "bridge", "ipam": {"type": "static"}}'
---
apiVersion: v1
kind: Pod
metadata:
  name: one
  annotations: {k8s.v1.cni.cncf.io/networks: '[{"name": "macvlan", "ips": ["192.168.7.1/24"]}]'}
spec:
  nodeName: vm1
  containers: [{name: tools, image: sluice.dev/tools:dev, imagePullPolicy: Never, command: [httpd, -f, -h, /etc]}]
---
apiVersion: v1
kind: Pod
metadata:
  name: two
  annotations: {k8s.v1.cni.cncf.io/networks: '[{"name": "macvlan", "ips": ["192.168.7.2/24"]}]'}
spec:
  nodeName: vm2
  containers: [{name: tools, image: sluice.dev/tools:dev, imagePullPolicy: Never}]
`

// The lab itself, from nothing to nothing: what every test on it relies on.
// LAB=qemu runs it on QEMU guests.
func TestClusterRunsPodsWithSecondaryInterfaces(t *testing.T) {
	ctx := t.Context()
	options := Options{Name: fmt.Sprintf("sluice-smoke-%d", os.Getpid()), Kind: guest.Kind(os.Getenv("LAB")), Progress: testLog{t}}
	c, err := Up(ctx, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, c) })

	config, err := c.RESTConfig()
	if err != nil {
		t.Fatal(err)
	}
	nodes, err := kubernetes.NewForConfigOrDie(config).CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: "node-role.kubernetes.io/worker"})
	if err != nil || len(nodes.Items) != 2 {
		t.Fatalf("workers: %v, %v", nodes, err)
	}

	// Another process finds the same cluster.
	c, err = Attach(options.Name)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"vm1", "vm2"} {
		run(t, c, name, "ip link set ens1f0 up")
	}
	kubectl := func(args ...string) string {
		t.Helper()
		out, kubectlErr := c.Kubectl(ctx, args...)
		if kubectlErr != nil {
			t.Fatal(kubectlErr)
		}
		return out
	}
	if _, err = c.KubectlInput(ctx, pods, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	kubectl("wait", "--for=condition=Ready", "--timeout=120s", "pod/one", "pod/two")
	t.Logf("pods are Ready after %.1f s", time.Since(began).Seconds())

	if out := kubectl("exec", "one", "--", "sh", "-c", "ip -4 -br addr show net1"); !strings.Contains(out, "192.168.7.1/24") {
		t.Errorf("net1 of pod one: %s", out)
	}
	if out := kubectl("exec", "one", "--", "ping", "-c", "3", "-i", "0.2", "-w", "10", "192.168.7.2"); !strings.Contains(out, " 0% packet loss") {
		t.Errorf("between the cards of two nodes: %s", out)
	}
	address := strings.TrimSpace(kubectl("get", "pod", "two", "-o", "jsonpath={.status.podIP}"))
	if out := kubectl("exec", "one", "--", "ping", "-c", "3", "-i", "0.2", "-w", "10", address); !strings.Contains(out, " 0% packet loss") {
		t.Errorf("between the pod networks of two nodes: %s", out)
	}
	kubectl("exec", "one", "--", "sh", "-c", "nc -w 5 10.96.0.1 443 < /dev/null") // the API server, as pods reach it
	if page := kubectl("get", "--raw", "/api/v1/namespaces/default/pods/one:80/proxy/passwd"); !strings.Contains(page, "root:") {
		t.Errorf("the API server does not reach a pod, as it has to for webhooks: %s", page)
	}
	if status := kubectl("get", "pod", "one", "-o", `jsonpath={.metadata.annotations.k8s\.v1\.cni\.cncf\.io/network-status}`); !strings.Contains(status, "net1") {
		t.Errorf("network status of pod one: %s", status)
	}
	// A kubelet that ends is started again, as device plugins have to notice.
	run(t, c, "vm2", `old=$(pgrep -x kubelet) && kill $old && for i in $(seq 300); do new=$(pgrep -x kubelet) && [ "$new" != "$old" ] && exit 0; sleep 0.1; done; exit 1`)
	kubectl("delete", "pod", "one", "two", "--timeout=60s")
}

// run runs a script on a node.
func run(t *testing.T, c *Cluster, node, script string) {
	t.Helper()
	g, err := c.Node(node)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = g.Run(t.Context(), script); err != nil {
		t.Fatalf("%s: %s: %v", node, script, err)
	}
}

// end ends the cluster and checks that it is gone. Of a test that failed it
// shows what the nodes say.
func end(t *testing.T, c *Cluster) {
	for _, node := range c.Nodes {
		g, err := c.Node(node.Name)
		if err != nil {
			t.Error(err)
		} else if t.Failed() {
			said, _ := g.Run(context.Background(), "tail -n 20 /var/log/kubelet.log /var/log/multus.log")
			t.Logf("%s:\n%s", node.Name, said)
		}
	}
	if err := Down(c.Name); err != nil {
		t.Error(err)
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Error(err)
	}
	for _, file := range commands {
		if line, gone := os.ReadFile(file); gone == nil && bytes.Contains(line, []byte(c.Dir())) {
			t.Errorf("outlives its lab: %q", line)
		}
	}
	if err := guest.InNetns(c.Name, func() error { return nil }); err == nil {
		t.Errorf("the network namespace %s outlives its lab", c.Name)
	}
}

// testLog passes progress lines to the test's log.
type testLog struct{ *testing.T }

var _ io.Writer = testLog{}

func (l testLog) Write(p []byte) (int, error) {
	l.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}
