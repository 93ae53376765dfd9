package artefact

import (
	"context"
	"fmt"
	"os"
	"os/exec"
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
	defer os.RemoveAll(debs)
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
