package ovsdb

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
)

// DefaultSocket is where ovsdb-server listens on a node.
const DefaultSocket = "/var/run/openvswitch/db.sock"

const (
	database = "Open_vSwitch"
	// patience is for one exchange: ovsdb-server answers within milliseconds.
	patience = 5 * time.Second
	// largest is more than any answer to what is asked here.
	largest = 16 << 20
	// again bounds the time without a watch where the file system tells nothing.
	again = time.Minute
)

// Client talks to the ovsdb-server that listens on the socket.
type Client struct{ Socket string }

// op is an operation of a transaction (RFC 7047, 5.2).
type op map[string]any

// row has columns as in JSON.
type row map[string]json.RawMessage

// result is what became of one operation.
type result struct {
	Count   int    `json:"count"`
	Rows    []row  `json:"rows"`
	Error   string `json:"error"`
	Details string `json:"details"`
}

// message is a request, a notification or a response (RFC 7047, 4).
type message struct {
	ID     json.RawMessage `json:"id"`
	Method string          `json:"method,omitempty"`
	Params json.RawMessage `json:"params,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  json.RawMessage `json:"error,omitempty"`
}

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "unix", c.Socket)
	if err == nil {
		return conn, nil
	}
	mend := "start Open vSwitch on the node"
	if errors.Is(err, unix.EACCES) {
		mend = "the agent needs the capability DAC_OVERRIDE for a socket that is not root's, and SELinux's leave"
	}
	return nil, fmt.Errorf("reach Open vSwitch: %w: %s", err, mend)
}

func request(conn net.Conn, method string, params ...any) error {
	return json.NewEncoder(conn).Encode(map[string]any{"id": method, "method": method, "params": params})
}

// transact does the operations all together or not at all.
func (c *Client) transact(ctx context.Context, ops ...op) ([]result, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	_ = conn.SetDeadline(time.Now().Add(patience)) // fails only on a closed one, which is told next
	params := []any{database}
	for _, o := range ops {
		params = append(params, o)
	}
	if err := request(conn, "transact", params...); err != nil {
		return nil, fmt.Errorf("ask Open vSwitch: %w", err)
	}
	results, err := readResults(io.LimitReader(conn, largest), len(ops))
	if err != nil {
		return nil, fmt.Errorf("ask Open vSwitch: %w", err)
	}
	return results, nil
}

// readResults reads the answer to a transaction of n operations.
func readResults(r io.Reader, n int) ([]result, error) {
	decoder := json.NewDecoder(r)
	for {
		var m message
		if err := decoder.Decode(&m); err != nil {
			return nil, fmt.Errorf("read the answer: %w", err)
		}
		if m.Method != "" {
			continue // a notification, or an echo, which has time
		}
		if isSet(m.Error) {
			return nil, fmt.Errorf("it refused: %s", m.Error)
		}
		var results []*result
		if err := json.Unmarshal(m.Result, &results); err != nil {
			return nil, fmt.Errorf("read the answer: %w", err)
		}
		// One that failed has null after it, and one more that tells of the commit.
		var done []result
		for _, one := range results {
			if one == nil {
				continue
			}
			if one.Error != "" {
				return nil, fmt.Errorf("it refused: %s: %s", one.Error, one.Details)
			}
			done = append(done, *one)
		}
		if len(done) != n {
			return nil, fmt.Errorf("read the answer: it tells of %d operations, not %d", len(done), n)
		}
		return done, nil
	}
}

func isSet(raw json.RawMessage) bool { return len(raw) > 0 && !bytes.Equal(raw, []byte("null")) }

// watched are the columns of which changes are told. Others, such as statistics, change
// all the time.
var watched = map[string]any{
	"Open_vSwitch": map[string]any{"columns": []string{"bridges"}},
	"Bridge":       map[string]any{"columns": []string{"name", "ports", "datapath_type", "fail_mode", "external_ids", "other_config"}},
	"Interface":    map[string]any{"columns": []string{"name", "type", "options", "external_ids", "other_config", "mtu_request", "ofport", "error"}},
}

// Watch tells when bridges may be others than before, and when Open vSwitch came or went.
// The channel closes with ctx.
func (c *Client) Watch(ctx context.Context) <-chan struct{} {
	changed := make(chan struct{}, 1)
	tell := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	go func() {
		defer close(changed)
		for ctx.Err() == nil {
			// Why it ended matters to nobody who does not read bridges, and is told there.
			_ = c.follow(ctx, tell)
			tell()
			c.await(ctx)
		}
	}()
	return changed
}

// follow tells of changes until the connection ends.
func (c *Client) follow(ctx context.Context, tell func()) error {
	conn, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	if err := request(conn, "monitor", database, nil, watched); err != nil {
		return err
	}
	for decoder := json.NewDecoder(conn); ; {
		var m message
		if err := decoder.Decode(&m); err != nil {
			return err
		}
		switch {
		case m.Method == "echo":
			if err := json.NewEncoder(conn).Encode(map[string]any{"id": m.ID, "result": m.Params, "error": nil}); err != nil {
				return err
			}
		case m.Method == "" && isSet(m.Error):
			return fmt.Errorf("it refused: %s", m.Error)
		default:
			tell()
		}
	}
}

// await returns when it is worth trying to connect again.
func (c *Client) await(ctx context.Context) {
	var created <-chan fsnotify.Event
	if w, err := fsnotify.NewWatcher(); err == nil {
		defer func() { _ = w.Close() }() // nothing was written
		if w.Add(filepath.Dir(c.Socket)) == nil {
			created = w.Events
		}
	}
	late := time.NewTimer(again)
	defer late.Stop()
	if conn, err := c.dial(ctx); err == nil {
		_ = conn.Close()
		late.Reset(time.Second) // it is there, and hung up on us
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-late.C:
			return
		case e := <-created:
			if e.Has(fsnotify.Create) && filepath.Clean(e.Name) == filepath.Clean(c.Socket) {
				late.Reset(10 * time.Millisecond) // until it listens
			}
		}
	}
}
