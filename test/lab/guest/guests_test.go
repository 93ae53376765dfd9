//go:build lab

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluice-network/sluice/test/lab/artefact"
)

// network makes a namespace with the bridges and taps of two guests.
func network(t *testing.T) string {
	t.Helper()
	ns := fmt.Sprintf("guesttest%d", os.Getpid())
	ip := func(args ...string) {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v (needs root): %v: %s", args, err, out)
		}
	}
	ip("netns", "add", ns)
	t.Cleanup(func() { exec.Command("ip", "netns", "del", ns).Run() })
	for _, bridge := range []string{"mgmt", "data0", "data1"} {
		ip("-n", ns, "link", "add", "name", bridge, "type", "bridge", "mcast_snooping", "0")
		ip("-n", ns, "link", "set", bridge, "up")
		for n := 1; n <= 2; n++ {
			tap := fmt.Sprintf("%s-%d", bridge, n)
			ip("-n", ns, "tuntap", "add", "dev", tap, "mode", "tap")
			ip("-n", ns, "link", "set", tap, "master", bridge, "up")
		}
	}
	ip("-n", ns, "addr", "add", "172.30.0.1/24", "dev", "mgmt")
	return ns
}

func TestGuests(t *testing.T) {
	repo, err := Repo(".")
	if err != nil {
		t.Fatal(err)
	}
	store, err := artefact.Open("", t.Output())
	if err != nil {
		t.Fatal(err)
	}
	rootDir, err := store.Make(t.Context(), Bare())
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []Kind{UML, QEMU} {
		t.Run(string(kind), func(t *testing.T) {
			parts, err := Build(t.Context(), store, kind, repo)
			if err != nil {
				t.Fatal(err)
			}
			ns, dir, files := network(t), t.TempDir(), t.TempDir()
			if err := os.WriteFile(filepath.Join(files, "start"), []byte("#!/bin/sh\necho started on $(hostname) > /run/mark\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			spec := func(n int) Spec {
				return Spec{
					Kind: kind, Parts: parts, Name: fmt.Sprintf("vm%d", n), Number: n, Dir: filepath.Join(dir, fmt.Sprint(n)),
					Root: filepath.Join(rootDir, RootFile), Files: files, Start: "/host/start", CPU: n, Card: Card{Count: 2, TotalVFs: 8},
					Net: Net{
						Namespace: ns, Mgmt: fmt.Sprintf("mgmt-%d", n), Data: [2]string{fmt.Sprintf("data0-%d", n), fmt.Sprintf("data1-%d", n)},
						Address: netip.MustParsePrefix(fmt.Sprintf("172.30.0.1%d/24", n)), Gateway: netip.MustParseAddr("172.30.0.1"),
					},
				}
			}
			guests := make([]Guest, 2)
			for i := range guests {
				began := time.Now()
				g, err := Start(t.Context(), spec(i+1))
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("%s up in %.2f s", g.Name(), time.Since(began).Seconds())
				t.Cleanup(func() { g.Stop(context.Background()) })
				guests[i] = Attach(spec(i + 1)) // as another process would
			}
			run := func(g Guest, script string) string {
				t.Helper()
				out, err := g.Run(t.Context(), script)
				if err != nil {
					t.Fatalf("%s on %s: %v", script, g.Name(), err)
				}
				return out
			}
			if got := run(guests[1], "while ! [ -s /run/mark ]; do sleep 0.05; done; cat /run/mark"); got != "started on vm2\n" {
				t.Errorf("the start command wrote %q", got)
			}
			_, err = guests[0].Run(t.Context(), "echo so; exit 3")
			var exit *ExitError
			if !errors.As(err, &exit) || exit.Status != 3 || exit.Output != "so\n" {
				t.Errorf("got %v, want exit status 3 and the output", err)
			}
			big := bytes.Repeat([]byte("0123456789"), 200_000)
			var back bytes.Buffer
			if err := errors.Join(guests[0].Put(t.Context(), bytes.NewReader(big), 0o644, "/tmp/a/big"), guests[0].Get(t.Context(), "/tmp/a/big", &back)); err != nil || !bytes.Equal(back.Bytes(), big) {
				t.Errorf("put and get: %d bytes of %d, %v", back.Len(), len(big), err)
			}
			// Same-numbered cards are on one cable, different ones are not.
			for i, g := range guests {
				run(g, fmt.Sprintf("sysctl -qw net.ipv4.conf.all.arp_ignore=1; for c in 1 2; do ip link set ens${c}f0 up; ip addr add 10.77.$c.%d/24 dev ens${c}f0; done", i+1))
			}
			for _, address := range []string{"10.77.1.2", "10.77.2.2"} {
				run(guests[0], "ping -q -c 1 -w 20 "+address)
			}
			if out, err := guests[0].Run(t.Context(), "ping -q -c 1 -W 1 -I ens1f0 10.77.2.2"); err == nil {
				t.Errorf("the first card reaches the second cable: %s", out)
			}
			for _, n := range []int{1, 2} {
				if err := Attach(spec(n)).Stop(t.Context()); err != nil || Alive(spec(n).Dir) {
					t.Errorf("stop guest %d: alive %t, %v", n, Alive(spec(n).Dir), err)
				}
			}
			if _, err := guests[0].Run(t.Context(), "true"); err == nil || !strings.Contains(err.Error(), "the guest does not run") {
				t.Errorf("a command in a guest that is gone: %v", err)
			}
			if tail := guests[0].ConsoleTail(500); strings.Contains(tail, "BUG:") {
				t.Errorf("the console has a kernel fault:\n%s", tail)
			}
		})
	}
}
