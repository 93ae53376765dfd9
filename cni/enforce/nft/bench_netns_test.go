package nft

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
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
	// The least of no policy's throughput and requests of 64 bytes, per processor time, and
	// latency of these, which is its time by theirs.
	leastThroughput, leastRequests, leastLatency = 0.80, 0.75, 0.80
	// The least with 10,000 peers, as a ratio to 10.
	leastFlat = 0.93
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

// BenchmarkPeers takes turns: throughput and round trips between two MacVLAN pods without
// policy; with 10, 1,000 and 10,000 peers allowed in both directions, in the pod and on the
// parent, and with 10,000 where what is no longer allowed is cut; and with conntrack alone,
// which is the least that stateful policy can cost. All are the same two pods: others do up
// to a tenth more or less. They are on one processor: how work falls on two makes a
// difference of a fifth.
func BenchmarkPeers(b *testing.B) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	w := newWorld(b, "a", "b")
	from, to := w.pods["b"], w.pods["a"]
	pod, parent := openPod(b, to), openParent(b, w)
	peers := func(n int, cut bool) (put, remove func()) {
		v, i := scattered(n, from), to.iface()
		i.Cut = cut
		return func() {
				if err := errors.Join(pod.Apply(i, v, v, 1), parent.Apply(i, v, v, 1)); err != nil {
					b.Fatal(err)
				}
			}, func() {
				if err := errors.Join(pod.Remove(i.Name), parent.Remove(i.MAC)); err != nil {
					b.Fatal(err)
				}
			}
	}
	type setup struct {
		name        string
		put, remove func()
		ratios      map[string][]float64 // to no policy in the same turn
	}
	setups := []setup{{name: "none", put: func() {}, remove: func() {}}, {
		name: "conntrack",
		put: func() {
			nft(b, to, `table inet bare {
	chain input { type filter hook input priority 0; ct state established,new accept; }
	chain output { type filter hook output priority 0; ct state established,new accept; }
}
`)
		},
		remove: func() { nft(b, to, "delete table inet bare") },
	}}
	for _, n := range []int{10, 1000, 10000} {
		put, remove := peers(n, false)
		setups = append(setups, setup{name: strconv.Itoa(n), put: put, remove: remove})
	}
	put, remove := peers(10000, true)
	setups = append(setups, setup{name: "10000-cut", put: put, remove: remove})
	for i := range setups {
		setups[i].ratios = map[string][]float64{}
	}
	const rounds = 41
	const settling = 50 * time.Millisecond // the kernel frees what was removed
	for range rounds {
		took := make([]map[string]float64, len(setups))
		for _, n := range rand.Perm(len(setups)) { // none comes after each of the others
			setups[n].put()
			time.Sleep(settling)
			requests, latency := from.roundTrips(to.v4)
			var rate float64
			for range 4 { // what else the machine does only makes it slower
				rate = max(rate, from.throughput(to.v4))
			}
			took[n] = map[string]float64{"throughput": 1 / rate, "requests": 1 / requests, "latency": latency.Seconds()}
			setups[n].remove()
		}
		for n, s := range setups {
			for what, t := range took[n] {
				s.ratios[what] = append(s.ratios[what], took[0][what]/t)
			}
		}
	}
	for what, least := range map[string]float64{"throughput": leastThroughput, "requests": leastRequests, "latency": leastLatency} {
		ratio := map[string]float64{}
		for _, s := range setups[1:] {
			ratio[s.name] = median(s.ratios[what])
			b.ReportMetric(ratio[s.name], what+"-"+s.name)
		}
		for _, n := range []string{"10", "1000", "10000"} {
			if ratio[n] < least {
				b.Errorf("%s with %s peers is %.2f of that without policy, less than %.2f", what, n, ratio[n], least)
			}
		}
		if flat := ratio["10000"] / ratio["10"]; flat < leastFlat {
			b.Errorf("%s with 10,000 peers is %.2f of that with 10, less than %.2f", what, flat, leastFlat)
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
	const size = 16 << 20
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

// roundTrips is the requests of 64 bytes, one after the other, in a second of processor
// time, and the median of how long one takes.
func (s *station) roundTrips(to netip.Addr) (requests float64, latency time.Duration) {
	c := s.dial("udp", to)
	defer c.Close()
	took := make([]time.Duration, 1500)
	b := make([]byte, 64)
	start := used()
	for i := range took {
		sent := time.Now()
		if _, err := c.Write(b); err != nil {
			s.world.Fatal(err)
		}
		if _, err := c.Read(b); err != nil {
			s.world.Fatal(err)
		}
		took[i] = time.Since(sent)
	}
	return float64(len(took)) / (used() - start).Seconds(), median(took)
}
