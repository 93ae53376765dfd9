package spelling

import (
	"testing"

	"pgregory.net/rapid"
)

func TestDidYouMean(t *testing.T) {
	known := []string{"vendors", "devices", "drivers", "id"}
	for word, want := range map[string]string{
		"vendros": `: did you mean "vendors"?`,
		"VENDORS": `: did you mean "vendors"?`,
		"driver":  `: did you mean "drivers"?`,
		"dvices":  `: did you mean "devices"?`,
		"else":    "",
		"x":       "", // as far from "id" as it is long
		"":        "",
	} {
		if got := DidYouMean(word, known); got != want {
			t.Errorf("%q: %q, want %q", word, got, want)
		}
	}
}

func TestDistanceIsAMetric(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := func(name string) string { return rapid.StringMatching(`[a-c]{0,6}`).Draw(t, name) }
		a, b, c := s("a"), s("b"), s("c")
		if (distance(a, b) == 0) != (a == b) || distance(a, b) != distance(b, a) || distance(a, c) > distance(a, b)+distance(b, c) {
			t.Fatal(distance(a, b), distance(b, c), distance(a, c))
		}
	})
}
