package node

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/durable"
	"github.com/sluice-network/sluice/operator/plan"
)

// bootFile tells, in the state directory, what the node was booted anew for.
const bootFile = "reboot.json"

// modprobeFile has, in the folder of modprobe's settings, what must hold when the
// kernel's modules are loaded.
const modprobeFile = "sluice.conf"

// boot is what the node was booted anew for, and when: under which boot ID it was
// still to come.
type boot struct {
	Goal   string `json:"goal"`
	BootID string `json:"bootID"`
}

// rebooting is what the agent knows of reboots from one pass to the next.
type rebooting struct {
	failures int
	err      error // why the last one did not come
	at       time.Time
}

// needing are the operations that wait for a reboot.
func needing(reports []*report) []plan.Operation {
	var ops []plan.Operation
	for _, r := range reports {
		for _, b := range r.blocked {
			if b.Operation.Cost == plan.Reboot {
				ops = append(ops, b.Operation)
			}
		}
	}
	return ops
}

// goalOf names what the operations lead to.
func goalOf(ops []plan.Operation) string {
	var all []string
	for _, op := range ops {
		all = append(all, op.String())
	}
	sum := sha256.Sum256([]byte(strings.Join(all, "\n")))
	return hex.EncodeToString(sum[:8])
}

// bootVerdict is what to do about operations that wait for a reboot.
type bootVerdict int

const (
	bootWait     bootVerdict = iota // nobody has allowed it
	bootNow                         // it is allowed
	bootNoHelp                      // there was one for the same goal
	bootFinished                    // nothing waits any more for the one there was
)

// judgeBoot decides on a reboot, never a second one for the same goal.
func judgeBoot(ops []plan.Operation, last boot, bootID string, allowed bool) bootVerdict {
	switch goal := goalOf(ops); {
	case len(ops) == 0 && last != (boot{}):
		return bootFinished
	case len(ops) > 0 && last.Goal == goal && last.BootID != bootID:
		return bootNoHelp
	case len(ops) > 0 && allowed:
		return bootNow
	}
	return bootWait
}

// considerReboot tells whether the node is to be booted anew now, and says what is
// wrong with that.
func (p *pass) considerReboot() (now bool) {
	if p.state == nil {
		return false
	}
	complain := func(reason, message string) {
		p.reports = append(p.reports, &report{trouble: trouble{reason, message}})
	}
	ops := needing(p.reports)
	path := filepath.Join(p.StateDir, bootFile)
	var last boot
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &last)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		// Not knowing, it could be the second.
		complain(ReasonNoState, fmt.Sprintf("learn what the node was last rebooted for: %v; remove the file to allow another reboot", err))
		return false
	}
	allowed := p.state.Annotations[v1.AnnotationRebootAllowed] == strconv.FormatInt(p.state.Generation, 10)
	switch judgeBoot(ops, last, p.BootID, allowed) {
	case bootFinished:
		if p.unreadable != nil || slices.ContainsFunc(p.reports, func(r *report) bool { return r.failed() }) {
			return false // it may yet turn out to be needed
		}
		p.boot = rebooting{}
		if err := durable.Remove(path); err != nil {
			complain(ReasonNoState, fmt.Sprintf("forget what the node was rebooted for: %v", err))
		}
	case bootNoHelp:
		complain(ReasonNoHelp, fmt.Sprintf("the node was rebooted for %s, and that is still not so; it is not rebooted for it again: see what the kernel was booted with", ops[0]))
	case bootNow:
		if p.boot.err != nil {
			complain(ReasonNotBooted, p.boot.err.Error())
		}
		if wait := time.Until(p.boot.at); wait > 0 {
			p.within(wait)
			return false
		}
		return true
	case bootWait:
	}
	return false
}

// reboot makes the kernel's next start do what waits for it, and asks for that.
func (p *pass) reboot(ctx context.Context) {
	p.boot.failures++
	p.boot.at = time.Now().Add(backoff(p.boot.failures))
	p.boot.err = func() error {
		ops := needing(p.reports)
		for _, op := range ops {
			if err := p.prepareBoot(op); err != nil {
				return err
			}
		}
		b, err := json.Marshal(boot{goalOf(ops), p.BootID})
		if err == nil {
			err = durable.WriteFile(filepath.Join(p.StateDir, bootFile), b)
		}
		if err != nil {
			return fmt.Errorf("record what the node is rebooted for: %w", err)
		}
		p.Log.Info("The node is rebooted, as its pool allows", "for", ops[0].String())
		return p.Reboot(ctx)
	}()
	p.within(time.Until(p.boot.at))
}

// prepareBoot makes the operation's goal true at the next boot.
func (p *pass) prepareBoot(op plan.Operation) error {
	if op.Kind != plan.SetRDMAMode {
		return fmt.Errorf("%s is not known to come true by a reboot", op)
	}
	text := fmt.Sprintf("# Written by Sluice: rdmaMode %s of this node's SriovNetworkPoolConfig.\noptions ib_core netns_mode=%d\n", op.Value, plan.NetnsMode(op.Value))
	if err := durable.WriteFile(filepath.Join(p.ModprobeDir, modprobeFile), []byte(text)); err != nil {
		return fmt.Errorf("prepare the reboot for %s: %w", op, err)
	}
	return nil
}
