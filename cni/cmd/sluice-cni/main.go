// Command sluice-cni is the CNI plugin as the container runtime sees it: it
// hands each call to the Sluice agent of the node over a unix socket and prints
// the agent's answer. It can be installed under other names, such as "sriov".
//
// Without an agent ADD, CHECK and GC fail with code 11 (try again later). DEL is
// written to a queue that the agent works off, and succeeds once it is on the disk:
// pods must end also where an agent is gone for long, and what they had is free only
// when the agent has done the DEL. STATUS fails with code 50 (not available) when the
// agent has been away for longer than a restart takes: runtimes take a node whose
// STATUS fails for not ready.
//
// The environment variables SLUICE_CNI_SOCKET and SLUICE_CNI_DEL_QUEUE replace
// the built-in paths.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/durable"
)

// Codes of the CNI specification.
const (
	codeEnvironment  = 4
	codeIO           = 5
	codeTryAgain     = 11
	codeNotAvailable = 50
)

func main() {
	out, failed := run(os.Getenv, os.Stdin)
	if _, err := os.Stdout.Write(out); err != nil || failed {
		os.Exit(1)
	}
}

// run answers one call.
func run(getenv func(string) string, stdin io.Reader) (out []byte, failed bool) {
	req := wire.Request{
		Command: getenv("CNI_COMMAND"), ContainerID: getenv("CNI_CONTAINERID"), Netns: getenv("CNI_NETNS"),
		IfName: getenv("CNI_IFNAME"), Args: getenv("CNI_ARGS"), Path: getenv("CNI_PATH"),
	}
	var err error
	if req.Stdin, err = io.ReadAll(stdin); err != nil {
		return fail(req, codeIO, "read standard input: "+err.Error())
	}
	switch req.Command {
	case "VERSION":
		return version(), false
	case "ADD", "DEL", "CHECK", "STATUS", "GC":
	case "":
		return fail(req, codeEnvironment, "CNI_COMMAND is not set: this program is run by a container runtime")
	default:
		return fail(req, codeEnvironment, "CNI_COMMAND "+req.Command+" is unknown")
	}
	resp, err := call(cmp.Or(getenv("SLUICE_CNI_SOCKET"), wire.Socket), req)
	if err == nil {
		return resp.Stdout, resp.Failed
	}
	msg := "reach the Sluice agent: " + err.Error()
	switch req.Command {
	case "STATUS":
		if restarting(cmp.Or(getenv("SLUICE_CNI_SOCKET"), wire.Socket)) {
			return nil, false
		}
		return fail(req, codeNotAvailable, msg)
	case "DEL":
		dir := cmp.Or(getenv("SLUICE_CNI_DEL_QUEUE"), wire.DelQueue)
		if err := enqueue(dir, req); err != nil {
			return fail(req, codeTryAgain, msg+"; queue the DEL: "+err.Error())
		}
		fmt.Fprintln(os.Stderr, msg+"; the DEL is queued for it in", dir) // runtimes log it
		return nil, false
	}
	return fail(req, codeTryAgain, msg)
}

// version answers VERSION without the agent: a runtime asks before the agent's
// first start.
func version() []byte {
	return []byte(`{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}` + "\n")
}

// fail prints an error as the CNI specification wants it.
func fail(req wire.Request, code int, msg string) ([]byte, bool) {
	var conf struct {
		CNIVersion string `json:"cniVersion"`
	}
	_ = json.Unmarshal(req.Stdin, &conf)
	out, _ := json.Marshal(map[string]any{"cniVersion": cmp.Or(conf.CNIVersion, "1.1.0"), "code": code, "msg": msg})
	return append(out, '\n'), true
}

// call hands the request to the agent. It uses the socket's own time-outs: the
// net package would double the size of the program.
func call(path string, req wire.Request) (wire.Response, error) {
	var resp wire.Response
	frame, err := wire.Encode(req)
	if err != nil {
		return resp, err
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return resp, fmt.Errorf("open socket: %w", err)
	}
	s := socket(fd)
	defer syscall.Close(fd)
	if err := errors.Join(s.timeout(syscall.SO_SNDTIMEO, wire.AckTimeout), s.timeout(syscall.SO_RCVTIMEO, wire.AckTimeout)); err != nil {
		return resp, err
	}
	if err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		return resp, fmt.Errorf("connect to %s: %w", path, err)
	}
	if err := s.send(frame, req.Netns); err != nil {
		return resp, fmt.Errorf("send to %s: %w", path, err)
	}
	var ack [1]byte
	if _, err := io.ReadFull(s, ack[:]); err != nil {
		return resp, fmt.Errorf("wait for %s to take the request: %w", path, err)
	}
	if err := s.timeout(syscall.SO_RCVTIMEO, wire.AnswerTimeout); err != nil {
		return resp, err
	}
	if err := wire.Decode(s, &resp); err != nil {
		return resp, fmt.Errorf("wait for the answer from %s: %w", path, err)
	}
	return resp, nil
}

// socket is a connected stream socket.
type socket int

func (s socket) timeout(option int, d time.Duration) error {
	tv := syscall.NsecToTimeval(d.Nanoseconds())
	return os.NewSyscallError("setsockopt", syscall.SetsockoptTimeval(int(s), syscall.SOL_SOCKET, option, &tv))
}

// send writes the frame, and with its first byte the network namespace at the
// path, if there is one. The agent may not see the path: it has mounts of its own.
func (s socket) send(frame []byte, netns string) error {
	var rights []byte
	if netns != "" {
		if ns, err := syscall.Open(netns, syscall.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0); err == nil {
			defer syscall.Close(ns)
			rights = syscall.UnixRights(ns)
		}
	}
	for len(frame) > 0 {
		n, err := syscall.SendmsgN(int(s), frame, rights, nil, syscall.MSG_NOSIGNAL)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		frame, rights = frame[n:], nil
	}
	return nil
}

// Read implements io.Reader.
func (s socket) Read(b []byte) (int, error) {
	for {
		n, err := syscall.Read(int(s), b)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.EAGAIN):
			return 0, os.ErrDeadlineExceeded
		case err != nil:
			return 0, err
		case n == 0 && len(b) > 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// restarting tells whether an agent was there so lately that it may just be followed
// by another: while it serves it keeps the socket's time of change new.
func restarting(socket string) bool {
	var st syscall.Stat_t
	return syscall.Stat(socket, &st) == nil && time.Since(time.Unix(st.Mtim.Unix())) < wire.RestartTimeout
}

// enqueue leaves a DEL for the agent.
func enqueue(dir string, req wire.Request) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	b, err := json.Marshal(req)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, wire.QueueName(req)), b)
}
