package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/go-logr/logr"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/record"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/ipam"
	"github.com/sluice-network/sluice/cni/standalone"
	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/host"
)

// Options are what a Server stands on. All fields but Addresses, Enforcer, Allocated, RDMA and OnStep are needed.
type Options struct {
	Socket    string // path of the unix socket, usually wire.Socket
	StateDir  string // holds the journal (attachments) and the shim's queue (del-queue)
	Kernel    attach.Kernel
	Baselines attach.Baselines
	SriovCNI  string          // see attach.Options
	IPAMDirs  []string        // where IPAM plugins are looked for besides CNI_PATH
	Addresses *ipam.Node      // the agent's own IPAM; nil for none
	Enforcer  attach.Enforcer // of network policy; nil for none
	Log       logr.Logger

	Allocated func(ctx context.Context, pciAddress string) (pod string, ok bool, err error) // see attach.Options
	RDMA      func(pciAddress string) bool                                                  // see attach.Options
	OnStep    func(step string)                                                             // see attach.Options

	// Ready tells why no ADD can work, nil when one can. STATUS tells it when it has
	// lasted. Nil is ready.
	Ready func() error
	// Changes tells where netdevs of the host's namespace changed, as host.Watch does.
	// Nil leaves VFs whose pod died to DEL and to the next look.
	Changes func(context.Context) (<-chan host.Changes, error)

	// Requests counts the kernel's work for the metrics. Nil leaves it out.
	Requests func() host.Requests

	// Events tells pods what becomes of their interfaces. Nil leaves it to the runtime.
	Events record.EventRecorder

	// PodNetworks is what the mode without a meta plugin stands on, of which the
	// server adds what it knows itself. Without an API nothing runs in that mode.
	PodNetworks standalone.Options
}

// parallel is how many calls are worked on at a time. Each may run an IPAM
// plugin, and on a starting node there is a call for every pod.
const parallel = 16

// Server answers CNI calls.
type Server struct {
	socket, queue string
	attacher      *attach.Attacher
	networks      *standalone.Networks
	log           logr.Logger
	slots         *semaphore.Weighted
	changes       func(context.Context) (<-chan host.Changes, error)
	working       sync.Mutex // on the queue
	metrics       metrics
	requests      func() host.Requests
	teller        teller
	waiting       atomic.Int64 // calls that are not answered
}

// New makes a Server and reads the journal, so that Holder is right from the
// start. Run makes it serve.
func New(o Options) (*Server, error) {
	m := newMetrics()
	var plugins attach.IPAM = &attach.HostLocal{Others: attach.ExecIPAM{Dirs: o.IPAMDirs}}
	if o.Addresses != nil {
		plugins = attach.ByType{Own: o.Addresses, Others: plugins}
	}
	a, err := attach.New(attach.Options{
		Kernel: timedKernel{o.Kernel, m}, Baselines: o.Baselines, IPAM: timedIPAM{plugins, m}, Enforcer: timedEnforcer(o.Enforcer, m),
		Dir: filepath.Join(o.StateDir, "attachments"), SriovCNI: o.SriovCNI, Log: o.Log,
		Allocated: o.Allocated, RDMA: o.RDMA, OnStep: o.OnStep, Ready: lasting(o.Ready, time.Now),
	})
	if err == nil && o.Addresses != nil {
		err = o.Addresses.Load(a.Leases)
	}
	if err != nil {
		return nil, err
	}
	s := &Server{
		socket: o.Socket, queue: filepath.Join(o.StateDir, "del-queue"),
		attacher: a, log: o.Log, slots: semaphore.NewWeighted(parallel), changes: o.Changes,
		metrics: m, requests: o.Requests, teller: teller{events: o.Events, now: time.Now, failing: map[failing]failure{}},
	}
	if p := o.PodNetworks; p.API != nil {
		p.Plugin, p.Alive, p.Dirs, p.Dir, p.Log = s.plugin, a.Alive, o.IPAMDirs, filepath.Join(o.StateDir, "pod-networks"), o.Log
		if s.networks, err = standalone.New(p); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Attached returns the settings that the VF was given at its PF for the pod it is
// attached to; ok is false while it is attached to none, or not yet.
func (s *Server) Attached(pciAddress string) (settings host.VFSettings, ok bool) {
	return s.attacher.Attached(pciAddress)
}

// Attachments are the pods that have attachments.
func (s *Server) Attachments() []string { return s.attacher.Attachments() }

// Holder returns the pod that has the VF, as namespace/name, "" when its name is
// not known. It may be called at any time.
func (s *Server) Holder(pciAddress string) (pod string, held bool) {
	return s.attacher.Holder(pciAddress)
}

// Run finishes what an earlier agent left, works off the shim's queue, then
// serves until the context ends and the calls being worked on are answered.
func (s *Server) Run(ctx context.Context) error {
	// What cannot be finished now is held by the journal: DEL, GC, the next ADD on
	// the VF and the next look try again. Other VFs do not wait for it.
	s.tidy(ctx)

	l, err := listen(s.socket)
	if err != nil {
		return fmt.Errorf("serve CNI: %w", err)
	}
	ctx, end := context.WithCancel(ctx)
	var calls sync.WaitGroup
	defer calls.Wait()
	defer end()
	calls.Go(func() { s.keep(ctx) })
	calls.Go(func() { s.beat(ctx) })
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	for {
		conn, err := l.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ECONNABORTED):
			s.log.Error(err, "Cannot accept a CNI call")
			time.Sleep(100 * time.Millisecond)
			continue
		case err != nil:
			return fmt.Errorf("serve CNI: %w", err)
		}
		calls.Go(func() { s.serve(ctx, conn) })
	}
}

// listen opens the socket for root only. The path changes in one step, so that
// a shim finds the old server or the new one, never a socket without a server.
func listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(fresh, 0o600), os.Rename(fresh, path)); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// inOrder does the call after the DEL that was queued for the same interface,
// if there is one: it may have come after the last drain.
func (s *Server) inOrder(ctx context.Context, req wire.Request, ns *host.Netns) ([]byte, error) {
	if req.Command == string(attach.Add) || req.Command == string(attach.Del) {
		if err := s.workOff(ctx, filepath.Join(s.queue, wire.QueueName(req))); err != nil {
			return nil, err
		}
	}
	return s.do(ctx, req, ns)
}

// serve answers one call.
func (s *Server) serve(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	if err := fromRoot(conn); err != nil {
		s.log.Error(err, "Refused a CNI call")
		return
	}
	_ = conn.SetReadDeadline(time.Now().Add(wire.AckTimeout))
	req, ns, err := receive(conn)
	if ns != nil {
		defer ns.Close()
	}
	if err != nil {
		s.log.Error(err, "Cannot read a CNI call")
		return
	}
	// A shim that is gone has told the runtime that the call failed.
	if _, err = conn.Write([]byte{wire.Ack}); err != nil {
		s.log.Info("A CNI caller went away before its call was taken", "command", req.Command, "container", req.ContainerID)
		return
	}
	// The call of an ADD that nobody waits for any more is taken back. All other
	// calls go on: a DEL is wanted, whoever waits for it. The end of the agent
	// does not cut off a call, its deadline does.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), wire.ServeTimeout)
	defer cancel()
	_ = conn.SetReadDeadline(time.Time{})
	if req.Command == string(attach.Add) {
		go func() {
			_, _ = conn.Read(make([]byte, 1)) // ends when either side closes
			cancel()
		}()
	}
	begin := time.Now()
	s.waiting.Add(1)
	out, err := s.limited(ctx, req, ns)
	s.waiting.Add(-1)
	s.metrics.called(req.Command, begin, err)
	s.teller.called(req, err)
	log := s.log.WithValues("command", req.Command, "container", req.ContainerID, "interface", req.IfName, "took", time.Since(begin).String())
	if err != nil {
		log.Error(err, "CNI call failed")
	} else {
		log.V(1).Info("CNI call done")
	}
	frame, encodeErr := wire.Encode(response(req, out, err))
	_ = conn.SetWriteDeadline(time.Now().Add(wire.AckTimeout))
	if encodeErr == nil {
		_, encodeErr = conn.Write(frame)
	}
	if encodeErr != nil && err == nil && req.Command == string(attach.Add) {
		req.Command = string(attach.Del)
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), wire.ServeTimeout)
		defer cancel()
		_, err := s.do(undo, req, ns)
		log.Error(errors.Join(encodeErr, err), "Took back an ADD whose caller went away")
	}
}

// limited does the call when there is a slot for it.
func (s *Server) limited(ctx context.Context, req wire.Request, ns *host.Netns) ([]byte, error) {
	if err := s.slots.Acquire(ctx, 1); err != nil {
		return nil, types.NewError(types.ErrTryAgainLater, fmt.Sprintf("wait for %d other calls: %v", parallel, err), "")
	}
	defer s.slots.Release(1)
	return s.inOrder(ctx, req, ns)
}

// do does the call and returns what the plugin prints.
func (s *Server) do(ctx context.Context, wired wire.Request, ns *host.Netns) (out []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error(nil, "A CNI call panicked", "command", wired.Command, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			out, err = nil, types.NewError(types.ErrInternal, fmt.Sprintf("internal error: %v", p), "")
		}
	}()
	req := attach.Request{
		Command: attach.Command(wired.Command), ContainerID: wired.ContainerID, Netns: wired.Netns,
		IfName: wired.IfName, Args: wired.Args, Path: wired.Path, Stdin: wired.Stdin,
	}
	if s.networks != nil && standalone.Wanted(req.Stdin) {
		return s.networks.Do(ctx, req, ns)
	}
	return s.plugin(ctx, req, ns)
}

// plugin does a call for one interface.
func (s *Server) plugin(ctx context.Context, req attach.Request, ns *host.Netns) ([]byte, error) {
	switch req.Command {
	case attach.Add:
		return s.attacher.Add(ctx, req, ns)
	case attach.Del:
		return nil, s.attacher.Del(ctx, req, ns)
	case attach.Check:
		return nil, s.attacher.Check(ctx, req, ns)
	case attach.Status:
		return nil, s.attacher.Status(ctx, req)
	case attach.GC:
		return nil, s.attacher.GC(ctx, req)
	}
	return nil, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_COMMAND %q is unknown", req.Command), "")
}

// response is the plugin's output in the version the caller speaks.
func response(req wire.Request, out []byte, err error) wire.Response {
	if err == nil {
		return wire.Response{Stdout: out}
	}
	b, _ := json.Marshal(struct {
		CNIVersion string `json:"cniVersion,omitempty"`
		*types.Error
	}{headOf(req).CNIVersion, attach.CNIError(err)})
	return wire.Response{Stdout: b, Failed: true}
}

// head is what every configuration has.
type head struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
}

// headOf reads it, as far as it can be read.
func headOf(req wire.Request) (h head) {
	_ = json.Unmarshal(req.Stdin, &h)
	return h
}

// fromRoot refuses callers that are not root: who can call can move VFs.
func fromRoot(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return fmt.Errorf("ask who calls: %w", credErr)
	}
	if cred.Uid != 0 {
		return fmt.Errorf("caller has user ID %d (process %d), not 0", cred.Uid, cred.Pid)
	}
	return nil
}

// receive reads the request and the network namespace that comes with it. A
// descriptor that is no network namespace is none.
func receive(conn *net.UnixConn) (wire.Request, *host.Netns, error) {
	var req wire.Request
	first, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, rightsLen, flags, _, err := conn.ReadMsgUnix(first, rights)
	if err != nil {
		return req, nil, fmt.Errorf("read message: %w", err)
	}
	if n == 0 {
		return req, nil, io.EOF
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return req, nil, errors.New("read message: it came with more than one descriptor")
	}
	ns := namespace(rights[:rightsLen])
	return req, ns, wire.Decode(io.MultiReader(bytes.NewReader(first[:n]), conn), &req)
}

func namespace(rights []byte) *host.Netns {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil || len(messages) != 1 {
		return nil
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil
	}
	unix.CloseOnExec(fds[0])
	ns, err := host.NetnsFromFD(fds[0], "of the caller")
	if err != nil {
		return nil
	}
	return ns
}
