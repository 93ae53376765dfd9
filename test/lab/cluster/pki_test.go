package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"slices"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
)

func TestIssuedCertificatesAreTrustedByTheirAuthorityOnly(t *testing.T) {
	now := time.Now()
	authority, err := NewAuthority(now)
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewAuthority(now)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.Issue(Subject{Name: "system:node:vm1", Groups: []string{"system:nodes"}, Hosts: []string{"vm1", "172.30.0.11"}}, now)
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := tls.X509KeyPair(pair.Cert, pair.Key)
	if err != nil {
		t.Fatalf("certificate and key do not belong together: %v", err)
	}
	cert := loaded.Leaf
	if cert.Subject.CommonName != "system:node:vm1" || !slices.Equal(cert.Subject.Organization, []string{"system:nodes"}) {
		t.Errorf("subject is %s", cert.Subject)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		for _, host := range []string{"vm1", "172.30.0.11"} {
			options := x509.VerifyOptions{Roots: pool(authority), DNSName: host, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}
			if _, err := cert.Verify(options); err != nil {
				t.Errorf("as %v for %s: %v", usage, host, err)
			}
		}
	}
	for name, options := range map[string]x509.VerifyOptions{
		"another authority":  {Roots: pool(other), CurrentTime: now},
		"another host":       {Roots: pool(authority), CurrentTime: now, DNSName: "vm2"},
		"after its validity": {Roots: pool(authority), CurrentTime: now.Add(validity + time.Hour)},
	} {
		if _, err := cert.Verify(options); err == nil {
			t.Errorf("%s: certificate is accepted", name)
		}
	}
}

func pool(a *Authority) *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

func TestKubeconfigCarriesServerAndCredentials(t *testing.T) {
	authority, err := NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.Issue(Subject{Name: "admin"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	content, err := Kubeconfig(netip.MustParseAddrPort("127.0.0.1:12345"), authority.PEM, pair)
	if err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.RESTConfigFromKubeConfig(content)
	if err != nil {
		t.Fatal(err)
	}
	if config.Host != "https://127.0.0.1:12345" {
		t.Errorf("server is %s", config.Host)
	}
	if string(config.CAData) != string(authority.PEM) || string(config.CertData) != string(pair.Cert) || string(config.KeyData) != string(pair.Key) {
		t.Error("authority, certificate or key got lost")
	}
}
