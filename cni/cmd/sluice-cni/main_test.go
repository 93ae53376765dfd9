package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/sluice-network/sluice/cni/wire"
)

// TestMain makes the test program the plugin when a runtime would call it.
func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const stdin = `{"cniVersion":"1.0.0","name":"blue","type":"sriov"}`

// plugin runs the plugin under the given name.
func plugin(t *testing.T, name, command, dir string) (out string, code int, took time.Duration) {
	t.Helper()
	c := exec.Command("/proc/self/exe")
	c.Args = []string{name}
	c.Env = []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=c1", "CNI_IFNAME=net1", "CNI_NETNS=/proc/self/ns/net", "CNI_ARGS=K=V", "CNI_PATH=/opt/cni/bin",
		"SLUICE_CNI_SOCKET=" + filepath.Join(dir, "sock"), "SLUICE_CNI_DEL_QUEUE=" + filepath.Join(dir, "queue"),
	}
	c.Stdin = strings.NewReader(stdin)
	begin := time.Now()
	b, err := c.Output()
	if (err != nil) != (c.ProcessState.ExitCode() == 1) {
		t.Fatalf("%s: %v", command, err)
	}
	var e struct {
		CNIVersion string
		Code       int
	}
	if len(b) > 0 && json.Unmarshal(b, &e) != nil || e.Code != 0 && e.CNIVersion != "1.0.0" {
		t.Errorf("%s prints %s", command, b)
	}
	if (e.Code != 0) != (err != nil) {
		t.Errorf("%s prints %s and ends with %v", command, b, err)
	}
	return string(b), e.Code, time.Since(begin)
}

func TestVersionNeedsNoAgent(t *testing.T) {
	out, code, _ := plugin(t, "sriov", "VERSION", t.TempDir())
	for _, v := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		if code != 0 || !strings.Contains(out, `"`+v+`"`) {
			t.Errorf("VERSION prints %s", out)
		}
	}
}

// Whatever an error says, and whatever the configuration is, what is printed is JSON.
func TestErrorsAreJSON(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		msg := string(rapid.SliceOf(rapid.Byte()).Draw(t, "message"))
		version := rapid.OneOf(rapid.Just("0.4.0"), rapid.StringMatching(`[ -~]*`)).Draw(t, "version")
		out, failed := fail(wire.Request{Stdin: []byte(`{"name":"blue", "cniVersion" : "` + version + `"}`)}, codeTryAgain, msg)
		var e struct {
			CNIVersion, Msg string
			Code            int
		}
		if err := json.Unmarshal(out, &e); err != nil || !failed || e.Code != 11 {
			t.Fatalf("%s: %v", out, err)
		}
		if version == "0.4.0" && e.CNIVersion != version || e.CNIVersion == "" {
			t.Errorf("cniVersion %q for %q", e.CNIVersion, version)
		}
		if printable := strings.Trim(msg, "\"\\"); strings.Map(func(r rune) rune {
			if r < ' ' || r == '\ufffd' {
				return -1
			}
			return r
		}, msg) == msg && !strings.Contains(e.Msg, printable) {
			t.Errorf("%q became %q", msg, e.Msg)
		}
	})
}

// agents are ways in which an agent can be away.
var agents = map[string]func(t *testing.T, socket string){
	"no socket": func(*testing.T, string) {},
	"dead": func(t *testing.T, socket string) {
		l := listen(t, socket)
		l.SetUnlinkOnClose(false)
		l.Close()
	},
	"hanging": func(t *testing.T, socket string) { listen(t, socket) },
	"dying": func(t *testing.T, socket string) {
		l := listen(t, socket)
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				var req wire.Request
				_ = wire.Decode(conn, &req)
				_, _ = conn.Write([]byte{wire.Ack})
				conn.Close()
			}
		}()
	},
}

func listen(t *testing.T, socket string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestAgentAway(t *testing.T) {
	for name, agent := range agents {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			agent(t, filepath.Join(dir, "sock"))
			queued := func() []string {
				files, _ := filepath.Glob(filepath.Join(dir, "queue", "*"))
				return files
			}
			// A moment ago an agent was there: another may be starting.
			_, err := os.Stat(filepath.Join(dir, "sock"))
			if out, code, _ := plugin(t, "sluice-cni", "STATUS", dir); err == nil && code != 0 {
				t.Errorf("STATUS of a node whose agent restarts: code %d: %s", code, out)
			}
			long := time.Now().Add(-2 * wire.RestartTimeout)
			_ = os.Chtimes(filepath.Join(dir, "sock"), long, long)
			for command, want := range map[string]int{"ADD": 11, "CHECK": 11, "GC": 11, "STATUS": 50} {
				out, code, took := plugin(t, "sluice-cni", command, dir)
				if code != want || took > wire.ServeTimeout || !strings.Contains(out, "agent") {
					t.Errorf("%s: code %d after %v: %s", command, code, took, out)
				}
			}
			if files := queued(); len(files) != 0 {
				t.Errorf("queued: %v", files)
			}
			for range 2 {
				if out, code, _ := plugin(t, "sriov", "DEL", dir); code != 0 || out != "" {
					t.Errorf("DEL: code %d: %s", code, out)
				}
			}
			files := queued()
			if len(files) != 1 {
				t.Fatalf("queued: %v", files)
			}
			b, err := os.ReadFile(files[0])
			if err != nil {
				t.Fatal(err)
			}
			var req wire.Request
			if err := wire.Decode(bytes.NewReader(b), &req); err != nil || req.Command != "DEL" || req.ContainerID != "c1" || string(req.Stdin) != stdin {
				t.Errorf("queued %s, %v", b, err)
			}
		})
	}
}

func TestDelIsNeverSilentlyLost(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "queue"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code, _ := plugin(t, "sriov", "DEL", dir); code != 11 || !strings.Contains(out, "queue the DEL: ") {
		t.Errorf("code %d: %s", code, out)
	}
}

// TestRoundTrip checks what the agent gets: the call, and the namespace itself.
func TestRoundTrip(t *testing.T) {
	dir := t.TempDir()
	l := listen(t, filepath.Join(dir, "sock"))
	got := make(chan string, 1)
	go func() {
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer conn.Close()
		first, rights := make([]byte, 4), make([]byte, syscall.CmsgSpace(4))
		n, rn, _, _, _ := conn.ReadMsgUnix(first, rights)
		messages, _ := syscall.ParseSocketControlMessage(rights[:rn])
		var st syscall.Stat_t
		if len(messages) == 1 {
			fds, _ := syscall.ParseUnixRights(&messages[0])
			_ = syscall.Fstat(fds[0], &st)
			syscall.Close(fds[0])
		}
		var req wire.Request
		err = wire.Decode(&prefixed{first[:n], conn}, &req)
		got <- fmt.Sprintf("%d %s %s %s %v", st.Ino, req.Command, req.Args, req.Stdin, err)
		_, _ = conn.Write([]byte{wire.Ack})
		frame, _ := wire.Encode(wire.Response{Stdout: []byte(`{"cniVersion":"1.0.0","ips":[]}`)})
		_, _ = conn.Write(frame)
	}()
	out, code, took := plugin(t, "sriov", "ADD", dir)
	var st syscall.Stat_t
	if err := syscall.Stat("/proc/self/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%d ADD K=V %s <nil>", st.Ino, stdin); code != 0 || out != `{"cniVersion":"1.0.0","ips":[]}` || <-got != want {
		t.Errorf("code %d, %s", code, out)
	}
	t.Logf("took %v", took)
}

// prefixed reads what was read already, then the connection.
type prefixed struct {
	first []byte
	conn  *net.UnixConn
}

func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.first) > 0 {
		n := copy(b, p.first)
		p.first = p.first[n:]
		return n, nil
	}
	return p.conn.Read(b)
}

// TestSmall holds the reason for this program's style: a runtime starts it for
// every interface of every pod.
func TestSmall(t *testing.T) {
	exe := filepath.Join(t.TempDir(), "sluice-cni")
	c := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", exe, ".")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	st, err := os.Stat(exe)
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() > 1800<<10 {
		t.Errorf("the program has %d bytes: what made it grow?", st.Size())
	}
}
