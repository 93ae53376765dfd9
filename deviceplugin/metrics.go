package deviceplugin

import "github.com/prometheus/client_golang/prometheus"

var (
	devicesDesc = prometheus.NewDesc("sluice_deviceplugin_devices",
		"Devices offered to the kubelet.", []string{"resource", "health"}, nil)
	registeredDesc = prometheus.NewDesc("sluice_deviceplugin_registered",
		"1 when the resource is registered with the kubelet and its socket is served.", []string{"resource"}, nil)
	phaseDesc = prometheus.NewDesc("sluice_device_phase",
		"1 for the phase of the device's life: Configured, Advertised, Allocated, Attached or Returned. pod has it.",
		[]string{"resource", "device", "phase", "pod"}, nil)
	generationDesc = prometheus.NewDesc("sluice_device_generation",
		"Generation of the hand that the device is in; greater than those of all hands before on the node, 0 for none.",
		[]string{"resource", "device"}, nil)
)

// Describe implements prometheus.Collector.
func (m *Manager) Describe(out chan<- *prometheus.Desc) {
	out <- devicesDesc
	out <- registeredDesc
	out <- phaseDesc
	out <- generationDesc
}

// Collect implements prometheus.Collector.
func (m *Manager) Collect(out chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, v, labels...)
	}
	for _, s := range m.Status() {
		registered := 0.0
		if s.Err == nil {
			registered = 1
		}
		gauge(devicesDesc, float64(s.Healthy), s.Resource, "healthy")
		gauge(devicesDesc, float64(s.Devices-s.Healthy), s.Resource, "unhealthy")
		gauge(registeredDesc, registered, s.Resource)
		for _, l := range s.list {
			r := m.opts.Ledger.record(l.id, l.healthy)
			gauge(phaseDesc, 1, s.Resource, l.id, string(r.phase), r.pod)
			gauge(generationDesc, float64(r.generation), s.Resource, l.id)
		}
	}
}
