package deviceplugin

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/sluice-network/sluice/internal/host"
)

// Pool is a set of interchangeable devices, offered as one extended resource.
type Pool struct {
	Prefix          string // of the name; empty for that of the Manager's options
	Resource        string // name without prefix, e.g. "intel_nics"
	ExcludeTopology bool   // do not tell the kubelet the devices' NUMA nodes
	RDMA            bool   // give containers the RDMA character devices of their VFs
	VhostNet        bool   // give containers /dev/vhost-net and /dev/net/tun
	Spread          bool   // take a pod's VFs from different PFs
	DeviceType      string // "netdevice" or "vfio-pci"; empty when the driver of each VF says it
	// Info is told to containers of a device besides the rest, by its ID, or by "*" for all.
	Info    map[string]map[string]string
	Devices []Device
}

// name is the resource's name with its prefix.
func (p *Pool) name(prefix string) string { return cmp.Or(p.Prefix, prefix) + "/" + p.Resource }

// userspace tells that the pod has the device by its vfio group.
func (p *Pool) userspace(d Device) bool {
	return p.DeviceType == DeviceTypeVFIO || p.DeviceType == "" && d.Driver == DeviceTypeVFIO
}

// Device is one virtual function of a pool, or one MacVLAN slot.
type Device struct {
	PCIAddress string // of a VF, domain:bus:device.function
	Slot       string // of a MacVLAN slot, host.SlotID
	Parent     string // of a MacVLAN slot: its link; besides these NUMANode and the health are given
	PFAddress  string
	PFName     string
	VFIndex    int
	Driver     string
	NUMANode   int    // -1 when the machine has none
	IOMMUGroup string // number as text, empty without an IOMMU
	LinkType   host.LinkType
	VDPA       string // virtio or vhost when the VF has such a vDPA device
	// Representor is the VF's netdev in the PF's switch; empty in legacy mode.
	Representor string
	Healthy     bool
	Reason      string // why it is not healthy
}

// ID is the device's ID towards the kubelet: a PCI address or a slot.
func (d Device) ID() string { return cmp.Or(d.Slot, d.PCIAddress) }

// DeviceTypeVFIO is the Pool.DeviceType of VFs that are handed to user space.
const DeviceTypeVFIO = "vfio-pci"

// check refuses what the kubelet would refuse, or what would be ambiguous to a
// container. Dots are refused although the kubelet takes them, because they
// become '_' in the environment, where "a.b" and "a_b" would be one name.
func (p *Pool) check(prefix string) error {
	name := p.name(prefix)
	switch errs := validation.IsQualifiedName("requests." + name); {
	case len(errs) > 0:
		return fmt.Errorf("resource %q: name is not a valid extended resource name (%s): change resourceName in the policy",
			name, strings.Join(errs, "; "))
	case strings.Contains(p.Resource, "."):
		return fmt.Errorf("resource %q: name contains '.': use only letters, digits, '-' and '_' in resourceName", name)
	}
	seen := make(map[string]bool, len(p.Devices))
	for _, d := range p.Devices {
		if d.Slot == "" && !host.ValidPCIAddress(d.PCIAddress) {
			return fmt.Errorf("resource %q: device %q is not a PCI address of the form 0000:01:00.0", name, d.PCIAddress)
		}
		if parent, _, err := host.ParseSlotID(d.Slot); d.Slot != "" && (err != nil || parent != d.Parent) {
			return fmt.Errorf("resource %q: device %q is not a MacVLAN slot of link %s", name, d.Slot, d.Parent)
		}
		if seen[d.ID()] {
			return fmt.Errorf("resource %q: device %s is listed twice", name, d.ID())
		}
		seen[d.ID()] = true
	}
	return nil
}

// checkPools returns the pools that can be served, keyed by name with prefix, and one
// joined error about the others. Of two pools that claim the same name (also
// when only their environment names are equal) or the same device neither is
// served: whichever were chosen, a pod could get a device meant for another.
func checkPools(prefix string, pools []Pool) (map[string]Pool, error) {
	var errs []error
	good := make(map[string]Pool, len(pools))
	byEnv := make(map[string][]string)
	byDevice := make(map[string][]string)
	for _, p := range pools {
		name := p.name(prefix)
		byEnv[envKey(name)] = append(byEnv[envKey(name)], name)
		if err := p.check(prefix); err != nil {
			errs = append(errs, err)
			continue
		}
		for _, d := range p.Devices {
			byDevice[d.ID()] = append(byDevice[d.ID()], name)
		}
		p.Devices = slices.SortedFunc(slices.Values(p.Devices), func(a, b Device) int {
			return cmp.Compare(a.ID(), b.ID())
		})
		good[name] = p
	}
	reject := func(claims map[string][]string, format string) {
		for _, what := range sortedKeys(claims) {
			if names := claims[what]; len(names) > 1 {
				slices.Sort(names)
				errs = append(errs, fmt.Errorf(format, what, strings.Join(names, ", ")))
				for _, n := range names {
					delete(good, n)
				}
			}
		}
	}
	reject(byEnv, "environment variable %s would belong to several resources (%s): give them names that differ in more than case")
	reject(byDevice, "device %s is in several resources (%s): make the selectors of their policies disjoint")
	return good, errors.Join(errs...)
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
