package attach

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/sluice-network/sluice/internal/host"
	"github.com/sluice-network/sluice/internal/netselect"
	"github.com/sluice-network/sluice/internal/spelling"
)

// Command is a verb of the CNI specification.
type Command string

// The verbs.
const (
	Add    Command = "ADD"
	Del    Command = "DEL"
	Check  Command = "CHECK"
	Status Command = "STATUS"
	GC     Command = "GC"
)

// since is the specification version that brought a verb.
var since = map[Command]int{Add: 0, Del: 0, Check: 1, Status: 3, GC: 3}

// Versions are the versions of the CNI specification spoken here, oldest first.
var Versions = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// Request is one call of the plugin.
type Request struct {
	Command     Command
	ContainerID string
	Netns       string // path, CNI_NETNS; may be empty for DEL
	IfName      string
	Args        string           // CNI_ARGS
	Path        string           // CNI_PATH
	Stdin       []byte           // the network configuration
	MAC         net.HardwareAddr // of the interface; only in calls of an IPAM
}

// KeyOf is the attachment that a call is about.
func KeyOf(req Request) Key {
	var conf struct {
		Name string `json:"name"`
	}
	_ = json.Unmarshal(req.Stdin, &conf)
	return Key{conf.Name, req.ContainerID, req.IfName}
}

// Config is a valid network configuration, with the pod's wishes in it.
type Config struct {
	CNIVersion string
	Network    string // its name
	DeviceID   string // PCI address of the VF, or MacVLAN slot; empty for a parent that the configuration names
	IPAM       string // plugin type, empty for none
	DNS        types.DNS
	Pod        string // namespace/name as far as the runtime told
	PodUID     string // likewise

	MAC       net.HardwareAddr // nil: the baseline's
	MTU       int              // 0: the baseline's
	VLAN      *int
	VLANQoS   int
	VLANProto host.VLANProto
	SpoofChk  *bool
	Trust     *bool
	LinkState *host.LinkState
	MinTxRate *int // Mb/s
	MaxTxRate *int // Mb/s
	Promisc   *bool
	AllMulti  *bool
	RDMA      bool // the VF's RDMA device goes to the pod, too

	Macvlan *Macvlan // nil for a VF

	ConflictProbe time.Duration // how long to listen for other stations with the addresses; 0: not at all
	HostInterface bool          // a pair of links to the host besides
	HostRoutes    []network     // that the pod has by it, besides the node's address

	PrevResult json.RawMessage
	Valid      []types.GCAttachment // GC only: the attachments that stay
}

// Settings are the VF settings that the configuration asks for: the baseline
// and, on top of it, what is written. asked are the written ones.
func (c *Config) Settings(baseline Baseline) (want host.VFSettings, asked host.VFAttrs) {
	want = baseline.Settings()
	set := func(bit host.VFAttrs, written bool) bool {
		if written {
			asked |= bit
		}
		return written
	}
	if set(host.VFMAC, c.MAC != nil) {
		want.MAC = c.MAC
	}
	if set(host.VFVLAN, c.VLAN != nil) {
		want.VLAN, want.VLANQoS, want.VLANProto = *c.VLAN, c.VLANQoS, c.VLANProto
	}
	if set(host.VFSpoofChk, c.SpoofChk != nil) {
		want.SpoofChk = *c.SpoofChk
	}
	if set(host.VFTrust, c.Trust != nil) {
		want.Trust = *c.Trust
	}
	if set(host.VFLinkState, c.LinkState != nil) {
		want.LinkState = *c.LinkState
	}
	if set(host.VFRate, c.MinTxRate != nil) {
		want.MinTxRate = *c.MinTxRate
	}
	if set(host.VFRate, c.MaxTxRate != nil) {
		want.MaxTxRate = *c.MaxTxRate
	}
	return want, asked
}

// field reads one key of the configuration into p. Nil means that the key is
// valid and of no interest here: it belongs to the runtime, to libcni or to the
// IPAM plugin.
type field func(p *parser, raw json.RawMessage) error

// fields are all the keys a network configuration may have.
var fields = map[string]field{
	"cniVersion": text(func(p *parser) *string { return &p.CNIVersion }),
	"name":       text(func(p *parser) *string { return &p.Network }),
	"deviceID":   text(func(p *parser) *string { return &p.DeviceID }),
	"type":       text(func(p *parser) *string { return &p.kind }),

	"vlan":        number(func(p *parser) **int { return &p.VLAN }),
	"vlanQoS":     number(func(p *parser) **int { return &p.qos }),
	"vlanProto":   text(func(p *parser) *string { return &p.proto }),
	"mac":         text(func(p *parser) *string { return &p.mac }),
	"mtu":         number(func(p *parser) **int { return &p.mtu }),
	"spoofchk":    onOff(func(p *parser) **bool { return &p.SpoofChk }),
	"trust":       onOff(func(p *parser) **bool { return &p.Trust }),
	"link_state":  linkState,
	"min_tx_rate": number(func(p *parser) **int { return &p.MinTxRate }),
	"max_tx_rate": number(func(p *parser) **int { return &p.MaxTxRate }),
	"promisc":     decode(func(p *parser) any { return &p.Promisc }),
	"allmulti":    decode(func(p *parser) any { return &p.AllMulti }),
	"rdma":        decode(func(p *parser) any { return &p.RDMA }),

	"master":          text(func(p *parser) *string { return &p.macvlan.Parent }),
	"mode":            mode,
	"linkInContainer": decode(func(p *parser) any { return &p.macvlan.InPod }),
	"bcqueuelen":      number(func(p *parser) **int { return &p.bcQueueLen }),

	"conflictProbe": number(func(p *parser) **int { return &p.probe }),
	"hostInterface": hostInterface,

	"logLevel": logLevel,
	"logFile":  text(func(*parser) *string { return new(string) }),

	"ipam":          ipam,
	"dns":           decode(func(p *parser) any { return &p.DNS }),
	"capabilities":  decode(func(*parser) any { return new(map[string]bool) }),
	"runtimeConfig": runtimeConfig,
	"args":          decode(func(*parser) any { return new(map[string]any) }),
	"prevResult":    decode(func(p *parser) any { return &p.PrevResult }),
	"pciBusID":      text(func(*parser) *string { return new(string) }), // Multus writes it next to deviceID

	"cni.dev/valid-attachments": decode(func(p *parser) any { return &p.Valid }),
	"cni.dev/attachments":       nil,
}

// vfKeys and macvlanKeys are the keys that mean something for one kind only.
var (
	vfKeys      = []string{"vlan", "vlanQoS", "vlanProto", "spoofchk", "trust", "link_state", "min_tx_rate", "max_tx_rate", "promisc", "allmulti", "rdma"}
	macvlanKeys = []string{"master", "mode", "linkInContainer", "bcqueuelen"}
)

// runtimeKeys are the keys below runtimeConfig: the capabilities of the CNI
// conventions and of the Network Plumbing Working Group.
var runtimeKeys = map[string]field{
	"mac":      text(func(p *parser) *string { return &p.runtimeMAC }),
	"deviceID": nil, "CNIDeviceInfoFile": nil, "ips": nil, "ipRanges": nil, "dns": nil, "aliases": nil,
	"portMappings": nil, "bandwidth": nil, "infinibandGUID": noGUID, "cgroupPath": nil,
	"io.kubernetes.cri.pod-annotations": nil,
}

// parser is a Config in the making.
type parser struct {
	Config
	kind, proto, mac, runtimeMAC string
	qos, mtu, bcQueueLen, probe  *int
	macvlan                      Macvlan
}

// Parse reads a request's configuration. All errors carry CNI code 7 (6 when it
// is no JSON object, 4 for a bad environment, 1 for an unknown version) and name
// network, key and value.
func Parse(req Request) (*Config, error) {
	keys, err := object(req.Stdin)
	if err != nil {
		return nil, fail(types.ErrDecodingFailure, "read network configuration: %w", err)
	}
	p := &parser{}
	// The name first: every other message begins with it.
	if raw, ok := keys["name"]; ok {
		_ = json.Unmarshal(raw, &p.Network)
	}
	if err := p.parse(req, keys); err != nil {
		var coded *codedError
		if !errors.As(err, &coded) {
			err = fail(types.ErrInvalidNetworkConfig, "network %q: %w", p.Network, err)
		}
		return nil, err
	}
	return &p.Config, nil
}

func (p *parser) parse(req Request, keys map[string]json.RawMessage) error {
	if err := p.read("", keys, fields); err != nil {
		return err
	}
	if p.Network == "" {
		return fmt.Errorf(`key "name" is missing`)
	}
	version := slices.Index(Versions, p.CNIVersion)
	if version < 0 {
		return fail(types.ErrIncompatibleCNIVersion, "network %q: cniVersion %q is not supported: use one of %s",
			p.Network, p.CNIVersion, strings.Join(Versions, ", "))
	}
	if first, known := since[req.Command]; !known {
		return fail(types.ErrInvalidEnvironmentVariables, "CNI_COMMAND %q is unknown", req.Command)
	} else if version < first {
		return fail(types.ErrIncompatibleCNIVersion, "network %q: %s needs cniVersion %s or later, not %s",
			p.Network, req.Command, Versions[first], p.CNIVersion)
	}
	perPod := req.Command == Add || req.Command == Del || req.Command == Check
	if perPod {
		if err := checkEnvironment(req); err != nil {
			return err
		}
	}
	args, err := parseArgs(req.Args)
	if err != nil {
		return err
	}
	p.Pod, p.PodUID = strings.Trim(args["K8S_POD_NAMESPACE"]+"/"+args["K8S_POD_NAME"], "/"), args["K8S_POD_UID"]
	if err := p.chooseKind(req.Command, keys); err != nil {
		return err
	}
	if req.Command == Add && len(p.PrevResult) > 0 {
		return fmt.Errorf("prevResult is set: this plugin must be the first of its chain")
	}
	if err := p.checkVLAN(); err != nil {
		return err
	}
	if err := p.checkRates(); err != nil {
		return err
	}
	if err := p.checkInterface(); err != nil {
		return err
	}
	return p.chooseMAC(args["MAC"])
}

// checkInterface checks what holds for interfaces of every kind.
func (p *parser) checkInterface() error {
	if p.HostInterface && p.IPAM == "" {
		return fmt.Errorf("hostInterface is set and ipam is not: there are no addresses to lead to")
	}
	if p.probe != nil {
		if *p.probe < 0 || *p.probe > 10_000 {
			return fmt.Errorf("conflictProbe %d is not in the range 0-10000 (milliseconds; 0: no probe)", *p.probe)
		}
		p.ConflictProbe = time.Duration(*p.probe) * time.Millisecond
	}
	if p.mtu != nil && (*p.mtu != 0 || p.Macvlan == nil) { // 0 is the reference macvlan plugin's default
		// 68 is the least an IPv4 host must take (RFC 791); the driver knows the most.
		if *p.mtu < 68 || *p.mtu > 65535 {
			return fmt.Errorf("mtu %d is not in the range 68-65535", *p.mtu)
		}
		p.MTU = *p.mtu
	}
	return nil
}

// defaultProbe is how long other stations may take to answer for an address of a
// MacVLAN sub-interface. Neighbours on a LAN answer within a few milliseconds; RFC 5227
// would have a pod wait for seconds.
const defaultProbe = 50 * time.Millisecond

// chooseKind decides between VF and MacVLAN by type and deviceID, and refuses keys
// of the other kind.
func (p *parser) chooseKind(c Command, keys map[string]json.RawMessage) error {
	parent, _, notSlot := host.ParseSlotID(p.DeviceID)
	slot, vf := notSlot == nil, host.ValidPCIAddress(p.DeviceID)
	switch {
	case p.DeviceID != "" && !slot && !vf:
		return fmt.Errorf("deviceID %q is not a PCI address like 0000:3b:02.1, nor a MacVLAN slot like ens1f0-0", p.DeviceID)
	case p.kind == "sriov" && slot:
		return fmt.Errorf(`deviceID %q is a MacVLAN slot, and type "sriov" is for VFs: set type to "sluice"`, p.DeviceID)
	case p.kind == "macvlan" && vf:
		return fmt.Errorf(`deviceID %q is a VF, and type "macvlan" makes sub-interfaces of a master: set type to "sluice", or remove resource and deviceID`, p.DeviceID)
	case slot, p.kind == "macvlan", p.DeviceID == "" && p.kind != "sriov" && p.macvlan.Parent != "":
		return p.completeMacvlan(parent, keys)
	case vf, p.kind == "sriov":
		if k := given(keys, macvlanKeys); k != "" {
			return fmt.Errorf("%s %s is a setting of MacVLAN networks, and this is one of VFs: remove it", k, show(keys[k]))
		}
	}
	if p.DeviceID == "" && (c == Add || c == Check) {
		return fmt.Errorf(`key "deviceID" is missing: the pod must request the resource that the network names in its annotation k8s.v1.cni.cncf.io/resourceName`)
	}
	return nil
}

// given returns the first of the keys that has a value.
func given(keys map[string]json.RawMessage, which []string) string {
	for _, k := range which {
		if raw, ok := keys[k]; ok && string(raw) != "null" && string(raw) != `""` {
			return k
		}
	}
	return ""
}

// completeMacvlan checks what is for MacVLAN. slotParent is empty without a slot.
func (p *parser) completeMacvlan(slotParent string, keys map[string]json.RawMessage) error {
	if k := given(keys, vfKeys); k != "" {
		return fmt.Errorf("%s %s is a setting of VFs, and this is a MacVLAN network: remove it", k, show(keys[k]))
	}
	if slotParent != "" {
		if p.macvlan.InPod {
			return fmt.Errorf("linkInContainer true is for a master in the pod, and the parent of slot %q is in the host: remove one of both", p.DeviceID)
		}
		if p.macvlan.Parent != "" && p.macvlan.Parent != slotParent {
			return fmt.Errorf("master %q is not the parent of slot %q: remove master, or let the pods request the resource of master's slots", p.macvlan.Parent, p.DeviceID)
		}
		p.macvlan.Parent = slotParent
	}
	if p.macvlan.Parent != "" && !netselect.ValidInterface(p.macvlan.Parent) {
		return fmt.Errorf("master %q is not a valid interface name", p.macvlan.Parent)
	}
	if p.bcQueueLen != nil {
		if *p.bcQueueLen < 0 || *p.bcQueueLen > 1<<32-1 {
			return fmt.Errorf("bcqueuelen %d is not a number of frames (0: the kernel's default)", *p.bcQueueLen)
		}
		p.macvlan.BroadcastQueue = *p.bcQueueLen
	}
	if p.macvlan.Mode == "" {
		p.macvlan.Mode = "bridge"
	}
	p.Macvlan, p.ConflictProbe = &p.macvlan, defaultProbe
	return nil
}

func checkEnvironment(req Request) error {
	bad := func(format string, a ...any) error {
		return fail(types.ErrInvalidEnvironmentVariables, format, a...)
	}
	switch {
	case req.ContainerID == "":
		return bad("CNI_CONTAINERID is empty")
	case !netselect.ValidInterface(req.IfName):
		return bad("CNI_IFNAME %q is not a valid interface name", req.IfName)
	case req.Netns == "" && req.Command != Del:
		return bad("CNI_NETNS is empty")
	}
	return nil
}

func (p *parser) checkVLAN() error {
	if p.VLAN == nil {
		if p.qos != nil && *p.qos != 0 {
			return fmt.Errorf("vlanQoS %d is set and vlan is not: set vlan or remove vlanQoS", *p.qos)
		}
		if p.proto != "" {
			return fmt.Errorf("vlanProto %q is set and vlan is not: set vlan or remove vlanProto", p.proto)
		}
		return nil
	}
	// 4095 is reserved (IEEE 802.1Q-2018, table 9-2).
	if *p.VLAN < 0 || *p.VLAN > 4094 {
		return fmt.Errorf("vlan %d is not in the range 0-4094", *p.VLAN)
	}
	if p.qos != nil {
		if *p.qos < 0 || *p.qos > 7 {
			return fmt.Errorf("vlanQoS %d is not in the range 0-7", *p.qos)
		}
		if *p.qos > 0 && *p.VLAN == 0 {
			return fmt.Errorf("vlanQoS %d needs a vlan other than 0", *p.qos)
		}
		p.VLANQoS = *p.qos
	}
	switch strings.ToLower(p.proto) {
	case "", "802.1q":
		p.VLANProto = host.Dot1Q
	case "802.1ad":
		if *p.VLAN == 0 {
			return fmt.Errorf("vlanProto %q needs a vlan other than 0", p.proto)
		}
		p.VLANProto = host.Dot1AD
	default:
		return fmt.Errorf(`vlanProto %q is not "802.1q" or "802.1ad"`, p.proto)
	}
	return nil
}

func (p *parser) checkRates() error {
	for key, rate := range map[string]*int{"min_tx_rate": p.MinTxRate, "max_tx_rate": p.MaxTxRate} {
		if rate != nil && (*rate < 0 || *rate > 1<<31-1) {
			return fmt.Errorf("%s %d is not a rate in Mb/s (0: no limit)", key, *rate)
		}
	}
	if p.MinTxRate != nil && p.MaxTxRate != nil && *p.MaxTxRate > 0 && *p.MinTxRate > *p.MaxTxRate {
		return fmt.Errorf("min_tx_rate %d is above max_tx_rate %d", *p.MinTxRate, *p.MaxTxRate)
	}
	return nil
}

// chooseMAC takes the first MAC that is given: by the runtime, in CNI_ARGS, in
// the configuration. All that are given must be valid.
func (p *parser) chooseMAC(fromArgs string) error {
	for _, c := range []struct{ where, value string }{
		{"mac", p.mac}, {"CNI_ARGS MAC", fromArgs}, {"runtimeConfig.mac", p.runtimeMAC},
	} {
		if c.value == "" {
			continue
		}
		mac, err := netselect.ParseMAC(c.where, c.value)
		if err != nil {
			return err
		}
		p.MAC = mac
	}
	return nil
}

// read gives each key to its field.
func (p *parser) read(prefix string, keys map[string]json.RawMessage, known map[string]field) error {
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		f, ok := known[key]
		if !ok {
			return fmt.Errorf("unknown key %q with value %s%s", prefix+key, show(keys[key]), spelling.DidYouMean(key, slices.Collect(maps.Keys(known))))
		}
		if f == nil {
			continue
		}
		if err := f(p, keys[key]); err != nil {
			return fmt.Errorf("%s %s %w", prefix+key, show(keys[key]), err)
		}
	}
	return nil
}

func decode(into func(*parser) any) field {
	return func(p *parser, raw json.RawMessage) error {
		err := json.Unmarshal(raw, into(p))
		var kind *json.UnmarshalTypeError
		if errors.As(err, &kind) {
			return fmt.Errorf("is a %s where %s is needed", kind.Value, kind.Type)
		}
		return err
	}
}

func text(into func(*parser) *string) field {
	return func(p *parser, raw json.RawMessage) error {
		if json.Unmarshal(raw, into(p)) != nil {
			return errors.New("is not a string")
		}
		return nil
	}
}

func number(into func(*parser) **int) field {
	return func(p *parser, raw json.RawMessage) error {
		if json.Unmarshal(raw, into(p)) != nil {
			return errors.New("is not a whole number")
		}
		return nil
	}
}

// word reads a string that must be empty or one of the given.
func word(raw json.RawMessage, values ...string) (string, error) {
	var v string
	if json.Unmarshal(raw, &v) != nil || v != "" && !slices.Contains(values, v) {
		return "", fmt.Errorf(`is not one of "%s"`, strings.Join(values, `", "`))
	}
	return v, nil
}

// onOff reads a switch. Only the exact words count: everything else must not
// quietly mean "off" for a setting that keeps tenants apart.
func onOff(into func(*parser) **bool) field {
	return func(p *parser, raw json.RawMessage) error {
		v, err := word(raw, "on", "off")
		if v != "" {
			on := v == "on"
			*into(p) = &on
		}
		return err
	}
}

func linkState(p *parser, raw json.RawMessage) error {
	states := []string{"auto", "enable", "disable"} // in the order of IFLA_VF_LINK_STATE_*
	v, err := word(raw, states...)
	if v != "" {
		s := host.LinkState(slices.Index(states, v))
		p.LinkState = &s
	}
	return err
}

func mode(p *parser, raw json.RawMessage) (err error) {
	p.macvlan.Mode, err = word(raw, slices.Sorted(maps.Keys(host.MacvlanModes))...)
	return err
}

// hostInterface is an object, so that the routes are part of the wish.
func hostInterface(p *parser, raw json.RawMessage) error {
	if string(raw) == "null" {
		return nil
	}
	keys, err := object(raw)
	if err != nil {
		return err
	}
	p.HostInterface = true
	return p.read("hostInterface.", keys, map[string]field{"routes": decode(func(p *parser) any { return &p.HostRoutes })})
}

// network is an IP network in configuration and journal, as CIDR.
type network net.IPNet

// MarshalText implements encoding.TextMarshaler.
func (n network) MarshalText() ([]byte, error) { return []byte((*net.IPNet)(&n).String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (n *network) UnmarshalText(b []byte) error {
	ip, parsed, err := net.ParseCIDR(string(b))
	if err != nil {
		return fmt.Errorf("has %q, which is not a network like 10.96.0.0/12", b)
	}
	if !ip.Equal(parsed.IP) {
		return fmt.Errorf("has %q, which is an address and not a network: write %s", b, parsed)
	}
	*n = network(*parsed)
	return nil
}

// noGUID refuses what a pod would otherwise believe to have.
func noGUID(_ *parser, raw json.RawMessage) error {
	if v := string(raw); v == "null" || v == `""` {
		return nil
	}
	return errors.New("is for InfiniBand, and this plugin makes Ethernet interfaces: remove infiniband-guid from the pod, or set type to ib-sriov")
}

func logLevel(_ *parser, raw json.RawMessage) error {
	_, err := word(raw, "panic", "error", "warning", "info", "debug")
	return err
}

// ipam notes the type of the IPAM plugin; the rest is the plugin's own business.
func ipam(p *parser, raw json.RawMessage) error {
	keys, err := object(raw)
	if err != nil {
		return err
	}
	if kind, ok := keys["type"]; ok && json.Unmarshal(kind, &p.IPAM) != nil {
		return errors.New("has a type that is not a string")
	}
	if len(keys) > 0 && p.IPAM == "" {
		return errors.New("has no type")
	}
	// It becomes a file name below CNI_PATH.
	if strings.ContainsAny(p.IPAM, "/\x00") || p.IPAM == "." || p.IPAM == ".." {
		return errors.New("has a type that is no name of a plugin")
	}
	return nil
}

func runtimeConfig(p *parser, raw json.RawMessage) error {
	keys, err := object(raw)
	if err != nil {
		return err
	}
	return p.read("runtimeConfig.", keys, runtimeKeys)
}

// object reads a JSON object. A key that is there twice is an error: readers
// disagree about which one counts.
func object(raw []byte) (map[string]json.RawMessage, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	if t, err := d.Token(); err != nil {
		return nil, fmt.Errorf("is not JSON: %w", err)
	} else if t != json.Delim('{') {
		return nil, errors.New("is not a JSON object")
	}
	keys := map[string]json.RawMessage{}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("is not JSON: %w", err)
		}
		key, _ := t.(string)
		if _, twice := keys[key]; twice {
			return nil, fmt.Errorf("has the key %q twice", key)
		}
		var v json.RawMessage
		if err := d.Decode(&v); err != nil {
			return nil, fmt.Errorf("is not JSON: %w", err)
		}
		keys[key] = v
	}
	if _, err := d.Token(); err != nil {
		return nil, fmt.Errorf("is not JSON: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("has something after its end")
	}
	return keys, nil
}

// show quotes a value for a message, shortened.
func show(raw json.RawMessage) string {
	const most = 64
	var b bytes.Buffer
	if json.Compact(&b, raw) != nil {
		return strconv.Quote(string(raw))
	}
	if b.Len() > most {
		return b.String()[:most] + "..."
	}
	return b.String()
}

// parseArgs reads CNI_ARGS, "K=V;K=V". Keys this plugin does not know are an
// error unless IgnoreUnknown is set, as the CNI conventions want it.
func parseArgs(s string) (map[string]string, error) {
	known := []string{"IgnoreUnknown", "MAC", "IP", "K8S_POD_NAME", "K8S_POD_NAMESPACE", "K8S_POD_UID", "K8S_POD_INFRA_CONTAINER_ID"}
	args := map[string]string{}
	var unknown error
	for pair := range strings.SplitSeq(s, ";") {
		if pair == "" {
			continue
		}
		k, v, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS has %q, which is not KEY=VALUE", pair)
		}
		if !slices.Contains(known, k) {
			unknown = fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS has the unknown key %q with value %q%s", k, v, spelling.DidYouMean(k, known))
		}
		args[k] = v
	}
	if ignore, err := strconv.ParseBool(args["IgnoreUnknown"]); unknown != nil && (err != nil || !ignore) {
		return nil, unknown
	}
	return args, nil
}

// PodOf tells which pod CNI_ARGS are of; what they do not tell is empty.
func PodOf(args string) (namespace, name, uid string) {
	for pair := range strings.SplitSeq(args, ";") {
		switch k, v, _ := strings.Cut(pair, "="); k {
		case "K8S_POD_NAMESPACE":
			namespace = v
		case "K8S_POD_NAME":
			name = v
		case "K8S_POD_UID":
			uid = v
		}
	}
	return namespace, name, uid
}
