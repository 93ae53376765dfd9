package server

import (
	"context"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/host"
)

var (
	waitingDesc = prometheus.NewDesc("sluice_cni_calls", "CNI calls that wait for their turn or are worked on.", nil, nil)
	queueDesc   = prometheus.NewDesc("sluice_cni_del_queue", "DELs that the shim left because no agent answered.", nil, nil)
	phaseDesc   = prometheus.NewDesc("sluice_cni_attachments", "Attachments in the journal, by how far they have come.", []string{"phase"}, nil)
	requestDesc = prometheus.NewDesc("sluice_cni_netlink_requests_total",
		"Netlink requests for attachments that hold the kernel's RTNL lock. A normal ADD or DEL of a VF reads no VF list.", []string{"request"}, nil)
)

// metrics are what the server measures by itself.
type metrics struct {
	calls  *prometheus.HistogramVec
	phases *prometheus.HistogramVec
}

func newMetrics() metrics {
	// From a MacVLAN ADD to the longest that a shim waits.
	buckets := prometheus.ExponentialBuckets(0.001, 2.5, 13)
	return metrics{
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "sluice_cni_call_seconds", Help: "Time a CNI call took, by its CNI error code, 0 for none.", Buckets: buckets,
		}, []string{"command", "code"}),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "sluice_cni_phase_seconds", Help: "Time that parts of ADD and DEL took.", Buckets: buckets,
		}, []string{"phase"}),
	}
}

// took notes the end of a phase that began at the given time.
func (m metrics) took(phase string, begin time.Time) {
	m.phases.WithLabelValues(phase).Observe(time.Since(begin).Seconds())
}

func (m metrics) called(command string, begin time.Time, err error) {
	code := uint(0)
	if err != nil {
		code = attach.CNIError(err).Code
	}
	m.calls.WithLabelValues(command, strconv.Itoa(int(code))).Observe(time.Since(begin).Seconds())
}

// Describe implements prometheus.Collector.
func (s *Server) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{waitingDesc, queueDesc, phaseDesc, requestDesc} {
		out <- d
	}
	s.metrics.calls.Describe(out)
	s.metrics.phases.Describe(out)
}

// Collect implements prometheus.Collector.
func (s *Server) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(waitingDesc, float64(s.waiting.Load()))
	queued := 0
	entries, _ := os.ReadDir(s.queue) // not there before the first DEL
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), wire.QueueSuffix) {
			queued++
		}
	}
	gauge(queueDesc, float64(queued))
	phases := s.attacher.Phases()
	for _, p := range []attach.Phase{attach.Intent, attach.Attached, attach.Returned} {
		gauge(phaseDesc, float64(phases[p]), string(p))
	}
	if s.requests != nil {
		r := s.requests()
		for name, n := range map[string]uint64{"VF list": r.VFLists, "set VF": r.VFMessages, "change link": r.LinkMessages} {
			out <- prometheus.MustNewConstMetric(requestDesc, prometheus.CounterValue, float64(n), name)
		}
	}
	s.metrics.calls.Collect(out)
	s.metrics.phases.Collect(out)
}

// timedKernel times the calls of the kernel that may take long.
type timedKernel struct {
	attach.Kernel
	metrics
}

func (k timedKernel) SetVFSettings(ctx context.Context, vf host.VFRef, want host.VFSettings, required host.VFAttrs) error {
	defer k.took("set VF", time.Now())
	return k.Kernel.SetVFSettings(ctx, vf, want, required)
}

func (k timedKernel) ChangeLink(ctx context.Context, from *host.Netns, index int, c host.LinkChange) error {
	defer k.took("change link", time.Now())
	return k.Kernel.ChangeLink(ctx, from, index, c)
}

func (k timedKernel) WaitIPv6(ctx context.Context, ns *host.Netns, index int) error {
	defer k.took("wait for IPv6", time.Now())
	return k.Kernel.WaitIPv6(ctx, ns, index)
}

func (k timedKernel) Probe(ctx context.Context, ns *host.Netns, link string, addresses []net.IPNet, wait time.Duration) (bool, error) {
	defer k.took("probe addresses", time.Now())
	return k.Kernel.Probe(ctx, ns, link, addresses, wait)
}

func (k timedKernel) Announce(ctx context.Context, ns *host.Netns, link string, addresses []net.IPNet) error {
	defer k.took("announce addresses", time.Now())
	return k.Kernel.Announce(ctx, ns, link, addresses)
}

// timedIPAM times the IPAM plugin.
type timedIPAM struct {
	attach.IPAM
	metrics
}

func (i timedIPAM) Exec(ctx context.Context, plugin string, req attach.Request) (*types100.Result, error) {
	defer i.took("IPAM", time.Now())
	return i.IPAM.Exec(ctx, plugin, req)
}

// timed times the calls of the Enforcer that ADD waits for.
type timed struct {
	attach.Enforcer
	metrics
}

func timedEnforcer(e attach.Enforcer, m metrics) attach.Enforcer {
	if e == nil {
		return nil
	}
	return timed{e, m}
}

func (t timed) Definition(ctx context.Context, pod, uid, ifName string) (string, error) {
	defer t.took("read pod", time.Now())
	return t.Enforcer.Definition(ctx, pod, uid, ifName)
}

func (t timed) Deny(ctx context.Context, i attach.Interface, ns *host.Netns) error {
	defer t.took("deny all", time.Now())
	return t.Enforcer.Deny(ctx, i, ns)
}

func (t timed) Enforce(ctx context.Context, i attach.Interface, ns *host.Netns) error {
	defer t.took("enforce policy", time.Now())
	return t.Enforcer.Enforce(ctx, i, ns)
}
