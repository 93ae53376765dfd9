package main

import (
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestHandler(t *testing.T) {
	var missing error
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "some_gauge"}))
	h := handler([]check{{"kubelet", func() error { return missing }}, {"other", func() error { return nil }}}, registry)
	get := func(path string, code int, want string) {
		t.Helper()
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest("GET", path, nil))
		if rec.Code != code || !strings.Contains(rec.Body.String(), want) {
			t.Errorf("%s: %d %q, want %d %q", path, rec.Code, rec.Body, code, want)
		}
	}
	get("/healthz", 200, "ok")
	get("/readyz", 200, "ok")
	get("/metrics", 200, "some_gauge 0")
	missing = errors.New("not registered")
	get("/healthz", 200, "ok")
	get("/readyz", 503, "kubelet: not registered")
}
