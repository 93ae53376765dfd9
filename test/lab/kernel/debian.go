package kernel

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/sluice-network/sluice/test/lab/artefact"
)

// Files in the output of [Debian].
const (
	DebianImage   = "vmlinux"       // ELF image, started directly (PVH)
	DebianModules = "modules.erofs" // image of /lib/modules/<release>
	DebianEarly   = "early"         // the modules that reach the root, NN-name.ko
)

// earlyModules are needed before the root file system is there; [Debian] adds
// what they depend on.
var earlyModules = []string{"virtio_blk", "crc32c_generic", "erofs", "overlay"}

// moduleDirs are the parts of Debian's modules that guests get: networking,
// file systems, what QEMU's machine has. All of them would be 500 MB.
var moduleDirs = []string{
	"kernel/net/core", "kernel/net/sched", "kernel/net/netfilter", "kernel/net/ipv4", "kernel/net/ipv6", "kernel/net/bridge",
	"kernel/net/8021q", "kernel/net/802", "kernel/net/llc", "kernel/net/packet", "kernel/net/netlink", "kernel/net/xdp",
	"kernel/net/nsh", "kernel/net/psample", "kernel/net/openvswitch", "kernel/net/unix", "kernel/net/mpls", "kernel/net/tls",
	"kernel/lib", "kernel/crypto", "kernel/arch/x86/crypto", "kernel/virt/lib",
	"kernel/drivers/net/bonding", "kernel/drivers/net/vxlan", "kernel/drivers/net/ipvlan", "kernel/drivers/net/team",
	"kernel/drivers/net/macvlan.ko", "kernel/drivers/net/macvtap.ko", "kernel/drivers/net/veth.ko", "kernel/drivers/net/dummy.ko",
	"kernel/drivers/net/ifb.ko", "kernel/drivers/net/tun.ko", "kernel/drivers/net/tap.ko", "kernel/drivers/net/vrf.ko",
	"kernel/drivers/net/geneve.ko", "kernel/drivers/net/net_failover.ko", "kernel/drivers/net/virtio_net.ko",
	"kernel/drivers/net/ethernet/intel/igb", "kernel/drivers/net/ethernet/intel/igbvf",
	"kernel/drivers/dca", "kernel/drivers/i2c/algos", "kernel/drivers/i2c/i2c-core.ko", "kernel/drivers/ptp", "kernel/drivers/pps",
	"kernel/drivers/vfio", "kernel/drivers/vhost", "kernel/drivers/vdpa", "kernel/drivers/iommu",
	"kernel/drivers/char/virtio_console.ko", "kernel/drivers/char/hw_random/virtio-rng.ko",
	"kernel/drivers/block/virtio_blk.ko", "kernel/drivers/block/loop.ko", "kernel/drivers/virtio",
	"kernel/fs/erofs", "kernel/fs/overlayfs", "kernel/fs/fuse", "kernel/fs/netfs", "kernel/net/core/failover.ko",
}

// Debian is the step for Debian's kernel.
var Debian = sync.OnceValue(func() *artefact.Step {
	return &artefact.Step{
		Name: "debian-kernel",
		Inputs: []artefact.Input{
			artefact.Text("recipe", "1"), artefact.Text("series", Series),
			artefact.Text("modules", strings.Join(moduleDirs, " ")), artefact.Text("early", strings.Join(earlyModules, " ")),
		},
		Packages: artefact.UnpackTools,
		Build:    buildDebian,
	}
})

func buildDebian(ctx context.Context, b *artefact.Build) error {
	// The unsigned package holds the same files, and no signed one is needed.
	pattern := regexp.MustCompile(`^linux-image-` + regexp.QuoteMeta(Series) + `\.\d+\+deb\d+-amd64-unsigned$`)
	pkg, err := b.Newest(ctx, "linux-image-"+Series, pattern)
	if err != nil {
		return err
	}
	release := strings.TrimSuffix(strings.TrimPrefix(pkg, "linux-image-"), "-unsigned")
	b.Say("downloading %s", pkg)
	unpacked := filepath.Join(b.Work, "unpacked")
	if err := b.Download(ctx, unpacked, pkg); err != nil {
		return err
	}
	image, err := os.ReadFile(filepath.Join(unpacked, "boot/vmlinuz-"+release))
	if err != nil {
		return fmt.Errorf("read the kernel image: %w", err)
	}
	elf, err := unpackImage(ctx, image)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(b.Out, DebianImage), elf, 0o644); err != nil {
		return err
	}
	from := filepath.Join(unpacked, "lib/modules", release)
	if _, err := os.Stat(from); errors.Is(err, fs.ErrNotExist) {
		from = filepath.Join(unpacked, "usr/lib/modules", release)
	}
	root := filepath.Join(b.Work, "root")
	modules := filepath.Join(root, "lib/modules", release)
	if err := pickModules(from, modules); err != nil {
		return err
	}
	b.Say("unpacking modules")
	if err := b.Run(ctx, "find", modules, "-name", "*.ko.xz", "-exec", "xz", "-dq", "{}", "+"); err != nil {
		return err
	}
	if err := b.Run(ctx, "depmod", "-b", root, release); err != nil {
		return err
	}
	if err := early(modules, filepath.Join(b.Out, DebianEarly)); err != nil {
		return err
	}
	// Its standard output is one progress line per file.
	return b.RunCmd(ctx, artefact.Cmd{Out: io.Discard, Args: []string{"mkfs.erofs", "-d0", "--all-root", filepath.Join(b.Out, DebianModules), modules}})
}

// unpackImage returns the ELF image inside a zstd-compressed bzImage. The
// compressed part has no address in the header that tools agree on, so it is
// found by its magic number; what follows it is not zstd and ends the unpacking.
func unpackImage(ctx context.Context, image []byte) ([]byte, error) {
	magic := []byte{0x28, 0xb5, 0x2f, 0xfd}
	for at := 0; ; at++ {
		i := bytes.Index(image[at:], magic)
		if i < 0 {
			return nil, errors.New("find the ELF image in the kernel: no zstd stream unpacks to one")
		}
		at += i
		zstd := exec.CommandContext(ctx, "zstd", "-dcq")
		zstd.Stdin = bytes.NewReader(image[at:])
		elf, _ := zstd.Output() // always fails, at the bytes after the stream
		if bytes.HasPrefix(elf, []byte("\x7fELF")) {
			return elf, ctx.Err()
		}
	}
}

// pickModules moves the chosen modules and the lists depmod reads.
func pickModules(from, to string) error {
	move := func(rel string) error {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(to, rel)), 0o755); err != nil {
			return err
		}
		return os.Rename(filepath.Join(from, rel), filepath.Join(to, rel))
	}
	for _, name := range []string{"modules.order", "modules.builtin", "modules.builtin.modinfo"} {
		if err := move(name); err != nil {
			return fmt.Errorf("keep the modules' lists: %w", err)
		}
	}
	for _, dir := range moduleDirs {
		if strings.HasSuffix(dir, ".ko") {
			dir += ".xz"
		}
		// What a series has built in, or does not have, is not there.
		if err := move(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("keep the modules %s: %w", dir, err)
		}
	}
	return nil
}

// early copies the early modules and their dependencies, named so that the
// order of their names is the order to load them in.
func early(modules, to string) error {
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	dep, err := os.ReadFile(filepath.Join(modules, "modules.dep"))
	if err != nil {
		return fmt.Errorf("read the modules' dependencies: %w", err)
	}
	order, err := loadOrder(string(dep), earlyModules)
	if err != nil {
		return err
	}
	for i, path := range order {
		content, err := os.ReadFile(filepath.Join(modules, path))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(to, fmt.Sprintf("%02d-%s", i, filepath.Base(path))), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// loadOrder returns the paths of the named modules and all they depend on, each
// after its dependencies, from the text of modules.dep. A name without a file
// is built into the kernel.
func loadOrder(dep string, names []string) ([]string, error) {
	needs, paths := map[string][]string{}, map[string]string{}
	for sc := bufio.NewScanner(strings.NewReader(dep)); sc.Scan(); {
		path, list, ok := strings.Cut(sc.Text(), ":")
		if !ok {
			return nil, fmt.Errorf("read modules.dep: line %q has no colon", sc.Text())
		}
		needs[path] = strings.Fields(list)
		paths[strings.ReplaceAll(strings.TrimSuffix(filepath.Base(path), ".ko"), "-", "_")] = path
	}
	var order []string
	seen := map[string]bool{}
	var visit func(string)
	visit = func(path string) {
		if seen[path] {
			return
		}
		seen[path] = true
		for _, n := range needs[path] {
			visit(n)
		}
		order = append(order, path)
	}
	for _, n := range names {
		if p, ok := paths[n]; ok {
			visit(p)
		}
	}
	return order, nil
}
