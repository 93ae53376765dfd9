package enforce

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var interfacesDesc = prometheus.NewDesc("sluice_policy_interfaces",
	"Interfaces and directions that a network policy isolates, by who filters them, and whether there is a problem.", []string{"engine", "direction", "problem"}, nil)

type metrics struct {
	latency  prometheus.Histogram
	applies  *prometheus.CounterVec
	tampered prometheus.Counter
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

// Describe implements prometheus.Collector.
func (e *Enforcer) Describe(out chan<- *prometheus.Desc) {
	out <- interfacesDesc
	e.metrics.latency.Describe(out)
	e.metrics.applies.Describe(out)
	e.metrics.tampered.Describe(out)
}

// Collect implements prometheus.Collector.
func (e *Enforcer) Collect(out chan<- prometheus.Metric) {
	n := map[[3]string]int{}
	e.mu.Lock()
	for _, f := range e.faces {
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
	e.metrics.latency.Collect(out)
	e.metrics.applies.Collect(out)
	e.metrics.tampered.Collect(out)
}
