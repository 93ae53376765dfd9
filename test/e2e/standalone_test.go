//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

const multusFile = "/etc/cni/net.d/00-multus.conf"

// withoutMultus chains Sluice behind the cluster network of all nodes, in Multus'
// stead, until the test ends.
func withoutMultus(t *testing.T) {
	t.Helper()
	for _, n := range nodes {
		var multus struct{ Delegates []map[string]any }
		if err := json.Unmarshal([]byte(inNode(t, n, "cat "+multusFile)), &multus); err != nil {
			t.Fatal(err)
		}
		list := multus.Delegates[0]
		plugins, _ := list["plugins"].([]any)
		list["cniVersion"] = "1.1.0" // with STATUS and GC
		list["plugins"] = append(slices.Clone(plugins), map[string]any{
			"type": "sluice", "podNetworks": true, "capabilities": map[string]bool{"io.kubernetes.cri.pod-annotations": true},
		})
		b, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		inNode(t, n, fmt.Sprintf("mv %s %[1]s.off && printf '%%s' '%s' >/etc/cni/net.d/05-cluster.conflist", multusFile, b))
		t.Cleanup(func() {
			g, err := cluster.Node(n)
			if err == nil {
				_, err = g.Run(context.Background(), fmt.Sprintf("mv %s.off %[1]s && rm /etc/cni/net.d/05-cluster.conflist", multusFile))
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(2 * time.Second) // the runtime reads its folder again when that changes
}

// TestWithoutMultus does the same as with Multus without it.
func TestWithoutMultus(t *testing.T) {
	onlyUML(t, "who asks for an attachment does not depend on the NIC")
	usePools(t)
	withoutMultus(t)
	t.Run("policy to traffic", policyToTraffic)
	for _, n := range nodes {
		eventually(t, func() error { return baseline(t, n, "ens1f0", 4) })
		if left := strings.TrimSpace(inNode(t, n, "ls /var/lib/sluice/pod-networks/containers 2>/dev/null || true")); left != "" {
			t.Errorf("%s keeps records of pods that are gone: %s", n, left)
		}
	}
	t.Run("a pod whose annotation is wrong is told so", func(t *testing.T) {
		apply(t, pod("wrong", "vm1", `[{"name": "left-net", "ipz": "192.168.100.7/24"}]`, left))
		eventually(t, func() error {
			out := kubectl(t, "", "get", "events", "--field-selector=involvedObject.name=wrong", "-o", "jsonpath={.items[*].message}")
			if !strings.Contains(out, `unknown field`) || !strings.Contains(out, "ipz") {
				return fmt.Errorf("its events say: %s", out)
			}
			own := kubectl(t, "", "get", "events", "--field-selector=involvedObject.name=wrong,reason=FailedAttach,source=sluice-agent", "-o", "jsonpath={.items[*].message}")
			if strings.Count(own, "ipz") != 1 {
				return fmt.Errorf("the agent's own events say: %s", own)
			}
			return nil
		})
	})
	t.Run("a pod of which only an init container has a VF", func(t *testing.T) {
		p := strings.Replace(pod("early", "vm1", "["+on("left-net", "192.168.100.8/24")+"]"), "  containers:", `  initContainers:
    - name: init
      image: sluice.dev/tools:dev
      command: [sh, -c, "ip -o addr show dev net1 | grep -w 192.168.100.8"]
      resources: {limits: {`+left+`: 1}}
  containers:`, 1)
		apply(t, p)
		waitReady(t, "early") // which takes the init container
		mentions(t, kubectl(t, "", "exec", "early", "--", "ip", "-o", "addr", "show", "dev", "net1"), "192.168.100.8")
	})
	t.Run("the node stays ready", func(t *testing.T) {
		// STATUS goes through the chain, every few seconds, also while an agent restarts.
		inNode(t, "vm1", "kill -9 $(pidof sluice-agent)")
		for range 10 {
			time.Sleep(time.Second)
			if ready := kubectl(t, "", "get", "node", "vm1", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`); strings.TrimSpace(ready) != "True" {
				t.Errorf("vm1 is ready: %s", ready)
			}
		}
	})
}
