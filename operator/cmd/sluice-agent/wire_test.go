package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-network/sluice/deviceplugin"
	"github.com/sluice-network/sluice/deviceplugin/config"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/operator/node"
)

func TestDevicePools(t *testing.T) {
	d := node.Device{
		PCIAddress: "0000:01:00.1", PFAddress: "0000:01:00.0", PFName: "ens1f0", VFIndex: 1, Driver: "d", NUMANode: 1,
		IOMMUGroup: "7", LinkType: host.Ethernet, Healthy: true, Reason: "r",
	}
	got := devicePools([]node.Pool{
		{Resource: "a", ExcludeTopology: true, Spread: true, DeviceType: "vfio-pci", Devices: []node.Device{d}},
		{Prefix: "x.io", Resource: "b", RDMA: true, VhostNet: true, Info: map[string]map[string]string{"*": {"k": "v"}}},
		{Resource: "c", Devices: []node.Device{{Slot: "bond0-1", Parent: "bond0", NUMANode: -1, Healthy: true}}},
	})
	want := []deviceplugin.Pool{
		{Resource: "a", ExcludeTopology: true, Spread: true, DeviceType: deviceplugin.DeviceTypeVFIO, Devices: []deviceplugin.Device{{
			PCIAddress: "0000:01:00.1", PFAddress: "0000:01:00.0", PFName: "ens1f0", VFIndex: 1, Driver: "d", NUMANode: 1,
			IOMMUGroup: "7", LinkType: host.Ethernet, Healthy: true, Reason: "r",
		}}},
		{Prefix: "x.io", Resource: "b", RDMA: true, VhostNet: true, Info: map[string]map[string]string{"*": {"k": "v"}}, Devices: []deviceplugin.Device{}},
		{Resource: "c", Devices: []deviceplugin.Device{{Slot: "bond0-1", Parent: "bond0", NUMANode: -1, Healthy: true}}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestNothingIsAdvertisedBeforeRecovery(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := advertiser{nil, make(chan struct{})}.Advertise(ctx, nil) // would panic if it went on
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Advertise: %v", err)
	}
}

func TestReplacedWaitsForTheNewSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	write(t, path, "", 0o600)
	before := stat(t, path)
	done := make(chan error, 1)
	go func() { done <- replaced(t.Context(), path, before) }()
	select {
	case <-done:
		t.Fatal("took the old socket for the new")
	case <-time.After(50 * time.Millisecond):
	}
	write(t, path+".new", "", 0o600)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := replaced(t.Context(), path, nil); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := replaced(ctx, path+".absent", nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestAliasCondition(t *testing.T) {
	for _, c := range []struct {
		alias  error
		status metav1.ConditionStatus
		text   string
	}{
		{nil, metav1.ConditionTrue, "Sluice"},
		{errForeignAlias, metav1.ConditionFalse, "another project's plugin"},
	} {
		got := aliasCondition(c.alias)
		if got.Type != conditionAlias || got.Status != c.status || got.Reason == "" || !strings.Contains(got.Message, c.text) {
			t.Errorf("alias %v: condition %+v", c.alias, got)
		}
	}
}

func TestParse(t *testing.T) {
	env := map[string]string{"NODE_NAME": "n1", "POD_NAMESPACE": "sys"}
	c, err := parse([]string{"--cni-bin-dir", "/x", "-v=2"}, func(k string) string { return env[k] })
	if err != nil {
		t.Fatal(err)
	}
	if c.node != "n1" || c.namespace != "sys" || c.prefix != "openshift.io" || c.cniDir != "/x" || c.stateDir != "/var/lib/sluice" || c.replaceSriovCNI {
		t.Errorf("%+v", c)
	}
	env["RESOURCE_PREFIX"], env["REPLACE_SRIOV_CNI"] = "intel.com", "true"
	if c, err = parse([]string{"--node-name=n2"}, func(k string) string { return env[k] }); err != nil || c.prefix != "intel.com" || c.node != "n2" || !c.replaceSriovCNI {
		t.Errorf("%+v, %v", c, err)
	}
	for _, bad := range []struct {
		args []string
		env  map[string]string
		want string
	}{
		{nil, map[string]string{"POD_NAMESPACE": "sys"}, "NODE_NAME"},
		{nil, map[string]string{"NODE_NAME": "n1"}, "POD_NAMESPACE"},
		{[]string{"what"}, env, `"what"`},
		{[]string{"--nope"}, env, "nope"},
		{nil, map[string]string{"REPLACE_SRIOV_CNI": "yes"}, `REPLACE_SRIOV_CNI "yes": set it to true or false`},
	} {
		if _, err := parse(bad.args, func(k string) string { return bad.env[k] }); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%v: %v, want %s", bad.args, err, bad.want)
		}
	}
}

// A slot is as usable as its parent, here on this machine's own links.
func TestASlotNeedsItsParent(t *testing.T) {
	links, err := host.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer links.Close()
	check := exists(nil, links)
	if err := check(host.SlotID("lo", 3)); err != nil {
		t.Errorf("lo: %v", err)
	}
	if err := check(host.SlotID("absent9", 3)); err == nil || !strings.Contains(err.Error(), "find link absent9") {
		t.Errorf("a link that is not there: %v", err)
	}
}

// The file's pools get what policies leave, under the file's prefixes, and keep what pods have.
func TestPoolsFromTheFile(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "config.json"), `{"resourceList":[
		{"resourceName":"a","resourcePrefix":"x.io","excludeTopology":true,"additionalInfo":{"*":{"k":"v"}},"selectors":{"pfNames":["ens1f0"],"needVhostNet":true}},
		{"resourceName":"b","selectors":{"vendors":["15b3"],"isRdma":true}}]}`, 0o600)
	f := config.Open(filepath.Join(dir, "config.json"), filepath.Join(dir, "last"), "p.io", testr.New(t))
	ledger, err := deviceplugin.OpenLedger(filepath.Join(dir, "devices.json"), nil, nil, testr.New(t))
	if err != nil {
		t.Fatal(err)
	}
	free := node.Device{PCIAddress: "0000:01:00.1", PFName: "ens1f0", NUMANode: 1, Healthy: true}
	taken := node.Device{PCIAddress: "0000:01:00.2", PFName: "ens1f0"}
	rdma := node.Device{PCIAddress: "0000:02:00.1", PFName: "ens2f0", VFIndex: 3}
	got := fromFile(f, ledger, "p.io")([]node.Candidate{{Device: free}, {Device: taken, Resource: "policy"}, {Device: rdma, Vendor: "15b3", RDMA: true}})
	want := []node.Pool{
		{Prefix: "x.io", Resource: "a", ExcludeTopology: true, VhostNet: true, Info: map[string]map[string]string{"*": {"k": "v"}}, Devices: []node.Device{free}},
		{Prefix: "p.io", Resource: "b", RDMA: true, Devices: []node.Device{rdma}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	all := conditions(nil, f, func() metav1.Condition { return metav1.Condition{Type: "NetworkPolicyEnforced"} })()
	if len(all) != 3 || all[0].Type != conditionAlias || all[1].Type != "NetworkPolicyEnforced" {
		t.Fatalf("%+v", all)
	}
	c := all[2]
	if c.Status != metav1.ConditionFalse || c.Reason != "Refused" || !strings.Contains(c.Message, "0000:01:00.2 (p.io/policy)") {
		t.Errorf("%+v", c)
	}
	if c := devicePoolsCondition(true, "m"); c.Status != metav1.ConditionTrue || c.Reason != "InEffect" || c.Message != "m" {
		t.Errorf("%+v", c)
	}
	if c := devicePoolsCondition(false, strings.Repeat("x", 40000)); len(c.Message) > 5000 {
		t.Errorf("a message of %d bytes", len(c.Message))
	}
}
