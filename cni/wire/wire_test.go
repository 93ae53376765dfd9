package wire

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := Request{
			Command: rapid.SampledFrom([]string{"ADD", "DEL"}).Draw(t, "command"),
			Netns:   rapid.StringMatching(`[ -~]*`).Draw(t, "netns"), Args: string(rapid.SliceOf(rapid.Byte()).Draw(t, "args")),
			Stdin: rapid.SliceOfN(rapid.Byte(), 1, 100).Draw(t, "stdin"),
		}
		frame, err := Encode(want)
		if strings.Contains(want.Args, "\x00") != (err != nil) {
			t.Fatal(err)
		}
		if err != nil {
			return
		}
		var got Request
		if err := Decode(bytes.NewReader(frame), &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%+v, %v", got, err)
		}
		if err := Decode(bytes.NewReader(frame[:len(frame)-1]), &got); err == nil {
			t.Fatal("a frame that is cut off was read")
		}
		said := Response{Stdout: want.Stdin, Failed: rapid.Bool().Draw(t, "failed")}
		frame, err = Encode(said)
		if err != nil {
			t.Fatal(err)
		}
		var heard Response
		if err := Decode(bytes.NewReader(frame), &heard); err != nil || !reflect.DeepEqual(heard, said) {
			t.Fatalf("%+v, %v", heard, err)
		}
	})
}

func TestLimits(t *testing.T) {
	if _, err := Encode(Request{Stdin: make([]byte, maxFrame)}); err == nil {
		t.Error("encoded a message that no one reads")
	}
	if err := Decode(strings.NewReader("\xff\xff\xff\xff"), &Request{}); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("a length of four gigabytes: %v", err)
	}
}

// The shim waits for the server
// longer than the server takes, and not as long as runtimes wait.
func TestTimeoutsAreInOrder(t *testing.T) {
	if AckTimeout.Seconds() > 2 || ServeTimeout >= AnswerTimeout || AnswerTimeout.Minutes() >= 2 {
		t.Error(AckTimeout, ServeTimeout, AnswerTimeout)
	}
}

// What was read can be sent on, and is read again as the same.
func FuzzDecode(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02\x00\x00"))
	f.Add([]byte("\xff\xff\xff\xff\x00"))
	if frame, err := Encode(Request{Command: "ADD", ContainerID: "c", Netns: "/n", IfName: "net1", Args: "A=b", Stdin: []byte("{}")}); err == nil {
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var req Request
		if Decode(bytes.NewReader(b), &req) != nil {
			return
		}
		frame, err := Encode(req)
		if err != nil {
			t.Fatal(err)
		}
		var again Request
		if err := Decode(bytes.NewReader(frame), &again); err != nil || string(again.Stdin) != string(req.Stdin) || again.Args != req.Args || QueueName(again) != QueueName(req) {
			t.Fatalf("%+v became %+v, %v", req, again, err)
		}
	})
}
