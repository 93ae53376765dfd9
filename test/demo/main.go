// Command demo shows Sluice at work on a cluster of guests with SR-IOV NICs: it
// starts the lab, installs Sluice, applies policies and networks, runs pods on
// VFs, and prints what happened and how long each step took. The cluster stays up.
package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/sluice-network/sluice/test/lab"
	"github.com/sluice-network/sluice/test/lab/guest"
)

//go:embed demo.yaml
var policies string

//go:embed pods.yaml
var pods string

const namespace = "sriov-network-operator"

func main() {
	kind := flag.String("kind", "uml", "kind of node guests: uml or qemu")
	image := flag.String("image", "out/sluice.tar", "archive of the product's image")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	d := &demo{start: time.Now()}
	if err := d.run(ctx, *kind, *image); err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		fmt.Fprintln(os.Stderr, "The lab is left as it is: 'make lab-status' shows it, 'make demo-down' removes it.")
		os.Exit(1)
	}
}

type step struct {
	name string
	took time.Duration
}

type demo struct {
	start time.Time
	steps []step
	lab   *lab.Cluster
}

// do runs one step and keeps its time for the final table.
func (d *demo) do(name string, f func() error) error {
	fmt.Printf("[%4.0fs] %s\n", time.Since(d.start).Seconds(), name)
	t := time.Now()
	err := f()
	d.steps = append(d.steps, step{name, time.Since(t)})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (d *demo) run(ctx context.Context, kind, image string) error {
	var pings, flows [][]string
	for _, s := range []struct {
		name string
		f    func() error
	}{
		{"cluster of two " + kind + " nodes", func() (err error) {
			d.lab, err = lab.Up(ctx, lab.Options{Kind: guest.Kind(kind), Nodes: 2, Images: []string{image}, Progress: os.Stdout})
			return err
		}},
		{"install Sluice: kubectl apply -k config/default", func() error { return d.install(ctx) }},
		{"policies applied, VFs made, resources allocatable", func() error { return d.configure(ctx) }},
		{"three pods with five VFs running", func() error { return d.runPods(ctx) }},
		{"ping between VFs", func() (err error) { pings, err = d.ping(ctx); return err }},
		{"iperf3 between VFs", func() (err error) { flows, err = d.iperf(ctx); return err }},
	} {
		if err := d.do(s.name, s.f); err != nil {
			return err
		}
	}
	return d.report(ctx, kind, pings, flows)
}

func (d *demo) kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	return d.lab.KubectlInput(ctx, stdin, args...)
}

func (d *demo) install(ctx context.Context) error {
	if _, err := d.kubectl(ctx, "", "apply", "-k", "config/default"); err != nil {
		return err
	}
	if _, err := d.kubectl(ctx, "", "-n", namespace, "wait", "--for=create", "daemonset/sluice-agent", "--timeout=5m"); err != nil {
		return err // the operator makes it when it is there itself
	}
	for _, w := range []string{"deployment/sluice-operator", "daemonset/sluice-agent"} {
		if _, err := d.kubectl(ctx, "", "-n", namespace, "rollout", "status", w, "--timeout=5m"); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) configure(ctx context.Context) error {
	if _, err := d.kubectl(ctx, policies, "apply", "-f", "-"); err != nil {
		return err
	}
	// What a user waits for: the scheduler sees the resources.
	return poll(ctx, 5*time.Minute, func() error {
		var nodes nodeList
		if err := d.get(ctx, &nodes, "nodes"); err != nil {
			return err
		}
		for _, n := range nodes.Items {
			if l, r := n.Status.Allocatable["openshift.io/left"], n.Status.Allocatable["openshift.io/right"]; l != "4" || r != "2" {
				return fmt.Errorf("node %s has openshift.io/left=%q, openshift.io/right=%q allocatable, want 4 and 2", n.Metadata.Name, l, r)
			}
		}
		return nil
	})
}

func (d *demo) runPods(ctx context.Context) error {
	if _, err := d.kubectl(ctx, "", "delete", "pod", "client", "near", "far", "--ignore-not-found", "--wait"); err != nil {
		return err
	}
	if _, err := d.kubectl(ctx, pods, "apply", "-f", "-"); err != nil {
		return err
	}
	_, err := d.kubectl(ctx, "", "wait", "--for=condition=Ready", "pod/client", "pod/near", "pod/far", "--timeout=5m")
	return err
}

// paths are the ways from pod client that the demo shows.
var paths = []struct{ to, address, what string }{
	{"near", "192.168.100.2", "same PF, VLAN 100"},
	{"far", "192.168.100.3", "other node, VLAN 100"},
	{"far", "192.168.101.3", "other node, the other PF"},
}

func (d *demo) ping(ctx context.Context) ([][]string, error) {
	var rows [][]string
	for _, p := range paths {
		out, err := d.kubectl(ctx, "", "exec", "client", "--", "ping", "-c", "5", "-i", "0.2", "-w", "10", "-q", p.address)
		if err != nil {
			return nil, fmt.Errorf("ping %s: %w", p.address, err)
		}
		loss, rtt := "?", "?"
		for line := range strings.Lines(out) {
			if _, after, ok := strings.Cut(line, "received, "); ok {
				loss, _, _ = strings.Cut(after, " packet loss")
			}
			if _, after, ok := strings.Cut(line, "= "); ok && strings.HasPrefix(line, "rtt") {
				if f := strings.Split(after, "/"); len(f) > 1 {
					rtt = f[1] + " ms"
				}
			}
		}
		rows = append(rows, []string{"client", p.to, p.address, p.what, loss, rtt})
		if loss != "0%" {
			return rows, fmt.Errorf("ping from client to %s lost %s", p.address, loss)
		}
	}
	return rows, nil
}

func (d *demo) iperf(ctx context.Context) ([][]string, error) {
	var rows [][]string
	for _, p := range paths {
		out, err := d.kubectl(ctx, "", "exec", "client", "--", "iperf3", "-c", p.address, "-t", "3", "-J")
		if err != nil {
			return nil, fmt.Errorf("iperf3 to %s: %w", p.address, err)
		}
		var r struct {
			End struct {
				Received struct {
					Rate float64 `json:"bits_per_second"`
				} `json:"sum_received"`
			} `json:"end"`
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			return nil, fmt.Errorf("read iperf3's report: %w", err)
		}
		rows = append(rows, []string{fmt.Sprintf("%.0f Mbit/s", r.End.Received.Rate/1e6)})
	}
	return rows, nil
}

// The parts of Kubernetes objects that the report shows.
type (
	metadata struct {
		Name        string            `json:"name"`
		Annotations map[string]string `json:"annotations"`
	}
	nodeList struct {
		Items []struct {
			Metadata metadata `json:"metadata"`
			Status   struct {
				Allocatable map[string]string `json:"allocatable"`
			} `json:"status"`
		} `json:"items"`
	}
	podList struct {
		Items []struct {
			Metadata metadata `json:"metadata"`
			Spec     struct {
				NodeName string `json:"nodeName"`
			} `json:"spec"`
		} `json:"items"`
	}
	stateList struct {
		Items []struct {
			Metadata metadata `json:"metadata"`
			Status   struct {
				Interfaces []struct {
					Name, Driver, PCIAddress, Vendor, DeviceID string
					NumVfs                                     int
					TotalVfs                                   int `json:"totalvfs"`
				} `json:"interfaces"`
			} `json:"status"`
		} `json:"items"`
	}
	network struct {
		Name, Interface, MAC string
		IPs                  []string
		DeviceInfo           struct {
			PCI struct {
				Address string `json:"pci-address"`
				PF      string `json:"pf-pci-address"`
			} `json:"pci"`
		} `json:"device-info"`
	}
)

func (d *demo) get(ctx context.Context, into any, args ...string) error {
	out, err := d.kubectl(ctx, "", append([]string{"get", "-o", "json"}, args...)...)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), into)
}

func (d *demo) report(ctx context.Context, kind string, pings, flows [][]string) error {
	var states stateList
	var nodes nodeList
	var running podList
	if err := errors.Join(
		d.get(ctx, &states, "-n", namespace, "sriovnetworknodestates"),
		d.get(ctx, &nodes, "nodes"),
		d.get(ctx, &running, "pods", "-n", "default"),
	); err != nil {
		return err
	}
	var b bytes.Buffer
	table := func(title string, rows [][]string) {
		fmt.Fprintf(&b, "\n%s\n", title)
		w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		for _, r := range rows {
			fmt.Fprintln(w, "  "+strings.Join(r, "\t"))
		}
		_ = w.Flush() // a bytes.Buffer takes all
	}

	rows := [][]string{{"NODE", "PF", "PCI ADDRESS", "NIC", "DRIVER", "VFS", "OF"}}
	for _, s := range states.Items {
		for _, i := range s.Status.Interfaces {
			rows = append(rows, []string{s.Metadata.Name, i.Name, i.PCIAddress, i.Vendor + ":" + i.DeviceID, i.Driver, fmt.Sprint(i.NumVfs), fmt.Sprint(i.TotalVfs)})
		}
	}
	table("VFs made", rows)

	rows = [][]string{{"NODE", "RESOURCE", "ALLOCATABLE"}}
	for _, n := range nodes.Items {
		for _, r := range []string{"openshift.io/left", "openshift.io/right"} {
			rows = append(rows, []string{n.Metadata.Name, r, n.Status.Allocatable[r]})
		}
	}
	table("Resources", rows)

	rows = [][]string{{"POD", "NODE", "INTERFACE", "NETWORK", "VF", "PF", "MAC", "ADDRESS"}}
	for _, p := range running.Items {
		var nets []network
		if err := json.Unmarshal([]byte(p.Metadata.Annotations["k8s.v1.cni.cncf.io/network-status"]), &nets); err != nil {
			return fmt.Errorf("read network-status of pod %s: %w", p.Metadata.Name, err)
		}
		for _, n := range nets {
			if n.DeviceInfo.PCI.Address == "" {
				continue // the cluster's own network
			}
			rows = append(rows, []string{p.Metadata.Name, p.Spec.NodeName, n.Interface, n.Name, n.DeviceInfo.PCI.Address, n.DeviceInfo.PCI.PF, n.MAC, strings.Join(n.IPs, " ")})
		}
	}
	table("Pods on VFs", rows)

	rows = [][]string{{"FROM", "TO", "ADDRESS", "PATH", "LOSS", "RTT", "IPERF3"}}
	for i, p := range pings {
		rows = append(rows, append(p, flows[i]...))
	}
	table("Traffic between VFs", rows)

	rows = [][]string{{"STEP", "TIME"}}
	for _, s := range d.steps {
		rows = append(rows, []string{s.name, fmt.Sprintf("%.1f s", s.took.Seconds())})
	}
	rows = append(rows, []string{"altogether", fmt.Sprintf("%.1f s", time.Since(d.start).Seconds())})
	table("Time", rows)

	fmt.Fprintf(&b, `
The cluster (%s guests) stays up. To look around:
  make lab-kubectl ARGS='get sriovnetworknodestates -A'
  make lab-kubectl ARGS='-n %s describe sriovnetworknodestate vm1'
  make lab-kubectl ARGS='exec client -- ip addr'
  make lab-exec NODE=vm1 CMD='ip link show ens1f0'
  make lab-status
To end it:
  make demo-down
`, kind, namespace)
	_, err := os.Stdout.Write(b.Bytes())
	return err
}

// poll calls f until it gives no error or the time is over; its last error
// then says what was still missing.
func poll(ctx context.Context, limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %s: %w", limit, err)
		case <-time.After(300 * time.Millisecond):
		}
	}
}
