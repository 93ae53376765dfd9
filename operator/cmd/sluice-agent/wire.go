package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-network/sluice/deviceplugin"
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
			Resource: p.Resource, ExcludeTopology: p.ExcludeTopology, RDMA: p.RDMA, VhostNet: p.VhostNet,
			DeviceType: p.DeviceType, Devices: devices,
		})
	}
	return out
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

// baselines lets the CNI server be made before the agent that it asks.
type baselines func() *node.Agent

// Baseline implements attach.Baselines.
func (b baselines) Baseline(pciAddress string) (net.HardwareAddr, int, bool) {
	return b().Baseline(pciAddress)
}

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
