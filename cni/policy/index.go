package policy

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"
)

// ID names an interface of a pod.
type ID struct {
	Namespace, Pod, UID string
	Network             string // namespace/name
	Interface           string
}

func (a ID) compare(b ID) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.UID, b.UID), cmp.Compare(a.Network, b.Network), cmp.Compare(a.Interface, b.Interface))
}

// State is what holds for one interface and direction. It is never changed.
type State struct {
	Verdicts *Verdicts
	Faults   []string // why it may be stricter than was meant
	// OptedOut says that no policy holds, because the network says so.
	OptedOut bool
	// Held says, of the egress of an interface that no policy isolates, that there are
	// policies for its network: it must send from its own addresses only, which they know
	// their peers by.
	Held bool
}

func (s *State) equal(o *State) bool {
	return s == o || s != nil && o != nil && s.OptedOut == o.OptedOut && s.Held == o.Held && slices.Equal(s.Faults, o.Faults) && s.Verdicts.Equal(o.Verdicts)
}

// Change is a new State of an interface and direction.
type Change struct {
	ID        ID
	Direction Direction
	State     *State // nil: the pod was deleted, or has the interface no more
}

// Index keeps the States of the interfaces of its own pods while pods, namespaces,
// networks and policies come, change and go. What is told to it may come in any order: a
// namespace that is not known has no labels, and selectors of namespaces do not match it.
//
// It is not safe for concurrent use; the States that it gives out are.
type Index struct {
	own        func(Pod) bool
	node       []netip.Addr
	pods       map[podKey]*pod
	namespaces map[string]*namespace
	networks   map[string]Enforcement
	policies   map[string]*numbered // by Policy.String
	extents    map[string]int       // how many policies are for a network, by Policy.extents
	scopes     map[string]*scope
	selecting  selectors[*scope] // scopes that select namespaces by labels
	labelled   map[label]map[*pod]struct{}
	owners     map[address][]*pod
	sides      map[ID]*[2]side // by Direction
	profiles   map[string]*profile
	serial     uint64 // of policies
	round      uint64 // of rejoin
	scratch    scratch

	// What Flush has to do.
	reselect map[*pod]struct{}     // own pods that other policies may select now
	stale    map[*profile]struct{} // whose map is to be made anew, or patched
	pending  map[*side]struct{}    // whose State may be another
	unused   map[*profile]struct{}
}

type podKey struct{ namespace, name string }

// numbered is a policy. Another with its name has another number.
type numbered struct {
	*Policy
	number uint64
}

// address is one of a network's addresses.
type address struct {
	network string
	addr    netip.Addr
}

// pod is a pod that has interfaces.
type pod struct {
	Pod
	ns     *namespace
	own    bool
	groups []*group
	ids    []ID // its interfaces, when it is an own pod
}

type namespace struct {
	name     string
	known    bool
	labels   map[string]string
	pods     map[*pod]struct{}
	own      map[*pod]struct{}
	policies selectors[*numbered]
	scopes   map[*scope]struct{}
}

// scope is a set of namespaces: one by its name, those that a selector selects, or all,
// the unknown too. It is there while it has groups.
type scope struct {
	key        string
	name       string          // of the one namespace
	selector   labels.Selector // of namespaces
	namespaces map[*namespace]struct{}
	groups     selectors[*group]
	byKey      map[groupKey]*group
}

func (s *scope) matches(ns *namespace) bool {
	switch {
	case s.name != "":
		return s.name == ns.name
	case s.selector != nil:
		return ns.known && s.selector.Matches(labels.Set(ns.labels))
	}
	return true
}

// group is the pods that a peer's selectors select on one network. It is there while
// profiles use it.
type group struct {
	network  string
	scope    *scope
	selector labels.Selector
	key      groupKey
	members  map[*pod]struct{}
	users    map[*profile]struct{}
	round    uint64 // the last in which it was found to match the pod of the round
}

type groupKey struct{ network, selector string }

// NewIndex makes an Index. own says whether a pod is one whose interfaces have States; it
// is asked again when the pod changes.
func NewIndex(own func(Pod) bool) *Index {
	return &Index{
		own: own, pods: map[podKey]*pod{}, namespaces: map[string]*namespace{}, networks: map[string]Enforcement{}, policies: map[string]*numbered{}, extents: map[string]int{},
		scopes: map[string]*scope{}, owners: map[address][]*pod{}, sides: map[ID]*[2]side{}, profiles: map[string]*profile{},
		reselect: map[*pod]struct{}{}, stale: map[*profile]struct{}{}, pending: map[*side]struct{}{}, unused: map[*profile]struct{}{},
	}
}

// SetNode tells the node's own addresses, which may always talk with the node's pods.
func (x *Index) SetNode(addresses []netip.Addr) {
	sorted := slices.SortedFunc(slices.Values(addresses), netip.Addr.Compare)
	for i := range sorted {
		sorted[i] = sorted[i].Unmap()
	}
	if slices.Equal(x.node, sorted) {
		return
	}
	x.node = sorted
	for _, p := range x.profiles {
		p.anew = true
		x.stale[p] = struct{}{}
	}
}

// SetNetwork tells of a network that was added or changed.
func (x *Index) SetNetwork(n Network) {
	if e, known := x.networks[n.Name]; known && e == n.Enforcement {
		return
	}
	x.networks[n.Name] = n.Enforcement
	x.reselectNetwork(n.Name)
}

// RemoveNetwork tells that a network was deleted.
func (x *Index) RemoveNetwork(name string) {
	delete(x.networks, name)
	x.reselectNetwork(name)
}

// reselectNetwork has policies chosen anew for the own pods on a network, or on all.
func (x *Index) reselectNetwork(name string) {
	for _, ns := range x.namespaces {
		for e := range ns.own {
			if name == "" || e.on(name) {
				x.reselect[e] = struct{}{}
			}
		}
	}
}

func (x *Index) enforcement(network string) Enforcement {
	if e, known := x.networks[network]; known {
		return e
	}
	return EnforceAll
}

// SetPolicy tells of a policy that was added or changed.
func (x *Index) SetPolicy(p *Policy) {
	key := p.String()
	if old := x.policies[key]; old != nil {
		if old.equal(p) {
			return
		}
		x.RemovePolicy(p.Kind, p.Namespace, p.Name)
	}
	x.serial++
	n := &numbered{p, x.serial}
	x.policies[key] = n
	ns := x.namespace(p.Namespace)
	ns.policies.add(p.selector, n)
	x.reselectSelected(ns, p)
	x.extend(p, 1)
}

// RemovePolicy tells that a policy was deleted.
func (x *Index) RemovePolicy(kind, namespace, name string) {
	key := (&Policy{Kind: kind, Namespace: namespace, Name: name}).String()
	n := x.policies[key]
	if n == nil {
		return
	}
	delete(x.policies, key)
	ns := x.namespace(namespace)
	ns.policies.remove(n.selector, n)
	x.reselectSelected(ns, n.Policy)
	x.extend(n.Policy, -1)
	x.tidy(ns)
}

// extend counts a policy for its networks, or no more. The first and the last one matter
// to all own pods there.
func (x *Index) extend(p *Policy, by int) {
	for _, extent := range p.extents() {
		before := x.extents[extent]
		if x.extents[extent] += by; before > 0 && before+by > 0 {
			continue
		}
		if before+by == 0 {
			delete(x.extents, extent)
		}
		if p.on == listed {
			x.reselectNetwork(extent)
		} else {
			x.reselectNetwork("")
		}
	}
}

// policed says whether there are policies for a network.
func (x *Index) policed(network string) bool {
	switch x.enforcement(network) {
	case EnforceNone:
		return false
	case EnforceAll:
		if x.extents[optedInNetworks] > 0 {
			return true
		}
	}
	return x.extents[network]+x.extents[everyNetwork] > 0
}

// Has says whether there is a policy, by the name that Verdicts have for it.
func (x *Index) Has(policy string) bool { return x.policies[policy] != nil }

func (x *Index) reselectSelected(ns *namespace, p *Policy) {
	for e := range ns.own {
		if p.selector.Matches(labels.Set(e.Labels)) {
			x.reselect[e] = struct{}{}
		}
	}
}

// SetNamespace tells of a namespace that was added or changed.
func (x *Index) SetNamespace(n Namespace) {
	ns := x.namespace(n.Name)
	if !ns.known || !maps.Equal(ns.labels, n.Labels) {
		ns.known, ns.labels = true, n.Labels
		x.rescope(ns)
	}
	if p := isolation(n); p != nil {
		x.SetPolicy(p)
	} else {
		x.RemovePolicy("Namespace", n.Name, n.Name)
	}
}

// RemoveNamespace tells that a namespace was deleted.
func (x *Index) RemoveNamespace(name string) {
	ns := x.namespace(name)
	ns.known, ns.labels = false, nil
	x.rescope(ns)
	x.RemovePolicy("Namespace", name, name)
	x.tidy(ns)
}

// namespace finds or makes the entry of a namespace.
func (x *Index) namespace(name string) *namespace {
	ns := x.namespaces[name]
	if ns == nil {
		ns = &namespace{name: name, pods: map[*pod]struct{}{}, own: map[*pod]struct{}{}, scopes: map[*scope]struct{}{}}
		x.namespaces[name] = ns
		x.rescope(ns)
	}
	return ns
}

// tidy removes the entry of a namespace of which nothing is known any more.
func (x *Index) tidy(ns *namespace) {
	if ns.known || len(ns.pods) > 0 || !ns.policies.empty() {
		return
	}
	for s := range ns.scopes {
		delete(s.namespaces, ns)
	}
	delete(x.namespaces, ns.name)
}

// rescope finds the scopes that a namespace is in.
func (x *Index) rescope(ns *namespace) {
	scopes := map[*scope]struct{}{}
	for _, key := range []string{oneNamespace(ns.name), allNamespaces} {
		if s := x.scopes[key]; s != nil {
			scopes[s] = struct{}{}
		}
	}
	for s := range x.selecting.candidates(ns.labels) {
		if s.matches(ns) {
			scopes[s] = struct{}{}
		}
	}
	if maps.Equal(ns.scopes, scopes) {
		return
	}
	for s := range ns.scopes {
		delete(s.namespaces, ns)
	}
	for s := range scopes {
		s.namespaces[ns] = struct{}{}
	}
	ns.scopes = scopes
	for e := range ns.pods {
		x.rejoin(e, e.Interfaces, false)
	}
}

// SetPod tells of a pod that was added or changed. The interfaces of an own pod are those
// that were attached: its network-status is written later, and would have it lose them.
func (x *Index) SetPod(p Pod) {
	if p.HostNetwork || len(p.Interfaces) == 0 { // no policy selects it, and it is nobody's peer
		x.RemovePod(p.Namespace, p.Name)
		return
	}
	key := podKey{p.Namespace, p.Name}
	e := x.pods[key]
	if e != nil && e.UID != p.UID {
		x.RemovePod(p.Namespace, p.Name)
		e = nil
	}
	if e == nil {
		e = &pod{ns: x.namespace(p.Namespace)}
		x.pods[key] = e
		e.ns.pods[e] = struct{}{}
	}
	x.change(e, p)
}

// RemovePod tells that a pod was deleted.
func (x *Index) RemovePod(namespace, name string) {
	key := podKey{namespace, name}
	e := x.pods[key]
	if e == nil {
		return
	}
	x.change(e, Pod{})
	delete(x.pods, key)
	delete(e.ns.pods, e)
	x.tidy(e.ns)
}

// change makes the pod p. A pod without interfaces is as good as none.
func (x *Index) change(e *pod, p Pod) {
	old := e.Pod
	relabelled := !maps.Equal(old.Labels, p.Labels)
	moved := old.Ended != p.Ended || !slices.Equal(old.Ports, p.Ports) || !slices.EqualFunc(old.Interfaces, p.Interfaces, func(a, b Interface) bool {
		return a.Network == b.Network && a.Name == b.Name && slices.Equal(a.IPs, b.IPs)
	})
	own := len(p.Interfaces) > 0 && x.own(p)
	if relabelled {
		for k, v := range old.Labels {
			remove(x.labelled, label{k, v}, e)
		}
		for k, v := range p.Labels {
			insert(&x.labelled, label{k, v}, e)
		}
	}
	if moved {
		for a := range old.addresses() {
			if left := slices.DeleteFunc(x.owners[a], func(o *pod) bool { return o == e }); len(left) > 0 {
				x.owners[a] = left
			} else {
				delete(x.owners, a)
			}
		}
		for a := range p.addresses() {
			x.owners[a] = append(x.owners[a], e)
		}
	}
	e.Pod = p
	if relabelled || moved {
		x.rejoin(e, old.Interfaces, moved)
	}
	if own != e.own || own && (relabelled || moved) {
		x.reselect[e] = struct{}{}
	}
	if e.own = own; own {
		e.ns.own[e] = struct{}{}
	} else {
		delete(e.ns.own, e)
	}
}

func (p *Pod) on(network string) bool {
	return slices.ContainsFunc(p.Interfaces, func(i Interface) bool { return i.Network == network })
}

// addresses yields those at which the pod is a peer.
func (p *Pod) addresses() map[address]struct{} {
	all := make(map[address]struct{}, 2)
	if p.Ended {
		return all
	}
	for _, i := range p.Interfaces {
		for _, ip := range i.IPs {
			all[address{i.Network, ip}] = struct{}{}
		}
	}
	return all
}

// rejoin finds the groups that the pod is in, and whose verdicts that changes. moved says
// that in the groups where it stays it is not what it was, with the interfaces before.
func (x *Index) rejoin(e *pod, before []Interface, moved bool) {
	x.round++
	var now []*group
	if !e.Ended && len(e.Interfaces) > 0 {
		for s := range e.ns.scopes {
			for g := range s.groups.candidates(e.Labels) {
				if g.matches(e) {
					now = append(now, g)
				}
			}
		}
	}
	for _, g := range now {
		g.round = x.round
		_, was := g.members[e]
		g.members[e] = struct{}{}
		if was && moved {
			x.touch(g, before)
		}
		if !was || moved {
			x.touch(g, e.Interfaces)
		}
	}
	for _, g := range e.groups {
		if g.round != x.round {
			delete(g.members, e)
			x.touch(g, before)
		}
	}
	e.groups = now
}

func (g *group) matches(e *pod) bool {
	return !e.Ended && e.on(g.network) && g.selector.Matches(labels.Set(e.Labels))
}

// touch notes that a pod with these interfaces came into the group or went.
func (x *Index) touch(g *group, interfaces []Interface) {
	for p := range g.users {
		x.stale[p] = struct{}{}
		for _, i := range interfaces {
			if i.Network != g.network || p.anew {
				continue
			}
			for _, ip := range i.IPs {
				p.dirty[ip] = struct{}{}
			}
		}
		p.anew = p.anew || len(p.dirty) > patchLimit
	}
}

const allNamespaces = "*"

func oneNamespace(name string) string { return "=" + name }

// group finds or makes the group of a peer, for a profile that uses it.
func (x *Index) group(network, key, name string, namespaces, pods labels.Selector, user *profile) *group {
	s := x.scopes[key]
	if s == nil {
		s = &scope{key: key, name: name, selector: namespaces, namespaces: map[*namespace]struct{}{}, byKey: map[groupKey]*group{}}
		x.scopes[key] = s
		if namespaces != nil {
			x.selecting.add(namespaces, s)
		}
		for _, ns := range x.within(s) {
			if s.matches(ns) {
				s.namespaces[ns] = struct{}{}
				ns.scopes[s] = struct{}{}
			}
		}
	}
	wanted := groupKey{network, pods.String()}
	if g := s.byKey[wanted]; g != nil {
		g.users[user] = struct{}{}
		return g
	}
	g := &group{network: network, scope: s, selector: pods, key: wanted, members: map[*pod]struct{}{}, users: map[*profile]struct{}{user: {}}}
	s.groups.add(pods, g)
	s.byKey[wanted] = g
	x.fill(g)
	return g
}

func (x *Index) within(s *scope) []*namespace {
	if s.name == "" {
		return slices.Collect(maps.Values(x.namespaces))
	}
	if ns := x.namespaces[s.name]; ns != nil {
		return []*namespace{ns}
	}
	return nil
}

// fill finds the members of a new group: among the pods with a label that they need, or
// those of its namespaces, whichever are fewer.
func (x *Index) fill(g *group) {
	admit := func(e *pod) {
		if _, twice := g.members[e]; !twice && g.matches(e) {
			g.members[e] = struct{}{}
			e.groups = append(e.groups, g)
		}
	}
	if keys := needs(g.selector); keys != nil && keys[0].value != anyValue {
		inScope, withLabel := 0, 0
		for ns := range g.scope.namespaces {
			inScope += len(ns.pods)
		}
		for _, l := range keys {
			withLabel += len(x.labelled[l])
		}
		if withLabel < inScope {
			for _, l := range keys {
				for e := range x.labelled[l] {
					if _, in := g.scope.namespaces[e.ns]; in {
						admit(e)
					}
				}
			}
			return
		}
	}
	for ns := range g.scope.namespaces {
		for e := range ns.pods {
			admit(e)
		}
	}
}

// release says that the profile does not use the group any more.
func (x *Index) release(g *group, user *profile) {
	delete(g.users, user)
	if len(g.users) > 0 {
		return
	}
	for e := range g.members {
		e.groups = slices.DeleteFunc(e.groups, func(o *group) bool { return o == g })
	}
	s := g.scope
	s.groups.remove(g.selector, g)
	if delete(s.byKey, g.key); len(s.byKey) > 0 {
		return
	}
	for ns := range s.namespaces {
		delete(ns.scopes, s)
	}
	delete(x.scopes, s.key)
	if s.selector != nil {
		x.selecting.remove(s.selector, s)
	}
}
