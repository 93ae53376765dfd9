package ovsdb

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Mark is the key in external_ids of bridges that this package made.
const Mark = "sluice.dev/bridge"

// ErrForeign is a bridge that somebody else made.
var ErrForeign = errors.New("somebody else made the bridge")

// Bridge is a bridge with one port besides its own. A field left empty is left to Open
// vSwitch, and of maps only the keys given are set.
type Bridge struct {
	Name         string            `json:"name"`
	DatapathType string            `json:"datapathType,omitempty"`
	FailMode     string            `json:"failMode,omitempty"`
	ExternalIDs  map[string]string `json:"externalIDs,omitempty"`
	OtherConfig  map[string]string `json:"otherConfig,omitempty"`
	Uplink       Interface         `json:"uplink"`
}

// Interface is a port's interface.
type Interface struct {
	Name        string            `json:"name"` // of the network device
	Type        string            `json:"type,omitempty"`
	Options     map[string]string `json:"options,omitempty"`
	ExternalIDs map[string]string `json:"externalIDs,omitempty"`
	OtherConfig map[string]string `json:"otherConfig,omitempty"`
	MTURequest  *int              `json:"mtuRequest,omitempty"` // bytes
}

// Found is a bridge as it is.
type Found struct {
	// Bridge has what SetBridge has set, as it is now. The uplink has no name when it is
	// not in the bridge.
	Bridge
	Foreign bool   // somebody else made it; Bridge has only the name
	Opened  bool   // ovs-vswitchd has the uplink
	Error   string // why it cannot open it
}

// found is a bridge with what it takes to change it.
type found struct {
	Found
	uuid    string
	applied Bridge // what was set
	// ports has the UUIDs of the ports asked for that are there, by name; in the bridge
	// they are of in the name of.
	ports map[string]string
	in    map[string]string
}

// ReadBridge gives the bridge of that name, and nil when there is none.
func (c *Client) ReadBridge(ctx context.Context, name string) (*Found, error) {
	f, err := c.read(ctx, name, "")
	if err != nil {
		return nil, fmt.Errorf("read bridge %s: %w", name, err)
	}
	if f.uuid == "" {
		return nil, nil
	}
	return &f.Found, nil
}

// read reads the bridge, its uplink, and whose port the device is.
func (c *Client) read(ctx context.Context, name, device string) (*found, error) {
	answer, err := c.transact(ctx, op{"op": "select", "table": "Bridge", "where": whereName(name)})
	if err != nil {
		return nil, err
	}
	f := &found{Found: Found{Bridge: Bridge{Name: name}}, ports: map[string]string{}, in: map[string]string{}}
	var own []string // ports
	for _, r := range answer[0].Rows {
		if err := f.ofBridge(r); err != nil {
			return nil, err
		}
		if own, err = r.atoms("ports"); err != nil {
			return nil, err
		}
	}
	uplink := f.applied.Uplink.Name
	var ops []op
	for _, of := range []string{uplink, device} {
		ops = append(ops, op{"op": "select", "table": "Port", "where": whereName(of), "columns": []string{"_uuid"}},
			op{"op": "select", "table": "Interface", "where": whereName(of)})
	}
	answers, err := c.transact(ctx, ops...)
	if err != nil {
		return nil, err
	}
	for i, of := range []string{uplink, device} {
		for _, r := range answers[2*i].Rows {
			ids, err := r.atoms("_uuid")
			if err != nil || len(ids) != 1 {
				return nil, errors.Join(fmt.Errorf("read port %s: no UUID", of), err)
			}
			f.ports[of], f.in[of] = ids[0], name
			if slices.Contains(own, ids[0]) {
				continue
			}
			if f.in[of], err = c.owner(ctx, ids[0]); err != nil {
				return nil, err
			}
		}
	}
	if f.in[uplink] == name && len(answers[1].Rows) == 1 {
		return f, f.ofUplink(answers[1].Rows[0])
	}
	return f, nil
}

// owner is the bridge that has the port.
func (c *Client) owner(ctx context.Context, port string) (name string, err error) {
	answer, err := c.transact(ctx, op{"op": "select", "table": "Bridge", "where": []any{[]any{"ports", "includes", uuid(port)}}, "columns": []string{"name"}})
	if err != nil {
		return "", err
	}
	for _, r := range answer[0].Rows {
		err = r.get("name", &name)
	}
	return name, err
}

// ofBridge takes over what the row says of what was set.
func (f *found) ofBridge(r row) error {
	ids, err := r.atoms("_uuid")
	if err != nil || len(ids) != 1 || ids[0] == "" {
		return errors.Join(errors.New("a bridge has no UUID"), err)
	}
	f.uuid = ids[0]
	external, err := r.dict("external_ids")
	if err != nil {
		return err
	}
	mark, marked := external[Mark]
	if f.Foreign = !marked; f.Foreign {
		return nil
	}
	if json.Unmarshal([]byte(mark), &f.applied) != nil {
		f.applied = Bridge{} // it is set anew
	}
	other, err := r.dict("other_config")
	if err != nil {
		return err
	}
	f.ExternalIDs, f.OtherConfig = of(f.applied.ExternalIDs, external), of(f.applied.OtherConfig, other)
	if f.applied.DatapathType != "" {
		if err := r.get("datapath_type", &f.DatapathType); err != nil {
			return err
		}
	}
	if f.applied.FailMode != "" {
		f.FailMode, err = r.optional("fail_mode")
	}
	return err
}

func (f *found) ofUplink(r row) error {
	was, is := &f.applied.Uplink, &f.Uplink
	is.Name = was.Name
	for _, m := range []struct {
		column string
		was    map[string]string
		is     *map[string]string
	}{{"options", was.Options, &is.Options}, {"external_ids", was.ExternalIDs, &is.ExternalIDs}, {"other_config", was.OtherConfig, &is.OtherConfig}} {
		now, err := r.dict(m.column)
		if err != nil {
			return err
		}
		*m.is = of(m.was, now)
	}
	if was.Type != "" {
		if err := r.get("type", &is.Type); err != nil {
			return err
		}
	}
	if was.MTURequest != nil {
		list, err := r.list("mtu_request")
		if err == nil && len(list) > 0 {
			is.MTURequest = new(int)
			err = json.Unmarshal(list[0], is.MTURequest)
		}
		if err != nil {
			return fmt.Errorf("mtu_request of interface %s: %w", is.Name, err)
		}
	}
	port, err := r.list("ofport")
	if err != nil {
		return err
	}
	f.Opened = len(port) > 0 && string(port[0]) != "-1"
	f.Error, err = r.optional("error")
	return err
}

// of gives the keys of was as they are.
func of(was, is map[string]string) map[string]string {
	var some map[string]string
	for k := range was {
		if v, ok := is[k]; ok {
			if some == nil {
				some = map[string]string{}
			}
			some[k] = v
		}
	}
	return some
}

// SetBridge makes the bridge, or makes it what it shall be. One of somebody else it
// refuses, or with adopt takes over, and what is in it stays.
func (c *Client) SetBridge(ctx context.Context, want Bridge, adopt bool) error {
	f, err := c.own(ctx, want.Name, want.Uplink.Name)
	if adopt && errors.Is(err, ErrForeign) {
		err = nil
	}
	if err == nil {
		err = c.set(ctx, want, f)
	}
	if err != nil {
		return fmt.Errorf("set bridge %s: %w", want.Name, err)
	}
	return nil
}

func (c *Client) set(ctx context.Context, want Bridge, f *found) error {
	uplink := want.Uplink.Name
	if in := f.in[uplink]; in != "" && in != want.Name {
		return fmt.Errorf("%s is a port of bridge %s: remove it there, with ovs-vsctl del-port %s %s", uplink, in, in, uplink)
	}
	mark, err := json.Marshal(want)
	if err != nil {
		return fmt.Errorf("encode it: %w", err)
	}
	external := map[string]string{}
	maps.Copy(external, want.ExternalIDs)
	external[Mark] = string(mark)

	was, up := f.applied, f.applied.Uplink
	values := row{}
	values.set("datapath_type", want.DatapathType, was.DatapathType)
	if want.FailMode != "" || was.FailMode != "" {
		values["fail_mode"] = encode(optional(want.FailMode))
	}
	here := f.in[uplink] == want.Name
	port := row{}
	port.set("type", want.Uplink.Type, up.Type)
	if want.Uplink.MTURequest != nil {
		port["mtu_request"] = encode(want.Uplink.MTURequest)
	} else if up.MTURequest != nil {
		port["mtu_request"] = encode(set())
	}

	var ops []op
	if f.uuid == "" {
		values["name"] = encode(want.Name)
		ops = append(ops, newPort("own", row{"name": encode(want.Name), "type": encode("internal")})...)
		values["ports"] = encode(set(named("own")))
		ops = append(ops, op{"op": "insert", "table": "Bridge", "uuid-name": "bridge", "row": values},
			op{"op": "mutate", "table": "Open_vSwitch", "where": []any{}, "mutations": []any{[]any{"bridges", "insert", set(named("bridge"))}}})
	} else if len(values) > 0 {
		ops = append(ops, op{"op": "update", "table": "Bridge", "where": whereName(want.Name), "row": values})
	}
	ops = append(ops, op{"op": "mutate", "table": "Bridge", "where": whereName(want.Name), "mutations": slices.Concat(
		merge("external_ids", was.ExternalIDs, external), merge("other_config", was.OtherConfig, want.OtherConfig))})
	var ports []any
	if old := up.Name; old != uplink && f.in[old] == want.Name {
		ports = append(ports, []any{"ports", "delete", set(uuid(f.ports[old]))})
	}
	if !here {
		port["name"] = encode(uplink)
		ops = append(ops, newPort("uplink", port)...)
		ports = append(ports, []any{"ports", "insert", set(named("uplink"))})
		up = Interface{}
	} else if len(port) > 0 {
		ops = append(ops, op{"op": "update", "table": "Interface", "where": whereName(uplink), "row": port})
	}
	if len(ports) > 0 {
		ops = append(ops, op{"op": "mutate", "table": "Bridge", "where": whereName(want.Name), "mutations": ports})
	}
	if m := slices.Concat(merge("options", up.Options, want.Uplink.Options), merge("external_ids", up.ExternalIDs, want.Uplink.ExternalIDs),
		merge("other_config", up.OtherConfig, want.Uplink.OtherConfig)); len(m) > 0 {
		ops = append(ops, op{"op": "mutate", "table": "Interface", "where": whereName(uplink), "mutations": m})
	}
	results, err := c.transact(ctx, ops...)
	if err != nil {
		return err
	}
	for i, o := range ops {
		// Without a row in that table the database drops the bridge again.
		if o["table"] == "Open_vSwitch" && results[i].Count != 1 {
			return errors.New("the database is not initialized: start ovs-vswitchd on the node, or run ovs-vsctl --no-wait init there")
		}
	}
	return nil
}

// own reads a bridge that may be changed.
func (c *Client) own(ctx context.Context, name, device string) (*found, error) {
	f, err := c.read(ctx, name, device)
	if err == nil && f.Foreign {
		err = ErrForeign
	}
	return f, err
}

// DetachUplink takes the uplink out of the bridge; the rest of it stays.
func (c *Client) DetachUplink(ctx context.Context, name string) error {
	f, err := c.own(ctx, name, "")
	if err == nil && f.Uplink.Name != "" {
		_, err = c.transact(ctx, op{"op": "mutate", "table": "Bridge", "where": whereName(name), "mutations": []any{
			[]any{"ports", "delete", set(uuid(f.ports[f.Uplink.Name]))},
		}})
	}
	if err != nil {
		return fmt.Errorf("detach the uplink of bridge %s: %w", name, err)
	}
	return nil
}

// RemoveBridge removes the bridge with all its ports, if it is there.
func (c *Client) RemoveBridge(ctx context.Context, name string) error {
	f, err := c.own(ctx, name, "")
	if err == nil && f.uuid != "" {
		_, err = c.transact(ctx, op{"op": "mutate", "table": "Open_vSwitch", "where": []any{}, "mutations": []any{
			[]any{"bridges", "delete", set(uuid(f.uuid))},
		}})
	}
	if err != nil {
		return fmt.Errorf("remove bridge %s: %w", name, err)
	}
	return nil
}

func newPort(id string, iface row) []op {
	return []op{
		{"op": "insert", "table": "Interface", "uuid-name": id + "_interface", "row": iface},
		{"op": "insert", "table": "Port", "uuid-name": id, "row": row{"name": iface["name"], "interfaces": encode(named(id + "_interface"))}},
	}
}

func whereName(name string) []any { return []any{[]any{"name", "==", name}} }

// merge gives the mutations that bring the keys of a map from was to want. An insertion
// alone does not change keys that are there.
func merge(column string, was, want map[string]string) []any {
	all := map[string]string{}
	maps.Copy(all, was)
	maps.Copy(all, want)
	var names, pairs []any
	for _, k := range slices.Sorted(maps.Keys(all)) {
		names = append(names, k)
		if v, ok := want[k]; ok {
			pairs = append(pairs, []any{k, v})
		}
	}
	if len(names) == 0 {
		return nil
	}
	mutations := []any{[]any{column, "delete", set(names...)}}
	if len(pairs) > 0 {
		mutations = append(mutations, []any{column, "insert", []any{"map", pairs}})
	}
	return mutations
}
