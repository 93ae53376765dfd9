package ipam

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	"github.com/sluice-network/sluice/cni/attach"
)

// errLost is an answer that did not come: the request may have been done or not.
var errLost = errors.New("the answer was lost")

// apiServer is the API server's part in claims, as a map.
type apiServer struct {
	objects map[string]v1alpha1.IPBlock
	uid     int
	writes  int
	// fail is asked before each request, and again after a write was done.
	fail func(done bool) error
}

func newAPIServer() *apiServer {
	return &apiServer{objects: map[string]v1alpha1.IPBlock{}, fail: func(bool) error { return nil }}
}

var blockResource = schema.GroupResource{Group: "sluice.dev", Resource: "ipblocks"}

func (s *apiServer) list(is func(v1alpha1.IPBlock) bool) ([]v1alpha1.IPBlock, error) {
	var out []v1alpha1.IPBlock
	for _, name := range slices.Sorted(maps.Keys(s.objects)) {
		if o := s.objects[name]; is(o) {
			out = append(out, *o.DeepCopy())
		}
	}
	return out, s.fail(false)
}

func (s *apiServer) Of(_ context.Context, pool string) ([]v1alpha1.IPBlock, error) {
	return s.list(func(b v1alpha1.IPBlock) bool { return b.Spec.Pool == pool })
}

func (s *apiServer) Own(_ context.Context, node string) ([]v1alpha1.IPBlock, error) {
	return s.list(func(b v1alpha1.IPBlock) bool { return b.Spec.Node == node })
}

func (s *apiServer) Get(_ context.Context, name string) (*v1alpha1.IPBlock, error) {
	if err := s.fail(false); err != nil {
		return nil, err
	}
	o, ok := s.objects[name]
	if !ok {
		return nil, apierrors.NewNotFound(blockResource, name)
	}
	return o.DeepCopy(), nil
}

func (s *apiServer) write(do func() error) error {
	if err := s.fail(false); err != nil {
		return err
	}
	s.writes++
	if err := do(); err != nil {
		return err
	}
	return s.fail(true)
}

func (s *apiServer) Create(_ context.Context, b *v1alpha1.IPBlock) error {
	return s.write(func() error {
		if _, is := s.objects[b.Name]; is {
			return apierrors.NewAlreadyExists(blockResource, b.Name)
		}
		s.uid++
		b.UID, b.ResourceVersion = types.UID(fmt.Sprint(s.uid)), "1"
		s.objects[b.Name] = *b.DeepCopy()
		return nil
	})
}

func (s *apiServer) Update(_ context.Context, b *v1alpha1.IPBlock) error {
	return s.write(func() error {
		if s.objects[b.Name].ResourceVersion != b.ResourceVersion || s.objects[b.Name].UID != b.UID {
			return apierrors.NewConflict(blockResource, b.Name, nil)
		}
		b.ResourceVersion += "1"
		s.objects[b.Name] = *b.DeepCopy()
		return nil
	})
}

func (s *apiServer) Delete(_ context.Context, name, uid string) error {
	return s.write(func() error {
		if string(s.objects[name].UID) == uid {
			delete(s.objects, name)
		}
		return nil
	})
}

func (s *apiServer) Report(_ context.Context, name string, status v1alpha1.IPBlockStatus) error {
	return s.write(func() error { return nil })
}

// machine is a node of the model: what outlives its agent.
type machine struct {
	name, dir string
	boots     int
	booted    time.Duration // by the true time
	records   map[Key]attach.Lease
	links     map[Key][]netip.Addr // interfaces that exist
	agent     *Node
}

func (m *machine) leases() []attach.Lease { return slices.Collect(maps.Values(m.records)) }

// TestNoAddressTwice makes up histories of a cluster: pods come and go, agents die
// between any two steps and before any answer, nodes are rebooted, reinstalled without
// their journal, and lost; answers of the API server are lost; reservations and excludes
// change. No two interfaces ever have one address, none gets one that has not rested,
// and no namespace has more than its quota.
func TestNoAddressTwice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "ipam")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		ctx := context.Background()
		const rest, quota = time.Minute, 5
		api := newAPIServer()
		now := time.Hour // the true time
		spec := &v1alpha1.IPPoolSpec{
			IPv4:   &v1alpha1.IPRange{CIDR: "10.1.0.0/27", Gateway: "10.1.0.1", BlockSize: 1 << rapid.IntRange(0, 3).Draw(t, "block")},
			Quotas: []v1alpha1.IPQuota{{Namespace: "few", Interfaces: quota}},
		}
		if rapid.Bool().Draw(t, "v6") {
			spec.IPv6 = &v1alpha1.IPRange{CIDR: "fd00::/122", BlockSize: 4}
		}
		var machines []*machine
		start := func(m *machine) {
			m.agent = New(Options{
				Name: m.name, Dir: m.dir, Claims: api, Boot: fmt.Sprint(m.boots), Log: logr.Discard(),
				Now: func() (time.Duration, error) { return now - m.booted, nil },
			})
			if err := m.agent.Load(m.leases); err != nil {
				t.Fatal(err)
			}
			m.agent.SetPool("blue", spec.DeepCopy())
		}
		for i := range 3 {
			m := &machine{name: fmt.Sprintf("n%d", i), dir: filepath.Join(dir, fmt.Sprint(i)), records: map[Key]attach.Lease{}, links: map[Key][]netip.Addr{}}
			machines = append(machines, m)
			start(m)
		}
		type death struct{}
		lastUsed := map[netip.Addr]time.Duration{}
		owner := map[netip.Addr]string{}  // pod of a link
		reserved := map[netip.Addr]bool{} // its last link had it as its own
		unlink := func(m *machine, key Key) {
			for _, a := range m.links[key] {
				lastUsed[a] = now
				delete(owner, a)
			}
			delete(m.links, key)
		}
		// undo is what the agent does to half an attachment: first the link goes.
		undo := func(m *machine, key Key) {
			unlink(m, key)
			m.agent.Del(key)
			delete(m.records, key)
		}
		perform := func(m *machine, do func()) {
			steps, lost, dies := -1, -1, -1
			if rapid.IntRange(0, 2).Draw(t, "loses") == 0 {
				lost = rapid.IntRange(0, 8).Draw(t, "lost at")
			}
			if rapid.IntRange(0, 3).Draw(t, "dies") == 0 {
				dies = rapid.IntRange(0, 8).Draw(t, "dies at")
			}
			api.fail = func(bool) error {
				switch steps++; steps {
				case dies:
					panic(death{})
				case lost:
					return errLost
				}
				return nil
			}
			died := func() (died bool) {
				defer func() {
					if p := recover(); p != nil {
						if _, ok := p.(death); !ok {
							panic(p)
						}
						died = true
					}
				}()
				do()
				return false
			}()
			api.fail = func(bool) error { return nil }
			if died {
				start(m)
			}
		}
		someMachine := func(t *rapid.T) *machine { return rapid.SampledFrom(machines).Draw(t, "node") }
		someKey := func(t *rapid.T, m *machine) Key {
			keys := slices.SortedFunc(maps.Keys(m.records), func(a, b Key) int { return cmpString(a.ContainerID, b.ContainerID) })
			if len(keys) == 0 {
				t.Skip()
			}
			return rapid.SampledFrom(keys).Draw(t, "attachment")
		}
		pods := 0
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				m := someMachine(t)
				pods++
				key := Key{Network: "net", ContainerID: fmt.Sprintf("%04d", pods), IfName: "net1"}
				ask := Ask{Key: key, Pool: "blue", Namespace: rapid.SampledFrom([]string{"few", "many"}).Draw(t, "namespace"), Pod: rapid.SampledFrom([]string{"web-0", "x"}).Draw(t, "pod")}
				if rapid.IntRange(0, 4).Draw(t, "asks") == 0 {
					ask.IPs = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, 0, byte(rapid.IntRange(0, 31).Draw(t, "ip"))}), 0)}
				}
				perform(m, func() {
					m.records[key] = attach.Lease{Key: key, Pool: "blue", Namespace: ask.Namespace}
					// Only one pod of a name is on the nodes at a time.
					for _, o := range owner {
						if ask.Pod == "web-0" && o == ask.Namespace+"/web-0" {
							ask.Pod = "x"
						}
					}
					g, err := m.agent.Add(ctx, ask)
					if err != nil {
						undo(m, key)
						return
					}
					// From here on the link is there.
					m.links[key] = g.Addresses
					pod := ask.Namespace + "/" + ask.Pod
					for _, a := range g.Addresses {
						if owner[a] != "" {
							t.Fatalf("%s is of %s and now of %s on %s", a, owner[a], pod, m.name)
						}
						if used, was := lastUsed[a]; was && now-used < rest && !reserved[a] {
							t.Fatalf("%s rested for %s, and is now of %s on %s", a, now-used, pod, m.name)
						}
						_, reserved[a] = m.agent.stores["blue"].pool.Reservations[a]
						owner[a] = pod
					}
					if api.fail(true) != nil { // the death of the agent, too
						undo(m, key)
						return
					}
					m.records[key] = attach.Lease{Key: key, Pool: "blue", Namespace: ask.Namespace, Addresses: g.Addresses, Done: true}
				})
			},
			"del": func(t *rapid.T) {
				m := someMachine(t)
				key := someKey(t, m)
				perform(m, func() {
					r := m.records[key]
					m.records[key] = attach.Lease{Key: key, Pool: r.Pool, Namespace: r.Namespace}
					_ = api.fail(true)
					unlink(m, key)
					_ = api.fail(true)
					undo(m, key)
				})
			},
			"recover": func(t *rapid.T) {
				m := someMachine(t)
				for key, r := range maps.Clone(m.records) {
					if !r.Done {
						undo(m, key)
					}
				}
			},
			"tend": func(t *rapid.T) {
				m := someMachine(t)
				perform(m, func() { m.agent.Tend(ctx) })
			},
			"wait": func(t *rapid.T) {
				now += time.Duration(rapid.IntRange(1, 400).Draw(t, "seconds")) * time.Second
			},
			"upgrade": func(t *rapid.T) {
				m := someMachine(t)
				if err := m.agent.Close(); err != nil {
					t.Fatal(err)
				}
				start(m)
			},
			"reboot": func(t *rapid.T) {
				m := someMachine(t)
				for key := range m.links {
					unlink(m, key)
				}
				if rapid.Bool().Draw(t, "reinstalled") {
					clear(m.records)
					if err := os.RemoveAll(m.dir); err != nil {
						t.Fatal(err)
					}
				}
				m.boots, m.booted = m.boots+1, now
				start(m)
			},
			"lose": func(t *rapid.T) {
				// The node is gone for good, and the operator frees its blocks after the rest.
				i := rapid.IntRange(0, len(machines)-1).Draw(t, "node")
				m := machines[i]
				for key := range m.links {
					unlink(m, key)
				}
				now += rest
				for name, o := range api.objects {
					if o.Spec.Node == m.name {
						delete(api.objects, name)
					}
				}
				pods++
				machines[i] = &machine{name: fmt.Sprintf("m%d", pods), dir: filepath.Join(dir, fmt.Sprint("lost", pods)), booted: now, records: map[Key]attach.Lease{}, links: map[Key][]netip.Addr{}}
				start(machines[i])
			},
			"reserve": func(t *rapid.T) {
				next := spec.DeepCopy()
				next.Reservations = nil
				if rapid.Bool().Draw(t, "reserved") {
					next.Reservations = []v1alpha1.IPReservation{{Address: fmt.Sprintf("10.1.0.%d", rapid.SampledFrom([]int{5, 9}).Draw(t, "address")), Namespace: "many", Pod: "web-0"}}
				}
				spec = next
				// Not all nodes hear of it at once.
				for _, m := range machines {
					if rapid.Bool().Draw(t, "hears") {
						m.agent.SetPool("blue", spec.DeepCopy())
					}
				}
			},
			"hear": func(t *rapid.T) { someMachine(t).agent.SetPool("blue", spec.DeepCopy()) },
			"": func(t *rapid.T) {
				few := 0
				for _, o := range owner {
					if o[:4] == "few/" {
						few++
					}
				}
				if few > quota*2 || spec.IPv6 == nil && few > quota {
					t.Fatalf("namespace few has %d addresses", few)
				}
			},
		})
		// In the end all comes back.
		for _, m := range machines {
			m.agent.SetPool("blue", spec.DeepCopy())
			for key := range maps.Clone(m.records) {
				undo(m, key)
			}
		}
		for range 5 {
			now += 11 * time.Minute
			for _, m := range machines {
				m.agent.Tend(ctx)
			}
		}
		if len(api.objects) > 0 {
			t.Fatalf("claims are left: %v", slices.Sorted(maps.Keys(api.objects)))
		}
	})
}

func cmpString(a, b string) int {
	if a < b {
		return -1
	}
	return 1
}
