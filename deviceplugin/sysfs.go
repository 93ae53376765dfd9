package deviceplugin

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/sluice-network/sluice/internal/host"
)

// readFacts reads from sysfs, mounted at sys, what an allocation of d needs and
// the pool does not say. Everything in it is optional to the device, so what is
// not there is simply absent. Character devices are looked up in sysfs, not in
// /dev: the agent has a /dev of its own, and devtmpfs makes a node for exactly
// the devices in sysfs.
func readFacts(sys string, d Device) facts {
	dev := filepath.Join(sys, "bus/pci/devices", d.PCIAddress)
	f := facts{noIOMMU: readLine(filepath.Join(sys, "kernel/iommu_groups", d.IOMMUGroup, "name")) == "vfio-noiommu"}
	vdpa := filepath.Join(sys, "bus/vdpa/devices", vdpaDevice(d.PCIAddress))
	switch d.VDPA {
	case host.VDPAVhost:
		if name := entry(vdpa, "vhost-vdpa-"); name != "" {
			f.vdpa = "/dev/" + name
		}
	case host.VDPAVirtio:
		if name := entry(vdpa, "virtio"); name != "" {
			f.vdpa = "/sys/bus/virtio/devices/" + name
		}
	}
	if name := entry(filepath.Join(dev, "infiniband"), ""); name != "" {
		_, err := os.Stat(filepath.Join(sys, "class/misc/rdma_cm"))
		f.rdma = rdma{
			Device: name,
			Uverbs: entry(filepath.Join(dev, "infiniband_verbs"), "uverbs"),
			Umad:   entry(filepath.Join(dev, "infiniband_mad"), "umad"),
			Issm:   entry(filepath.Join(dev, "infiniband_mad"), "issm"),
			CM:     err == nil,
		}
	}
	return f
}

// vdpaDevice is the name that package host gives a VF's vDPA device.
func vdpaDevice(pciAddress string) string { return "vdpa:" + pciAddress }

// entry returns the first name in dir that begins with prefix, or "".
func entry(dir, prefix string) string {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			return e.Name()
		}
	}
	return ""
}

func readLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
