package v1

import (
	"encoding/json"
	"slices"
	"testing"
)

// A key that the selector does not have is never lost: the rest of the selector would select
// more than its author meant.
func FuzzNicSelector(f *testing.F) {
	for _, text := range []string{`{"vendor": "8086"}`, `{"vendor": "8086", "pfName": ["x"]}`, `{"Vendor": "8086"}`, `{"pfNames": null, "": 1}`, `null`, `[]`} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var s SriovNetworkNicSelector
		if json.Unmarshal([]byte(text), &s) != nil {
			return
		}
		var keys map[string]json.RawMessage
		if err := json.Unmarshal([]byte(text), &keys); err != nil {
			t.Fatalf("%s is taken for a selector: %v", text, err)
		}
		for key := range keys {
			if !slices.Contains([]string{"vendor", "deviceID", "rootDevices", "pfNames", "netFilter"}, key) && !slices.Contains(s.UnknownKeys, key) {
				t.Fatalf("%s: key %q is lost in %+v", text, key, s)
			}
		}
	})
}
