package node

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"k8s.io/client-go/rest"
)

// APIServer is the Lifeline to a real one.
type APIServer struct {
	url    string
	host   string
	nodeIP net.IP
	client *http.Client
}

// NewAPIServer returns the Lifeline to the API server of the configuration. The
// node's own address, which may be empty, tells the link by which the API server
// reaches the node, and to which a service address leads in the end.
func NewAPIServer(config *rest.Config, nodeIP string) (*APIServer, error) {
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("find the API server: %w", err)
	}
	tls, err := rest.TLSConfigFor(config)
	if err != nil {
		return nil, fmt.Errorf("find the API server: %w", err)
	}
	const patience = 3 * time.Second
	return &APIServer{
		url: (&url.URL{Scheme: base.Scheme, Host: base.Host, Path: "/readyz"}).String(), host: base.Hostname(), nodeIP: net.ParseIP(nodeIP),
		// A connection that is open already outlives a link that does not come back.
		client: &http.Client{Timeout: patience, Transport: &http.Transport{TLSClientConfig: tls, DisableKeepAlives: true, Proxy: config.Proxy}},
	}, nil
}

// Addresses implements Lifeline.
func (s *APIServer) Addresses(ctx context.Context) ([]net.IP, error) {
	var all []net.IP
	if s.nodeIP != nil {
		all = append(all, s.nodeIP)
	}
	if ip := net.ParseIP(s.host); ip != nil {
		return append(all, ip), nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	found, err := net.DefaultResolver.LookupIP(ctx, "ip", s.host)
	if err != nil {
		return nil, fmt.Errorf("look up the API server: %w", err)
	}
	return append(all, found...), nil
}

// Reach implements Lifeline. An answer that is a refusal is an answer, too.
func (s *APIServer) Reach(ctx context.Context) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, http.NoBody)
	if err != nil {
		return err
	}
	answer, err := s.client.Do(request)
	if err != nil {
		return fmt.Errorf("reach the API server: %w", err)
	}
	return answer.Body.Close()
}
