package plan

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	sriovv1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
)

func pool(name string, edit func(*sriovv1.SriovNetworkPoolConfigSpec)) sriovv1.SriovNetworkPoolConfig {
	p := sriovv1.SriovNetworkPoolConfig{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if edit != nil {
		edit(&p.Spec)
	}
	return p
}

func TestPools(t *testing.T) {
	where := func(key, value string) func(*sriovv1.SriovNetworkPoolConfigSpec) {
		return func(s *sriovv1.SriovNetworkPoolConfigSpec) {
			s.NodeSelector = &metav1.LabelSelector{MatchLabels: map[string]string{key: value}}
		}
	}
	deleted := pool("deleted", where("rack", "1"))
	deleted.DeletionTimestamp = &metav1.Time{}
	pools := NewPools([]sriovv1.SriovNetworkPoolConfig{
		pool("b", where("rack", "1")), pool("a", where("fast", "yes")), deleted,
		pool("ovs", func(s *sriovv1.SriovNetworkPoolConfigSpec) { s.OvsHardwareOffloadConfig.Name = "worker" }),
		pool("bad", func(s *sriovv1.SriovNetworkPoolConfigSpec) {
			s.NodeSelector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "rack", Operator: "Sometimes"}}}
		}),
	})
	for want, labels := range map[string]map[string]string{
		"": {"rack": "2"}, "b": {"rack": "1"}, "a": {"fast": "yes"}, "a b": {"fast": "yes", "rack": "1"},
	} {
		var names []string
		for _, p := range pools.Of(labels) {
			names = append(names, p.Name)
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("%v is in %q, want %q", labels, got, want)
		}
	}
	if pools.Invalid("bad") == nil || pools.Invalid("a") != nil {
		t.Errorf("bad: %v, a: %v", pools.Invalid("bad"), pools.Invalid("a"))
	}
	if all := NewPools([]sriovv1.SriovNetworkPoolConfig{pool("all", nil)}); len(all.Of(nil)) != 1 {
		t.Error("a pool without a selector has not all nodes")
	}
}

func TestMaxUnavailable(t *testing.T) {
	for _, c := range []struct {
		value *intstr.IntOrString
		n     int
		want  int
	}{
		{nil, 7, 7},
		{new(intstr.FromInt32(2)), 7, 2},
		{new(intstr.FromInt32(0)), 7, 0},
		{new(intstr.FromString("30%")), 10, 3},
		{new(intstr.FromString("39%")), 10, 3},
		{new(intstr.FromString("30%")), 1, 1}, // never rounded to none
		{new(intstr.FromString("100%")), 3, 3},
		{new(intstr.FromString("10%")), 0, 0},
	} {
		p := pool("p", func(s *sriovv1.SriovNetworkPoolConfigSpec) { s.MaxUnavailable = c.value })
		if got, err := MaxUnavailable(&p, c.n); err != nil || got != c.want {
			t.Errorf("%v of %d nodes: %d %v, want %d", c.value, c.n, got, err, c.want)
		}
	}
	if got, err := MaxUnavailable(nil, 9); got != 1 || err != nil {
		t.Errorf("in no pool: %d %v", got, err)
	}
	for _, bad := range []intstr.IntOrString{intstr.FromInt32(-1), intstr.FromString("some")} {
		p := pool("p", func(s *sriovv1.SriovNetworkPoolConfigSpec) { s.MaxUnavailable = &bad })
		if got, err := MaxUnavailable(&p, 9); got != 0 || err == nil {
			t.Errorf("%v: %d %v", bad, got, err)
		}
	}
}

func TestRdmaMode(t *testing.T) {
	p := pool("p", func(s *sriovv1.SriovNetworkPoolConfigSpec) { s.RdmaMode = sriovv1.RdmaModeExclusive })
	one := []*sriovv1.SriovNetworkPoolConfig{&p}
	if RdmaMode(nil, "shared") != "" || RdmaMode(one, "shared") != "exclusive" || RdmaMode(append(one, &p), "shared") != "shared" {
		t.Error("the RDMA mode is not the pool's, or changes while two pools claim a node")
	}
}

// However nodes come, want and are done, never are more disturbed than a pool allows, and
// nobody waits while there is room.
func TestGrantKeepsTheLimit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limits := map[string]int{"": 1, "a": rapid.IntRange(0, 4).Draw(t, "a"), "b": rapid.IntRange(0, 4).Draw(t, "b")}
		nodes := make([]Contender, rapid.IntRange(0, 12).Draw(t, "nodes"))
		for i := range nodes {
			nodes[i] = Contender{Node: fmt.Sprintf("n%02d", i), Pool: rapid.SampledFrom([]string{"", "a", "b", "gone"}).Draw(t, "pool")}
		}
		for range rapid.IntRange(1, 10).Draw(t, "rounds") {
			for i := range nodes {
				nodes[i].Waits = rapid.Bool().Draw(t, "waits")
				nodes[i].Disturbed = nodes[i].Disturbed && rapid.Bool().Draw(t, "goes on")
			}
			granted := Grant(nodes, limits)
			shuffled := rapid.Permutation(nodes).Draw(t, "order")
			if again := Grant(shuffled, limits); !slices.Equal(granted, again) {
				t.Fatalf("the order of nodes matters: %v, %v", granted, again)
			}
			disturbed, waiting := map[string]int{}, map[string]int{}
			for i := range nodes {
				if slices.Contains(granted, nodes[i].Node) {
					if nodes[i].Disturbed || !nodes[i].Waits {
						t.Fatalf("%+v was granted", nodes[i])
					}
					nodes[i].Disturbed = true
				}
				if nodes[i].Disturbed {
					disturbed[nodes[i].Pool]++
				} else if nodes[i].Waits {
					waiting[nodes[i].Pool]++
				}
			}
			for pool, n := range disturbed {
				if n > limits[pool] {
					t.Fatalf("%d nodes of pool %q are disturbed, %d may be", n, pool, limits[pool])
				}
			}
			for pool, n := range waiting {
				if n > 0 && disturbed[pool] < limits[pool] {
					t.Fatalf("%d nodes of pool %q wait although there is room", n, pool)
				}
			}
		}
	})
}

// A limit that was lowered meanwhile lets nobody in until enough are done.
func TestGrantAfterALoweredLimit(t *testing.T) {
	nodes := []Contender{{Node: "a", Disturbed: true}, {Node: "b", Disturbed: true}, {Node: "c", Waits: true}}
	if got := Grant(nodes, map[string]int{"": 1}); len(got) > 0 {
		t.Errorf("granted %v", got)
	}
}
