package cluster

import (
	"bytes"
	"embed"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"text/template"
)

// NodeStart is the program that makes a guest a node, as the guest sees it.
const NodeStart = "/host/start"

// NodeFailed is the file in a guest that says NodeStart has failed.
const NodeFailed = "/run/start-failed"

// Images that every node has from the start.
const (
	PauseImage = "sluice.dev/pause:dev"
	ToolsImage = "sluice.dev/tools:dev"
)

// nodeFiles are templates; a file's path below nodefiles is its path below
// /host in the node.
//
//go:embed nodefiles
var nodeFiles embed.FS

// nodeValues are what the templates may use.
type nodeValues struct {
	Name                string
	Address             netip.Addr
	NodePods            netip.Prefix
	PodCIDR, PauseImage string
	Gateway             netip.Addr
	Failed              string
	APIServer           netip.AddrPort
}

// renderNode returns the files of node n by their path below /host, without
// those that hold keys.
func renderNode(n int) (map[string][]byte, error) {
	values := nodeValues{
		Name:       NodeName(n),
		Address:    NodeAddress(n).Addr(),
		NodePods:   nodePods(n),
		PodCIDR:    podCIDR,
		PauseImage: PauseImage,
		Gateway:    Gateway,
		Failed:     NodeFailed,
		APIServer:  netip.AddrPortFrom(Gateway, apiPort),
	}
	files := map[string][]byte{}
	err := fs.WalkDir(nodeFiles, "nodefiles", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		t, err := template.ParseFS(nodeFiles, path)
		if err != nil {
			return err
		}
		var out bytes.Buffer
		if err := t.Option("missingkey=error").Execute(&out, values); err != nil {
			return err
		}
		files[strings.TrimPrefix(path, "nodefiles/")] = out.Bytes()
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("render the files of node %s: %w", values.Name, err)
	}
	return files, nil
}

// WriteNode writes what node n finds at /host into dir: its configuration and
// its credentials.
func (k *Keys) WriteNode(dir string, n int) error {
	files, err := renderNode(n)
	if err != nil {
		return err
	}
	name, address := NodeName(n), NodeAddress(n).Addr()
	node, err := k.authority.Issue(Subject{
		Name:   "system:node:" + name, // what the Node authorizer asks for
		Groups: []string{"system:nodes"},
		Hosts:  []string{name, address.String()},
	}, k.now)
	if err != nil {
		return err
	}
	multus, err := k.authority.Issue(Subject{Name: "multus"}, k.now)
	if err != nil {
		return err
	}
	files["etc/kubelet-ca.crt"], files["etc/kubelet.crt"], files["etc/kubelet.key"] = k.authority.PEM, node.Cert, node.Key
	proxy, err := k.authority.Issue(Subject{Name: "system:kube-proxy"}, k.now) // bound to system:node-proxier from the start
	if err != nil {
		return err
	}
	server := netip.AddrPortFrom(Gateway, apiPort)
	for name, pair := range map[string]Pair{"kubelet": node, "multus": multus, "kube-proxy": proxy} {
		if files["etc/"+name+".kubeconfig"], err = Kubeconfig(server, k.authority.PEM, pair); err != nil {
			return err
		}
	}
	return writeFiles(dir, files)
}

// writeFiles writes files below dir, programs as such and all else, which may
// be keys, for the owner only.
func writeFiles(dir string, files map[string][]byte) error {
	for name, content := range files {
		path := filepath.Join(dir, name)
		mode := fs.FileMode(0o600)
		if bytes.HasPrefix(content, []byte("#!")) {
			mode = 0o755
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if err := os.WriteFile(path, content, mode); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}
