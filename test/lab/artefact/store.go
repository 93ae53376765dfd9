package artefact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Store is a directory of built artefacts. Its methods may be called by one
// goroutine at a time; any number of processes may share the directory.
type Store struct {
	dir      string
	progress io.Writer
	start    time.Time
	keys     map[*Step]string
	updated  bool // apt's lists, by this process
}

// DefaultDir returns ${XDG_CACHE_HOME:-~/.cache}/sluice.
func DefaultDir() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache directory (set XDG_CACHE_HOME or HOME): %w", err)
	}
	return filepath.Join(base, "sluice"), nil
}

// Open returns the store in dir, made if it is not there; "" means
// [DefaultDir]. One line per finished, waited for or failed step goes to
// progress, with the seconds since Open.
func Open(dir string, progress io.Writer) (*Store, error) {
	if dir == "" {
		var err error
		if dir, err = DefaultDir(); err != nil {
			return nil, err
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("resolve the cache directory %s: %w", dir, err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "log"), 0o755); err != nil {
		return nil, fmt.Errorf("make the cache directory %s: %w", dir, err)
	}
	return &Store{dir: dir, progress: progress, start: time.Now(), keys: map[*Step]string{}}, nil
}

// Dir is the store's directory.
func (s *Store) Dir() string { return s.dir }

// Make returns the output directory of step, an absolute path, building it and
// whatever it needs if it is not there. The directory is shared and must not
// be written to. For a step with Ready it returns no directory.
func (s *Store) Make(ctx context.Context, step *Step) (string, error) {
	todo, err := s.missing(step)
	if err != nil {
		return "", err
	}
	for i, st := range todo {
		if err := s.build(ctx, st, fmt.Sprintf("step %d of %d", i+1, len(todo))); err != nil {
			return "", err
		}
	}
	dir, err := s.path(step)
	if err != nil || step.Ready != nil {
		return "", err
	}
	now := time.Now()
	if err := os.Chtimes(dir, now, now); err != nil { // used now: collect keeps it
		return "", fmt.Errorf("mark %s as used: %w", dir, err)
	}
	return dir, nil
}

// missing lists the steps to build for step, itself included, in an order in
// which each comes after those it needs. What a present step was made from is
// not asked for.
func (s *Store) missing(step *Step) ([]*Step, error) {
	var todo []*Step
	seen := map[*Step]bool{}
	var visit func(*Step) error
	visit = func(st *Step) error {
		if seen[st] {
			return nil
		}
		seen[st] = true
		there, err := s.there(st)
		if err != nil || there {
			return err
		}
		for _, need := range st.needs() {
			if err := visit(need); err != nil {
				return err
			}
		}
		todo = append(todo, st)
		return nil
	}
	return todo, visit(step)
}

func (s *Store) id(st *Step) (string, error) {
	key, err := s.key(st)
	if err != nil {
		return "", err
	}
	return st.Name + "-" + key[:12], nil
}

func (s *Store) path(st *Step) (string, error) {
	id, err := s.id(st)
	return filepath.Join(s.dir, id), err
}

// there tells whether the step's result is there.
func (s *Store) there(st *Step) (bool, error) {
	if st.Ready != nil {
		return st.Ready(), nil
	}
	dir, err := s.path(st)
	if err != nil {
		return false, err
	}
	_, err = os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (s *Store) say(format string, args ...any) {
	fmt.Fprintf(s.progress, "[%4.0fs] %s\n", time.Since(s.start).Seconds(), fmt.Sprintf(format, args...))
}

// build makes one step's output, unless another process does so first.
func (s *Store) build(ctx context.Context, st *Step, place string) error {
	id, err := s.id(st)
	if err != nil {
		return err
	}
	dir := filepath.Join(s.dir, id)
	unlock, err := s.lock(ctx, id, func() { s.say("%s: waiting for the process that builds it (%s)", st.Name, place) })
	if err != nil {
		return err
	}
	defer unlock()
	if there, err := s.there(st); err != nil || there {
		return err
	}
	// Holding the lock, whatever lies in the work directory is from a build that died.
	tmp := filepath.Join(s.dir, ".building-"+id)
	if err := os.RemoveAll(tmp); err != nil {
		return fmt.Errorf("remove the rest of a killed build %s: %w", tmp, err)
	}
	defer func() { _ = os.RemoveAll(tmp) }() // or the next build of the same does
	if err := os.MkdirAll(filepath.Join(tmp, "out"), 0o755); err != nil {
		return fmt.Errorf("make the build directory of %s: %w", st.Name, err)
	}
	logPath := filepath.Join(s.dir, "log", id+".log")
	log, err := os.Create(logPath)
	if err != nil {
		return fmt.Errorf("make the build log of %s: %w", st.Name, err)
	}
	defer log.Close()

	s.say("%s: building (%s)", st.Name, place)
	began := time.Now()
	b := &Build{Out: filepath.Join(tmp, "out"), Work: filepath.Join(tmp, "work"), Log: log, store: s, step: st, place: place}
	err = os.Mkdir(b.Work, 0o755)
	if err == nil {
		err = s.install(ctx, b, st.Packages)
	}
	if err == nil {
		err = st.Build(ctx, b)
	}
	if err == nil && st.Ready == nil {
		err = os.Rename(b.Out, dir)
	}
	if err != nil {
		s.say("%s: failed after %.0f s", st.Name, time.Since(began).Seconds())
		return &BuildError{Step: st.Name, Log: logPath, Tail: tail(logPath, 15), Cause: likelyCause(logPath), Err: err}
	}
	s.say("%s: done in %.1f s", st.Name, time.Since(began).Seconds())
	return nil
}

// lock takes the lock of one artefact across processes; waiting runs once if
// another process has it.
func (s *Store) lock(ctx context.Context, id string, waiting func()) (unlock func(), err error) {
	for told := false; ; {
		unlock, err := s.tryLock(id)
		if unlock != nil || err != nil {
			return unlock, err
		}
		if !told {
			told = true
			waiting()
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the process that builds %s: %w", id, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// tryLock takes the lock of one artefact; unlock is nil if another process has
// it. The kernel drops the lock of a process that dies.
func (s *Store) tryLock(id string) (unlock func(), err error) {
	path := filepath.Join(s.dir, ".lock-"+id)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open the lock %s: %w", path, err)
	}
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case err == nil:
		return func() { f.Close() }, nil
	case errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, unix.EINTR):
		return nil, f.Close()
	default:
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
}

// Build is a build in progress, handed to [Step.Build].
type Build struct {
	// Out is the directory to fill; it becomes the artefact.
	Out string
	// Work is an empty directory for intermediate files, removed afterwards.
	Work string
	// Log is the step's log file.
	Log io.Writer

	store *Store
	step  *Step
	place string
}

// Dir returns the output directory of a step that is among the inputs.
func (b *Build) Dir(step *Step) string {
	for _, need := range b.step.needs() {
		if need == step {
			dir, _ := b.store.path(step) // the key is known: it went into ours
			return dir
		}
	}
	panic(fmt.Sprintf("artefact: %s is not an input of %s", step.Name, b.step.Name))
}

// Say prints a progress line: what the step does now.
func (b *Build) Say(format string, args ...any) {
	b.store.say("%s: %s (%s)", b.step.Name, fmt.Sprintf(format, args...), b.place)
}

// Cmd is a command to [Build.Run].
type Cmd struct {
	Dir  string    // working directory; default is Work
	Env  []string  // added to the process's environment, key=value
	Out  io.Writer // standard output; default is the log
	Args []string  // program and arguments
}

// Run runs args in Work, its output in the log.
func (b *Build) Run(ctx context.Context, args ...string) error {
	return b.RunCmd(ctx, Cmd{Args: args})
}

// RunCmd runs a command and everything it starts, which do not outlive ctx.
func (b *Build) RunCmd(ctx context.Context, c Cmd) error {
	cmd := exec.CommandContext(ctx, c.Args[0], c.Args[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = c.Dir, c.Out, b.Log
	if cmd.Dir == "" {
		cmd.Dir = b.Work
	}
	if cmd.Stdout == nil {
		cmd.Stdout = b.Log
	}
	// Build tools speak to people in their language; causes are looked for in English.
	cmd.Env = append(append(os.Environ(), "LC_ALL=C"), c.Env...)
	fmt.Fprintf(b.Log, "$ %s\n", strings.Join(c.Args, " "))
	if err := runGroup(cmd); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("run %s: %w", c.Args[0], err)
	}
	return nil
}

// BuildError says which step failed, what its log ended with, and why, if known.
type BuildError struct {
	Step  string
	Log   string // path of the whole log
	Tail  string // last lines of it
	Cause string // likely cause and mend, may be empty
	Err   error
}

func (e *BuildError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "build %s: %v", e.Step, e.Err)
	if e.Tail != "" {
		fmt.Fprintf(&b, "\n  end of its log %s:\n    %s", e.Log, strings.ReplaceAll(e.Tail, "\n", "\n    "))
	}
	if e.Cause != "" {
		fmt.Fprintf(&b, "\n  likely cause: %s", e.Cause)
	}
	return b.String()
}

func (e *BuildError) Unwrap() error { return e.Err }

// tail returns the last n lines of a file, without the final newline.
func tail(path string, n int) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	lines := strings.Split(string(bytes.TrimRight(content, "\n")), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// causes maps what build tools print to what a person can do about it.
var causes = []struct{ sign, cause string }{
	{"No space left on device", "the disk is full: free space, or run the lab's gc"},
	{"Temporary failure resolving", "no name resolution: the Debian mirror of this machine cannot be reached"},
	{"Could not connect to", "the Debian mirror of this machine cannot be reached"},
	{"Unable to locate package", "apt's package lists are old or lack a suite: run apt-get update, and check that the machine is Debian bookworm with bookworm-security among its sources"},
	{"404  Not Found", "apt's package lists are old: run apt-get update"},
	{"Killed signal terminated program", "the compiler ran out of memory: close other programs or build with fewer jobs"},
	{"Could not get lock", "another apt or dpkg is running: wait until it has ended"},
	{"are you root?", "installing packages needs root: run this as root, or install them beforehand"},
	{"Operation not permitted", "a build tool needs root: run this as root"},
}

func likelyCause(log string) string {
	end := tail(log, 200)
	for _, c := range causes {
		if strings.Contains(end, c.sign) {
			return c.cause
		}
	}
	return ""
}
