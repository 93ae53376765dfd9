// Package e2e tests Sluice on a real cluster: kube-apiserver, etcd, kubelet and
// containerd, with nodes that are guests with SR-IOV NICs.
//
// The cluster is started once for the package, and Sluice is installed as a user
// would. LAB names the kind of guests (uml, the default, or qemu), SLUICE_IMAGE
// the archive of the image under test, SLUICE_CHURN how many rounds of ten pods
// TestChurn makes (3 on uml, 1 on qemu), and SLUICE_KEEP=1 leaves the cluster up.
package e2e
