// Package nft is enforcement in software: it puts verdict maps into the kernel's
// nf_tables, over netlink and without a process of its own.
//
// Inside a pod's namespace (Pod) the rules are stateful: table inet sluice-IFNAME
// judges new connections at the input and output hooks, conntrack lets the rest of
// them pass. Table netdev sluice-IFNAME at the egress hook of the interface, which raw
// sockets pass too, holds the pod to its own MAC and addresses. On the host (Parent),
// table netdev sluice-PARENT guards MacVLAN pods at the ingress and egress hooks of
// their parent, out of their reach. There is no conntrack there: what has the shape of
// a reply passes, where the other direction's policy allows that peer, and the pod's
// own table is exact.
//
// Rules do not grow with peers: addresses are interval maps to one chain for each
// distinct set of ports. A packet may be in the middle of the rules when they change.
// So new chains and sets are there before anything leads to them (prepare), one
// transaction puts the generation in force (flip), and the old go once packets that
// were under way are through (sweep).
// A failure before or in the flip leaves the old generation wholly in force.
//
// Peers that change are changed in place. Before Linux 6.17 an interval that waits for
// its transaction hides an active one around it; so there are two maps for each
// family, a and b, and what remains of an interval goes to the other one. The order
// of lookup is a, b, a: one that moves between two lookups is found.
//
// Watch notices what others do to the tables, by the kernel's events, and puts a new
// version of all in force. Other tables are never touched.
//
// Rendering and comparing are pure (render.go, peers.go).
package nft
