package admission

import (
	"bytes"
	"crypto/x509"
	"strings"
	"testing"
	"time"
)

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

func issued(t *testing.T, now time.Time, name string, trusted []byte) *pair {
	t.Helper()
	p, err := issue(now, name, trusted)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCertificate(t *testing.T) {
	name := "operator-webhook-service.ns.svc"
	p := issued(t, noon, name, nil)
	other := issued(t, noon, name, nil)
	for _, c := range []struct {
		name string
		pair pair
		now  time.Time
		as   string
		want string // empty: it can serve
	}{
		{"as made", *p, noon, name, ""},
		{"by a clock that is behind", *p, noon.Add(-time.Minute), name, ""},
		{"shortly before its renewal", *p, noon.Add(lifetime - renewBefore - time.Second), name, ""},
		{"when it is to be renewed", *p, noon.Add(lifetime - renewBefore), name, "it expires at 2027-01-01T12:00:00Z"},
		{"after it expired", *p, noon.Add(lifetime + time.Second), name, "expired"},
		{"for another name", *p, noon, "operator-webhook-service.other.svc", "not operator-webhook-service.other.svc"},
		{"by another CA", pair{p.cert, p.key, other.ca}, noon, name, "unknown authority"},
		{"with another key", pair{p.cert, other.key, p.ca}, noon, name, "private key does not match"},
		{"without a CA", pair{p.cert, p.key, nil}, noon, name, "ca.crt has no certificate"},
		{"nothing", pair{}, noon, name, "read certificate and key"},
		{"nonsense", pair{[]byte("a"), []byte("b"), []byte("c")}, noon, name, "read certificate and key"},
	} {
		left, err := c.pair.check(c.now, c.as)
		switch {
		case c.want == "" && (err != nil || left != p.expires(t).Add(-renewBefore).Sub(c.now)):
			t.Errorf("%s: %s left, %v", c.name, left, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: the error is %v, want %q", c.name, err, c.want)
		}
	}
}

func (p *pair) expires(t *testing.T) time.Time {
	c, err := p.parse()
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf.NotAfter
}

// While a certificate is exchanged, both it and its successor are trusted.
func TestRenewal(t *testing.T) {
	name := "a.svc"
	old := issued(t, noon, name, nil)
	later := noon.Add(lifetime - renewBefore)
	renewed := issued(t, later, name, old.ca)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(renewed.ca)
	for _, p := range []*pair{old, renewed} {
		c, err := p.parse()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Leaf.Verify(x509.VerifyOptions{DNSName: "a.svc", Roots: roots, CurrentTime: later}); err != nil {
			t.Error(err)
		}
	}
	// What has expired is forgotten, and what is no certificate, and the oldest of many.
	if last := issued(t, noon.Add(lifetime), name, old.ca); bytes.Contains(last.ca, old.ca) {
		t.Error("an expired CA is trusted")
	}
	p := issued(t, noon, name, []byte("nonsense"))
	if n := bytes.Count(p.ca, []byte("BEGIN")); n != 1 {
		t.Errorf("there are %d CAs", n)
	}
	for range 5 {
		p = issued(t, noon, name, p.ca)
	}
	if n := bytes.Count(p.ca, []byte("BEGIN")); n != 3 {
		t.Errorf("there are %d CAs", n)
	}
}
