package deviceplugin

import (
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
	"strings"

	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"github.com/sluice-network/sluice/internal/host"
)

// facts is what sysfs says about one device at the time of its allocation.
type facts struct {
	noIOMMU bool   // its IOMMU group is one that vfio made up (enable_unsafe_noiommu_mode)
	rdma    rdma   // zero when it has no RDMA device
	vdpa    string // path of its vDPA device: a node of vhost, a folder of virtio's bus
}

// rdma are the names of the RDMA device of a VF and of its character devices.
type rdma struct {
	Device string // "mlx5_2"
	Uverbs string // "uverbs2"
	Umad   string // "umad2"
	Issm   string // "issm2"
	CM     bool   // /dev/infiniband/rdma_cm exists
}

// envKey is the environment name that holds a container's device IDs, in the
// form applications know: upper case, '.' and '/' become '_', hyphens stay. It
// begins with PCIDEVICE_ for MacVLAN slots, too, as other plugins have it for
// whatever devices they offer: who looks for a resource computes the name.
func envKey(resource string) string {
	return strings.ToUpper("PCIDEVICE_" + strings.NewReplacer(".", "_", "/", "_").Replace(resource))
}

// shellKey is envKey in a form that a shell can refer to.
func shellKey(key string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, key)
}

// aliases maps every key to its shell form. A key whose shell form is also a
// name of another key ("A-B" beside "A_B") has no alias: the established form
// of one resource must never hold the devices of another.
func aliases(keys []string) map[string]string {
	claims := make(map[string]int)
	for _, k := range keys {
		claims[shellKey(k)]++
	}
	out := make(map[string]string)
	for _, k := range keys {
		if alias := shellKey(k); alias != k && claims[alias] == 1 {
			out[k] = alias
		}
	}
	return out
}

// infoEntry is what <key>_INFO says about one device: provider -> name -> value. Of
// "sluice", the resource is what a network names to get the device, whose PCI address
// network-status then tells beside the interface.
type infoEntry map[string]map[string]string

// container computes what a container is given for devices (sorted by ID) of
// the pool: its environment, and the device nodes of each device.
func container(pool Pool, name, key, alias string, devices []Device, known map[string]facts) (map[string]string, []deviceNodes, error) {
	ids := make([]string, 0, len(devices))
	info := make(map[string]infoEntry, len(devices))
	nodes := make([]deviceNodes, len(devices))
	for i, d := range devices {
		e, err := pool.give(d, known[d.ID()], &nodes[i])
		if err != nil {
			return nil, nil, err
		}
		e["sluice"]["resource"] = name
		ids = append(ids, d.ID())
		info[d.ID()] = e
	}
	encoded, err := json.Marshal(info)
	if err != nil {
		return nil, nil, fmt.Errorf("encode device information: %w", err)
	}
	env := map[string]string{key: strings.Join(ids, ","), key + "_INFO": string(encoded)}
	if alias != "" {
		maps.Copy(env, map[string]string{alias: env[key], alias + "_INFO": env[key+"_INFO"]})
	}
	return env, nodes, nil
}

// give computes what a container is told of a device, and adds its device nodes.
func (p *Pool) give(d Device, f facts, nodes *deviceNodes) (infoEntry, error) {
	e := infoEntry{"generic": {"deviceID": d.ID()}, "sluice": {}}
	if d.Slot != "" {
		e["macvlan"] = map[string]string{"parent": d.Parent}
	} else {
		e["sluice"]["pf"], e["sluice"]["vf"] = d.PFName, strconv.Itoa(d.VFIndex)
	}
	if p.userspace(d) {
		if d.IOMMUGroup == "" {
			return nil, fmt.Errorf("device %s has no IOMMU group: enable the IOMMU (intel_iommu=on or amd_iommu=on) "+
				"or load vfio with enable_unsafe_noiommu_mode=1", d.PCIAddress)
		}
		group := "/dev/vfio/" + d.IOMMUGroup
		onHost := group
		if f.noIOMMU {
			onHost = "/dev/vfio/noiommu-" + d.IOMMUGroup
		}
		nodes.add("/dev/vfio/vfio", "/dev/vfio/vfio")
		nodes.add(onHost, group)
		e["vfio"] = map[string]string{"mount": "/dev/vfio/vfio", "dev-mount": group}
	}
	if d.VDPA == host.VDPAVhost {
		if f.vdpa == "" {
			return nil, fmt.Errorf("device %s has no vhost-vdpa node: load module vhost_vdpa on the node", d.PCIAddress)
		}
		nodes.add(f.vdpa, f.vdpa)
		e["vdpa"] = map[string]string{"mount": f.vdpa}
	}
	if p.RDMA {
		if entry := nodes.addRDMA(f.rdma); len(entry) > 0 {
			e["rdma"] = entry
		}
	}
	if p.VhostNet {
		nodes.add("/dev/vhost-net", "/dev/vhost-net")
		nodes.add("/dev/net/tun", "/dev/net/tun")
		e["vhost"] = map[string]string{"net-mount": "/dev/vhost-net", "tun-mount": "/dev/net/tun"}
	}
	if extra := p.extra(d.ID()); len(extra) > 0 {
		e["extra"] = extra
	}
	return e, nil
}

// extra is what Info says of the device: what is said of it alone goes before what is
// said of all.
func (p *Pool) extra(id string) map[string]string {
	extra := maps.Clone(p.Info["*"])
	if extra == nil {
		return p.Info[id]
	}
	maps.Copy(extra, p.Info[id])
	return extra
}

// deviceNodes are device nodes for a container, each path once: the container
// runtime rejects a node that is given twice.
type deviceNodes []*api.DeviceSpec

func (n *deviceNodes) add(onHost, inContainer string) {
	for _, s := range *n {
		if s.ContainerPath == inContainer {
			return
		}
	}
	*n = append(*n, &api.DeviceSpec{HostPath: onHost, ContainerPath: inContainer, Permissions: "rw"})
}

func (n *deviceNodes) addRDMA(r rdma) map[string]string {
	entry := make(map[string]string)
	if r.Device == "" {
		return entry
	}
	entry["rdma_dev"] = r.Device
	char := func(key, name string) {
		if name != "" {
			path := "/dev/infiniband/" + name
			n.add(path, path)
			entry[key] = path
		}
	}
	char("uverbs", r.Uverbs)
	char("umad", r.Umad)
	char("issm", r.Issm)
	if r.CM {
		char("rdma_cm", "rdma_cm")
	}
	return entry
}
