package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/internal/holder"
	"github.com/sluice-network/sluice/internal/host"
)

// macvlanRequest is an ADD with the given keys on top of the least.
func macvlanRequest(container, netns, keys string) Request {
	return Request{
		Command: Add, ContainerID: container, Netns: netns, IfName: "net1",
		Args:  "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=" + container + ";K8S_POD_UID=uid-" + container,
		Stdin: fmt.Appendf(nil, `{"cniVersion":"1.1.0","name":"blue","type":"sluice","ipam":{"type":"static"},%s}`, keys),
	}
}

// Of a pod whose init containers alone hold the device the kubelet tells the UID only.
func TestADeviceIsForThePodOfItsUID(t *testing.T) {
	a := newAttacher(t, newWorld(), t.TempDir(), nil)
	a.Allocated = func(context.Context, string) (string, bool, error) { return holder.Unnamed("uid-c1"), true, nil }
	if _, err := a.Add(t.Context(), macvlanRequest("c1", pod1, `"deviceID":"ens1f0-7"`), nil); err != nil {
		t.Error(err)
	}
	a.Allocated = func(context.Context, string) (string, bool, error) { return holder.Unnamed(""), true, nil }
	request := macvlanRequest("c2", pod2, `"deviceID":"ens1f0-8"`)
	request.Args = strings.TrimSuffix(request.Args, "uid-c2")
	if _, err := a.Add(t.Context(), request, nil); err == nil {
		t.Error("a pod without UID was taken for another without UID")
	}
}

func TestMacvlan(t *testing.T) {
	for name, c := range map[string]struct {
		keys string
		want host.Netdev
	}{
		"slot":          {`"deviceID":"ens1f0-7"`, host.Netdev{MTU: 9000, Mode: host.MacvlanBridge}},
		"slot, master":  {`"deviceID":"ens1f0-7","master":"ens1f0","mode":"vepa","mtu":1400`, host.Netdev{MTU: 1400, Mode: host.MacvlanVEPA}},
		"master":        {`"master":"ens1f0","mode":"private","mac":"02:00:00:00:00:77"`, host.Netdev{MTU: 9000, Mode: host.MacvlanPrivate, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 0x77}}},
		"passthru":      {`"master":"ens1f0","mode":"passthru"`, host.Netdev{MTU: 9000, Mode: host.MacvlanPassthru, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 5}}},
		"passthru, MAC": {`"master":"ens1f0","mode":"passthru","runtimeConfig":{"mac":"02:00:00:00:00:78"}`, host.Netdev{MTU: 9000, Mode: host.MacvlanPassthru, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 0x78}}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			before := w.state()
			a := newAttacher(t, w, t.TempDir(), nil)
			req := macvlanRequest("c1", pod1, c.keys)
			out, err := a.Add(t.Context(), req, nil)
			if err != nil {
				t.Fatal(err)
			}
			l := w.links[w.netns[pod1]][0]
			if l.Name != "net1" || l.Kind != "macvlan" || l.MTU != c.want.MTU || l.Mode != c.want.Mode || c.want.MAC != nil && l.MAC.String() != c.want.MAC.String() || l.MAC[0]&3 != 2 {
				t.Errorf("sub-interface is %+v", l)
			}
			i := must(types100.NewResult(out)).(*types100.Result).Interfaces[0]
			if i.Mac != l.MAC.String() || i.Mtu != l.MTU || i.PciID != "" || i.Sandbox != pod1 {
				t.Errorf("interface is %+v", i)
			}
			if again, err := a.Add(t.Context(), req, nil); err != nil || string(again) != string(out) {
				t.Errorf("second ADD: %s, %v", again, err)
			}
			req.Command = Del
			for range 2 {
				if err := a.Del(t.Context(), req, nil); err != nil || w.state() != before || len(a.journal.all()) > 0 {
					t.Errorf("DEL: %v, state\n%s", err, w.state())
				}
			}
		})
	}
}

// A sub-interface whose namespace cannot be seen is not taken for gone: its address is
// not given to others.
func TestMacvlanInANamespaceThatCannotBeSeen(t *testing.T) {
	w := newWorld()
	before := w.state()
	a := newAttacher(t, w, t.TempDir(), nil)
	req := macvlanRequest("c1", pod1, `"deviceID":"ens1f0-7"`)
	if _, err := a.Add(t.Context(), req, nil); err != nil {
		t.Fatal(err)
	}
	req.Command, req.Netns, w.blind = Del, "", true
	if err := a.Del(t.Context(), req, nil); !errors.Is(err, syscall.EMFILE) || !w.leases["c1/net1"] || len(a.journal.all()) != 1 {
		t.Errorf("DEL says %v, leases %v, records %v", err, w.leases, a.journal.all())
	}
	w.blind = false
	if err := a.Del(t.Context(), req, nil); err != nil || w.state() != before || len(a.journal.all()) != 0 {
		t.Errorf("DEL says %v, state\n%s", err, w.state())
	}
}

// The MAC of a pod that comes again is the same, and another for all else.
func TestDerivedMAC(t *testing.T) {
	mac := func(parent byte, r Record) string {
		return derivedMAC(net.HardwareAddr{2, 0, 0, 0, 0, parent}, &r).String()
	}
	is := Record{Key: Key{"blue", "c1", "net1"}, Pod: "ns/web-0"}
	again := is
	again.ContainerID = "c2"
	if mac(1, is) != mac(1, again) {
		t.Error("the MAC depends on the container")
	}
	seen := map[string]string{mac(1, is): "it", mac(2, is): "on another node"}
	for name, change := range map[string]func(*Record){
		"another network":   func(r *Record) { r.Network = "green" },
		"another interface": func(r *Record) { r.IfName = "net2" },
		"another pod":       func(r *Record) { r.Pod = "ns/web-1" },
		"no pod":            func(r *Record) { r.Pod = "" },
	} {
		r := is
		change(&r)
		seen[mac(1, r)] = name
	}
	if len(seen) != 6 {
		t.Errorf("only %d MACs: %v", len(seen), seen)
	}
}

func TestMacvlanRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		keys    string
		prepare func(*world, *Attacher)
		code    uint
		says    string
	}{
		"unknown parent":   {keys: `"master":"ens9"`, code: CodeUnusable, says: "the host has no link ens9"},
		"not in the pod":   {keys: `"master":"bond0","linkInContainer":true`, code: CodeUnusable, says: "the pod has no link bond0"},
		"parent down":      {keys: `"master":"ens1f0"`, prepare: func(w *world, _ *Attacher) { w.links[hostNS][2].Up = false }, code: CodeUnusable, says: "parent ens1f0 is down"},
		"MTU":              {keys: `"master":"ens1f0","mtu":9001`, code: types.ErrInvalidNetworkConfig, says: "mtu 9001 is above that of parent ens1f0, 9000"},
		"busy":             {keys: `"master":"ens1f0"`, prepare: func(w *world, _ *Attacher) { w.failOn, w.errno = "add macvlan", syscall.EBUSY }, code: CodeKernel, says: "may belong to a bond"},
		"passthru, shared": {keys: `"master":"ens1f0","mode":"passthru"`, prepare: func(w *world, _ *Attacher) { w.failOn, w.errno = "add macvlan", syscall.EINVAL }, code: CodeKernel, says: "needs the parent for itself"},
		"name taken": {keys: `"master":"ens1f0"`, prepare: func(w *world, _ *Attacher) {
			w.links[w.netns[pod1]] = []host.Netdev{{Name: "net1", Index: 3}}
		}, code: CodeNameTaken, says: "an interface net1 already"},
		"slot of nobody": {keys: `"deviceID":"ens1f0-7"`, prepare: func(_ *world, a *Attacher) {
			a.Allocated = func(context.Context, string) (string, bool, error) { return "", false, nil }
		}, code: CodeHeld, says: "the slot is in a pool and not allocated to pod ns/c1"},
		"slot of another": {keys: `"deviceID":"ens1f0-7"`, prepare: func(_ *world, a *Attacher) {
			a.Allocated = func(context.Context, string) (string, bool, error) { return "ns/c2", true, nil }
		}, code: CodeHeld, says: "the slot is allocated to pod ns/c2, not to ns/c1"},
		"slot of another's init container": {keys: `"deviceID":"ens1f0-7"`, prepare: func(_ *world, a *Attacher) {
			a.Allocated = func(context.Context, string) (string, bool, error) { return holder.Unnamed("uid-c2"), true, nil }
		}, code: CodeHeld, says: "the slot is allocated to pod uid:uid-c2, not to ns/c1"},
		"slot in use": {keys: `"deviceID":"ens1f0-7"`, prepare: func(_ *world, a *Attacher) {
			must(a.Add(context.Background(), macvlanRequest("c2", pod2, `"deviceID":"ens1f0-7"`), nil))
		}, code: CodeHeld, says: "the slot is held by pod ns/c2"},
		"address in use": {keys: `"master":"ens1f0"`, prepare: func(w *world, _ *Attacher) {
			w.stations = map[string]string{"10.1.0.5": "02:00:00:00:00:aa"}
		}, code: CodeConflict, says: "address 10.1.0.5 is in use by the station with MAC 02:00:00:00:00:aa"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			a := newAttacher(t, w, t.TempDir(), nil)
			if c.prepare != nil {
				c.prepare(w, a)
			}
			before, records := w.state(), len(a.journal.all())
			_, err := a.Add(t.Context(), macvlanRequest("c1", pod1, c.keys), nil)
			if codeOf(err) != c.code || !strings.Contains(fmt.Sprint(err), c.says) || !strings.Contains(err.Error(), "blue") {
				t.Errorf("code %d, %v; want %d, %s", codeOf(err), err, c.code, c.says)
			}
			if w.state() != before || len(a.journal.all()) != records {
				t.Errorf("state\n%s, was\n%s", w.state(), before)
			}
		})
	}
}

func TestMacvlanCheckFindsEveryChange(t *testing.T) {
	const keys = `"deviceID":"ens1f0-7","hostInterface":{"routes":["10.96.0.0/12"]}`
	pod := func(w *world) host.NetnsID { return w.netns[pod1] }
	for name, change := range map[string]struct {
		do   func(*world, *host.Netdev)
		says string
	}{
		"another link":  {func(_ *world, l *host.Netdev) { l.Group = 0 }, "is not the sub-interface"},
		"mode":          {func(_ *world, l *host.Netdev) { l.Mode = host.MacvlanVEPA }, "not in mode bridge"},
		"parent gone":   {func(w *world, _ *host.Netdev) { w.links[hostNS] = w.links[hostNS][:2] }, "parent ens1f0 is gone"},
		"own table":     {func(w *world, l *host.Netdev) { w.routes[l.Index] = w.routes[l.Index][1:] }, "route to 10.1.0.0/24 via net1 in table 107"},
		"rules":         {func(w *world, _ *host.Netdev) { w.rules[pod(w)] = w.rules[pod(w)][:1] }, "rule from fd00::5 lookup 107"},
		"settings":      {func(w *world, l *host.Netdev) { w.kept[l.Index] = false }, "arp_ignore"},
		"host link":     {func(w *world, _ *host.Netdev) { _ = w.DeleteLink(nil, 102) }, "host interface slh"},
		"way to host":   {func(w *world, _ *host.Netdev) { w.routes[103] = nil }, "route to 10.96.0.0/12 via host0 is missing"},
		"way from host": {func(w *world, _ *host.Netdev) { w.routes[102] = nil }, "route to 10.1.0.5/32 via slh"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			a := newAttacher(t, w, t.TempDir(), nil)
			req := macvlanRequest("c1", pod1, keys)
			out, err := a.Add(t.Context(), req, nil)
			if err != nil {
				t.Fatal(err)
			}
			check := req
			check.Command, check.Stdin = Check, []byte(strings.TrimSuffix(string(req.Stdin), "}")+`,"prevResult":`+string(out)+"}")
			if err := a.Check(t.Context(), check, nil); err != nil {
				t.Fatalf("CHECK before: %v", err)
			}
			change.do(w, &w.links[w.netns[pod1]][0])
			if err := a.Check(t.Context(), check, nil); err == nil || !strings.Contains(err.Error(), change.says) {
				t.Errorf("CHECK says %v, not %q", err, change.says)
			}
		})
	}
}

// An interface takes the default route only where nobody has it; its own table has
// a default wherever IPAM names a gateway.
func TestRouting(t *testing.T) {
	const result = `{"cniVersion":"1.1.0",
		"ips":[{"address":"10.1.0.5/24","gateway":"10.1.0.1"},{"address":"10.1.0.6/24"},{"address":"fd00::5/64","gateway":"fd00::1"}],
		"routes":[{"dst":"0.0.0.0/0"},{"dst":"10.9.0.0/16","gw":"10.1.0.9"},{"dst":"10.8.0.0/16","table":77}]}`
	for name, c := range map[string]struct {
		taken bool // the default route of IPv4
		want  []string
	}{
		"first network":  {false, []string{"0.0.0.0/0 10.1.0.1 0", "10.1.0.0/24 <nil> T", "0.0.0.0/0 10.1.0.1 T", "::/0 fd00::1 T", "10.9.0.0/16 10.1.0.9 0", "10.9.0.0/16 10.1.0.9 T", "10.8.0.0/16 10.1.0.1 77", "fd00::/64 <nil> T"}},
		"second network": {true, []string{"10.1.0.0/24 <nil> T", "0.0.0.0/0 10.1.0.1 T", "::/0 fd00::1 T", "10.9.0.0/16 10.1.0.9 0", "10.9.0.0/16 10.1.0.9 T", "10.8.0.0/16 10.1.0.1 77", "fd00::/64 <nil> T"}},
	} {
		r := Record{Generation: 3}
		got, err := routingOf(r, must(types100.NewResult([]byte(result))).(*types100.Result), func(bool) (bool, error) { return c.taken, nil })
		if err != nil {
			t.Fatal(err)
		}
		var have []string
		for _, route := range got.routes {
			table := fmt.Sprint(route.Table)
			if route.Table == int(r.mark()) {
				table = "T"
			}
			have = append(have, fmt.Sprintf("%s %s %s", route.Dst.String(), route.Gateway, table))
		}
		slices.Sort(have)
		slices.Sort(c.want)
		if !slices.Equal(have, c.want) || len(got.source) != 3 {
			t.Errorf("%s: routes\n%s, want\n%s; sources %v", name, strings.Join(have, "\n"), strings.Join(c.want, "\n"), got.source)
		}
	}
}

// Only what a pod without another network sends is led to the host by default.
func TestRoutesToHost(t *testing.T) {
	_, services, _ := net.ParseCIDR("10.96.0.0/12")
	_, six, _ := net.ParseCIDR("fd96::/112")
	r := Record{Generation: 1, HostRoutes: []network{network(*services), network(*six)}}
	node, own := net.IPv4(192, 168, 0, 1), net.IPv4(10, 1, 0, 5)
	if got := toHost(r, own, node); len(got) != 2 || slices.ContainsFunc(got, func(r host.Route) bool { return r.Table == 0 }) {
		t.Errorf("beside another network: %+v", got)
	}
	r.Only = true
	if got := toHost(r, own, node); len(got) != 4 || !got[0].Src.Equal(own) || got[0].Dst.String() != "192.168.0.1/32" || !got[0].OnLink {
		t.Errorf("as the only network: %+v", got)
	}
	if got := toHost(r, net.ParseIP("fd00::5"), nil); len(got) != 2 || got[0].Dst.String() != "fd96::/112" {
		t.Errorf("IPv6: %+v", got)
	}
}

func TestParseMacvlan(t *testing.T) {
	parse := func(keys string) (*Config, error) {
		return Parse(Request{Command: Add, ContainerID: "c", Netns: "/x", IfName: "net1", Stdin: fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":"blue",%s}`, keys)})
	}
	for keys, want := range map[string]Macvlan{
		`"type":"sluice","deviceID":"ens1f0.100-7"`:                                       {Parent: "ens1f0.100", Mode: "bridge"},
		`"type":"sluice","deviceID":"bond0-0","master":"bond0","mode":"vepa","mtu":0`:     {Parent: "bond0", Mode: "vepa"},
		`"type":"sluice","master":"eth0","mode":"private"`:                                {Parent: "eth0", Mode: "private"},
		`"type":"macvlan","mode":""`:                                                      {Mode: "bridge"},
		`"type":"macvlan","master":"eth0","linkInContainer":true,"bcqueuelen":4294967295`: {Parent: "eth0", Mode: "bridge", InPod: true, BroadcastQueue: 4294967295},
		`"type":"macvlan","master":"eth0","vlan":null,"spoofchk":"","capabilities":{"mac":true,"ips":true},"runtimeConfig":{"mac":"02:00:00:00:00:01","ips":["10.0.0.1/24"]}`: {Parent: "eth0", Mode: "bridge"},
	} {
		cfg, err := parse(keys)
		if err != nil {
			t.Errorf("%s: %v", keys, err)
		} else if *cfg.Macvlan != want || cfg.ConflictProbe != defaultProbe {
			t.Errorf("%s: %+v, probe %v", keys, cfg.Macvlan, cfg.ConflictProbe)
		}
	}
	for keys, says := range map[string]string{
		`"type":"sriov","deviceID":"eth0-1"`:                           `type "sriov" is for VFs`,
		`"type":"macvlan","deviceID":"0000:01:10.0"`:                   `is a VF, and type "macvlan"`,
		`"type":"sluice","deviceID":"eth0-01"`:                         `not a PCI address like 0000:3b:02.1, nor a MacVLAN slot like ens1f0-0`,
		`"type":"sluice","deviceID":"eth0-1","master":"eth1"`:          `master "eth1" is not the parent of slot "eth0-1"`,
		`"type":"sluice","deviceID":"eth0-1","linkInContainer":true`:   `linkInContainer true`,
		`"type":"sluice","deviceID":"eth0-1","vlan":5`:                 `vlan 5 is a setting of VFs`,
		`"type":"sluice","deviceID":"0000:01:10.0","mode":"bridge"`:    `mode "bridge" is a setting of MacVLAN networks`,
		`"type":"sriov","master":"eth0"`:                               `master "eth0" is a setting of MacVLAN networks`,
		`"type":"sluice"`:                                              `key "deviceID" is missing`,
		`"type":"macvlan","master":"eth0/1"`:                           `master "eth0/1" is not a valid interface name`,
		`"type":"macvlan","mode":"source"`:                             `mode "source" is not one of "bridge", "passthru", "private", "vepa"`,
		`"type":"macvlan","mode":"Bridge"`:                             `mode "Bridge" is not one of`,
		`"type":"macvlan","bcqueuelen":-1`:                             `bcqueuelen -1 is not a number of frames`,
		`"type":"macvlan","linkInContainer":"yes"`:                     `linkInContainer "yes" is a string where bool is needed`,
		`"type":"macvlan","mtu":40`:                                    `mtu 40 is not in the range`,
		`"type":"macvlan","conflictProbe":20000`:                       `conflictProbe 20000 is not in the range`,
		`"type":"macvlan","mstaer":"eth0"`:                             `did you mean "master"?`,
		`"type":"macvlan","hostInterface":{}`:                          `hostInterface is set and ipam is not`,
		`"type":"macvlan","hostInterface":{"route":[]}`:                `did you mean "routes"?`,
		`"type":"macvlan","hostInterface":{"routes":["10.96.0.0"]}`:    `has "10.96.0.0", which is not a network`,
		`"type":"macvlan","hostInterface":{"routes":["10.96.0.1/12"]}`: `write 10.96.0.0/12`,
		`"type":"macvlan","hostInterface":true`:                        `is not a JSON object`,
	} {
		if _, err := parse(keys); codeOf(err) != types.ErrInvalidNetworkConfig || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), `network "blue"`) {
			t.Errorf("%s: code %d, %v; want %s", keys, codeOf(err), err, says)
		}
	}
	if cfg, err := parse(`"type":"macvlan","conflictProbe":0`); err != nil || cfg.ConflictProbe != 0 {
		t.Errorf("no probe: %v, %v", cfg, err)
	}
	if cfg, err := parse(`"type":"sriov","deviceID":"0000:01:10.0"`); err != nil || cfg.ConflictProbe != 0 || cfg.Macvlan != nil {
		t.Errorf("VF: %+v, %v", cfg, err)
	}
}

// FuzzMacvlanNetConf: nothing makes Parse panic, and what it accepts it has read in
// full: every key is known, and a slot's parent is the one that is used.
func FuzzMacvlanNetConf(f *testing.F) {
	for _, keys := range []string{
		`"deviceID":"ens1f0-7","mode":"vepa"`, `"master":"eth0","bcqueuelen":5,"mtu":1400`, `"master":"eth0","linkInContainer":true`,
		`"deviceID":"eth0-1","hostInterface":{"routes":["10.96.0.0/12","fd00::/64"]},"ipam":{"type":"x"},"conflictProbe":0`, `"deviceID":"eth0-1","vlan":5`,
	} {
		f.Add([]byte(`{"cniVersion":"1.0.0","name":"blue","type":"sluice",` + keys + `}`))
	}
	f.Fuzz(func(t *testing.T, stdin []byte) {
		cfg, err := Parse(Request{Command: Add, ContainerID: "c", Netns: "/x", IfName: "net1", Stdin: stdin})
		if err != nil || cfg.Macvlan == nil {
			return
		}
		var keys map[string]json.RawMessage
		if err := json.Unmarshal(stdin, &keys); err != nil {
			t.Fatalf("accepted %q: %v", stdin, err)
		}
		for k := range keys {
			if _, known := fields[k]; !known {
				t.Fatalf("accepted key %q", k)
			}
		}
		if parent, _, err := host.ParseSlotID(cfg.DeviceID); cfg.DeviceID != "" && (err != nil || parent != cfg.Macvlan.Parent) {
			t.Fatalf("slot %q on parent %q", cfg.DeviceID, cfg.Macvlan.Parent)
		}
		if _, ok := host.MacvlanModes[cfg.Macvlan.Mode]; !ok || cfg.ConflictProbe > 10*time.Second {
			t.Fatalf("accepted %+v", cfg)
		}
	})
}

// TestNetworkRoundTrip: what is read of the configuration is read from the journal.
func TestNetworkRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom([]int{4, 16}).Draw(t, "size")
		mask := net.CIDRMask(rapid.IntRange(0, 8*size).Draw(t, "ones"), 8*size)
		ip := net.IP(rapid.SliceOfN(rapid.Byte(), size, size).Draw(t, "ip")).Mask(mask)
		b, err := network{IP: ip, Mask: mask}.MarshalText()
		var got network
		if err == nil {
			err = got.UnmarshalText(b)
		}
		if again, _ := got.MarshalText(); err != nil || string(again) != string(b) {
			t.Fatalf("%s became %s, %v", b, again, err)
		}
	})
}
