// Package life says in whose hands the devices of a node are: a pure state machine of
// what the agent did and what it learns from others.
//
// A device goes through these phases:
//
//	Configured  in a pool, but not offered: it is not fit, or withdrawn
//	Advertised  the kubelet may give it to a pod
//	Allocated   the kubelet gave it to a pod, or was told that it may
//	Attached    it is an interface of the pod
//	Returned    the interface is gone, and the kubelet still counts it as the pod's
//
// and from Returned either to Attached again, when the pod gets a new sandbox, or back to
// Advertised. Each hand that a device goes into has a generation, greater than all before
// it on this node.
//
// Two others know of a device: the kubelet, which decides whose it is, and the journal of
// attachments, which knows what is in a pod now. Neither sends messages that could be lost:
// both are asked for all they know, and [Book.Hear] may be told the same as often as one likes.
// What this package adds is what they do not know: the allocation that the kubelet was
// promised and has not taken down, and whom it forgot. So a hand ends only when the kubelet does not
// tell of it in two answers, asked some time apart and some time after the allocation, and
// the journal has no attachment.
package life
