package control

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"sync"
)

// greeting starts a session. Its first byte is one that no text has.
const greeting = "\x00sluice-guestd-1\n"

// Frame types.
const (
	frameRequest = 'R' // client: a [request]
	frameInput   = 'I' // client: bytes for the request
	frameEnd     = 'E' // client: end of input
	frameSignal  = 'K' // client: one byte, a signal for the command
	frameHello   = 'H' // client: greet me (a line that was greeted before)
	frameOut     = 'O' // server: the command's standard output
	frameErr     = 'S' // server: the command's standard error
	frameResult  = 'X' // server: a [result]
)

// maxFrame bounds a frame's payload, so that a damaged length is noticed and
// no peer can ask for much memory.
const maxFrame = 64 << 10

type frame struct {
	kind    byte
	payload []byte
}

type frameReader struct{ r *bufio.Reader }

func (f frameReader) next() (frame, error) {
	var head [5]byte
	if _, err := io.ReadFull(f.r, head[:]); err != nil {
		return frame{}, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > maxFrame {
		return frame{}, fmt.Errorf("read frame %q: length %d above the limit of %d: the line lost bytes", head[0], n, maxFrame)
	}
	payload := make([]byte, n)
	_, err := io.ReadFull(f.r, payload)
	return frame{head[0], payload}, err
}

// frameWriter writes whole frames; it may be used by several goroutines.
type frameWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (f *frameWriter) put(kind byte, payload []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	buf := make([]byte, 5, 5+len(payload))
	buf[0] = kind
	binary.BigEndian.PutUint32(buf[1:], uint32(len(payload)))
	_, err := f.w.Write(append(buf, payload...))
	return err
}

func (f *frameWriter) putJSON(kind byte, v any) error {
	payload, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(payload) > maxFrame {
		return fmt.Errorf("send frame %q: %d bytes are above the limit of %d", kind, len(payload), maxFrame)
	}
	return f.put(kind, payload)
}

// stream is the writer that turns bytes into frames of one kind.
type stream struct {
	w    *frameWriter
	kind byte
}

func (s stream) Write(p []byte) (int, error) {
	for n := 0; n < len(p); {
		chunk := p[n:min(len(p), n+maxFrame/2)]
		if err := s.w.put(s.kind, chunk); err != nil {
			return n, err
		}
		n += len(chunk)
	}
	return len(p), nil
}

// Operations of a request.
const (
	opExec  = "exec"  // run Args
	opPut   = "put"   // write the input to the file Path with Mode
	opUntar = "untar" // unpack the input, a tar archive, below the directory Path
	opGet   = "get"   // send the file Path as output
	opSetup = "setup" // set the machine up
)

type request struct {
	Op    string
	Args  []string `json:",omitempty"`
	Dir   string   `json:",omitempty"`
	Env   []string `json:",omitempty"`
	Merge bool     `json:",omitempty"` // standard error goes where standard output goes
	Path  string   `json:",omitempty"`
	Mode  uint32   `json:",omitempty"`
	Setup *Setup   `json:",omitempty"`
}

type result struct {
	Status int    // of the command
	Error  string `json:",omitempty"` // why the request could not be served
}

// Setup is what a freshly booted machine is told about itself.
type Setup struct {
	Name    string   // host name
	Time    int64    // Unix nanoseconds; a restored machine's clock stands at the time it was saved
	Address string   `json:",omitempty"` // of the interface mgmt, with prefix length
	Gateway string   `json:",omitempty"`
	Listen  string   `json:",omitempty"` // serve at this TCP address as well
	Linger  bool     // stay up when the line closes
	Host    []Host   `json:",omitempty"` // directories of the host to show
	Cards   []Module `json:",omitempty"` // modules of the cards, loaded in order
	Wires   int      // wireN is bridged with vec<N+1> for N below this
}

// Host is a directory of the host that the guest shows (User-Mode Linux only).
type Host struct {
	From, To string
	ReadOnly bool
}

// Module is a kernel module with its parameters.
type Module struct {
	Name   string
	Params []string `json:",omitempty"`
}
