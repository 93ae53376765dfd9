package policy

import (
	"iter"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
)

// label is a key with its value, or with anyValue.
type label struct{ key, value string }

const anyValue = "\x00" // no label has this value

// needs is labels of one key, of which an object has one if the selector matches it; nil
// when the selector asks for none. They are the fewest that it tells.
func needs(s labels.Selector) []label {
	requirements, _ := s.Requirements()
	var best []label
	for i := range requirements {
		r := &requirements[i]
		var some []label
		switch r.Operator() {
		case selection.Equals, selection.DoubleEquals, selection.In:
			for _, v := range r.ValuesUnsorted() {
				some = append(some, label{r.Key(), v})
			}
		case selection.Exists:
			some = []label{{r.Key(), anyValue}}
		}
		exact := func(l []label) bool { return l[0].value != anyValue }
		if some != nil && (best == nil || exact(some) && (!exact(best) || len(some) < len(best))) {
			best = some
		}
	}
	return best
}

// selectors finds, among many things that have a selector, those that may match an
// object, by the labels that they need.
type selectors[T comparable] struct {
	byLabel map[label]map[T]struct{}
	rest    map[T]struct{} // of which there is no label to know them by
}

func (x *selectors[T]) add(s labels.Selector, thing T) {
	keys := needs(s)
	for _, l := range keys {
		insert(&x.byLabel, l, thing)
	}
	if keys == nil {
		if x.rest == nil {
			x.rest = map[T]struct{}{}
		}
		x.rest[thing] = struct{}{}
	}
}

func (x *selectors[T]) remove(s labels.Selector, thing T) {
	for _, l := range needs(s) {
		remove(x.byLabel, l, thing)
	}
	delete(x.rest, thing)
}

func (x *selectors[T]) empty() bool { return len(x.byLabel)+len(x.rest) == 0 }

// candidates yields each once. Whether it matches must still be asked.
func (x *selectors[T]) candidates(object map[string]string) iter.Seq[T] {
	return func(yield func(T) bool) {
		all := func(some map[T]struct{}) bool {
			for thing := range some {
				if !yield(thing) {
					return false
				}
			}
			return true
		}
		if !all(x.rest) || len(x.byLabel) == 0 {
			return
		}
		for k, v := range object {
			if !all(x.byLabel[label{k, v}]) || !all(x.byLabel[label{k, anyValue}]) {
				return
			}
		}
	}
}

func insert[K, T comparable](m *map[K]map[T]struct{}, key K, thing T) {
	if *m == nil {
		*m = map[K]map[T]struct{}{}
	}
	if (*m)[key] == nil {
		(*m)[key] = map[T]struct{}{}
	}
	(*m)[key][thing] = struct{}{}
}

func remove[K, T comparable](m map[K]map[T]struct{}, key K, thing T) {
	if delete(m[key], thing); len(m[key]) == 0 {
		delete(m, key)
	}
}
