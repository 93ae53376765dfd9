//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// policyTells waits until a policy's status says all of want.
func policyTells(t *testing.T, name string, want ...string) {
	t.Helper()
	eventually(t, func() error {
		out := kubectl(t, "", "-n", namespace, "get", "sriovnetworknodepolicy", name, "-o", `jsonpath={range .status.conditions[*]}{.type}={.status} {.reason}: {.message}{"\n"}{end}`)
		for _, w := range want {
			if !strings.Contains(out, w) {
				return fmt.Errorf("no %q in the status of policy %s:\n%s", w, name, out)
			}
		}
		return nil
	})
}

// Each of these names the object, the field, the value and the mend, and changes nothing.
func TestBadInput(t *testing.T) {
	onlyUML(t, "what people write is judged without NIC or kernel")
	usePools(t)
	before := map[string]string{}
	for _, n := range nodes {
		before[n] = inNode(t, n, "ip -d link show ens1f0; ip -d link show ens2f0; cat /sys/class/net/ens*f0/device/sriov_numvfs")
	}

	t.Run("numVfs above the NIC's total", func(t *testing.T) {
		apply(t, policy("greedy", "greedy", "ens2f0", 100, "priority: 10"))
		policyTells(t, "greedy", "numVfs", "100", "ens2f0", "vm1")
	})
	t.Run("unknown nicSelector key", func(t *testing.T) {
		refused(t, strings.Replace(policy("typo", "typo", "ens2f0", 2), "pfNames", "pfNmaes", 1), "pfNmaes")
	})
	t.Run("backward range", func(t *testing.T) {
		refused(t, policy("backward", "backward", "ens2f0#5-2", 8), "pfNames", "5-2")
	})
	t.Run("two policies over the same VFs", func(t *testing.T) {
		apply(t, policy("thief", "thief", "ens1f0#2-3", 4))
		policyTells(t, "thief", "Conflict", "left", "ens1f0")
	})
	t.Run("VLAN 5000", func(t *testing.T) {
		refused(t, network("fast", "left", "vlan: 5000"), "vlan", "5000", "4094")
	})

	nad := func(name, config string) string {
		return fmt.Sprintf(`
apiVersion: k8s.cni.cncf.io/v1
kind: NetworkAttachmentDefinition
metadata:
  name: %s
  namespace: default
  annotations: {k8s.v1.cni.cncf.io/resourceName: %s}
spec: {config: '%s'}
---`, name, left, config)
	}
	// podFails runs a pod on a NAD and waits for its event.
	podFails := func(t *testing.T, nads, networks string, want ...string) {
		t.Helper()
		name := "bad"
		if nads != "" {
			apply(t, nads)
		}
		kubectl(t, pod(name, "vm1", networks, left), "apply", "-f", "-")
		defer remove(t, pod(name, "vm1", networks, left))
		eventually(t, func() error {
			out := kubectl(t, "", "get", "events", "-n", "default", "--field-selector", "involvedObject.name="+name, "-o", `jsonpath={range .items[*]}{.message}{"\n"}{end}`)
			for _, w := range want {
				if !strings.Contains(out, w) {
					return fmt.Errorf("no %q in the pod's events:\n%s", w, out)
				}
			}
			return nil
		})
	}
	t.Run("unknown CNI key", func(t *testing.T) {
		podFails(t, nad("misspelt", `{"cniVersion": "1.0.0", "name": "misspelt", "type": "sriov", "vlna": 100}`), "misspelt", "misspelt", "vlna", "vlan")
	})
	t.Run("VLAN 5000 in a NAD", func(t *testing.T) {
		podFails(t, nad("vlan5000", `{"cniVersion": "1.0.0", "name": "vlan5000", "type": "sriov", "vlan": 5000}`), "vlan5000", "vlan5000", "5000", "4094")
	})
	t.Run("VF that does not exist", func(t *testing.T) {
		// Without the resource annotation Multus leaves deviceID as it is.
		absent := strings.Replace(nad("absent", `{"cniVersion": "1.0.0", "name": "absent", "type": "sriov", "deviceID": "0000:09:00.1"}`),
			"annotations: {k8s.v1.cni.cncf.io/resourceName: "+left+"}", "annotations: {}", 1)
		podFails(t, absent, "absent", "absent", "deviceID", "0000:09:00.1")
	})
	t.Run("interface name already in the pod", func(t *testing.T) {
		podFails(t, "", `[{"name": "left-net", "ips": ["192.168.100.99/24"], "interface": "eth0"}]`, "eth0")
	})

	for _, n := range nodes {
		eventually(t, func() error {
			if after := inNode(t, n, "ip -d link show ens1f0; ip -d link show ens2f0; cat /sys/class/net/ens*f0/device/sriov_numvfs"); after != before[n] {
				return errors.New(n + " changed from\n" + before[n] + "\nto\n" + after)
			}
			return nil
		})
	}
}
