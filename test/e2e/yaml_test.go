//go:build e2e

package e2e

import (
	"fmt"
	"strings"
)

// policy makes a SriovNetworkNodePolicy; extra lines go below spec.
func policy(name, resource, pf string, numVFs int, extra ...string) string {
	return fmt.Sprintf(`
apiVersion: sriovnetwork.openshift.io/v1
kind: SriovNetworkNodePolicy
metadata: {name: %s, namespace: %s}
spec:
  resourceName: %s
  nodeSelector: {node-role.kubernetes.io/worker: ""}
  nicSelector: {pfNames: [%q]}
  numVfs: %d
%s
---`, name, namespace, resource, pf, numVFs, lines(extra))
}

// network makes a SriovNetwork whose NAD appears in namespace default.
func network(name, resource string, extra ...string) string {
	return fmt.Sprintf(`
apiVersion: sriovnetwork.openshift.io/v1
kind: SriovNetwork
metadata: {name: %s, namespace: %s}
spec:
  resourceName: %s
  networkNamespace: default
%s
---`, name, namespace, resource, lines(extra))
}

func lines(extra []string) string {
	var b strings.Builder
	for _, l := range extra {
		b.WriteString("  " + l + "\n")
	}
	return b.String()
}

// pod makes a pod on a node (any when empty) that asks for one of each resource
// and has the networks annotation.
func pod(name, node, networks string, resources ...string) string {
	var ask strings.Builder
	for _, r := range resources {
		fmt.Fprintf(&ask, "%s: \"1\", ", r)
	}
	selector := "{}"
	if node != "" {
		selector = "{kubernetes.io/hostname: " + node + "}"
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata:
  name: %s
  namespace: default
  labels: {app: %[1]s}
  annotations:
    k8s.v1.cni.cncf.io/networks: '%[2]s'
spec:
  nodeSelector: %[3]s
  terminationGracePeriodSeconds: 1
  containers:
    - name: app
      image: sluice.dev/tools:dev
      command: [sleep, infinity]
      resources:
        requests: {%[4]s}
        limits: {%[4]s}
---`, name, networks, selector, strings.TrimSuffix(ask.String(), ", "))
}
