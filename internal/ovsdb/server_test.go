package ovsdb

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/internal/ovsdb/ovstest"
)

// server is a real ovsdb-server with Open vSwitch's schema and, at first, no switch.
type server struct {
	*Client
	*ovstest.OVS
	t *testing.T
}

func newServer(t *testing.T) *server {
	o := ovstest.New(t)
	return &server{&Client{Socket: o.Socket}, o, t}
}

func (s *server) eventually(ok func() bool) {
	s.t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	s.t.Fatal("it did not come to that")
}

func (s *server) transact(ops ...op) []result {
	s.t.Helper()
	results, err := s.Client.transact(s.t.Context(), ops...)
	if err != nil {
		s.t.Fatal(err)
	}
	return results
}

func (s *server) rows(table string) []row {
	s.t.Helper()
	return s.transact(op{"op": "select", "table": table, "where": []any{}})[0].Rows
}

// found is the bridge as it is, which must be there.
func (s *server) found() Found {
	s.t.Helper()
	f, err := s.ReadBridge(s.t.Context(), "br-0000_3b_00.0")
	if err != nil || f == nil {
		s.t.Fatalf("%v, %v", f, err)
	}
	return *f
}

func (s *server) mustSet(b Bridge) {
	s.t.Helper()
	if err := s.SetBridge(s.t.Context(), b, false); err != nil {
		s.t.Fatal(err)
	}
	if d := cmp.Diff(b, s.found().Bridge); d != "" {
		s.t.Fatalf("not as set: %s", d)
	}
}

func mtu(n int) *int { return &n }

func plain() Bridge { return Bridge{Name: "br-0000_3b_00.0", Uplink: Interface{Name: "ens1f0"}} }

func full() Bridge {
	return Bridge{
		Name: "br-0000_3b_00.0", DatapathType: "netdev", FailMode: "secure",
		ExternalIDs: map[string]string{"a": "1", "b": `"quoted"`}, OtherConfig: map[string]string{"hwaddr": "02:00:00:00:00:01"},
		Uplink: Interface{
			Name: "ens1f0", Type: "dpdk", Options: map[string]string{"dpdk-devargs": "0000:3b:00.0"}, ExternalIDs: map[string]string{"c": ""},
			OtherConfig: map[string]string{"d": "4"}, MTURequest: mtu(9000),
		},
	}
}

// Whatever was set before, what is set is there, in one bridge with two ports.
func TestSetBridge(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	if f, err := s.ReadBridge(t.Context(), "br-0000_3b_00.0"); f != nil || err != nil {
		t.Fatalf("%v, %v before there is any", f, err)
	}
	other := full()
	other.FailMode, other.DatapathType, other.ExternalIDs = "standalone", "", map[string]string{"b": "2"}
	other.Uplink.Type, other.Uplink.Options, other.Uplink.MTURequest = "", map[string]string{"n_rxq": "2"}, mtu(1500)
	renamed := full()
	renamed.Uplink.Name = "ens2f0"
	for _, b := range []Bridge{plain(), full(), other, plain(), full(), renamed, plain(), full()} {
		s.mustSet(b)
		if bridges, ports, interfaces := len(s.rows("Bridge")), len(s.rows("Port")), len(s.rows("Interface")); bridges != 1 || ports != 2 || interfaces != 2 {
			t.Fatalf("%d bridges, %d ports, %d interfaces", bridges, ports, interfaces)
		}
	}
	if err := s.DetachUplink(t.Context(), "br-0000_3b_00.0"); err != nil {
		t.Fatal(err)
	}
	if f := s.found(); f.Uplink.Name != "" || f.DatapathType != "netdev" || len(s.rows("Port")) != 1 {
		t.Errorf("detached: %+v", f)
	}
	s.mustSet(full())
	for range 2 { // the second time there is nothing to remove
		if err := s.RemoveBridge(t.Context(), "br-0000_3b_00.0"); err != nil {
			t.Fatal(err)
		}
		if n := len(s.rows("Bridge")) + len(s.rows("Port")) + len(s.rows("Interface")); n != 0 {
			t.Errorf("%d rows are left", n)
		}
	}
}

// What others have added stays, and what they changed of ours shows.
func TestOthersInTheBridge(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.mustSet(full())
	where := whereName("br-0000_3b_00.0")
	ops := newPort("vf", row{"name": encode("ens1f0_0")})
	s.transact(append(ops,
		op{"op": "mutate", "table": "Bridge", "where": where, "mutations": []any{
			[]any{"ports", "insert", set(named("vf"))}, []any{"external_ids", "insert", []any{"map", []any{[]any{"theirs", "1"}}}},
			[]any{"external_ids", "delete", set("a")},
		}},
		op{"op": "update", "table": "Interface", "where": whereName("ens1f0"), "row": map[string]any{"mtu_request": 1500, "ofport": 1, "error": set()}})...)
	f := s.found()
	if d := cmp.Diff(map[string]string{"b": `"quoted"`}, f.ExternalIDs); d != "" || *f.Uplink.MTURequest != 1500 || !f.Opened {
		t.Errorf("%+v %s", f, d)
	}
	s.mustSet(full())
	s.mustSet(plain())
	b := s.rows("Bridge")[0]
	external, err := b.dict("external_ids")
	if ports, _ := b.atoms("ports"); err != nil || len(ports) != 3 || external["theirs"] != "1" || len(external) != 2 {
		t.Errorf("ports %v, external_ids %v, %v", ports, external, err)
	}
	s.transact(op{"op": "update", "table": "Interface", "where": whereName("ens1f0"), "row": map[string]any{"ofport": -1, "error": "could not open network device ens1f0 (No such device)"}})
	if f := s.found(); f.Opened || !strings.Contains(f.Error, "No such device") {
		t.Errorf("not opened: %+v", f)
	}
}

// What somebody else made is not touched.
func TestForeignBridge(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	ops := append(newPort("own", row{"name": encode("br-0000_3b_00.0")}), newPort("pf", row{"name": encode("ens1f0")})...)
	s.transact(append(ops,
		op{"op": "insert", "table": "Bridge", "uuid-name": "b", "row": map[string]any{"name": "br-0000_3b_00.0", "ports": set(named("own"), named("pf"))}},
		op{"op": "mutate", "table": "Open_vSwitch", "where": []any{}, "mutations": []any{[]any{"bridges", "insert", set(named("b"))}}})...)
	if f := s.found(); !f.Foreign {
		t.Errorf("%+v", f)
	}
	for what, err := range map[string]error{
		"set": s.SetBridge(t.Context(), plain(), false), "detach": s.DetachUplink(t.Context(), "br-0000_3b_00.0"), "remove": s.RemoveBridge(t.Context(), "br-0000_3b_00.0"),
	} {
		if !errors.Is(err, ErrForeign) {
			t.Errorf("%s: %v", what, err)
		}
	}
	elsewhere := plain()
	elsewhere.Name = "br-1"
	if err := s.SetBridge(t.Context(), elsewhere, true); err == nil || !strings.Contains(err.Error(), "ens1f0 is a port of bridge br-0000_3b_00.0") {
		t.Error(err)
	}
	if n := len(s.rows("Bridge")); n != 1 {
		t.Errorf("%d bridges", n)
	}
	before, _ := s.rows("Bridge")[0].atoms("ports")
	if err := s.SetBridge(t.Context(), full(), true); err != nil {
		t.Fatal(err)
	}
	after, _ := s.rows("Bridge")[0].atoms("ports")
	slices.Sort(before)
	slices.Sort(after)
	if d := cmp.Diff(full(), s.found().Bridge); d != "" || !slices.Equal(before, after) {
		t.Errorf("taken over with ports %v of %v: %s", after, before, d)
	}
}

func TestNotThere(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.transact(op{"op": "delete", "table": "Open_vSwitch", "where": []any{}})
	if err := s.SetBridge(t.Context(), plain(), false); err == nil || !strings.Contains(err.Error(), "not initialized: start ovs-vswitchd") {
		t.Error(err)
	}
	if n := len(s.rows("Bridge")) + len(s.rows("Interface")); n != 0 {
		t.Errorf("%d rows are left", n)
	}
	s.StopDatabase()
	if _, err := s.ReadBridge(t.Context(), "br-1"); !errors.Is(err, unix.ECONNREFUSED) || !strings.Contains(err.Error(), "start Open vSwitch on the node") {
		t.Error(err)
	}
	if err := os.Remove(s.Client.Socket); err != nil {
		t.Fatal(err)
	}
	if err := s.SetBridge(t.Context(), plain(), false); !errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
}

// Changes are told, and so is that Open vSwitch goes and comes.
func TestWatch(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	ctx, stop := context.WithCancel(t.Context())
	changed := s.Watch(ctx)
	quiet := func() {
		for {
			select {
			case <-changed:
			case <-time.After(200 * time.Millisecond):
				return
			}
		}
	}
	told := func(what string) {
		t.Helper()
		select {
		case <-changed:
		case <-time.After(time.Minute):
			t.Fatalf("nothing was told of %s", what)
		}
		quiet()
	}
	told("the beginning")
	s.mustSet(plain())
	told("a bridge")
	s.transact(op{"op": "update", "table": "Interface", "where": whereName("ens1f0"), "row": map[string]any{"ofport": 1}})
	told("an interface that was opened")
	s.transact(op{"op": "update", "table": "Interface", "where": whereName("ens1f0"), "row": map[string]any{"statistics": []any{"map", []any{[]any{"rx_bytes", 7}}}}})
	select {
	case <-changed:
		t.Error("statistics were told")
	case <-time.After(100 * time.Millisecond):
	}
	s.StopDatabase()
	told("the end of Open vSwitch")
	s.StartDatabase()
	told("its return")
	s.mustSet(full())
	told("a change after it")
	stop()
	s.eventually(func() bool { _, open := <-changed; return !open })
}

// The switch itself takes up what is set, and says what it cannot. Its devices are dummies.
func TestSwitch(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.StartSwitch("--enable-dummy=override", "--disable-system", "--disable-system-route")
	b := plain()
	b.DatapathType, b.FailMode, b.Uplink.MTURequest = "dummy", "secure", mtu(1400)
	changed := s.Watch(t.Context())
	until := func(ok func(Found) bool) {
		t.Helper()
		for end := time.After(time.Minute); !ok(s.found()); {
			select {
			case <-changed:
			case <-end:
				t.Fatalf("it is %+v", s.found())
			}
		}
	}
	s.mustSet(b)
	until(func(f Found) bool { return f.Opened && f.Error == "" })
	b.Uplink.Type = "nonsense"
	s.mustSet(b)
	until(func(f Found) bool {
		return !f.Opened && strings.Contains(f.Error, "could not open network device ens1f0")
	})
	b.Uplink.Type = ""
	s.mustSet(b)
	until(func(f Found) bool { return f.Opened && f.Error == "" })
	if err := s.DetachUplink(t.Context(), b.Name); err != nil {
		t.Fatal(err)
	}
	s.mustSet(b)
	until(func(f Found) bool { return f.Opened })
}
