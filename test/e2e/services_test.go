//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/sluice-network/sluice/test/lab/guest"
)

// page serves a page with the pod's name.
const page = "mkdir -p /tmp/www && hostname >/tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www"

// served makes a pod run httpd, or with dns a name server, before it sleeps.
func served(pod, command string) string {
	return strings.Replace(pod, "command: [sleep, infinity]", fmt.Sprintf("command: [sh, -c, %q]", command), 1)
}

// A pod with a VF or a MacVLAN interface reaches services and is reached through
// them, from pods and from outside, as any other pod.
func TestServicesAreReachedBesideAHardwareInterface(t *testing.T) {
	onlyUML(t, "services are the primary network's and do not depend on the NIC")
	usePools(t)
	apply(t, network("cluster-net", "left", staticIP, capIPs)+`
apiVersion: sluice.dev/v1alpha1
kind: MacvlanNetwork
metadata: {name: side-net, namespace: `+namespace+`}
spec: {networkNamespace: default, master: ens2f0, ipam: '{"type": "static"}', capabilities: '{"ips": true}'}
---`)
	eventually(t, func() error {
		_, err := cluster.Kubectl(t.Context(), "get", "net-attach-def", "cluster-net", "side-net")
		return err
	})
	apply(t, `
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {type: NodePort, selector: {web: "yes"}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
---
apiVersion: v1
kind: Service
metadata: {name: names, namespace: default}
spec: {clusterIP: 10.96.0.10, selector: {app: names}, ports: [{port: 53, protocol: UDP}]}
---`)
	address := strings.TrimSpace(kubectl(t, "", "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"))
	web := func(p string) string {
		return strings.Replace(served(p, page), "  labels: {", `  labels: {web: "yes", `, 1)
	}
	apply(t, web(pod("vf-1", "vm1", "["+on("cluster-net", "192.168.110.1/24")+"]", left))+
		web(pod("vf-2", "vm2", "["+on("cluster-net", "192.168.110.2/24")+"]", left))+
		web(pod("macvlan-1", "vm1", "["+on("side-net", "192.168.111.1/24")+"]"))+
		served(pod("names", "vm2", "["+on("side-net", "192.168.111.2/24")+"]"),
			"exec dnsmasq -k -u root --no-resolv --no-hosts --address=/web.default.svc.cluster.local/"+address))
	waitReady(t, "vf-1", "vf-2", "macvlan-1", "names")

	servers := []string{"vf-1", "vf-2", "macvlan-1"}
	for _, client := range append(servers, "names") {
		t.Run("from "+client, func(t *testing.T) {
			want := map[string]bool{}
			eventually(t, func() error {
				out, err := cluster.Kubectl(t.Context(), "exec", client, "--", "nslookup", "-type=a", "web.default.svc.cluster.local.")
				if err == nil && !strings.Contains(out, address) {
					err = fmt.Errorf("the cluster's name server has no %s:\n%s", address, out)
				}
				return err
			})
			eventually(t, func() error {
				for range 6 {
					out, err := cluster.Kubectl(t.Context(), "exec", client, "--", "sh", "-c",
						`printf 'GET / HTTP/1.0\r\n\r\n' | nc.openbsd -N -w 3 `+address+` 80 | tail -n 1`)
					if err != nil {
						return err
					}
					want[strings.TrimSpace(out)] = true
				}
				if len(want) < len(servers) { // also the one that is the client itself, or on its node
					return fmt.Errorf("the service was answered by %v only, not by all of %v", want, servers)
				}
				return nil
			})
		})
	}
	t.Run("from outside, through each node", func(t *testing.T) {
		for i := range nodes {
			fromOutside(t, i, 30080)
		}
	})
}

// fromOutside has a client that is no node and no pod ask for a page at a port of the
// node with the number.
func fromOutside(t *testing.T, node, port int) {
	t.Helper()
	eventually(t, func() error {
		return guest.InNetns(cluster.Name, func() error {
			conn, err := net.DialTimeout("tcp", fmt.Sprintf("172.30.0.%d:%d", 11+node, port), 3*time.Second)
			if err != nil {
				return fmt.Errorf("through %s: %w", nodes[node], err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
			_, _ = io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
			if answer, err := io.ReadAll(conn); err != nil || !strings.Contains(string(answer), "200 OK") {
				return fmt.Errorf("through %s: %w: %q", nodes[node], err, answer)
			}
			return nil
		})
	})
}
