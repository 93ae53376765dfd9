package standalone

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	nadclient "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/client/clientset/versioned/typed/k8s.cni.cncf.io/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apitypes "k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/sluice-network/sluice/cni/attach"
)

// Server is the API server. It keeps no copies: what a pod gets is what is written
// when its sandbox is made, and a role that may only get, not list, is enough.
type Server struct {
	core     corev1client.CoreV1Interface
	networks nadclient.K8sCniCncfIoV1Interface
}

// NewServer makes the client; it connects when it is first used.
func NewServer(c *rest.Config) (*Server, error) {
	core, err := corev1client.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("reach the API server: %w", err)
	}
	networks, err := nadclient.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("reach the API server: %w", err)
	}
	return &Server{core, networks}, nil
}

// coded gives an error of the API server its CNI code: only what is not there, and
// so is wrong in what people wrote, does not mend itself.
func coded(err error) error {
	code := types.ErrTryAgainLater
	if apierrors.IsNotFound(err) {
		code = types.ErrInvalidNetworkConfig
	}
	return attach.WithCode(code, err)
}

// Pod implements API.
func (s *Server) Pod(ctx context.Context, namespace, name, uid string) (map[string]string, error) {
	p, err := s.core.Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, coded(fmt.Errorf("read pod %s/%s: %w", namespace, name, err))
	}
	// The mirror of a static pod names the static pod's UID in an annotation.
	if mirrored := p.Annotations["kubernetes.io/config.mirror"]; uid != "" && uid != string(p.UID) && uid != mirrored {
		return nil, fail(types.ErrTryAgainLater, "pod %s/%s with UID %s is gone: another one has its name", namespace, name, uid)
	}
	return p.Annotations, nil
}

// Network implements API.
func (s *Server) Network(ctx context.Context, namespace, name string) (*nadv1.NetworkAttachmentDefinition, error) {
	n, err := s.networks.NetworkAttachmentDefinitions(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, coded(fmt.Errorf("read NetworkAttachmentDefinition %s/%s: %w", namespace, name, err))
	}
	return n, nil
}

// SetStatus implements API.
func (s *Server) SetStatus(ctx context.Context, namespace, name, uid, status string) error {
	meta := map[string]any{"annotations": map[string]string{nadv1.NetworkStatusAnnot: status}}
	if uid != "" {
		meta["uid"] = uid // a pod that took its place is refused
	}
	patch, err := json.Marshal(map[string]any{"metadata": meta})
	if err != nil {
		return err
	}
	if _, err = s.core.Pods(namespace).Patch(ctx, name, apitypes.MergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		return coded(fmt.Errorf("write %s of pod %s/%s: %w", nadv1.NetworkStatusAnnot, namespace, name, err))
	}
	return nil
}
