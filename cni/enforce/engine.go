package enforce

import (
	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/enforce/nft"
	"github.com/sluice-network/sluice/cni/policy"
	"github.com/sluice-network/sluice/internal/host"
)

// Engine has rules in the kernel. The calls for one interface follow one another. ns is
// the pod's namespace.
type Engine interface {
	// DenyAll lets nothing pass the interface, which may not be there yet, but what it
	// takes to give it an address. That is generation 0.
	DenyAll(i attach.Interface, ns *host.Netns) error
	// Apply puts the verdicts, by direction, in force in one step; with cut also for
	// connections that there are. After an error it is as it was before.
	Apply(i attach.Interface, ns *host.Netns, verdicts [2]*policy.Verdicts, cut bool, generation uint64) error
	// Generation is the one in force; held is false if there is none.
	Generation(i attach.Interface, ns *host.Netns) (generation uint64, held bool, err error)
	// Cut takes from a VF its link, which its PF keeps it without whoever has it, or gives
	// it the one that it was attached with.
	Cut(i attach.Interface, cut bool) error
	// Remove removes what there is. ns may be nil: the namespace is gone.
	Remove(i attach.Interface, ns *host.Netns) error
	// Counted is what the interface's rules have counted. After Close nobody can tell.
	Counted(i attach.Interface) (nft.Counted, error)
	// Sizes are how much is in the kernel, by engine as DirectionStatus names it.
	Sizes() map[string]nft.Size
	// Report has f told of rules that somebody else changed.
	Report(f func(attach.Interface, nft.Tampering))
	// Close lets go of the pod's namespace. The rules stay.
	Close(i attach.Interface)
}
