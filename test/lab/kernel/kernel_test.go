package kernel

import (
	"bytes"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

func TestLostOptions(t *testing.T) {
	const got = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_S=\"fd:0\"\nCONFIG_M=m\n"
	for _, tt := range []struct {
		name, want string
		lost       []string
	}{
		{"taken", "# text = comment\nCONFIG_A=y\n\nCONFIG_S=\"fd:0\"\nCONFIG_B=n\n", nil},
		{"not there", "CONFIG_C=y", []string{"CONFIG_C=y"}},
		{"switched off", "CONFIG_B=y", []string{"CONFIG_B=y"}},
		{"selected against our will", "CONFIG_A=n\nCONFIG_M=n", []string{"CONFIG_A=n", "CONFIG_M=n"}},
		{"another value", `CONFIG_S="null"`, []string{`CONFIG_S="null"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if lost := lostOptions(tt.want, got); !slices.Equal(lost, tt.lost) {
				t.Errorf("lost %q, want %q", lost, tt.lost)
			}
		})
	}
}

func TestConfigOptionsOnce(t *testing.T) {
	seen := map[string]bool{}
	for line := range strings.Lines(umlConfig) {
		name, _, ok := strings.Cut(line, "=")
		if !ok || strings.HasPrefix(line, "#") {
			continue
		}
		if seen[name] {
			t.Errorf("%s is in uml.config twice", name)
		}
		seen[name] = true
	}
}

func TestLoadOrder(t *testing.T) {
	const dep = `kernel/fs/erofs/erofs.ko: kernel/lib/libcrc32c.ko kernel/fs/netfs/netfs.ko
kernel/lib/libcrc32c.ko:
kernel/fs/netfs/netfs.ko: kernel/lib/libcrc32c.ko
kernel/drivers/block/virtio-blk.ko:
`
	got, err := loadOrder(dep, []string{"virtio_blk", "erofs", "built_in"})
	want := []string{"kernel/drivers/block/virtio-blk.ko", "kernel/lib/libcrc32c.ko", "kernel/fs/netfs/netfs.ko", "kernel/fs/erofs/erofs.ko"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	if _, err := loadOrder("no colon", nil); err == nil {
		t.Error("a damaged modules.dep gave no error")
	}
}

func TestUnpackImage(t *testing.T) {
	zstd := exec.Command("zstd", "-q")
	elf := append([]byte("\x7fELF"), bytes.Repeat([]byte{1, 2, 3}, 1000)...)
	zstd.Stdin = bytes.NewReader(elf)
	packed, err := zstd.Output()
	if err != nil {
		t.Fatalf("run zstd (Debian package zstd): %v", err)
	}
	// The magic number occurs in the code before the stream, too.
	image := slices.Concat([]byte("setup code"), packed[:4], []byte("more code"), packed, []byte("trailer"))
	got, err := unpackImage(t.Context(), image)
	if err != nil || !bytes.Equal(got, elf) {
		t.Errorf("got %d bytes, %v; want %d", len(got), err, len(elf))
	}
	if _, err := unpackImage(t.Context(), []byte("nothing")); err == nil {
		t.Error("an image without a kernel gave no error")
	}
}
