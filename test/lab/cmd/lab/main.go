// Command lab starts, shows and ends Kubernetes clusters with SR-IOV cards on
// this machine.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/sluice-network/sluice/test/lab"
	"github.com/sluice-network/sluice/test/lab/artefact"
	"github.com/sluice-network/sluice/test/lab/guest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := command().ExecuteContext(ctx)
	stop()
	var (
		inGuest *guest.ExitError
		kubectl saidWhy
	)
	switch {
	case err == nil:
		return
	case errors.As(err, &inGuest):
		os.Exit(inGuest.Status)
	case errors.As(err, &kubectl):
		os.Exit(max(1, kubectl.ExitCode()))
	}
	fmt.Fprintln(os.Stderr, "lab:", err)
	os.Exit(1)
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "lab",
		Short: "Kubernetes clusters with SR-IOV cards, on a machine that has none",
		Long: `lab runs a Kubernetes cluster on this machine: the control plane as processes
in a network namespace, the nodes as guests with emulated SR-IOV cards.

SLUICE_LAB_NAME names the lab, so that several can run side by side; the
default is "sluice-lab". Artefacts are built once and kept in
${XDG_CACHE_HOME:-~/.cache}/sluice.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(up(), down(), status(), load(), execute(), console(), logs(), kubectl(), build(), assets(), ovs(), programs(), gc())
	return root
}

func up() *cobra.Command {
	var (
		o    lab.Options
		kind string
	)
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start a cluster and wait until its nodes are Ready",
		Long: `up builds what is missing, starts a cluster and returns when its nodes are
Ready. When the same cluster runs already, that one is kept. What a killed lab
left behind is removed first.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Kind, o.Progress = guest.Kind(kind), cmd.ErrOrStderr()
			c, err := lab.Up(cmd.Context(), o)
			if err != nil {
				return err
			}
			return report(cmd.OutOrStdout(), c)
		},
	}
	cmd.Flags().StringVar(&kind, "kind", environment("LAB", string(guest.UML)), `kind of the nodes, "uml" or "qemu"; default from $LAB`)
	cmd.Flags().IntVar(&o.Nodes, "nodes", 2, "number of nodes")
	cmd.Flags().IntVar(&o.Card.TotalVFs, "vfs", 0, "largest number of VFs of each card of a UML node (default 16)")
	cmd.Flags().StringArrayVar(&o.Images, "image", nil, "image archive to load into every node; may be given again")
	return cmd
}

// environment is the value of a variable, or another if it is not set.
func environment(name, other string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return other
}

func down() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "down",
		Short: "End the cluster and remove all that it made",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			names := []string{lab.DefaultName()}
			if all {
				var err error
				if names, err = lab.Names(); err != nil {
					return err
				}
			}
			var errs []error
			for _, name := range names {
				start := time.Now()
				if err := lab.Down(name); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "lab %s is down (%.1f s)\n", name, time.Since(start).Seconds())
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "end every lab of this user, not only $SLUICE_LAB_NAME")
	return cmd
}

func status() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show processes, nodes and where the logs are",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := lab.Attach("")
			if err != nil {
				return err
			}
			if err := report(cmd.OutOrStdout(), c); err != nil {
				return err
			}
			return run(c.KubectlCommand(cmd.Context(), "get", "nodes", "-o", "wide"))
		},
	}
}

func report(out io.Writer, c *lab.Cluster) error {
	var b strings.Builder
	fmt.Fprintf(&b, "lab %s: %d %s nodes, up since %s, started in %.1f s\n", c.Name, len(c.Nodes), c.Kind, c.Started.Format(time.DateTime), c.Took.Seconds())
	fmt.Fprintf(&b, "  KUBECONFIG=%s\n", c.Kubeconfig())
	for _, p := range c.Processes() {
		state := "ended"
		if pid, running := p.Pid(); running {
			state = fmt.Sprintf("pid %d", pid)
		}
		fmt.Fprintf(&b, "  %-24s %-12s %s\n", p.Name, state, p.Log())
	}
	for _, node := range c.Nodes {
		state := "ended"
		if guest.Alive(node.Dir) {
			state = "running"
		}
		fmt.Fprintf(&b, "  %-24s %-12s %s\n", node.Name, state, node.Net.Address.Addr())
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func load() *cobra.Command {
	return &cobra.Command{
		Use:   "load ARCHIVE...",
		Short: "Load image archives into every node",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := lab.Attach("")
			if err != nil {
				return err
			}
			for _, archive := range args {
				if err := c.Load(cmd.Context(), archive); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func execute() *cobra.Command {
	return &cobra.Command{
		Use:   "exec NODE [--] COMMAND [ARGUMENT]...",
		Short: "Run a command on a node",
		Example: `  lab exec vm1 -- ip -br link
  lab exec vm1 -- sh -c 'echo 4 > /sys/class/net/ens1f0/device/sriov_numvfs'`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := lab.Attach("")
			if err != nil {
				return err
			}
			node, err := c.Node(args[0])
			if err != nil {
				return err
			}
			return node.Exec(cmd.Context(), guest.Command{Args: args[1:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
		},
	}
}

func console() *cobra.Command {
	var lines int
	cmd := &cobra.Command{
		Use:   "console NODE",
		Short: "Show the end of a node's console",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := lab.Attach("")
			if err != nil {
				return err
			}
			node, err := c.Node(args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), node.ConsoleTail(lines))
			return err
		},
	}
	cmd.Flags().IntVarP(&lines, "lines", "n", 50, "number of lines")
	return cmd
}

// nodeLogs are the logs inside a node.
var nodeLogs = []string{"start", "kubelet", "kube-proxy", "containerd", "multus"}

func logs() *cobra.Command {
	var lines int
	cmd := &cobra.Command{
		Use:   "logs PROCESS | NODE [LOG]",
		Short: "Show the end of a log",
		Long:  "logs shows the end of a log: of a process of the control plane, or of a node,\nwhere LOG is one of " + strings.Join(nodeLogs, ", ") + ".",
		Args:  cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := lab.Attach("")
			if err != nil {
				return err
			}
			var names []string
			for _, p := range c.Processes() {
				if p.Name == args[0] && len(args) == 1 {
					_, err = fmt.Fprintln(cmd.OutOrStdout(), p.Tail(lines))
					return err
				}
				names = append(names, p.Name)
			}
			node, err := c.Node(args[0])
			if err != nil {
				return fmt.Errorf("log of %s: no process of the control plane (%s), and %w", args[0], strings.Join(names, ", "), err)
			}
			wanted := nodeLogs
			if len(args) == 2 {
				if !slices.Contains(nodeLogs, args[1]) {
					return fmt.Errorf("log %q of node %s: want one of %s", args[1], args[0], strings.Join(nodeLogs, ", "))
				}
				wanted = args[1:]
			}
			tail := []string{"tail", "-n", fmt.Sprint(lines)}
			for _, name := range wanted {
				tail = append(tail, "/var/log/"+name+".log")
			}
			return node.Exec(cmd.Context(), guest.Command{Args: tail, Stdout: os.Stdout, Stderr: os.Stderr})
		},
	}
	cmd.Flags().IntVarP(&lines, "lines", "n", 50, "number of lines")
	return cmd
}

func kubectl() *cobra.Command {
	return &cobra.Command{
		Use:                "kubectl [ARGUMENT]...",
		Short:              "Run the lab's kubectl as the administrator",
		DisableFlagParsing: true, // the flags are kubectl's
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := lab.Attach("")
			if err != nil {
				return err
			}
			return run(c.KubectlCommand(cmd.Context(), args...))
		},
	}
}

// saidWhy is the failure of a command that had this process's streams.
type saidWhy struct{ *exec.ExitError }

// run runs a command with this process's streams.
func run(cmd *exec.Cmd) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return saidWhy{exit}
	}
	return err
}

func build() *cobra.Command {
	var kinds []string
	cmd := &cobra.Command{
		Use:   "build",
		Short: "Build what a cluster starts from, and start nothing",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var of []guest.Kind
			for _, kind := range kinds {
				of = append(of, guest.Kind(kind))
			}
			return lab.Build(cmd.Context(), cmd.ErrOrStderr(), of...)
		},
	}
	cmd.Flags().StringSliceVar(&kinds, "kind", []string{string(guest.UML)}, "kinds of nodes to build for")
	return cmd
}

func assets() *cobra.Command {
	return printing("assets", "Print a directory for KUBEBUILDER_ASSETS, building it if need be", lab.Assets)
}

func ovs() *cobra.Command {
	return printing("ovs", "Print a directory for SLUICE_OVS, downloading it if need be", lab.OVS)
}

func programs() *cobra.Command {
	return &cobra.Command{
		Use:   "programs",
		Short: "Install, if need be, the programs that tests call on this machine",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return lab.Programs(cmd.Context(), cmd.ErrOrStderr()) },
	}
}

// printing is a command that prints the directory that get makes.
func printing(use, short string, get func(context.Context, io.Writer) (string, error)) *cobra.Command {
	return &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := get(cmd.Context(), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), filepath.Clean(dir))
			return err
		},
	}
}

func gc() *cobra.Command {
	var unused time.Duration
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove what is no longer needed from the cache of artefacts",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			store, err := artefact.Open("", cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			removed, err := store.Collect(cmd.Context(), unused)
			for _, path := range removed {
				fmt.Fprintln(cmd.OutOrStdout(), path)
			}
			return err
		},
	}
	cmd.Flags().DurationVar(&unused, "unused", 24*time.Hour, "keep what was used in this time")
	return cmd
}
