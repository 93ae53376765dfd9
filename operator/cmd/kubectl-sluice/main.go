// Command kubectl-sluice is kubectl's plugin "sluice": what people ask of a cluster with
// Sluice, on their own machine and with their own rights.
//
//	kubectl sluice explain POD --from PEER | --to PEER
//
// It only reads. It wires cni/explain to a kubeconfig.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/sluice-network/sluice/cni/explain"
	"github.com/sluice-network/sluice/cni/policy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{Use: "kubectl-sluice", Short: "Ask a cluster with Sluice", SilenceUsage: true, SilenceErrors: true}
	root.AddCommand(explainCommand())
	return root
}

func explainCommand() *cobra.Command {
	var kubeconfig, context, protocol, from, to string
	var q explain.Question
	c := &cobra.Command{
		Use: "explain POD --from PEER | --to PEER", Args: cobra.ExactArgs(1),
		Short:   "Tell which policy and rule decides of a connection between a pod and a peer, and where that is enforced",
		Example: "  kubectl sluice explain db-0 --from web-1 --port 5432\n  kubectl sluice explain web-1 --to 192.0.2.7 --protocol udp --port 53 --network storage-net",
	}
	f := c.Flags()
	f.StringVar(&kubeconfig, "kubeconfig", "", "file to reach the cluster by, kubectl's if empty")
	f.StringVar(&context, "context", "", "context of the kubeconfig")
	f.StringVarP(&q.Namespace, "namespace", "n", "", "namespace of the pod, the context's if empty")
	f.StringVar(&from, "from", "", "pod, [namespace/]pod, or address that connects to the pod")
	f.StringVar(&to, "to", "", "pod, [namespace/]pod, or address that the pod connects to")
	f.StringVar(&q.Network, "network", "", "NetworkAttachmentDefinition, [namespace/]name; all that both are on if empty")
	f.StringVar(&protocol, "protocol", "tcp", "tcp, udp, sctp, or an IP protocol's number")
	f.Uint16Var(&q.Port, "port", 0, "port of whoever is connected to")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if (from == "") == (to == "") {
			return errors.New("give either --from or --to")
		}
		q.Pod, q.Peer, q.From = args[0], from+to, from != ""
		var err error
		if q.Protocol, err = protocolNumber(protocol); err != nil {
			return err
		}
		config, namespace, err := connect(kubeconfig, context)
		if err != nil {
			return err
		}
		if q.Namespace == "" {
			q.Namespace = namespace
		}
		ctx, cancel := withTimeout(cmd)
		defer cancel()
		cluster, err := explain.Read(ctx, config)
		if err != nil {
			return err
		}
		answer, err := cluster.Explain(q)
		if err != nil {
			return err
		}
		_, err = fmt.Fprint(cmd.OutOrStdout(), answer)
		return err
	}
	return c
}

func withTimeout(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	return context.WithTimeout(cmd.Context(), time.Minute)
}

// connect finds the cluster as kubectl does, and the namespace of its context.
func connect(kubeconfig, context string) (*rest.Config, string, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	c := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: context})
	namespace, _, err := c.Namespace()
	if err != nil {
		return nil, "", err
	}
	config, err := c.ClientConfig()
	return config, namespace, err
}

// protocolNumber is the number of an IP protocol by what people call it.
func protocolNumber(text string) (uint8, error) {
	if n, ok := map[string]uint8{"tcp": policy.TCP, "udp": policy.UDP, "sctp": policy.SCTP}[strings.ToLower(text)]; ok {
		return n, nil
	}
	n, err := strconv.ParseUint(text, 10, 8)
	if err != nil {
		return 0, fmt.Errorf("--protocol is %q: it is tcp, udp, sctp, or a number up to 255", text)
	}
	return uint8(n), nil
}
