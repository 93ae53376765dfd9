package standalone

import (
	"context"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/invoke"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/internal/host"
)

// shim is the file that the agent installs; the types it serves are links to it.
const shim = "sluice-cni"

// plugins run plugins for libcni: the shim's calls end in this agent, so they are
// made here; all others are processes.
type plugins struct {
	attach.Process
	call func(ctx context.Context, req attach.Request, ns *host.Netns) ([]byte, error)
	ns   *host.Netns // of the container; nil when it is gone or known by its path only
}

var _ invoke.Exec = (*plugins)(nil)

// ExecPlugin implements invoke.Exec.
func (p *plugins) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	file, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	if filepath.Base(file) != shim {
		return p.Process.ExecPlugin(ctx, path, stdin, env)
	}
	vars := map[string]string{}
	for _, e := range env {
		if k, v, ok := strings.Cut(e, "="); ok {
			vars[k] = v
		}
	}
	return p.call(ctx, attach.Request{
		Command: attach.Command(vars["CNI_COMMAND"]), ContainerID: vars["CNI_CONTAINERID"], Netns: vars["CNI_NETNS"],
		IfName: vars["CNI_IFNAME"], Args: vars["CNI_ARGS"], Path: vars["CNI_PATH"], Stdin: stdin,
	}, p.ns)
}
