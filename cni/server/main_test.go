package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/go-logr/logr"

	"github.com/sluice-network/sluice/cni/wire"
	"github.com/sluice-network/sluice/internal/host"
)

// TestMain makes the test program three programs in one, because the tests need
// processes that can die: an agent, an IPAM plugin, and the tests.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("CNI_COMMAND") != "":
		os.Exit(ipamPlugin())
	case os.Getenv("SLUICE_TEST_AGENT") != "":
		os.Exit(agent(os.Getenv("SLUICE_TEST_AGENT")))
	}
	os.Exit(m.Run())
}

// ipamPlugin gives each attachment an address by the address of its VF, or the result
// that the configuration has, and keeps a file for each one given.
func ipamPlugin() int {
	var conf struct {
		DeviceID string
		IPAM     struct {
			Dir, Fail string
			Result    json.RawMessage
		}
	}
	stdin, _ := io.ReadAll(os.Stdin)
	if err := json.Unmarshal(stdin, &conf); err != nil {
		fmt.Printf(`{"code":6,"msg":%q}`, err)
		return 1
	}
	if os.Getenv("CNI_PATH") == "" {
		fmt.Print(`{"code":4,"msg":"required env variables [CNI_PATH] missing"}`)
		return 1
	}
	lease := filepath.Join(conf.IPAM.Dir, os.Getenv("CNI_CONTAINERID")+"-"+os.Getenv("CNI_IFNAME"))
	command := os.Getenv("CNI_COMMAND")
	if command == conf.IPAM.Fail {
		fmt.Print(`{"code":11,"msg":"no address is free"}`)
		return 1
	}
	switch command {
	case "ADD":
		if err := os.WriteFile(lease, nil, 0o600); err != nil {
			fmt.Printf(`{"code":5,"msg":%q}`, err)
			return 1
		}
		if conf.IPAM.Result != nil {
			fmt.Printf("%s", conf.IPAM.Result)
			return 0
		}
		// 0000:02:10.3 gets 10.20.2.131
		var bus, dev, fn int
		_, _ = fmt.Sscanf(conf.DeviceID, "0000:%x:%x.%x", &bus, &dev, &fn)
		n := dev<<3 + fn
		fmt.Printf(`{"cniVersion":"1.0.0","ips":[{"address":"10.20.%d.%d/16","gateway":"10.20.0.1"},{"address":"fd20::%x:%x/64"}],"routes":[{"dst":"10.30.0.0/16"}]}`, bus, n, bus, n)
	case "DEL":
		if err := os.Remove(lease); err != nil && !os.IsNotExist(err) {
			return 1
		}
	case "CHECK":
		if _, err := os.Stat(lease); err != nil {
			fmt.Printf(`{"code":100,"msg":%q}`, err)
			return 1
		}
	}
	return 0
}

// noBaselines makes the attacher take the baseline from the VF itself.
type noBaselines struct{}

func (noBaselines) Baseline(string) (net.HardwareAddr, int, bool) { return nil, 0, false }

// allocated is a kubelet that has given pods the devices that dir has a file of, with the
// pod's name; nil without dir.
func allocated(dir string) func(context.Context, string) (string, bool, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil
	}
	return func(_ context.Context, device string) (string, bool, error) {
		pod, err := os.ReadFile(filepath.Join(dir, device))
		return string(pod), err == nil, nil
	}
}

// agent serves until it is told to end by its standard input, or kills itself at
// the step with the number SLUICE_TEST_DIE_AT.
func agent(dir string) int {
	runtime.GOMAXPROCS(1) // as sluice-agent has it
	// The main thread's namespace is the one the tests run in.
	kernel, err := host.OpenAttacher(host.DefaultSysfs)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	dieAt, err := strconv.ParseInt(os.Getenv("SLUICE_TEST_DIE_AT"), 10, 64)
	if err != nil {
		dieAt = -1
	}
	links, err := host.Open(host.DefaultSysfs)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var taken atomic.Int64
	s, err := New(Options{
		Socket: filepath.Join(dir, "cni.sock"), StateDir: dir, Kernel: kernel, Baselines: noBaselines{}, Log: logr.Discard(),
		SriovCNI: filepath.Join(dir, "sriov-cni"), Allocated: allocated(filepath.Join(dir, "allocated")), Changes: links.Watch, Enforcer: policies(dir, kernel),
		OnStep: func(step string) {
			if taken.Add(1)-1 == dieAt {
				_ = os.WriteFile(filepath.Join(dir, "died-at"), []byte(step), 0o600)
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				runtime.Goexit()
			}
		},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ctx, stop := contextUntilEOF(os.Stdin)
	defer stop()
	if err := s.Run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// call speaks to the server as the shim does.
func call(socket string, req wire.Request) (wire.Response, error) {
	var resp wire.Response
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return resp, err
	}
	defer conn.Close()
	frame, err := wire.Encode(req)
	if err != nil {
		return resp, err
	}
	var rights []byte
	if ns, err := os.Open(req.Netns); err == nil {
		defer ns.Close()
		rights = syscall.UnixRights(int(ns.Fd()))
	}
	if _, _, err := conn.WriteMsgUnix(frame, rights, nil); err != nil {
		return resp, err
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		return resp, err
	}
	return resp, wire.Decode(conn, &resp)
}
