package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/operator/plan"
)

// errWantedAgain ends an agent that has taken its files off the node: a new one
// puts them there.
var errWantedAgain = errors.New("this node is to be used again: start anew")

// recheckLeaving is how soon what keeps the agent from leaving is looked at again.
const recheckLeaving = 2 * time.Second

// leaving tells whether the operator is about to remove the agent and wants the
// node as it was before.
func (p *pass) leaving() bool {
	return p.state != nil && p.state.Annotations[v1.AnnotationRemoval] == "true" && len(p.state.Spec.Interfaces) == 0 && len(p.state.Spec.Macvlans) == 0
}

// leave takes the agent's files off the node when nothing else of it is left, and
// makes the status, which says that all is as asked, say so.
func (p *pass) leave(s *v1.SriovNetworkNodeStateStatus) {
	if !p.leaving() || !meta.IsStatusConditionTrue(s.Conditions, v1.ConditionReady) {
		return
	}
	c := metav1.Condition{
		Type: v1.ConditionReady, Status: metav1.ConditionTrue, Reason: ReasonRemoved, Message: "nothing of Sluice is left on this node but its agent",
		ObservedGeneration: s.ObservedGeneration, LastTransitionTime: metav1.NewTime(time.Now().Truncate(time.Second)),
	}
	if err := p.takeOff(); err != nil {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, ReasonLeaving, err.Error()
		s.SyncStatus = v1.SyncStatusInProgress
		p.within(recheckLeaving)
	}
	if before := meta.FindStatusCondition(p.conditions, c.Type); before != nil && before.Status == c.Status {
		c.LastTransitionTime = before.LastTransitionTime
	}
	meta.SetStatusCondition(&s.Conditions, c)
}

func (p *pass) takeOff() error {
	if p.left {
		return nil
	}
	for _, vlan := range plan.UnusedVLANs(nil, statusLinks(p.parents.links, nil)) {
		return fmt.Errorf("VLAN device %s, made for a policy, is still there", vlan.Link)
	}
	held, err := p.Usage.Held()
	if err != nil {
		return fmt.Errorf("learn whether pods hold devices: %w", err)
	}
	var pods []string
	for _, pod := range held {
		pods = append(pods, pod)
	}
	if slices.Sort(pods); len(pods) > 0 {
		return fmt.Errorf("waits for the pods that hold devices: %s; delete them", shorten(strings.Join(slices.Compact(pods), ", ")))
	}
	if p.Uninstall != nil {
		if err := p.Uninstall(); err != nil {
			return err
		}
	}
	if err := os.Remove(filepath.Join(p.ModprobeDir, modprobeFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the agent's files: %w", err)
	}
	// The folder itself may be a mount.
	entries, err := os.ReadDir(p.StateDir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(p.StateDir, e.Name())))
	}
	if err != nil {
		return fmt.Errorf("remove the agent's files: %w", err)
	}
	p.left = true
	p.Log.Info("The agent's files are off the node")
	return nil
}
