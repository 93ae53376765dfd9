package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/sluice-network/sluice/test/lab/artefact"
	"github.com/sluice-network/sluice/test/lab/cluster"
	"github.com/sluice-network/sluice/test/lab/guest"
)

// Options say what cluster to start. The zero value is two UML nodes.
type Options struct {
	Name   string     // default [DefaultName]
	Kind   guest.Kind // default [guest.UML]
	Nodes  int        // default 2
	Card   guest.Card // default two cards, in UML of 16 VFs
	Images []string   // image archives to load into every node
	// Progress gets a line per finished step; nil is standard error.
	Progress io.Writer
}

// Cluster is a running cluster.
type Cluster struct {
	record
	dir    string
	guests []guest.Guest
}

// record is what a running lab's state directory says of it. It is written
// last, so a lab that has one was once complete.
type record struct {
	Name    string
	Kind    guest.Kind
	Kubelab string       // path of the program
	Nodes   []guest.Spec // in order of their numbers
	Started time.Time
	Took    time.Duration // from the start of the first process to the last node Ready
}

// DefaultName is $SLUICE_LAB_NAME, or "sluice-lab".
func DefaultName() string {
	if name := os.Getenv("SLUICE_LAB_NAME"); name != "" {
		return name
	}
	return "sluice-lab"
}

// validName keeps names fit for paths and network namespaces.
var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

func (o *Options) complete() error {
	if o.Name == "" {
		o.Name = DefaultName()
	}
	if !validName.MatchString(o.Name) {
		return fmt.Errorf("lab name %q: want up to 32 lower case letters, digits and '-'", o.Name)
	}
	if o.Kind == "" {
		o.Kind = guest.UML
	}
	if o.Kind != guest.UML && o.Kind != guest.QEMU {
		return fmt.Errorf("kind of guest %q: want %q or %q", o.Kind, guest.UML, guest.QEMU)
	}
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	if o.Nodes < 1 || o.Nodes > cluster.MaxNodes {
		return fmt.Errorf("number of nodes %d: want 1 to %d", o.Nodes, cluster.MaxNodes)
	}
	if o.Card.Count == 0 {
		o.Card.Count = 2
	}
	if o.Card.TotalVFs == 0 {
		o.Card.TotalVFs = 16
	}
	if o.Progress == nil {
		o.Progress = os.Stderr
	}
	for _, image := range o.Images {
		if _, err := os.Stat(image); err != nil {
			return fmt.Errorf("image archive: %w", err)
		}
	}
	return nil
}

// base is the directory of all labs' state.
func base() (string, error) {
	state := os.Getenv("XDG_STATE_HOME")
	if state == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("find the state directory (set XDG_STATE_HOME or HOME): %w", err)
		}
		state = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(state, "sluice", "lab"), nil
}

// lock keeps two processes from starting or ending one lab at a time. The
// kernel drops the lock of a process that dies.
func lock(name string) (dir string, unlock func(), err error) {
	all, err := base()
	if err != nil {
		return "", nil, err
	}
	if err = os.MkdirAll(all, 0o755); err != nil {
		return "", nil, fmt.Errorf("make the state directory: %w", err)
	}
	file, err := os.OpenFile(filepath.Join(all, "."+name+".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", nil, fmt.Errorf("open the lock of lab %s: %w", name, err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		file.Close()
		return "", nil, fmt.Errorf("lab %s is being started or ended by another process (%w): wait, or set SLUICE_LAB_NAME for a lab of your own", name, err)
	}
	return filepath.Join(all, name), func() { file.Close() }, nil
}

// Up starts a cluster and returns when all nodes are Ready, or returns the one
// that runs already if it is what the options ask for.
func Up(ctx context.Context, o Options) (*Cluster, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	dir, unlock, err := lock(o.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	progress := newProgress(o.Progress)
	if c, attachErr := Attach(o.Name); attachErr == nil && c.healthy(ctx) {
		if c.Kind != o.Kind || len(c.Nodes) != o.Nodes {
			return nil, fmt.Errorf("lab %s runs with %d %s nodes, asked for are %d %s: end it with down, or set SLUICE_LAB_NAME", o.Name, len(c.Nodes), c.Kind, o.Nodes, o.Kind)
		}
		progress.say("lab %s is up already", o.Name)
		return c, c.load(ctx, progress, o.Images)
	}
	if err = sweep(o.Name, dir); err != nil {
		return nil, err
	}
	if err = os.RemoveAll(dir); err != nil { // the logs of the lab before
		return nil, fmt.Errorf("remove the state of the previous lab: %w", err)
	}
	c, err := start(ctx, o, dir, progress)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx) // whatever it was just waiting for
		}
		err = errors.Join(err, sweep(o.Name, dir))
		return nil, fmt.Errorf("start lab %s: %w\nlogs are in %s", o.Name, err, dir)
	}
	return c, nil
}

func start(ctx context.Context, o Options, dir string, progress *progress) (*Cluster, error) {
	repo, err := guest.Repo(".")
	if err != nil {
		return nil, err
	}
	store, err := artefact.Open("", o.Progress)
	if err != nil {
		return nil, err
	}
	parts := cluster.NewParts(repo)
	kubelab, err := store.Make(ctx, parts.Kubelab)
	if err != nil {
		return nil, err
	}
	root, err := store.Make(ctx, parts.Root)
	if err != nil {
		return nil, err
	}
	guestParts, err := guest.Build(ctx, store, o.Kind, repo)
	if err != nil {
		return nil, err
	}

	progress.say("starting lab %s: control plane and %d %s nodes", o.Name, o.Nodes, o.Kind)
	began := time.Now()
	c := &Cluster{dir: dir, record: record{Name: o.Name, Kind: o.Kind, Kubelab: filepath.Join(kubelab, cluster.KubelabFile), Started: began}}
	if err = cluster.AddNetwork(o.Name, o.Nodes); err != nil {
		return nil, err
	}
	keys, err := cluster.NewKeys()
	if err != nil {
		return nil, err
	}
	for n := 1; n <= o.Nodes; n++ {
		files := filepath.Join(dir, cluster.NodeName(n)+".host")
		if err := keys.WriteNode(files, n); err != nil {
			return nil, err
		}
		c.Nodes = append(c.Nodes, nodeSpec(o, n, dir, files, filepath.Join(root, guest.RootFile), guestParts))
	}

	// The API server takes about as long to start as a guest and containerd do.
	c.guests = make([]guest.Guest, o.Nodes)
	all, together := errgroup.WithContext(ctx)
	all.Go(func() error {
		if err := c.controlPlane().Start(together, keys); err != nil {
			return err
		}
		progress.say("control plane is ready")
		return c.controlPlane().InstallMultus(together)
	})
	for i, spec := range c.Nodes {
		all.Go(func() error {
			var err error
			if c.guests[i], err = guest.Start(together, spec); err != nil {
				return err
			}
			progress.say("%s has booted", spec.Name)
			return nil
		})
	}
	if err := all.Wait(); err != nil {
		return nil, err
	}
	all, together = errgroup.WithContext(ctx)
	all.Go(func() error { return c.awaitReady(together, progress) })
	all.Go(func() error { return c.load(together, progress, o.Images) })
	if err := all.Wait(); err != nil {
		return nil, err
	}
	c.Took = time.Since(began).Round(time.Millisecond)
	if err := c.write(); err != nil {
		return nil, err
	}
	progress.say("lab %s is up", o.Name)
	return c, nil
}

func nodeSpec(o Options, n int, dir, files, root string, parts guest.Parts) guest.Spec {
	name, taps := cluster.NodeName(n), cluster.NodeTaps(n)
	spec := guest.Spec{
		Kind: o.Kind, Parts: parts, Root: root,
		Name: name, Number: n, Dir: filepath.Join(dir, name),
		Files: files, Start: cluster.NodeStart,
		Memory: 3072, CPU: n, Card: o.Card,
		Net: guest.Net{
			Namespace: o.Name, Mgmt: taps.Mgmt, Data: taps.Data,
			Address: cluster.NodeAddress(n), Gateway: cluster.Gateway,
		},
	}
	if o.Kind == guest.QEMU {
		spec.Memory = 2048 // allocated, not a ceiling as in UML
	}
	return spec
}

func (c *Cluster) controlPlane() cluster.ControlPlane {
	return cluster.ControlPlane{Dir: c.dir, Netns: c.Name, Kubelab: c.Kubelab}
}

func (c *Cluster) recordFile() string { return filepath.Join(c.dir, "lab.json") }

func (c *Cluster) write() error {
	content, err := json.MarshalIndent(c.record, "", "  ")
	if err == nil {
		err = os.WriteFile(c.recordFile(), append(content, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("record lab %s: %w", c.Name, err)
	}
	return nil
}

// Attach returns the cluster of that name, "" being [DefaultName], that
// another process has started.
func Attach(name string) (*Cluster, error) {
	if name == "" {
		name = DefaultName()
	}
	all, err := base()
	if err != nil {
		return nil, err
	}
	c := &Cluster{dir: filepath.Join(all, name)}
	content, err := os.ReadFile(c.recordFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("lab %s is not up: start it with up, or set SLUICE_LAB_NAME to another", name)
	}
	if err == nil {
		err = json.Unmarshal(content, &c.record)
	}
	if err != nil {
		return nil, fmt.Errorf("read the record of lab %s: %w", name, err)
	}
	for _, spec := range c.Nodes {
		c.guests = append(c.guests, guest.Attach(spec))
	}
	return c, nil
}

// readyLimit bounds the wait for the nodes, on a machine that does much else.
// A node that fails is noticed at once.
var readyLimit = map[guest.Kind]time.Duration{guest.UML: 6 * time.Minute, guest.QEMU: 15 * time.Minute}

// awaitReady labels the nodes as they become Ready, and returns when all are
// and pods can be created.
func (c *Cluster) awaitReady(ctx context.Context, progress *progress) error {
	client, err := c.controlPlane().Client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyLimit[c.Kind])
	defer cancel()
	all, ctx := errgroup.WithContext(ctx)
	all.Go(func() error { return c.awaitAccount(ctx, client) })
	for i, node := range c.Nodes {
		all.Go(func() error {
			if err := c.awaitNode(ctx, client, i); err != nil {
				return c.unready(ctx, i, err)
			}
			progress.say("%s is Ready", node.Name)
			return nil
		})
	}
	return all.Wait()
}

// awaitAccount waits for the service account that pods have by default.
func (c *Cluster) awaitAccount(ctx context.Context, client *kubernetes.Clientset) error {
	for {
		_, err := client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			p := cluster.Process{Dir: c.dir, Name: "kube-controller-manager"}
			return fmt.Errorf("wait for the service account \"default\": %w; end of %s:\n%s", err, p.Log(), p.Tail(10))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (c *Cluster) awaitNode(ctx context.Context, client *kubernetes.Clientset, i int) error {
	for tries := 1; ; tries++ {
		ready, err := makeReady(ctx, client, c.Nodes[i].Name)
		if err != nil {
			return err
		}
		if ready {
			return c.awaitServices(ctx, i)
		}
		if tries%10 == 0 { // asking the guest costs it time
			var no *guest.ExitError
			if _, err := c.guests[i].Run(ctx, "test ! -e "+cluster.NodeFailed); errors.As(err, &no) {
				return errors.New("its start has failed")
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// awaitServices waits until the services, of which the API server is one, are
// reached from node i and its pods.
func (c *Cluster) awaitServices(ctx context.Context, i int) error {
	_, err := c.guests[i].Run(ctx, "until nft list map ip kube-proxy service-ips 2>/dev/null | grep -q "+cluster.ServiceIP.String()+"; do test ! -e "+cluster.NodeFailed+" || exit 1; sleep 0.1; done")
	if err != nil {
		return fmt.Errorf("wait for kube-proxy: %w", err)
	}
	return nil
}

// makeReady reports whether a node is Ready, and labels it, once, as a worker:
// a kubelet may not give itself a role.
func makeReady(ctx context.Context, client *kubernetes.Clientset, name string) (bool, error) {
	node, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return false, nil //nolint:nilerr // not registered yet, or the deadline, which the caller sees
	}
	for _, condition := range node.Status.Conditions {
		if condition.Type == corev1.NodeReady && condition.Status == corev1.ConditionTrue {
			patch := []byte(`{"metadata":{"labels":{"node-role.kubernetes.io/worker":""}}}`)
			if _, err := client.CoreV1().Nodes().Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
				return false, fmt.Errorf("label node %s: %w", name, err)
			}
			return true, nil
		}
	}
	return false, nil
}

// unready adds to err what the logs of node i say of it.
func (c *Cluster) unready(ctx context.Context, i int, err error) error {
	ask, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	g := c.guests[i]
	said, failed := g.Run(ask, "tail -n 5 /var/log/start.log; grep -shE '^[EF]' /var/log/kubelet.log /var/log/kube-proxy.log | tail -n 10")
	if failed != nil {
		said = fmt.Sprintf("%s\n%v\nend of the console:\n%s", said, failed, g.ConsoleTail(15))
	}
	return fmt.Errorf("wait for %s to be Ready: %w; end of its logs:\n%s", c.Nodes[i].Name, err, said)
}

// healthy reports whether every part of the cluster runs and answers.
func (c *Cluster) healthy(ctx context.Context) bool {
	for _, p := range c.controlPlane().Processes() {
		if _, running := p.Pid(); !running {
			return false
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	all, ctx := errgroup.WithContext(ctx)
	for _, g := range c.guests {
		all.Go(func() error {
			_, err := g.Run(ctx, "true")
			return err
		})
	}
	return all.Wait() == nil
}

// Load imports an image archive ("docker save" or OCI layout, as a tar) into
// every node. An image of the same name is replaced; pods that run keep theirs.
func (c *Cluster) Load(ctx context.Context, archive string) error {
	all, ctx := errgroup.WithContext(ctx)
	for i, g := range c.guests {
		all.Go(func() error {
			file, err := os.Open(archive)
			if err != nil {
				return fmt.Errorf("load image: %w", err)
			}
			defer file.Close()
			var out bytes.Buffer
			// A node that is starting may not have containerd yet.
			// A containerd that starts has a socket some time before it answers there.
			const script = "until ctr version >/dev/null 2>&1; do sleep 0.2; done; exec ctr -n k8s.io images import --local -"
			err = g.Exec(ctx, guest.Command{Args: []string{"sh", "-c", script}, Stdin: file, Stdout: &out, Stderr: &out})
			if err != nil {
				return fmt.Errorf("load image %s into %s: %w: %s", archive, c.Nodes[i].Name, err, bytes.TrimSpace(out.Bytes()))
			}
			return nil
		})
	}
	return all.Wait()
}

func (c *Cluster) load(ctx context.Context, progress *progress, archives []string) error {
	for _, archive := range archives {
		if err := c.Load(ctx, archive); err != nil {
			return err
		}
		progress.say("%s is loaded", filepath.Base(archive))
	}
	return nil
}

// Kubeconfig is the path of the administrator's kubeconfig. It works from this
// machine's network namespace: the API server is reached on loopback.
func (c *Cluster) Kubeconfig() string { return c.controlPlane().Kubeconfig() }

// RESTConfig is the administrator's access to the API server.
func (c *Cluster) RESTConfig() (*rest.Config, error) { return c.controlPlane().RESTConfig() }

// Processes lists the processes of the control plane.
func (c *Cluster) Processes() []cluster.Process { return c.controlPlane().Processes() }

// Dir is the lab's state directory, with the logs.
func (c *Cluster) Dir() string { return c.dir }

// Node returns the guest that is the named node.
func (c *Cluster) Node(name string) (guest.Guest, error) {
	var names []string
	for i, spec := range c.Nodes {
		if spec.Name == name {
			return c.guests[i], nil
		}
		names = append(names, spec.Name)
	}
	return nil, fmt.Errorf("node %q: lab %s has %s", name, c.Name, strings.Join(names, ", "))
}

// KubectlCommand is the lab's own kubectl, as the administrator.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(filepath.Dir(c.Kubelab), "kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig())
	return cmd
}

// Kubectl runs kubectl and returns its standard output. The error of a kubectl
// that fails carries what it said.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.KubectlInput(ctx, "", args...)
}

// KubectlInput is [Cluster.Kubectl] with input, as for "apply -f -".
func (c *Cluster) KubectlInput(ctx context.Context, input string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := c.KubectlCommand(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Down ends the cluster and removes all that it made, logs too.
func (c *Cluster) Down(_ context.Context) error { return Down(c.Name) }

// Down ends the lab of that name, whatever state it is in, and removes all that
// it made, also the logs of a start that failed. A lab that is not there is no
// error.
func Down(name string) error {
	dir, unlock, err := lock(name)
	if err != nil {
		return err
	}
	defer unlock()
	if err := sweep(name, dir); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the state of lab %s: %w", name, err)
	}
	return nil
}

// sweep ends what runs of a lab and removes all but its logs, by what is in its
// directory: a killed start leaves no record.
func sweep(name, dir string) error {
	guests, err := filepath.Glob(filepath.Join(dir, "vm*[0-9]"))
	if err != nil {
		return fmt.Errorf("list the guests of lab %s: %w", name, err)
	}
	var errs []error
	for _, g := range guests {
		errs = append(errs, guest.Sweep(g))
	}
	errs = append(errs, cluster.ControlPlane{Dir: dir}.Stop())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end lab %s: %w", name, err)
	}
	errs = []error{cluster.RemoveNetwork(name)}
	files := []string{"lab.json", "kubeconfig", "pki", "etcd", "run"}
	for _, g := range guests {
		files = append(files, filepath.Base(g)+".host")
	}
	for _, file := range files {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, file)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove lab %s: %w", name, err)
	}
	return nil
}

// Names lists the labs that have a state directory, running or not.
func Names() ([]string, error) {
	all, err := base()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(all)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list labs: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && validName.MatchString(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Build makes all artefacts of a cluster with nodes of the given kinds.
func Build(ctx context.Context, progress io.Writer, kinds ...guest.Kind) error {
	repo, err := guest.Repo(".")
	if err != nil {
		return err
	}
	store, err := artefact.Open("", progress)
	if err != nil {
		return err
	}
	parts := cluster.NewParts(repo)
	for _, step := range []*artefact.Step{parts.Kubelab, parts.Root} {
		if _, err := store.Make(ctx, step); err != nil {
			return err
		}
	}
	for _, kind := range kinds {
		if _, err := guest.Build(ctx, store, kind, repo); err != nil {
			return err
		}
	}
	return nil
}

// Assets builds, if need be, and returns a directory for KUBEBUILDER_ASSETS:
// etcd, kube-apiserver and kubectl for tests that need an API server and no
// nodes.
func Assets(ctx context.Context, progress io.Writer) (string, error) {
	repo, err := guest.Repo(".")
	if err != nil {
		return "", err
	}
	store, err := artefact.Open("", progress)
	if err != nil {
		return "", err
	}
	return store.Make(ctx, cluster.NewParts(repo).Kubelab)
}

// Programs installs, if need be, what tests call on this machine.
func Programs(ctx context.Context, progress io.Writer) error {
	store, err := artefact.Open("", progress)
	if err != nil {
		return err
	}
	_, err = store.Make(ctx, artefact.Programs())
	return err
}

// OVS downloads, if need be, and returns a directory with Open vSwitch as Debian has
// it, and the libraries that not every machine or guest has.
func OVS(ctx context.Context, progress io.Writer) (string, error) {
	store, err := artefact.Open("", progress)
	if err != nil {
		return "", err
	}
	packages := []string{"openvswitch-common", "openvswitch-switch", "libbpf1", "libcap-ng0", "libelf1", "libevent-2.1-7", "libgmp10", "libhogweed6", "libnettle8", "libnuma1", "libssl3", "libunbound8", "libxdp1", "zlib1g"}
	return store.Make(ctx, &artefact.Step{
		Name:   "ovs",
		Inputs: []artefact.Input{artefact.Text("packages", strings.Join(packages, " "))},
		Build: func(ctx context.Context, b *artefact.Build) error {
			b.Say("downloading Open vSwitch")
			return b.Download(ctx, b.Out, packages...)
		},
	})
}
