package guest

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
)

// writeInitrd writes an initramfs: an uncompressed cpio archive in the "newc"
// format (Documentation/driver-api/early-userspace/buffer-format.rst) with init
// as /init, a console device, and files by their path in the archive.
func writeInitrd(to, init string, files map[string]string) error {
	var out bytes.Buffer
	inode := 0
	add := func(name string, mode, major, minor int, content []byte) {
		inode++
		pad := func() { out.Write(make([]byte, -out.Len()&3)) }
		// magic, ino, mode, uid, gid, nlink, mtime, size, dev 0:0, rdev, name size, checksum
		fmt.Fprintf(&out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name)+1, 0)
		out.WriteString(name + "\x00")
		pad()
		out.Write(content)
		pad()
	}
	const dir, device, file = 0o040755, 0o020600, 0o100755
	made := map[string]bool{".": true}
	var mkdir func(string)
	mkdir = func(name string) {
		if !made[name] {
			made[name] = true
			mkdir(path.Dir(name))
			add(name, dir, 0, 0, nil)
		}
	}
	mkdir("dev")
	add("dev/console", device, 5, 1, nil) // pid 1's standard files
	all := map[string]string{"init": init}
	maps.Copy(all, files)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		content, err := os.ReadFile(all[name])
		if err != nil {
			return fmt.Errorf("write the initramfs: %w", err)
		}
		mkdir(path.Dir(name))
		add(name, file, 0, 0, content)
	}
	add("TRAILER!!!", 0, 0, 0, nil)
	if err := os.WriteFile(to, out.Bytes(), 0o644); err != nil {
		return fmt.Errorf("write the initramfs: %w", err)
	}
	return nil
}
