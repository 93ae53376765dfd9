//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// neverCordoned fails the test when a node becomes unschedulable, however shortly.
func neverCordoned(t *testing.T) {
	t.Helper()
	config, err := cluster.RESTConfig()
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	w, err := client.CoreV1().Nodes().Watch(context.Background(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for e := range w.ResultChan() {
			if n, ok := e.Object.(*corev1.Node); ok && n.Spec.Unschedulable {
				t.Errorf("node %s was cordoned", n.Name)
			}
		}
	}()
	t.Cleanup(func() { w.Stop(); <-done })
}

// startPing lets a pod ping an address ten times a second until stop, which fails the
// test when an answer was missing.
func startPing(t *testing.T, pod, address string) (stop func()) {
	t.Helper()
	kubectl(t, "", "exec", pod, "--", "sh", "-c", "ping -i 0.1 "+address+" >/ping.log 2>&1 </dev/null &")
	began := time.Now()
	return func() {
		t.Helper()
		log := kubectl(t, "", "exec", pod, "--", "sh", "-c", "kill -INT $(pidof ping); until grep transmitted /ping.log; do sleep 0.1; done >/dev/null; cat /ping.log")
		took := time.Since(began)
		// The last one may have been on its way.
		last := 0
		for _, m := range regexp.MustCompile(`seq=(\d+)`).FindAllStringSubmatch(log, -1) {
			n, err := strconv.Atoi(m[1])
			if err != nil || n != last+1 {
				t.Errorf("%s to %s: answer %s after %d", pod, address, m[1], last)
			}
			last = n
		}
		if last < int(took.Seconds()) {
			t.Errorf("%s to %s: only %d answers in %s:\n%s", pod, address, last, took, log)
		}
		t.Logf("%s to %s: all of %d answers in %.0f s", pod, address, last, took.Seconds())
	}
}

// uid identifies a pod: one of the same name that came later has another.
func uid(t *testing.T, pod string) string {
	t.Helper()
	return kubectl(t, "", "get", "pod", pod, "-o", "jsonpath={.metadata.uid} {.status.phase}")
}

// nodeState reads a part of a node's state.
func nodeState(t *testing.T, node, path string) string {
	t.Helper()
	return kubectl(t, "", "-n", namespace, "get", "sriovnetworknodestate", node, "-o", "jsonpath="+path)
}

// stateTells waits until a part of a node's state has all of want.
func stateTells(t *testing.T, node, path string, want ...string) {
	t.Helper()
	eventually(t, func() error {
		got := nodeState(t, node, path)
		for _, w := range want {
			if !strings.Contains(got, w) {
				return fmt.Errorf("%s of %s has no %q: %s", path, node, w, got)
			}
		}
		return nil
	})
}

const (
	evicting = `{.status.conditions[?(@.type=="Evicting")]}`
	pending  = `{.status.pending}`
)

// A pool grows, on the same PF and on another, and pods notice nothing. A PF whose number
// of VFs changes loses its own pods, one node after the other, and pods on the other PF
// notice nothing. A budget that forbids it is told, by name, and holds.
func TestChangesTouchOnlyWhatTheyMust(t *testing.T) {
	onlyUML(t, "what is planned and whom it evicts does not depend on the NIC")
	usePools(t)
	neverCordoned(t)
	kubectl(t, policy("left", "left", "ens1f0#0-2", 4)+policy("right", "right", "ens2f0", 2), "apply", "-f", "-")
	waitAllocatable(t, left, "3", nodes...)
	l1 := pod("l1", "vm1", "["+on("left-net", "192.168.100.1/24")+"]", left)
	l2 := pod("l2", "vm2", "["+on("left-net", "192.168.100.2/24")+"]", left)
	apply(t, l1+l2)
	waitReady(t, "l1", "l2")

	leftPing, before := startPing(t, "l1", "192.168.100.2"), uid(t, "l1")+uid(t, "l2")
	kubectl(t, policy("left", "left", "ens1f0", 4)+policy("right", "right", "ens2f0", 3), "apply", "-f", "-")
	waitAllocatable(t, left, "4", nodes...)
	waitAllocatable(t, right, "3", nodes...)
	r1 := pod("r1", "vm1", "["+on("right-net", "192.168.101.1/24")+"]", right)
	r2 := pod("r2", "vm2", "["+on("right-net", "192.168.101.2/24")+"]", right)
	apply(t, r1+r2)
	waitReady(t, "r1", "r2")
	leftPing()
	if after := uid(t, "l1") + uid(t, "l2"); after != before {
		t.Errorf("the pods were %s and are %s", before, after)
	}

	rightPing, before := startPing(t, "r1", "192.168.101.2"), uid(t, "r1")+uid(t, "r2")
	const budget = `
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: both, namespace: default}
spec: {minAvailable: 2, selector: {matchExpressions: [{key: app, operator: In, values: [l1, l2]}]}}
---`
	apply(t, budget)
	kubectl(t, policy("left", "left", "ens1f0", 3), "apply", "-f", "-")
	for node, name := range map[string]string{"vm1": "l1", "vm2": "l2"} {
		stateTells(t, node, pending, `"name":"`+name+`"`, `"cost":"Evict"`, "0000:01:00.0")
		if got := nodeState(t, node, pending); strings.Contains(got, `"name":"r`) {
			t.Errorf("%s would lose pods of the other PF: %s", node, got)
		}
	}
	// Nodes in no pool are disturbed one at a time, that first which asked first.
	eventually(t, func() error {
		one, two := nodeState(t, "vm1", evicting), nodeState(t, "vm2", evicting)
		name := "l1"
		if strings.Contains(two, "Blocked") {
			one, two, name = two, one, "l2"
		}
		for _, want := range []string{"Blocked", "default/" + name, "budget both"} {
			if !strings.Contains(one, want) {
				return fmt.Errorf("no %q in %s", want, one)
			}
		}
		if !strings.Contains(two, "WaitingForPool") {
			return fmt.Errorf("both at a time: %s and %s", one, two)
		}
		return nil
	})
	if all := uid(t, "l1") + uid(t, "l2"); strings.Count(all, "Running") != 2 {
		t.Errorf("the budget did not hold: %s", all)
	}
	remove(t, budget)
	if _, err := cluster.Kubectl(t.Context(), "wait", "--for=delete", "--timeout=5m", "pod/l1", "pod/l2"); err != nil {
		t.Fatalf("%v\n%s", err, diagnosis(t.Context()))
	}
	waitAllocatable(t, left, "3", nodes...)
	for _, n := range nodes {
		stateTells(t, n, evicting, `"False"`, "Idle")
		if err := baseline(t, n, "ens1f0", 3); err != nil {
			t.Error(err)
		}
		if got := nodeState(t, n, pending); got != "" {
			t.Errorf("%s still has pending %s", n, got)
		}
	}
	rightPing()
	if after := uid(t, "r1") + uid(t, "r2"); after != before {
		t.Errorf("the pods were %s and are %s", before, after)
	}

	t.Run("disableDrain", func(t *testing.T) {
		configure(t, `{"disableDrain": true}`)
		defer configure(t, `{"disableDrain": false}`)
		kubectl(t, l1, "apply", "-f", "-")
		waitReady(t, "l1")
		kubectl(t, policy("left", "left", "ens1f0", 4), "apply", "-f", "-")
		stateTells(t, "vm1", evicting, "Disabled", "default/l1", "disableDrain")
		waitAllocatable(t, left, "4", "vm2")
		if got := uid(t, "l1"); !strings.HasSuffix(got, "Running") {
			t.Errorf("pod l1 was disturbed: %s", got)
		}
		configure(t, `{"disableDrain": false}`)
		stateTells(t, "vm1", evicting, "Idle")
		waitAllocatable(t, left, "4", "vm1")
		if out, err := cluster.Kubectl(t.Context(), "get", "pod", "l1"); err == nil && !strings.Contains(out, "Terminating") {
			t.Errorf("pod l1 still has a VF of before: %s", out)
		}
	})
}

// A VF that only an init container has is its pod's, although the kubelet's API does not
// tell of it: a change that needs it waits, and evicts the pod.
func TestAnInitContainerHoldsItsVF(t *testing.T) {
	onlyUML(t, "what the kubelet tells does not depend on the NIC")
	usePools(t)
	apply(t, `
apiVersion: v1
kind: Pod
metadata: {name: init, namespace: default}
spec:
  nodeSelector: {kubernetes.io/hostname: vm1}
  terminationGracePeriodSeconds: 1
  initContainers:
    - name: first
      image: sluice.dev/tools:dev
      command: [sleep, infinity]
      resources: {requests: {`+left+`: "1"}, limits: {`+left+`: "1"}}
  containers:
    - {name: app, image: sluice.dev/tools:dev, command: [sleep, infinity]}
---`)
	eventually(t, func() error {
		if got := kubectl(t, "", "get", "pod", "init", "-o", "jsonpath={.status.initContainerStatuses[0].state.running}"); got == "" {
			return errors.New("the init container does not run")
		}
		return nil
	})
	time.Sleep(12 * time.Second) // until the agent relies on the kubelet alone
	its := kubectl(t, "", "get", "pod", "init", "-o", "jsonpath={.metadata.uid}")
	stateTells(t, "vm1", "{.status.interfaces[*].Vfs[*].assigned}", "uid:"+its)

	// Budgets do not hold for pods that have not started.
	configure(t, `{"disableDrain": true}`)
	defer configure(t, `{"disableDrain": false}`)
	kubectl(t, policy("left", "left", "ens1f0", 3), "apply", "-f", "-")
	stateTells(t, "vm1", pending, `"uid":"`+its+`"`, `"cost":"Evict"`)
	stateTells(t, "vm1", evicting, "Disabled", "with UID "+its)
	if err := baseline(t, "vm1", "ens1f0", 4); err != nil {
		t.Errorf("changed under the pod: %v", err)
	}
	configure(t, `{"disableDrain": false}`)
	if _, err := cluster.Kubectl(t.Context(), "wait", "--for=delete", "--timeout=5m", "pod/init"); err != nil {
		t.Fatalf("%v\n%s", err, diagnosis(t.Context()))
	}
	waitAllocatable(t, left, "3", nodes...)
	stateTells(t, "vm1", evicting, `"False"`, "Idle")
}

// Who changes a VF behind the agent's back finds it put right. How soon on a node that
// does nothing else is a matter of the agent's own tests, in operator/node.
func TestDrift(t *testing.T) {
	usePools(t)
	// Both times are taken by the node's own clock, beside the agent.
	out := inNode(t, "vm1", `
now() { read up idle </proc/uptime; echo ${up%.*}${up#*.}; }
ip link set ens1f0 vf 3 vlan 77 spoofchk off
from=$(now)
while ip link show ens1f0 | grep -qE 'vf 3 .*(vlan 77|spoof checking off)'; do
  [ $(($(now) - from)) -lt 1000 ] || break
  sleep 0.02
done
echo $(($(now) - from))0
ip link show ens1f0`)
	took, rest, _ := strings.Cut(out, "\n")
	t.Logf("put right after at most %s ms", took)
	if strings.Contains(rest, "vlan 77") || strings.Contains(rest, "spoof checking off") {
		t.Errorf("not put right:\n%s", rest)
	}
}
