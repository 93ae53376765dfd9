package nft

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/cni/policy"
)

const (
	// The most time a whole generation may take, as a ratio to the tool's for the same rules.
	mostTime = 1.0
	// The least of no policy's speed, for two processes on two processors, and on one.
	leastOnTwo, leastOnOne = 0.90, 0.88
	// The least of the speed without any rules.
	leastOfNoRules = 0.80
	// The least with 10,000 peers, as a ratio to 10.
	leastFlat = 0.93
	// How far apart the ends may be between which such a ratio surely is, or nobody knows.
	mostUnsure = 0.2
)

// scattered are verdicts with so many peers, no two of them neighbours, and the station's
// address among them.
func scattered(n int, among *station) *policy.Verdicts {
	v := only(&policy.Ports{TCP: []policy.PortRange{{First: port, Last: port}}, UDP: []policy.PortRange{{First: port, Last: port}}}, among)
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

// tenth is what a tenth of the values are less than.
func tenth(v []float64) float64 {
	return slices.Sorted(slices.Values(v))[len(v)/10]
}

// sure returns an estimate from two series of turns, and between what it is in 95 of 100
// series that are drawn from them.
func sure(a, b []float64, estimate func(a, b []float64) float64) (value, from, till float64) {
	const draws = 1000
	estimates := make([]float64, draws)
	x, y := make([]float64, len(a)), make([]float64, len(a))
	for i := range estimates {
		for j := range x {
			n := rand.IntN(len(a))
			x[j], y[j] = a[n], b[n]
		}
		estimates[i] = estimate(x, y)
	}
	slices.Sort(estimates)
	return estimate(a, b), estimates[draws*25/1000], estimates[draws*975/1000]
}

// TestMain makes the test program the two ends of BenchmarkPeers, too.
func TestMain(m *testing.M) {
	end := map[string]func(netip.Addr) error{"answer": answer, "ask": ask, "keep awake": keepAwake}[os.Getenv("SLUICE_TEST_END")]
	if end == nil {
		os.Exit(m.Run())
	}
	address, _ := netip.ParseAddr(os.Getenv("SLUICE_TEST_ADDRESS"))
	if err := end(address); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// BenchmarkPeers takes turns: how fast two processes in two MacVLAN pods of one parent are,
// which answer each other on one processor, and on two that do not sleep meanwhile. No
// policy is an interface that none isolates, on a network that has some; with 10, 1,000 and
// 10,000 peers it is isolated in both directions, in the pod and on the parent; and so with
// 10,000 where what is no longer allowed is cut. Without any rules, and with conntrack alone,
// is what stateful policy can cost at least. All are the same two pods: others do up to a
// tenth more or less.
func BenchmarkPeers(b *testing.B) {
	w := newWorld(b, "a", "b")
	for _, processors := range [][2]int{{0, 0}, {0, 1}} {
		b.Run(fmt.Sprintf("processors=%d", 1+processors[1]), func(b *testing.B) { benchmarkPeers(b, w, processors) })
	}
}

func benchmarkPeers(b *testing.B, w *world, processors [2]int) {
	if processors[1] >= runtime.NumCPU() {
		b.Fatal("needs two processors")
	}
	from, to := w.pods["b"], w.pods["a"]
	pod, parent := openPod(b, to), openParent(b, w)
	apply := func(v *policy.Verdicts, cut bool) (put, remove func()) {
		i := to.iface()
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
	// Between two, turns differ by where the processors happen to be: what one turn has said
	// is compared. On one they differ by what else the machine does, which the fastest lack.
	least, speed := leastOnTwo, func(of, to []float64) float64 {
		ratios := slices.Clone(to)
		for i := range ratios {
			ratios[i] /= of[i]
		}
		return median(ratios)
	}
	if processors[0] == processors[1] {
		least, speed = leastOnOne, func(of, to []float64) float64 { return tenth(to) / tenth(of) }
	}
	type setup struct {
		name        string
		put, remove func()
		least       float64              // of the speed with no policy
		took        map[string][]float64 // seconds in each turn, by what was asked
	}
	setups := []setup{{name: "none"}, {name: "no-rules", put: func() {}, remove: func() {}}, {
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
	setups[0].put, setups[0].remove = apply(openTo, false)
	for _, n := range []int{10, 1000, 10000} {
		put, remove := apply(scattered(n, from), false)
		setups = append(setups, setup{name: strconv.Itoa(n), put: put, remove: remove, least: least})
	}
	put, remove := apply(scattered(10000, from), true)
	setups = append(setups, setup{name: "10000-cut", put: put, remove: remove})
	for i := range setups {
		setups[i].took = map[string][]float64{}
	}
	if processors[0] != processors[1] { // else it is measured how long one takes to wake
		for _, cpu := range processors {
			from.end(b, "keep awake", cpu, to.v4)
		}
	}
	to.end(b, "answer", processors[1], to.v4)
	asker := from.end(b, "ask", processors[0], to.v4)
	const rounds = 41
	const settling = 50 * time.Millisecond // the kernel frees what was removed
	for range rounds {
		for _, n := range rand.Perm(len(setups)) { // none comes after each of the others
			setups[n].put()
			time.Sleep(settling)
			for _, what := range []string{"latency", "throughput"} {
				setups[n].took[what] = append(setups[n].took[what], asker(what))
			}
			setups[n].remove()
		}
	}
	for _, what := range []string{"latency", "throughput"} {
		judge := func(of, to setup, least float64) float64 {
			ratio, from, till := sure(of.took[what], to.took[what], speed)
			switch {
			case least == 0:
			case till < least:
				b.Errorf("%s with %s is %.2f (%.2f to %.2f) of that with %s, less than %.2f", what, of.name, ratio, from, till, to.name, least)
			case till-from > mostUnsure:
				b.Errorf("%s with %s is between %.2f and %.2f of that with %s: this machine has too much else to do to tell", what, of.name, from, till, to.name)
			}
			return ratio
		}
		none, bare, few, many := setups[0], setups[1], setups[3], setups[5]
		for _, s := range setups[1:] {
			b.ReportMetric(judge(s, none, s.least), what+"-"+s.name)
		}
		judge(many, few, leastFlat)
		judge(few, bare, leastOfNoRules)
	}
	b.ReportMetric(0, "ns/op")
}

// end starts an end of the benchmark in the station, on a processor. What it returns asks it
// how many seconds something takes.
func (s *station) end(t testing.TB, name string, processor int, address netip.Addr) func(what string) float64 {
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), "SLUICE_TEST_END="+name, "SLUICE_TEST_ADDRESS="+address.String())
	c.Stderr = os.Stderr
	in, out := must(c.StdinPipe()), bufio.NewScanner(must(c.StdoutPipe()))
	if err := s.ns.Do(func() error {
		var before, set unix.CPUSet
		if err := unix.SchedGetaffinity(0, &before); err != nil {
			return err
		}
		set.Set(processor)
		if err := unix.SchedSetaffinity(0, &set); err != nil { // which it inherits
			return err
		}
		return errors.Join(c.Start(), unix.SchedSetaffinity(0, &before))
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close() // it ends by that
		_ = c.Wait()
	})
	ask := func(what string) float64 {
		fmt.Fprintln(in, what)
		if !out.Scan() {
			t.Fatalf("%s: no answer to %s", name, what)
		}
		return must(strconv.ParseFloat(out.Text(), 64))
	}
	ask("begin")
	return ask
}

// port is where the benchmark's ends meet.
const port = 7

// answer sends UDP back, and counts a TCP stream's end with a byte.
func answer(address netip.Addr) error {
	udp, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	tcp, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	at := &unix.SockaddrInet4{Port: port, Addr: address.As4()}
	if err := errors.Join(unix.Bind(udp, at), unix.Bind(tcp, at), unix.Listen(tcp, 1)); err != nil {
		return err
	}
	go func() {
		b := make([]byte, 64)
		for {
			n, from, err := unix.Recvfrom(udp, b, 0)
			if err == nil {
				_ = unix.Sendto(udp, b[:n], 0, from)
			}
		}
	}()
	go func() {
		b := make([]byte, 1<<17)
		for {
			c, _, err := unix.Accept(tcp)
			for n := 1; err == nil && n > 0; {
				n, err = unix.Read(c, b)
			}
			_, _ = unix.Write(c, b[:1])
			_ = unix.Close(c)
		}
	}()
	return begun()
}

// begun answers the first question, and returns when nobody is there to ask another.
func begun() error {
	fmt.Println(0)
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

var spun atomic.Int64

// keepAwake has its processor run whenever it has nothing else to do.
func keepAwake(netip.Addr) error {
	go func() {
		runtime.LockOSThread()
		if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}, 0); err != nil {
			panic(err)
		}
		for n := 0; ; n++ {
			spun.Store(int64(n))
		}
	}()
	return begun()
}

// ask measures what it is told to. Of some measurements it tells the best: what else the
// machine does only makes them slower.
func ask(address netip.Addr) error {
	at := &unix.SockaddrInet4{Port: port, Addr: address.As4()}
	dial := func(kind int) (int, error) {
		fd, err := unix.Socket(unix.AF_INET, kind, 0)
		if err == nil {
			err = unix.Connect(fd, at)
		}
		return fd, err
	}
	measure := map[string]func() (float64, error){
		"begin": func() (float64, error) { return 0, nil },
		// The median of requests of 64 bytes, one after the other; the best of some.
		"latency": func() (float64, error) {
			fd, err := dial(unix.SOCK_DGRAM)
			if err != nil {
				return 0, err
			}
			defer unix.Close(fd)
			b, took := make([]byte, 64), make([]time.Duration, 200)
			best := time.Hour
			for range 20 {
				for i := range took {
					start := time.Now()
					if _, err := unix.Write(fd, b); err != nil {
						return 0, err
					}
					if _, err := unix.Read(fd, b); err != nil {
						return 0, err
					}
					took[i] = time.Since(start)
				}
				best = min(best, median(took))
			}
			return best.Seconds(), nil
		},
		// The best of some streams.
		"throughput": func() (float64, error) {
			best := time.Hour
			b := make([]byte, 1<<17)
			for range 16 {
				fd, err := dial(unix.SOCK_STREAM)
				if err != nil {
					return 0, err
				}
				start := time.Now()
				for range 128 {
					if _, err := unix.Write(fd, b); err != nil {
						return 0, err
					}
				}
				if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
					return 0, err
				}
				if _, err := unix.Read(fd, b); err != nil {
					return 0, err
				}
				best = min(best, time.Since(start))
				_ = unix.Close(fd)
			}
			return best.Seconds(), nil
		},
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		t, err := measure[in.Text()]()
		if err != nil {
			return fmt.Errorf("%s: %w", in.Text(), err)
		}
		fmt.Println(t)
	}
	return nil
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
