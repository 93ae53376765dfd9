//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// configure changes the SriovOperatorConfig.
func configure(t *testing.T, spec string) {
	t.Helper()
	kubectl(t, "", "-n", namespace, "patch", "sriovoperatorconfig", "default", "--type=merge", "-p", `{"spec":`+spec+`}`)
}

// configured tells whether a condition of the configuration is true.
func configured(condition string) error {
	out, err := cluster.Kubectl(context.Background(), "-n", namespace, "get", "sriovoperatorconfig", "default", "-o", fmt.Sprintf(`jsonpath={.status.conditions[?(@.type==%q)]}`, condition))
	if err == nil && !strings.Contains(out, `"status":"True"`) {
		err = errors.New(out)
	}
	return err
}

// With the webhook on, what is wrong only beside other objects is refused when it is
// written. Deleting the configuration with onRemoval Restore then takes back all that
// there was, webhook included; a new configuration makes all work again, with the
// policies and networks that stayed. Deleting the installation as it runs leaves nothing
// that waits for it, and the next one works.
func TestWebhookAndRemoval(t *testing.T) {
	onlyUML(t, "how PFs give up their VFs is tested in guests of both kinds")
	usePools(t)
	configure(t, `{"enableOperatorWebhook": true, "enableInjector": true, "onRemoval": "Restore"}`)
	eventually(t, func() error { return configured("WebhookReady") })
	refused(t, policy("greedy", "greedy", "ens2f0", 100, "priority: 10"), "numVfs", "100", "16")
	refused(t, policy("thief", "thief", "ens1f0#2-3", 4), "left", "ens1f0")
	refused(t, network("text", "left", `ipam: '{"type": '`), "ipam", "JSON")

	// The wrong way round is refused, and with it what could not be undone.
	for _, what := range []string{"namespace/" + namespace, "clusterrole/sluice-operator", "crd/sriovoperatorconfigs.sriovnetwork.openshift.io"} {
		if _, err := cluster.Kubectl(t.Context(), "delete", what, "--timeout=10s"); err == nil || !strings.Contains(err.Error(), "delete the SriovOperatorConfig first") {
			t.Fatalf("%s is deleted: %v", what, err)
		}
	}
	began := time.Now()
	kubectl(t, "", "-n", namespace, "delete", "sriovoperatorconfig", "default", "--wait", "--timeout=5m")
	t.Logf("the configuration is gone after %.1f s", time.Since(began).Seconds())
	eventually(t, func() error {
		out, err := cluster.Kubectl(t.Context(), "-n", namespace, "get", "daemonsets,pods", "-l", "app.kubernetes.io/component=agent", "-o", "name")
		if err != nil || strings.TrimSpace(out) != "" {
			return fmt.Errorf("there still is %s, %w", out, err)
		}
		return nil
	})
	for _, n := range nodes {
		out := inNode(t, n, "cat /sys/class/net/ens*f0/device/sriov_numvfs; ls /opt/cni/bin | grep -e sluice -e sriov || true")
		if strings.TrimSpace(out) != "0\n0" {
			t.Errorf("%s still has VFs or a CNI plugin:\n%s", n, out)
		}
		if err := without(tables(t, n), "sluice-"); err != nil {
			t.Errorf("%s: %v", n, err)
		}
		eventually(t, func() error { // the kubelet writes its node's status each 10 s
			for _, resource := range []string{left, right} {
				if got := allocatable(t, n, resource); got != "" && got != "0" {
					return fmt.Errorf("%s still has %s=%s allocatable", n, resource, got)
				}
			}
			return nil
		})
	}
	if out := kubectl(t, "", "get", "validatingwebhookconfigurations,mutatingwebhookconfigurations", "-o", "name"); strings.TrimSpace(out) != "" {
		t.Errorf("a webhook is left: %s", out)
	}
	kinds := "sriovnetworknodepolicies,sriovnetworknodestates,sriovnetworks,sriovibnetworks,ovsnetworks,sriovnetworkpoolconfigs,sriovoperatorconfigs,macvlannodepolicies,macvlannetworks,net-attach-def"
	if out := kubectl(t, "", "get", "-A", kinds, "-o", "jsonpath={.items[*].metadata.finalizers}"); strings.TrimSpace(out) != "" {
		t.Errorf("finalizers are left: %s", out)
	}

	kubectl(t, fmt.Sprintf("apiVersion: sriovnetwork.openshift.io/v1\nkind: SriovOperatorConfig\nmetadata: {name: default, namespace: %s}\nspec: {}\n", namespace), "apply", "-f", "-")
	usePools(t)
	for _, n := range nodes {
		eventually(t, func() error {
			return errors.Join(baseline(t, n, "ens1f0", 4), baseline(t, n, "ens2f0", 2))
		})
	}

	// With all that the installation brought, without a word before: nothing waits for an
	// operator that is gone.
	kubectl(t, "", "delete", "-k", "config/default", "--timeout=5m")
	eventually(t, func() error { // the garbage collector's work
		if out := kubectl(t, "", "get", "-A", "net-attach-def,validatingwebhookconfigurations,mutatingwebhookconfigurations", "-o", "name"); strings.TrimSpace(out) != "" {
			return fmt.Errorf("there still is %s", out)
		}
		return nil
	})
	if out := kubectl(t, "", "get", "crd", "-o", "name"); strings.Contains(out, "sriovnetwork.openshift.io") || strings.Contains(out, "sluice.dev") {
		t.Errorf("kinds are left: %s", out)
	}
	if err := install(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, diagnosis(t.Context()))
	}
	usePools(t)
}
