package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/yaml"

	"github.com/sluice-network/sluice/test/apiserver"
)

const inside, asAgent = "SLUICE_TEST_INSIDE", "SLUICE_TEST_AS_AGENT"

// Where there is an API server, the tests, and it, have namespaces of their own: the whole
// agent runs here, and the machine's network is none of its business.
func TestMain(m *testing.M) {
	if os.Getenv(asAgent) != "" {
		main()
		os.Exit(0)
	}
	if os.Getenv("KUBEBUILDER_ASSETS") == "" || os.Getenv(inside) != "" {
		apiserver.Main(m)
	}
	// The API server wants a default route.
	const setUp = `set -e; mount --make-rprivate /; mount -t sysfs sysfs /sys
ip link set lo up; ip link add parent0 type veth peer name wire0; ip link set parent0 up; ip link set wire0 up
ip address add 192.0.2.1/24 dev wire0; ip route add default via 192.0.2.2; exec "$0" "$@"`
	c := exec.Command("sh", append([]string{"-c", setUp, "/proc/self/exe"}, os.Args[1:]...)...)
	program, err := os.Executable()
	if err == nil {
		c.Args[3] = program
		c.Env = append(os.Environ(), inside+"=yes")
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		err = c.Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tests with namespaces of their own:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Kinds of others, as little as it takes.
const crds = `
- {group: k8s.cni.cncf.io, kind: NetworkAttachmentDefinition, plural: network-attachment-definitions, version: v1}
- {group: k8s.cni.cncf.io, kind: MultiNetworkPolicy, plural: multi-networkpolicies, version: v1beta1}`

const objects = `
apiVersion: v1
kind: Namespace
metadata: {name: sluice}
---
apiVersion: v1
kind: Node
metadata: {name: here}
---
apiVersion: k8s.cni.cncf.io/v1
kind: NetworkAttachmentDefinition
metadata: {name: blue, namespace: default, annotations: {sluice.dev/network-policy: all}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: default}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: default, annotations: {k8s.v1.cni.cncf.io/networks: blue}}
spec: {nodeName: here, containers: [{name: a, image: a}]}`

// The whole agent, with a pod under policy, is killed and comes back: what is attached
// stays so and closed, and is let go of when its pod goes.
func TestAgentComesBackToAPodUnderPolicy(t *testing.T) {
	config := apiserver.Config(t)
	var kinds []struct{ Group, Kind, Plural, Version string }
	if err := yaml.Unmarshal([]byte(crds), &kinds); err != nil {
		t.Fatal(err)
	}
	var definitions []string
	for _, k := range kinds {
		definitions = append(definitions, fmt.Sprintf(`
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: %[3]s.%[1]s}
spec:
  group: %[1]s
  scope: Namespaced
  names: {kind: %[2]s, plural: %[3]s}
  versions: [{name: %[4]s, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}]`,
			k.Group, k.Kind, k.Plural, k.Version))
	}
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if _, err := envtest.InstallCRDs(config, envtest.CRDInstallOptions{Paths: []string{write("crds.yaml", strings.Join(definitions, "\n---\n"))}, MaxTime: time.Minute}); err != nil {
		t.Fatal(err)
	}
	api, err := client.New(config, client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range strings.Split(objects, "\n---\n") {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(text), &o.Object); err != nil {
			t.Fatal(err)
		}
		if err := api.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	var pod corev1.Pod
	if err := api.Get(t.Context(), client.ObjectKey{Namespace: "default", Name: "a"}, &pod); err != nil {
		t.Fatal(err)
	}
	kubeconfig := filepath.Join(dir, "kubeconfig")
	if err := clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:  map[string]*clientcmdapi.Cluster{"c": {Server: config.Host, CertificateAuthorityData: config.CAData}},
		AuthInfos: map[string]*clientcmdapi.AuthInfo{"u": {ClientCertificateData: config.CertData, ClientKeyData: config.KeyData}},
		Contexts:  map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u"}}, CurrentContext: "x",
	}, kubeconfig); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBECONFIG", kubeconfig)
	sh := func(script string) string {
		t.Helper()
		c := exec.CommandContext(t.Context(), "sh", "-ec", script)
		c.Dir = dir
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
		return string(out)
	}
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, "shim"), "../../../cni/cmd/sluice-cni").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	sh("touch pod.ns; unshare --net=pod.ns true; mkdir plugins kubelet")
	t.Cleanup(func() { _ = syscall.Unmount(filepath.Join(dir, "pod.ns"), syscall.MNT_DETACH) })

	var args []string
	for flag, value := range map[string]string{
		"state-dir": "state", "sriov-operator-dir": "upstream", "sriov-cni-dir": "sriov", "socket": "run/cni.sock", "shim": "shim", "cni-bin-dir": "plugins", "device-plugin-dir": "kubelet",
		"pod-resources-socket": "kubelet/pod-resources.sock", "device-info-dir": "devinfo", "device-pools": "pools/config.json", "system-bus-socket": "bus", "modprobe-dir": "modprobe",
	} {
		args = append(args, "--"+flag, filepath.Join(dir, value))
	}
	args = append(args, "--node-name", "here", "--namespace", "sluice", "--node-ip", "127.0.0.1", "--listen", "127.0.0.1:0")
	settings, err := parse(args, func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	conf := map[string]any{
		"cniVersion": "1.0.0", "name": "blue", "type": "macvlan", "master": "parent0",
		"ipam": map[string]any{"type": "host-local", "dataDir": filepath.Join(dir, "leases"), "ranges": []any{[]any{map[string]any{"subnet": "10.30.0.0/24"}}}},
	}
	cni := func(command string) (out []byte, err error) {
		c := exec.CommandContext(t.Context(), settings.shim)
		stdin, err := json.Marshal(conf)
		if err != nil {
			return nil, err
		}
		c.Stdin = strings.NewReader(string(stdin))
		c.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID=c1", "CNI_IFNAME=net1", "CNI_NETNS="+filepath.Join(dir, "pod.ns"), "CNI_PATH="+settings.cniDir,
			"SLUICE_CNI_SOCKET="+settings.socket, "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=a;K8S_POD_UID="+string(pod.UID))
		if out, err = c.Output(); err != nil {
			err = fmt.Errorf("%s: %w: %s", command, err, out)
		}
		return out, err
	}
	// running runs an agent, until f has done something with it.
	running := func(end os.Signal, f func()) {
		t.Helper()
		_ = os.Remove(settings.socket)
		var said bytes.Buffer
		agent := exec.CommandContext(t.Context(), os.Args[0], args...)
		agent.Env = append(os.Environ(), asAgent+"=yes")
		agent.Stdout, agent.Stderr = &said, &said
		if err := agent.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- agent.Wait() }()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			c, err := net.Dial("unix", settings.socket)
			if err == nil {
				_ = c.Close()
				break
			}
			select {
			case err := <-done:
				t.Fatalf("the agent ended: %v\n%s", err, &said)
			default:
			}
			if time.Now().After(deadline) {
				t.Fatalf("the agent does not come: %v", err)
			}
		}
		f()
		_ = agent.Process.Signal(end)
		if err := <-done; (err == nil) != (end == os.Interrupt) {
			t.Errorf("the agent ended: %v\n%s", err, &said)
		}
	}
	eventually := func(f func() error) {
		t.Helper()
		var err error
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
			if err = f(); err == nil {
				return
			}
		}
		t.Fatal(err)
	}
	tables := func() string { return sh("nft list tables; nsenter --net=pod.ns nft list tables") }

	running(os.Kill, func() {
		eventually(func() error { // policies may not be known yet
			out, err := cni("ADD")
			if err != nil {
				return err
			}
			var result any
			conf["prevResult"] = &result
			return json.Unmarshal(out, &result)
		})
	})
	closed := tables()
	for _, want := range []string{"netdev sluice-parent0", "inet sluice-net1", "netdev sluice-net1"} {
		if !strings.Contains(closed, want) {
			t.Fatalf("no table %s in:\n%s", want, closed)
		}
	}
	running(os.Interrupt, func() {
		eventually(func() error {
			_, err := cni("CHECK")
			return err
		})
		if now := tables(); now != closed {
			t.Errorf("tables were\n%s, are\n%s", closed, now)
		}
		if _, err := cni("DEL"); err != nil {
			t.Error(err)
		}
		if now := tables(); strings.Contains(now, "sluice-") {
			t.Errorf("left:\n%s", now)
		}
	})
}
