package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/test/lab/guest/control"
)

// machine is a guest of either kind.
type machine struct {
	spec Spec
	proc *process        // nil if another process started the guest
	line *control.Client // nil if commands go over the network
	hold *control.Client // the control line of a guest that is to end with us
}

// startLimit bounds a start, on a machine that does much else.
var startLimit = map[Kind]time.Duration{UML: time.Minute, QEMU: 4 * time.Minute}

// Start boots a guest and returns when it is set up and runs commands. An
// error carries the end of the console and the likely cause; then nothing of
// the guest is left but its console log.
func Start(ctx context.Context, spec Spec) (Guest, error) {
	if spec.Memory == 0 {
		spec.Memory = 1024
	}
	if spec.Number < 1 || spec.Number > 99 {
		return nil, fmt.Errorf("start guest %s: number %d is not between 1 and 99", spec.Name, spec.Number)
	}
	dir, err := filepath.Abs(spec.Dir)
	if err != nil {
		return nil, err
	}
	spec.Dir = dir
	if err := os.MkdirAll(spec.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the directory of guest %s: %w", spec.Name, err)
	}
	if err := Sweep(spec.Dir); err != nil {
		return nil, fmt.Errorf("clear the directory of guest %s: %w", spec.Name, err)
	}
	if err := check(spec); err != nil {
		return nil, fmt.Errorf("start guest %s: %w", spec.Name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit[spec.Kind])
	defer cancel()
	m := &machine{spec: spec}
	if err := m.start(ctx); err != nil {
		err = failure(spec.Name, spec.Dir, err)
		return nil, errors.Join(err, m.Stop(context.WithoutCancel(ctx)))
	}
	return m, nil
}

// check finds out beforehand what a guest could only fail of obscurely.
func check(s Spec) error {
	if s.Kind != UML && s.Kind != QEMU {
		return fmt.Errorf("kind %q is neither %q nor %q", s.Kind, UML, QEMU)
	}
	for _, f := range []struct{ what, path string }{
		{"program", s.Parts.Program}, {"kernel", s.Parts.Kernel}, {"initramfs", s.Parts.Initrd}, {"modules' image", s.Parts.Modules},
		{"root image", s.Root}, {"directory of files", s.Files},
	} {
		if f.path == "" {
			continue
		}
		if _, err := os.Stat(f.path); err != nil {
			return fmt.Errorf("find its %s: %w; remove the cache directory it is in, and start again", f.what, err)
		}
	}
	return InNetns(s.Net.Namespace, func() error {
		for _, tap := range []string{s.Net.Mgmt, s.Net.Data[0], s.Net.Data[1]} {
			if tap == "" {
				continue
			}
			if _, err := os.Stat("/dev/net/tun"); err != nil {
				return fmt.Errorf("use tap %s: %w; load the host's tun module, or make the device (character, 10:200)", tap, err)
			}
			// Opening a tap that is not there would make one, joined to nothing.
			if _, err := net.InterfaceByName(tap); err != nil {
				return fmt.Errorf("find tap %s in network namespace %q: %w; start the lab's network first", tap, s.Net.Namespace, err)
			}
		}
		return nil
	})
}

func (m *machine) start(ctx context.Context) error {
	boot := m.bootUML
	if m.spec.Kind == QEMU {
		boot = m.bootQEMU
	}
	if err := boot(ctx); err != nil {
		return err
	}
	if err := m.line.Setup(ctx, m.setup()); err != nil {
		return fmt.Errorf("set up: %w", m.orEnded(err))
	}
	if m.networked() {
		// From here on over the network, as everyone does who comes later.
		if m.spec.Attached {
			m.hold = m.line
		} else {
			m.line.Close()
		}
		m.line = nil
		if err := m.reach(ctx); err != nil {
			return err
		}
	}
	if m.spec.Files != "" && m.spec.Kind == QEMU {
		err := m.with(ctx, func(c *control.Client) error { return c.PutTree(ctx, m.spec.Files, "/host") })
		if err != nil {
			return fmt.Errorf("copy %s to /host: %w", m.spec.Files, err)
		}
	}
	if m.spec.Start != "" {
		if _, err := m.Run(ctx, "setsid "+m.spec.Start+" > /var/log/start.log 2>&1 < /dev/null &"); err != nil {
			return fmt.Errorf("run %s: %w", m.spec.Start, err)
		}
	}
	return nil
}

// setup is what guestd is told.
func (m *machine) setup() control.Setup {
	s := control.Setup{Name: m.spec.Name, Time: time.Now().UnixNano(), Linger: !m.spec.Attached && m.networked()}
	if n := m.spec.Net; m.networked() {
		s.Address = n.Address.String()
		s.Listen = netip.AddrPortFrom(n.Address.Addr(), Port).String()
		if n.Gateway.IsValid() {
			s.Gateway = n.Gateway.String()
		}
	}
	if m.spec.Kind == UML {
		m.setupUML(&s)
	}
	for _, name := range m.spec.Modules {
		s.Cards = append(s.Cards, control.Module{Name: name})
	}
	return s
}

func (m *machine) networked() bool { return m.spec.Net.Mgmt != "" }

// greet waits until guestd greets on the control line, or the guest ends.
func (m *machine) greet(ctx context.Context, line *os.File, ask bool) error {
	stop := context.AfterFunc(ctx, func() { _ = line.SetDeadline(time.Now()) })
	defer stop()
	go func() {
		<-m.proc.ended
		_ = line.SetDeadline(time.Now())
	}()
	c, err := control.Connect(line, ask)
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("boot: %w", m.orEnded(err))
	}
	m.line = c
	return nil
}

// orEnded says of an error that the guest had ended, if so.
func (m *machine) orEnded(err error) error {
	if m.hasEnded(err) {
		return fmt.Errorf("the guest ended (%w)", err)
	}
	return err
}

// hasEnded tells whether the guest ended, which its own process knows a little
// later than a line that it closes.
func (m *machine) hasEnded(err error) bool {
	if m.proc == nil {
		return !Alive(m.spec.Dir)
	}
	grace := 50 * time.Millisecond
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
		grace = 5 * time.Second
	}
	select {
	case <-m.proc.ended:
		return true
	case <-time.After(grace):
		return false
	}
}

// reach waits until the guest answers on its management network.
func (m *machine) reach(ctx context.Context) error {
	for {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		c, err := m.dial(try)
		cancel()
		if err == nil {
			c.Close()
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("reach it over the management network: %w", m.orEnded(err))
		}
		select {
		case <-ctx.Done():
		case <-m.ended():
			return fmt.Errorf("reach it over the management network: %w", m.orEnded(err))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ended is closed when a guest that this process started has ended.
func (m *machine) ended() <-chan struct{} {
	if m.proc == nil {
		return nil
	}
	return m.proc.ended
}

// dial connects over the management network. A guest that runs answers within
// milliseconds; TCP by itself would try for two minutes.
func (m *machine) dial(ctx context.Context) (*control.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	address := netip.AddrPortFrom(m.spec.Net.Address.Addr(), Port).String()
	var conn net.Conn
	err := InNetns(m.spec.Net.Namespace, func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", address)
		return err
	})
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	c, err := control.Connect(conn, false)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return c, nil
}

// Attach returns the guest that another process started with the same spec
// and a network, without asking whether it still runs ([Alive] tells).
func Attach(spec Spec) Guest { return &machine{spec: spec} }

// with runs f with a client: the control line of a bare guest, else a
// connection of its own, so that many commands can run at a time.
func (m *machine) with(ctx context.Context, f func(*control.Client) error) error {
	if m.line != nil {
		return m.explain(f(m.line))
	}
	if m.proc == nil && !Alive(m.spec.Dir) {
		return failure(m.spec.Name, m.spec.Dir, errors.New("the guest does not run"))
	}
	c, err := m.dial(ctx)
	if err != nil {
		return m.explain(fmt.Errorf("connect: %w", err))
	}
	defer c.Close()
	return m.explain(f(c))
}

// explain adds the console to an error that came because the guest ended.
func (m *machine) explain(err error) error {
	if err == nil || !m.hasEnded(err) {
		return err
	}
	return failure(m.spec.Name, m.spec.Dir, fmt.Errorf("the guest ended (%w)", err))
}

func (m *machine) Name() string { return m.spec.Name }

// runLimit bounds what Run keeps of an output, in bytes.
const runLimit = 16 << 20

func (m *machine) Run(ctx context.Context, script string) (string, error) {
	var out bytes.Buffer
	err := m.exec(ctx, Command{Args: []string{"/bin/sh", "-c", script}, Stdout: &limited{w: &out, left: runLimit}}, true)
	var exit *ExitError
	if errors.As(err, &exit) {
		exit.Output = out.String()
	}
	return out.String(), err
}

// limited passes on the first bytes and drops the rest.
type limited struct {
	w    io.Writer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	n := min(len(p), l.left)
	l.left -= n
	if _, err := l.w.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (m *machine) Exec(ctx context.Context, cmd Command) error { return m.exec(ctx, cmd, false) }

func (m *machine) exec(ctx context.Context, cmd Command, merge bool) error {
	if cmd.Dir == "" {
		cmd.Dir = "/root"
	}
	var status int
	err := m.with(ctx, func(c *control.Client) (err error) {
		status, err = c.Exec(ctx, cmd.Args, cmd.Dir, cmd.Env, control.Streams{In: cmd.Stdin, Out: cmd.Stdout, Err: cmd.Stderr, Merge: merge, Signals: cmd.Signals})
		return err
	})
	if err != nil {
		return fmt.Errorf("run in %s: %w", m.spec.Name, err)
	}
	if status != 0 {
		return &ExitError{Status: status}
	}
	return nil
}

func (m *machine) Put(ctx context.Context, r io.Reader, mode fs.FileMode, path string) error {
	if err := m.with(ctx, func(c *control.Client) error { return c.Put(ctx, r, mode, path) }); err != nil {
		return fmt.Errorf("put %s into %s: %w", path, m.spec.Name, err)
	}
	return nil
}

func (m *machine) PutTree(ctx context.Context, from, to string) error {
	if err := m.with(ctx, func(c *control.Client) error { return c.PutTree(ctx, from, to) }); err != nil {
		return fmt.Errorf("put %s into %s: %w", from, m.spec.Name, err)
	}
	return nil
}

func (m *machine) Get(ctx context.Context, path string, w io.Writer) error {
	if err := m.with(ctx, func(c *control.Client) error { return c.Get(ctx, path, w) }); err != nil {
		return fmt.Errorf("get %s from %s: %w", path, m.spec.Name, err)
	}
	return nil
}

func (m *machine) ConsoleTail(n int) string { return consoleTail(m.spec.Dir, n) }

func (m *machine) Stop(context.Context) error {
	for _, line := range []*control.Client{m.line, m.hold} {
		if line != nil {
			line.Close()
		}
	}
	m.line, m.hold = nil, nil
	// Nothing in a guest needs to be saved, so it is not asked to shut down.
	if err := Sweep(m.spec.Dir); err != nil {
		return fmt.Errorf("stop guest %s: %w", m.spec.Name, err)
	}
	return nil
}

// socketPair makes a control line: our end and the guest's.
func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make the control line: %w", err)
	}
	if err := syscall.SetNonblock(fds[0], true); err != nil { // for deadlines
		return nil, nil, fmt.Errorf("make the control line: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "control line"), os.NewFile(uintptr(fds[1]), "control line"), nil
}

// command is the process of a guest; extra files are 3 and up.
func command(program string, args []string, extra ...*os.File) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.ExtraFiles = extra
	return cmd
}
