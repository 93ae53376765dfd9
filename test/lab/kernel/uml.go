package kernel

import (
	"context"
	_ "embed"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/sluice-network/sluice/test/lab/artefact"
)

//go:embed uml.config
var umlConfig string

// Series is the kernel series of all guests.
const Series = "6.12"

// Files in the output of [UML].
const (
	UMLProgram = "linux" // the kernel, an executable
	UMLTree    = "build" // what modules are built against, make's KDIR
)

// UML is the step for the User-Mode Linux kernel.
var UML = sync.OnceValue(func() *artefact.Step {
	return &artefact.Step{
		Name:     "uml-kernel",
		Inputs:   []artefact.Input{artefact.Text("recipe", "1"), artefact.Text("series", Series), artefact.Text("config", umlConfig)},
		Packages: artefact.KernelTools,
		Build:    buildUML,
	}
})

func buildUML(ctx context.Context, b *artefact.Build) error {
	b.Say("downloading the source")
	if err := b.Download(ctx, b.Work, "linux-source-"+Series); err != nil {
		return err
	}
	archive := filepath.Join(b.Work, "usr/src/linux-source-"+Series+".tar.xz")
	b.Say("unpacking the source")
	if err := b.Run(ctx, "tar", "-xf", archive); err != nil {
		return err
	}
	tree := filepath.Join(b.Work, "linux-source-"+Series)
	config := filepath.Join(b.Work, "uml.config")
	if err := os.WriteFile(config, []byte(umlConfig), 0o644); err != nil {
		return err
	}
	// In the tree, not beside it: then no file holds an absolute path, and the
	// finished tree can be moved.
	mk := func(env []string, args ...string) error {
		return b.RunCmd(ctx, artefact.Cmd{Dir: tree, Env: env, Args: append([]string{
			"make", "ARCH=um", "SUBARCH=x86_64", fmt.Sprintf("-j%d", runtime.NumCPU()+1),
			"KBUILD_BUILD_USER=sluice", "KBUILD_BUILD_HOST=lab",
		}, args...)})
	}
	if err := mk([]string{"KCONFIG_ALLCONFIG=" + config}, "allnoconfig"); err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(tree, ".config"))
	if err != nil {
		return err
	}
	if lost := lostOptions(umlConfig, string(got)); len(lost) > 0 {
		return fmt.Errorf("configure the kernel: the source does not take %s; correct uml.config", strings.Join(lost, ", "))
	}
	b.Say("compiling; this takes about 7 minutes on 2 cores")
	// There are no modules to make, but that target lists the symbols for those to come.
	if err := mk(nil, "linux", "modules"); err != nil {
		return err
	}
	if err := mk(nil, "modules_prepare"); err != nil {
		return err
	}
	if err := b.Run(ctx, "strip", "-o", filepath.Join(b.Out, UMLProgram), filepath.Join(tree, "linux")); err != nil {
		return err
	}
	return keepForModules(tree, filepath.Join(b.Out, UMLTree))
}

// lostOptions returns the options of want, an allnoconfig fragment, that the
// configuration got does not have: those whose dependencies are not met.
func lostOptions(want, got string) []string {
	have := map[string]bool{}
	for line := range strings.Lines(got) {
		have[strings.TrimSpace(line)] = true
	}
	var lost []string
	for line := range strings.Lines(want) {
		line = strings.TrimSpace(line)
		name, value, ok := strings.Cut(line, "=")
		if !ok || strings.HasPrefix(line, "#") {
			continue
		}
		if value == "n" && !have[name+"=y"] && !have[name+"=m"] {
			continue
		}
		if !have[line] {
			lost = append(lost, line)
		}
	}
	return lost
}

// keepForModules moves from a built kernel tree what building a module against
// it reads: 1.9 GB shrink to about 100 MB.
func keepForModules(tree, to string) error {
	keep := []string{"Makefile", "Kbuild", "Kconfig", ".config", "Module.symvers", "include", "scripts", "arch/um", "arch/x86"}
	for _, name := range keep {
		target := filepath.Join(to, name)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(tree, name), target); err != nil {
			return fmt.Errorf("keep %s for building modules: %w", name, err)
		}
	}
	return filepath.WalkDir(filepath.Join(to, "arch"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		switch filepath.Ext(path) {
		case ".o", ".a", ".c", ".cmd":
			return os.Remove(path)
		}
		return nil
	})
}
