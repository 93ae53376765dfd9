package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sluice-network/sluice/test/lab/guest"
	"github.com/sluice-network/sluice/test/lab/guest/control"
)

// job is a test binary's run: what it reads and what it writes on the host.
type job struct {
	cwd     string
	program string
	timeout time.Duration // of the test binary; 0 is none
	files   []string      // files it writes besides those in cwd, absolute
	dirs    []string      // directories it writes into, absolute
}

// fileFlags are the test flags that name a file to write.
var fileFlags = map[string]bool{
	"testlogfile": true, "coverprofile": true, "cpuprofile": true, "memprofile": true, "blockprofile": true, "mutexprofile": true, "trace": true,
}

// dirFlags are the test flags that name a directory to write into.
var dirFlags = map[string]bool{"outputdir": true, "gocoverdir": true, "fuzzcachedir": true}

// parseJob reads the flags that concern the host from a test binary's
// arguments, as go test passes them: -test.NAME=VALUE.
func parseJob(cwd, program string, args []string) job {
	j := job{cwd: cwd, program: program, timeout: 10 * time.Minute}
	absolute := func(dir, path string) string {
		if filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(dir, path)
	}
	output := cwd // profiles go to -test.outputdir
	for _, pass := range []map[string]bool{dirFlags, fileFlags} {
		for _, arg := range args {
			if arg == "--" || arg == "-args" {
				break
			}
			name, value, ok := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-test."), "=")
			name = strings.TrimPrefix(name, "test.")
			if !ok || value == "" || !strings.HasPrefix(arg, "-") {
				continue
			}
			switch {
			case name == "timeout":
				if d, err := time.ParseDuration(value); err == nil {
					j.timeout = d
				}
			case !pass[name]:
			case dirFlags[name]:
				dir := absolute(cwd, value)
				j.dirs = append(j.dirs, dir)
				if name == "outputdir" {
					output = dir
				}
			case name == "testlogfile":
				j.files = append(j.files, absolute(cwd, value))
			default:
				j.files = append(j.files, absolute(output, value))
			}
		}
	}
	return j
}

// mounts are the directories of the host that a User-Mode Linux guest shows: the
// module read-only, and over it what the test may write.
func (j job) mounts() []control.Host {
	var out []control.Host
	// The guest keeps its own system.
	seen := map[string]bool{"/": true, "/bin": true, "/sbin": true, "/usr/bin": true, "/usr/sbin": true}
	show := func(dir string, readOnly bool) {
		if !seen[dir] {
			seen[dir] = true
			out = append(out, control.Host{From: dir, To: dir, ReadOnly: readOnly})
		}
	}
	if repo, err := guest.Repo(j.cwd); err == nil && repo != j.cwd {
		show(repo, true)
	}
	show(j.cwd, false)
	show(filepath.Dir(j.program), false)
	for _, f := range j.files {
		show(filepath.Dir(f), false)
	}
	for _, d := range j.dirs {
		show(d, false)
	}
	return out
}

// openVSwitch shows the guest the programs in SLUICE_OVS, if that is set.
func openVSwitch() []control.Host {
	dir := os.Getenv("SLUICE_OVS")
	if dir == "" {
		return nil
	}
	return []control.Host{{From: dir, To: dir, ReadOnly: true}}
}

// send copies the test and the package's directory to a QEMU guest.
func (j job) send(ctx context.Context, g guest.Guest) error {
	program, err := os.Open(j.program)
	if err != nil {
		return err
	}
	defer program.Close()
	if err := g.PutTree(ctx, j.cwd, j.cwd); err != nil {
		return err
	}
	dirs := append([]string{}, j.dirs...)
	for _, f := range j.files {
		dirs = append(dirs, filepath.Dir(f))
	}
	if len(dirs) > 0 {
		if err := g.Exec(ctx, guest.Command{Args: append([]string{"mkdir", "-p"}, dirs...)}); err != nil {
			return fmt.Errorf("make the test's directories in the guest: %w", err)
		}
	}
	return g.Put(ctx, program, 0o755, j.program)
}

// fetch copies what the test wrote from a QEMU guest; a file it did not write
// is passed over.
func (j job) fetch(ctx context.Context, g guest.Guest) error {
	files := append([]string{}, j.files...)
	for _, d := range j.dirs {
		list, err := g.Run(ctx, "find '"+d+"' -type f")
		if err != nil {
			return err
		}
		files = append(files, strings.Fields(list)...)
	}
	for _, path := range files {
		if g.Exec(ctx, guest.Command{Args: []string{"test", "-f", path}}) != nil {
			continue
		}
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		if err := errors.Join(g.Get(ctx, path, f), f.Close()); err != nil {
			return err
		}
	}
	return nil
}
