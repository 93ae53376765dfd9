package deviceplugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	nad "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"

	"github.com/sluice-network/sluice/internal/host"
)

const deviceInfoSuffix = "-device.json"

// deviceInfo is the content of a device-info file, as the NPWG Device
// Information Specification 1.1.0 defines it.
func deviceInfo(d Device, f facts) nad.DeviceInfo {
	if d.VDPA != "" {
		return nad.DeviceInfo{
			Type:    "vdpa",
			Version: "1.1.0",
			Vdpa: &nad.VdpaDevice{
				ParentDevice:      vdpaDevice(d.PCIAddress),
				Driver:            d.VDPA,
				Path:              f.vdpa,
				PciAddress:        d.PCIAddress,
				PfPciAddress:      d.PFAddress,
				RepresentorDevice: d.Representor,
			},
		}
	}
	return nad.DeviceInfo{
		Type:    "pci",
		Version: "1.1.0",
		Pci: &nad.PciDevice{
			PciAddress:        d.PCIAddress,
			PfPciAddress:      d.PFAddress,
			RdmaDevice:        f.rdma.Device,
			RepresentorDevice: d.Representor,
		},
	}
}

// deviceInfoName is the file's name, which meta plugins compute the same way
// from the resource and the device ID.
func deviceInfoName(resource, id string) string {
	return strings.ReplaceAll(resource, "/", "-") + "-" + id + deviceInfoSuffix
}

// writeDeviceInfo writes the file of one device. The directory is on a tmpfs and the file
// means nothing after a reboot, hence no fsync.
func writeDeviceInfo(dir, resource, id string, info nad.DeviceInfo) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("create device-info directory: %w", err)
	}
	// Other plugins create this directory without permission bits, and then
	// readers that are not root cannot enter it.
	if st, err := os.Stat(dir); err == nil && st.Mode().Perm() != 0o755 {
		if err := os.Chmod(dir, 0o755); err != nil {
			return fmt.Errorf("make device-info directory readable: %w", err)
		}
	}
	b, err := json.Marshal(info)
	if err != nil {
		return fmt.Errorf("encode device information of %s: %w", id, err)
	}
	if err := replaceFile(filepath.Join(dir, deviceInfoName(resource, id)), b); err != nil {
		return fmt.Errorf("write device information of %s: %w", id, err)
	}
	return nil
}

// replaceFile puts a file that all may read in place with a single rename, so that no
// reader sees half of it.
func replaceFile(path string, b []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".sluice-*")
	if err != nil {
		return err
	}
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Chmod(0o444), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return nil
}

// ReadDeviceInfo reads the file of one device, of whichever plugin; nil when it has
// none.
func ReadDeviceInfo(dir, resource, id string) (*nad.DeviceInfo, error) {
	b, err := os.ReadFile(filepath.Join(dir, filepath.Base(deviceInfoName(resource, id))))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	info := &nad.DeviceInfo{}
	if err == nil {
		err = json.Unmarshal(b, info)
	}
	if err != nil {
		return nil, fmt.Errorf("read device information of %s: %w", id, err)
	}
	return info, nil
}

// pruneDeviceInfo removes the files of resource whose device keep does not
// know. Files of other resources stay: other plugins may use our prefix too.
func pruneDeviceInfo(dir, resource string, keep func(id string) bool) error {
	return prune(dir, strings.ReplaceAll(resource, "/", "-")+"-", deviceInfoSuffix, func(id string) bool {
		// The ID must be a whole PCI address, or "net" would own the files of "net-fast".
		return !host.ValidPCIAddress(id) || keep(id)
	})
}

// prune removes the files <prefix><device ID><suffix> of devices that keep does not know.
func prune(dir, prefix, suffix string, keep func(id string) bool) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove what is of no device any more: %w", err)
	}
	var errs []error
	for _, e := range entries {
		id, ours := strings.CutPrefix(e.Name(), prefix)
		if id, whole := strings.CutSuffix(id, suffix); ours && whole && !keep(id) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("remove what is of no device any more: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}
