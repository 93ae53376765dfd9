package standalone

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/go-logr/logr"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"

	"github.com/sluice-network/sluice/cni/attach"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/netselect"
)

// API is what is needed of the API server. Errors carry CNI error codes.
type API interface {
	// Pod returns the pod's annotations. uid is what the runtime knows of it.
	Pod(ctx context.Context, namespace, name, uid string) (annotations map[string]string, err error)
	Network(ctx context.Context, namespace, name string) (*nadv1.NetworkAttachmentDefinition, error)
	// SetStatus writes the pod's network status; an empty uid writes it to
	// whatever pod has the name.
	SetStatus(ctx context.Context, namespace, name, uid, status string) error
}

// Kernel is what is needed of the kernel.
type Kernel interface {
	HostNetns() *host.Netns
	OpenNetns(path string) (*host.Netns, error)
	// SetDefaultRoutes makes the link the way of the namespace's default routes,
	// for the families of the gateways.
	SetDefaultRoutes(ns *host.Netns, link string, gateways []netip.Addr) error
}

// Options are what Networks stand on.
type Options struct {
	API    API
	Kernel Kernel
	// Devices returns the devices that the kubelet gave to the pod, by resource, in
	// the order of its containers. uid is what the runtime knows of it.
	Devices func(ctx context.Context, namespace, name, uid string) (map[string][]string, error)
	// DeviceInfo returns what the device plugin says of a device, nil for nothing.
	DeviceInfo func(resource, deviceID string) (*nadv1.DeviceInfo, error)
	// Plugin does a call of this agent's own plugin.
	Plugin func(ctx context.Context, req attach.Request, ns *host.Netns) ([]byte, error)
	// Alive tells whether the path is still that of the namespace.
	Alive func(path string, id host.NetnsID) bool
	Dirs  []string // of plugins, besides CNI_PATH
	Dir   string   // for what is kept of each container
	Log   logr.Logger
}

// Networks gives pods the networks of their annotations.
type Networks struct {
	Options
	records records
	locks   attach.Locks
}

// undoTimeout is for undoing a failed ADD, beyond the request's own deadline.
const undoTimeout = 20 * time.Second

// New makes Networks. Collect should follow before any call.
func New(o Options) (*Networks, error) {
	n := &Networks{Options: o, records: records{filepath.Join(o.Dir, "containers")}}
	aside, err := n.records.open()
	for _, path := range aside {
		o.Log.Error(nil, "What is kept of a container's networks could not be read and was set aside; Sluice's own are ended with its namespace, those of other plugins may be left", "file", path)
	}
	return n, err
}

// Do does a call whose configuration is Wanted.
func (n *Networks) Do(ctx context.Context, req attach.Request, ns *host.Netns) ([]byte, error) {
	c, err := parse(req)
	if err != nil {
		return nil, err
	}
	switch req.Command {
	case attach.Status:
		return nil, nil // each network's plugins answer for themselves, at ADD
	case attach.GC:
		if c.Valid == nil {
			return nil, fail(types.ErrInvalidNetworkConfig, `network %q: key "cni.dev/valid-attachments" is missing: nothing is collected`, c.Name)
		}
		return nil, n.collect(ctx, func(s *sandbox) bool {
			return s.Cluster == c.Name && !slices.ContainsFunc(c.Valid, func(v types.GCAttachment) bool { return v.ContainerID == s.ContainerID })
		})
	}
	// It becomes the name of a file.
	if err := utils.ValidateContainerID(req.ContainerID); err != nil {
		return nil, err
	}
	unlock, err := n.lock(ctx, req.ContainerID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	switch req.Command {
	case attach.Add:
		return n.add(ctx, c, req, ns)
	case attach.Del:
		return nil, n.del(ctx, req, ns)
	case attach.Check:
		return nil, n.check(ctx, req, ns)
	}
	return nil, fail(types.ErrInvalidEnvironmentVariables, "CNI_COMMAND %q is unknown", req.Command)
}

func (n *Networks) lock(ctx context.Context, containerID string) (unlock func(), err error) {
	if unlock, err = n.locks.Lock(ctx, containerID); err != nil {
		return nil, fail(types.ErrTryAgainLater, "wait for another call for container %s: %w", containerID, err)
	}
	return unlock, nil
}

// pod is whom the call is for.
type pod struct{ namespace, name, uid string }

func podOf(args string) pod {
	namespace, name, uid := attach.PodOf(args)
	return pod{namespace, name, uid}
}

func splitArgs(s string) [][2]string {
	var args [][2]string
	for pair := range strings.SplitSeq(s, ";") {
		if k, v, ok := strings.Cut(pair, "="); ok {
			args = append(args, [2]string{k, v})
		}
	}
	return args
}

// add makes all networks of the pod, or none.
func (n *Networks) add(ctx context.Context, c *config, req attach.Request, ns *host.Netns) ([]byte, error) {
	// What is left of another attempt would have the names of this one's interfaces.
	if err := n.del(ctx, req, ns); err != nil {
		return nil, fail(types.ErrTryAgainLater, "undo an earlier attempt: %w", err)
	}
	args := splitArgs(req.Args)
	p := podOf(req.Args)
	if p.namespace == "" || p.name == "" {
		return nil, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS %q does not tell K8S_POD_NAMESPACE and K8S_POD_NAME: podNetworks is for pods", req.Args)
	}
	annotations := c.RuntimeConfig.Annotations
	var err error
	if annotations == nil {
		if annotations, err = n.API.Pod(ctx, p.namespace, p.name, p.uid); err != nil {
			return nil, err
		}
	}
	if source := annotations["kubernetes.io/config.source"]; source != "" && source != "api" {
		p.uid = "" // a static pod: its mirror has a UID of its own
	}
	selections, err := netselect.Parse(annotations[netselect.Annotation], p.namespace)
	if err != nil {
		return nil, fail(types.ErrInvalidNetworkConfig, "pod %s/%s: %w", p.namespace, p.name, err)
	}
	if len(selections) == 0 {
		return c.PrevResult, nil
	}
	s, err := n.plan(ctx, p, args, selections, req)
	if err != nil {
		return nil, err
	}
	if ns == nil {
		if ns, err = n.Kernel.OpenNetns(req.Netns); err != nil {
			return nil, fail(types.ErrInvalidNetNS, "pod %s/%s: %w", p.namespace, p.name, err)
		}
		defer ns.Close()
	}
	s.Cluster, s.Netns = c.Name, ns.ID
	if err := n.records.put(s); err != nil {
		return nil, fail(types.ErrIOFailure, "%w", err)
	}
	if err = n.make(ctx, c, p, s, ns); err == nil {
		return c.PrevResult, nil
	}
	err = fmt.Errorf("pod %s/%s: %w", p.namespace, p.name, err)
	rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if undone := n.release(rest, s, req.Netns, ns); undone != nil {
		return nil, fail(attach.CodeNotUndone, "%w; then undo failed: %w", err, undone)
	}
	return nil, err
}

// plan collects what the plan is made of, and makes it.
func (n *Networks) plan(ctx context.Context, p pod, args [][2]string, selections []netselect.Selection, req attach.Request) (s sandbox, err error) {
	definitions := make([]*nadv1.NetworkAttachmentDefinition, len(selections))
	resources := false
	for i, selection := range selections {
		if definitions[i], err = n.API.Network(ctx, selection.Namespace, selection.Name); err != nil {
			return s, fmt.Errorf("pod %s/%s: %w", p.namespace, p.name, err)
		}
		resources = resources || definitions[i].Annotations[resourceAnnotation] != ""
	}
	var devices map[string][]string
	if resources {
		// By the UID that kubelet has, also for a static pod.
		if devices, err = n.Devices(ctx, p.namespace, p.name, podOf(req.Args).uid); err != nil {
			return s, fail(types.ErrTryAgainLater, "pod %s/%s: %w", p.namespace, p.name, err)
		}
	}
	attachments, ignored, err := plan(selections, definitions, devices, args, req.IfName)
	if err != nil {
		return s, fail(types.ErrInvalidNetworkConfig, "pod %s/%s: %w", p.namespace, p.name, err)
	}
	for _, why := range ignored {
		n.Log.Info("A wish of a pod is not met", "pod", p.namespace+"/"+p.name, "why", why)
	}
	return sandbox{ContainerID: req.ContainerID, NetnsPath: req.Netns, Path: req.Path, Attachments: attachments}, nil
}

// make runs the plugins of all networks and tells the pod's status.
func (n *Networks) make(ctx context.Context, c *config, p pod, s sandbox, ns *host.Netns) error {
	prev, err := create.CreateFromBytes(c.PrevResult)
	if err != nil {
		return fail(types.ErrDecodingFailure, "read prevResult: %w", err)
	}
	done := make([]attached, len(s.Attachments))
	cni := n.cni(s, ns)
	for i, a := range s.Attachments {
		list, rt, err := a.runtime(s, s.NetnsPath)
		if err != nil {
			return err
		}
		done[i] = attached{attachment: a}
		if done[i].result, err = cni.AddNetworkList(ctx, list, rt); err != nil {
			return fmt.Errorf("network %s as %s: %w", a.Network, a.IfName, err)
		}
		if a.DeviceID != "" {
			if done[i].device, err = n.DeviceInfo(a.Resource, a.DeviceID); err != nil {
				return fail(types.ErrIOFailure, "network %s as %s: %w", a.Network, a.IfName, err)
			}
		}
		if len(a.DefaultRoute) > 0 {
			if err = n.Kernel.SetDefaultRoutes(ns, a.IfName, a.DefaultRoute); err != nil {
				return fail(attach.CodeKernel, "network %s as %s: default-route: %w", a.Network, a.IfName, err)
			}
		}
	}
	status, err := networkStatus(c.Name, prev, done)
	if err != nil {
		return fail(types.ErrDecodingFailure, "%w", err)
	}
	if err := n.API.SetStatus(ctx, p.namespace, p.name, p.uid, status); err != nil {
		return err
	}
	s.Complete = true
	if err := n.records.put(s); err != nil {
		return fail(types.ErrIOFailure, "%w", err)
	}
	return nil
}

// runtime is the attachment as libcni takes it.
func (a attachment) runtime(s sandbox, netns string) (*libcni.NetworkConfigList, *libcni.RuntimeConf, error) {
	list, err := libcni.NetworkConfFromBytes(a.List)
	if err != nil {
		return nil, nil, fail(types.ErrInvalidNetworkConfig, "network %s as %s: %w", a.Network, a.IfName, err)
	}
	return list, &libcni.RuntimeConf{ContainerID: s.ContainerID, NetNS: netns, IfName: a.IfName, Args: a.Args, CapabilityArgs: a.Capabilities}, nil
}

// cni is libcni for one container.
func (n *Networks) cni(s sandbox, ns *host.Netns) *libcni.CNIConfig {
	paths := slices.Concat(filepath.SplitList(s.Path), n.Dirs)
	return libcni.NewCNIConfigWithCacheDir(paths, filepath.Join(n.Dir, "cache"), &plugins{call: n.Plugin, ns: ns})
}

// del ends all networks of the container, if it has any.
func (n *Networks) del(ctx context.Context, req attach.Request, ns *host.Netns) error {
	s, err := n.records.get(req.ContainerID)
	if err != nil {
		return fail(types.ErrIOFailure, "%w", err)
	}
	if s == nil {
		return nil
	}
	return n.release(ctx, *s, req.Netns, ns)
}

// release runs DEL of all networks, the last one first, and goes on after a
// failure. What could not be ended is kept for the next DEL.
func (n *Networks) release(ctx context.Context, s sandbox, netns string, ns *host.Netns) error {
	if s.Complete {
		// From here on it is half ended, also for the next agent.
		s.Complete = false
		if err := n.records.put(s); err != nil {
			return fail(types.ErrIOFailure, "%w", err)
		}
	}
	cni := n.cni(s, ns)
	var errs []error
	var left []attachment
	for _, a := range slices.Backward(s.Attachments) {
		list, rt, err := a.runtime(s, netns)
		if err == nil {
			err = cni.DelNetworkList(ctx, list, rt)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("network %s as %s: %w", a.Network, a.IfName, err))
			left = slices.Insert(left, 0, a)
		}
	}
	if len(left) > 0 {
		s.Attachments = left
		return errors.Join(append(errs, n.records.put(s))...)
	}
	if err := n.records.remove(s.ContainerID); err != nil {
		return fail(types.ErrIOFailure, "forget the networks of container %s: %w", s.ContainerID, err)
	}
	return nil
}

// check has the plugins of all networks compare what they made.
func (n *Networks) check(ctx context.Context, req attach.Request, ns *host.Netns) error {
	s, err := n.records.get(req.ContainerID)
	if err != nil {
		return fail(types.ErrIOFailure, "%w", err)
	}
	if s == nil {
		return nil // a pod of the cluster network alone
	}
	if !s.Complete {
		return fail(attach.CodeCheckFailed, "the networks of container %s are half made or half ended: DEL it", s.ContainerID)
	}
	var errs []error
	cni := n.cni(*s, ns)
	for _, a := range s.Attachments {
		list, rt, err := a.runtime(*s, req.Netns)
		if err == nil {
			err = cni.CheckNetworkList(ctx, list, rt)
		}
		if err != nil && !errors.Is(err, libcni.ErrorCheckNotSupp) {
			errs = append(errs, fmt.Errorf("network %s as %s: %w", a.Network, a.IfName, err))
		}
	}
	return errors.Join(errs...)
}

// Collect ends the networks of containers whose namespace is gone, and those that
// were being made or ended when an agent ended.
func (n *Networks) Collect(ctx context.Context) error {
	return n.collect(ctx, func(s *sandbox) bool { return !s.Complete || !n.Alive(s.NetnsPath, s.Netns) })
}

func (n *Networks) collect(ctx context.Context, garbage func(*sandbox) bool) error {
	ids, err := n.records.all()
	if err != nil {
		return fail(types.ErrIOFailure, "%w", err)
	}
	var errs []error
	for _, id := range ids {
		if err := n.collectOne(ctx, id, garbage); err != nil {
			errs = append(errs, fmt.Errorf("container %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

func (n *Networks) collectOne(ctx context.Context, id string, garbage func(*sandbox) bool) error {
	unlock, err := n.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	s, err := n.records.get(id)
	if err != nil || s == nil || !garbage(s) {
		return err
	}
	netns := s.NetnsPath
	if !n.Alive(s.NetnsPath, s.Netns) {
		netns = "" // the path may be another pod's by now
	}
	return n.release(ctx, *s, netns, nil)
}
