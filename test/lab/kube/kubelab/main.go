// Command kubelab is the lab's Kubernetes in one file: etcd, the API server,
// the controller manager and the scheduler share most of their code, so together
// they are built and linked once instead of four times. kubectl is left out: tests
// call it thousands of times, and what all the others prepare when they start would
// be three quarters of each call.
//
// The program that runs is named by argv[0] (a link called kube-apiserver,
// say, as test environments expect) or, when that is kubelab, by the first
// argument. "kubelab relay ADDRESS" carries connections accepted on the
// inherited descriptor 3 to ADDRESS.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

var programs = map[string]func(){
	"etcd":                    func() { etcdmain.Main(os.Args) },
	"kube-apiserver":          func() { os.Exit(cli.Run(apiserver.NewAPIServerCommand())) },
	"kube-controller-manager": func() { os.Exit(cli.Run(controllermanager.NewControllerManagerCommand())) },
	"kube-scheduler":          func() { os.Exit(cli.Run(scheduler.NewSchedulerCommand())) },
	"relay": func() {
		if err := relay(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "kubelab relay:", err)
			os.Exit(1)
		}
	},
}

func main() {
	run, ok := programs[filepath.Base(os.Args[0])]
	if !ok && len(os.Args) > 1 {
		os.Args = os.Args[1:]
		run, ok = programs[os.Args[0]]
	}
	if !ok {
		names := make([]string, 0, len(programs))
		for name := range programs {
			names = append(names, name)
		}
		slices.Sort(names)
		fmt.Fprintf(os.Stderr, "usage: kubelab %s [ARGUMENT]...\n", strings.Join(names, "|"))
		os.Exit(2)
	}
	run()
}
