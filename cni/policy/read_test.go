package policy

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

func TestReadPod(t *testing.T) {
	var pod corev1.Pod
	if err := yaml.UnmarshalStrict([]byte(`
metadata:
  namespace: ns
  name: p
  uid: u
  labels: {a: b}
  annotations:
    k8s.v1.cni.cncf.io/network-status: |
      [{"name": "cbr0", "interface": "eth0", "ips": ["10.244.0.5"], "default": true, "dns": {}},
       {"name": "ns/net", "interface": "net1", "ips": ["10.0.0.1", "fd00::1"], "mac": "02:00:00:00:00:01", "new": 1},
       {"name": "ns/l2", "interface": "net2", "mac": "02:00:00:00:00:02"}]
spec:
  nodeName: node
  initContainers:
  - {name: i, ports: [{name: init, containerPort: 1}]}
  - {name: s, restartPolicy: Always, ports: [{name: side, containerPort: 2}]}
  containers:
  - {name: c, ports: [{name: web, containerPort: 80, protocol: TCP}, {containerPort: 81}, {name: dns, containerPort: 53, protocol: UDP}, {name: odd, containerPort: 5, protocol: QUIC}]}
  - {name: d, ports: [{name: sig, containerPort: 36412, protocol: SCTP}]}
status: {phase: Running}
`), &pod); err != nil {
		t.Fatal(err)
	}
	want := Pod{
		Namespace: "ns", Name: "p", UID: "u", Labels: map[string]string{"a": "b"}, Node: "node",
		Ports: []NamedPort{{"web", TCP, 80}, {"dns", UDP, 53}, {"sig", SCTP, 36412}, {"side", TCP, 2}},
		Interfaces: []Interface{
			{"ns/net", "net1", "02:00:00:00:00:01", []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}},
			{"ns/l2", "net2", "02:00:00:00:00:02", nil},
		},
	}
	got, err := ReadPod(&pod)
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	for phase, ended := range map[corev1.PodPhase]bool{"": false, corev1.PodPending: false, corev1.PodUnknown: false, corev1.PodSucceeded: true, corev1.PodFailed: true} {
		pod.Status.Phase = phase
		if got, _ := ReadPod(&pod); got.Ended != ended {
			t.Errorf("phase %q: ended %v", phase, got.Ended)
		}
	}
	for annotation, want := range map[string]string{
		"{}":                                   "pod ns/p: annotation k8s.v1.cni.cncf.io/network-status is not a list of networks",
		`[{"name":"a/b","ips":["x"]}]`:         `network a/b: ips has "x"`,
		`[{"name":"a/b","ips":["fe80::1%e"]}]`: `network a/b: ips has "fe80::1%e"`,
	} {
		pod.Annotations[nadv1.NetworkStatusAnnot] = annotation
		if got, err := ReadPod(&pod); err == nil || !strings.Contains(err.Error(), want) || got.Interfaces != nil || got.Name != "p" {
			t.Errorf("%s: %+v, %v", annotation, got, err)
		}
	}
}

func TestReadNetwork(t *testing.T) {
	for value, want := range map[string]Enforcement{"": EnforceMulti, "multi": EnforceMulti, "all": EnforceAll, "none": EnforceNone, "true": EnforceAll} {
		n, err := ReadNetwork(&nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "net", Annotations: map[string]string{NetworkPolicyAnnotation: value}}})
		if n != (Network{Name: "ns/net", Enforcement: want}) || (err != nil) != (value == "true") {
			t.Errorf("%q: %+v, %v", value, n, err)
		}
	}
}

func TestReadExistingConnections(t *testing.T) {
	for value, want := range map[string]bool{"": false, "keep": false, "cut": true, "Keep": true} {
		n, err := ReadNetwork(&nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "net", Annotations: map[string]string{ExistingConnectionsAnnotation: value}}})
		if n != (Network{Name: "ns/net", Cut: want}) || (err != nil) != (value == "Keep") {
			t.Errorf("%q: %+v, %v", value, n, err)
		}
	}
	_, err := ReadNetwork(&nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{ExistingConnectionsAnnotation: "no", NetworkPolicyAnnotation: "yes"}}})
	if err == nil || !strings.Contains(err.Error(), ExistingConnectionsAnnotation) || !strings.Contains(err.Error(), NetworkPolicyAnnotation) {
		t.Errorf("two faults: %v", err)
	}
}

func TestReadNamespace(t *testing.T) {
	n := ReadNamespace(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns", Labels: map[string]string{"a": "b"}, Annotations: map[string]string{IsolationAnnotation: "{}"}}})
	if diff := cmp.Diff(Namespace{"ns", map[string]string{"a": "b"}, "{}"}, n); diff != "" {
		t.Error(diff)
	}
}

func TestMultiNetworkPolicyOfAnotherVersion(t *testing.T) {
	for version, faults := range map[string]int{"v1beta1": 0, "v1beta2": 0, "v1": 1} {
		p, err := ReadMultiNetworkPolicy([]byte(`{"apiVersion":"k8s.cni.cncf.io/` + version + `","kind":"MultiNetworkPolicy","metadata":{"name":"p","namespace":"ns","managedFields":[],"ofLater":1},"spec":{"podSelector":{}},"status":{"conditions":[]}}`))
		if err != nil || len(p.Faults) != faults || p.isolates[Egress] != (faults > 0) {
			t.Errorf("%s: %+v, %v", version, p, err)
		}
	}
}

func FuzzReadMultiNetworkPolicy(f *testing.F) {
	for _, spec := range []string{"{}", `{"podSelector":{"matchLabels":{"a":"b"}},"ingress":[{}]}`, `{"egress":[{"to":[{"ipBlock":{"cidr":"10.0.0.0/8","except":["10.1.0.0/16","10.1.2.0/24"]}}],"ports":[{"port":1,"endPort":5},{"port":"web"}]}]}`} {
		f.Add([]byte(`{"apiVersion":"k8s.cni.cncf.io/v1beta1","metadata":{"name":"p","namespace":"x","annotations":{"k8s.v1.cni.cncf.io/policy-for":"aux, x/net"}},"spec":` + spec + `}`))
	}
	f.Fuzz(func(t *testing.T, object []byte) {
		p, err := ReadMultiNetworkPolicy(object)
		if err != nil {
			return
		}
		if len(p.Faults) > 0 && (len(p.rules[0])+len(p.rules[1]) > 0 || !p.isolates[0] && !p.isolates[1]) {
			t.Fatalf("%q and yet %+v", p.Faults, p)
		}
		if again, err := ReadMultiNetworkPolicy(object); err != nil || len(again.Faults) == 0 && !again.equal(p) {
			t.Fatalf("%+v, and again %+v, %v", p, again, err)
		}
		p.Namespace = "x"
		x := park()
		x.SetPolicy(p)
		for _, c := range x.Flush() {
			wantCanonical(t, c.State.Verdicts)
			if len(p.Faults) > 0 && len(c.State.Verdicts.Peers) > 0 {
				t.Fatalf("%q and yet it allows %+v", p.Faults, c)
			}
		}
	})
}

func FuzzReadNetworkStatus(f *testing.F) {
	f.Add(`[{"name":"a/b","interface":"net1","ips":["10.0.0.1","::ffff:10.0.0.2"],"mac":"02:00:00:00:00:01"}]`)
	f.Add(`[{"name":"cbr0"}]`)
	f.Fuzz(func(t *testing.T, annotation string) {
		interfaces, err := ReadNetworkStatus(annotation)
		for _, i := range interfaces {
			if err != nil || !strings.Contains(i.Network, "/") || slices.ContainsFunc(i.IPs, func(a netip.Addr) bool { return !a.IsValid() || a.Is4In6() || a.Zone() != "" }) {
				t.Fatalf("%+v, %v", i, err)
			}
		}
	})
}

func FuzzIsolation(f *testing.F) {
	for _, s := range []string{"", "{}", `{"ingress":{"isolation":"DefaultDeny"}}`, `{"ingress":{"isolation":"x"}}`, "null"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, annotation string) {
		p := isolation(Namespace{Name: "x", Isolation: annotation})
		if p != nil && (!p.isolates[Ingress] || p.isolates[Egress] || len(p.rules[Ingress]) > 0) {
			t.Fatalf("%+v", p)
		}
		var loose map[string]map[string]any
		if p == nil && json.Unmarshal([]byte(annotation), &loose) == nil && loose["ingress"]["isolation"] == "DefaultDeny" {
			t.Fatalf("%s isolates nothing", annotation)
		}
	})
}
