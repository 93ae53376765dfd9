package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/sluice-network/sluice/test/lab/artefact"
	"github.com/sluice-network/sluice/test/lab/kernel"
)

// Parts are the artefacts that guests of one kind boot from, besides the root
// image.
type Parts struct {
	Program string // UML: the kernel, which is a program; QEMU: the emulator
	Kernel  string // QEMU only: Debian's kernel
	Initrd  string // initramfs with guestd and the modules needed before the root
	Modules string // QEMU only: image with Debian's modules
	States  string // QEMU only: directory for saved states
}

// Build makes the parts of one kind. repo is the project's checkout, see [Repo].
func Build(ctx context.Context, store *artefact.Store, kind Kind, repo string) (Parts, error) {
	switch kind {
	case UML:
		return buildUML(ctx, store, repo)
	case QEMU:
		return buildQEMU(ctx, store, repo)
	}
	return Parts{}, fmt.Errorf("build the parts of guest kind %q: it is neither %q nor %q", kind, UML, QEMU)
}

func buildUML(ctx context.Context, store *artefact.Store, repo string) (Parts, error) {
	nic, agent := kernel.NIC(repo), guestd(repo)
	initrd, err := store.Make(ctx, &artefact.Step{
		Name:   "initrd-uml",
		Inputs: []artefact.Input{artefact.Text("recipe", "1"), artefact.Output(agent), artefact.Output(nic)},
		Build: func(_ context.Context, b *artefact.Build) error {
			module := kernel.NICModule + ".ko"
			return writeInitrd(filepath.Join(b.Out, "initrd"), filepath.Join(b.Dir(agent), "guestd"), map[string]string{
				"lib/sluice/" + module: filepath.Join(b.Dir(nic), module),
			})
		},
	})
	if err != nil {
		return Parts{}, err
	}
	dir, err := store.Make(ctx, kernel.UML())
	return Parts{Program: filepath.Join(dir, kernel.UMLProgram), Initrd: filepath.Join(initrd, "initrd")}, err
}

func buildQEMU(ctx context.Context, store *artefact.Store, repo string) (Parts, error) {
	if _, err := store.Make(ctx, artefact.QEMU()); err != nil {
		return Parts{}, err
	}
	program, err := exec.LookPath(artefact.QEMUProgram)
	if err != nil {
		return Parts{}, err
	}
	agent := guestd(repo)
	initrd, err := store.Make(ctx, &artefact.Step{
		Name:   "initrd-qemu",
		Inputs: []artefact.Input{artefact.Text("recipe", "1"), artefact.Output(agent), artefact.Output(kernel.Debian())},
		Build: func(_ context.Context, b *artefact.Build) error {
			early := filepath.Join(b.Dir(kernel.Debian()), kernel.DebianEarly)
			entries, err := os.ReadDir(early)
			if err != nil {
				return err
			}
			files := map[string]string{}
			for _, e := range entries {
				files["modules/"+e.Name()] = filepath.Join(early, e.Name())
			}
			return writeInitrd(filepath.Join(b.Out, "initrd"), filepath.Join(b.Dir(agent), "guestd"), files)
		},
	})
	if err != nil {
		return Parts{}, err
	}
	dir, err := store.Make(ctx, kernel.Debian())
	return Parts{
		Program: program, Kernel: filepath.Join(dir, kernel.DebianImage), Modules: filepath.Join(dir, kernel.DebianModules),
		Initrd: filepath.Join(initrd, "initrd"), States: filepath.Join(store.Dir(), "qemu-state"),
	}, err
}

// guestd is the step for the guests' pid 1.
func guestd(repo string) *artefact.Step {
	notTest := func(rel string) bool { return strings.HasSuffix(rel, "_test.go") }
	return &artefact.Step{
		Name: "guestd",
		Inputs: []artefact.Input{
			artefact.Text("go", runtime.Version()),
			artefact.Files(repo, notTest, "go.mod", "test/lab/cmd/guestd", "test/lab/guest/control"),
		},
		Build: func(ctx context.Context, b *artefact.Build) error {
			return b.RunCmd(ctx, artefact.Cmd{
				Dir: repo, Env: []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + runtime.GOARCH, "GOFLAGS="},
				Args: []string{"go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", filepath.Join(b.Out, "guestd"), "./test/lab/cmd/guestd"},
			})
		},
	}
}

// Packages of the guests' Debian.
var basePackages = []string{
	"busybox-static", "ca-certificates", "dash", "dnsmasq-base", "ethtool", "iperf3", "iproute2", "iputils-ping", "kmod", "mount", "netcat-openbsd", "nftables", "pciutils", "procps", "runc", "tcpdump",
}

// Base is the step for the Debian system of all guests: output file base.tar.
func Base() *artefact.Step {
	return &artefact.Step{
		Name:     "debian-base",
		Inputs:   []artefact.Input{artefact.Text("recipe", "1"), artefact.Text("packages", strings.Join(basePackages, " "))},
		Packages: artefact.RootTools,
		Build: func(ctx context.Context, b *artefact.Build) error {
			sources, err := artefact.DebianSources()
			if err != nil {
				return err
			}
			list := filepath.Join(b.Work, "debian.sources")
			if err := os.WriteFile(list, []byte(sources.String()), 0o644); err != nil {
				return err
			}
			return b.Run(ctx, "mmdebstrap", "--variant=essential", "--include="+strings.Join(basePackages, ","),
				"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
				"bookworm", filepath.Join(b.Out, "base.tar"), list)
		},
	}
}

// File is a file or directory that [RootImage] adds to the base system.
type File struct {
	From *artefact.Step // step that makes it
	Path string         // path in the step's output; a directory is taken whole
	To   string         // absolute path in the guest
}

// RootFile is the image's file name in the output of [RootImage].
const RootFile = "root.erofs"

// RootImage is the step for a root image of the base and further files: output
// file [RootFile]. name keeps images of different use apart ("bare", "node").
func RootImage(name string, files ...File) *artefact.Step {
	base := Base()
	inputs := []artefact.Input{artefact.Text("recipe", "1"), artefact.Output(base)}
	for _, f := range files {
		inputs = append(inputs, artefact.Output(f.From), artefact.Text(f.To, f.Path))
	}
	return &artefact.Step{
		Name:     "root-" + name,
		Inputs:   inputs,
		Packages: artefact.ImageTools,
		Build: func(ctx context.Context, b *artefact.Build) error {
			root := filepath.Join(b.Work, "root")
			if err := os.Mkdir(root, 0o755); err != nil {
				return err
			}
			if err := b.Run(ctx, "tar", "-C", root, "-xf", filepath.Join(b.Dir(base), "base.tar"), "--exclude=./dev/*"); err != nil {
				return err
			}
			for _, f := range files {
				to := filepath.Join(root, f.To)
				if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
					return err
				}
				// Links of hard kind where possible: the files are large, and only read.
				if err := b.Run(ctx, "cp", "-alT", filepath.Join(b.Dir(f.From), f.Path), to); err != nil {
					return err
				}
			}
			// Uncompressed: reading is then as fast as the host's page cache.
			return b.RunCmd(ctx, artefact.Cmd{Out: io.Discard, Args: []string{"mkfs.erofs", "-d0", "--all-root", filepath.Join(b.Out, RootFile), root}})
		},
	}
}

// Bare is the root image of guests without Kubernetes.
func Bare() *artefact.Step { return RootImage("bare") }

// Repo returns the root of the project's checkout that holds the directory dir.
func Repo(dir string) (string, error) {
	start, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for at := start; ; at = filepath.Dir(at) {
		content, err := os.ReadFile(filepath.Join(at, "go.mod"))
		if err == nil && strings.HasPrefix(string(content), "module github.com/sluice-network/sluice\n") {
			return at, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		if at == filepath.Dir(at) {
			return "", fmt.Errorf("find the project's checkout: %s is not inside one; run this from the checkout", start)
		}
	}
}
