package ovsdb

import (
	"bytes"
	"strings"
	"testing"
)

func TestReadResultsRefuses(t *testing.T) {
	t.Parallel()
	for answer, want := range map[string]string{
		``:                              "EOF",
		`{"id":1,"result":[{}]`:         "unexpected EOF",
		`{"result":[{"count":1}]}`:      "it tells of 1 operations, not 2",
		`{"result":{},"id":1}`:          "cannot unmarshal object",
		`{"error":{"error":"unknown"}}`: "it refused",
		`{"result":[{"error":"no","details":"why"},null]}`:                      "it refused: no: why",
		`{"result":[{},{},{"error":"constraint violation","details":"twice"}]}`: "it refused: constraint violation: twice",
	} {
		if _, err := readResults(strings.NewReader(answer), 2); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", answer, err, want)
		}
	}
	if r, err := readResults(strings.NewReader(`{"method":"echo","id":"echo"}{"result":[{"count":1},{"rows":[]}],"error":null}`), 2); err != nil || r[0].Count != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

// Whatever is answered, it is read or refused.
func FuzzReadBridge(f *testing.F) {
	const bridge = `{"_uuid":["uuid","0-0"],"name":"b","ports":["uuid","1-1"],"datapath_type":"","fail_mode":["set",[]],` +
		`"external_ids":["map",[["sluice.dev/bridge","{\"name\":\"b\",\"failMode\":\"secure\",\"externalIDs\":{\"a\":\"\"}}"],["a","1"]]],"other_config":["map",[]]}`
	f.Add([]byte(`{"result":[{"rows":[` + bridge + `]}]}`))
	f.Add([]byte(`{"result":[{"rows":[{"_uuid":["uuid"],"name":7,"ports":["set",[["uuid",1]]],"ofport":["set",[-1]],"external_ids":["map",[["a"]]]}]}]}`))
	f.Add([]byte(`{"result":[{"rows":[{"ofport":1,"error":["set",[""]],"mtu_request":["set",[1500]],"type":null,"options":["map",[[]]]}]}]}`))
	f.Fuzz(func(t *testing.T, answer []byte) {
		results, err := readResults(bytes.NewReader(answer), 1)
		if err != nil {
			return
		}
		for _, r := range results[0].Rows {
			b := &found{}
			if err := b.ofBridge(r); err == nil && b.uuid == "" {
				t.Error("a bridge without a UUID was read")
			}
			for k := range b.ExternalIDs {
				if _, ours := b.applied.ExternalIDs[k]; !ours {
					t.Errorf("key %q is not ours", k)
				}
			}
			b.applied = full()
			if err := b.ofUplink(r); err == nil && b.Uplink.Name != b.applied.Uplink.Name {
				t.Error("the uplink has another name")
			}
		}
	})
}
