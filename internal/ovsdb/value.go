package ovsdb

import (
	"encoding/json"
	"fmt"
)

// The notation of values (RFC 7047, 5.1): a set of one may be written as the one.

func set(atoms ...any) any {
	if atoms == nil {
		atoms = []any{}
	}
	return []any{"set", atoms}
}

func uuid(id string) any { return []any{"uuid", id} }

func named(id string) any { return []any{"named-uuid", id} }

func optional(s string) any {
	if s == "" {
		return set()
	}
	return s
}

// encode writes what cannot fail to be written.
func encode(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings, numbers and lists of them
	}
	return b
}

// set notes the column of text when it is, or was, asked for.
func (r row) set(column, want, was string) {
	if want != "" || was != "" {
		r[column] = encode(want)
	}
}

func (r row) get(column string, into *string) error {
	if err := json.Unmarshal(r[column], into); err != nil {
		return fmt.Errorf("column %s: %w", column, err)
	}
	return nil
}

// list gives the elements of a set.
func (r row) list(column string) ([]json.RawMessage, error) {
	raw := r[column]
	if len(raw) == 0 {
		return nil, fmt.Errorf("column %s is missing", column)
	}
	if raw[0] != '[' {
		return []json.RawMessage{raw}, nil
	}
	tag, value, err := tagged(raw)
	if err != nil {
		return nil, fmt.Errorf("column %s: %w", column, err)
	}
	switch tag {
	case "uuid":
		return []json.RawMessage{raw}, nil
	case "set":
		var all []json.RawMessage
		if err := json.Unmarshal(value, &all); err != nil {
			return nil, fmt.Errorf("column %s: %w", column, err)
		}
		return all, nil
	}
	return nil, fmt.Errorf("column %s: %q is no set", column, tag)
}

func tagged(raw json.RawMessage) (tag string, value json.RawMessage, err error) {
	var pair []json.RawMessage
	if err := json.Unmarshal(raw, &pair); err != nil {
		return "", nil, err
	}
	if len(pair) != 2 {
		return "", nil, fmt.Errorf("%d elements where a tag and a value should be", len(pair))
	}
	err = json.Unmarshal(pair[0], &tag)
	return tag, pair[1], err
}

// atoms gives the elements of a set of texts or UUIDs.
func (r row) atoms(column string) ([]string, error) {
	list, err := r.list(column)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, raw := range list {
		if raw[0] == '[' {
			tag, value, err := tagged(raw)
			if err != nil || tag != "uuid" {
				return nil, fmt.Errorf("column %s: %s is no UUID", column, raw)
			}
			raw = value
		}
		var one string
		if err := json.Unmarshal(raw, &one); err != nil {
			return nil, fmt.Errorf("column %s: %w", column, err)
		}
		all = append(all, one)
	}
	return all, nil
}

// optional gives the text of a column that may have none.
func (r row) optional(column string) (string, error) {
	all, err := r.atoms(column)
	if err != nil || len(all) == 0 {
		return "", err
	}
	return all[0], nil
}

func (r row) dict(column string) (map[string]string, error) {
	if len(r[column]) == 0 {
		return nil, fmt.Errorf("column %s is missing", column)
	}
	tag, value, err := tagged(r[column])
	if err != nil {
		return nil, fmt.Errorf("column %s: %w", column, err)
	}
	var pairs [][]string
	if err := json.Unmarshal(value, &pairs); err != nil {
		return nil, fmt.Errorf("column %s: %w", column, err)
	}
	if tag != "map" {
		return nil, fmt.Errorf("column %s: %q is no map", column, tag)
	}
	m := make(map[string]string, len(pairs))
	for _, pair := range pairs {
		if len(pair) != 2 {
			return nil, fmt.Errorf("column %s: %d elements where a key and a value should be", column, len(pair))
		}
		m[pair[0]] = pair[1]
	}
	return m, nil
}
