package admission

import (
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
)

// Server serves the webhook over TLS. Certificates are exchanged while it runs.
type Server struct {
	webhook.Server
	// Settle is how long a new certificate waits before it is served in place of one that
	// is still valid: until every API server knows of its CA. It is 10 s unless set.
	Settle  time.Duration
	certDir string
	mounted bool
	current atomic.Pointer[tls.Certificate]
}

// NewServer makes a server for a port of all addresses. When certDir has tls.crt and
// tls.key, mounted by whoever installed the operator, they are served, and read again when
// they change; else the Secret's are.
func NewServer(port int, certDir string) (*Server, error) {
	s := &Server{Settle: 10 * time.Second, certDir: certDir}
	_, err := os.Stat(filepath.Join(certDir, corev1.TLSCertKey))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("look for a mounted certificate: %w", err)
	}
	s.mounted = err == nil
	s.Server = webhook.NewServer(webhook.Options{Port: port, CertDir: certDir, TLSOpts: []func(*tls.Config){func(c *tls.Config) {
		// HTTP/2 lets one client hold many streams open, and the API server needs few.
		c.NextProtos = []string{"http/1.1"}
		c.MinVersion = tls.VersionTLS12
		if !s.mounted {
			c.GetCertificate = s.certificate
		}
	}}})
	return s, nil
}

func (s *Server) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if c := s.current.Load(); c != nil {
		return c, nil
	}
	return nil, errors.New("no certificate yet: the Secret " + SecretName + " is made once the webhook is turned on")
}

// load begins to serve the Secret's certificate. One that cannot be read is left: the
// Configuration mends the Secret.
func (s *Server) load(secret *corev1.Secret) {
	c, err := pairOf(secret).parse()
	if err != nil {
		return
	}
	if now := s.current.Load(); now != nil && time.Now().Before(now.Leaf.NotAfter) {
		time.AfterFunc(s.Settle, func() { s.current.Store(c) })
		return
	}
	s.current.Store(c)
}

// mountedCA is whom clients of a mounted certificate shall trust; empty when whoever
// mounted it tells them.
func (s *Server) mountedCA() ([]byte, error) {
	ca, err := os.ReadFile(filepath.Join(s.certDir, corev1.ServiceAccountRootCAKey))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read the mounted certificate's CA: %w", err)
	}
	return ca, nil
}
