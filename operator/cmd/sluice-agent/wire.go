package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/go-logr/logr"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"

	"github.com/sluice-network/sluice/cni/enforce"
	"github.com/sluice-network/sluice/cni/enforce/cluster"
	"github.com/sluice-network/sluice/deviceplugin"
	"github.com/sluice-network/sluice/deviceplugin/config"
	"github.com/sluice-network/sluice/internal/cloud"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/operator/node"
)

// advertiser is the device plugin as package node sees it. It offers nothing
// before recovered is closed.
type advertiser struct {
	*deviceplugin.Manager
	recovered <-chan struct{}
}

func (a advertiser) Advertise(ctx context.Context, pools []node.Pool) error {
	select {
	case <-a.recovered:
	case <-ctx.Done():
		return ctx.Err()
	}
	return a.Manager.Advertise(ctx, devicePools(pools))
}

func devicePools(pools []node.Pool) []deviceplugin.Pool {
	out := make([]deviceplugin.Pool, 0, len(pools))
	for _, p := range pools {
		devices := make([]deviceplugin.Device, 0, len(p.Devices))
		for _, d := range p.Devices {
			devices = append(devices, deviceplugin.Device(d))
		}
		out = append(out, deviceplugin.Pool{
			Prefix: p.Prefix, Resource: p.Resource, ExcludeTopology: p.ExcludeTopology, RDMA: p.RDMA, VhostNet: p.VhostNet, Spread: p.Spread,
			DeviceType: p.DeviceType, Info: p.Info, Devices: devices,
		})
	}
	return out
}

// fromFile are the pools of the file of device pools, as package node sees them. prefix
// is that of the policies' resources.
func fromFile(f *config.File, ledger *deviceplugin.Ledger, prefix string) func([]node.Candidate) []node.Pool {
	return func(candidates []node.Candidate) []node.Pool {
		all := make([]config.Candidate, 0, len(candidates))
		for _, c := range candidates {
			if c.Resource != "" {
				c.Resource = prefix + "/" + c.Resource
			}
			all = append(all, config.Candidate{
				Device: deviceplugin.Device(c.Device), Vendor: c.Vendor, DeviceID: c.DeviceID, RDMA: c.RDMA, Carrier: c.Carrier, Resource: c.Resource,
				Hand: ledger.GivenFrom(c.PCIAddress),
			})
		}
		var pools []node.Pool
		for _, p := range f.Pools(all) {
			devices := make([]node.Device, 0, len(p.Devices))
			for _, d := range p.Devices {
				devices = append(devices, node.Device(d))
			}
			pools = append(pools, node.Pool{
				Prefix: p.Prefix, Resource: p.Resource, ExcludeTopology: p.ExcludeTopology, RDMA: p.RDMA, VhostNet: p.VhostNet, Spread: p.Spread,
				DeviceType: p.DeviceType, Info: p.Info, Devices: devices,
			})
		}
		return pools
	}
}

// exists checks a VF, or the parent of a MacVLAN slot, at its allocation. A VF whose
// netdev is still in a former pod passes: ADD waits for it, whereas a refused
// allocation fails the pod.
func exists(vfs *host.Attacher, links *host.Host) func(string) error {
	return func(id string) error {
		if parent, _, err := host.ParseSlotID(id); err == nil {
			return links.CheckParent(parent)
		}
		vf, err := vfs.VF(id)
		if err == nil && vf.Driver == "" {
			err = fmt.Errorf("VF %s has no driver", id)
		}
		return err
	}
}

// networks asks the cloud that the machine is in; nil when that is none known.
func networks(sysfs string) func(context.Context) (map[string]string, error) {
	if !cloud.IsOpenStack(sysfs) {
		return nil
	}
	return func(ctx context.Context) (map[string]string, error) { return cloud.Networks(ctx, cloud.Metadata) }
}

// baselines lets the CNI server be made before those that it asks.
type baselines func(pciAddress string) (net.HardwareAddr, int, bool)

// Baseline implements attach.Baselines.
func (b baselines) Baseline(pciAddress string) (net.HardwareAddr, int, bool) { return b(pciAddress) }

// registered is the readiness towards the kubelet.
func registered(plugin *deviceplugin.Manager) func() error {
	return func() error {
		for _, s := range plugin.Status() {
			if s.Err != nil {
				return fmt.Errorf("resource %s: %w", s.Resource, s.Err)
			}
		}
		return nil
	}
}

// closed is the readiness of what closes a channel when it is ready.
func closed(c <-chan struct{}, otherwise string) func() error {
	return func() error {
		select {
		case <-c:
			return nil
		default:
			return errors.New(otherwise)
		}
	}
}

// replaced waits until there is another file at path than before. The CNI
// server, which finishes what an earlier agent left before it listens, puts its
// socket in place of the earlier agent's with one rename.
func replaced(ctx context.Context, path string, before os.FileInfo) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		// Inode numbers are given again, hence the time.
		now, err := os.Lstat(path)
		if err == nil && (before == nil || !os.SameFile(before, now) || !before.ModTime().Equal(now.ModTime())) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// conditions are what the node's state tells of the agent itself.
func conditions(aliasErr error, pools *config.File, policy func() metav1.Condition) func() []metav1.Condition {
	return func() []metav1.Condition {
		enforced := policy()
		enforced.Message = shorten(enforced.Message)
		all := []metav1.Condition{aliasCondition(aliasErr), enforced}
		if inEffect, message, asked := pools.State(); asked {
			all = append(all, devicePoolsCondition(inEffect, message))
		}
		return all
	}
}

// conditionDevicePools tells whether the file of device pools is in effect; it is there
// only when the file is.
const conditionDevicePools = "DevicePoolsFileInEffect"

func devicePoolsCondition(inEffect bool, message string) metav1.Condition {
	if !inEffect {
		return metav1.Condition{Type: conditionDevicePools, Status: metav1.ConditionFalse, Reason: "Refused", Message: shorten(message)}
	}
	return metav1.Condition{Type: conditionDevicePools, Status: metav1.ConditionTrue, Reason: "InEffect", Message: message}
}

// shorten keeps a message well within the 32768 bytes that a condition may have.
func shorten(message string) string {
	const limit = 4096
	if len(message) <= limit {
		return message
	}
	return strings.ToValidUTF8(message[:limit], "") + "..."
}

// conditionAlias tells, in a node's state, what network definitions of type
// "sriov" run on the node.
const conditionAlias = "SriovAliasInstalled"

// aliasCondition tells why the alias is not installed, or that it is.
func aliasCondition(err error) metav1.Condition {
	c := metav1.Condition{Type: conditionAlias, Status: metav1.ConditionTrue, Reason: "Installed", Message: `network definitions of type "sriov" use Sluice`}
	if err != nil {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, "ForeignPlugin", err.Error()
	}
	return c
}

// givesRDMA tells whether who has the device can use RDMA with it: as it was given, or of
// one that another plugin gave, as its pool is.
func givesRDMA(id string, ledger *deviceplugin.Ledger, plugin *deviceplugin.Manager) bool {
	return ledger.RDMA(id) || plugin.RDMA(id)
}

// enforcement makes what puts network policy in force on the node, and what follows the
// policies for it.
func enforcement(apiServer *rest.Config, node string, events record.EventRecorder, kernel *host.Attacher, log logr.Logger) (*enforce.Enforcer, *cluster.Cluster, error) {
	shown, err := enforce.Connect(apiServer, events)
	if err != nil {
		return nil, nil, err
	}
	enforcer := enforce.New(enforce.Options{
		Node: node, Engine: enforce.NewEngine(kernel), OpenNetns: kernel.OpenNetns, Addresses: kernel.OwnAddresses, API: shown, Log: log,
	})
	policies, err := cluster.New(apiServer, node, []string{enforce.Annotation}, enforcer, log)
	if err != nil {
		return nil, nil, err
	}
	enforcer.Cluster = policies
	return enforcer, policies, nil
}
