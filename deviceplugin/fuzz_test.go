package deviceplugin

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/sluice-network/sluice/internal/host"
)

var envName = regexp.MustCompile(`^PCIDEVICE_[A-Z0-9_-]+$`)

// What people write as prefix, resource name and device either makes files and
// variables that are where and what they should be, or is refused by name.
func FuzzCheckPools(f *testing.F) {
	f.Add("openshift.io", "intel_nics", "0000:01:00.1")
	f.Add("a.b-c.example.com", "Nic-0", "10000:ff:1f.7")
	f.Add("", "../../x", "0000:01:00.1/..")
	f.Add("x/y", "a.b", "")
	f.Fuzz(func(t *testing.T, prefix, name, address string) {
		good, err := checkPools(prefix, []Pool{pool(name, Device{PCIAddress: address})})
		if (err == nil) != (len(good) == 1) {
			t.Fatalf("%d pools and %v", len(good), err)
		}
		if err != nil {
			if !strings.Contains(err.Error(), "resource ") {
				t.Fatalf("the error names no resource: %v", err)
			}
			return
		}
		full := prefix + "/" + name
		key := envKey(full)
		if !envName.MatchString(key) || !envName.MatchString(shellKey(key)) || strings.Contains(shellKey(key), "-") {
			t.Fatalf("%s is the variable %q", full, key)
		}
		if p := socketPath("/dir", full); filepath.Dir(p) != "/dir" || len(p) > maxSocketPath {
			t.Fatalf("%s has the socket %q", full, p)
		}
		if n := deviceInfoName(full, address); filepath.Base(n) != n {
			t.Fatalf("%s has the file %q", full, n)
		}
		if !host.ValidPCIAddress(address) {
			t.Fatalf("took the device %q", address)
		}
	})
}

// Only files of this resource's devices are removed, whatever lies beside them.
func FuzzPruneDeviceInfo(f *testing.F) {
	f.Add("p.io/net", "p.io-net-0000:01:00.1-device.json")
	f.Add("p.io/net", "p.io-net-fast-0000:01:00.1-device.json")
	f.Add("p.io/net", "p.io-net-device.json")
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, resource, file string) {
		path := filepath.Join(dir, file)
		if filepath.Base(path) != file || os.WriteFile(path, nil, 0o600) != nil {
			return // not a file name
		}
		defer os.Remove(path)
		if err := pruneDeviceInfo(dir, resource, func(string) bool { return false }); err != nil {
			t.Fatal(err)
		}
		id := strings.TrimSuffix(file, deviceInfoSuffix)
		id = id[strings.LastIndexByte(id, '-')+1:]
		ours := host.ValidPCIAddress(id) && file == deviceInfoName(resource, id)
		if _, err := os.Stat(path); os.IsNotExist(err) != ours {
			t.Fatalf("of resource %q, %q: removed %t", resource, file, !ours)
		}
	})
}
