package enforce

import (
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ConditionType is of the node's condition that Condition returns.
const ConditionType = "NetworkPolicyEnforced"

// Condition tells, of the node, whether every policy is in force on the interfaces that it
// isolates, and if not, of which pods and why.
func (e *Enforcer) Condition() metav1.Condition {
	e.mu.Lock()
	defer e.mu.Unlock()
	var wrong []string
	for _, f := range e.faces {
		if problems := f.status.problems(); len(problems) > 0 {
			wrong = append(wrong, fmt.Sprintf("pod %s, interface %s: %s", f.Pod, f.IfName, strings.Join(problems, "; ")))
		}
	}
	for pod, why := range e.denied {
		wrong = append(wrong, fmt.Sprintf("pod %s is refused: %s", pod, why))
	}
	slices.Sort(wrong)
	switch {
	case len(wrong) > 0:
		return metav1.Condition{Type: ConditionType, Status: metav1.ConditionFalse, Reason: "NotEnforced", Message: strings.Join(wrong, "\n")}
	case !e.synced:
		return metav1.Condition{Type: ConditionType, Status: metav1.ConditionUnknown, Reason: "PoliciesNotKnown", Message: "the API server has not told all policies yet; what was in force stays so"}
	}
	return metav1.Condition{Type: ConditionType, Status: metav1.ConditionTrue, Reason: "Enforced", Message: "every policy is in force on the interfaces that it isolates"}
}

func (e *Enforcer) changed() {
	if e.Changed != nil {
		e.Changed()
	}
}

// refuse notes that a pod does not get its interface, until it does or is gone.
func (e *Enforcer) refuse(pod, why string) {
	e.metrics.refused.Inc()
	e.mu.Lock()
	e.denied[pod] = why
	e.mu.Unlock()
	e.changed()
}

// admit ends what refuse noted.
func (e *Enforcer) admit(pod string) {
	e.mu.Lock()
	_, was := e.denied[pod]
	delete(e.denied, pod)
	e.mu.Unlock()
	if was {
		e.changed()
	}
}
