package nft

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/cni/policy"
)

// On the parent, what begins a connection passes exactly if the verdicts allow it, and
// what may be a reply also if those of the other direction allow that port of the peer.
func TestParentRulesSayWhatVerdictsSay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		i := Interface{Name: "net1", MAC: ownMAC, Addresses: ownAddresses}
		verdicts := [2]*policy.Verdicts{drawVerdicts(t, "ingress"), drawVerdicts(t, "egress")}
		k := kernel{}
		r := parentRendering("p0", i, verdicts, 3, nil, true)
		versions(t, k, r, verdicts)
		for range 30 {
			d := policy.Direction(rapid.IntRange(0, 1).Draw(t, "direction"))
			f, peer := drawFlow(t, d)
			f.lateFragment = rapid.IntRange(0, 9).Draw(t, "fragment") == 0
			anyOf := func(v *policy.Verdicts) bool {
				for _, p := range v.Peers {
					if !peer.Less(p.First) && !p.Last.Less(peer) {
						return true
					}
				}
				return !v.Isolated
			}
			reply := true
			switch f.protocol {
			case policy.TCP:
				reply = f.flags&0x14 != 0
			case policy.SCTP:
				reply = f.flags != 1
			}
			want := verdicts[d].Allows(peer, f.protocol, f.destinationPort) || reply && verdicts[1-d].Allows(peer, f.protocol, f.sourcePort)
			if f.protocol == 1 || f.protocol == 58 {
				want = verdicts[0].Allows(peer, f.protocol, 0) || verdicts[1].Allows(peer, f.protocol, 0)
			}
			if f.lateFragment {
				want = anyOf(verdicts[0]) || anyOf(verdicts[1])
			}
			if !verdicts[d].Isolated {
				want = true
			}
			hooks := [][]string{{"senders", "receivers"}} // base chains, in their order
			if d == policy.Egress {
				hooks = append(hooks, []string{"egress"})
			}
			walk := func(hook []string) (got bool, counter string) {
				for _, base := range hook {
					if got, counter = k.walk(r.table, base, f.packet()); !got {
						break
					}
				}
				return got, counter
			}
			for _, hook := range hooks {
				got, counter := walk(hook)
				if got != want {
					t.Fatalf("%s hook, %s %+v: rules say %v, should be %v", hook, d, f, got, want)
				}
				if want := macPrefix(ownMAC) + [2]string{droppedIn, droppedOut}[d]; !got && counter != want {
					t.Fatalf("dropped packet is counted by %q, not %q", counter, want)
				}
			}
			// Other MACs are none of its business.
			f.sourceMAC[5], f.destinationMAC[5] = 0x70, 0x71
			if got, _ := walk(hooks[0]); !got {
				t.Fatalf("a packet of others is dropped: %+v", f)
			}
		}
	})
}
