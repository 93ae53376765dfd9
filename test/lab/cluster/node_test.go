package cluster

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

func TestNodeFilesAreRenderedForTheirNode(t *testing.T) {
	files, err := renderNode(7)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct{ file, text string }{
		{"start", "--hostname-override vm7 --node-ip 172.30.0.17"},
		{"start", "ip route replace 10.244.0.0/16 via 172.30.0.1"},
		{"etc/kube-proxy.yaml", "hostnameOverride: vm7"},
		{"etc/containerd/config.toml", `sandbox = "sluice.dev/pause:dev"`},
		{"etc/cni/net.d/00-multus.conf", `"subnet": "10.244.7.0/24"`},
	} {
		if !strings.Contains(string(files[want.file]), want.text) {
			t.Errorf("%s lacks %q:\n%s", want.file, want.text, files[want.file])
		}
	}
	var network, kubelet, proxy map[string]any
	if err := json.Unmarshal(files["etc/cni/net.d/00-multus.conf"], &network); err != nil {
		t.Errorf("network configuration: %v", err)
	}
	if err := yaml.UnmarshalStrict(files["etc/kubelet.yaml"], &kubelet); err != nil {
		t.Errorf("kubelet configuration: %v", err)
	}
	if err := yaml.UnmarshalStrict(files["etc/kube-proxy.yaml"], &proxy); err != nil {
		t.Errorf("kube-proxy configuration: %v", err)
	}
}

func TestOnlyProgramsOfANodeAreExecutableAndNothingIsPublic(t *testing.T) {
	keys, err := NewKeys()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := keys.WriteNode(dir, 1); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]os.FileMode{
		"start": 0o755, "etc/kubelet.key": 0o600, "etc/kubelet.kubeconfig": 0o600, "etc/multus.kubeconfig": 0o600, "etc/kube-proxy.kubeconfig": 0o600,
	} {
		info, err := os.Stat(filepath.Join(dir, file))
		if err != nil {
			t.Error(err)
		} else if info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", file, info.Mode().Perm(), want)
		}
	}
}

func TestAddressesOfNodesDoNotMeet(t *testing.T) {
	seen := map[netip.Addr]bool{Gateway: true}
	for n := 1; n <= MaxNodes; n++ {
		address, pods := NodeAddress(n), nodePods(n)
		if seen[address.Addr()] || seen[pods.Addr()] {
			t.Errorf("node %d: %s or %s is taken", n, address, pods)
		}
		seen[address.Addr()], seen[pods.Addr()] = true, true
		if !address.Contains(Gateway) || !netip.MustParsePrefix(podCIDR).Contains(pods.Addr()) {
			t.Errorf("node %d: %s and %s lie outside their networks", n, address, pods)
		}
		taps := NodeTaps(n)
		for _, name := range []string{taps.Mgmt, taps.Data[0], taps.Data[1]} {
			if len(name) > 15 { // IFNAMSIZ without the final zero
				t.Errorf("tap name %s is too long", name)
			}
		}
	}
}
