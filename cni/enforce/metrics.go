package enforce

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/cni/enforce/nft"
	"github.com/sluice-network/sluice/cni/policy"
)

var interfacesDesc = prometheus.NewDesc("sluice_policy_interfaces",
	"Interfaces and directions that a network policy isolates, by who filters them, and whether there is a problem.", []string{"engine", "direction", "problem"}, nil)

var droppedDesc = prometheus.NewDesc("sluice_policy_interface_dropped_packets_total",
	"Packets that an interface's rules dropped; spoofed are those that it must not send, whatever policy says.", []string{"namespace", "pod", "interface", "direction", "reason"}, nil)

var rulesDesc = prometheus.NewDesc("sluice_policy_rules", "Rules in the kernel, by who filters.", []string{"engine"}, nil)

var elementsDesc = prometheus.NewDesc("sluice_policy_elements", "Addresses in the sets and maps of the rules in the kernel, by who filters.", []string{"engine"}, nil)

type metrics struct {
	latency  prometheus.Histogram
	applies  *prometheus.CounterVec
	tampered prometheus.Counter

	hits, dropped *prometheus.CounterVec
	policies      map[string]struct{} // that have any; guarded by the Enforcer's mu

	refused     prometheus.Counter
	differences prometheus.Counter
}

func newMetrics() metrics {
	return metrics{
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "sluice_policy_enforce_seconds", Help: "Time from an event of the API server to its rules in force.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2.5, 12),
		}),
		applies: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_policy_generations_total", Help: "Generations of rules made, by whether the kernel took them.",
		}, []string{"result"}),
		tampered: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_policy_tampered_total", Help: "Changes of rules by somebody else.",
		}),
		policies: map[string]struct{}{},
		hits: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_policy_hits_total", Help: "Packets that began a connection, which passed because the policy allows it; one that several allow counts for each of them.",
		}, []string{"policy", "direction"}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_policy_dropped_packets_total", Help: "Packets dropped where the policy isolates an interface; one that several isolate counts for each of them.",
		}, []string{"policy", "direction"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_policy_refused_total", Help: "Interfaces that pods did not get, because a policy could not be enforced on them.",
		}),
		differences: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sluice_policy_audit_differences_total", Help: "Interfaces and directions for which policy had been worked out wrongly.",
		}),
	}
}

// applied notes the end of a generation that an event at the given time asked for, or an
// attachment, if that is zero.
func (m metrics) applied(err error, since time.Time) {
	if err != nil {
		m.applies.WithLabelValues("failed").Inc()
		return
	}
	m.applies.WithLabelValues("in force").Inc()
	if !since.IsZero() {
		m.latency.Observe(time.Since(since).Seconds())
	}
}

// count reads what the interface's rules counted since it was read last, for the policies
// that isolate it. f.work is held.
func (e *Enforcer) count(f *face, i attach.Interface) {
	now, err := e.Engine.Counted(i)
	if err != nil {
		e.Log.V(1).Info("Cannot read what the rules of policy have counted", "pod", i.Pod, "interface", i.IfName, "error", err)
		return
	}
	more := func(before, now uint64) float64 {
		if now < before { // the rules were made anew
			before = 0
		}
		return float64(now - before)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for d, s := range []struct {
		of          *DirectionStatus
		before, now uint64
	}{policy.Ingress: {f.status.Ingress, f.counted.Ingress, now.Ingress}, policy.Egress: {f.status.Egress, f.counted.Egress, now.Egress}} {
		if s.of == nil {
			continue
		}
		d := policy.Direction(d)
		for _, p := range s.of.Policies {
			e.metrics.policies[p] = struct{}{}
			e.metrics.dropped.WithLabelValues(p, d.String()).Add(more(s.before, s.now))
			counter := nft.HitsCounter(d, p)
			e.metrics.hits.WithLabelValues(p, d.String()).Add(more(f.counted.Hits[counter], now.Hits[counter]))
		}
	}
	f.counted = now
}

// forget leaves out what was counted for policies that are no more.
func (e *Enforcer) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for p := range e.metrics.policies {
		if !e.index.Has(p) {
			delete(e.metrics.policies, p)
			e.metrics.hits.DeletePartialMatch(prometheus.Labels{"policy": p})
			e.metrics.dropped.DeletePartialMatch(prometheus.Labels{"policy": p})
		}
	}
}

// Describe implements prometheus.Collector.
func (e *Enforcer) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{interfacesDesc, droppedDesc, rulesDesc, elementsDesc} {
		out <- d
	}
	for _, c := range e.metrics.all() {
		c.Describe(out)
	}
}

func (m metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.latency, m.applies, m.tampered, m.hits, m.dropped, m.refused, m.differences}
}

// Collect implements prometheus.Collector.
func (e *Enforcer) Collect(out chan<- prometheus.Metric) {
	n := map[[3]string]int{}
	e.mu.Lock()
	faces := slices.Collect(maps.Values(e.faces))
	for _, f := range faces {
		for name, d := range map[string]*DirectionStatus{"ingress": f.status.Ingress, "egress": f.status.Egress} {
			if d != nil && len(d.Policies) > 0 {
				problem := "no"
				if d.Problem != "" {
					problem = "yes"
				}
				n[[3]string{d.Engine, name, problem}]++
			}
		}
	}
	e.mu.Unlock()
	for labels, count := range n {
		out <- prometheus.MustNewConstMetric(interfacesDesc, prometheus.GaugeValue, float64(count), labels[:]...)
	}
	for _, f := range faces {
		e.collectCounted(f, out)
	}
	e.forget()
	for engine, size := range e.Engine.Sizes() {
		out <- prometheus.MustNewConstMetric(rulesDesc, prometheus.GaugeValue, float64(size.Rules), engine)
		out <- prometheus.MustNewConstMetric(elementsDesc, prometheus.GaugeValue, float64(size.Elements), engine)
	}
	for _, c := range e.metrics.all() {
		c.Collect(out)
	}
}

// collectCounted tells what an interface's rules counted. One that is being worked on is
// told of next time.
func (e *Enforcer) collectCounted(f *face, out chan<- prometheus.Metric) {
	if !f.work.TryLock() {
		return
	}
	defer f.work.Unlock()
	e.mu.Lock()
	i := f.Interface
	e.mu.Unlock()
	if !f.rules || f.loaded {
		return
	}
	e.count(f, i)
	namespace, name, _ := strings.Cut(i.Pod, "/")
	for _, d := range []struct {
		direction, reason string
		n                 uint64
	}{{"ingress", "policy", f.counted.Ingress}, {"egress", "policy", f.counted.Egress}, {"egress", "spoofed", f.counted.Spoofed}} {
		out <- prometheus.MustNewConstMetric(droppedDesc, prometheus.CounterValue, float64(d.n), namespace, name, i.IfName, d.direction, d.reason)
	}
}
