//go:build e2e

package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// Pods on all nodes get addresses of one pool, each its own, whatever becomes of the agent.
func TestAddressesOfAPool(t *testing.T) {
	onlyUML(t, "addresses do not depend on the NIC")
	const (
		inPool = `ipam: '{"type": "sluice", "pool": "pool"}'`
		supply = `
apiVersion: sluice.dev/v1alpha1
kind: IPPool
metadata: {name: pool, namespace: ` + namespace + `}
spec:
  ipv4: {cidr: 10.77.0.0/24, blockSize: 16}
  ipv6: {cidr: "fd77::/64"}
  restSeconds: 1
  reservations: [{address: 10.77.0.200, namespace: default, pod: known}]
---`
	)
	kubectl(t, supply, "apply", "-f", "-")
	// It stays: nodes keep what they have claimed for minutes, and so long it is not deleted.
	// How much of it is used is told as seldom, and seen in the operator's own tests.
	apply(t, slots("pooled", "ens2f0", 8)+macvlan("pool-net", "resourceName: pooled", inPool))
	waitAllocatable(t, "openshift.io/pooled", "8", nodes...)
	waitNetwork(t, "pool-net")

	const each = 4
	owner := map[netip.Addr]string{}
	var yaml string
	var names []string
	for i := range each {
		for _, node := range nodes {
			name := fmt.Sprintf("pooled-%s-%d", node, i)
			names = append(names, name)
			yaml += pod(name, node, "pool-net", "openshift.io/pooled")
		}
	}
	apply(t, yaml)
	admitted(t, names...)
	inNode(t, "vm1", "kill -9 $(pidof sluice-agent)")
	waitReady(t, names...)
	for _, name := range names {
		out := strings.Fields(kubectl(t, "", "exec", name, "--", "sh", "-c", "ip -o address show net1 scope global | tr -s ' ' | cut -d' ' -f4"))
		if len(out) != 2 {
			t.Fatalf("%s has addresses %q, want one of each family", name, out)
		}
		for _, prefix := range out {
			address := netip.MustParsePrefix(prefix).Addr()
			if other := owner[address]; other != "" {
				t.Errorf("%s has address %s, which %s has", name, address, other)
			}
			owner[address] = name
		}
	}
	for address, name := range owner {
		if strings.HasPrefix(name, "pooled-vm2") {
			pings(t, "pooled-vm1-0", address.String())
		}
	}

	known := pod("known", "vm1", "pool-net", "openshift.io/pooled")
	for _, node := range nodes { // the same pod, on one node after the other
		p := strings.Replace(known, "hostname: vm1", "hostname: "+node, 1)
		kubectl(t, p, "apply", "-f", "-")
		t.Cleanup(func() { remove(t, p) })
		waitReady(t, "known")
		mentions(t, kubectl(t, "", "exec", "known", "--", "ip", "-o", "address", "show", "net1"), "10.77.0.200/24")
		remove(t, p)
	}
	if out, err := cluster.KubectlInput(t.Context(), supply, "delete", "-f", "-"); err == nil {
		t.Errorf("a pool that pods have addresses of was deleted: %s", out)
	} else {
		mentions(t, err.Error(), "IPPool pool is in use")
	}
}
