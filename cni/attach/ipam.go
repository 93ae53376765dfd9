package attach

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// IPAM runs IPAM plugins.
type IPAM interface {
	// Find tells whether there is such a plugin.
	Find(plugin string, req Request) error
	// Exec runs the plugin. The result is that of ADD, nil for other verbs.
	Exec(ctx context.Context, plugin string, req Request) (*types100.Result, error)
}

// OwnIPAM is the type of the IPAM that is part of the agent.
const OwnIPAM = "sluice"

// dhcpIPAM is the type of the IPAM plugin that works over the pod's link.
const dhcpIPAM = "dhcp"

// ByType is the agent's own IPAM for networks that name it, and another for the rest.
type ByType struct{ Own, Others IPAM }

func (b ByType) of(plugin string) IPAM {
	if plugin == OwnIPAM && b.Own != nil {
		return b.Own
	}
	return b.Others
}

// Find implements IPAM.
func (b ByType) Find(plugin string, req Request) error { return b.of(plugin).Find(plugin, req) }

// Exec implements IPAM.
func (b ByType) Exec(ctx context.Context, plugin string, req Request) (*types100.Result, error) {
	return b.of(plugin).Exec(ctx, plugin, req)
}

// Lease is what an attachment has of the agent's own IPAM.
type Lease struct {
	Key
	Pool, Namespace string
	Addresses       []netip.Addr
	Done            bool // attached; otherwise it is being made or undone, and may have any
}

// Leases are the attachments with addresses of the agent's own IPAM, and those that may
// have some.
func (a *Attacher) Leases() []Lease {
	var leases []Lease
	for _, r := range a.journal.all() {
		if r.IPAM != OwnIPAM || r.Phase == Returned {
			continue
		}
		var conf struct {
			IPAM struct {
				Pool string `json:"pool"`
			} `json:"ipam"`
		}
		var result types100.Result
		// A record that cannot be read is one of which nothing is known.
		err := errors.Join(json.Unmarshal(r.Config, &conf), json.Unmarshal(r.Result, &result))
		l := Lease{Key: r.Key, Pool: conf.IPAM.Pool, Done: r.Phase == Attached && err == nil}
		l.Namespace, _, _ = strings.Cut(r.Pod, "/")
		for _, ip := range result.IPs {
			if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok {
				l.Addresses = append(l.Addresses, addr.Unmap())
			}
		}
		leases = append(leases, l)
	}
	return leases
}

// ExecIPAM runs IPAM plugins as the CNI specification wants it: as processes,
// from the folders of CNI_PATH and then those of Dirs.
type ExecIPAM struct {
	Dirs []string
}

// Find implements IPAM.
func (e ExecIPAM) Find(plugin string, req Request) error {
	_, err := e.find(plugin, req)
	return err
}

// dirs is CNI_PATH as the plugin gets it, too: it may run others.
func (e ExecIPAM) dirs(req Request) []string {
	return slices.Concat(filepath.SplitList(req.Path), e.Dirs)
}

func (e ExecIPAM) find(plugin string, req Request) (path string, err error) {
	path, err = invoke.FindInPath(plugin, e.dirs(req))
	if err != nil {
		return "", fail(CodeIPAM, "find IPAM plugin: %w", err)
	}
	return path, nil
}

// Exec implements IPAM.
func (e ExecIPAM) Exec(ctx context.Context, plugin string, req Request) (*types100.Result, error) {
	path, err := e.find(plugin, req)
	if err != nil {
		return nil, err
	}
	args := &invoke.Args{
		Command: string(req.Command), ContainerID: req.ContainerID, NetNS: req.Netns,
		PluginArgsStr: req.Args, IfName: req.IfName, Path: strings.Join(e.dirs(req), string(filepath.ListSeparator)),
	}
	if req.Command != Add {
		if err = invoke.ExecPluginWithoutResult(ctx, path, req.Stdin, args, &Process{}); err != nil {
			return nil, ipamError(plugin, req.Command, err)
		}
		return nil, nil
	}
	r, err := invoke.ExecPluginWithResult(ctx, path, req.Stdin, args, &Process{})
	if err != nil {
		return nil, ipamError(plugin, req.Command, err)
	}
	result, err := types100.NewResultFromResult(r)
	if err != nil {
		return nil, ipamError(plugin, req.Command, err)
	}
	return result, nil
}

// ipamError keeps the plugin's own code where it has a meaning for the runtime:
// "try again later", and the two of STATUS.
func ipamError(plugin string, c Command, err error) error {
	code := uint(CodeIPAM)
	var cni *types.Error
	if errors.As(err, &cni) && (cni.Code == types.ErrTryAgainLater || cni.Code == types.ErrPluginNotAvailable || cni.Code == types.ErrLimitedConnectivity) {
		code = cni.Code
	}
	return fail(code, "%s of IPAM plugin %s: %w", c, plugin, err)
}

// Process runs plugins as processes. It implements invoke.Exec.
type Process struct{ version.PluginDecoder }

// FindInPath implements invoke.Exec.
func (*Process) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

// ExecPlugin implements invoke.Exec.
func (*Process) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	// A plugin must not outlive the agent: the next agent releases what the
	// journal names, and an ADD that ends after that would leak its address.
	// The kernel sends the signal when the thread that started the plugin ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var stderr bytes.Buffer
	c := exec.CommandContext(ctx, path)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.Env, c.Stdin, c.Stderr = env, bytes.NewReader(stdin), &stderr
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		return nil, err
	}
	// A thread that waits for a process is looked after by the runtime's monitor, up to
	// fifty times a millisecond; a goroutine that waits for its output costs nothing.
	stdout, err := io.ReadAll(out)
	if err = errors.Join(err, c.Wait()); err == nil {
		return stdout, nil
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", err, ctx.Err())
	}
	// A plugin prints its error to its standard output.
	said := &types.Error{}
	if json.Unmarshal(stdout, said) == nil && said.Msg != "" {
		return nil, said
	}
	return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()+string(stdout)))
}
