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
//
// A runtime starts this program for each interface of each pod, so its start is most of
// what it costs: it imports little.
package main

import (
	"cmp"
	"errors"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/durable"
)

// Codes of the CNI specification, in digits.
const (
	codeEnvironment  = "4"
	codeIO           = "5"
	codeTryAgain     = "11"
	codeNotAvailable = "50"
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
	frame, err := wire.Encode(req)
	if err != nil {
		return fail(req, codeIO, "hand the call to the Sluice agent: "+err.Error())
	}
	path := cmp.Or(getenv("SLUICE_CNI_SOCKET"), wire.Socket)
	resp, err := call(path, req.Netns, frame)
	if err == nil {
		return resp.Stdout, resp.Failed
	}
	msg := "reach the Sluice agent: " + err.Error()
	switch req.Command {
	case "STATUS":
		if restarting(path) {
			return nil, false
		}
		return fail(req, codeNotAvailable, msg)
	case "DEL":
		dir := cmp.Or(getenv("SLUICE_CNI_DEL_QUEUE"), wire.DelQueue)
		if err := errors.Join(os.MkdirAll(dir, 0o700), durable.WriteFile(dir+"/"+wire.QueueName(req), frame)); err != nil {
			return fail(req, codeTryAgain, msg+"; queue the DEL: "+err.Error())
		}
		_, _ = os.Stderr.WriteString(msg + "; the DEL is queued for it in " + dir + "\n") // runtimes log it
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
func fail(req wire.Request, code, msg string) ([]byte, bool) {
	return []byte(`{"cniVersion":"` + versionOf(string(req.Stdin)) + `","code":` + code + `,"msg":` + quote(msg) + "}\n"), true
}

// versionOf is the cniVersion that a configuration has first, of our newest where that is
// none.
func versionOf(config string) string {
	_, rest, _ := strings.Cut(config, `"cniVersion"`)
	_, rest, _ = strings.Cut(rest, `"`)
	version, _, _ := strings.Cut(rest, `"`)
	if version == "" || strings.Trim(version, "0123456789.") != "" {
		return "1.1.0"
	}
	return version
}

// quote writes a JSON string (RFC 8259, section 7).
func quote(s string) string {
	b := []byte{'"'}
	for _, c := range strings.ToValidUTF8(s, "?") {
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', byte(c))
		case c < ' ':
			b = append(b, ' ')
		default:
			b = append(b, string(c)...)
		}
	}
	return string(append(b, '"'))
}

// call hands the request to the agent. The net package would double the size of the program.
func call(path, netns string, frame []byte) (resp wire.Response, err error) {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return resp, doing("open socket", err)
	}
	if err := connect(fd, path, netns, frame); err != nil {
		return resp, errors.Join(err, syscall.Close(fd))
	}
	// Waited for by the runtime's poller: a thread that waits in a system call is looked
	// after by the runtime's monitor, at first fifty times a millisecond.
	s := os.NewFile(uintptr(fd), path)
	defer s.Close()
	var ack [1]byte
	err = s.SetReadDeadline(time.Now().Add(wire.AckTimeout))
	if err == nil {
		_, err = io.ReadFull(s, ack[:])
	}
	if err != nil {
		return resp, doing("wait for it to take the request", err)
	}
	err = s.SetReadDeadline(time.Now().Add(wire.AnswerTimeout))
	if err == nil {
		err = wire.Decode(s, &resp)
	}
	if err != nil {
		return resp, doing("wait for its answer", err)
	}
	return resp, nil
}

// connect sends the frame to the socket at path, and with its first byte the network
// namespace at its path, if there is one. The agent may not see that path: it has mounts
// of its own. The socket does not block afterwards.
func connect(fd int, path, netns string, frame []byte) error {
	tv := syscall.NsecToTimeval(wire.AckTimeout.Nanoseconds())
	if err := syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &tv); err != nil {
		return doing("set time-out", err)
	}
	if err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		return doing("connect to "+path, err)
	}
	var rights []byte
	if netns != "" {
		if ns, err := syscall.Open(netns, syscall.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0); err == nil {
			defer syscall.Close(ns)
			rights = syscall.UnixRights(ns)
		}
	}
	for len(frame) > 0 {
		n, err := syscall.SendmsgN(fd, frame, rights, nil, syscall.MSG_NOSIGNAL)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return doing("send to "+path, err)
		}
		frame, rights = frame[n:], nil
	}
	return doing("set non-blocking", syscall.SetNonblock(fd, true))
}

func doing(what string, err error) error {
	if err == nil {
		return nil
	}
	return errors.New(what + ": " + err.Error())
}

// restarting tells whether an agent was there so lately that it may just be followed
// by another: while it serves it keeps the socket's time of change new.
func restarting(socket string) bool {
	var st syscall.Stat_t
	return syscall.Stat(socket, &st) == nil && time.Since(time.Unix(st.Mtim.Unix())) < wire.RestartTimeout
}
