package control

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// connect joins a client to a server that runs on this machine.
func connect(t *testing.T, noise string) *Client {
	t.Helper()
	host, guest := net.Pipe()
	t.Cleanup(func() { host.Close(); guest.Close() })
	go func() {
		guest.Write([]byte(noise))
		(&Server{SetUp: func(s Setup) error { return errors.New("set up " + s.Name) }}).Serve(context.Background(), guest)
	}()
	c, err := Connect(host, false)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestExec(t *testing.T) {
	c := connect(t, "boot noise \x00sluice \x00\x00")
	for _, tt := range []struct {
		name     string
		script   string
		in       string
		merge    bool
		status   int
		out, err string
	}{
		{"output", "echo a; echo b >&2", "", false, 0, "a\n", "b\n"},
		{"merged", "echo a; echo b >&2; echo c", "", true, 0, "a\nb\nc\n", ""},
		{"status", "exit 7", "", false, 7, "", ""},
		{"signal", "kill -9 $$", "", false, 137, "", ""},
		{"input", "cat", strings.Repeat("x", 3*maxFrame), false, 0, strings.Repeat("x", 3*maxFrame), ""},
		{"input not read", "echo done", strings.Repeat("x", 3*maxFrame), false, 0, "done\n", ""},
		{"after that", "cat; echo end", "", false, 0, "end\n", ""},
		{"background child", "sleep 5 & echo started", "", false, 0, "started\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out, errs bytes.Buffer
			status, err := c.Exec(t.Context(), []string{"/bin/sh", "-c", tt.script}, "/", nil,
				Streams{In: strings.NewReader(tt.in), Out: &out, Err: &errs, Merge: tt.merge})
			if err != nil {
				t.Fatal(err)
			}
			if status != tt.status || out.String() != tt.out || errs.String() != tt.err {
				t.Errorf("status %d, %d bytes of output %.20q, error output %q; want %d, %d bytes %.20q, %q",
					status, out.Len(), out.String(), errs.String(), tt.status, len(tt.out), tt.out, tt.err)
			}
		})
	}
}

func TestExecFails(t *testing.T) {
	c := connect(t, "")
	_, err := c.Exec(t.Context(), []string{"/no/such/program"}, "/", nil, Streams{})
	if err == nil || !strings.Contains(err.Error(), "start /no/such/program") {
		t.Errorf("got %v, want a start error with the program's name", err)
	}
	if err := c.Setup(t.Context(), Setup{Name: "vm1"}); err == nil || !strings.Contains(err.Error(), "set up vm1") {
		t.Errorf("got %v, want the set-up's error", err)
	}
}

func TestSignal(t *testing.T) {
	c := connect(t, "")
	signals := make(chan syscall.Signal, 1)
	signals <- syscall.SIGTERM
	status, err := c.Exec(t.Context(), []string{"/bin/sh", "-c", "sleep 30"}, "/", nil, Streams{Signals: signals})
	if err != nil || status != 128+int(syscall.SIGTERM) {
		t.Errorf("status %d, %v; want %d", status, err, 128+int(syscall.SIGTERM))
	}
}

// A client that gives up ends what it started.
func TestCancelKills(t *testing.T) {
	c := connect(t, "")
	pid := filepath.Join(t.TempDir(), "pid")
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for {
			if b, _ := os.ReadFile(pid); len(b) > 0 {
				cancel()
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	_, err := c.Exec(ctx, []string{"/bin/sh", "-c", "sleep 100 & echo $! > " + pid + "; wait"}, "/", nil, Streams{})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want context.Canceled", err)
	}
	b, _ := os.ReadFile(pid)
	deadline := time.Now().Add(time.Minute)
	for {
		stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(b)) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the command's child still runs")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestFiles(t *testing.T) {
	c := connect(t, "")
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "a", "b")
	big := bytes.Repeat([]byte("0123456789"), 50_000)
	for name, content := range map[string][]byte{"x/big": big, "empty": nil} {
		os.MkdirAll(filepath.Dir(filepath.Join(from, name)), 0o755)
		if err := os.WriteFile(filepath.Join(from, name), content, 0o750); err != nil {
			t.Fatal(err)
		}
	}
	os.Symlink("x/big", filepath.Join(from, "link"))
	if err := c.PutTree(t.Context(), from, to); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(to, "link")); err != nil || !bytes.Equal(got, big) {
		t.Errorf("tree: %d bytes through the link, %v; want %d", len(got), err, len(big))
	}
	if info, err := os.Stat(filepath.Join(to, "empty")); err != nil || info.Mode().Perm() != 0o750 {
		t.Errorf("empty file: %v, %v; want mode 0750", info, err)
	}
	if err := c.Put(t.Context(), bytes.NewReader(big), 0o600, filepath.Join(to, "n/one")); err != nil {
		t.Fatal(err)
	}
	var back bytes.Buffer
	if err := c.Get(t.Context(), filepath.Join(to, "n/one"), &back); err != nil || !bytes.Equal(back.Bytes(), big) {
		t.Errorf("get: %d bytes, %v; want %d", back.Len(), err, len(big))
	}
	if err := c.PutTree(t.Context(), filepath.Join(from, "missing"), to); err == nil {
		t.Error("copying a missing directory gave no error")
	}
}
