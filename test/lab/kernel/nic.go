package kernel

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/sluice-network/sluice/test/lab/artefact"
)

// NICModule is the name of the emulated network card's module; the output of
// [NIC] has it as NICModule.ko.
const NICModule = "sluicenic"

// NIC is the step for the emulated network card's module, for the kernel [UML].
// repo is the project's checkout, to which the build writes nothing.
func NIC(repo string) *artefact.Step {
	return &artefact.Step{
		Name: "nic-module",
		Inputs: []artefact.Input{
			artefact.Output(UML()),
			artefact.Files(repo, nil, "test/nic/Makefile", "test/nic/module"),
		},
		Packages: artefact.ModuleTools,
		Build: func(ctx context.Context, b *artefact.Build) error {
			objects := filepath.Join(b.Work, "objects")
			err := b.Run(ctx, "make", "-C", filepath.Join(repo, "test/nic"), fmt.Sprintf("-j%d", runtime.NumCPU()),
				"ARCH=um", "SUBARCH=x86_64", "KDIR="+filepath.Join(b.Dir(UML()), UMLTree), "OUT="+objects)
			if err != nil {
				return err
			}
			return os.Rename(filepath.Join(objects, NICModule+".ko"), filepath.Join(b.Out, NICModule+".ko"))
		},
	}
}
