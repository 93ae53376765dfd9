//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// slots makes a MacvlanNodePolicy.
func slots(name, parent string, slots int, extra ...string) string {
	return fmt.Sprintf(`
apiVersion: sluice.dev/v1alpha1
kind: MacvlanNodePolicy
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  resourceName: %[1]s
  nodeSelector: {node-role.kubernetes.io/worker: ""}
  parentSelector: {pfNames: [%[3]q]}
  slots: %[4]d
%[5]s
---`, name, namespace, parent, slots, lines(extra))
}

// macvlan makes a MacvlanNetwork whose NAD appears in namespace default.
func macvlan(name string, extra ...string) string {
	return fmt.Sprintf(`
apiVersion: sluice.dev/v1alpha1
kind: MacvlanNetwork
metadata: {name: %s, namespace: %s}
spec:
  networkNamespace: default
%s
---`, name, namespace, lines(extra))
}

func waitNetwork(t *testing.T, name string) {
	t.Helper()
	eventually(t, func() error {
		_, err := cluster.Kubectl(t.Context(), "get", "net-attach-def", name)
		return err
	})
}

// pings wants three answers to three questions. Without a deadline (-w) ping waits for
// the last one no longer than two round trips.
func pings(t *testing.T, from, address string, options ...string) {
	t.Helper()
	args := append([]string{"exec", from, "--", "ping", "-c", "3", "-i", "0.2", "-w", "10"}, append(options, address)...)
	if out := kubectl(t, "", args...); !strings.Contains(out, " 0% packet loss") {
		t.Errorf("%s to %s: %s", from, address, out)
	}
}

// Slots on a NIC and on a VLAN of it, which is made, are there for pods to ask for, and
// become sub-interfaces in them.
func TestMacvlan(t *testing.T) {
	onlyUML(t, "parents are tested in guests of both kinds, and sub-interfaces are the kernel's alone")
	apply(t, slots("slots", "ens2f0", 5)+slots("tagged", "ens2f0", 7, "vlan: 30")+
		macvlan("slot-net", "resourceName: slots", staticIP, `capabilities: '{"ips": true, "mac": true}'`)+
		macvlan("tagged-net", "resourceName: tagged", "master: ens2f0.30", "mode: vepa", "mtu: 1400", staticIP, capIPs))
	waitAllocatable(t, "openshift.io/slots", "5", nodes...)
	waitAllocatable(t, "openshift.io/tagged", "7", nodes...)
	waitNetwork(t, "slot-net")
	waitNetwork(t, "tagged-net")
	for _, n := range nodes {
		mentions(t, inNode(t, n, "ip -d -o link show type vlan"), "vlan protocol 802.1Q id 30", "@ens2f0")
	}
	if kind == "uml" {
		eventually(t, func() error {
			out := kubectl(t, "", "-n", namespace, "get", "macvlannodepolicies")
			if strings.Count(out, "True") != 2 {
				return errors.New("not all are Ready:\n" + out)
			}
			return nil
		})
	}
	apply(t, pod("one", "vm1", `[{"name": "slot-net", "ips": ["192.168.110.1/24", "fd10::1/64"], "mac": "02:00:00:00:0a:01"},`+on("tagged-net", "192.168.111.1/24")+"]", "openshift.io/slots", "openshift.io/tagged")+
		pod("near", "vm1", "["+on("slot-net", "192.168.110.2/24")+"]", "openshift.io/slots")+
		pod("far", "vm2", `[{"name": "slot-net", "ips": ["192.168.110.3/24", "fd10::3/64"]},`+on("tagged-net", "192.168.111.3/24")+"]", "openshift.io/slots", "openshift.io/tagged"))
	waitReady(t, "one", "near", "far")
	for _, address := range []string{"192.168.110.2", "192.168.110.3", "fd10::3"} {
		pings(t, "one", address)
	}
	if kind == "uml" { // QEMU's 82576 passes no tagged frames of its PF while that has VFs
		pings(t, "one", "192.168.111.3")
	}
	mentions(t, kubectl(t, "", "exec", "one", "--", "ip", "-d", "-o", "link", "show", "type", "macvlan"), "net1", "02:00:00:00:0a:01", "mode bridge", "net2", "mtu 1400", "mode vepa")
	mentions(t, kubectl(t, "", "exec", "one", "--", "env"), "PCIDEVICE_OPENSHIFT_IO_SLOTS=ens2f0-", "PCIDEVICE_OPENSHIFT_IO_TAGGED=ens2f0.30-")
	mentions(t, kubectl(t, "", "get", "pod", "one", "-o", `jsonpath={.metadata.annotations.k8s\.v1\.cni\.cncf\.io/network-status}`), "default/slot-net", "192.168.110.1", "02:00:00:00:0a:01")
	// The cluster's network has the default route, and each interface its own table.
	mentions(t, kubectl(t, "", "exec", "one", "--", "ip", "route", "show", "default"), "dev eth0")
	mentions(t, kubectl(t, "", "exec", "one", "--", "ip", "rule"), "from 192.168.110.1 lookup", "from 192.168.111.1 lookup")

	// An address that another pod has is refused, with the MAC of that.
	taken := pod("taken", "vm2", "["+on("slot-net", "192.168.110.2/24")+"]", "openshift.io/slots")
	apply(t, taken)
	mac := strings.TrimSpace(kubectl(t, "", "exec", "near", "--", "cat", "/sys/class/net/net1/address"))
	eventually(t, func() error {
		events := kubectl(t, "", "get", "events", "--field-selector", "involvedObject.name=taken", "-o", "jsonpath={.items[*].message}")
		if !strings.Contains(events, "192.168.110.2 is in use by the station with MAC "+mac) {
			return errors.New("no event tells of the conflict: " + events)
		}
		return nil
	})
}

// Where nodes share no layer 2, a VXLAN device between them is the parent. Sub-interfaces
// have its MTU, and packets of that size pass.
func TestMacvlanOverVXLAN(t *testing.T) {
	onlyUML(t, "a VXLAN device is no NIC's")
	address := func(node string) string {
		return strings.TrimSpace(kubectl(t, "", "get", "node", node, "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`))
	}
	mtu := ""
	for i, n := range nodes {
		mtu = strings.TrimSpace(inNode(t, n, fmt.Sprintf(`
dev=$(ip -o route get %[2]s | sed 's/.* dev \([^ ]*\).*/\1/')
ip link add vx7 type vxlan id 7 dstport 4789 local %[1]s remote %[2]s dev $dev
ip link set vx7 up
cat /sys/class/net/vx7/mtu`, address(n), address(nodes[1-i]))))
		t.Cleanup(func() { inNodeAfter(t, n, "ip link del vx7") })
	}
	apply(t, slots("overlay", "vx7", 4)+macvlan("overlay-net", "resourceName: overlay", staticIP, capIPs))
	waitAllocatable(t, "openshift.io/overlay", "4", nodes...)
	waitNetwork(t, "overlay-net")
	apply(t, pod("here", "vm1", "["+on("overlay-net", "192.168.120.1/24")+"]", "openshift.io/overlay")+
		pod("there", "vm2", "["+on("overlay-net", "192.168.120.2/24")+"]", "openshift.io/overlay"))
	waitReady(t, "here", "there")
	mentions(t, kubectl(t, "", "exec", "here", "--", "ip", "link", "show", "net1"), "mtu "+mtu)
	pings(t, "here", "192.168.120.2")
	var size int
	if _, err := fmt.Sscan(mtu, &size); err != nil {
		t.Fatal(err)
	}
	pings(t, "here", "192.168.120.2", "-M", "do", "-s", fmt.Sprint(size-28)) // without the headers of IPv4 and ICMP
}

// A pod whose only network is MacVLAN is Ready, which takes kubelet's probe, reaches its
// node and the API server's Service, and is reached by a client from outside through a port
// of its node, by the host interface.
func TestMacvlanAlone(t *testing.T) {
	onlyUML(t, "the interface to the host is no NIC's")
	apply(t, macvlan("only-net", "master: ens2f0", `ipam: '{"type": "static", "addresses": [{"address": "192.168.130.1/24", "gateway": "192.168.130.254"}], "routes": [{"dst": "0.0.0.0/0"}]}'`,
		`hostInterface: {routes: [10.96.0.0/16]}`))
	waitNetwork(t, "only-net")
	inNode(t, "vm1", "ip link set ens2f0 up")
	yaml := strings.Replace(pod("alone", "vm1", ""), "k8s.v1.cni.cncf.io/networks: ''", "v1.multus-cni.io/default-network: default/only-net", 1)
	yaml = strings.Replace(served(yaml, page), "      command:", `      readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
      command:`, 1)
	apply(t, yaml+`
apiVersion: v1
kind: Service
metadata: {name: alone, namespace: default}
spec: {type: NodePort, selector: {app: alone}, ports: [{port: 80, targetPort: 8080, nodePort: 30081}]}
---`)
	waitReady(t, "alone")
	if ip := kubectl(t, "", "get", "pod", "alone", "-o", "jsonpath={.status.podIP}"); ip != "192.168.130.1" {
		t.Errorf("the pod's address is %s", ip)
	}
	mentions(t, kubectl(t, "", "exec", "alone", "--", "ip", "-o", "link"), "eth0", "host0")
	mentions(t, kubectl(t, "", "exec", "alone", "--", "ip", "route", "show", "default"), "192.168.130.254 dev eth0")
	node := strings.TrimSpace(kubectl(t, "", "get", "node", "vm1", "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`))
	pings(t, "alone", node)
	kubectl(t, "", "exec", "alone", "--", "sh", "-c", "nc -w 5 10.96.0.1 443 < /dev/null")
	fromOutside(t, 0, 30081)
}
