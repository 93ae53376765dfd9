// Package lab runs a Kubernetes cluster whose nodes have SR-IOV network cards,
// on a machine that has none.
//
// [Up] builds what is missing, starts the control plane as processes of this
// machine and the nodes as guests, and returns when every node is Ready.
// [Attach] finds a cluster that another process started. A cluster outlives
// the process that started it, until [Cluster.Down].
//
// A lab has a name, by default $SLUICE_LAB_NAME or "sluice-lab", which is also
// that of its network namespace; labs of different names run side by side.
// Its state lies in ${XDG_STATE_HOME:-~/.local/state}/sluice/lab/<name>. What a
// killed lab leaves behind, the next Up of that name removes.
package lab
