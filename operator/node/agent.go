package node

import (
	"context"
	"fmt"
	"maps"
	"net"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/operator/plan"
)

const (
	resync = 5 * time.Minute
	// Kernel events come in bursts: wait a moment for the rest.
	settle = 5 * time.Millisecond

	firstRetry = time.Second
	lastRetry  = 2 * time.Minute

	// pfsAtOnce bounds the PFs worked on side by side.
	pfsAtOnce = 4
)

// Config is what an Agent needs.
type Config struct {
	Node string // name of the node
	// StateDir is where what must survive a reboot is kept.
	StateDir string
	// UpstreamDir is where the SR-IOV network operator left its files, which say
	// what VFs it made, and where the administrator may have put GUIDs for
	// InfiniBand VFs: /etc/sriov-operator.
	UpstreamDir string
	Kernel      Kernel
	Switch      Switch
	States      States
	Advertiser  Advertiser
	Usage       Usage
	Lifeline    Lifeline
	// Attached tells the settings that a VF was given at its PF for the pod it is
	// attached to; it is not ok while it is attached to none, or not yet.
	Attached func(pciAddress string) (settings host.VFSettings, ok bool)
	// Tell tells the pod that a VF is attached to what becomes of that. Nil for nobody.
	Tell func(pciAddress string, warning bool, reason, message string)
	// Networks tells the networks of a cloud, as nicSelector.netFilter names them, by the
	// MAC addresses of the machine's NICs on them. It is nil elsewhere.
	Networks func(context.Context) (map[string]string, error)
	// Uninstall takes what the rest of the agent has put on the node off it. It fails
	// while that is needed.
	Uninstall func() error
	// Reboot boots the node anew; BootID tells this boot from others.
	Reboot func(context.Context) error
	BootID string
	// ModprobeDir has the settings of the kernel's modules: /etc/modprobe.d.
	ModprobeDir string
	// Conditions are told in every status besides the agent's own: type, status,
	// reason and message. Nil for none.
	Conditions func() []metav1.Condition
	// Others are pools that no policy asks for, of the VFs that there are; nil for none.
	Others func([]Candidate) []Pool
	Log    logr.Logger
}

// Agent configures the NICs of one node. See the package's documentation.
type Agent struct {
	Config
	poke    chan struct{}
	looked  chan struct{} // closed when the kernel was read once
	lookOne sync.Once

	// offers orders what the Advertiser is told: nothing that is withdrawn for
	// work is offered again by somebody who had not seen it yet.
	offers  sync.Mutex
	offered map[string]bool

	lifting       sync.Mutex // held while the way to the API server is at risk
	regain, proof time.Duration

	mu        sync.Mutex
	baselines map[string]baseline
	names     map[string]*hostName
	// unsettable are the settings of VFs that the driver of a PF cannot set.
	unsettable map[string]host.VFAttrs

	records  *records
	networks networks

	// Of the worker alone.
	state  *v1.SriovNetworkNodeState
	told   *v1.SriovNetworkNodeStateStatus   // what the object has or will have; nil when not known
	passed []*v1.SriovNetworkNodeStateStatus // told before it, and not seen since
	// The agent's own conditions, as last told.
	conditions []metav1.Condition
	teller     *teller
	retries    map[string]*retry // by PF
	nics       map[string]*nic   // by PCI address
	unknown    bool              // something changed that is of none of them
	audited    time.Time         // when all of them were last looked at
	around     budget            // for looking at all of them
	path       []int             // links to the API server, as known at pathAt
	noPath     error             // why none is known
	pathAt     time.Time
	// The RDMA subsystem's mode, and when the kernel last refused to change it.
	rdmaMode string
	rdmaBusy time.Time
	parents  parents
	switched <-chan struct{} // tells of bridges; nil while nobody asks for one
	boot     rebooting
	left     bool // the agent's files are off the node
	// Failures in a row to advertise, to read the NICs.
	unsold, unread int
}

type baseline struct {
	mac net.HardwareAddr
	mtu int
}

// hostName is the name a VF has in the host's namespace while no pod has it.
type hostName struct {
	name string
	here bool // it was seen here under that name when last looked
}

// retry is when a PF that failed is tried again.
type retry struct {
	want     v1.Interface
	bridge   *v1.OVSConfigExt
	failures int
	at       time.Time
	report   *report // its troubles are told until then
}

// New returns an agent; Run makes it work.
func New(c Config) *Agent {
	if c.Conditions == nil {
		c.Conditions = func() []metav1.Condition { return nil }
	}
	return &Agent{
		Config: c, teller: &teller{states: c.States, log: c.Log, newest: make(chan told, 1)}, regain: regain, proof: proof, around: budget{share: lightShare}, poke: make(chan struct{}, 1), looked: make(chan struct{}), offered: map[string]bool{},
		unsettable: map[string]host.VFAttrs{}, baselines: map[string]baseline{}, names: map[string]*hostName{}, retries: map[string]*retry{}, nics: map[string]*nic{},
		parents: parents{changed: true, retries: map[v1.MacvlanParent]*parentRetry{}},
	}
}

// HolderChanged tells the agent that a pod took or gave back a VF.
func (a *Agent) HolderChanged() {
	select {
	case a.poke <- struct{}{}:
	default:
	}
}

// Looked is closed when Baseline knows the VFs that there are.
func (a *Agent) Looked() <-chan struct{} { return a.looked }

// Baseline returns what a VF has while no pod holds it: the MAC that the PF
// assigns and the MTU in bytes, 0 when it is not known and shall be left. It is
// not ok for VFs that this project did not make, or that are not there.
func (a *Agent) Baseline(pciAddress string) (mac net.HardwareAddr, mtu int, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	b, ok := a.baselines[pciAddress]
	return b.mac, b.mtu, ok
}

// Run works until ctx ends. It fails when the kernel's events cannot be followed.
func (a *Agent) Run(ctx context.Context) error {
	var aside []string
	var err error
	if a.records, aside, err = openRecords(a.StateDir, a.UpstreamDir); err != nil {
		return err
	}
	if len(aside) > 0 {
		a.Log.Info("Unreadable records of NICs were set aside: these NICs will not go back to what they were", "files", aside)
	}
	events, err := a.Kernel.Watch(ctx)
	if err != nil {
		return fmt.Errorf("follow the kernel: %w", err)
	}
	ctx, stop := context.WithCancel(ctx)
	var telling sync.WaitGroup
	telling.Go(func() { a.teller.run(ctx) })
	defer telling.Wait()
	defer stop()
	states := a.States.Watch(ctx)
	timer := time.NewTimer(0)
	defer timer.Stop()
	due := time.Now()
	by := func(at time.Time) {
		if at.Before(due) {
			due = at
			timer.Reset(time.Until(at))
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case state, ok := <-states:
			if !ok {
				states = nil // ctx ends
				continue
			}
			if a.adopt(state) {
				by(time.Now())
			}
			if p := (&pass{Agent: a}); a.left && state != nil && !p.leaving() {
				return errWantedAgain
			}
		case changes, ok := <-events:
			if !ok {
				if ctx.Err() != nil {
					return nil
				}
				// A socket broke. What was missed meanwhile is seen by looking.
				changes.All = true
				if events, err = a.Kernel.Watch(ctx); err != nil {
					return fmt.Errorf("follow the kernel: %w", err)
				}
			}
			a.mark(changes)
			by(time.Now().Add(settle))
		case _, ok := <-a.switched:
			if !ok {
				a.switched = nil // ctx ends
				continue
			}
			a.bridgesChanged()
			by(time.Now().Add(settle))
		case <-a.poke:
			by(time.Now())
		case <-timer.C:
			next := a.reconcile(ctx)
			due = time.Now().Add(next)
			timer.Reset(next)
		}
	}
}

// adopt takes the object as it now is at the API server. It tells whether there
// is work: our own status coming back is none.
func (a *Agent) adopt(state *v1.SriovNetworkNodeState) bool {
	before := a.state
	a.state = state
	if state == nil {
		if a.told = nil; before != nil {
			a.teller.tell(told{})
		}
		return false
	}
	if before == nil || before.UID != state.UID {
		a.told = state.Status.DeepCopy()
		a.told.Conditions = a.own(a.told.Conditions)
		a.conditions, a.passed = a.told.Conditions, nil
		a.remember(state.Status)
		return true
	}
	if before.Generation != state.Generation || !maps.Equal(before.Annotations, state.Annotations) {
		return true
	}
	seen := state.Status
	seen.Conditions = a.own(seen.Conditions)
	if equality.Semantic.DeepEqual(a.told, &seen) {
		a.passed = nil
		return false
	}
	if i := slices.IndexFunc(a.passed, func(s *v1.SriovNetworkNodeStateStatus) bool { return equality.Semantic.DeepEqual(s, &seen) }); i >= 0 {
		a.passed = a.passed[i+1:]
		return false // told is on its way
	}
	a.told, a.passed = nil, nil // somebody else wrote
	return true
}

// own are the conditions that this agent tells. The others are the operator's:
// applied here, they would be taken from it.
func (a *Agent) own(conditions []metav1.Condition) []metav1.Condition {
	var own []metav1.Condition
	for _, c := range conditions {
		switch c.Type {
		case v1.ConditionReady, v1.ConditionProgressing, v1.ConditionDegraded, v1.ConditionRebootRequired:
			own = append(own, c)
		default:
			if meta.FindStatusCondition(a.Conditions(), c.Type) != nil {
				own = append(own, c)
			}
		}
	}
	return own
}

// remember takes the host names of VFs from the status, which outlives us.
func (a *Agent) remember(s v1.SriovNetworkNodeStateStatus) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, pf := range s.Interfaces {
		for _, vf := range pf.VFs {
			if vf.Name != "" && vf.Assigned == "" && a.names[vf.PciAddress] == nil {
				a.names[vf.PciAddress] = &hostName{name: vf.Name}
			}
		}
	}
}

// reconcile looks, does what is to do, tells, and returns when to look again.
func (a *Agent) reconcile(ctx context.Context) time.Duration {
	p := &pass{Agent: a, looked: map[string]bool{}, fresh: map[string]bool{}}
	p.look(ctx)
	if ctx.Err() != nil {
		return resync
	}
	p.findPath(ctx)
	p.learnNetworks(ctx)
	p.collect()
	p.assign()
	p.system(ctx)
	var work []*report
	for _, r := range p.reports {
		if p.examine(ctx, r) {
			r.working = true
			work = append(work, r)
		}
	}
	maps.DeleteFunc(a.retries, func(address string, _ *retry) bool {
		return !slices.ContainsFunc(p.reports, func(r *report) bool { return r.have.PCIAddress == address })
	})
	a.lookOne.Do(func() { close(a.looked) })
	p.lookAtLinks(ctx, len(work) > 0)
	p.lookAtParents(ctx)
	if len(work) > 0 {
		p.publish(ctx)
		p.do(ctx, work)
		p.readLinks(ctx) // a PF's netdev may be another now
		p.lookAtParents(ctx)
	}
	if ctx.Err() != nil {
		return resync
	}
	bootNow := p.considerReboot()
	p.publish(ctx)
	if p.removeVLANs(ctx) {
		p.publish(ctx)
	}
	if bootNow {
		p.reboot(ctx)
	}
	return p.next()
}

// observe reads one PF anew, with its VFs' settings.
func (a *Agent) observe(ctx context.Context, address string) (host.PF, error) {
	pf, err := a.readPF(ctx, address)
	if err != nil {
		return host.PF{}, err
	}
	return pf, a.Kernel.ReadVFSettings(ctx, &pf)
}

// readPF reads one PF that should be there.
func (a *Agent) readPF(ctx context.Context, address string) (host.PF, error) {
	pf, there, err := a.Kernel.ReadPF(ctx, address)
	if err == nil && !there {
		err = fmt.Errorf("NIC %s is no longer there", address)
	}
	return pf, err
}

// view is the PF as planning sees it, with the pods that hold its VFs now.
func (a *Agent) view(r *report) plan.PF {
	pf := r.have
	r.held, r.holders = map[string]bool{}, map[string]string{}
	v := plan.PF{
		PCIAddress: pf.PCIAddress, Name: pf.Name, Driver: pf.Driver, Ethernet: pf.LinkType == host.Ethernet, MTU: pf.MTU, Up: pf.AdminUp,
		Eswitch: string(pf.Eswitch), TotalVFs: pf.TotalVFs, NumVFs: pf.NumVFs,
	}
	a.records.fill(&v)
	v.Bridge.Is, v.Bridge.Foreign, v.Bridge.Unknown = r.bridge.is, r.bridge.foreign, r.bridge.unknown
	if v.Original != nil && v.Original.MTU > 0 {
		v.Original.MTU = max(v.Original.MTU, a.parentMTU(pf.Name))
	}
	r.takenOver = v.TakenOver
	guids := a.guids(pf)
	for _, vf := range pf.VFs {
		pod, held := a.Usage.Holder(vf.PCIAddress)
		if held {
			r.held[vf.PCIAddress], r.holders[vf.PCIAddress] = true, pod
		}
		guid, noGUID := guids(vf.Index)
		v.VFs = append(v.VFs, plan.VF{
			Index: vf.Index, PCIAddress: vf.PCIAddress, Driver: vf.Driver, Name: vf.Name, HostName: a.hostName(vf, held), MTU: vf.MTU,
			MAC: vf.MAC.String(), AdminMAC: vf.Admin.MAC.String(), StableMAC: a.stableMAC(pf, vf.Index).String(),
			GUID: guidOf(vf), StableGUID: guid, NoGUID: noGUID, Drift: vf.Admin.Text(a.drift(pf, vf)),
			VDPA: vf.VDPA, IOMMU: vf.IOMMUGroup != "", RDMA: vf.RDMADevice != "", Held: held, Holder: pod,
		})
	}
	return v
}

func (a *Agent) stableMAC(pf host.PF, index int) net.HardwareAddr {
	return plan.StableMAC(a.Node, pf.PermMAC, pf.PCIAddress, index)
}

// hostName learns the VF's name from what was seen, and returns the one it
// shall have. A netdev that stays and is renamed was renamed by people or udev,
// which is accepted. One that went away, into a pod, and comes back under
// another name was brought back by the kernel, because the pod's namespace
// ended, and gets its name back.
func (a *Agent) hostName(vf host.VF, held bool) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := a.names[vf.PCIAddress]
	switch {
	case n == nil && (held || vf.Name == "" || a.state == nil):
		return "" // before the status is known, the name may be a pod's still
	case n == nil || !held && n.here && vf.Name != "":
		n = &hostName{name: vf.Name, here: true}
		a.names[vf.PCIAddress] = n
	default:
		n.here = !held && vf.Name == n.name
	}
	return n.name
}

// forget drops what is known of VFs that are destroyed.
func (a *Agent) forget(vfs []host.VF) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, vf := range vfs {
		delete(a.names, vf.PCIAddress)
		delete(a.baselines, vf.PCIAddress)
	}
}

// learn takes down the baselines of the PF's VFs.
func (a *Agent) learn(r *report) {
	var groups plan.VFGroups
	if r.want != nil {
		groups, _ = plan.Groups(*r.want)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, vf := range r.have.VFs {
		group, _ := groups.Of(vf.Index)
		b := baseline{mac: a.stableMAC(r.have, vf.Index), mtu: group.Mtu}
		if r.have.LinkType != host.Ethernet {
			b.mac = nil
		} else if b.mtu == 0 && r.want != nil {
			b.mtu = 1500 // ETH_DATA_LEN: what an Ethernet netdev is born with
		}
		if r.takenOver || r.want != nil && r.want.ExternallyManaged {
			// Its address is its owner's; learn it while no pod has changed it.
			if old, known := a.baselines[vf.PCIAddress]; known && r.held[vf.PCIAddress] {
				b.mac = old.mac
			} else if r.held[vf.PCIAddress] {
				continue
			} else {
				b.mac = vf.Admin.MAC
			}
		}
		a.baselines[vf.PCIAddress] = b
	}
}

// tell hands the status on when it differs from what the object has or will have.
func (a *Agent) tell(s v1.SriovNetworkNodeStateStatus) {
	if a.told != nil && equality.Semantic.DeepEqual(*a.told, s) {
		return
	}
	if a.told != nil {
		a.passed = append(a.passed[max(0, len(a.passed)-15):], a.told)
	}
	a.told, a.conditions = s.DeepCopy(), s.Conditions
	a.teller.tell(told{a.state, s})
}

// backoff is how long to wait after so many failures in a row.
func backoff(failures int) time.Duration {
	return min(firstRetry<<min(failures-1, 10), lastRetry)
}

func sameWant(a, b v1.Interface) bool { return reflect.DeepEqual(a, b) }
