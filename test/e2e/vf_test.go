//go:build e2e

package e2e

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	left     = "openshift.io/left"
	right    = "openshift.io/right"
	staticIP = `ipam: '{"type": "static"}'`
	capIPs   = `capabilities: '{"ips": true}'`
)

// pools are what most tests run on: four VFs of each node's first PF, two of its second.
var pools = policy("left", "left", "ens1f0", 4) + policy("right", "right", "ens2f0", 2) +
	network("left-net", "left", "vlan: 100", staticIP, capIPs) +
	network("right-net", "right", staticIP, capIPs)

// usePools applies pools and waits until pods can have VFs.
func usePools(t *testing.T) {
	t.Helper()
	kubectl(t, pools, "apply", "-f", "-")
	waitAllocatable(t, left, "4", nodes...)
	waitAllocatable(t, right, "2", nodes...)
	eventually(t, func() error {
		_, err := cluster.Kubectl(t.Context(), "get", "net-attach-def", "left-net", "right-net")
		return err
	})
}

func on(network, address string) string {
	return fmt.Sprintf(`{"name": %q, "ips": [%q]}`, network, address)
}

func waitReady(t *testing.T, pods ...string) {
	t.Helper()
	args := []string{"wait", "--for=condition=Ready", "--timeout=5m"}
	for _, p := range pods {
		args = append(args, "pod/"+p)
	}
	if _, err := cluster.Kubectl(t.Context(), args...); err != nil {
		describe, _ := cluster.Kubectl(t.Context(), append([]string{"describe", "pod"}, pods...)...)
		t.Fatalf("%v\n%s\n%s", err, describe, diagnosis(t.Context()))
	}
}

// The whole path: policies, VFs, resources, networks, pods on the same PF, on
// different PFs and on different nodes, talking over their VFs.
func TestPolicyToTraffic(t *testing.T) { policyToTraffic(t) }

func policyToTraffic(t *testing.T) {
	t.Helper()
	usePools(t)
	apply(t, pod("client", "vm1", "["+on("left-net", "192.168.100.1/24")+","+on("right-net", "192.168.101.1/24")+"]", left, right)+
		pod("near", "vm1", "["+on("left-net", "192.168.100.2/24")+"]", left)+
		pod("far", "vm2", "["+on("left-net", "192.168.100.3/24")+","+on("right-net", "192.168.101.3/24")+"]", left, right))
	waitReady(t, "client", "near", "far")

	for _, address := range []string{"192.168.100.2" /* same PF */, "192.168.100.3" /* other node */, "192.168.101.3" /* other PF */} {
		pings(t, "client", address)
	}

	t.Run("environment", func(t *testing.T) {
		env := kubectl(t, "", "exec", "client", "--", "env")
		mentions(t, env, "PCIDEVICE_OPENSHIFT_IO_LEFT=0000:01:", "PCIDEVICE_OPENSHIFT_IO_RIGHT=0000:02:")
	})
	t.Run("network-status", func(t *testing.T) {
		status := kubectl(t, "", "get", "pod", "client", "-o", `jsonpath={.metadata.annotations.k8s\.v1\.cni\.cncf\.io/network-status}`)
		var nets []struct {
			Name, Interface, MAC string
			MTU                  int
			IPs                  []string
			DeviceInfo           struct {
				Type string
				PCI  map[string]string
			} `json:"device-info"`
		}
		if err := json.Unmarshal([]byte(status), &nets); err != nil {
			t.Fatal(err)
		}
		if len(nets) != 3 {
			t.Fatalf("%d networks, want the cluster's and two: %s", len(nets), status)
		}
		for i, n := range nets[1:] {
			if n.Interface != fmt.Sprintf("net%d", i+1) || n.MAC == "" || len(n.IPs) != 1 {
				t.Errorf("%+v", n)
			}
			if n.DeviceInfo.Type != "pci" || n.DeviceInfo.PCI["pci-address"] == "" || n.DeviceInfo.PCI["pf-pci-address"] == "" {
				t.Errorf("device-info of %s is not complete: %+v", n.Name, n.DeviceInfo)
			}
			got := kubectl(t, "", "exec", "client", "--", "cat", "/sys/class/net/"+n.Interface+"/address")
			if strings.TrimSpace(got) != n.MAC {
				t.Errorf("%s has MAC %s, status says %s", n.Interface, got, n.MAC)
			}
		}
	})
	t.Run("node state tells it", func(t *testing.T) {
		out := kubectl(t, "", "-n", namespace, "get", "sriovnetworknodestates")
		mentions(t, out, "vm1", "vm2", "Succeeded", "True")
		out = kubectl(t, "", "-n", namespace, "describe", "sriovnetworknodestate", "vm1")
		mentions(t, out, "ens1f0", "Observed Generation", "Ready", "Vf ID")
	})
}

// A pod that asks for nothing is given what its networks need, applied together with one of
// them, and finds its annotations where programs look for them.
func TestPodsNeedNotAsk(t *testing.T) {
	onlyUML(t, "which NIC a VF is of does not matter to what pods ask for")
	usePools(t)
	configure(t, `{"enableInjector": true}`)
	eventually(t, func() error {
		return configured("InjectorReady")
	})
	apply(t, network("unasked-net", "left", staticIP, capIPs)+
		pod("unasked", "", "["+on("unasked-net", "192.168.102.1/24")+","+on("right-net", "192.168.103.1/24")+"]"))
	waitReady(t, "unasked")
	mentions(t, kubectl(t, "", "get", "pod", "unasked", "-o", "jsonpath={.spec.containers[0].resources.limits}"), `"`+left+`":"1"`, `"`+right+`":"1"`)
	mentions(t, kubectl(t, "", "exec", "unasked", "--", "cat", "/etc/podnetinfo/annotations"), "unasked-net")
	refused(t, pod("lost", "", "nowhere-net"), "there is no NetworkAttachmentDefinition default/nowhere-net")
}

// What a pod had is gone from the VF when it comes back.
func TestReturnedVFsAreAtBaseline(t *testing.T) {
	usePools(t)
	spec := network("odd-net", "left", "vlan: 200", "vlanQoS: 3", `spoofChk: "off"`, `trust: "on"`, staticIP, `capabilities: '{"ips": true, "mac": true}'`)
	apply(t, spec)
	p := pod("odd", "vm1", `[{"name": "odd-net", "ips": ["192.168.102.1/24"], "mac": "02:00:00:00:aa:01"}]`, left)
	eventually(t, func() error {
		_, err := cluster.Kubectl(t.Context(), "get", "net-attach-def", "odd-net")
		return err
	})
	kubectl(t, p, "apply", "-f", "-")
	waitReady(t, "odd")
	if mac := kubectl(t, "", "exec", "odd", "--", "cat", "/sys/class/net/net1/address"); strings.TrimSpace(mac) != "02:00:00:00:aa:01" {
		t.Errorf("the pod asked for MAC 02:00:00:00:aa:01 and has %s", mac)
	}
	mentions(t, inNode(t, "vm1", "ip link show ens1f0"), "vlan 200, qos 3", "spoof checking off", "trust on", "02:00:00:00:aa:01")
	remove(t, p)
	eventually(t, func() error { return baseline(t, "vm1", "ens1f0", 4) })
	if out := inNode(t, "vm1", "ip link show ens1f0"); strings.Contains(out, "02:00:00:00:aa:01") {
		t.Errorf("the pod's MAC stayed:\n%s", out)
	}
}

// Ten pods at a time, made and deleted again and again: no VF is lost, none is
// in two pods, and in the end all are at baseline.
func TestChurn(t *testing.T) {
	rounds, err := strconv.Atoi(cmp.Or(os.Getenv("SLUICE_CHURN"), map[string]string{"uml": "2", "qemu": "0"}[kind]))
	if err != nil {
		t.Fatalf("SLUICE_CHURN=%q: %v", os.Getenv("SLUICE_CHURN"), err)
	}
	if rounds == 0 {
		t.Skip("it takes long without acceleration, and others give VFs back: SLUICE_CHURN=1 runs it")
	}
	usePools(t)
	for round := range rounds {
		start := time.Now()
		var yaml strings.Builder
		var names []string
		for i := range 10 {
			// Eight on the two left PFs, all VFs there are; two on the right ones.
			name, net, res := fmt.Sprintf("churn%d", i), "left-net", left
			address := fmt.Sprintf("192.168.100.%d/24", 10+i)
			if i >= 8 {
				net, res, address = "right-net", right, fmt.Sprintf("192.168.101.%d/24", 10+i)
			}
			yaml.WriteString(pod(name, nodes[i%2], "["+on(net, address)+"]", res))
			names = append(names, name)
		}
		kubectl(t, yaml.String(), "apply", "-f", "-")
		waitReady(t, names...)
		ready := time.Since(start)

		var mu sync.Mutex
		owner := map[string]string{}
		var wg sync.WaitGroup
		for i, n := range names {
			wg.Add(1)
			go func() {
				defer wg.Done()
				env, err := cluster.Kubectl(t.Context(), "exec", n, "--", "sh", "-c", "env | grep ^PCIDEVICE_.*=0000 | grep -v _INFO= | head -1; ls -d /sys/class/net/net1")
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					t.Errorf("%s: %v", n, err)
					return
				}
				_, address, _ := strings.Cut(strings.Split(env, "\n")[0], "=")
				key := nodes[i%2] + " " + address
				if other := owner[key]; other != "" {
					t.Errorf("VF %s is in %s and in %s", key, other, n)
				}
				owner[key] = n
			}()
		}
		wg.Wait()
		kubectl(t, "", append([]string{"delete", "pod", "--wait", "--timeout=5m"}, names...)...)
		for _, n := range nodes {
			eventually(t, func() error {
				return errors.Join(baseline(t, n, "ens1f0", 4), baseline(t, n, "ens2f0", 2))
			})
		}
		t.Logf("round %d of %d: ten pods ready after %.1f s, gone after %.1f s", round+1, rounds, ready.Seconds(), time.Since(start).Seconds())
	}
	waitAllocatable(t, left, "4", nodes...)
}

// restartKubelet runs a script that ends a node's kubelet, which the node then starts again,
// as systemd would. It waits until the new one has told of its node: what the API server
// has of the one before would bring pods there before plugins are registered, and the
// kubelet rejects those for good.
func restartKubelet(t *testing.T, node, script string) {
	t.Helper()
	told := func() string {
		return kubectl(t, "", "get", "node", node, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].lastHeartbeatTime}`)
	}
	inNode(t, node, `pid=$(pidof kubelet); `+script+`; while [ -d /proc/$pid ]; do sleep 0.1; done`)
	before := told()
	eventually(t, func() error {
		if told() == before {
			return errors.New("the kubelet has not told of " + node + " since " + before)
		}
		return nil
	})
}

// kubelet forgets its plugins when it restarts; the agent comes back to it.
func TestKubeletRestart(t *testing.T) {
	onlyUML(t, "kubelet is the same on both")
	usePools(t)
	restartKubelet(t, "vm1", "kill $pid")
	// A pod can only be admitted when the plugin is registered again.
	waitAllocatable(t, left, "4", "vm1")
	apply(t, pod("after", "vm1", "["+on("left-net", "192.168.100.9/24")+"]", left))
	waitReady(t, "after")
}

// admitted waits until the kubelet has admitted the pods: one that it asks a device for when
// the agent is killed it rejects for good.
func admitted(t *testing.T, pods ...string) {
	t.Helper()
	kubectl(t, "", append([]string{"wait", "--for=condition=Initialized", "--timeout=5m", "pod"}, pods...)...)
}

// The agent killed with pods coming and going: what it left is put right.
func TestAgentKilled(t *testing.T) {
	usePools(t)
	// Which step the agent is at when it is killed is left to chance here; the CNI
	// server's own tests kill it at each. Each further kill would wait for kubelet's
	// ever longer back-off.
	var yaml strings.Builder
	var names []string
	for i := range 3 {
		name := fmt.Sprintf("killed%d", i)
		yaml.WriteString(pod(name, "vm1", "["+on("left-net", fmt.Sprintf("192.168.100.%d/24", 30+i))+"]", left))
		names = append(names, name)
	}
	kubectl(t, yaml.String(), "apply", "-f", "-")
	admitted(t, names...)
	inNode(t, "vm1", "kill -9 $(pidof sluice-agent)")
	waitReady(t, names...)
	kubectl(t, "", append([]string{"delete", "pod", "--wait=false"}, names...)...)
	time.Sleep(500 * time.Millisecond)
	inNode(t, "vm1", "kill -9 $(pidof sluice-agent) || true")
	kubectl(t, "", append([]string{"wait", "--for=delete", "--timeout=5m", "pod"}, names...)...)
	eventually(t, func() error { return baseline(t, "vm1", "ens1f0", 4) })
	waitAllocatable(t, left, "4", "vm1")
}

// An error of the kernel is told, and gone when the kernel is well again. How soon
// is a matter of the agent's own tests, in operator/node.
func TestKernelErrorIsShown(t *testing.T) {
	onlyUML(t, "only the emulated NIC of its guests injects errors")
	usePools(t)
	inNode(t, "vm2", "echo 12 1 > /sys/kernel/debug/sluicenic/0000:02:00.0/fail_sriov_enable")
	kubectl(t, policy("right", "right", "ens2f0", 3), "apply", "-f", "-")
	eventually(t, func() error {
		out := kubectl(t, "", "-n", namespace, "get", "events", "-o", "jsonpath={.items[*].message}")
		state := kubectl(t, "", "-n", namespace, "get", "sriovnetworknodestate", "vm2", "-o", "yaml")
		if !strings.Contains(out+state, "cannot allocate memory") {
			return errors.New("neither the node state nor an event tells of ENOMEM:\n" + state)
		}
		return nil
	})
	// The error came once: the agent's own retry mends it.
	waitAllocatable(t, right, "3", nodes...)
	kubectl(t, policy("right", "right", "ens2f0", 2), "apply", "-f", "-")
	waitAllocatable(t, right, "2", nodes...)
}
