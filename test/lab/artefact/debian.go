package artefact

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// The Debian packages that build steps and guests of the lab use on the host,
// by what they are for. They are named here and nowhere else.
var (
	KernelTools = []string{"gcc", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "libc6-dev", "xz-utils", "kmod", "binutils", "dpkg-dev"}
	ModuleTools = []string{"gcc", "make", "libc6-dev", "libelf-dev", "binutils"}
	RootTools   = []string{"mmdebstrap", "erofs-utils", "ca-certificates"}
	ImageTools  = []string{"erofs-utils"}
	UnpackTools = []string{"dpkg", "xz-utils", "zstd", "kmod", "erofs-utils"}
)

// install installs those of the named Debian packages that are missing.
func (s *Store) install(ctx context.Context, b *Build, packages []string) error {
	missing := absent(packages)
	if len(missing) == 0 {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("install the Debian packages %s: this needs root; run as root, or install them with apt-get", strings.Join(missing, " "))
	}
	b.Say("installing %s", strings.Join(missing, " "))
	if err := s.update(ctx, b); err != nil {
		return err
	}
	return b.RunCmd(ctx, Cmd{Env: noninteractive, Args: append([]string{
		"apt-get", "install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=600",
	}, missing...)})
}

var noninteractive = []string{"DEBIAN_FRONTEND=noninteractive"}

// Programs is the step that installs what tests call on this machine: of busybox
// the static one, as guests have it.
func Programs() *Step {
	missing := func() (packages []string) {
		for _, p := range []struct{ program, from string }{
			{"busybox", "busybox-static"}, {"ip", "iproute2"}, {"nft", "nftables"}, {"zstd", "zstd"},
		} {
			if _, err := exec.LookPath(p.program); err != nil {
				packages = append(packages, p.from)
			}
		}
		return packages
	}
	return &Step{
		Name:     "programs",
		Inputs:   []Input{Text("recipe", "1")},
		Packages: missing(),
		Ready:    func() bool { return len(missing()) == 0 },
		Build:    func(context.Context, *Build) error { return nil },
	}
}

// absent returns the packages that dpkg does not know as installed.
func absent(packages []string) []string {
	var missing []string
	for _, p := range packages {
		out, _ := exec.Command("dpkg-query", "-W", "-f", "${db:Status-Status}", p).Output()
		if string(out) != "installed" {
			missing = append(missing, p)
		}
	}
	return missing
}

// update refreshes apt's package lists, once per process. A third-party source
// that fails is no reason to stop: what is needed later is asked for by name.
func (s *Store) update(ctx context.Context, b *Build) error {
	if s.updated || os.Geteuid() != 0 {
		return nil
	}
	s.updated = true
	if err := b.RunCmd(ctx, Cmd{Env: noninteractive, Args: []string{"apt-get", "update", "-q"}}); err != nil {
		fmt.Fprintf(b.Log, "apt-get update: %v; going on with the lists there are\n", err)
	}
	return ctx.Err()
}

// Download fetches Debian packages by name (name or name=version), installs
// nothing, and unpacks them into dir, one over the other.
func (b *Build) Download(ctx context.Context, dir string, packages ...string) error {
	if err := b.store.update(ctx, b); err != nil {
		return err
	}
	debs, err := os.MkdirTemp(b.Work, "deb")
	if err != nil {
		return fmt.Errorf("make the download directory: %w", err)
	}
	defer func() { _ = os.RemoveAll(debs) }() // Work goes as a whole, too
	// apt drops to its own user for downloads, who may not write here.
	if err := b.RunCmd(ctx, Cmd{Dir: debs, Args: append([]string{"apt-get", "download", "-q", "-o", "APT::Sandbox::User=root"}, packages...)}); err != nil {
		return err
	}
	entries, err := os.ReadDir(debs)
	if err != nil {
		return fmt.Errorf("list the downloaded packages: %w", err)
	}
	for _, e := range entries {
		if err := b.RunCmd(ctx, Cmd{Dir: debs, Args: []string{"dpkg-deb", "-x", e.Name(), dir}}); err != nil {
			return err
		}
	}
	return nil
}

// Newest returns the highest version-sorted package name that begins with
// prefix, matches pattern and can be downloaded.
func (b *Build) Newest(ctx context.Context, prefix string, pattern *regexp.Regexp) (string, error) {
	if err := b.store.update(ctx, b); err != nil {
		return "", err
	}
	var names bytes.Buffer
	if err := b.RunCmd(ctx, Cmd{Out: &names, Args: []string{"apt-cache", "pkgnames", prefix}}); err != nil {
		return "", err
	}
	var found []string
	for name := range strings.Lines(names.String()) {
		if name = strings.TrimSpace(name); pattern.MatchString(name) {
			found = append(found, name)
		}
	}
	slices.SortFunc(found, func(a, b string) int { return -compareVersions(a, b) })
	for _, name := range found {
		// A name may be known only because something refers to it.
		if err := b.RunCmd(ctx, Cmd{Out: io.Discard, Args: []string{"apt-cache", "--no-all-versions", "show", name}}); err == nil {
			return name, nil
		}
	}
	return "", fmt.Errorf("find a Debian package matching %s: none; add bookworm-security to the machine's apt sources", pattern)
}

// compareVersions compares texts with their runs of digits taken as numbers.
func compareVersions(a, b string) int {
	for a != "" && b != "" {
		da, db := digits(a), digits(b)
		if da == 0 || db == 0 {
			if a[0] != b[0] {
				return cmp.Compare(a[0], b[0])
			}
			a, b = a[1:], b[1:]
			continue
		}
		na, nb := strings.TrimLeft(a[:da], "0"), strings.TrimLeft(b[:db], "0")
		if c := cmp.Or(cmp.Compare(len(na), len(nb)), cmp.Compare(na, nb)); c != 0 {
			return c
		}
		a, b = a[da:], b[db:]
	}
	return cmp.Compare(len(a), len(b))
}

// digits returns the length of the run of digits that s begins with.
func digits(s string) int {
	return len(s) - len(strings.TrimLeft(s, "0123456789"))
}
