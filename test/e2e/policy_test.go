//go:build e2e

package e2e

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

// multiNetworkPolicies is the kind, as the Network Plumbing Working Group's engines install it.
const multiNetworkPolicies = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: multi-networkpolicies.k8s.cni.cncf.io}
spec:
  group: k8s.cni.cncf.io
  scope: Namespaced
  names: {plural: multi-networkpolicies, singular: multi-networkpolicy, kind: MultiNetworkPolicy, shortNames: [multi-policy]}
  versions:
  - name: v1beta1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
---`

// reaches waits until pings from the pod to the address are answered, or are not.
func reaches(t *testing.T, from, address string, want bool) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		_, err := cluster.Kubectl(t.Context(), "exec", from, "--", "ping", "-c", "1", "-w", "2", address)
		if !want && err == nil {
			return errors.New(from + " reaches " + address)
		}
		if want {
			return err
		}
		return nil
	})
}

// enforced waits until the pod says what is in force on it, with all of want; nothing when
// there is none.
func enforced(t *testing.T, pod string, want ...string) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		out := kubectl(t, "", "get", "pod", pod, "-o", `jsonpath={.metadata.annotations.sluice\.dev/enforcement}`)
		for _, w := range want {
			if !strings.Contains(out, w) {
				return errors.New(pod + " has no " + w + ": " + out)
			}
		}
		if len(want) == 0 && out != "" {
			return errors.New(pod + " has " + out)
		}
		return nil
	})
}

// friends is a policy's spec: only pods with role friend may talk to those with role server.
const friends = `
spec:
  podSelector: {matchLabels: {role: server}}
  ingress: [{from: [{podSelector: {matchLabels: {role: friend}}}]}]
---`

// Policies hold on VFs and on MacVLAN sub-interfaces, of pods on the same and on different
// nodes, from when a pod starts until the policy goes.
func TestNetworkPolicy(t *testing.T) {
	onlyUML(t, "the rules are in the pods, whatever the NIC")
	usePools(t)
	apply(t, multiNetworkPolicies)
	apply(t, slots("guarded", "ens2f0", 5)+macvlan("guarded-net", "resourceName: guarded", staticIP, capIPs))
	waitAllocatable(t, "openshift.io/guarded", "5", nodes...)
	waitNetwork(t, "guarded-net")
	kubectl(t, "", "annotate", "--overwrite", "net-attach-def", "left-net", "sluice.dev/network-policy=all")
	t.Cleanup(func() {
		if _, err := cluster.Kubectl(context.Background(), "annotate", "net-attach-def", "left-net", "sluice.dev/network-policy-"); err != nil {
			t.Error(err)
		}
	})
	resources := []string{left, "openshift.io/guarded"}
	all := func(name, node, role, last string) string {
		networks := "[" + on("left-net", "192.168.120."+last+"/24") + "," + on("guarded-net", "192.168.121."+last+"/24") + "]"
		return strings.Replace(pod(name, node, networks, resources...), "labels: {", "labels: {role: "+role+", ", 1)
	}
	apply(t, all("server", "vm1", "server", "1")+all("friend", "vm2", "friend", "2")+all("near", "vm1", "stranger", "3"))
	waitReady(t, "server", "friend", "near")
	for _, address := range []string{"192.168.120.1", "192.168.121.1"} {
		reaches(t, "friend", address, true)
		reaches(t, "near", address, true)
	}
	enforced(t, "server")

	const np = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: friends}" + friends
	const mnp = "apiVersion: k8s.cni.cncf.io/v1beta1\nkind: MultiNetworkPolicy\nmetadata: {name: friends, annotations: {k8s.v1.cni.cncf.io/policy-for: guarded-net}}" + friends
	apply(t, np)
	reaches(t, "near", "192.168.120.1", false)
	reaches(t, "friend", "192.168.120.1", true)
	reaches(t, "near", "192.168.121.1", true) // another network
	reaches(t, "server", "192.168.120.3", true)
	enforced(t, "server", `"net1":{"network":"default/left-net"`, `"policies":["NetworkPolicy default/friends"]`)
	apply(t, mnp)
	reaches(t, "near", "192.168.121.1", false)
	reaches(t, "friend", "192.168.121.1", true)
	enforced(t, "server", `"net2":{"network":"default/guarded-net"`, `"policies":["MultiNetworkPolicy default/friends"]`)

	// One that starts under policy.
	apply(t, all("late", "vm2", "server", "4"))
	waitReady(t, "late")
	for _, address := range []string{"192.168.120.4", "192.168.121.4"} {
		reaches(t, "near", address, false)
		reaches(t, "friend", address, true)
	}
	// A label is all it takes.
	kubectl(t, "", "label", "--overwrite", "pod", "near", "role=friend")
	reaches(t, "near", "192.168.120.1", true)
	kubectl(t, "", "label", "--overwrite", "pod", "near", "role=stranger")
	reaches(t, "near", "192.168.120.1", false)

	remove(t, np)
	remove(t, mnp)
	for _, address := range []string{"192.168.120.1", "192.168.121.1", "192.168.121.4"} {
		reaches(t, "near", address, true)
	}
	enforced(t, "server")
	enforced(t, "late")
}
