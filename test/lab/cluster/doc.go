// Package cluster holds what makes machines a Kubernetes cluster: keys and
// certificates, the control plane, the network between host and nodes, what a
// guest needs to be a node, and the images its pods start from.
//
// The control plane runs as processes of this machine inside the lab's network
// namespace, so it costs no emulation; only the nodes are guests. The
// namespace has no way out. Addresses, the same in every lab:
//
//	172.30.0.1      bridge brm: API server (port 6443), gateway of the nodes
//	172.30.0.10+N   node N, interface mgmt
//	10.244.N.0/24   pods of node N, routed by the namespace
//	10.96.0.0/16    services, which kube-proxy on the nodes makes reachable
//	brd0, brd1      bridges that join the first and the second card of the nodes
//
// Everything here is rendered or started anew for each lab and kept below one
// state directory. Package lab puts the pieces together.
package cluster
