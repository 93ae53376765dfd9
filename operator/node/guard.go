package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/operator/plan"
)

const (
	// pathAge is how old what is known of the way to the API server may be: routes
	// change without an event that the agent follows.
	pathAge = time.Second
	// regain is how long a change may interrupt the way to the API server: some
	// drivers reset the link, which comes back after its autonegotiation.
	regain = 30 * time.Second
	// proof is how long the way must have held: a link that is reset goes down only
	// a moment after the driver has answered.
	proof = time.Second
)

// Lifeline is the node's way to the API server; APIServer is the real one.
type Lifeline interface {
	// Addresses are those of the API server, and of the node, whose links are the way.
	Addresses(ctx context.Context) ([]net.IP, error)
	// Reach tells whether the API server answers on a new connection.
	Reach(ctx context.Context) error
}

// risk is what an operation may do to the way to the API server.
type risk int

const (
	harmless risk = iota
	risky         // it may interrupt it, and goes with a check that it did not
	cutting       // it takes the link away, at least while it lasts
)

// carriers are the functions of one PF that carry the way to the API server.
type carriers struct {
	pf  bool
	vfs []int // indexes
}

func carriersOf(pf host.PF, path []int) carriers {
	c := carriers{pf: pf.IfIndex != 0 && slices.Contains(path, pf.IfIndex)}
	for _, vf := range pf.VFs {
		if vf.IfIndex != 0 && slices.Contains(path, vf.IfIndex) {
			c.vfs = append(c.vfs, vf.Index)
		}
	}
	return c
}

// risk of the operation for the way to the API server. New VFs beside a PF that
// carries it are what nodes with one NIC live with, and so is another MTU; a change
// of the eswitch mode makes the PF's netdev anew on most drivers, and a VF that
// changes is off.
func (c carriers) risk(op plan.Operation) risk {
	switch any := c.pf || len(c.vfs) > 0; {
	case op.VF >= 0:
		if slices.Contains(c.vfs, op.VF) {
			return cutting
		}
	// A port of a bridge has no addresses of its own any more.
	case op.Kind == plan.SetEswitchMode && any, op.Kind == plan.SetBridge && c.pf, op.Kind == plan.SetNumVFs && len(c.vfs) > 0:
		return cutting
	case (op.Kind == plan.SetNumVFs || op.Kind == plan.SetPFMTU) && any:
		return risky
	}
	return harmless
}

// findPath finds out which links are the way to the API server. While it cannot
// be found what was last known holds; while nothing was, NICs are not changed.
func (p *pass) findPath(ctx context.Context) {
	if time.Since(p.pathAt) < pathAge {
		return
	}
	p.pathAt = time.Now()
	addresses, err := p.Lifeline.Addresses(ctx)
	var path []int
	if err == nil {
		path, err = p.Kernel.PathLinks(ctx, addresses)
	}
	if err != nil {
		p.Log.Info("The links to the API server cannot all be found", "why", err)
		path = append(path, p.path...)
	}
	if p.path, p.noPath = path, nil; len(path) == 0 && err != nil {
		p.noPath = err
		p.within(pathAge)
	}
}

// forced tells whether somebody takes it upon himself that the node is cut off.
func (p *pass) forced() bool {
	return p.state != nil && p.state.Annotations[v1.AnnotationForceManagementNIC] == "true"
}

// guard takes out of the plan what would cut the way to the API server, and says
// so. A PF that must not be changed itself is left altogether.
func (p *pass) guard(r *report, ops []plan.Operation) []plan.Operation {
	if len(ops) == 0 {
		return nil
	}
	bridges := slices.ContainsFunc(ops, func(op plan.Operation) bool { return op.Kind == plan.SetBridge })
	// What a bridge did is no reason to leave the PF as it is once it shall have none.
	if was, ok := p.records.get(r.have.PCIAddress); ok && was.Lost != nil && sameWant(*was.Lost, *r.want) &&
		(bridges || !strings.HasPrefix(was.LostBy, string(plan.SetBridge))) {
		r.trouble = trouble{ReasonLost, was.lost()}
		return nil
	}
	c := carriersOf(r.have, p.path)
	if p.forced() {
		return ops
	}
	if p.noPath != nil {
		r.trouble = trouble{ReasonUnverified, fmt.Sprintf("%s waits: which links carry the node's way to the API server cannot be found out now, so it could cut it: %v", ops[0], p.noPath)}
		return nil
	}
	const mend = "give the API server another way, or annotate this SriovNetworkNodeState with " + v1.AnnotationForceManagementNIC + "=true"
	for _, op := range ops {
		mode := r.otherMode()
		if op.VF < 0 && c.risk(op) == cutting || c.risk(plan.Operation{Kind: plan.SetEswitchMode, VF: -1}) == cutting && mode != "" {
			what := op.String()
			if op.Kind != plan.SetEswitchMode && mode != "" {
				what = "the change to eSwitchMode " + mode
			}
			r.trouble = trouble{ReasonManagement, fmt.Sprintf("%s is refused: this NIC carries the node's way to the API server and would lose its link; %s", what, mend)}
			return nil
		}
	}
	return slices.DeleteFunc(ops, func(op plan.Operation) bool {
		if c.risk(op) != cutting {
			return false
		}
		r.vfTrouble[op.VF] = trouble{ReasonManagement, fmt.Sprintf("%s is refused: this VF carries the node's way to the API server; %s", op, mend)}
		return true
	})
}

// otherMode is the mode that the PF's eswitch is not in and shall be brought to, in
// whatever order that comes with the rest; empty when there is none, or no spec of the PF.
func (r *report) otherMode() string {
	if r.want == nil {
		return ""
	}
	mode := plan.EswitchMode(*r.want)
	if r.want.ExternallyManaged || r.have.Eswitch == "" || mode == string(r.have.Eswitch) {
		return ""
	}
	return mode
}

func (one pfRecord) lost() string {
	return fmt.Sprintf("after %s the API server could not be reached any more, so it was taken back; it is not tried again until the spec of the PF changes: look for what the change does to the link", one.LostBy)
}

// lifted does an operation that may cut the way to the API server, checks that it
// did not, and takes it back if it did. One at a time: two NICs of one bond must not
// be down together, and the one that did it must be known.
func (p *pass) lifted(ctx context.Context, r *report, op plan.Operation, do func() error) error {
	if carriersOf(r.have, p.path).risk(op) == harmless {
		return do()
	}
	p.lifting.Lock()
	defer p.lifting.Unlock()
	if err := p.Lifeline.Reach(ctx); err != nil {
		return &guardError{trouble{ReasonUnverified, fmt.Sprintf("%s waits: this NIC carries the node's way to the API server, which cannot be reached now, so it could not be checked that the change leaves the way open: %v", op, err)}}
	}
	if err := do(); err != nil {
		return err
	}
	cut := p.held(ctx)
	if cut == nil || ctx.Err() != nil {
		return nil
	}
	p.Log.Error(cut, "The API server cannot be reached after a change; it is taken back", "operation", op.String())
	was := pfRecord{LostBy: op.String()}
	t := trouble{ReasonLost, fmt.Sprintf("%s: %v", was.lost(), cut)}
	err := p.records.change(r.have.PCIAddress, func(one *pfRecord) { one.Lost, one.LostBy = r.want.DeepCopy(), was.LostBy })
	if op.Kind == plan.SetBridge {
		err = errors.Join(err, p.Switch.DetachUplink(ctx, op.Value))
	}
	if err = errors.Join(err, p.takeBack(ctx, r.have)); err != nil {
		t.message += fmt.Sprintf("; it could not be taken back whole: %v", err)
	}
	return &guardError{t}
}

// guardError is the trouble of a PF that carries the way to the API server.
type guardError struct{ trouble }

func (e *guardError) Error() string { return e.message }

// held waits until the API server has been reachable for a moment, and returns why
// it is not when that takes too long.
func (p *pass) held(ctx context.Context) error {
	var since time.Time
	for start := time.Now(); ; {
		err := p.Lifeline.Reach(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && time.Since(start) > p.regain:
			return err
		case err != nil:
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
		case time.Since(since) >= p.proof:
			return nil
		}
		select {
		case <-ctx.Done():
		case <-time.After(p.proof / 2):
		}
	}
}

// takeBack makes the PF what it was.
func (p *pass) takeBack(ctx context.Context, was host.PF) error {
	is, err := p.readPF(ctx, was.PCIAddress)
	if err != nil {
		return err
	}
	var errs []error
	if is.Eswitch != was.Eswitch {
		errs = append(errs, p.Kernel.SetEswitchMode(ctx, was.PCIAddress, was.Eswitch))
	}
	if is.NumVFs != was.NumVFs {
		errs = append(errs, p.Kernel.SetNumVFs(ctx, was.PCIAddress, 0))
		if was.NumVFs > 0 {
			errs = append(errs, p.Kernel.RestoreVFs(ctx, was.PCIAddress, was.NumVFs, !was.AutoprobeOff))
		}
	}
	if is.MTU != was.MTU && is.IfIndex != 0 {
		errs = append(errs, p.Kernel.SetMTU(ctx, is.Link(), was.MTU))
	}
	if was.AdminUp && is.IfIndex != 0 {
		errs = append(errs, p.Kernel.SetLinkUp(ctx, is.Link()))
	}
	return errors.Join(errs...)
}
