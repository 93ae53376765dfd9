package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// check is one thing that must be so for the agent to be ready.
type check struct {
	name string
	ok   func() error
}

// handler serves /healthz, /readyz and /metrics. The process is healthy when it
// answers; what it waits for (the kubelet, the API server) is a matter of
// readiness: a restart would not bring it sooner.
func handler(checks []check, metrics prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		errs := make([]string, 0, len(checks))
		for _, c := range checks {
			if err := c.ok(); err != nil {
				errs = append(errs, c.name+": "+err.Error())
			}
		}
		if len(errs) == 0 {
			fmt.Fprintln(w, "ok")
			return
		}
		slices.Sort(errs)
		w.WriteHeader(http.StatusServiceUnavailable)
		for _, e := range errs {
			fmt.Fprintln(w, e)
		}
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	return mux
}

// serveHTTP serves until ctx ends.
func serveHTTP(ctx context.Context, address string, h http.Handler) error {
	s := &http.Server{Addr: address, Handler: h, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stop()
	if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve health and metrics on %s (--listen): %w", address, err)
	}
	return nil
}
