package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/go-logr/logr"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/ipam"
	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/durable"
	"github.com/sluice-network/sluice/internal/host"
)

// contextUntilEOF ends when the reader does.
func contextUntilEOF(r io.Reader) (context.Context, context.CancelFunc) {
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, r)
		stop()
	}()
	return ctx, stop
}

// noVFs is a kernel without VFs. Looking for one can block or panic.
type noVFs struct {
	attach.Kernel
	block chan struct{}
	asked *atomic.Int32
}

func (noVFs) HostNetns() *host.Netns                     { return &host.Netns{} }
func (noVFs) OpenNetns(path string) (*host.Netns, error) { return host.OpenNetns(path) }

func (k noVFs) VF(pci string) (host.VFRef, error) {
	if strings.HasSuffix(pci, ".7") {
		panic("a defect")
	}
	if k.block != nil {
		k.asked.Add(1)
		<-k.block
	}
	return host.VFRef{}, host.ErrNoVF
}

func start(t *testing.T, kernel attach.Kernel) (dir string) {
	t.Helper()
	dir = t.TempDir()
	serve(t, dir, kernel)
	return dir
}

func serve(t *testing.T, dir string, kernel attach.Kernel) *Server {
	t.Helper()
	s, err := New(Options{Socket: filepath.Join(dir, "cni.sock"), StateDir: dir, Kernel: kernel, Baselines: noBaselines{}, Log: logr.Discard()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { stop(); done.Wait() })
	eventually(t, "the server starts", func() error {
		conn, err := net.Dial("unix", filepath.Join(dir, "cni.sock"))
		if err == nil {
			conn.Close()
		}
		return err
	})
	return s
}

func errorOf(t *testing.T, resp wire.Response, err error) (code int, msg string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	var e struct {
		Code int
		Msg  string
	}
	if resp.Failed {
		if err := json.Unmarshal(resp.Stdout, &e); err != nil {
			t.Fatalf("%s: %v", resp.Stdout, err)
		}
	}
	return e.Code, e.Msg
}

func conf(vf, more string) []byte {
	return []byte(`{"cniVersion":"1.1.0","name":"blue","type":"sriov","deviceID":"` + vf + `"` + more + `}`)
}

func TestServerAnswers(t *testing.T) {
	dir := start(t, noVFs{})
	socket := filepath.Join(dir, "cni.sock")
	for name, c := range map[string]struct {
		req  wire.Request
		code int
		says string
	}{
		"no such VF":  {wire.Request{Command: "ADD", ContainerID: "c", IfName: "net1", Netns: "/proc/self/ns/net", Stdin: conf("0000:01:10.0", "")}, 7, "no such VF"},
		"unknown key": {wire.Request{Command: "ADD", ContainerID: "c", IfName: "net1", Netns: "/proc/self/ns/net", Stdin: conf("0000:01:10.0", `,"vlna":1`)}, 7, `did you mean "vlan"`},
		"panic":       {wire.Request{Command: "ADD", ContainerID: "c", IfName: "net1", Netns: "/proc/self/ns/net", Stdin: conf("0000:01:10.7", "")}, 999, "a defect"},
		"DEL":         {wire.Request{Command: "DEL", ContainerID: "c", IfName: "net1", Stdin: conf("0000:01:10.0", "")}, 0, ""},
		"STATUS":      {wire.Request{Command: "STATUS", Stdin: conf("0000:01:10.0", "")}, 0, ""},
		"no verb":     {wire.Request{Command: "MOVE"}, 4, "MOVE"},
	} {
		for range 2 { // a panic leaves no lock behind
			resp, err := call(socket, c.req)
			code, msg := errorOf(t, resp, err)
			if code != c.code || !strings.Contains(msg, c.says) {
				t.Errorf("%s: code %d, %s", name, code, msg)
			}
		}
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
}

func TestBadFramesHurtNobody(t *testing.T) {
	dir := start(t, noVFs{})
	socket := filepath.Join(dir, "cni.sock")
	for _, frame := range []string{"", "x", "\xff\xff\xff\xff", "\x00\x00\x00\x02[]", "\x00\x00\x10\x00{"} {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte(frame)); err != nil {
			t.Error(err)
		}
		conn.Close()
	}
	if resp, err := call(socket, wire.Request{Command: "STATUS", Stdin: conf("", "")}); err != nil || resp.Failed {
		t.Errorf("STATUS: %s, %v", resp.Stdout, err)
	}
}

func TestOthersThanRootAreRefused(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	dir := start(t, noVFs{})
	socket := filepath.Join(dir, "cni.sock")
	for _, path := range []string{filepath.Dir(dir), dir, socket} {
		if err := os.Chmod(path, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	// A process of another user, which gets no further than its connection.
	exe := filepath.Join(dir, "probe")
	if err := copyFile(exe, "/proc/self/exe"); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(exe, "-test.run", "^TestProbe$", "-test.v")
	c.Env = []string{"SLUICE_TEST_PROBE=" + socket}
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := c.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "refused: ") || strings.Contains(string(out), "<nil>") {
		t.Errorf("%s, %v", out, err)
	}
}

// TestProbe is the process of another user in the test above.
func TestProbe(t *testing.T) {
	socket := os.Getenv("SLUICE_TEST_PROBE")
	if socket == "" {
		return
	}
	_, err := call(socket, wire.Request{Command: "STATUS", Stdin: conf("", "")})
	t.Log("refused:", err)
}

func copyFile(to, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}

// TestCallersThatGoAway hangs up during an ADD that waits for its VF's lock.
func TestCallersThatGoAway(t *testing.T) {
	block := make(chan struct{})
	var asked atomic.Int32
	dir := t.TempDir()
	s := serve(t, dir, noVFs{block: block, asked: &asked})
	socket := filepath.Join(dir, "cni.sock")
	waiting := func(n int64) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d calls wait", n), func() error {
			if is := s.waiting.Load(); is != n {
				return fmt.Errorf("%d do", is)
			}
			return nil
		})
	}
	add := wire.Request{Command: "ADD", ContainerID: "c", IfName: "net1", Netns: "/proc/self/ns/net", Stdin: conf("0000:01:10.0", "")}
	first := make(chan error)
	go func() { _, err := call(socket, add); first <- err }()
	eventually(t, "the first is begun", func() error {
		if asked.Load() != 1 {
			return errors.New("it is not")
		}
		return nil
	})
	add.ContainerID = "c2"
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	frame, _ := wire.Encode(add)
	if _, err := conn.Write(frame); err != nil {
		t.Fatal(err)
	}
	waiting(2)
	conn.Close()
	waiting(1)
	close(block)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("%d ADDs were begun, want that of the caller who waited", n)
	}
}

// TestQueuedDelIsWorkedOff leaves a DEL as the shim does when there is no agent.
func TestQueuedDelIsWorkedOff(t *testing.T) {
	dir := t.TempDir()
	queue := filepath.Join(dir, "del-queue")
	if err := os.MkdirAll(queue, 0o700); err != nil {
		t.Fatal(err)
	}
	leases := t.TempDir()
	lease := filepath.Join(leases, "c-net1")
	if err := os.WriteFile(lease, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	bin := pluginDir(t)
	req := wire.Request{Command: "DEL", ContainerID: "c", IfName: "net1", Path: bin, Stdin: conf("0000:01:10.0", `,"ipam":{"type":"testipam","dir":"`+leases+`"}`)}
	b, _ := wire.Encode(req)
	for name, content := range map[string][]byte{"a.del": b, "b.del": b[:len(b)-1], "c.del.1.tmp": b} {
		if err := os.WriteFile(filepath.Join(queue, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	serve(t, dir, noVFs{})
	if _, err := os.Stat(lease); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("lease: %v", err)
	}
	if files, _ := filepath.Glob(filepath.Join(queue, "*.del")); len(files) != 1 || filepath.Base(files[0]) != "b.del" {
		t.Errorf("left: %v", files)
	}

	// One that came too late for the start goes before the next call.
	if err := os.WriteFile(lease, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(queue, wire.QueueName(req))
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	req.Command, req.Netns = "ADD", "/proc/self/ns/net"
	resp, err := call(filepath.Join(dir, "cni.sock"), req)
	if code, msg := errorOf(t, resp, err); code != 7 {
		t.Errorf("ADD: code %d, %s", code, msg)
	}
	for _, gone := range []string{lease, file} {
		if _, err := os.Stat(gone); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", gone, err)
		}
	}
}

// One that comes while the server runs waits for nobody's call.
func TestQueuedDelIsDoneWhileServing(t *testing.T) {
	dir, leases := start(t, noVFs{}), t.TempDir()
	lease := filepath.Join(leases, "c-net1")
	if err := os.WriteFile(lease, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	req := wire.Request{Command: "DEL", ContainerID: "c", IfName: "net1", Path: pluginDir(t), Stdin: conf("0000:01:10.0", `,"ipam":{"type":"testipam","dir":"`+leases+`"}`)}
	b, _ := wire.Encode(req)
	file := filepath.Join(dir, "del-queue", wire.QueueName(req))
	if err := durable.WriteFile(file, b); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is worked off", func() error {
		_, queued := os.Stat(file)
		_, leased := os.Stat(lease)
		if !errors.Is(queued, os.ErrNotExist) || !errors.Is(leased, os.ErrNotExist) {
			return fmt.Errorf("queued: %w, leased: %w", queued, leased)
		}
		return nil
	})
}

func TestReadyIsToldWhenItLasts(t *testing.T) {
	now, why := time.Unix(0, 0), errors.New("no")
	ready := lasting(func() error { return why }, func() time.Time { return now })
	for after, want := range []error{nil, nil, why, why} {
		now = time.Unix(0, 0).Add(time.Duration(after) * settled / 2)
		if err := ready(); !errors.Is(err, want) {
			t.Errorf("after %v: %v, want %v", now, err, want)
		}
	}
	why = nil
	if err := ready(); err != nil {
		t.Error(err)
	}
	why = errors.New("again")
	if err := ready(); err != nil {
		t.Errorf("at once: %v", err)
	}
}

// pluginDir is a folder in which this program is the IPAM plugin "testipam".
func pluginDir(t testing.TB) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(exe, filepath.Join(dir, "testipam")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestIPAMPlugins(t *testing.T) {
	leases, ctx := t.TempDir(), context.Background()
	ipam := attach.ExecIPAM{Dirs: []string{pluginDir(t)}}
	req := attach.Request{Command: attach.Add, ContainerID: "c", IfName: "net1", Netns: "/n", // without CNI_PATH
		Stdin: conf("0000:02:10.3", `,"ipam":{"type":"testipam","dir":"`+leases+`","fail":"CHECK"}`)}
	r, err := ipam.Exec(ctx, "testipam", req)
	if err != nil || r.IPs[0].Address.String() != "10.20.2.131/16" || r.CNIVersion != types100.ImplementedSpecVersion {
		t.Fatalf("%+v, %v", r, err)
	}
	req.Command = attach.Check
	if _, err := ipam.Exec(ctx, "testipam", req); attach.CNIError(err).Code != 11 || !strings.Contains(err.Error(), "no address is free") {
		t.Errorf("failing plugin: %v", err)
	}
	if _, err := ipam.Exec(ctx, "nosuch", req); attach.CNIError(err).Code != attach.CodeIPAM || !strings.Contains(err.Error(), "nosuch") {
		t.Errorf("missing plugin: %v", err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := ipam.Exec(ended, "testipam", req); !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: %v", err)
	}
}

// A server's own IPAM knows what is attached before the first call.
func TestOwnIPAMIsLoaded(t *testing.T) {
	dir := t.TempDir()
	n := ipam.New(ipam.Options{Name: "n1", Dir: filepath.Join(dir, "addresses"), Boot: "1", Now: host.SinceBoot, Log: logr.Discard()})
	ask := func() string {
		_, err := n.Add(t.Context(), ipam.Ask{Pool: "blue", Key: ipam.Key{Network: "net", ContainerID: "c", IfName: "net1"}})
		return fmt.Sprint(err)
	}
	if got := ask(); !strings.Contains(got, "the agent is starting") {
		t.Errorf("before: %s", got)
	}
	if _, err := New(Options{Socket: filepath.Join(dir, "cni.sock"), StateDir: dir, Baselines: noBaselines{}, Addresses: n, Log: logr.Discard()}); err != nil {
		t.Fatal(err)
	}
	if got := ask(); !strings.Contains(got, "there is no such IPPool") {
		t.Errorf("after: %s", got)
	}
}
