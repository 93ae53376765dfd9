// Command labrun runs a Go test binary inside a fresh bare guest that has
// SR-IOV network cards:
//
//	go test -exec 'labrun [-kind uml|qemu] [-cards 2] [-totalvfs 8]' ./internal/host/...
//
// The guest has no network and no Kubernetes; the test runs as root of a real
// kernel with PFs ens1f0, ens2f0, ... Nothing on the host needs privilege, once
// the artefacts are built. Output streams, the exit status is the test's, and
// files that test flags ask for (-coverprofile, -cpuprofile, ...) come back.
//
// A User-Mode Linux guest sees the test's module read-only and the package's
// directory writable, at their own paths, and Open vSwitch in SLUICE_OVS. A QEMU
// guest gets a copy of the package's directory.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/test/lab/artefact"
	"github.com/sluice-network/sluice/test/lab/guest"
)

// statusTrouble is labrun's own exit status, as of env(1) and its kin.
const statusTrouble = 125

func main() {
	kind := flag.String("kind", string(guest.UML), "kind of guest: uml or qemu")
	cards := flag.Int("cards", 2, "number of network cards (qemu: always 2)")
	vfs := flag.Int("totalvfs", 8, "VFs that each card can have (qemu: always 7)")
	memory := flag.Int("memory", 1024, "memory of the guest in MiB")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: go test -exec 'labrun [flags]' PACKAGE...\n       labrun [flags] PROGRAM [argument...]\n\nRuns PROGRAM in a fresh guest with SR-IOV network cards.\n\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	status, err := run(guest.Spec{
		Kind: guest.Kind(*kind), Name: "bare", Number: 1, Memory: *memory, Attached: true,
		Card: guest.Card{Count: *cards, TotalVFs: *vfs},
	}, flag.Args())
	var exit *guest.ExitError
	switch {
	case errors.As(err, &exit):
		status = exit.Status
	case err != nil:
		fmt.Fprintf(os.Stderr, "labrun: %v\n", err)
		status = statusTrouble
	}
	os.Exit(status)
}

func run(spec guest.Spec, args []string) (int, error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	var testing atomic.Bool
	signals := watchSignals(cancel, &testing)

	cwd, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	program, err := filepath.Abs(args[0])
	if err != nil {
		return 0, err
	}
	job := parseJob(cwd, program, args[1:])
	if err := build(ctx, &spec, cwd); err != nil {
		return 0, err
	}
	release, err := claim(&spec)
	if err != nil {
		return 0, err
	}
	defer release()
	if spec.Kind == guest.UML {
		spec.Host = append(job.mounts(), openVSwitch()...)
	}
	began := time.Now()
	g, err := guest.Start(ctx, spec)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err := g.Stop(context.WithoutCancel(ctx)); err != nil {
			fmt.Fprintf(os.Stderr, "labrun: %v\n", err)
		}
	}()
	if spec.Kind == guest.QEMU {
		if err := job.send(ctx, g); err != nil {
			return 0, err
		}
	}
	up := time.Since(began)

	// The test's own limit comes first, since it says which test hung.
	limit := job.timeout + time.Minute
	if job.timeout > 0 {
		timer := time.AfterFunc(limit, func() { cancel(fmt.Errorf("still running after its time limit and a minute, %s", limit)) })
		defer timer.Stop()
	}
	began = time.Now()
	testing.Store(true)
	err = g.Exec(ctx, guest.Command{
		Args: append([]string{program}, args[1:]...), Dir: cwd, Env: environment(os.Environ(), spec.Kind),
		Stdout: os.Stdout, Stderr: os.Stderr, Signals: signals,
	})
	if ctx.Err() != nil {
		return 0, fmt.Errorf("%s: %w; end of the console:\n%s", filepath.Base(program), context.Cause(ctx), g.ConsoleTail(20))
	}
	var ended *guest.Failure
	if errors.As(err, &ended) {
		return 0, err // with the console
	}
	fmt.Fprintf(os.Stderr, "labrun: %s guest up in %.2f s, %s ran %.2f s\n", spec.Kind, up.Seconds(), filepath.Base(program), time.Since(began).Seconds())
	if bad := trouble(g.ConsoleTail(1000)); bad != "" {
		fmt.Fprintf(os.Stderr, "labrun: the guest's kernel complained: %s; end of the console:\n%s\n", bad, g.ConsoleTail(60))
		if err == nil {
			err = &guest.ExitError{Status: statusTrouble}
		}
	}
	if spec.Kind == guest.QEMU {
		err = errors.Join(err, job.fetch(ctx, g))
	}
	return 0, err
}

// trouble returns the first line in which a kernel reports a fault of its own:
// a test that passed beside one has not passed.
func trouble(console string) string {
	for line := range strings.Lines(console) {
		for _, sign := range []string{"BUG:", "Oops", "Kernel panic", "general protection fault", "possible recursive locking", "inconsistent lock state"} {
			if strings.Contains(line, sign) {
				return strings.TrimSpace(line)
			}
		}
	}
	return ""
}

// watchSignals returns the signals to pass on to the test once it is running.
// Before that an interrupt or termination ends labrun, then a second one does.
func watchSignals(cancel context.CancelCauseFunc, testing *atomic.Bool) <-chan syscall.Signal {
	in, out := make(chan os.Signal, 4), make(chan syscall.Signal, 4)
	signal.Notify(in, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	go func() {
		ends := 0
		for s := range in {
			sig := s.(syscall.Signal)
			if sig != syscall.SIGQUIT {
				if ends++; ends == 2 || !testing.Load() {
					cancel(fmt.Errorf("interrupted by signal %s", sig))
				}
			}
			select {
			case out <- sig:
			default:
			}
		}
	}()
	return out
}

// build makes what the guest boots from.
func build(ctx context.Context, spec *guest.Spec, cwd string) error {
	repo, err := guest.Repo(cwd)
	if err != nil {
		return err
	}
	store, err := artefact.Open("", os.Stderr)
	if err != nil {
		return err
	}
	if spec.Parts, err = guest.Build(ctx, store, spec.Kind, repo); err != nil {
		return err
	}
	root, err := store.Make(ctx, guest.Bare())
	spec.Root = filepath.Join(root, guest.RootFile)
	return err
}

// claim gives the guest a directory that no other running labrun has, and with
// it a host CPU: as many at a time as there are CPUs do not share one. What a
// killed labrun left in the directory is cleared by the start of the guest.
func claim(spec *guest.Spec) (release func(), err error) {
	state := os.Getenv("XDG_STATE_HOME")
	if state == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, fmt.Errorf("find the state directory (set XDG_STATE_HOME or HOME): %w", err)
		}
		state = filepath.Join(home, ".local/state")
	}
	base := filepath.Join(state, "sluice/labrun")
	if err := os.MkdirAll(base, 0o755); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	for slot := range 100 {
		lock, err := os.OpenFile(filepath.Join(base, fmt.Sprintf("%d.lock", slot)), os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			return nil, fmt.Errorf("claim a guest's directory: %w", err)
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			spec.CPU, spec.Dir = slot, filepath.Join(base, fmt.Sprint(slot))
			return func() { lock.Close() }, nil
		}
		lock.Close()
	}
	return nil, fmt.Errorf("claim a guest's directory in %s: all 100 are in use", base)
}

// environment returns what a test may want to know of the host's environment.
func environment(host []string, kind guest.Kind) []string {
	env := []string{"SLUICE_LAB_KIND=" + string(kind)}
	for _, e := range host {
		name, _, _ := strings.Cut(e, "=")
		if name == "CI" || strings.HasPrefix(name, "GO") || strings.HasPrefix(name, "RAPID_") || strings.HasPrefix(name, "TEST_") || strings.HasPrefix(name, "SLUICE_") {
			env = append(env, e)
		}
	}
	return env
}
