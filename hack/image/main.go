// Command image builds Sluice's container image with no container engine: the
// static binaries of this module on an empty base, written as an archive that
// "docker load" and "ctr images import" take.
//
// The archive depends on the sources only: same sources and same Go, same bytes.
package main

import (
	"archive/tar"
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// binaries are the image's programs, each at /<base name>.
var binaries = []string{
	"./operator/cmd/sluice-operator",
	"./operator/cmd/sluice-agent",
	"./cni/cmd/sluice-cni",
}

func main() {
	out := flag.String("o", "out/sluice.tar", "archive to write")
	tag := flag.String("tag", "sluice.dev/sluice:dev", "image reference with tag")
	arch := flag.String("arch", "amd64", "GOARCH of the image")
	flag.Parse()
	if err := run(*out, *tag, *arch); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(out, tag, arch string) error {
	ref, err := name.NewTag(tag)
	if err != nil {
		return fmt.Errorf("parse -tag %q: %w", tag, err)
	}
	layer, err := programs(arch)
	if err != nil {
		return err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return fmt.Errorf("append layer: %w", err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("read image config: %w", err)
	}
	cfg.Architecture, cfg.OS = arch, "linux"
	// The operator runs as this user; the agent's pod asks for root by itself.
	cfg.Config.User = "65532:65532"
	cfg.Config.Entrypoint = []string{"/sluice-operator"}
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		return fmt.Errorf("write image config: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	// Written aside first, so that a reader never sees half an archive.
	tmp := out + ".tmp"
	if err := tarball.WriteToFile(tmp, ref, img); err != nil {
		return fmt.Errorf("write %s: %w", tmp, err)
	}
	return os.Rename(tmp, out)
}

// programs compiles the binaries for arch and returns them as one layer.
func programs(arch string) (v1.Layer, error) {
	dir, err := os.MkdirTemp("", "sluice-image-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	cmd := exec.Command("go", append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", dir + "/"}, binaries...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("compile: %w", err)
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	put := func(path string, mode int64, body []byte) error {
		if err := tw.WriteHeader(&tar.Header{Name: path, Mode: mode, Size: int64(len(body))}); err != nil {
			return err
		}
		_, err := tw.Write(body)
		return err
	}
	// Without an entry for its user Go's os/user, which client libraries ask for a home folder, fails.
	if err := put("etc/passwd", 0o644, []byte("root:x:0:0::/:\nnonroot:x:65532:65532::/:\n")); err != nil {
		return nil, err
	}
	for _, b := range binaries {
		body, err := os.ReadFile(filepath.Join(dir, filepath.Base(b)))
		if err != nil {
			return nil, err
		}
		if err := put(filepath.Base(b), 0o755, body); err != nil {
			return nil, err
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	})
}
