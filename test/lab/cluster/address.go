package cluster

import (
	"fmt"
	"net/netip"
)

// Gateway is the host's address on the management bridge: the nodes' default
// route and the API server.
var Gateway = netip.AddrFrom4([4]byte{172, 30, 0, 1})

const (
	apiPort     = 6443
	podCIDR     = "10.244.0.0/16"
	serviceCIDR = "10.96.0.0/16"
)

// ServiceIP is the ClusterIP of the service "kubernetes": the first of the range.
var ServiceIP = netip.AddrFrom4([4]byte{10, 96, 0, 1})

// MaxNodes is the largest number of nodes: node N is 172.30.0.(10+N).
const MaxNodes = 99

// NodeName is the name of node n, counted from 1.
func NodeName(n int) string { return fmt.Sprintf("vm%d", n) }

// NodeAddress is the management address of node n with its prefix length.
func NodeAddress(n int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 30, 0, byte(10 + n)}), 24)
}

// nodePods is the range of the pods on node n.
func nodePods(n int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(n), 0}), 24)
}

// Taps are the interfaces in the lab's namespace that node n is plugged into.
type Taps struct {
	Mgmt string    // on brm
	Data [2]string // on brd0 and brd1
}

// NodeTaps names the taps of node n.
func NodeTaps(n int) Taps {
	return Taps{Mgmt: fmt.Sprintf("mgmt%d", n), Data: [2]string{fmt.Sprintf("data%d.0", n), fmt.Sprintf("data%d.1", n)}}
}
