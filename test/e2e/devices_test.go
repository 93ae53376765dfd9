//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// poolOf is what the node state says of a resource.
func poolOf(t *testing.T, node, resource string) v1.DevicePool {
	t.Helper()
	var state v1.SriovNetworkNodeState
	if err := json.Unmarshal([]byte(kubectl(t, "", "-n", namespace, "get", "sriovnetworknodestate", node, "-o", "json")), &state); err != nil {
		t.Fatal(err)
	}
	for _, p := range state.Status.Pools {
		if p.ResourceName == resource {
			return p
		}
	}
	return v1.DevicePool{}
}

// inHand waits until one device of the resource is in a hand, as described, on vm1.
func inHand(t *testing.T, resource, phase, pod string) v1.HeldDevice {
	t.Helper()
	var held v1.HeldDevice
	eventually(t, time.Minute, func() error {
		p := poolOf(t, "vm1", resource)
		if len(p.Held) != 1 || p.Held[0].Phase != phase || p.Held[0].Pod != pod {
			return fmt.Errorf("not %s by %s: %+v", phase, pod, p)
		}
		held = p.Held[0]
		return nil
	})
	return held
}

// The node state tells whose a VF is, and goes on telling the same when the agent and the
// kubelet were restarted at once.
func TestWhoHasADevice(t *testing.T) {
	onlyUML(t, "the record of devices is the same on both")
	usePools(t)
	p := pod("holder", "vm1", "["+on("left-net", "192.168.100.9/24")+"]", left)
	apply(t, p)
	waitReady(t, "holder")
	before := inHand(t, left, "Attached", "default/holder")
	mentions(t, kubectl(t, "", "-n", namespace, "describe", "sriovnetworknodestate", "vm1"), "openshift.io/left", "default/holder", before.Device)
	mentions(t, kubectl(t, "", "exec", "holder", "--", "env"), `"resource":"openshift.io/left"`)

	inNode(t, "vm1", `kill -9 $(pidof kubelet) $(pidof sluice-agent)`)
	eventually(t, 3*time.Minute, func() error {
		_, err := cluster.Kubectl(t.Context(), "-n", namespace, "rollout", "status", "daemonset/sluice-agent", "--timeout=2m")
		return err
	})
	waitAllocatable(t, left, "4", "vm1")
	if after := inHand(t, left, "Attached", "default/holder"); after != before {
		t.Errorf("before %+v, after %+v", before, after)
	}
	remove(t, p)
	eventually(t, time.Minute, func() error {
		if p := poolOf(t, "vm1", left); len(p.Held) > 0 || p.Healthy != 4 {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
}

// VFs that no policy has are offered by the ConfigMap that people have, and an error in it
// takes them from nobody.
func TestPoolsFromConfigMap(t *testing.T) {
	onlyUML(t, "how a file is read depends on no kernel")
	usePools(t)
	apply(t, policy("some", "some", "ens2f0#0-0", 2, "priority: 1"))
	waitAllocatable(t, "openshift.io/some", "1", "vm1")
	content := func(json string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: sriovdp-config, namespace: %s}\ndata: {config.json: '%s'}\n", namespace, json)
	}
	apply(t, content(`{"resourceList":[{"resourceName":"filed","resourcePrefix":"example.com","selectors":{"pfNames":["ens2f0#1"]}}]}`))
	waitAllocatable(t, "example.com/filed", "1", "vm1")
	kubectl(t, content(`{"resourceList":[{"resourceName":"filed","selectors":{"pfNmaes":["ens2f0#1"]}}]}`), "apply", "-f", "-")
	eventually(t, 3*time.Minute, func() error {
		out := kubectl(t, "", "-n", namespace, "get", "sriovnetworknodestate", "vm1", "-o", `jsonpath={.status.conditions[?(@.type=="DevicePoolsFileInEffect")].message}`)
		if want := `resourceList[0].selectors.pfNmaes: unknown key: did you mean "pfNames"?`; !strings.Contains(out, want) {
			return fmt.Errorf("the condition says %q", out)
		}
		return nil
	})
	if got := allocatable(t, "vm1", "example.com/filed"); got != "1" {
		t.Errorf("a typing error left %q of the resource", got)
	}
	apply(t, pod("filed", "vm1", "[]", "example.com/filed"))
	waitReady(t, "filed")
	mentions(t, kubectl(t, "", "exec", "filed", "--", "env"), "PCIDEVICE_EXAMPLE_COM_FILED=0000:02:")
}

// With useCDI the runtime gives a container its device nodes by a file of the agent's.
func TestDeviceNodesByCDI(t *testing.T) {
	onlyUML(t, "device nodes are the runtime's work, whatever the NIC")
	usePools(t)
	// The guests' kernel has no vhost_net: another device takes its place.
	inNode(t, "vm1", "[ -e /dev/vhost-net ] || mknod /dev/vhost-net c 1 3")
	t.Cleanup(func() { inNodeAfter(t, "vm1", "rm /dev/vhost-net") })
	withCDI := func(use bool) {
		if _, err := cluster.Kubectl(context.Background(), "-n", namespace, "patch", "sriovoperatorconfig", "default", "--type=merge", "-p", fmt.Sprintf(`{"spec":{"useCDI":%v}}`, use)); err != nil {
			t.Error(err)
		}
		eventually(t, 3*time.Minute, func() error {
			out, err := cluster.Kubectl(context.Background(), "-n", namespace, "get", "daemonset", "sluice-agent", "-o", "jsonpath={.spec.template.spec.containers[0].env[*].name}")
			if err == nil && strings.Contains(out, "CDI_DIR") != use {
				err = errors.New(out)
			}
			if err == nil {
				_, err = cluster.Kubectl(context.Background(), "-n", namespace, "rollout", "status", "daemonset/sluice-agent", "--timeout=2m")
			}
			return err
		})
	}
	withCDI(true)
	t.Cleanup(func() { withCDI(false) })
	kubectl(t, policy("right", "right", "ens2f0", 2, "needVhostNet: true"), "apply", "-f", "-")
	t.Cleanup(func() {
		if _, err := cluster.KubectlInput(context.Background(), pools, "apply", "-f", "-"); err != nil {
			t.Error(err)
		}
	})
	waitAllocatable(t, right, "2", "vm1")
	p := pod("nodes", "vm1", "["+on("right-net", "192.168.101.9/24")+"]", right)
	files := func() string { return inNode(t, "vm1", "cat /var/run/cdi/sluice-vf-*.json 2>/dev/null || true") }
	eventually(t, 3*time.Minute, func() error { // until the policy is in effect
		kubectl(t, p, "apply", "-f", "-")
		waitReady(t, "nodes")
		if out := files(); !strings.Contains(out, "/dev/vhost-net") {
			remove(t, p)
			return fmt.Errorf("the files are: %s", out)
		}
		return nil
	})
	t.Cleanup(func() { remove(t, p) })
	mentions(t, kubectl(t, "", "exec", "nodes", "--", "ls", "-l", "/dev/vhost-net", "/dev/net/tun"), "1,   3", "10, 200")
}
