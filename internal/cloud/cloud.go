package cloud

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Metadata is where Nova serves the network metadata of a machine
// (docs.openstack.org/nova/latest/user/metadata.html).
const Metadata = "http://169.254.169.254/openstack/latest/network_data.json"

const (
	patience  = 2 * time.Second
	maxAnswer = 1 << 20
)

// IsOpenStack tells whether the machine is a virtual one of OpenStack: Nova writes its
// name into the system's product or manufacturer, and some clouds only into the
// chassis' asset tag (sysfs/class/dmi/id).
func IsOpenStack(sysfs string) bool {
	for _, name := range []string{"product_name", "sys_vendor", "chassis_asset_tag"} {
		text, err := os.ReadFile(filepath.Join(sysfs, "class/dmi/id", name))
		if err == nil && strings.HasPrefix(string(text), "OpenStack ") {
			return true
		}
	}
	return false
}

// Networks asks the metadata service at the URL, and returns the networks by the MAC
// addresses of the NICs on them, as nicSelector.netFilter names them:
// "openstack/NetworkID:<uuid>".
func Networks(ctx context.Context, url string) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("ask for the networks of this machine: %w", err)
	}
	// Neither through a proxy nor to where somebody redirects.
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	answer, err := client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("ask for the networks of this machine: %w", err)
	}
	defer func() { _ = answer.Body.Close() }() // it was only read
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask for the networks of this machine: %s answers %s", url, answer.Status)
	}
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer+1))
	if err == nil && len(text) > maxAnswer {
		err = errors.New("it is too long")
	}
	var networks map[string]string
	if err == nil {
		networks, err = parseNetworks(text)
	}
	if err != nil {
		return nil, fmt.Errorf("read the answer of %s: %w", url, err)
	}
	return networks, nil
}

// parseNetworks reads network_data.json. A link that no network is on is left out; of
// several networks on one, the first counts.
func parseNetworks(text []byte) (map[string]string, error) {
	var data struct {
		Links []struct {
			ID  string `json:"id"`
			MAC string `json:"ethernet_mac_address"`
		} `json:"links"`
		Networks []struct {
			Link      string `json:"link"`
			NetworkID string `json:"network_id"`
		} `json:"networks"`
	}
	if err := json.Unmarshal(text, &data); err != nil {
		return nil, err
	}
	networks := map[string]string{}
	for _, link := range data.Links {
		mac, err := net.ParseMAC(link.MAC)
		if err != nil {
			continue // bonds and the like have none
		}
		for _, n := range data.Networks {
			// What goes into a status that people select by is what can be an ID.
			if n.Link == link.ID && n.NetworkID != "" && len(n.NetworkID) <= 64 && !strings.ContainsFunc(n.NetworkID, notInID) {
				networks[mac.String()] = "openstack/NetworkID:" + n.NetworkID
				break
			}
		}
	}
	return networks, nil
}

func notInID(r rune) bool {
	return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && r != '-' && r != '_'
}
