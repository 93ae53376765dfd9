package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
	kjson "sigs.k8s.io/json"

	v1 "github.com/sluice-network/sluice/apis/sriovnetwork/v1"
	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/spelling"
)

// Config is the content of a file.
type Config struct {
	Resources []Resource
}

// Resource is one entry of the file's resourceList.
type Resource struct {
	Prefix, Name    string
	ExcludeTopology bool
	Spread          bool // a pod's VFs are taken from different PFs
	RequireCarrier  bool // VFs are offered while their PF has a carrier
	// Info is added to what a container is told of a device, by its PCI address, or by "*"
	// for all.
	Info      map[string]map[string]string
	Selectors []Selector // a VF must be selected by one
}

// Selector selects VFs by all that it has; an empty list filters nothing. The keys are
// the file's.
type Selector struct {
	Vendors      []string `json:"vendors"`      // PCI vendors, four hex digits
	Devices      []string `json:"devices"`      // PCI devices of VFs, four hex digits
	Drivers      []string `json:"drivers"`      // bound to VFs
	PCIAddresses []string `json:"pciAddresses"` // of VFs
	PFNames      []string `json:"pfNames"`      // with an optional choice of VFs, ens1f0#0-3,8
	RootDevices  []string `json:"rootDevices"`  // PCI addresses of PFs, with an optional choice of VFs
	LinkTypes    []string `json:"linkTypes"`    // ether, infiniband
	IsRdma       bool     `json:"isRdma"`       // VFs with an RDMA device, whose nodes are given
	NeedVhostNet bool     `json:"needVhostNet"` // /dev/vhost-net and /dev/net/tun are given
	VdpaType     string   `json:"vdpaType"`     // virtio, vhost
	SelectAll    bool     `json:"selectAll"`    // there are no filters, and that is meant. Added.

	pfs   []choice // of PFNames
	roots []choice // of RootDevices

	// What other devices have, or other drivers, to refuse it by name.
	DDPProfiles []string `json:"ddpProfiles"`
	PKeys       []string `json:"pKeys"`
	AcpiIndexes []string `json:"acpiIndexes"`
	AuxTypes    []string `json:"auxTypes"`
}

// choice is a PF with a choice of its VFs, all where there are no ranges.
type choice struct {
	pf     string
	ranges [][2]int // first and last
}

// file is the file as it is written.
type file struct {
	ResourceList []entry `json:"resourceList"`
}

type entry struct {
	ResourceName    string                       `json:"resourceName"`
	ResourcePrefix  string                       `json:"resourcePrefix"`
	DeviceType      string                       `json:"deviceType"`
	ExcludeTopology bool                         `json:"excludeTopology"`
	Selectors       json.RawMessage              `json:"selectors"` // an object or a list of objects
	AdditionalInfo  map[string]map[string]string `json:"additionalInfo"`

	// As of policies. Added.
	Allocation     string `json:"allocation"`
	RequireCarrier bool   `json:"requireCarrier"`
}

// Parse reads the content of a file. A resource without prefix gets the one given. The
// error tells of all that is wrong, with its path.
func Parse(data []byte, prefix string) (*Config, error) {
	f := &file{}
	if err := strict("", data, f); err != nil {
		return nil, err
	}
	if f.ResourceList == nil {
		return nil, errors.New(`resourceList is missing: write {"resourceList": [...]}`)
	}
	c := &Config{}
	var errs []error
	seen := map[string]int{}
	for i, e := range f.ResourceList {
		path := fmt.Sprintf("resourceList[%d]", i)
		r, err := e.resource(path, prefix)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		name := strings.ToLower(r.Prefix + "/" + r.Name)
		if other, twice := seen[name]; twice {
			errs = append(errs, fmt.Errorf("%s.resourceName %q: resourceList[%d] has this name already, letters of either case being the same: choose another, or give the resource one list of selectors", path, r.Name, other))
		}
		seen[name] = i
		c.Resources = append(c.Resources, *r)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return c, nil
}

// strict decodes JSON, which is at the path, and refuses what v has no field for.
func strict(path string, data []byte, v any) error {
	at := func(err error) error {
		if path == "" {
			return err
		}
		return fmt.Errorf("%s: %w", path, err)
	}
	wrong, err := kjson.UnmarshalStrict(data, v)
	if err != nil {
		return at(err)
	}
	errs := make([]error, 0, len(wrong))
	for _, err := range wrong {
		field, ok := err.(interface{ FieldPath() string })
		if !ok || !strings.HasPrefix(err.Error(), "unknown field") {
			errs = append(errs, at(err))
			continue
		}
		full := strings.TrimPrefix(path+"."+field.FieldPath(), ".")
		key := full[strings.LastIndexByte(full, '.')+1:]
		errs = append(errs, fmt.Errorf("%s: unknown key%s", full, spelling.DidYouMean(key, keysOf(v))))
	}
	return errors.Join(errs...)
}

// keysOf are the keys of the structs that v is made of.
func keysOf(v any) []string {
	var keys []string
	t := reflect.TypeOf(v)
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	for i := range t.NumField() {
		if tag := t.Field(i).Tag.Get("json"); tag != "" {
			keys = append(keys, tag)
			keys = append(keys, keysOf(reflect.Zero(t.Field(i).Type).Interface())...)
		}
	}
	return keys
}

const typeNetDevice = "netDevice"

var nameForm = regexp.MustCompile(`^[a-zA-Z0-9_-]+$`)

func (e *entry) resource(path, prefix string) (*Resource, error) {
	r := &Resource{Prefix: prefix, Name: e.ResourceName, ExcludeTopology: e.ExcludeTopology, Info: e.AdditionalInfo, RequireCarrier: e.RequireCarrier, Spread: e.Allocation == v1.AllocationSpread}
	if e.ResourcePrefix != "" {
		r.Prefix = e.ResourcePrefix
	}
	if !nameForm.MatchString(e.ResourceName) {
		return nil, fmt.Errorf("%s.resourceName %q: write letters, digits, '-' and '_'", path, e.ResourceName)
	}
	if why := validation.IsQualifiedName("requests." + r.Prefix + "/" + r.Name); len(why) > 0 {
		return nil, fmt.Errorf("%s: %s/%s is not a valid resource name: %s", path, r.Prefix, r.Name, strings.Join(why, "; "))
	}
	switch e.DeviceType {
	case "", typeNetDevice:
	case "accelerator", "auxNetDevice":
		return nil, fmt.Errorf("%s.deviceType %q is not supported: Sluice offers VFs of NICs, deviceType %s; let another device plugin offer these", path, e.DeviceType, typeNetDevice)
	default:
		return nil, fmt.Errorf("%s.deviceType %q: there is no such type: write %s", path, e.DeviceType, typeNetDevice)
	}
	if e.Allocation != "" && e.Allocation != v1.AllocationPack && !r.Spread {
		return nil, fmt.Errorf("%s.allocation %q: write %s or %s", path, e.Allocation, v1.AllocationPack, v1.AllocationSpread)
	}
	for device := range e.AdditionalInfo {
		if device != "*" && !host.ValidPCIAddress(device) {
			return nil, fmt.Errorf("%s.additionalInfo: key %q is neither * nor a PCI address like 0000:3b:02.0", path, device)
		}
	}
	paths, list, err := selectors(path, e.Selectors)
	if err != nil {
		return nil, err
	}
	for i, data := range list {
		s, where := Selector{}, paths[i]
		if err := strict(where, data, &s); err != nil {
			return nil, err
		}
		if err := s.check(where); err != nil {
			return nil, err
		}
		if len(r.Selectors) > 0 && s.gives() != r.Selectors[0].gives() {
			return nil, fmt.Errorf("%s: isRdma, needVhostNet and vdpaType must be the same in all selectors of resource %s: make two resources", where, r.Name)
		}
		r.Selectors = append(r.Selectors, s)
	}
	return r, nil
}

// selectors are the objects of a selectors key, which may be one or a list, with their
// paths.
func selectors(path string, data json.RawMessage) (paths []string, list []json.RawMessage, err error) {
	path += ".selectors"
	data = bytes.TrimSpace(data)
	switch {
	case len(data) == 0 || string(data) == "null":
	case data[0] == '[':
		if err = json.Unmarshal(data, &list); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", path, err)
		}
		for i := range list {
			paths = append(paths, path+"["+strconv.Itoa(i)+"]")
		}
	default:
		return []string{path}, []json.RawMessage{data}, nil
	}
	if len(list) == 0 {
		return nil, nil, fmt.Errorf(`%s: nothing is selected: write filters, or {"selectAll": true} for all VFs of the node`, path)
	}
	return paths, list, nil
}

// gives are the settings of a selector that are about what a container is given.
func (s *Selector) gives() [3]string {
	return [3]string{strconv.FormatBool(s.IsRdma), strconv.FormatBool(s.NeedVhostNet), s.VdpaType}
}

var hexForm = regexp.MustCompile(`^[0-9a-fA-F]{4}$`)

func (s *Selector) check(path string) error {
	for key, list := range map[string][]string{"ddpProfiles": s.DDPProfiles, "pKeys": s.PKeys, "acpiIndexes": s.AcpiIndexes, "auxTypes": s.AuxTypes} {
		if len(list) > 0 {
			return fmt.Errorf("%s.%s %q is not supported: select VFs by another key", path, key, list)
		}
	}
	hex := func(v string) string {
		if !hexForm.MatchString(v) {
			return "write four hex digits, such as 8086"
		}
		return ""
	}
	var err error
	for _, f := range []struct {
		key  string
		list []string
		bad  func(string) string
	}{
		{"vendors", s.Vendors, hex},
		{"devices", s.Devices, hex},
		{"drivers", s.Drivers, func(v string) string {
			if v == "" {
				return "write the name of a driver, such as iavf"
			}
			return ""
		}},
		{"pciAddresses", s.PCIAddresses, func(v string) string {
			if !host.ValidPCIAddress(v) {
				return "write a PCI address, such as 0000:3b:02.0"
			}
			return ""
		}},
		{"linkTypes", s.LinkTypes, func(v string) string {
			if linkTypes[v] == "" {
				return "write ether or infiniband" + spelling.DidYouMean(v, slices.Collect(maps.Keys(linkTypes)))
			}
			return ""
		}},
		{"pfNames", s.PFNames, func(v string) string { s.pfs, err = choose(s.pfs, v); return textOf(err) }},
		{"rootDevices", s.RootDevices, func(v string) string {
			s.roots, err = choose(s.roots, v)
			if err == nil && !host.ValidPCIAddress(s.roots[len(s.roots)-1].pf) {
				return "write the PCI address of a PF, such as 0000:3b:00.0"
			}
			return textOf(err)
		}},
	} {
		for i, v := range f.list {
			if why := f.bad(v); why != "" {
				return fmt.Errorf("%s.%s[%d] %q: %s", path, f.key, i, v, why)
			}
		}
	}
	filters := len(s.Vendors) + len(s.Devices) + len(s.Drivers) + len(s.PCIAddresses) + len(s.PFNames) + len(s.RootDevices) + len(s.LinkTypes)
	if s.IsRdma || s.VdpaType != "" {
		filters++
	}
	switch {
	case s.VdpaType != "" && s.VdpaType != host.VDPAVirtio && s.VdpaType != host.VDPAVhost:
		return fmt.Errorf("%s.vdpaType %q: write %s or %s", path, s.VdpaType, host.VDPAVirtio, host.VDPAVhost)
	case s.VdpaType != "" && s.IsRdma:
		return fmt.Errorf("%s: isRdma and vdpaType exclude each other: remove one", path)
	case filters == 0 && !s.SelectAll:
		return fmt.Errorf(`%s: it has no filter and would select every VF of the node: write one, or "selectAll": true if that is meant`, path)
	case filters > 0 && s.SelectAll:
		return fmt.Errorf("%s: selectAll true has filters beside it: remove it or them", path)
	}
	return nil
}

func textOf(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// choose reads a PF with an optional choice of VFs: ens1f0#0-3,8.
func choose(all []choice, text string) ([]choice, error) {
	pf, list, some := strings.Cut(text, "#")
	c := choice{pf: pf}
	if pf == "" {
		return all, errors.New("write the PF before the choice of VFs")
	}
	if some {
		for part := range strings.SplitSeq(list, ",") {
			low, high, isRange := strings.Cut(part, "-")
			first, err := vfNumber(low)
			last := first
			if err == nil && isRange {
				last, err = vfNumber(high)
			}
			if err != nil || last < first {
				return all, fmt.Errorf("%q is not a choice of VFs: write first-last, one number, or a list of these, as in ens1f0#0-3,8", part)
			}
			c.ranges = append(c.ranges, [2]int{first, last})
		}
	}
	return append(all, c), nil
}

// vfNumber reads the number of a VF, of which a PF has at most 65536 (16 bits in
// the SR-IOV capability).
func vfNumber(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	return int(n), err
}
