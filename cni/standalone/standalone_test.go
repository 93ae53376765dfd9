package standalone

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/go-logr/logr"
	"github.com/google/go-cmp/cmp"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/internal/host"
)

// TestMain makes the test program a CNI plugin, too: one that passes on what came
// before it and writes down its calls.
func TestMain(m *testing.M) {
	if command := os.Getenv("CNI_COMMAND"); command != "" {
		var conf struct {
			PrevResult json.RawMessage
			Log        string
		}
		stdin, _ := io.ReadAll(os.Stdin)
		_ = json.Unmarshal(stdin, &conf)
		f, err := os.OpenFile(conf.Log, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			os.Exit(1)
		}
		fmt.Fprintf(f, "process %s %s\n", command, os.Getenv("CNI_IFNAME"))
		f.Close()
		if command == "ADD" {
			os.Stdout.Write(conf.PrevResult)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// world is everything around Networks.
type world struct {
	t           *testing.T
	options     Options
	networks    *Networks
	onStep      func(step string) // called before and after what others do; nil for nobody
	annotations map[string]string // of the pod, at the API server
	definitions map[string]*nadv1.NetworkAttachmentDefinition
	devices     map[string][]string
	status      string            // of the pod
	alive       bool              // its namespace
	held        map[string]string // devices, by interface: what our plugin has attached
	fail        string            // the call that fails: "ADD net2"
	asked       int               // calls of the API server
	log         string            // of the other plugin
	defaults    []string
}

func (w *world) step(name string) {
	if w.onStep != nil {
		w.onStep(name)
	}
}

func (w *world) Pod(_ context.Context, namespace, name, uid string) (map[string]string, error) {
	w.asked++
	w.step("read pod")
	if namespace+"/"+name+"/"+uid != "ns/p/u" {
		return nil, errors.New("another pod is asked for")
	}
	return w.annotations, nil
}

func (w *world) Network(_ context.Context, namespace, name string) (*nadv1.NetworkAttachmentDefinition, error) {
	w.asked++
	w.step("read network " + namespace + "/" + name)
	if d, ok := w.definitions[namespace+"/"+name]; ok {
		return d, nil
	}
	return nil, attach.WithCode(types.ErrInvalidNetworkConfig, fmt.Errorf("read NetworkAttachmentDefinition %s/%s: not found", namespace, name))
}

func (w *world) SetStatus(_ context.Context, namespace, name, uid, status string) error {
	w.asked++
	w.step("write status")
	if namespace+"/"+name+"/"+uid != "ns/p/u" {
		return errors.New("another pod's status")
	}
	if w.fail == "status" {
		return attach.WithCode(types.ErrTryAgainLater, errors.New("write status: no"))
	}
	w.status = status
	w.step("status is written")
	return nil
}

func (w *world) HostNetns() *host.Netns { return &host.Netns{} }
func (w *world) OpenNetns(string) (*host.Netns, error) {
	return &host.Netns{ID: host.NetnsID{Inode: 7}}, nil
}

func (w *world) SetDefaultRoutes(_ *host.Netns, link string, gateways []netip.Addr) error {
	w.step("set default routes")
	w.defaults = append(w.defaults, fmt.Sprint(link, gateways))
	return nil
}

// plugin is our own: it attaches devices, each once.
func (w *world) plugin(_ context.Context, req attach.Request, _ *host.Netns) ([]byte, error) {
	call := string(req.Command) + " " + req.IfName
	w.step(call)
	defer w.step(call + " is done")
	if w.fail == call {
		return nil, attach.WithCode(attach.CodeKernel, errors.New("the kernel says no"))
	}
	var conf struct{ DeviceID string }
	_ = json.Unmarshal(req.Stdin, &conf)
	switch req.Command {
	case attach.Add:
		for _, held := range w.held {
			if held == conf.DeviceID {
				w.t.Errorf("%s is attached twice", conf.DeviceID)
			}
		}
		w.held[req.IfName] = conf.DeviceID
		return fmt.Appendf(nil, `{"cniVersion":"1.0.0","interfaces":[{"name":%q,"mac":"02:00:00:00:00:01"}],"ips":[{"address":"10.0.0.%d/24","interface":0}]}`, req.IfName, len(w.held)), nil
	case attach.Del:
		delete(w.held, req.IfName)
	case attach.Check:
		if w.held[req.IfName] == "" {
			return nil, attach.WithCode(attach.CodeCheckFailed, errors.New(req.IfName+" is missing"))
		}
	}
	return nil, nil
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{
		t: t, alive: true, held: map[string]string{}, log: filepath.Join(dir, "log"),
		annotations: map[string]string{"k8s.v1.cni.cncf.io/networks": "fast,other/fast@f2"},
		devices:     map[string][]string{"x/vf": {"0000:01:00.1", "0000:01:00.2"}},
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"sriov": shim, "other": exe} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{shim, "log"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.definitions = map[string]*nadv1.NetworkAttachmentDefinition{
		"ns/fast":    definition("fast", "x/vf", `{"cniVersion":"1.0.0","name":"blue","type":"sriov"}`),
		"other/fast": definition("fast", "x/vf", `{"cniVersion":"1.0.0","plugins":[{"type":"sriov"},{"type":"other","log":"`+w.log+`"}]}`),
	}
	w.options = Options{
		API: w, Kernel: w, Plugin: w.plugin, Dirs: []string{dir}, Dir: filepath.Join(dir, "state"), Log: logr.Discard(),
		Devices: func(_ context.Context, namespace, name, uid string) (map[string][]string, error) {
			w.step("ask kubelet")
			if namespace+"/"+name+"/"+uid != "ns/p/u" {
				return nil, errors.New("another pod's devices")
			}
			return w.devices, nil
		},
		DeviceInfo: func(_, id string) (*nadv1.DeviceInfo, error) {
			w.step("read device info")
			return &nadv1.DeviceInfo{Type: "pci", Version: id}, nil
		},
		Alive: func(string, host.NetnsID) bool { return w.alive },
	}
	w.start()
	return w
}

// start starts an agent, in the place of the one before.
func (w *world) start() {
	w.t.Helper()
	var err error
	if w.networks, err = New(w.options); err != nil {
		w.t.Fatal(err)
	}
}

const (
	chained = `{"cniVersion":"1.0.0","name":"cluster","type":"sluice","podNetworks":true,"capabilities":{"io.kubernetes.cri.pod-annotations":true}%s}`
	prev    = `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","mac":"0a:00:00:00:00:01","sandbox":"/n"}],"ips":[{"address":"10.244.0.5/24","gateway":"10.244.0.1","interface":0}]}`
)

func (w *world) call(c attach.Command, more string) ([]byte, error) {
	return w.networks.Do(w.t.Context(), attach.Request{
		Command: c, ContainerID: "c1", Netns: "/n", IfName: "eth0", Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_UID=u",
		Stdin: fmt.Appendf(nil, chained, more),
	}, nil)
}

// clean fails unless nothing is left of any pod.
func (w *world) clean(when string) {
	w.t.Helper()
	files, _ := filepath.Glob(filepath.Join(w.networks.Dir, "*", "*"))
	results, _ := filepath.Glob(filepath.Join(w.networks.Dir, "cache", "results", "*"))
	files = slices.DeleteFunc(append(files, results...), func(f string) bool { return filepath.Base(f) == "results" })
	if len(w.held) > 0 || len(files) > 0 {
		w.t.Errorf("%s: left %v, %v", when, w.held, files)
	}
}

func TestAddCheckDel(t *testing.T) {
	w := newWorld(t)
	out, err := w.call(attach.Add, `,"prevResult":`+prev)
	if err != nil || string(out) != prev {
		t.Fatalf("%s, %v", out, err)
	}
	if diff := cmp.Diff(map[string]string{"net1": "0000:01:00.1", "f2": "0000:01:00.2"}, w.held); diff != "" {
		t.Error(diff)
	}
	want := `[{"name":"cluster","interface":"eth0","ips":["10.244.0.5"],"mac":"0a:00:00:00:00:01","default":true,"dns":{}},` +
		`{"name":"ns/fast","interface":"net1","ips":["10.0.0.1"],"mac":"02:00:00:00:00:01","dns":{},"device-info":{"type":"pci","version":"0000:01:00.1"}},` +
		`{"name":"other/fast","interface":"f2","ips":["10.0.0.2"],"mac":"02:00:00:00:00:01","dns":{},"device-info":{"type":"pci","version":"0000:01:00.2"}}]`
	if diff := cmp.Diff(want, w.status); diff != "" {
		t.Error(diff)
	}
	if _, err := w.call(attach.Check, `,"prevResult":`+prev); err != nil {
		t.Error(err)
	}
	// A definition that is gone changes nothing for the pod that has it.
	w.definitions = nil
	device := w.held["f2"]
	delete(w.held, "f2")
	if _, err := w.call(attach.Check, `,"prevResult":`+prev); attach.CNIError(err).Code != attach.CodeCheckFailed || !strings.Contains(err.Error(), "network other/fast as f2") {
		t.Errorf("CHECK of a pod that lacks an interface: %v", err)
	}
	w.held["f2"] = device
	for range 2 {
		if _, err := w.call(attach.Del, ""); err != nil {
			t.Error(err)
		}
		w.clean("DEL")
	}
	if log, _ := os.ReadFile(w.log); string(log) != "process ADD f2\nprocess CHECK f2\nprocess DEL f2\n" {
		t.Errorf("the other plugin: %s", log)
	}
}

func TestPodsWithoutNetworksNeedNoAPIServer(t *testing.T) {
	w := newWorld(t)
	out, err := w.call(attach.Add, `,"prevResult":`+prev+`,"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"a":"b"}}`)
	if err != nil || string(out) != prev || w.asked != 0 || w.status != "" {
		t.Errorf("%s, %v, API server asked %d times", out, err, w.asked)
	}
	w.clean("ADD")
	for _, c := range []attach.Command{attach.Check, attach.Del, attach.Status} {
		if _, err := w.call(c, ""); err != nil {
			t.Errorf("%s: %v", c, err)
		}
	}
}

func TestFailedAddLeavesNothing(t *testing.T) {
	for failing, says := range map[string]string{
		"ADD net1": "pod ns/p: network ns/fast as net1", "ADD f2": "network other/fast as f2", "status": "write status",
	} {
		w := newWorld(t)
		w.fail = failing
		_, err := w.call(attach.Add, `,"prevResult":`+prev)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", failing, err)
		}
		if code := attach.CNIError(err).Code; code != attach.CodeKernel && failing != "status" || code != types.ErrTryAgainLater && failing == "status" {
			t.Errorf("%s: code %d", failing, code)
		}
		w.clean(failing)
		w.fail = ""
		if _, err := w.call(attach.Add, `,"prevResult":`+prev); err != nil {
			t.Errorf("%s: ADD after it: %v", failing, err)
		}
	}
}

func TestRefusedBeforeAnythingIsDone(t *testing.T) {
	annotation := func(a string) string {
		return `,"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"k8s.v1.cni.cncf.io/networks":"` + a + `"}}`
	}
	for more, says := range map[string]string{
		"":                               "prevResult is missing",
		`,"vlan":7,"prevResult":` + prev: `unknown field "vlan"`,
		`,"prevResult":` + prev + annotation("nosuch"):         "NetworkAttachmentDefinition ns/nosuch: not found",
		`,"prevResult":` + prev + annotation("a b"):            "is not a name",
		`,"prevResult":` + prev + annotation("fast@eth0"):      "choose another name",
		`,"prevResult":` + prev + annotation("fast,fast,fast"): "was given 2 devices",
	} {
		w := newWorld(t)
		if _, err := w.call(attach.Add, more); err == nil || !strings.Contains(err.Error(), says) || attach.CNIError(err).Code != types.ErrInvalidNetworkConfig {
			t.Errorf("%s: %v", more, err)
		}
		w.clean(more)
	}
}

// A DEL that fails in part is repeated for that part, by a later DEL or a collection.
func TestDelIsRepeatedForWhatIsLeft(t *testing.T) {
	for name, again := range map[string]func(*world) error{
		"DEL": func(w *world) error { _, err := w.call(attach.Del, ""); return err },
		"ADD": func(w *world) error {
			if _, err := w.call(attach.Add, `,"prevResult":`+prev); err != nil {
				return err
			}
			_, err := w.call(attach.Del, "")
			return err
		},
		"collection":            func(w *world) error { return w.networks.Collect(w.t.Context()) },
		"garbage of CNI":        func(w *world) error { _, err := w.call(attach.GC, `,"cni.dev/valid-attachments":[]`); return err },
		"another agent's start": func(w *world) error { w.start(); return w.networks.Collect(w.t.Context()) },
	} {
		w := newWorld(t)
		if _, err := w.call(attach.Add, `,"prevResult":`+prev); err != nil {
			t.Fatal(err)
		}
		w.fail = "DEL f2"
		if _, err := w.call(attach.Del, ""); err == nil || len(w.held) != 1 || w.held["f2"] == "" {
			t.Errorf("%s: %v, held %v", name, err, w.held)
		}
		w.fail = ""
		if err := again(w); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		w.clean(name)
	}
}

func TestCollect(t *testing.T) {
	w := newWorld(t)
	if _, err := w.call(attach.Add, `,"prevResult":`+prev); err != nil {
		t.Fatal(err)
	}
	for _, keeps := range []func() error{
		func() error { return w.networks.Collect(t.Context()) },
		func() error {
			_, err := w.call(attach.GC, `,"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}]`)
			return err
		},
	} {
		if err := keeps(); err != nil || len(w.held) != 2 {
			t.Fatalf("%v, held %v", err, w.held)
		}
	}
	if _, err := w.call(attach.GC, ""); attach.CNIError(err).Code != types.ErrInvalidNetworkConfig {
		t.Errorf("GC without a list: %v", err)
	}
	w.alive = false
	if err := w.networks.Collect(t.Context()); err != nil {
		t.Error(err)
	}
	w.clean("the namespace is gone")
}

func TestDefaultRoute(t *testing.T) {
	w := newWorld(t)
	w.annotations["k8s.v1.cni.cncf.io/networks"] = `[{"name":"fast","default-route":["10.0.0.254"]}]`
	if _, err := w.call(attach.Add, `,"prevResult":`+prev); err != nil {
		t.Fatal(err)
	}
	var status []nadv1.NetworkStatus
	if err := json.Unmarshal([]byte(w.status), &status); err != nil || status[0].Default || !status[1].Default || !slices.Equal(status[1].Gateway, []string{"10.0.0.254"}) {
		t.Errorf("%s, %v", w.status, err)
	}
	if !slices.Equal(w.defaults, []string{"net1[10.0.0.254]"}) {
		t.Errorf("default routes: %v", w.defaults)
	}
}
