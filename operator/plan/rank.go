package plan

import (
	"cmp"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

// rank decides which of two policies of one kind prevails.
type rank struct {
	name     string
	priority int
	made     metav1.Time
}

func rankOf(policy metav1.Object, priority *int) rank {
	r := rank{policy.GetName(), sriovv1.DefaultPriority, policy.GetCreationTimestamp()}
	if priority != nil {
		r.priority = *priority
	}
	return r
}

// compare is negative when r is the stronger: by a lower priority number, else by its
// age, else by its name.
func (r rank) compare(o rank) int {
	return cmp.Or(cmp.Compare(r.priority, o.priority), r.made.Compare(o.made.Time), cmp.Compare(r.name, o.name))
}

// reason is what the weaker policy is refused for.
func (r rank) reason(weak rank) Reason {
	if r.priority == weak.priority {
		return Conflict
	}
	return Overridden
}

// wins says why r prevails.
func (r rank) wins(weak rank) string {
	if r.priority == weak.priority {
		return fmt.Sprintf("policies %s and %s have the same priority %d and %s was there first", r.name, weak.name, r.priority, r.name)
	}
	return fmt.Sprintf("policy %s has priority %d, the stronger, against %d", r.name, r.priority, weak.priority)
}
