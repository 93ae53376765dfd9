package admission

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// A certificate lasts a year and is renewed when a third of that is left, so that an
// operator that was switched off for months finds it valid still.
const (
	lifetime    = 365 * 24 * time.Hour
	renewBefore = lifetime / 3
	skew        = time.Hour // that clocks of API servers may be behind
)

// pair is a serving certificate as it is kept in a Secret, all in PEM.
type pair struct {
	cert, key []byte
	ca        []byte // whom clients shall trust: the CA of cert, and those before it
}

// issue makes a certificate for a DNS name by a CA of its own. The CA's key is forgotten:
// nobody, who reads the Secret either, can make another certificate that the API server
// would trust. Clients shall go on to trust the CAs of trusted, which may be empty, while
// they are valid.
func issue(now time.Time, name string, trusted []byte) (*pair, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a CA key: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	ca := &x509.Certificate{
		Subject:   pkix.Name{CommonName: "sluice-webhook-ca"},
		NotBefore: now.Add(-skew), NotAfter: now.Add(lifetime),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return nil, fmt.Errorf("make a CA certificate: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	if err != nil {
		return nil, fmt.Errorf("make a certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode a key: %w", err)
	}
	p := &pair{
		cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
		ca:   append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}), stillValid(trusted, now)...),
	}
	return p, nil
}

// stillValid gives the newest of the certificates that have not expired.
func stillValid(bundle []byte, now time.Time) []byte {
	const most = 2 // renewals overlap once, unless the clock jumps
	var kept []byte
	n := 0
	for block, rest := pem.Decode(bundle); block != nil && n < most; block, rest = pem.Decode(rest) {
		if c, err := x509.ParseCertificate(block.Bytes); err == nil && now.Before(c.NotAfter) {
			kept = append(kept, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
			n++
		}
	}
	return kept
}

// check says why the certificate cannot serve under the name, to clients that trust its
// bundle, and if it can, how long until it shall be renewed.
func (p *pair) check(now time.Time, name string) (time.Duration, error) {
	c, err := p.parse()
	if err != nil {
		return 0, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(p.ca) {
		return 0, errors.New("ca.crt has no certificate")
	}
	if _, err := c.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, CurrentTime: now}); err != nil {
		return 0, fmt.Errorf("certificate: %w", err)
	}
	left := c.Leaf.NotAfter.Sub(now) - renewBefore
	if left <= 0 {
		return 0, fmt.Errorf("certificate: it expires at %s", c.Leaf.NotAfter.Format(time.RFC3339))
	}
	return left, nil
}

func (p *pair) parse() (*tls.Certificate, error) {
	c, err := tls.X509KeyPair(p.cert, p.key)
	if err != nil {
		return nil, fmt.Errorf("read certificate and key: %w", err)
	}
	return &c, nil
}
