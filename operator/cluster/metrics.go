package cluster

import (
	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
)

var (
	// renders counts how often a node's spec was computed, and whether that changed it.
	renders = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sluice_node_renders_total", Help: "Computations of a node's spec, by result: written, unchanged.",
	}, []string{"result"})
	// evictions counts what became of evictions.
	evictions = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sluice_evictions_total", Help: "Evictions of pods that were in the way of a change, by result: evicted, refused.",
	}, []string{"result"})
)

func init() { metrics.Registry.MustRegister(renders, evictions) }
