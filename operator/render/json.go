package render

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// marshal writes JSON without escaping <, > and & as HTML, which nobody reads here.
func marshal(v any) (string, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return "", fmt.Errorf("write the CNI configuration: %w", err)
	}
	return strings.TrimSuffix(b.String(), "\n"), nil
}

func ipam(text string) (json.RawMessage, error) {
	const mend = `write a JSON object with a type, such as {"type": "host-local", "subnet": "10.1.0.0/24"}`
	if strings.TrimSpace(text) == "" {
		return json.RawMessage("{}"), nil
	}
	keys, err := parseObject(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, mend)
	}
	if len(keys) > 0 && !isText(keys["type"]) {
		return nil, fmt.Errorf("it has no type: %s", mend)
	}
	var own struct{ Type, Pool string }
	if json.Unmarshal([]byte(text), &own) != nil || own.Type == "sluice" && own.Pool == "" {
		return nil, errors.New(`type sluice takes its addresses from an IPPool: write {"type": "sluice", "pool": "its name"}`)
	}
	return json.RawMessage(text), nil
}

func capabilities(text string) (json.RawMessage, error) {
	const mend = `write a JSON object of booleans, such as {"mac": true, "ips": true}`
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	keys, err := parseObject(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, mend)
	}
	for name, value := range keys {
		if v := string(value); v != "true" && v != "false" {
			return nil, fmt.Errorf("%s is %s: %s", name, v, mend)
		}
	}
	return json.RawMessage(text), nil
}

// metaPlugins parses JSON objects with commas between them.
func metaPlugins(text string) ([]json.RawMessage, error) {
	const mend = `write JSON objects with commas between them, such as {"type": "tuning"}, {"type": "vrf"}`
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	var plugins []json.RawMessage
	if err := json.Unmarshal([]byte("["+text+"]"), &plugins); err != nil {
		return nil, fmt.Errorf("%w: %s", position(err, text, 1), mend)
	}
	for i, p := range plugins {
		keys, err := parseObject(string(p))
		if err != nil {
			return nil, fmt.Errorf("plugin %d: %w: %s", i+1, err, mend)
		}
		if !isText(keys["type"]) {
			return nil, fmt.Errorf("plugin %d has no type: %s", i+1, mend)
		}
	}
	return plugins, nil
}

func parseObject(text string) (map[string]json.RawMessage, error) {
	if t := strings.TrimSpace(text); !strings.HasPrefix(t, "{") && json.Valid([]byte(t)) {
		return nil, fmt.Errorf("%s is not a JSON object", t)
	}
	var keys map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &keys); err != nil {
		return nil, position(err, text, 0)
	}
	return keys, nil
}

func isText(value json.RawMessage) bool {
	var s string
	return json.Unmarshal(value, &s) == nil && s != ""
}

// position says where in the text, from which the parser was given what comes after
// the first skip characters, a syntax error is.
func position(err error, text string, skip int64) error {
	var syntax *json.SyntaxError
	if !errors.As(err, &syntax) {
		return err
	}
	// Offset counts the offending byte too. An unfinished value ends past the text.
	at := min(max(syntax.Offset-skip-1, 0), int64(len(text)))
	before := text[:at]
	line := 1 + strings.Count(before, "\n")
	column := 1 + len(before) - (strings.LastIndex(before, "\n") + 1)
	return fmt.Errorf("invalid JSON at line %d, column %d: %w", line, column, err)
}
