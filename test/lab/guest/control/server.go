package control

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// Server serves requests in a guest.
type Server struct {
	// SetUp sets the machine up.
	SetUp func(Setup) error
}

// Serve serves one line until it closes or ctx ends. A command still running
// then is killed with everything it started.
func (s *Server) Serve(ctx context.Context, line io.ReadWriter) error {
	w := &frameWriter{w: line}
	r := frameReader{bufio.NewReader(line)}
	if _, err := io.WriteString(line, greeting); err != nil {
		return err
	}
	var run *running
	defer func() {
		if run != nil {
			run.cancel()
			_ = run.in.CloseWithError(io.ErrUnexpectedEOF)
			<-run.done
		}
	}()
	for {
		f, err := r.next()
		if err != nil {
			return err
		}
		switch f.kind {
		case frameHello:
			if _, err := io.WriteString(line, greeting); err != nil {
				return err
			}
		case frameRequest:
			if run != nil {
				<-run.done
			}
			var req request
			if err := json.Unmarshal(f.payload, &req); err != nil {
				return fmt.Errorf("decode request: %w", err)
			}
			run = s.start(ctx, req, w)
		case frameInput:
			if run != nil {
				_, _ = run.in.Write(f.payload) // fails when nobody wants it any more
			}
		case frameEnd:
			if run != nil {
				_ = run.in.Close()
			}
		case frameSignal:
			if run != nil && len(f.payload) == 1 {
				run.signal(syscall.Signal(f.payload[0]))
			}
		}
	}
}

// running is a request being served.
type running struct {
	in     *io.PipeWriter
	done   chan struct{}
	cancel context.CancelFunc

	mu      sync.Mutex
	pid     int            // leader of the command's session, while it lives
	pending syscall.Signal // came before the command had started
}

func (r *running) signal(sig syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pid == 0 {
		r.pending = sig
		return
	}
	_ = syscall.Kill(-r.pid, sig) // it may just have ended
}

func (r *running) setPID(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pid = pid
	if pid != 0 && r.pending != 0 {
		_ = syscall.Kill(-pid, r.pending)
	}
}

func (s *Server) start(ctx context.Context, req request, w *frameWriter) *running {
	ctx, cancel := context.WithCancel(ctx)
	in, pw := io.Pipe()
	run := &running{in: pw, done: make(chan struct{}), cancel: cancel}
	go func() {
		defer close(run.done)
		defer cancel()
		var res result
		status, err := s.serve(ctx, req, in, w, run)
		_ = in.CloseWithError(io.ErrClosedPipe) // input that still comes is dropped
		res.Status = status
		if err != nil {
			res.Error = err.Error()
		}
		_ = w.putJSON(frameResult, res) // to a client that has gone, if it fails
	}()
	return run
}

func (s *Server) serve(ctx context.Context, req request, in io.Reader, w *frameWriter, run *running) (int, error) {
	switch req.Op {
	case opExec:
		return execute(ctx, req, in, w, run)
	case opPut:
		return 0, put(in, req.Path, fs.FileMode(req.Mode))
	case opUntar:
		return 0, untar(in, req.Path)
	case opGet:
		return 0, get(req.Path, stream{w, frameOut})
	case opSetup:
		return 0, s.SetUp(*req.Setup)
	}
	return 0, fmt.Errorf("serve request %q: no such operation", req.Op)
}

func execute(ctx context.Context, req request, in io.Reader, w *frameWriter, run *running) (int, error) {
	if len(req.Args) == 0 {
		return 0, errors.New("run a command: no arguments")
	}
	cmd := exec.CommandContext(ctx, req.Args[0], req.Args[1:]...)
	cmd.Dir = req.Dir
	cmd.Env = append(os.Environ(), req.Env...)
	cmd.Stdout, cmd.Stderr = stream{w, frameOut}, stream{w, frameErr}
	if req.Merge {
		cmd.Stderr = cmd.Stdout
	}
	// A session of its own, so that a signal reaches all that the command started.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A background child may keep the output open; the command has ended all the same.
	cmd.WaitDelay = time.Second
	// Not cmd.Stdin: Wait would wait for the end of the client's input.
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return 0, fmt.Errorf("make the input pipe: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start %s: %w", req.Args[0], err)
	}
	run.setPID(cmd.Process.Pid)
	go func() {
		_, _ = io.Copy(stdin, in) // a command need not read all of its input
		_ = stdin.Close()
	}()
	err = cmd.Wait()
	run.setPID(0)
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case err == nil || errors.Is(err, exec.ErrWaitDelay) || errors.As(err, &exit):
		status := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if status.Signaled() {
			return 128 + int(status.Signal()), nil
		}
		return status.ExitStatus(), nil
	}
	return 0, fmt.Errorf("run %s: %w", req.Args[0], err)
}

func put(in io.Reader, path string, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	// A rename, because a program that is running cannot be written to.
	tmp, err := os.CreateTemp(filepath.Dir(path), ".put-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }() // not there after the rename
	if _, err := io.Copy(tmp, in); err != nil {
		tmp.Close()
		return fmt.Errorf("receive %s: %w", path, err)
	}
	if err := errors.Join(tmp.Chmod(mode), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

func get(path string, w io.Writer) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

// untar unpacks directories, files and symbolic links. The archive comes from
// the host that owns the guest, so paths are not checked for escapes.
func untar(in io.Reader, dir string) error {
	for tr := tar.NewReader(in); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			_, err := io.Copy(io.Discard, in) // the archive's padding
			return err
		}
		if err != nil {
			return fmt.Errorf("unpack below %s: %w", dir, err)
		}
		path := filepath.Join(dir, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, h.FileInfo().Mode().Perm())
		case tar.TypeSymlink:
			if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
				_ = os.Remove(path)
				err = os.Symlink(h.Linkname, path)
			}
		case tar.TypeReg:
			err = put(tr, path, h.FileInfo().Mode().Perm())
		}
		if err != nil {
			return fmt.Errorf("unpack %s: %w", h.Name, err)
		}
	}
}
