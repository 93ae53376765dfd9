// Command sluice-agent is the node half of Sluice: one process that owns the
// life of every VF of its node, from configuration to attachment and back.
//
// It only wires the rooms together: internal/host (the kernel), operator/node
// (inventory and configuration), deviceplugin (towards the kubelet) and
// cni/server (towards the container runtime, through the shim that it installs
// into the node's CNI directory).
//
// What an earlier agent left unfinished is undone, from the journal of
// attachments, before any VF is configured or offered. On SIGTERM requests in
// progress are finished, new ones are refused (the runtime tries again), and
// the kubelet is told by closing the device plugin's sockets; pods keep their
// interfaces.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"

	"github.com/sluice-network/sluice/cni/ipam"
	"github.com/sluice-network/sluice/cni/server"
	"github.com/sluice-network/sluice/cni/standalone"
	"github.com/sluice-network/sluice/deviceplugin"
	"github.com/sluice-network/sluice/deviceplugin/config"
	"github.com/sluice-network/sluice/deviceplugin/podresources"
	"github.com/sluice-network/sluice/internal/durable"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/ovsdb"
	"github.com/sluice-network/sluice/operator/node"
)

func main() {
	c, err := parse(os.Args[1:], os.Getenv)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		// The agent mostly waits for the kernel. With a second processor idle, the runtime's
		// monitor looks after each call that waits, for up to 10 ms, and a thread wakes
		// for each goroutine that starts: a quarter of the CPU time of an ADD and DEL.
		if os.Getenv("GOMAXPROCS") == "" {
			runtime.GOMAXPROCS(1)
		}
		ctrl.SetLogger(klog.Background())
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		err = run(ctx, c)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sluice-agent:", err)
		os.Exit(1)
	}
}

// settings are what the agent is told by flags and environment.
type settings struct {
	node, nodeIP, namespace, prefix string

	stateDir, upstreamDir, sriovCNIDir, socket, shim, cniDir string
	devicePlugins, podResources, deviceInfo                  string
	devicePools, cdiDir                                      string
	systemBus, modprobeDir                                   string
	sysfs, listen                                            string
	replaceSriovCNI                                          bool
}

func parse(args []string, env func(string) string) (*settings, error) {
	c := &settings{}
	f := flag.NewFlagSet("sluice-agent", flag.ContinueOnError)
	logging := flag.NewFlagSet("", flag.ContinueOnError)
	klog.InitFlags(logging)
	f.Var(logging.Lookup("v").Value, "v", "log verbosity: 0 for what people act on, 1 for every CNI call")
	def := func(name, otherwise string) string {
		if v := env(name); v != "" {
			return v
		}
		return otherwise
	}
	f.StringVar(&c.node, "node-name", env("NODE_NAME"), "name of the node this agent is on (environment NODE_NAME)")
	f.StringVar(&c.nodeIP, "node-ip", env("NODE_IP"), "address of the node in the cluster (environment NODE_IP)")
	f.StringVar(&c.namespace, "namespace", env("POD_NAMESPACE"), "namespace of the node states (environment POD_NAMESPACE)")
	f.StringVar(&c.prefix, "resource-prefix", def("RESOURCE_PREFIX", "openshift.io"), "prefix of the resource names (environment RESOURCE_PREFIX)")
	f.StringVar(&c.stateDir, "state-dir", "/var/lib/sluice", "directory for what must survive a reboot")
	f.StringVar(&c.upstreamDir, "sriov-operator-dir", "/etc/sriov-operator", "where the SR-IOV network operator left its files, to take its VFs over")
	f.StringVar(&c.sriovCNIDir, "sriov-cni-dir", "/var/lib/cni/sriov", "where sriov-cni kept its state, to take over the VFs of pods that run; empty for none")
	f.StringVar(&c.socket, "socket", "/var/run/sluice/cni.sock", "socket that the CNI shim calls")
	f.StringVar(&c.shim, "shim", "/sluice-cni", "CNI shim to install")
	f.StringVar(&c.cniDir, "cni-bin-dir", "/opt/cni/bin", "directory of the node's CNI plugins")
	f.BoolVar(&c.replaceSriovCNI, "replace-sriov-cni", false, `take the place of another project's CNI plugin "sriov" (environment REPLACE_SRIOV_CNI)`)
	f.StringVar(&c.devicePlugins, "device-plugin-dir", "/var/lib/kubelet/device-plugins", "the kubelet's device-plugin directory")
	f.StringVar(&c.podResources, "pod-resources-socket", "/var/lib/kubelet/pod-resources/kubelet.sock", "the kubelet's pod-resources socket")
	f.StringVar(&c.deviceInfo, "device-info-dir", "/var/run/k8s.cni.cncf.io/devinfo/dp", "directory for device-info files")
	f.StringVar(&c.devicePools, "device-pools", "/etc/pcidp/config.json", "config.json of the SR-IOV network device plugin, for pools besides those of policies; its folder is followed if it is there when the agent starts")
	f.StringVar(&c.cdiDir, "cdi-dir", env("CDI_DIR"), "directory for CDI specifications, by which the runtime gives pods their device nodes; without it kubelet is told of them (environment CDI_DIR)")
	f.StringVar(&c.systemBus, "system-bus-socket", "/run/dbus/system_bus_socket", "the node's D-Bus, where systemd loads modules, and reboots the node when its pool allows that")
	f.StringVar(&c.modprobeDir, "modprobe-dir", "/etc/modprobe.d", "directory of the kernel modules' settings, for what a reboot is to bring about")
	f.StringVar(&c.sysfs, "sysfs", "/sys", "where sysfs is mounted")
	f.StringVar(&c.listen, "listen", ":8082", "address for /healthz, /readyz and /metrics")
	if err := f.Set("replace-sriov-cni", def("REPLACE_SRIOV_CNI", "false")); err != nil {
		return nil, fmt.Errorf("environment REPLACE_SRIOV_CNI %q: set it to true or false: %w", env("REPLACE_SRIOV_CNI"), err)
	}
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q: all settings are flags", f.Arg(0))
	}
	for _, required := range []struct{ value, flag, env string }{
		{c.node, "--node-name", "NODE_NAME"}, {c.namespace, "--namespace", "POD_NAMESPACE"},
	} {
		if required.value == "" {
			return nil, fmt.Errorf("%s is empty: set it, or %s from the pod's fields in the DaemonSet", required.flag, required.env)
		}
	}
	return c, nil
}

// run is the agent until ctx ends, or one of its parts fails.
func run(ctx context.Context, c *settings) error {
	log := klog.Background()
	if err := durable.Sweep(c.stateDir); err != nil {
		return err
	}
	kernel, err := host.Open(c.sysfs)
	if err != nil {
		return err
	}
	defer kernel.Close()
	kernel.SystemBus = c.systemBus
	attacher, err := host.OpenAttacher(c.sysfs)
	if err != nil {
		return err
	}
	defer attacher.Close()
	var ledger *deviceplugin.Ledger
	var plugin *deviceplugin.Manager
	kubelet, err := podresources.New(c.podResources, filepath.Join(c.devicePlugins, "kubelet_internal_checkpoint"), c.namespace, func(resource string) bool {
		return strings.HasPrefix(resource, c.prefix+"/") || plugin.Serves(resource) || ledger.Gave(resource)
	})
	if err != nil {
		return err
	}
	defer func() { _ = kubelet.Close() }()
	apiServer, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find the API server: %w", err)
	}
	objects, stopEvents, err := node.Connect(apiServer, c.namespace, c.node)
	if err != nil {
		return err
	}
	defer stopEvents()
	bootID, err := host.BootID()
	if err != nil {
		return err
	}
	pods, err := standalone.NewServer(apiServer)
	if err != nil {
		return err
	}
	lifeline, err := node.NewAPIServer(apiServer, c.nodeIP)
	if err != nil {
		return err
	}

	if err = installShim(c.shim, c.cniDir); err != nil {
		return err
	}
	aliasErr := installAlias(c.cniDir, c.replaceSriovCNI)
	if aliasErr != nil && !errors.Is(aliasErr, errForeignAlias) {
		return aliasErr
	}
	if aliasErr != nil {
		log.Error(aliasErr, "the CNI plugin \"sriov\" of this node is not Sluice")
	}

	claims, err := ipam.Connect(apiServer, c.namespace)
	enforcer, policies, policyErr := enforcement(apiServer, c.node, objects.Recorder(), attacher, log.WithName("policy"))
	if err = errors.Join(err, policyErr); err != nil {
		return err
	}
	addresses := ipam.New(ipam.Options{
		Name: c.node, Dir: filepath.Join(c.stateDir, "addresses"), Claims: claims, Boot: bootID, Now: host.SinceBoot, Log: log.WithName("ipam"),
	})

	// The parts need one another: what is attached is known to the CNI server, who
	// holds a device to the ledger, what a VF goes back to to the node's configuration.
	var agent *node.Agent
	cni, err := server.New(server.Options{
		Socket: c.socket, StateDir: c.stateDir, SriovCNI: c.sriovCNIDir, Kernel: attacher, IPAMDirs: []string{c.cniDir}, Addresses: addresses, Enforcer: enforcer, Log: log.WithName("cni"),
		Baselines: baselines(func(id string) (net.HardwareAddr, int, bool) {
			mac, mtu, ok := agent.Baseline(id)
			return mac, mtu, ok || plugin.Offers(id) // as it was found, when it is not ours
		}), Allocated: func(ctx context.Context, id string) (string, bool, error) { return ledger.Allocated(ctx, id) },
		RDMA:     func(id string) bool { return givesRDMA(id, ledger, plugin) },
		Requests: attacher.Requests, Changes: kernel.Watch, Ready: func() error { return registered(plugin)() },
		Events: objects.Recorder(),
		PodNetworks: standalone.Options{API: pods, Kernel: attacher, Devices: kubelet.Pod, DeviceInfo: func(resource, id string) (*nadv1.DeviceInfo, error) {
			return deviceplugin.ReadDeviceInfo(c.deviceInfo, resource, id)
		}},
	})
	if err != nil {
		return err
	}
	if ledger, err = deviceplugin.OpenLedger(filepath.Join(c.stateDir, "devices.json"), cni.Holder, kubelet.Devices, log.WithName("ledger")); err != nil {
		return err
	}
	plugin, err = deviceplugin.New(deviceplugin.Options{
		Prefix: c.prefix, Dir: c.devicePlugins, DeviceInfoDir: c.deviceInfo, SysFS: c.sysfs, CDIDir: c.cdiDir, Log: log.WithName("deviceplugin"),
		Exists: exists(attacher, kernel), Ledger: ledger,
	})
	if err != nil {
		return err
	}
	pools := config.Open(c.devicePools, filepath.Join(c.stateDir, "device-pools.json"), c.prefix, log.WithName("device-pools"))
	before, _ := os.Lstat(c.socket) // of an earlier agent, if any
	recovered := make(chan struct{})
	agent = node.New(node.Config{
		Node: c.node, StateDir: c.stateDir, UpstreamDir: c.upstreamDir,
		Kernel: kernel, States: objects, Conditions: conditions(aliasErr, pools, enforcer.Condition), Others: fromFile(pools, ledger, c.prefix),
		Advertiser: advertiser{plugin, recovered}, Usage: ledger, Attached: cni.Attached, Tell: cni.Tell, Lifeline: lifeline,
		Switch: &ovsdb.Client{Socket: ovsdb.DefaultSocket},
		Reboot: func(ctx context.Context) error { return host.Reboot(ctx, c.systemBus) }, BootID: bootID, ModprobeDir: c.modprobeDir, Networks: networks(c.sysfs),
		Uninstall: func() error {
			if err := uninstall(c.cniDir, cni.Attachments()); err != nil {
				return err
			}
			return addresses.Leave(ctx)
		}, Log: log.WithName("node"),
	})

	enforcer.Changed = agent.HolderChanged

	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), plugin, pools, cni, enforcer)
	health := handler([]check{
		{"nics", closed(agent.Looked(), "have not been read yet")},
		{"cni", closed(recovered, "attachments of an earlier agent are being finished")},
		{"kubelet", registered(plugin)},
	}, metrics)

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return serveHTTP(ctx, c.listen, health) })
	group.Go(func() error { return plugin.Run(ctx) })
	group.Go(func() error { return addresses.Run(ctx) })
	group.Go(func() error {
		claims.Follow(ctx, addresses)
		return nil
	})
	group.Go(func() error { return agent.Run(ctx) })
	group.Go(func() error {
		policies.Run(ctx)
		return nil
	})
	group.Go(func() error { return enforcer.Run(ctx) })
	group.Go(func() error { return pools.Watch(ctx, agent.HolderChanged) })
	group.Go(func() error {
		ledger.Watch(ctx, agent.HolderChanged, plugin.Repeat)
		return nil
	})
	group.Go(func() error {
		// An ADD needs the baselines.
		select {
		case <-agent.Looked():
			return cni.Run(ctx)
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error {
		if replaced(ctx, c.socket, before) == nil {
			close(recovered)
			agent.HolderChanged()
			log.Info("ready", "node", c.node)
		}
		return nil
	})
	err = errors.Join(group.Wait(), addresses.Close())
	log.Info("stopped")
	return err
}
