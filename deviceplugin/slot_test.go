package deviceplugin

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-network/sluice/internal/host"
)

func slot(parent string, n int) Device {
	return Device{Slot: host.SlotID(parent, n), Parent: parent, NUMANode: 1, Healthy: true}
}

func TestSlotsReachTheKubelet(t *testing.T) {
	f := newFixture(t)
	k := startKubelet(t, f.dir)
	sick := slot("br_ex", 0)
	sick.Healthy, sick.NUMANode = false, -1
	f.advertise(t, pool("slots", slot("ens1f0.100", 1), slot("ens1f0.100", 0), sick), pool("nics", vf(1)))
	eventuallyList(t, k, "example.com/slots", "00-0 Healthy numa1,00-1 Healthy numa1,78-0 Unhealthy")
	eventuallyList(t, k, nics, "00.1 Healthy numa0")

	got, err := k.allocate("example.com/slots", "ens1f0.100-1", "ens1f0.100-0")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{
		"PCIDEVICE_EXAMPLE_COM_SLOTS": "ens1f0.100-0,ens1f0.100-1",
		"PCIDEVICE_EXAMPLE_COM_SLOTS_INFO": `{"ens1f0.100-0":{"generic":{"deviceID":"ens1f0.100-0"},"macvlan":{"parent":"ens1f0.100"},"sluice":{"resource":"example.com/slots"}},` +
			`"ens1f0.100-1":{"generic":{"deviceID":"ens1f0.100-1"},"macvlan":{"parent":"ens1f0.100"},"sluice":{"resource":"example.com/slots"}}}`,
	}, got.GetEnvs()); diff != "" {
		t.Error(diff)
	}
	if len(got.GetDevices()) > 0 || len(got.GetMounts()) > 0 {
		t.Errorf("a slot comes with %v", got)
	}
	if got := f.inHand(); got != "ens1f0.100-0 ens1f0.100-1" {
		t.Errorf("written down as allocated: %s", got)
	}
	f.mu.Lock()
	f.missing["ens1f0.100-0"] = fmt.Errorf("link ens1f0.100 is down")
	f.mu.Unlock()
	if files, _ := os.ReadDir(f.info); len(files) > 0 {
		t.Errorf("a device-info file, for which there is no type: %v", files)
	}
	_, err = k.allocate("example.com/slots", "ens1f0.100-0")
	wantError(t, err, "ens1f0.100-0", "link ens1f0.100 is down")
	_, err = k.allocate("example.com/slots", host.SlotID("br_ex", 0))
	wantError(t, err, "not healthy")

	if err := f.Withdraw(t.Context(), []string{"ens1f0.100-1"}); err != nil {
		t.Fatal(err)
	}
	eventuallyList(t, k, "example.com/slots", "00-0 Healthy numa1,00-1 Unhealthy numa1,78-0 Unhealthy")
}

func TestCheckSlots(t *testing.T) {
	other := slot("ens1f0", 3)
	other.Parent = "ens1f1"
	for name, c := range map[string]struct {
		pools []Pool
		want  []string
	}{
		"no slot":         {[]Pool{pool("a", Device{Slot: "ens1f0", Parent: "ens1f0"})}, []string{`"p.io/a"`, `"ens1f0" is not a MacVLAN slot`}},
		"another's":       {[]Pool{pool("a", other)}, []string{`"ens1f0-3" is not a MacVLAN slot of link ens1f1`}},
		"twice":           {[]Pool{pool("a", slot("ens1f0", 0), slot("ens1f0", 0))}, []string{"ens1f0-0 is listed twice"}},
		"in two pools":    {[]Pool{pool("a", slot("ens1f0", 0)), pool("b", slot("ens1f0", 0))}, []string{"ens1f0-0 is in several resources (p.io/a, p.io/b)"}},
		"beside VFs":      {[]Pool{pool("a", slot("ens1f0", 0)), pool("b", vf(1))}, nil},
		"of many parents": {[]Pool{pool("a", slot("ens1f0", 0), slot("ens1f1", 0))}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			good, err := checkPools("p.io", c.pools)
			if c.want == nil {
				if err != nil || len(good) != len(c.pools) {
					t.Errorf("%v, %v", good, err)
				}
				return
			}
			wantError(t, err, c.want...)
		})
	}
}

// Pods get slots of the parent that has the most left, as near as others to each other.
func TestPreferSpreadsSlots(t *testing.T) {
	devices := map[string]Device{}
	for _, d := range []struct {
		parent  string
		numa, n int
	}{{"a", 0, 3}, {"b", 0, 4}, {"c", 1, 2}} {
		for i := range d.n {
			s := slot(d.parent, i)
			s.NUMANode = d.numa
			devices[s.ID()] = s
		}
	}
	for _, c := range []struct{ available, must, want string }{
		{"a-0 a-1 a-2 b-0 b-1 b-2 b-3", "", "b-0"},
		{"a-0 a-1 a-2 b-2 b-3", "", "a-0"},
		{"a-0 a-1 b-2 b-3", "", "a-0"},
		{"a-0 b-1 b-2 b-3", "a-1", "a-1 a-0"},
		{"a-0 c-0 c-1", "", "c-0"},
	} {
		must := strings.Fields(c.must)
		if got := prefer(devices, false, false, strings.Fields(c.available), must, len(must)+1); strings.Join(got, " ") != c.want {
			t.Errorf("of %s beside %s: %v, want %s", c.available, c.must, got, c.want)
		}
	}
}
