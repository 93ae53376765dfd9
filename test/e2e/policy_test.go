//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
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
	eventually(t, func() error {
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
	eventually(t, func() error {
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

func contains(text, want string) error {
	if !strings.Contains(text, want) {
		return fmt.Errorf("there is no %q in:\n%s", want, text)
	}
	return nil
}

func without(text, not string) error {
	if strings.Contains(text, not) {
		return fmt.Errorf("there is a %q in:\n%s", not, text)
	}
	return nil
}

// tables are those of nf_tables on the node and in its pods' namespaces, sorted.
func tables(t *testing.T, node string) string {
	t.Helper()
	return inNode(t, node, `{ nft list tables; for ns in $(ls /var/run/netns); do ip netns exec $ns nft list tables 2>/dev/null; done; } | sort`)
}

// explains asks as people do why the friend reaches the server and its neighbour does not.
func explains(t *testing.T) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "kubectl-sluice")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "./operator/cmd/kubectl-sluice").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for peer, want := range map[string][]string{
		"friend": {"allowed", "NetworkPolicy default/friends, spec.ingress[0]", "nft-pod", "MultiNetworkPolicy default/friends", "nft-host"},
		"near":   {"denied", "isolated by NetworkPolicy default/friends, none of which allows it"},
	} {
		out, err := exec.CommandContext(t.Context(), program, "explain", "server", "-n", "default", "--from", peer, "--port", "80", "--kubeconfig", cluster.Kubeconfig()).CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		mentions(t, string(out), want...)
	}
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
	const held = `"egress":{"engine":"nft-pod","notes":["sends from its own addresses only`
	enforced(t, "near", held)
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

	explains(t)
	// What the network says holds at once, and is shown.
	kubectl(t, "", "annotate", "--overwrite", "net-attach-def", "guarded-net", "sluice.dev/network-policy=none")
	reaches(t, "near", "192.168.121.1", true)
	enforced(t, "server", `"the network is annotated sluice.dev/network-policy=none"`)
	kubectl(t, "", "annotate", "net-attach-def", "guarded-net", "sluice.dev/network-policy-")
	reaches(t, "near", "192.168.121.1", false)
	// What is not valid closes, and is told.
	const odd = "apiVersion: k8s.cni.cncf.io/v1beta1\nkind: MultiNetworkPolicy\nmetadata: {name: odd, annotations: {k8s.v1.cni.cncf.io/policy-for: guarded-net}}\nspec: {podSelector: {matchLabels: {role: stranger}}, policyTypes: [Sideways]}\n---"
	apply(t, odd)
	reaches(t, "near", "192.168.121.2", false)
	eventually(t, func() error {
		return contains(kubectl(t, "", "get", "events", "-o", "jsonpath={.items[*].message}"), `spec.policyTypes[0] is "Sideways"`)
	})
	remove(t, odd)
	eventually(t, func() error {
		out := kubectl(t, "", "-n", namespace, "get", "sriovnetworknodestate", "vm1", "-o", `jsonpath={.status.conditions[?(@.type=="NetworkPolicyEnforced")]}`)
		return contains(out, `"status":"True"`)
	})

	// Rules that go are put back, those of others are nobody's business, an agent that is
	// away leaves both.
	inNode(t, "vm1", "nft add table inet foreign; nft delete table netdev sluice-ens2f0")
	t.Cleanup(func() { inNodeAfter(t, "vm1", "nft delete table inet foreign") })
	eventually(t, func() error { return contains(tables(t, "vm1"), "sluice-ens2f0") })
	eventually(t, func() error {
		return contains(kubectl(t, "", "get", "events", "--field-selector", "reason=PolicyTampered,involvedObject.name=server", "-o", "jsonpath={.items[*].message}"), "nft changed the rules")
	})
	before := tables(t, "vm1")
	inNode(t, "vm1", "kill -9 $(pidof sluice-agent)")
	reaches(t, "near", "192.168.120.1", false)
	if now := tables(t, "vm1"); now != before {
		t.Errorf("without an agent there is\n%s\nand was\n%s", now, before)
	}
	// A pod that goes under policy, and another that has its VF.
	server := all("server", "vm1", "server", "1")
	remove(t, server)
	apply(t, strings.Replace(server, "role: server", "role: none", 1))
	waitReady(t, "server")
	reaches(t, "near", "192.168.120.1", true)
	enforced(t, "server", held, `"engine":"nft-host","notes":["sends from`)
	if err := contains(tables(t, "vm2"), "sluice-ens2f0"); err != nil { // of late
		t.Error(err)
	}

	remove(t, np)
	remove(t, mnp)
	for _, n := range nodes {
		eventually(t, func() error { return without(tables(t, n), "sluice-") })
	}
	if err := contains(tables(t, "vm1"), "foreign"); err != nil {
		t.Error(err)
	}
	for _, address := range []string{"192.168.120.1", "192.168.121.1", "192.168.121.4"} {
		reaches(t, "near", address, true)
	}
	enforced(t, "server")
	enforced(t, "late")
}
