package ipam

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/go-logr/logr"

	"github.com/sluice-network/sluice/apis/sluice/v1alpha1"
	"github.com/sluice-network/sluice/cni/attach"
)

const pod = "IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=p"

func call(c attach.Command, id, more string) attach.Request {
	return attach.Request{Command: c, ContainerID: id, IfName: "net1", Args: pod, Stdin: fmt.Appendf(nil, `{"cniVersion":"1.1.0","name":"net",%s}`, more)}
}

const blue = `"ipam":{"type":"sluice","pool":"blue"}`

// rig is a node with the real journal, and a clock and an API server that the test moves.
type rig struct {
	*Node
	api *apiServer
	now time.Duration
}

func newRig(t *testing.T, spec *v1alpha1.IPPoolSpec) *rig {
	t.Helper()
	r := &rig{api: newAPIServer(), now: time.Hour}
	r.Node = New(Options{Name: "n1", Dir: filepath.Join(t.TempDir(), "addresses"), Claims: r.api, Boot: "1", Log: logr.Discard(), Now: func() (time.Duration, error) { return r.now, nil }})
	if err := r.Load(func() []attach.Lease { return nil }); err != nil {
		t.Fatal(err)
	}
	r.leases = nil // no attachments to compare with
	if spec != nil {
		r.SetPool("blue", spec)
	}
	return r
}

func codeOf(err error) uint {
	var cni *types.Error
	if errors.As(err, &cni) {
		return cni.Code
	}
	return 0
}

func TestPluginGivesAResult(t *testing.T) {
	n := newRig(t, &v1alpha1.IPPoolSpec{
		IPv4:   &v1alpha1.IPRange{CIDR: "10.1.0.0/24", Gateway: "10.1.0.1"},
		IPv6:   &v1alpha1.IPRange{CIDR: "fd00::/64"},
		Routes: []v1alpha1.IPPoolRoute{{Dst: "10.9.0.0/16"}, {Dst: "fd09::/64", Gw: "fd00::1"}},
		DNS:    &v1alpha1.IPPoolDNS{Nameservers: []string{"10.1.0.53"}, Search: []string{"x.example"}},
	})
	first, err := n.Exec(t.Context(), Type, call(attach.Add, "1", blue))
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(first)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"address":"10.1.0.`, `/24","gateway":"10.1.0.1"`, `"address":"fd00::`, `/64"`, `{"dst":"10.9.0.0/16"}`, `{"dst":"fd09::/64","gw":"fd00::1"}`, `"nameservers":["10.1.0.53"]`, `"search":["x.example"]`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s lacks %s", b, want)
		}
	}
	// The same again for the same interface; nothing after its end.
	again, err := n.Exec(t.Context(), Type, call(attach.Add, "1", blue))
	if err != nil || again.IPs[0].Address.String() != first.IPs[0].Address.String() {
		t.Errorf("again: %v, %v", again, err)
	}
	for _, c := range []attach.Command{attach.Check, attach.Status, attach.GC} {
		if _, err := n.Exec(t.Context(), Type, call(c, "1", blue)); err != nil {
			t.Errorf("%s: %v", c, err)
		}
	}
	for range 2 {
		if _, err := n.Exec(t.Context(), Type, call(attach.Del, "1", `"ipam":{}`)); err != nil {
			t.Error(err)
		}
	}
	if _, err := n.Exec(t.Context(), Type, call(attach.Check, "1", blue)); codeOf(err) != attach.CodeCheckFailed {
		t.Errorf("CHECK after DEL: %v", err)
	}
}

func TestPluginRefuses(t *testing.T) {
	n := newRig(t, &v1alpha1.IPPoolSpec{
		IPv4: &v1alpha1.IPRange{CIDR: "10.1.0.0/24", Gateway: "10.1.0.1", Start: "10.1.0.10"}, Namespaces: []string{"a"},
		Reservations: []v1alpha1.IPReservation{{Address: "10.1.0.20", Namespace: "a", Pod: "other"}},
	})
	n.SetPool("others", &v1alpha1.IPPoolSpec{IPv4: &v1alpha1.IPRange{CIDR: "10.1.0.0/24"}, Namespaces: []string{"b"}})
	n.SetPool("broken", &v1alpha1.IPPoolSpec{IPv4: &v1alpha1.IPRange{CIDR: "x"}})
	n.SetPool("none", &v1alpha1.IPPoolSpec{IPv4: &v1alpha1.IPRange{CIDR: "10.1.0.0/24"}, Quotas: []v1alpha1.IPQuota{{Namespace: "*", Interfaces: 0}}})
	ips := func(text string) string { return blue + `,"runtimeConfig":{"ips":[` + text + `]}` }
	for _, c := range []struct {
		config string
		code   uint
		want   string
	}{
		{`"ipam":{"type":"sluice"}`, 7, `key "ipam.pool" is missing: name an IPPool`},
		{`"ipam":{"type":"sluice","pool":1}`, 7, "ipam.pool 1 is not a string"},
		{`"ipam":{"type":"sluice","pool":"blue","range":"x"}`, 7, `unknown key "ipam.range" with value "x"`},
		{`"ipam":{"type":"sluice","pool":"nosuch"}`, attach.CodeIPAM, `pool "nosuch": there is no such IPPool`},
		{`"ipam":{"type":"sluice","pool":"broken"}`, attach.CodeIPAM, `pool "broken": the IPPool is not valid: spec.ipv4.cidr`},
		{`"ipam":{"type":"sluice","pool":"others"}`, attach.CodeIPAM, `it is not for pods of namespace "a": add it to spec.namespaces`},
		{`"ipam":{"type":"sluice","pool":"none"}`, 11, "namespace a has its quota of 0 interfaces"},
		{ips(`"x"`), 7, `address "x" is asked for, which is not an IP address`},
		{ips(`"10.2.0.1"`), attach.CodeIPAM, "address 10.2.0.1 is asked for, and is not of the pool's subnets"},
		{ips(`"10.1.0.12/16"`), attach.CodeIPAM, "the subnet is 10.1.0.0/24: leave the length out"},
		{ips(`"10.1.0.1"`), attach.CodeIPAM, "the pool does not give it out"},
		{ips(`"10.1.0.9"`), attach.CodeIPAM, "the pool does not give it out"},
		{ips(`"10.1.0.20"`), attach.CodeIPAM, "address 10.1.0.20 is asked for, and reserved for somebody else"},
		{ips(`"10.1.0.11","10.1.0.12"`), attach.CodeIPAM, "10.1.0.11 and 10.1.0.12 are asked for"},
	} {
		if _, err := n.Exec(t.Context(), Type, call(attach.Add, "1", c.config)); codeOf(err) != c.code || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: code %d, %v\nwant code %d, %s", c.config, codeOf(err), err, c.code, c.want)
		}
	}
	if n.api.writes > 0 {
		t.Errorf("%d writes for what was refused", n.api.writes)
	}
}

// The address that a pod asks for comes in one of three ways; it rests like others.
func TestPodAsksForItsAddress(t *testing.T) {
	n := newRig(t, &v1alpha1.IPPoolSpec{IPv4: &v1alpha1.IPRange{CIDR: "10.1.0.0/24", BlockSize: 16}})
	n.api.objects["blue.10.1.0.64"] = *v1alpha1.NewBlock("blue", "n2", v1alpha1.BlockAddresses, netip.MustParseAddr("10.1.0.64"), 16)
	byArgs := call(attach.Add, "3", blue)
	byArgs.Args += ";IP=10.1.0.99"
	for want, req := range map[string]attach.Request{
		"10.1.0.33/24": call(attach.Add, "1", blue+`,"runtimeConfig":{"ips":["10.1.0.33/24"]}`),
		"10.1.0.34/24": call(attach.Add, "2", blue+`,"args":{"cni":{"ips":["10.1.0.34"]}}`),
		"10.1.0.99/24": byArgs,
	} {
		r, err := n.Exec(t.Context(), Type, req)
		if err != nil || r.IPs[0].Address.String() != want {
			t.Errorf("asked for %s: %v, %v", want, r, err)
		}
	}
	refused := func(ip, want string) {
		t.Helper()
		_, err := n.Exec(t.Context(), Type, call(attach.Add, "4", blue+`,"runtimeConfig":{"ips":["`+ip+`"]}`))
		if codeOf(err) != types.ErrTryAgainLater || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", ip, err, want)
		}
	}
	refused("10.1.0.33", `network "net", container 1, interface net1 has it`)
	refused("10.1.0.70", "is in a block of another node")
	if _, err := n.Exec(t.Context(), Type, call(attach.Del, "1", blue)); err != nil {
		t.Fatal(err)
	}
	refused("10.1.0.33", "rests: its last interface went a short time ago")
	n.now += 61 * time.Second
	if _, err := n.Exec(t.Context(), Type, call(attach.Add, "4", blue+`,"runtimeConfig":{"ips":["10.1.0.33"]}`)); err != nil {
		t.Error(err)
	}
}

func TestReservationByMAC(t *testing.T) {
	n := newRig(t, &v1alpha1.IPPoolSpec{
		IPv4:         &v1alpha1.IPRange{CIDR: "10.1.0.0/24", End: "10.1.0.99"},
		Reservations: []v1alpha1.IPReservation{{Address: "10.1.0.200", Namespace: "a", MAC: "02:00:00:00:00:0A"}},
	})
	req := call(attach.Add, "1", blue)
	req.MAC = net.HardwareAddr{2, 0, 0, 0, 0, 10}
	if r, err := n.Exec(t.Context(), Type, req); err != nil || r.IPs[0].Address.String() != "10.1.0.200/24" {
		t.Errorf("%v, %v", r, err)
	}
	// A second interface of that MAC gets one of the others.
	req.ContainerID = "2"
	if r, err := n.Exec(t.Context(), Type, req); err != nil || r.IPs[0].Address.String() == "10.1.0.200/24" {
		t.Errorf("%v, %v", r, err)
	}
}

// STATUS says that there is nothing only when that is so.
func TestStatusTellsOfAnEmptyPool(t *testing.T) {
	n := newRig(t, nil)
	status := func() uint {
		_, err := n.Exec(t.Context(), Type, call(attach.Status, "", blue))
		return codeOf(err)
	}
	if got := status(); got != types.ErrPluginNotAvailable {
		t.Errorf("no pool: code %d", got)
	}
	n.SetPool("blue", &v1alpha1.IPPoolSpec{IPv4: &v1alpha1.IPRange{CIDR: "10.1.0.0/30"}})
	for i := range 2 {
		if got := status(); got != 0 {
			t.Errorf("%d addresses in use: code %d", i, got)
		}
		if _, err := n.Exec(t.Context(), Type, call(attach.Add, fmt.Sprint(i), blue)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.Exec(t.Context(), Type, call(attach.Add, "x", blue)); codeOf(err) != types.ErrTryAgainLater || !strings.Contains(err.Error(), "no IPv4 address is left") {
		t.Errorf("an address too many: %v", err)
	}
	if got := status(); got != types.ErrPluginNotAvailable {
		t.Errorf("all addresses in use: code %d", got)
	}
}

// An agent that starts while the API server is away goes on with what it has.
func TestWithoutTheAPIServer(t *testing.T) {
	n := newRig(t, &v1alpha1.IPPoolSpec{IPv4: &v1alpha1.IPRange{CIDR: "10.1.0.0/20"}})
	if _, err := n.Exec(t.Context(), Type, call(attach.Add, "1", blue)); err != nil {
		t.Fatal(err)
	}
	n.Del(attach.KeyOf(call(attach.Del, "1", blue)))
	n.now += time.Hour
	n.Tend(t.Context())
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	n.api.fail = func(bool) error { return errLost }
	next := New(n.Options)
	if err := next.Load(func() []attach.Lease { return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := next.Exec(t.Context(), Type, call(attach.Add, "2", blue)); err != nil {
		t.Error(err)
	}
	// The old one gives nothing any more.
	if _, err := n.Exec(t.Context(), Type, call(attach.Add, "3", blue)); codeOf(err) != types.ErrTryAgainLater {
		t.Errorf("an agent that ended: %v", err)
	}
}

// A journal that cannot be read is set aside, and what its node had rests.
func TestUnreadableJournal(t *testing.T) {
	n := newRig(t, &v1alpha1.IPPoolSpec{IPv4: &v1alpha1.IPRange{CIDR: "10.1.0.0/29", BlockSize: 8}})
	if _, err := n.Exec(t.Context(), Type, call(attach.Add, "1", blue)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.journal.file("blue"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	next := New(n.Options)
	if err := next.Load(func() []attach.Lease { return nil }); err != nil {
		t.Fatal(err)
	}
	next.SetPool("blue", n.stores["blue"].spec)
	add := func() error {
		_, err := next.Exec(t.Context(), Type, call(attach.Add, "2", blue))
		return err
	}
	if err := add(); codeOf(err) != types.ErrTryAgainLater {
		t.Errorf("right after: %v", err)
	}
	n.now += 61 * time.Second
	if err := add(); err != nil {
		t.Errorf("after the rest: %v", err)
	}
	if files, _ := filepath.Glob(n.Dir + "/*.unreadable"); len(files) != 1 {
		t.Errorf("set aside: %v", files)
	}
}

// No answer of the API server, or a disk that is full: an error, and nothing is given.
func TestNothingIsGivenThatIsNotWritten(t *testing.T) {
	n := newRig(t, &v1alpha1.IPPoolSpec{IPv4: &v1alpha1.IPRange{CIDR: "10.1.0.0/24"}})
	n.api.fail = func(bool) error { return errLost }
	if _, err := n.Exec(t.Context(), Type, call(attach.Add, "1", blue)); codeOf(err) != types.ErrTryAgainLater || !strings.Contains(err.Error(), errLost.Error()) {
		t.Errorf("no API server: %v", err)
	}
	n.api.fail = func(bool) error { return nil }
	if err := os.RemoveAll(n.Dir); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Exec(t.Context(), Type, call(attach.Add, "1", blue)); codeOf(err) != types.ErrTryAgainLater || !strings.Contains(err.Error(), "write the journal of pool blue") {
		t.Errorf("no disk: %v", err)
	}
	if err := os.Mkdir(n.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Exec(context.Background(), Type, call(attach.Add, "1", blue)); err != nil {
		t.Error(err)
	}
}

// An agent that does not come back leaves nothing claimed, and gives nothing back that rests.
func TestLeave(t *testing.T) {
	n := newRig(t, &v1alpha1.IPPoolSpec{IPv4: &v1alpha1.IPRange{CIDR: "10.1.0.0/24"}, Quotas: []v1alpha1.IPQuota{{Namespace: "a", Interfaces: 9}}})
	if _, err := n.Exec(t.Context(), Type, call(attach.Add, "1", blue)); err != nil {
		t.Fatal(err)
	}
	for _, inUse := range []bool{true, false} {
		if err := n.Leave(t.Context()); err == nil || !strings.Contains(err.Error(), "are in use or rest") || len(n.api.objects) == 0 {
			t.Errorf("in use %v: %v, claims %v", inUse, err, n.api.objects)
		}
		n.Del(attach.KeyOf(call(attach.Del, "1", blue)))
	}
	n.now += 61 * time.Second
	if err := n.Leave(t.Context()); err != nil || len(n.api.objects) > 0 {
		t.Errorf("%v, claims %v", err, n.api.objects)
	}
	// Its folder goes then.
	if err := os.RemoveAll(n.Dir); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
}
