package deviceplugin

import "github.com/prometheus/client_golang/prometheus"

var (
	devicesDesc = prometheus.NewDesc("sluice_deviceplugin_devices",
		"Devices offered to the kubelet.", []string{"resource", "health"}, nil)
	registeredDesc = prometheus.NewDesc("sluice_deviceplugin_registered",
		"1 when the resource is registered with the kubelet and its socket is served.", []string{"resource"}, nil)
)

// Describe implements prometheus.Collector.
func (m *Manager) Describe(out chan<- *prometheus.Desc) {
	out <- devicesDesc
	out <- registeredDesc
}

// Collect implements prometheus.Collector.
func (m *Manager) Collect(out chan<- prometheus.Metric) {
	for _, s := range m.Status() {
		registered := 0.0
		if s.Err == nil {
			registered = 1
		}
		gauge := func(desc *prometheus.Desc, v float64, labels ...string) {
			out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, v, labels...)
		}
		gauge(devicesDesc, float64(s.Healthy), s.Resource, "healthy")
		gauge(devicesDesc, float64(s.Devices-s.Healthy), s.Resource, "unhealthy")
		gauge(registeredDesc, registered, s.Resource)
	}
}
