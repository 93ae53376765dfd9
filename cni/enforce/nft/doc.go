// Package nft is enforcement in software: it puts verdict maps into the kernel's
// nf_tables, over netlink and without a process of its own.
//
// Inside a pod's namespace (Pod) the rules are stateful: table inet sluice-IFNAME
// judges new connections at the input and output hooks, conntrack lets the rest of
// them pass. With Cut it judges every packet, an answer by what its connection began
// with; so what is no longer allowed ends with the generation, and conntrack's entries
// need not be touched. Table netdev sluice-IFNAME at the egress hook of the interface, which
// packet sockets pass too, holds the pod to its own MAC and addresses, and where egress is
// isolated to what has a route, which the output hook has judged. On the host (Parent),
// table netdev sluice-PARENT guards MacVLAN pods at the ingress and egress hooks of
// their parent, out of their reach. There is no conntrack there: what has the shape of
// a reply passes, where the other direction's policy allows that peer, and the pod's
// own table is exact.
//
// Rules do not grow with peers: addresses are maps to one chain for each distinct set of
// ports, single ones a hash, so that ten thousand are found as fast as ten, and others
// intervals; where answers are judged too, of ports and of those that answers come from,
// so that one lookup judges a packet. In the pod the rule that accepts a new connection
// counts it for the policies that allow it: a set of ports is another if others allow it.
//
// No change has a gap, though a packet may be in the middle of the rules when they change.
// What the kernel gives for that is little: the rules of a chain are of one generation
// for all of a packet's walk through a hook (nft_do_chain reads the cursor once), but each
// lookup reads it anew, and one that read it just before a commit may find neither what
// was replaced nor what replaces it. So:
//   - a new version of all has new chains and sets, which are there before anything leads
//     to them; chains that stay get other rules in one transaction; nothing that packets
//     look up is changed;
//   - peers that change are changed in place, by adding first, and taking away after a
//     grace period, when no packet is under way that looked before. Between the two what
//     either generation allows passes: what both allow is always found, what neither
//     allows never. Each is one transaction; if the second fails, the first is undone;
//   - what has fallen out of use goes after another grace period.
//
// A failure leaves the old generation wholly in force.
//
// There are two interval maps for each family, a and b: what remains of an interval goes to
// the other one, or as a single address to the hash; what changes of a single address in the
// hash goes to an interval map. Before Linux 6.17 an interval that waits for its transaction
// hides an active one around it.
//
// Watch notices what others do to the tables, by the kernel's events, and puts a new
// version of all in force. Other tables are never touched.
//
// Rendering and comparing are pure (render.go, peers.go).
package nft
