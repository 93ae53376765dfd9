// Package standalone gives pods their networks without a meta plugin. Sluice,
// chained in the conflist of the cluster network as
//
//	{"type": "sluice", "podNetworks": true, "capabilities": {"io.kubernetes.cri.pod-annotations": true}}
//
// reads the pod's annotation k8s.v1.cni.cncf.io/networks, takes the devices from
// the kubelet, runs the plugins of each network and writes the annotation
// k8s.v1.cni.cncf.io/network-status. The result of the plugins before it is passed
// on as it is.
//
// With the capability the runtime hands over the pod's annotations, and pods
// without the annotation cost nothing and need no API server; without it each ADD
// asks the API server for its pod.
//
// plan decides what is run with which configuration, and is pure. libcni runs it;
// what would be a process of the shim is a call of this agent instead. Before the
// first plugin runs, all that DEL needs is on disk: a network definition that is
// changed or gone later changes nothing for pods that have it.
package standalone
