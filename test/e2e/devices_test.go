//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

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
	eventually(t, func() error {
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
	apply(t, slots("lasting", "ens2f0", 2)+macvlan("lasting-net", "resourceName: lasting", staticIP, capIPs))
	p := pod("holder", "vm1", "["+on("left-net", "192.168.100.9/24")+"]", left)
	apply(t, p)
	waitReady(t, "holder")
	before := inHand(t, left, "Attached", "default/holder")
	mentions(t, kubectl(t, "", "-n", namespace, "describe", "sriovnetworknodestate", "vm1"), "openshift.io/left", "default/holder", before.Device)
	mentions(t, kubectl(t, "", "exec", "holder", "--", "env"), `"resource":"openshift.io/left"`)

	restartKubelet(t, "vm1", "kill -9 $pid $(pidof sluice-agent)")
	eventually(t, func() error {
		_, err := cluster.Kubectl(t.Context(), "-n", namespace, "rollout", "status", "daemonset/sluice-agent", "--timeout=5m")
		return err
	})
	waitAllocatable(t, left, "4", "vm1")
	waitAllocatable(t, "openshift.io/lasting", "2", "vm1")
	if after := inHand(t, left, "Attached", "default/holder"); after != before {
		t.Errorf("before %+v, after %+v", before, after)
	}
	t.Run("the container runtime restarts", func(t *testing.T) { restartRuntime(t, before.Device) })
	remove(t, p)
	eventually(t, func() error {
		if p := poolOf(t, "vm1", left); len(p.Held) > 0 || p.Healthy != 4 {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
}

// restartRuntime kills containerd, while a pod is being attached, too: pods that hold VFs
// and slots keep them, others get other ones, and nothing is left when they are gone.
func restartRuntime(t *testing.T, held string) {
	waitNetwork(t, "lasting-net")
	with := func(name, address string) string {
		return pod(name, "vm1", "["+on("left-net", "192.168.100."+address)+","+on("lasting-net", "192.168.112."+address)+"]", left, "openshift.io/lasting")
	}
	stays, comes := with("stays", "10/24"), with("comes", "11/24")
	apply(t, stays)
	waitReady(t, "stays")
	devices := func(pod string) string {
		out := kubectl(t, "", "exec", pod, "--", "sh", "-c", "env | sort | grep -E '^PCIDEVICE_OPENSHIFT_IO_(LEFT|LASTING)='; cat /sys/class/net/net[12]/address; readlink -f /sys/class/net/net1/device")
		return strings.TrimSpace(out)
	}
	before := devices("stays")

	kubectl(t, comes, "apply", "-f", "-")
	t.Cleanup(func() { remove(t, comes) })
	inNode(t, "vm1", `old=$(pidof containerd); kill -9 $old; while [ -d /proc/$old ]; do sleep 0.05; done
setsid containerd >>/var/log/containerd.log 2>&1 </dev/null &
until ctr version >/dev/null 2>&1; do sleep 0.1; done`)
	waitReady(t, "stays", "comes", "holder")
	if after := devices("stays"); after != before {
		t.Errorf("before %s, after %s", before, after)
	}
	owners := map[string]string{held: "default/holder"}
	for _, resource := range []string{left, "openshift.io/lasting"} {
		eventually(t, func() error {
			pods := map[string]bool{}
			for _, h := range poolOf(t, "vm1", resource).Held {
				if owner, twice := owners[h.Device]; twice && owner != h.Pod {
					t.Fatalf("%s is with %s and %s", h.Device, owner, h.Pod)
				}
				owners[h.Device] = h.Pod
				if h.Phase == "Attached" {
					pods[h.Pod] = true
				}
			}
			if !pods["default/stays"] || !pods["default/comes"] {
				return fmt.Errorf("%s: attached to %v", resource, pods)
			}
			return nil
		})
	}
	pings(t, "comes", "192.168.100.10")
	pings(t, "comes", "192.168.112.10")
	remove(t, stays+comes)
	eventually(t, func() error {
		if p := poolOf(t, "vm1", "openshift.io/lasting"); len(p.Held) > 0 || p.Healthy != 2 {
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
	eventually(t, func() error {
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
		eventually(t, func() error {
			out, err := cluster.Kubectl(context.Background(), "-n", namespace, "get", "daemonset", "sluice-agent", "-o", "jsonpath={.spec.template.spec.containers[0].env[*].name}")
			if err == nil && strings.Contains(out, "CDI_DIR") != use {
				err = errors.New(out)
			}
			if err == nil {
				_, err = cluster.Kubectl(context.Background(), "-n", namespace, "rollout", "status", "daemonset/sluice-agent", "--timeout=5m")
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
	eventually(t, func() error { // until the policy is in effect
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
