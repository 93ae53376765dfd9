package deviceplugin

import (
	"cmp"
	"slices"
)

// prefer chooses size devices of available, among them all of must, so that
// they are on as few NUMA nodes as possible and, within a node, on as few PFs
// or parents as possible; equal choices are made in the order of IDs. Of several
// that do, VFs are taken from the PF with the fewest left, which keeps the others
// whole, and slots from the parent with the most left: slots share a link, and pods
// have more of it where there are fewer. With spread they are on as many PFs as
// possible instead, and VFs are taken from the one with the most left. It returns
// fewer than size when there are not enough.
func prefer(devices map[string]Device, excludeTopology, spread bool, available, must []string, size int) []string {
	numa := func(id string) int {
		if excludeTopology {
			return -1
		}
		return devices[id].NUMANode
	}
	chosen := slices.Compact(slices.Sorted(slices.Values(must)))
	free := slices.DeleteFunc(slices.Compact(slices.Sorted(slices.Values(available))), func(id string) bool {
		_, known := devices[id]
		return !known || slices.Contains(chosen, id)
	})
	for len(chosen) < size && len(free) > 0 {
		most := spread || devices[free[0]].Slot != ""
		node := best(free, chosen, size-len(chosen), most, numa)
		onNode := slices.DeleteFunc(slices.Clone(free), func(id string) bool { return numa(id) != node })
		// A PF is told by its address, a parent by its name; within one NUMA node only.
		group := func(id string) string { return cmp.Or(devices[id].PFAddress, devices[id].Parent) }
		if spread {
			id := apart(onNode, chosen, group)
			chosen = append(chosen, id)
			free = slices.DeleteFunc(free, func(f string) bool { return f == id })
			continue
		}
		from := best(onNode, chosen, size-len(chosen), most, group)
		for _, id := range onNode {
			if group(id) == from && len(chosen) < size {
				chosen = append(chosen, id)
				free = slices.DeleteFunc(free, func(f string) bool { return f == id })
			}
		}
	}
	return chosen
}

// apart returns the free device of the group (as told by of) that has the fewest of the
// chosen, and of these the most free ones.
func apart(free, chosen []string, of func(string) string) string {
	count := func(ids []string, group string) (n int) {
		for _, id := range ids {
			if of(id) == group {
				n++
			}
		}
		return n
	}
	return slices.MinFunc(free, func(a, b string) int {
		return cmp.Or(cmp.Compare(count(chosen, of(a)), count(chosen, of(b))), cmp.Compare(count(free, of(b)), count(free, of(a))), cmp.Compare(a, b))
	})
}

// best returns the group (as told by of) to take the next devices from: one
// that has some of the chosen already, else the smallest (with most, the
// largest) that has need free ones, else the largest.
func best[K cmp.Ordered](free, chosen []string, need int, most bool, of func(string) K) K {
	count := make(map[K]int)
	for _, id := range free {
		count[of(id)]++
	}
	used := make(map[K]bool)
	for _, id := range chosen {
		used[of(id)] = true
	}
	rank := func(k K) [3]int {
		switch n := count[k]; {
		case used[k]:
			return [3]int{0, -n}
		case n >= need && !most:
			return [3]int{1, n}
		default:
			return [3]int{2, -n}
		}
	}
	groups := make([]K, 0, len(count))
	for k := range count {
		groups = append(groups, k)
	}
	return slices.MinFunc(groups, func(a, b K) int {
		ra, rb := rank(a), rank(b)
		return cmp.Or(slices.Compare(ra[:], rb[:]), cmp.Compare(a, b))
	})
}
