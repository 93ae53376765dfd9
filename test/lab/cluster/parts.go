package cluster

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/sluice-network/sluice/test/lab/artefact"
	"github.com/sluice-network/sluice/test/lab/guest"
)

// KubernetesVersion is the version that programs built for the lab report.
// test/lab/kube/go.mod selects the code.
const KubernetesVersion = "v1.36.3"

// Parts are the artefacts of the cluster.
type Parts struct {
	// Kubelab is the multi-call control plane, file [KubelabFile], with kubectl and
	// links that make its directory one for KUBEBUILDER_ASSETS.
	Kubelab *artefact.Step
	// Root is the root image of a node, file [guest.RootFile].
	Root *artefact.Step
}

// KubelabFile is the program's name in the output of Parts.Kubelab.
const KubelabFile = "kubelab"

// NewParts describes the artefacts made from the checkout repo.
func NewParts(repo string) Parts {
	kubernetes := "-s -w" +
		" -X k8s.io/component-base/version.gitVersion=" + KubernetesVersion +
		" -X k8s.io/component-base/version.gitMajor=" + part(KubernetesVersion, 0) +
		" -X k8s.io/component-base/version.gitMinor=" + part(KubernetesVersion, 1) +
		" -X k8s.io/client-go/pkg/version.gitVersion=" + KubernetesVersion
	kubelab := goStep("kubelab", repo, "kube", goBuild{Flags: kubernetes, Packages: []string{"./kubelab", "k8s.io/kubernetes/cmd/kubectl"}})
	build := kubelab.Build
	kubelab.Build = func(ctx context.Context, b *artefact.Build) error {
		if err := build(ctx, b); err != nil {
			return err
		}
		for _, name := range []string{"etcd", "kube-apiserver"} { // what envtest looks for
			if err := os.Symlink(KubelabFile, filepath.Join(b.Out, name)); err != nil {
				return err
			}
		}
		return nil
	}
	node := goStep("node-kubernetes", repo, "kube", goBuild{Flags: kubernetes, Packages: []string{"k8s.io/kubernetes/cmd/kubelet", "k8s.io/kubernetes/cmd/kube-proxy"}})
	const containerd = "github.com/containerd/containerd/v2/"
	const plugins = "github.com/containernetworking/plugins/plugins/"
	programs := goStep("node-programs", repo, "node",
		goBuild{
			To: "bin", Flags: "-s -w -X " + containerd + "version.Version=2.2.9",
			// Snapshotters that guests have no file system for.
			Tags:     "no_btrfs no_zfs no_devmapper no_aufs",
			Packages: []string{containerd + "cmd/containerd", containerd + "cmd/containerd-shim-runc-v2", containerd + "cmd/ctr"},
		},
		goBuild{To: "bin", Flags: "-s -w", Packages: []string{"github.com/containernetworking/cni/cnitool"}},
		goBuild{To: "cni", Flags: "-s -w", Packages: []string{
			plugins + "ipam/dhcp", plugins + "ipam/host-local", plugins + "ipam/static",
			plugins + "main/bridge", plugins + "main/host-device", plugins + "main/loopback",
			plugins + "main/macvlan", plugins + "main/ptp", plugins + "main/vlan",
			plugins + "meta/portmap", plugins + "meta/tuning",
			"gopkg.in/k8snetworkplumbingwg/multus-cni.v4/cmd/multus",
		}})
	return Parts{
		Kubelab: kubelab,
		Root: guest.RootImage("node",
			guest.File{From: node, Path: "kubelet", To: "/usr/local/bin/kubelet"},
			guest.File{From: node, Path: "kube-proxy", To: "/usr/local/bin/kube-proxy"},
			guest.File{From: programs, Path: "bin/containerd", To: "/usr/local/bin/containerd"},
			guest.File{From: programs, Path: "bin/containerd-shim-runc-v2", To: "/usr/local/bin/containerd-shim-runc-v2"},
			guest.File{From: programs, Path: "bin/ctr", To: "/usr/local/bin/ctr"},
			guest.File{From: programs, Path: "bin/cnitool", To: "/usr/local/bin/cnitool"},
			guest.File{From: programs, Path: "cni", To: "/opt/cni/bin"},
			guest.File{From: preload(programs, podImages(repo)), Path: ".", To: "/opt/containerd"},
		),
	}
}

// preload is the step that imports the pod images once, where it takes a
// second, instead of at each start of each node, where it takes several: its
// output is the root directory of a containerd that has them.
func preload(node, images *artefact.Step) *artefact.Step {
	// Namespaces of its own keep this containerd from one that the machine may
	// run: the socket and the state lie in a /run that nobody else sees.
	const script = `
mount -t tmpfs tmpfs /run
echo 'version = 3' >config.toml
"$1/bin/containerd" --config config.toml --root "$3" &
trap 'kill $!; wait $!' EXIT
for try in $(seq 100); do [ -S /run/containerd/containerd.sock ] && break; sleep 0.1; done
"$1/bin/ctr" -n k8s.io images import --local "$2"
`
	return &artefact.Step{
		Name:   "node-images",
		Inputs: []artefact.Input{artefact.Output(node), artefact.Output(images), artefact.Text("script", script)},
		Build: func(ctx context.Context, b *artefact.Build) error {
			return b.Run(ctx, "unshare", "--mount", "--net", "--", "sh", "-euc", script, "preload",
				b.Dir(node), filepath.Join(b.Dir(images), imagesFile), b.Out)
		},
	}
}

// part returns the i-th number of a version "vA.B.C".
func part(version string, i int) string {
	return strings.Split(strings.TrimPrefix(version, "v"), ".")[i]
}

// goBuild is one call of go build.
type goBuild struct {
	To       string // directory in the output
	Flags    string // of the linker
	Tags     string
	Packages []string
}

// goStep builds programs that the module test/lab/MODULE of the checkout pins.
// These modules are apart from the project's own so that a Kubernetes of
// another version than the client libraries can be built.
func goStep(name, repo, module string, builds ...goBuild) *artefact.Step {
	dir := filepath.Join(repo, "test/lab", module)
	inputs := []artefact.Input{
		artefact.Files(repo, nil, filepath.Join("test/lab", module)),
		artefact.Text("go", runtime.Version()),
	}
	for _, b := range builds {
		inputs = append(inputs, artefact.Text("build", strings.Join(append([]string{b.To, b.Flags, b.Tags}, b.Packages...), "\n")))
	}
	return &artefact.Step{
		Name:   name,
		Inputs: inputs,
		Build: func(ctx context.Context, b *artefact.Build) error {
			for _, build := range builds {
				err := b.RunCmd(ctx, artefact.Cmd{
					Dir: dir,
					// One set of flags for all, or nothing in Go's cache is used twice.
					Env: []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOWORK=off", "GOFLAGS=-buildvcs=false"},
					Args: append([]string{
						"go", "build", "-trimpath", "-tags", build.Tags, "-ldflags", build.Flags,
						"-o", filepath.Join(b.Out, build.To) + "/",
					}, build.Packages...),
				})
				if err != nil {
					return err
				}
			}
			return nil
		},
	}
}
