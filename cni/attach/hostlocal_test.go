package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// hostLocalProgram builds the plugin of the version whose library is in the agent.
func hostLocalProgram(t *testing.T) ExecIPAM {
	t.Helper()
	dir := t.TempDir()
	c := exec.Command("go", "build", "-o", filepath.Join(dir, "host-local"), "github.com/containernetworking/plugins/plugins/ipam/host-local")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return ExecIPAM{Dirs: []string{dir}}
}

// files are the names and contents below a folder.
func files(dir string) string {
	all := map[string]string{}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			b, _ := os.ReadFile(path)
			all[strings.TrimPrefix(path, dir)] = string(b)
		}
		return nil
	})
	return fmt.Sprintf("%q", all)
}

// said is all that a call answers, with the code that a runtime is told. Errors of addresses
// that are asked for list them in any order.
func said(result *types100.Result, err error, dir string) string {
	if err != nil {
		words := strings.Fields(strings.ReplaceAll(err.Error(), dir, "DIR"))
		slices.Sort(words)
		return fmt.Sprint(CNIError(err).Code, words)
	}
	b, err := json.Marshal(result)
	return fmt.Sprintf("%s %v", b, err)
}

// TestHostLocalIsTheSame makes the same calls of the plugin as a process and of HostLocal:
// answers, errors and files are the same.
func TestHostLocalIsTheSame(t *testing.T) {
	program := hostLocalProgram(t)
	ranges := []string{
		`"subnet":"10.1.0.0/29"`,
		`"subnet":"10.1.0.0/29","rangeStart":"10.1.0.2","rangeEnd":"10.1.0.3","gateway":"10.1.0.6"`,
		`"ranges":[[{"subnet":"10.1.0.0/29"}],[{"subnet":"fd00::/126"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"10.9.0.0/16","gw":"10.1.0.1","mtu":1400,"priority":7,"table":9}]`,
		`"ranges":[[{"subnet":"10.1.0.0/30"},{"subnet":"10.2.0.0/30"}]],"subnet":"fd00::/125"`,
		`"ranges":[[{"subnet":"10.1.0.0/30"}],[{"subnet":"10.1.0.0/29"}]]`,
		`"subnet":"10.1.0.1/29"`, `"subnet":"10.1.0.0/31"`, `"ranges":[]`, `"subnet":7`, `"resolvConf":"/nonexistent","subnet":"10.1.0.0/29"`,
	}
	asks := []string{
		``, ``, ``, `,"args":{"cni":{"ips":["10.1.0.3"]}}`, `,"runtimeConfig":{"ips":["fd00::2/126","10.1.0.4/29"]}`,
		`,"runtimeConfig":{"ipRanges":[[{"subnet":"10.7.0.0/29"}]]}`, `,"args":{"cni":{"ips":["10.1.0.1"]}}`, `,"runtimeConfig":{"ips":["10.200.0.1"]}`,
	}
	rapid.Check(t, func(t *rapid.T) {
		here, there := &HostLocal{Others: program}, program
		dirs := [2]string{}
		for i := range dirs {
			dir, err := os.MkdirTemp("", "host-local")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			dirs[i] = dir
			// What an old version of the plugin left.
			if err := errors.Join(os.Mkdir(filepath.Join(dir, "blue"), 0o755), os.WriteFile(filepath.Join(dir, "blue", "10.1.0.2"), []byte("c1"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		config := rapid.SampledFrom(ranges).Draw(t, "ranges")
		for range rapid.IntRange(1, 12).Draw(t, "calls") {
			req := Request{
				Command:     rapid.SampledFrom([]Command{Add, Add, Add, Del, Del, Check, GC, Status}).Draw(t, "command"),
				ContainerID: rapid.SampledFrom([]string{"c1", "c2", "c3", "c3", "c 4"}).Draw(t, "container"),
				IfName:      rapid.SampledFrom([]string{"net1", "net2"}).Draw(t, "interface"),
				Args:        rapid.SampledFrom([]string{"", "", "IgnoreUnknown=1;K8S_POD_NAME=p", "IgnoreUnknown=1;IP=10.1.0.5", "K=v", "IP=x"}).Draw(t, "args"),
				Netns:       "/nonexistent", Path: "/nonexistent",
			}
			if rapid.IntRange(0, 9).Draw(t, "change") == 0 {
				config = rapid.SampledFrom(ranges).Draw(t, "ranges")
			}
			version := rapid.SampledFrom(Versions).Draw(t, "version")
			if at := since[req.Command]; slices.Index(Versions, version) < at {
				version = Versions[at] // Parse refuses others
			}
			if (req.Command == GC || req.Command == Status) && req.ContainerID == "c 4" {
				req.ContainerID = "" // what no runtime sets for them
			}
			network, ask := rapid.SampledFrom([]string{"blue", "blue", "red", "../x"}).Draw(t, "network"), rapid.SampledFrom(asks).Draw(t, "ask")
			if strings.Contains(req.Args, "IP=") {
				ask = "" // of two addresses in one range the plugin takes any
			}
			var got [2]string
			beside := rapid.IntRange(0, 3).Draw(t, "beside") == 0 // by the program, in the agent's folder
			for i, ipam := range []IPAM{there, here} {
				if beside {
					ipam = program
				}
				req.Stdin = fmt.Appendf(nil, `{"cniVersion":%q,"name":%q,"type":"x","ipam":{"type":"host-local","dataDir":%q,%s}%s}`, version, network, dirs[i], config, ask)
				result, err := ipam.Exec(t.Context(), "host-local", req)
				got[i] = said(result, err, dirs[i]) + "\n" + files(dirs[i])
			}
			if got[0] != got[1] {
				t.Fatalf("%s %s: the program\n%s\nthe agent\n%s", req.Command, req.Stdin, got[0], got[1])
			}
		}
	})
}

// The program and the agent at once give no address twice.
func TestHostLocalBesideThePlugin(t *testing.T) {
	program := hostLocalProgram(t)
	here := &HostLocal{Others: program}
	dir := t.TempDir()
	given := map[string]int{}
	var mu sync.Mutex
	var calls sync.WaitGroup
	for i := range 60 {
		calls.Go(func() {
			req := Request{
				Command: Add, ContainerID: fmt.Sprint("c", i), IfName: "net1", Netns: "/nonexistent", Path: "/nonexistent",
				Stdin: fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":"blue","ipam":{"type":"host-local","dataDir":%q,"subnet":"10.1.0.0/26"}}`, dir),
			}
			var ipam IPAM = here
			if i%3 == 0 {
				ipam = program
			}
			result, err := ipam.Exec(t.Context(), "host-local", req)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			given[result.IPs[0].Address.IP.String()]++
		})
	}
	calls.Wait()
	if len(given) != 60 {
		t.Errorf("%d addresses for 60 attachments: %v", len(given), slices.Sorted(maps.Keys(given)))
	}
}

// A lock that another process keeps holds up a call until its deadline, and no longer.
func TestHostLocalLockedByAnother(t *testing.T) {
	dir := t.TempDir()
	req := Request{
		Command: Add, ContainerID: "c1", IfName: "net1",
		Stdin: fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":"blue","ipam":{"type":"host-local","dataDir":%q,"subnet":"10.1.0.0/29"}}`, dir),
	}
	here := &HostLocal{Others: noIPAM{t}}
	if err := os.Mkdir(filepath.Join(dir, "blue"), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "blue", "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := here.Exec(ctx, "host-local", req); err == nil || CNIError(err).Code != types.ErrTryAgainLater || !strings.Contains(err.Error(), dir) {
		t.Errorf("%v", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if result, err := here.Exec(t.Context(), "host-local", req); err != nil || result.IPs[0].Address.String() != "10.1.0.2/29" {
		t.Errorf("%v, %v", result, err)
	}
}
