package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
)

const (
	// The most time a whole generation may take, as a ratio to the tool's for the same rules.
	mostTime = 1.0
	// The least throughput, and pace of requests of 64 bytes, as a ratio to no policy. Of a
	// request's time conntrack alone takes 7 to 8 %.
	leastThroughput, leastRequests = 0.85, 0.72
	// The least with 10,000 peers, as a ratio to 10: it is flat, but for a map that is some
	// levels deeper.
	leastFlat = 0.9
)

// scattered are verdicts with so many peers, no two of them neighbours, and the station's
// address among them.
func scattered(n int, among *station) *policy.Verdicts {
	v := only(&policy.Ports{TCP: []policy.PortRange{{First: 80, Last: 80}}, UDP: []policy.PortRange{{First: 80, Last: 80}}}, among)
	ports := v.Peers[0].Ports
	var others []policy.PeerRange
	for a := netip.MustParseAddr("10.21.0.1"); len(others) < n-len(v.Peers); a = a.Next().Next() {
		others = append(others, policy.PeerRange{First: a, Last: a, Ports: ports})
	}
	v.Peers = slices.Insert(v.Peers, 1, others...)
	return v
}

// BenchmarkFullGeneration takes turns: nft -f and Apply each put the same rules with
// 10,000 peers into an empty namespace.
func BenchmarkFullGeneration(b *testing.B) {
	w := newWorld(b, "a", "b")
	a := w.pods["a"]
	verdicts := scattered(10000, w.pods["b"])
	pod := openPod(b, a)
	i := a.iface()
	i.Index = 0 // one table, which nft reads as it writes it
	apply := func() time.Duration {
		start := time.Now()
		if err := pod.Apply(i, verdicts, openTo, 1); err != nil {
			b.Fatal(err)
		}
		return time.Since(start)
	}
	remove := func() {
		if err := pod.Remove("net1"); err != nil {
			b.Fatal(err)
		}
	}
	apply()
	rules := nft(b, a, "list ruleset")
	if n := strings.Count(rules, " : jump"); n < 10000 {
		b.Fatalf("rules have %d peers", n)
	}
	remove()
	const rounds = 15
	var ours, theirs []time.Duration
	for range rounds {
		ours = append(ours, apply())
		remove()
		if err := a.ns.Do(func() error {
			c := exec.Command("nft", "-f", "-")
			c.Stdin = strings.NewReader(rules)
			start := time.Now()
			out, err := c.CombinedOutput()
			theirs = append(theirs, time.Since(start))
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}); err != nil {
			b.Fatal(err)
		}
		remove()
	}
	own, tool := median(ours), median(theirs)
	ratio := own.Seconds() / tool.Seconds()
	b.ReportMetric(own.Seconds()*1000, "own-ms")
	b.ReportMetric(tool.Seconds()*1000, "nft-ms")
	b.ReportMetric(ratio, "ratio")
	b.ReportMetric(0, "ns/op")
	if ratio > mostTime {
		b.Errorf("a generation takes %.2f of the time of nft -f, more than %.2f", ratio, mostTime)
	}
}

func median[T time.Duration | float64](v []T) T {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// BenchmarkPeers takes turns: throughput and round trips between two MacVLAN pods, each
// pair on a node of its own, without policy; with 10, 1,000 and 10,000 peers allowed in
// both directions, in the pod and on the parent; and with conntrack alone, which is the
// least that stateful policy can cost.
func BenchmarkPeers(b *testing.B) {
	type pair struct {
		from, to    *station
		rate, trips []float64 // each as a ratio to no policy in the same turn
	}
	pairs := map[string]*pair{}
	names := []string{"none", "conntrack", "10", "1000", "10000"}
	for _, name := range names {
		w := newWorld(b, "a", "b")
		a := w.pods["a"]
		pairs[name] = &pair{from: w.pods["b"], to: a}
		if n, err := strconv.Atoi(name); err == nil {
			v := scattered(n, w.pods["b"])
			if err := errors.Join(openPod(b, a).Apply(a.iface(), v, v, 1), openParent(b, w).Apply(a.iface(), v, v, 1)); err != nil {
				b.Fatal(err)
			}
		}
	}
	nft(b, pairs["conntrack"].to, `table inet bare {
	chain input { type filter hook input priority 0; ct state established,new accept; }
	chain output { type filter hook output priority 0; ct state established,new accept; }
}
`)
	const rounds = 41
	for range rounds {
		var rate, trips float64
		for _, name := range names {
			p := pairs[name]
			r, t := p.from.throughput(p.to.v4), p.from.roundTrips(p.to.v4)
			if name == "none" {
				rate, trips = r, t
			}
			p.rate, p.trips = append(p.rate, r/rate), append(p.trips, t/trips)
		}
	}
	for _, of := range []struct {
		what   string
		ratios func(*pair) []float64
		least  float64
	}{
		{"throughput", func(p *pair) []float64 { return p.rate }, leastThroughput},
		{"requests", func(p *pair) []float64 { return p.trips }, leastRequests},
	} {
		for _, name := range names[1:] {
			ratio := median(of.ratios(pairs[name]))
			b.ReportMetric(ratio, of.what+"-"+name)
			if name != "conntrack" && ratio < of.least {
				b.Errorf("%s with %s peers is %.2f of that without policy, less than %.2f", of.what, name, ratio, of.least)
			}
		}
		if flat := median(of.ratios(pairs["10000"])) / median(of.ratios(pairs["10"])); flat < leastFlat {
			b.Errorf("%s with 10,000 peers is %.2f of that with 10, less than %.2f", of.what, flat, leastFlat)
		}
	}
	b.ReportMetric(0, "ns/op")
}

// used is the processor time of this process: both ends, and the packets between them,
// which the kernel handles in the sender's time. What else the machine does is not in it.
func used() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// dial connects to an address's port 80.
func (s *station) dial(network string, to netip.Addr) net.Conn {
	var c net.Conn
	if err := s.ns.Do(func() (err error) {
		c, err = net.DialTimeout(network, netip.AddrPortFrom(to, 80).String(), 10*time.Second)
		return err
	}); err != nil {
		s.world.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	return c
}

// throughput is the bytes in a second of processor time that go to an address and come back.
func (s *station) throughput(to netip.Addr) float64 {
	c := s.dial("tcp", to)
	defer c.Close()
	const size = 24 << 20
	start := used()
	go func() {
		b := make([]byte, 1<<16)
		for sent := 0; sent < size; sent += len(b) {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}()
	b := make([]byte, 1<<16)
	for got := 0; got < size; {
		n, err := c.Read(b)
		if err != nil {
			s.world.Fatal(err)
		}
		got += n
	}
	return size / (used() - start).Seconds()
}

// roundTrips is the requests in a second of processor time, one after the other.
func (s *station) roundTrips(to netip.Addr) float64 {
	c := s.dial("udp", to)
	defer c.Close()
	const requests = 1500
	b := make([]byte, 64)
	start := used()
	for range requests {
		if _, err := c.Write(b); err != nil {
			s.world.Fatal(err)
		}
		if _, err := c.Read(b); err != nil {
			s.world.Fatal(err)
		}
	}
	return requests / (used() - start).Seconds()
}
