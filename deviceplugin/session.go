package deviceplugin

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const (
	socketPrefix = "sluice_"
	socketSuffix = ".sock"
	// maxSocketPath is what fits in sockaddr_un.sun_path with its closing zero.
	maxSocketPath = 107
	closeTimeout  = 5 * time.Second
)

// socketPath is where a resource is served. A name that would make the path too
// long for a socket address is replaced by its hash.
func socketPath(dir, resource string) string {
	path := filepath.Join(dir, socketPrefix+strings.ReplaceAll(resource, "/", "_")+socketSuffix)
	if len(path) > maxSocketPath {
		sum := sha256.Sum256([]byte(resource))
		path = filepath.Join(dir, socketPrefix+hex.EncodeToString(sum[:8])+socketSuffix)
	}
	return path
}

// session is one life of a resource's server: from listening on its socket to
// closing it.
type session struct {
	api.UnimplementedDevicePluginServer
	r      *resource
	grpc   *grpc.Server
	socket os.FileInfo
	stop   chan struct{} // closed: streams end
}

// serve listens on the resource's socket, in place of whatever is there.
func serve(r *resource) (*session, error) {
	if err := os.Remove(r.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	l, err := net.Listen("unix", r.path)
	if err != nil {
		return nil, fmt.Errorf("serve resource %s: %w", r.name, err)
	}
	s := &session{r: r, grpc: grpc.NewServer(), stop: make(chan struct{})}
	if s.socket, err = os.Lstat(r.path); err != nil {
		return nil, fmt.Errorf("serve resource %s: %w", r.name, errors.Join(err, l.Close()))
	}
	api.RegisterDevicePluginServer(s.grpc, s)
	go func() {
		if err := s.grpc.Serve(l); err != nil {
			r.log.Error(err, "socket failed", "path", r.path)
			r.poke()
		}
	}()
	return s, nil
}

// intact says whether the socket a kubelet would connect to is still ours.
func (s *session) intact() bool {
	if s == nil {
		return false
	}
	now, err := os.Lstat(s.r.path)
	return err == nil && sameSocket(now, s.socket)
}

// sameSocket compares times, too: file systems give the inode number of a file
// that was removed to the next one.
func sameSocket(a, b os.FileInfo) bool {
	return a != nil && b != nil && os.SameFile(a, b) && a.ModTime().Equal(b.ModTime())
}

// close ends the streams, lets other calls finish, and removes the socket.
func (s *session) close() {
	if s == nil {
		return
	}
	close(s.stop)
	force := time.AfterFunc(closeTimeout, s.grpc.Stop)
	defer force.Stop()
	s.grpc.GracefulStop()
}

// GetDevicePluginOptions implements the device plugin API.
func (s *session) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{GetPreferredAllocationAvailable: true}, nil
}

// ListAndWatch implements the device plugin API.
func (s *session) ListAndWatch(_ *api.Empty, out grpc.ServerStreamingServer[api.ListAndWatchResponse]) error {
	return s.r.listAndWatch(out, s.stop)
}

// GetPreferredAllocation implements the device plugin API.
func (s *session) GetPreferredAllocation(_ context.Context, req *api.PreferredAllocationRequest) (*api.PreferredAllocationResponse, error) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	out := &api.PreferredAllocationResponse{}
	for _, c := range req.GetContainerRequests() {
		out.ContainerResponses = append(out.ContainerResponses, &api.ContainerPreferredAllocationResponse{
			DeviceIDs: prefer(s.r.devices, s.r.pool.ExcludeTopology, s.r.pool.Spread,
				c.GetAvailableDeviceIDs(), c.GetMustIncludeDeviceIDs(), int(c.GetAllocationSize())),
		})
	}
	return out, nil
}

// Allocate implements the device plugin API.
func (s *session) Allocate(_ context.Context, req *api.AllocateRequest) (*api.AllocateResponse, error) {
	out := &api.AllocateResponse{}
	for _, c := range req.GetContainerRequests() {
		answer, err := s.r.allocate(c.GetDevicesIds())
		if err != nil {
			s.r.log.Error(err, "allocation refused", "devices", c.GetDevicesIds())
			return nil, err
		}
		s.r.log.Info("allocated", "devices", c.GetDevicesIds())
		out.ContainerResponses = append(out.ContainerResponses, answer)
	}
	return out, nil
}

// PreStartContainer implements the device plugin API. Nothing is left to do.
func (s *session) PreStartContainer(context.Context, *api.PreStartContainerRequest) (*api.PreStartContainerResponse, error) {
	return &api.PreStartContainerResponse{}, nil
}
