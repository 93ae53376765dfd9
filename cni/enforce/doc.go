// Package enforce puts network policy in force on the interfaces that attachments make,
// and keeps it in force while policies, pods and namespaces change.
//
// An Enforcer is what cni/attach tells of interfaces that come and go, and what
// cni/enforce/cluster tells of policies. cni/policy says what these mean for an interface;
// one on a network without policies has no rules at all. The others are held to their own
// addresses, and filtered if a policy isolates them, by the one engine that there is so far,
// package nft: in the pod's namespace, and for a MacVLAN sub-interface at its parent on the
// host, too. Packets that go past the kernel (a VF with a userspace driver, RDMA) cannot be
// filtered by it: an interface for them is refused if a policy isolates it, and told where a
// policy comes later.
//
// A change makes a whole new generation of an interface's rules, which takes the place of
// the one before in one step. When that fails the one before stays in force; an interface
// that is to be isolated and was not is closed. Either is tried again, and told in the pod's
// annotation, in an event and in the metrics.
package enforce
