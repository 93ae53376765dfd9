package server

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/durable"
	"github.com/sluice-network/sluice/internal/host"
)

func TestMetrics(t *testing.T) {
	dir := t.TempDir()
	s := serve(t, dir, noVFs{})
	s.requests = func() host.Requests { return host.Requests{LinkMessages: 7} }
	for _, command := range []string{"ADD", "STATUS"} {
		if _, err := call(filepath.Join(dir, "cni.sock"), wire.Request{Command: command, ContainerID: "c", IfName: "net1", Netns: "/proc/self/ns/net", Stdin: conf("", "")}); err != nil {
			t.Fatal(err)
		}
	}
	// One that cannot be read stays in the queue.
	if err := durable.WriteFile(filepath.Join(dir, "del-queue", "x"+wire.QueueSuffix), []byte("torn")); err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(s)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, f := range families {
		for _, m := range f.GetMetric() {
			line := f.GetName()
			for _, l := range m.GetLabel() {
				line += " " + l.GetName() + "=" + l.GetValue()
			}
			all = append(all, line)
			if name := f.GetName(); name == "sluice_cni_del_queue" && m.GetGauge().GetValue() != 1 || strings.HasSuffix(line, "change link") && m.GetCounter().GetValue() != 7 {
				t.Errorf("%s is %v", line, m)
			}
		}
	}
	for _, want := range []string{
		"sluice_cni_call_seconds code=7 command=ADD", "sluice_cni_call_seconds code=0 command=STATUS", "sluice_cni_calls", "sluice_cni_del_queue",
		"sluice_cni_attachments phase=attached", "sluice_cni_netlink_requests_total request=VF list", "sluice_cni_netlink_requests_total request=change link",
	} {
		if !slices.Contains(all, want) {
			t.Errorf("%s is missing in %q", want, all)
		}
	}
}
