package cloud

import (
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const served = `{
	"links": [
		{"id": "tap0", "vif_id": "v", "type": "ovs", "mtu": 1500, "ethernet_mac_address": "fa:16:3e:9c:9f:89"},
		{"id": "tap1", "type": "hostdev_physical", "mtu": 9000, "ethernet_mac_address": "FA:16:3E:00:00:01"},
		{"id": "tap2", "type": "hw_veb", "mtu": null, "ethernet_mac_address": "fa:16:3e:00:00:02"},
		{"id": "bond0", "type": "bond", "bond_links": ["tap1", "tap2"], "ethernet_mac_address": null}
	],
	"networks": [
		{"id": "network0", "type": "ipv4_dhcp", "link": "tap0", "network_id": "5765e37b-0a13-49d2-a598-537178ce254f"},
		{"id": "network1", "type": "ipv4", "link": "tap1", "ip_address": "192.168.177.4", "network_id": "b3ba899a-e06c-49da-93c5-c992048390b2", "services": []},
		{"id": "network2", "type": "ipv6_slaac", "link": "tap1", "network_id": "another"}
	],
	"services": []
}`

var known = map[string]string{
	"fa:16:3e:9c:9f:89": "openstack/NetworkID:5765e37b-0a13-49d2-a598-537178ce254f",
	"fa:16:3e:00:00:01": "openstack/NetworkID:b3ba899a-e06c-49da-93c5-c992048390b2",
}

func TestNetworks(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	code, body, hang := http.StatusOK, served, make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /network_data.json", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code); fmt.Fprint(w, body) })
	mux.Handle("GET /elsewhere", http.RedirectHandler("/network_data.json", http.StatusFound))
	mux.HandleFunc("GET /never", func(http.ResponseWriter, *http.Request) { <-hang })
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	t.Cleanup(func() { close(hang) })

	got, err := Networks(t.Context(), s.URL+"/network_data.json")
	if err != nil || !maps.Equal(got, known) {
		t.Errorf("%v, %v", got, err)
	}
	fails := func(path, want string) {
		t.Helper()
		if got, err := Networks(t.Context(), s.URL+path); err == nil || got != nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v; want %s", path, got, err, want)
		}
	}
	fails("/elsewhere", "302")
	fails("/never", "deadline exceeded")
	body = strings.Repeat(" ", maxAnswer) + served
	fails("/network_data.json", "too long")
	body = "<html>"
	fails("/network_data.json", "invalid character")
	code = http.StatusNotFound
	fails("/network_data.json", "404")
}

func TestIsOpenStack(t *testing.T) {
	for _, c := range []struct {
		file, text string
		want       bool
	}{
		{"product_name", "OpenStack Nova\n", true}, {"product_name", "OpenStack Compute\n", true}, {"product_name", "Standard PC (Q35 + ICH9, 2009)\n", false},
		{"sys_vendor", "OpenStack Foundation\n", true}, {"sys_vendor", "Amazon EC2\n", false}, {"chassis_asset_tag", "OpenStack Nova\n", true}, {"bios_vendor", "OpenStack Nova\n", false},
	} {
		sysfs := t.TempDir()
		dir := filepath.Join(sysfs, "class/dmi/id")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, c.file), []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := IsOpenStack(sysfs); got != c.want {
			t.Errorf("%s %q: %v", c.file, c.text, got)
		}
	}
	if IsOpenStack(t.TempDir()) {
		t.Error("a machine without DMI")
	}
}

// Whatever is served, what is taken is a MAC address and a network's ID without any
// character that means something in a netFilter.
func FuzzParseNetworks(f *testing.F) {
	for _, seed := range []string{served, "{}", `{"links":[{"id":"a","ethernet_mac_address":"fa:16:3e:00:00:02"}],"networks":[{"link":"a","network_id":"x y:z"}]}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		networks, err := parseNetworks(text)
		if err != nil && networks != nil {
			t.Fatal("both an answer and an error")
		}
		for mac, network := range networks {
			id, ok := strings.CutPrefix(network, "openstack/NetworkID:")
			if parsed, err := net.ParseMAC(mac); err != nil || parsed.String() != mac || !ok || id == "" || strings.ContainsAny(id, " :/\n") {
				t.Fatalf("%q on %q: %v", network, mac, err)
			}
		}
	})
}
