package node

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/host/hostfake"
)

// A PF that no policy asks for any more is as it was before the first, also when
// the agent was restarted in between.
func TestPFGoesBackToWhatItWas(t *testing.T) {
	t.Parallel()
	for name, before := range map[string]func(pf *host.PF){
		"without VFs": func(*host.PF) {},
		"with VFs of somebody else": func(pf *host.PF) {
			pf.NumVFs, pf.AutoprobeOff = 1, true
			pf.VFs = []host.VF{{PCIAddress: vfAddress(nic0, 0), Driver: "fakenicvf", Name: "theirs", IfIndex: 90, NUMANode: -1}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			simulated(t, func(t *testing.T) {
				r := rigWith(t)
				r.kernel.Change(func(pfs []host.PF) { pfs[0].MTU = 2000; before(&pfs[0]) })
				was := r.kernel.PF(nic0)
				r.start()
				want := wants(nic0, 3, of("left", "0-2", 0))
				want.Mtu = 9000
				r.server.spec(want)
				r.ready()
				if pf := r.kernel.PF(nic0); pf.MTU != 9000 || pf.NumVFs != 3 {
					t.Fatalf("%+v", pf)
				}
				r.restart()
				if was.NumVFs > 0 {
					r.kernel.Fail(hostfake.RestoreVFs, unix.ENOMEM)
				}
				r.server.spec()
				if was.NumVFs > 0 {
					r.degraded(ReasonRefused, "ENOMEM", "restore 1 VFs")
				}
				r.eventually(func() error {
					is := r.kernel.PF(nic0)
					if is.MTU != was.MTU || is.NumVFs != was.NumVFs || is.AutoprobeOff != was.AutoprobeOff {
						return fmt.Errorf("%+v, was %+v", is, was)
					}
					return nil
				})
				r.ready()
				r.eventually(func() error {
					if left, err := filepath.Glob(filepath.Join(r.state, "nics", "*")); err != nil || len(left) > 0 {
						return fmt.Errorf("left over: %v, %w", left, err)
					}
					return nil
				})
				r.kernel.Calls()
				r.restart()
				r.kernel.Tell(host.Changes{All: true})
				time.Sleep(100 * time.Millisecond)
				if calls := r.kernel.Calls(); len(calls) > 0 {
					t.Errorf("a PF that is given up is touched: %v", calls)
				}
			})
		})
	}
}

// upstreamVFs are VFs as the SR-IOV network operator leaves them: with random
// addresses, some of them in pods, some bound to user space.
func upstreamVFs(pf *host.PF, n int) {
	pf.NumVFs, pf.MTU = n, 9000
	for i := range n {
		mac := net.HardwareAddr{0x5a, 0x31, byte(i * 37), 9, 8, byte(i)}
		vf := host.VF{
			Index: i, PCIAddress: vfAddress(pf.PCIAddress, i), Driver: "fakenicvf", Name: fmt.Sprintf("%sv%d", pf.Name, i), IfIndex: 200 + i,
			MAC: mac, MTU: 9000, NUMANode: -1, IOMMUGroup: "3", Admin: host.VFSettings{MAC: mac, SpoofChk: true},
		}
		pf.VFs = append(pf.VFs, vf)
	}
	inPod := &pf.VFs[1]
	inPod.Name, inPod.IfIndex, inPod.MAC, inPod.MTU = "", 0, nil, 0
	inPod.Admin.VLAN, inPod.Admin.Trust = 100, true
	inPod.Admin.MAC = net.HardwareAddr{2, 0, 0, 0, 0, 7}
	dpdk := &pf.VFs[3]
	dpdk.Driver, dpdk.Name, dpdk.IfIndex, dpdk.MAC, dpdk.MTU = "vfio-pci", "", 0, nil, 0
}

func TestTakesOverWithoutTouching(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := rigWith(t)
		r.kernel.Change(func(pfs []host.PF) { upstreamVFs(&pfs[0], 4) })
		r.usage.set(vfAddress(nic0, 1), "default/running")
		applied, err := json.Marshal(v1.Interface{PciAddress: nic0, NumVfs: 4, Mtu: 9000, Name: "ens1f0"})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(r.upstream, "pci"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(r.upstream, "pci", nic0), applied, 0o644); err != nil {
			t.Fatal(err)
		}
		vfio := of("dpdk", "3-3", 9000)
		vfio.DeviceType = v1.DeviceTypeVfioPci
		want := wants(nic0, 4, of("left", "0-2", 9000), vfio)
		want.Mtu = 9000
		r.start()
		for range 2 {
			r.server.spec(want)
			r.ready()
			if got := r.plugin.healthy("left"); len(got) != 3 {
				t.Errorf("left offers %v", got)
			}
			if mac, _, ok := r.agent.Baseline(vfAddress(nic0, 0)); !ok || mac.String() != "5a:31:00:09:08:00" {
				t.Errorf("baseline %s, %t", mac, ok)
			}
			r.restart()
		}
		if calls := r.kernel.Calls(); len(calls) > 0 {
			t.Errorf("touched: %v", calls)
		}

		// They are ours to remove now, once: the file stays.
		r.usage.set(vfAddress(nic0, 1), "")
		r.server.spec()
		r.eventually(func() error {
			if pf := r.kernel.PF(nic0); pf.NumVFs != 0 {
				return fmt.Errorf("%d VFs left", pf.NumVFs)
			}
			return nil
		})
		r.ready()
		r.kernel.Change(func(pfs []host.PF) { upstreamVFs(&pfs[0], 4) })
		r.restart()
		r.kernel.Calls()
		time.Sleep(100 * time.Millisecond)
		if calls := r.kernel.Calls(); len(calls) > 0 {
			t.Errorf("VFs that somebody else made later are touched: %v", calls)
		}
	})
}

// What cannot be restored is not changed.
func TestNothingChangesThatCouldNotBeRecorded(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := newRig(t)
		r.ready()
		if err := os.Remove(filepath.Join(r.state, "nics")); err != nil {
			t.Fatal(err)
		}
		r.server.spec(wants(nic0, 2, of("left", "0-1", 0)))
		r.degraded(ReasonNoState, "record the settings of NIC "+nic0)
		if calls := r.kernel.Calls(); len(calls) > 0 {
			t.Errorf("%v", calls)
		}
		if err := os.Mkdir(filepath.Join(r.state, "nics"), 0o700); err != nil {
			t.Fatal(err)
		}
		r.ready()
	})
}

func TestUnreadableRecordsAreSetAside(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, _, err := openRecords(dir, ""); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{nic0 + ".json": `{"mtu":2000}`, nic1 + ".json": "{", "x.json": "{}", nic1 + ".json.1.tmp": "{"} {
		if err := os.WriteFile(filepath.Join(dir, "nics", name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r, aside, err := openRecords(dir, "")
	if err != nil || len(aside) != 2 {
		t.Errorf("%v set aside, %v", aside, err)
	}
	if one, ok := r.get(nic0); !ok || one.MTU != 2000 || len(r.byPF) != 1 {
		t.Errorf("%+v", r.byPF)
	}
}

// Whatever the SR-IOV network operator's file of a PF has, its VFs are taken over only when
// it names that PF.
func FuzzMadeVFs(f *testing.F) {
	for _, seed := range []string{
		`{"name":"ens1f0","pciAddress":"` + nic0 + `","numVfs":4,"vfGroups":[{"vfRange":"0-3","resourceName":"a"}]}`,
		`{"pciAddress":"` + nic0 + `","externallyManaged":true}`, `{"pciAddress":"` + nic1 + `"}`, "{}", "null", "", `{"numVfs":4,`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		if madeVFs(file, nic0) && (!json.Valid(file) || madeVFs(file, nic1)) {
			t.Fatalf("believed: %q", file)
		}
	})
}

func TestMadeVFs(t *testing.T) {
	for file, want := range map[string]bool{
		`{"pciAddress":"` + nic0 + `","numVfs":4}`: true, `{"pciAddress":"` + nic0 + `","externallyManaged":true}`: false,
		`{"pciAddress":"` + nic1 + `","numVfs":4}`: false, `{"numVfs":4}`: false, "": false,
	} {
		if got := madeVFs([]byte(file), nic0); got != want {
			t.Errorf("%s: %v", file, got)
		}
	}
}
