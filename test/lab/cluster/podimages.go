package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/sluice-network/sluice/test/lab/artefact"
	"github.com/sluice-network/sluice/test/lab/guest"
)

// imagesFile is the archive of all pod images in the output of podImages.
const imagesFile = "images.tar"

// tools are the programs of the tools image besides busybox.
var tools = []string{
	"dash",
	"ip", "bridge", "tc", "devlink", "rdma", "ss", "nft",
	"ping", "ethtool", "tcpdump", "iperf3", "lspci", "dnsmasq", "nc.openbsd",
}

// podImages is the step for the images of pause and tools: programs of the
// guests' Debian with the libraries they need, on an empty base.
func podImages(repo string) *artefact.Step {
	base := guest.Base()
	return &artefact.Step{
		Name: "pod-images",
		Inputs: []artefact.Input{
			artefact.Output(base),
			artefact.Files(repo, nil, "test/lab/cluster/podimages.go"),
		},
		Build: func(ctx context.Context, b *artefact.Build) error {
			file, err := os.Open(filepath.Join(b.Dir(base), "base.tar"))
			if err != nil {
				return err
			}
			defer file.Close()
			debian, err := readSystem(file)
			if err != nil {
				return fmt.Errorf("read %s: %w", file.Name(), err)
			}
			applets, err := applets(ctx, b, debian)
			if err != nil {
				return err
			}
			return writeImages(filepath.Join(b.Out, imagesFile), debian, applets)
		},
	}
}

// applets asks busybox for the names it goes by.
func applets(ctx context.Context, b *artefact.Build, debian system) ([]string, error) {
	_, program, err := debian.find("busybox")
	if err != nil {
		return nil, err
	}
	file := filepath.Join(b.Work, "busybox")
	if err = os.WriteFile(file, program, 0o755); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = b.RunCmd(ctx, artefact.Cmd{Args: []string{file, "--list"}, Out: &out})
	return strings.Fields(out.String()), err
}

func writeImages(file string, debian system, applets []string) error {
	_, busybox, err := debian.find("busybox")
	if err != nil {
		return err
	}
	pause := layerFiles{"bin/busybox": busybox}
	kit := layerFiles{
		"bin/busybox": busybox,
		"etc/passwd":  []byte("root:x:0:0:root:/root:/bin/sh\n"),
		"etc/group":   []byte("root:x:0:\n"),
	}
	links := map[string]string{}
	for _, applet := range applets {
		if applet != "busybox" && !slices.Contains(tools, applet) {
			links["bin/"+applet] = "busybox"
		}
	}
	for _, tool := range tools {
		if err = kit.add(debian, tool); err != nil {
			return err
		}
	}
	// busybox's own shell runs its applets even where a tool has the name.
	shell, _, err := debian.find("dash")
	if err != nil {
		return err
	}
	links["bin/sh"] = "/" + shell
	// Nothing in these images has something to finish: a pod need not wait
	// for its grace period.
	sleep := v1.Config{
		Entrypoint: []string{"/bin/busybox", "sleep", "inf"},
		StopSignal: "SIGKILL",
	}
	idle := v1.Config{
		Cmd:        []string{"/bin/sleep", "inf"},
		Env:        []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		StopSignal: "SIGKILL",
	}
	images := map[name.Tag]v1.Image{}
	for _, i := range []struct {
		tag    string
		files  layerFiles
		links  map[string]string
		config v1.Config
	}{{PauseImage, pause, nil, sleep}, {ToolsImage, kit, links, idle}} {
		tag, err := name.NewTag(i.tag)
		if err != nil {
			return fmt.Errorf("name image %s: %w", i.tag, err)
		}
		if images[tag], err = image(i.files, i.links, i.config); err != nil {
			return fmt.Errorf("make image %s: %w", i.tag, err)
		}
	}
	if err := tarball.MultiWriteToFile(file, images); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}

// image makes an image of one layer.
func image(files layerFiles, links map[string]string, config v1.Config) (v1.Image, error) {
	content, err := files.tar(links)
	if err != nil {
		return nil, err
	}
	// Not compressed: it goes no farther than into [preload].
	img, err := mutate.AppendLayers(empty.Image, static.NewLayer(content, types.DockerUncompressedLayer))
	if err != nil {
		return nil, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file.Architecture, file.OS, file.Config = "amd64", "linux", config
	return mutate.ConfigFile(img, file)
}

// layerFiles are the programs and files of a layer by path.
type layerFiles map[string][]byte

// add adds a program and the libraries it is linked with.
func (l layerFiles) add(s system, program string) error {
	at, content, err := s.find(program)
	if err != nil {
		return err
	}
	l[at] = content
	return l.addLibraries(s, at, content)
}

func (l layerFiles) addLibraries(s system, at string, content []byte) error {
	object, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return fmt.Errorf("read program %s: %w", at, err)
	}
	needed, err := object.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("list the libraries of %s: %w", at, err)
	}
	for _, p := range object.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		loader, err := io.ReadAll(p.Open())
		if err != nil {
			return fmt.Errorf("read the loader's name in %s: %w", at, err)
		}
		file := strings.Trim(string(loader), "\x00/")
		if l[file] = s.read(file); l[file] == nil {
			return fmt.Errorf("find the loader /%s of %s: not in the base system", file, at)
		}
	}
	for _, library := range needed {
		file, content, err := s.library(library)
		if err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
		if _, there := l[file]; there {
			continue
		}
		l[file] = content
		if err := l.addLibraries(s, file, content); err != nil {
			return err
		}
	}
	return nil
}

// tar writes the layer: files, links to them, and directories that every
// container wants. The order is fixed, so equal layers have equal digests.
func (l layerFiles) tar(links map[string]string) ([]byte, error) {
	dirs := map[string]int64{"tmp": 0o1777, "proc": 0o755, "sys": 0o755, "dev": 0o755, "etc": 0o755, "root": 0o700, "run": 0o755}
	for file := range l {
		for d := path.Dir(file); d != "."; d = path.Dir(d) {
			if _, there := dirs[d]; !there {
				dirs[d] = 0o755
			}
		}
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, d := range slices.Sorted(maps.Keys(dirs)) {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: dirs[d]}); err != nil {
			return nil, err
		}
	}
	for _, file := range slices.Sorted(maps.Keys(l)) {
		mode := int64(0o755)
		if strings.HasPrefix(file, "etc/") {
			mode = 0o644
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: file, Mode: mode, Size: int64(len(l[file]))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(l[file]); err != nil {
			return nil, err
		}
	}
	for _, link := range slices.Sorted(maps.Keys(links)) {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: link, Linkname: links[link], Mode: 0o777}); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// system is a root file system in memory, by path without leading slash.
type system struct {
	files map[string][]byte
	links map[string]string // target relative to the link, or absolute
}

func readSystem(r io.Reader) (system, error) {
	s := system{map[string][]byte{}, map[string]string{}}
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return s, nil
		}
		if err != nil {
			return system{}, err
		}
		file := path.Clean(strings.TrimPrefix(h.Name, "./"))
		switch h.Typeflag {
		case tar.TypeReg:
			if s.files[file], err = io.ReadAll(in); err != nil {
				return system{}, err
			}
		case tar.TypeSymlink:
			s.links[file] = h.Linkname
		case tar.TypeLink:
			s.links[file] = "/" + path.Clean(strings.TrimPrefix(h.Linkname, "./"))
		}
	}
}

// read returns a file, links followed in every part of its path; nil is none.
func (s system) read(file string) []byte {
	for range 40 { // as the kernel's limit on links
		if content, ok := s.files[file]; ok {
			return content
		}
		var followed bool
		for at := file; at != "." && at != "/"; at = path.Dir(at) {
			target, ok := s.links[at]
			if !ok {
				continue
			}
			rest := strings.TrimPrefix(file, at)
			if !path.IsAbs(target) {
				target = path.Join(path.Dir(at), target)
			}
			file, followed = strings.TrimPrefix(path.Join(target, rest), "/"), true
			break
		}
		if !followed {
			return nil
		}
	}
	return nil
}

// find looks a program up where shells do.
func (s system) find(program string) (file string, content []byte, err error) {
	return s.search(program, "usr/bin", "usr/sbin", "bin", "sbin")
}

// library looks a shared library up where the loader does.
func (s system) library(soname string) (file string, content []byte, err error) {
	return s.search(soname, "usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib", "lib64", "usr/lib64")
}

func (s system) search(file string, dirs ...string) (string, []byte, error) {
	for _, dir := range dirs {
		if content := s.read(path.Join(dir, file)); content != nil {
			return path.Join(dir, file), content, nil
		}
	}
	return "", nil, fmt.Errorf("find %s in the base system: not in %s", file, strings.Join(dirs, ", "))
}
