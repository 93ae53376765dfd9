package guest

import (
	"context"

	"github.com/sluice-network/sluice/test/lab/artefact"
)

// Parts are the artefacts that guests of one kind boot from, besides the root
// image.
type Parts struct {
	Program string // UML: the kernel, which is a program; QEMU: the emulator
	Kernel  string // QEMU only: Debian's kernel
	Initrd  string // initramfs with guestd and the modules needed before the root
	Modules string // QEMU only: image with Debian's modules
}

// Build makes the parts of one kind. repo is the project's checkout.
func Build(ctx context.Context, store *artefact.Store, kind Kind, repo string) (Parts, error) {
	return Parts{}, nil
}

// File is a file that [RootImage] adds to the base system.
type File struct {
	From *artefact.Step // step that makes it
	Path string         // path in the step's output; a directory is taken whole
	To   string         // absolute path in the guest
	Mode uint32         // permissions, 0 keeps them
}

// Base is the step for the Debian system of all guests: output file base.tar.
func Base() *artefact.Step { return &artefact.Step{Name: "debian-base"} }

// RootImage is the step for a root image of the base and further files: output
// file root.erofs. name keeps images of different use apart ("bare", "node").
func RootImage(name string, files ...File) *artefact.Step { return &artefact.Step{Name: name} }

// RootFile is the image's file name in the output of [RootImage].
const RootFile = "root.erofs"

// Repo returns the root of the checkout that holds the directory dir.
func Repo(dir string) (string, error) { return "", nil }
