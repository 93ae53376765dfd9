package render

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Range is addresses that the cluster itself uses, and what for.
type Range struct {
	netip.Prefix
	For string // such as "Services (ServiceCIDR kubernetes)"
}

// Overlapping says which of the subnets that a field asks for the cluster uses already. A pod
// with an interface in such a subnet looks for Services, or pods, on that link and finds
// nobody.
func Overlapping(path *field.Path, subnets []netip.Prefix, used []Range) field.ErrorList {
	var errs field.ErrorList
	for _, subnet := range subnets {
		var first Range // in an order of their own, so that the same is said of the same
		more := -1
		for _, r := range used {
			if !subnet.Overlaps(r.Prefix) {
				continue
			}
			if more++; more == 0 || cmp.Or(cmp.Compare(r.For, first.For), r.Compare(first.Prefix)) < 0 {
				first = r
			}
		}
		if more < 0 {
			continue
		}
		text := fmt.Sprintf("it overlaps %s, which the cluster uses for %s", first.Prefix, first.For)
		if more > 0 {
			text += fmt.Sprintf(", and %d more such ranges", more)
		}
		errs = append(errs, field.Invalid(path, subnet.String(), text+
			": pods with an interface in it would look for those addresses on this network and find nobody: choose another subnet"))
	}
	return errs
}

// Subnets are those that the network's ipam puts interfaces into, as far as it says so in the
// way of host-local, static or whereabouts. What is no subnet is for these plugins to refuse.
func (n *Network) Subnets() []netip.Prefix { return subnets(n.ipam) }

func subnets(ipam string) []netip.Prefix {
	var config struct{ Type string }
	if json.Unmarshal([]byte(ipam), &config) != nil {
		return nil
	}
	var texts []string
	switch config.Type {
	case "host-local":
		var c struct {
			Subnet string
			Ranges [][]struct{ Subnet string }
		}
		if json.Unmarshal([]byte(ipam), &c) != nil {
			return nil
		}
		texts = append(texts, c.Subnet)
		for _, set := range c.Ranges {
			for _, r := range set {
				texts = append(texts, r.Subnet)
			}
		}
	case "static":
		var c struct{ Addresses []struct{ Address string } }
		if json.Unmarshal([]byte(ipam), &c) != nil {
			return nil
		}
		for _, a := range c.Addresses {
			texts = append(texts, a.Address)
		}
	case "whereabouts":
		var c struct {
			Range    string
			IPRanges []struct{ Range string }
		}
		if json.Unmarshal([]byte(ipam), &c) != nil {
			return nil
		}
		for _, r := range append(c.IPRanges, struct{ Range string }{c.Range}) {
			// It may be <first>-<last>/<bits>.
			texts = append(texts, r.Range[strings.Index(r.Range, "-")+1:])
		}
	}
	var all []netip.Prefix
	for _, text := range texts {
		if prefix, err := netip.ParsePrefix(strings.TrimSpace(text)); err == nil {
			all = append(all, prefix.Masked())
		}
	}
	return all
}
