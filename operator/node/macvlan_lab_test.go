//go:build lab

package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/go-logr/logr/testr"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kubelet "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/deviceplugin"
	"github.com/sluice-network/sluice/internal/host"
)

// registry is the kubelet's side of the device plugin API: it follows what is registered.
type registry struct {
	kubelet.UnimplementedRegistrationServer
	dir string

	mu      sync.Mutex
	devices map[string]map[string]string // health by ID, by resource
	plugins map[string]kubelet.DevicePluginClient
}

func (r *registry) Register(_ context.Context, req *kubelet.RegisterRequest) (*kubelet.Empty, error) {
	conn, err := grpc.NewClient("unix://"+filepath.Join(r.dir, req.GetEndpoint()), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	client := kubelet.NewDevicePluginClient(conn)
	stream, err := client.ListAndWatch(context.Background(), &kubelet.Empty{})
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.plugins[req.GetResourceName()] = client
	r.mu.Unlock()
	go func() {
		for {
			list, err := stream.Recv()
			if err != nil {
				return
			}
			devices := map[string]string{}
			for _, d := range list.GetDevices() {
				devices[d.GetID()] = d.GetHealth()
			}
			r.mu.Lock()
			r.devices[req.GetResourceName()] = devices
			r.mu.Unlock()
		}
	}()
	return &kubelet.Empty{}, nil
}

// healthy lists the devices of a resource that pods can get.
func (r *registry) healthy(resource string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ids []string
	for id, health := range r.devices[resource] {
		if health == kubelet.Healthy {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return strings.Join(ids, " ")
}

// onKubelet is the device plugin as the agent sees it.
type onKubelet struct{ *deviceplugin.Manager }

func (k onKubelet) Advertise(ctx context.Context, pools []Pool) error {
	var all []deviceplugin.Pool
	for _, p := range pools {
		q := deviceplugin.Pool{Resource: p.Resource, DeviceType: p.DeviceType}
		for _, d := range p.Devices {
			q.Devices = append(q.Devices, deviceplugin.Device(d))
		}
		all = append(all, q)
	}
	return k.Manager.Advertise(ctx, all)
}

// newRegistry starts a kubelet and a device plugin that is registered with it.
func newRegistry(l *lab) *registry {
	dir := l.TempDir()
	r := &registry{dir: dir, devices: map[string]map[string]string{}, plugins: map[string]kubelet.DevicePluginClient{}}
	server := grpc.NewServer()
	kubelet.RegisterRegistrationServer(server, r)
	socket, err := net.Listen("unix", filepath.Join(dir, "kubelet.sock"))
	if err != nil {
		l.Fatal(err)
	}
	go func() { _ = server.Serve(socket) }()
	l.Cleanup(server.Stop)
	ledger, err := deviceplugin.OpenLedger(filepath.Join(dir, "devices.json"), func(string) (string, bool) { return "", false },
		func(context.Context) (map[string]string, error) { return nil, nil }, testr.New(l.T))
	if err != nil {
		l.Fatal(err)
	}
	plugin, err := deviceplugin.New(deviceplugin.Options{
		Prefix: "lab", Dir: dir, DeviceInfoDir: filepath.Join(dir, "info"), SysFS: host.DefaultSysfs, Log: testr.New(l.T),
		Exists: func(id string) error {
			parent, _, err := host.ParseSlotID(id)
			return errors.Join(err, l.host.CheckParent(parent))
		},
		Ledger: ledger,
	})
	if err != nil {
		l.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- plugin.Run(ctx) }()
	l.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			l.Error(err)
		}
	})
	l.stop()
	l.server.mu.Lock()
	l.server.send()
	l.server.mu.Unlock()
	l.advertiser = onKubelet{plugin}
	l.start()
	return r
}

func (l *lab) link(name string) *host.ParentLink {
	l.Helper()
	links, err := l.host.Links(context.Background())
	if err != nil {
		l.Fatal(err)
	}
	at := slices.IndexFunc(links, func(p host.ParentLink) bool { return p.Name == name })
	if at < 0 {
		return nil
	}
	return &links[at]
}

// Parents of every kind: their VLAN devices are made, their MTU is raised, slots reach
// the kubelet, what somebody breaks is put right, and what was made goes with its policy.
func TestLabMacvlanParents(t *testing.T) {
	l := newLab(t)
	for _, args := range []string{
		"link add bond7 type bond mode active-backup",
		"link set ens2f0 down",
		"link set ens2f0 master bond7",
		"link add br7 type bridge",
		"link add vx7 type vxlan id 7 dstport 4789 dev ens1f0",
		"link add link ens1f0 name storage7 type vlan id 7",
		"link set ens1f0 down",
		"netns add pod7",
	} {
		run(t, "ip", strings.Fields(args)...)
	}
	t.Cleanup(func() {
		_ = exec.Command("ip", "netns", "del", "pod7").Run()
		for _, link := range []string{"storage7", "vx7", "br7", "bond7"} {
			_ = exec.Command("ip", "link", "del", link).Run()
		}
		for _, nic := range []string{"ens1f0", "ens2f0"} {
			_ = exec.Command("ip", "link", "set", nic, "mtu", "1500", "up").Run()
		}
	})
	r := newRegistry(l)
	l.until("links told", func(s v1.SriovNetworkNodeStateStatus) error {
		kinds := map[string]string{}
		for _, link := range s.Links {
			kinds[link.Name] = link.Kind + link.Master
		}
		for name, kind := range map[string]string{"ens1f0": "physical", "ens2f0": "physicalbond7", "bond7": "bond", "br7": "bridge", "vx7": "vxlan", "storage7": "vlan"} {
			if kinds[name] != kind {
				return fmt.Errorf("links %v", kinds)
			}
		}
		return nil
	})

	parents := []string{"ens1f0", "bond7", "br7", "vx7", "storage7"}
	var wanted []v1.MacvlanParent
	for _, link := range parents {
		wanted = append(wanted, v1.MacvlanParent{PolicyName: "tagged", ResourceName: "tagged", Link: link, Vlan: 100, Mtu: 1600, Slots: 2})
	}
	wanted[3].Mtu = 1400 // VXLAN takes 50 bytes of ens1f0's
	wanted = append(wanted, v1.MacvlanParent{PolicyName: "plain", ResourceName: "plain", Link: "storage7", Mtu: 1550, Slots: 1},
		v1.MacvlanParent{PolicyName: "bad", ResourceName: "bad", Link: "ens2f0", Slots: 1})
	l.server.macvlans(wanted...)
	s := l.until("parents ready", func(s v1.SriovNetworkNodeStateStatus) error {
		for i, m := range s.Macvlans {
			if m.Ready != (wanted[i].Link != "ens2f0") {
				return fmt.Errorf("%+v", m)
			}
		}
		if len(s.Macvlans) != len(wanted) {
			return fmt.Errorf("%d parents", len(s.Macvlans))
		}
		return nil
	})
	if last := s.Macvlans[len(wanted)-1]; !strings.Contains(last.Message, "link ens2f0 is a port of bond7") || !strings.Contains(s.LastSyncError, "EBUSY") {
		t.Errorf("%+v, %s", last, s.LastSyncError)
	}
	var ids []string
	for i, link := range parents {
		device := l.link(link + ".100")
		if device == nil || !device.Managed || !device.AdminUp || device.MTU < wanted[i].Mtu || device.Lower != link || !l.link(link).AdminUp {
			t.Errorf("on %s: %+v", link, device)
		}
		ids = append(ids, link+".100-0", link+".100-1")
	}
	slices.Sort(ids)
	l.until("slots at the kubelet", func(v1.SriovNetworkNodeStateStatus) error {
		if got := r.healthy("lab/tagged"); got != strings.Join(ids, " ") || r.healthy("lab/plain") != "storage7-0" || r.healthy("lab/bad") != "" {
			return fmt.Errorf("tagged %s, plain %s, bad %s", got, r.healthy("lab/plain"), r.healthy("lab/bad"))
		}
		return nil
	})
	got, err := r.plugins["lab/tagged"].Allocate(t.Context(), &kubelet.AllocateRequest{ContainerRequests: []*kubelet.ContainerAllocateRequest{{DevicesIds: []string{"br7.100-1"}}}})
	if err != nil || got.GetContainerResponses()[0].GetEnvs()["PCIDEVICE_LAB_TAGGED"] != "br7.100-1" {
		t.Errorf("allocated %v, %v", got, err)
	}

	t.Run("drift", func(t *testing.T) {
		was := l.link("br7.100").IfIndex
		run(t, "ip", "link", "del", "br7.100")
		run(t, "ip", "link", "set", "ens1f0.100", "down")
		l.until("put right", func(v1.SriovNetworkNodeStateStatus) error {
			if d := l.link("br7.100"); d == nil || d.IfIndex == was || !l.link("ens1f0.100").AdminUp {
				return fmt.Errorf("%+v, %+v", d, l.link("ens1f0.100"))
			}
			return nil
		})
	})
	t.Run("policies gone", func(t *testing.T) {
		run(t, "ip", "link", "add", "link", "br7.100", "name", "net1", "netns", "pod7", "type", "macvlan", "mode", "bridge")
		run(t, "ip", "-n", "pod7", "link", "set", "net1", "up")
		l.usage.set("bond7.100-0", "default/p")
		l.agent.HolderChanged()
		l.until("held", func(s v1.SriovNetworkNodeStateStatus) error {
			if s.Macvlans[1].Used != 1 {
				return fmt.Errorf("%+v", s.Macvlans[1])
			}
			return nil
		})
		l.server.macvlans()
		l.until("removed but what is in use", func(v1.SriovNetworkNodeStateStatus) error {
			for _, link := range parents {
				if gone := l.link(link+".100") == nil; gone != (link != "br7" && link != "bond7") {
					return fmt.Errorf("%s gone %t", link, gone)
				}
			}
			return nil
		})
		if l.link("storage7") == nil {
			t.Error("somebody else's VLAN device is gone")
		}
		run(t, "ip", "netns", "del", "pod7")
		l.usage.set("bond7.100-0", "")
		l.until("removed when free", func(v1.SriovNetworkNodeStateStatus) error {
			l.agent.HolderChanged()
			if l.link("br7.100") != nil || l.link("bond7.100") != nil {
				return errors.New("still there")
			}
			return nil
		})
	})
}
