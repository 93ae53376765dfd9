//go:build e2e

package e2e

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-network/sluice/test/lab"
	"github.com/sluice-network/sluice/test/lab/guest"
)

const namespace = "sriov-network-operator"

var (
	cluster *lab.Cluster
	kind    = cmp.Or(os.Getenv("LAB"), "uml")
	nodes   = []string{"vm1", "vm2"}
)

func TestMain(m *testing.M) {
	rc, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		rc = 1
	}
	os.Exit(rc)
}

func run(m *testing.M) (int, error) {
	ctx := context.Background()
	image := os.Getenv("SLUICE_IMAGE")
	if image == "" {
		return 1, errors.New("SLUICE_IMAGE is not set: 'make test-e2e' builds the image and sets it")
	}
	// kubectl apply -k wants the paths of the repository's root.
	if err := os.Chdir(filepath.Join("..", "..")); err != nil {
		return 1, err
	}
	var err error
	if cluster, err = lab.Up(ctx, lab.Options{Kind: guest.Kind(kind), Nodes: len(nodes), Images: []string{image}, Progress: os.Stdout}); err != nil {
		return 1, err
	}
	if os.Getenv("SLUICE_KEEP") == "" {
		defer func() {
			if err := cluster.Down(ctx); err != nil {
				fmt.Fprintln(os.Stderr, "e2e: end the lab:", err)
			}
		}()
	}
	if err := install(ctx); err != nil {
		return 1, fmt.Errorf("%w\n%s", err, diagnosis(ctx))
	}
	return m.Run(), nil
}

func install(ctx context.Context) error {
	if _, err := cluster.Kubectl(ctx, "apply", "-k", "config/default"); err != nil {
		return err
	}
	if _, err := cluster.Kubectl(ctx, "-n", namespace, "wait", "--for=create", "daemonset/sluice-agent", "--timeout=5m"); err != nil {
		return err // the operator makes it when it is there itself
	}
	for _, w := range []string{"deployment/sluice-operator", "daemonset/sluice-agent"} {
		if _, err := cluster.Kubectl(ctx, "-n", namespace, "rollout", "status", w, "--timeout=5m"); err != nil {
			return err
		}
	}
	return nil
}

// onlyUML leaves a test to the clusters of UML guests, which are faster, when QEMU's,
// with another kernel, driver and NIC, would show nothing more.
func onlyUML(t *testing.T, why string) {
	t.Helper()
	if kind != "uml" {
		t.Skip(why + ": the kind uml runs it")
	}
}

// diagnosis collects what one looks at first when a test failed.
func diagnosis(ctx context.Context) string {
	var b strings.Builder
	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"},
		{"-n", namespace, "get", "sriovnetworknodestates,sriovnetworknodepolicies,sriovnetworks"},
		{"get", "events", "-A", "--sort-by=.lastTimestamp"},
		{"-n", namespace, "logs", "-l", "app.kubernetes.io/name=sluice", "--tail=40", "--prefix"},
	} {
		out, err := cluster.Kubectl(ctx, args...)
		if len(out) > 6000 {
			out = out[len(out)-6000:]
		}
		fmt.Fprintf(&b, "--- kubectl %s (%v)\n%s\n", strings.Join(args, " "), err, out)
	}
	return b.String()
}

// kubectl runs kubectl and ends the test when it fails.
func kubectl(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	out, err := cluster.KubectlInput(t.Context(), stdin, args...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return out
}

// apply applies YAML and takes it back when the test ends.
func apply(t *testing.T, yaml string) {
	t.Helper()
	kubectl(t, yaml, "apply", "-f", "-")
	t.Cleanup(func() { remove(t, yaml) })
}

func remove(t *testing.T, yaml string) {
	t.Helper()
	// The test's own context is done when its cleanups run.
	if _, err := cluster.KubectlInput(context.Background(), yaml, "delete", "--ignore-not-found", "--wait", "--timeout=5m", "-f", "-"); err != nil {
		t.Errorf("%v", err)
	}
}

// refused applies YAML that must be refused, with all of want in the message.
func refused(t *testing.T, yaml string, want ...string) {
	t.Helper()
	out, err := cluster.KubectlInput(t.Context(), yaml, "apply", "-f", "-")
	if err == nil {
		remove(t, yaml)
		t.Fatalf("accepted: %s", out)
	}
	mentions(t, err.Error(), want...)
}

func mentions(t *testing.T, text string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("no %q in:\n%s", w, text)
		}
	}
}

// inNode runs a shell script in a node.
func inNode(t *testing.T, node, script string) string {
	t.Helper()
	g, err := cluster.Node(node)
	if err != nil {
		t.Fatal(err)
	}
	out, err := g.Run(t.Context(), script)
	if err != nil {
		t.Fatalf("in %s: %v\n%s", node, err, out)
	}
	return out
}

// inNodeAfter is inNode for cleanups, when the test's own context is done.
func inNodeAfter(t *testing.T, node, script string) {
	t.Helper()
	g, err := cluster.Node(node)
	if err == nil {
		_, err = g.Run(context.Background(), script)
	}
	if err != nil {
		t.Errorf("in %s: %v", node, err)
	}
}

// patience is how long is waited for what should happen at once: guests of a machine with
// much else to do are slow.
const patience = 5 * time.Minute

// eventually waits until f has no complaint.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s: %v\n%s", patience, err, diagnosis(context.Background()))
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// allocatable is how much of a resource kubelet offers on a node.
func allocatable(t *testing.T, node, resource string) string {
	t.Helper()
	return strings.TrimSpace(kubectl(t, "", "get", "node", node, "-o", "jsonpath={.status.allocatable."+strings.ReplaceAll(resource, ".", `\.`)+"}"))
}

func waitAllocatable(t *testing.T, resource, want string, on ...string) {
	t.Helper()
	eventually(t, func() error {
		for _, n := range on {
			if got := allocatable(t, n, resource); got != want {
				return fmt.Errorf("%s has %s=%q allocatable, want %s", n, resource, got, want)
			}
		}
		return nil
	})
}

// vf is what a node's kernel says of one VF.
type vf struct {
	address, name, pfLine string
}

// vfs lists a node's VFs below a PF as its kernel sees them in its own namespace.
func vfs(t *testing.T, node, pf string) []vf {
	t.Helper()
	out := inNode(t, node, `
for l in /sys/class/net/`+pf+`/device/virtfn*; do
  [ -e "$l" ] || continue
  i=${l##*virtfn}
  echo "$(basename $(readlink $l))|$(ls $l/net 2>/dev/null)|$(ip link show `+pf+` | grep -w "vf $i ")"
done`)
	var all []vf
	for line := range strings.Lines(out) {
		f := strings.SplitN(strings.TrimSpace(line), "|", 3)
		all = append(all, vf{f[0], f[1], f[2]})
	}
	slices.SortFunc(all, func(a, b vf) int { return cmp.Compare(a.address, b.address) })
	return all
}

// baseline checks that all VFs of a PF are with the node, as the agent returns them.
func baseline(t *testing.T, node, pf string, want int) error {
	t.Helper()
	all := vfs(t, node, pf)
	if len(all) != want {
		return fmt.Errorf("%s: %s has %d VFs, want %d", node, pf, len(all), want)
	}
	for i, v := range all {
		switch {
		case v.name != fmt.Sprintf("%sv%d", pf, i) && kind == "uml":
			return fmt.Errorf("%s: VF %s is called %q", node, v.address, v.name)
		case v.name == "":
			return fmt.Errorf("%s: VF %s is not with the node", node, v.address)
		case strings.Contains(v.pfLine, "vlan"):
			return fmt.Errorf("%s: VF %s kept a VLAN: %s", node, v.address, v.pfLine)
		case !strings.Contains(v.pfLine, "spoof checking on"):
			return fmt.Errorf("%s: VF %s has no spoof check: %s", node, v.address, v.pfLine)
		case !strings.Contains(v.pfLine, "trust off"):
			return fmt.Errorf("%s: VF %s is trusted: %s", node, v.address, v.pfLine)
		case strings.Contains(v.pfLine, "00:00:00:00:00:00"):
			return fmt.Errorf("%s: VF %s has no administrative MAC: %s", node, v.address, v.pfLine)
		}
	}
	return nil
}
