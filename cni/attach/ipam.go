package attach

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
	var stdout, stderr bytes.Buffer
	c := exec.CommandContext(ctx, path)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.Env, c.Stdin, c.Stdout, c.Stderr = env, bytes.NewReader(stdin), &stdout, &stderr
	err := c.Run()
	if err == nil {
		return stdout.Bytes(), nil
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", err, ctx.Err())
	}
	// A plugin prints its error to its standard output.
	said := &types.Error{}
	if json.Unmarshal(stdout.Bytes(), said) == nil && said.Msg != "" {
		return nil, said
	}
	return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()+stdout.String()))
}
