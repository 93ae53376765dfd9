package wire

// The shim is linked with this package, and started for each interface of each pod: what
// takes long to start (fmt, encoding/json, reflect) is not imported here.
import (
	"bytes"
	"encoding"
	"errors"
	"hash/fnv"
	"io"
	"strings"
	"time"
)

const (
	// Socket is where the server listens unless told otherwise.
	Socket = "/var/run/sluice/cni.sock"
	// DelQueue is the folder in which the shim leaves each DEL that it could
	// not hand to the agent, as the frame of a Request. The server works it off when it starts
	// and whenever a file comes into it.
	DelQueue = "/var/lib/sluice/del-queue"

	// AckTimeout is how long the shim waits for the Ack.
	AckTimeout = 1500 * time.Millisecond
	// ServeTimeout is how long the server works on a request, undoing excepted.
	ServeTimeout = 60 * time.Second
	// AnswerTimeout is how long the shim waits for the Response. It is longer
	// than what the server takes and shorter than what container runtimes wait,
	// two minutes.
	AnswerTimeout = 100 * time.Second

	// Heartbeat is how often the server renews the socket's time of change.
	Heartbeat = 10 * time.Second
	// RestartTimeout is how old that may be for the next server to be on its way.
	RestartTimeout = 60 * time.Second

	// Ack is the byte that says that a request was received.
	Ack = 0x06

	// maxFrame bounds what one side makes the other keep in memory, in bytes.
	maxFrame = 8 << 20
)

// Request is one call of the plugin: its environment and its standard input.
type Request struct {
	Command, ContainerID, Netns, IfName, Args, Path string

	Stdin []byte
}

// environment are the values that AppendBinary writes, in their order.
func (r *Request) environment() []*string {
	return []*string{&r.Command, &r.ContainerID, &r.Netns, &r.IfName, &r.Args, &r.Path}
}

// AppendBinary implements encoding.BinaryAppender: each value of the environment, where
// none can have a zero byte, with one at its end, and then standard input.
func (r Request) AppendBinary(b []byte) ([]byte, error) {
	for _, v := range r.environment() {
		if strings.IndexByte(*v, 0) >= 0 {
			return nil, errors.New("a value of the environment has a zero byte")
		}
		b = append(append(b, *v...), 0)
	}
	return append(b, r.Stdin...), nil
}

// UnmarshalBinary implements encoding.BinaryUnmarshaler. The request is a part of b
// afterwards.
func (r *Request) UnmarshalBinary(b []byte) error {
	for _, v := range r.environment() {
		value, rest, ok := bytes.Cut(b, []byte{0})
		if !ok {
			return errors.New("the request is not whole")
		}
		*v, b = string(value), rest
	}
	r.Stdin = b
	return nil
}

// Response is what the plugin prints and whether it exits with an error.
type Response struct {
	Stdout []byte
	Failed bool
}

// AppendBinary implements encoding.BinaryAppender: one byte, 1 for an error and else 0,
// and then what is printed.
func (r Response) AppendBinary(b []byte) ([]byte, error) {
	failed := byte(0)
	if r.Failed {
		failed = 1
	}
	return append(append(b, failed), r.Stdout...), nil
}

// UnmarshalBinary implements encoding.BinaryUnmarshaler. The response is a part of b
// afterwards.
func (r *Response) UnmarshalBinary(b []byte) error {
	if len(b) == 0 || b[0] > 1 {
		return errors.New("the response is not whole")
	}
	r.Failed, r.Stdout = b[0] == 1, b[1:]
	return nil
}

// QueueName is the name of the file in which the shim leaves a DEL: one for an
// interface of a container, however often it is tried.
func QueueName(req Request) string {
	h := fnv.New128a()
	h.Write([]byte(req.ContainerID + "\x00" + req.IfName))
	const digits = "0123456789abcdef"
	var name []byte
	for _, b := range h.Sum(nil) {
		name = append(name, digits[b>>4], digits[b&15])
	}
	return string(name) + QueueSuffix
}

// QueueSuffix is what the names of the files in DelQueue end in.
const QueueSuffix = ".del"

// Encode makes the frame of a message: its length in four bytes, big endian, and the
// message.
func Encode(message encoding.BinaryAppender) ([]byte, error) {
	b, err := message.AppendBinary(make([]byte, 4, 4096))
	if err != nil {
		return nil, err
	}
	n := len(b) - 4
	if n > maxFrame {
		return nil, errTooLong
	}
	b[0], b[1], b[2], b[3] = byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
	return b, nil
}

var errTooLong = errors.New("message is longer than the limit of 8 MiB")

// Decode reads one frame into message.
func Decode(r io.Reader, message encoding.BinaryUnmarshaler) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := int(head[0])<<24 | int(head[1])<<16 | int(head[2])<<8 | int(head[3])
	if n > maxFrame {
		return errTooLong
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	return message.UnmarshalBinary(b)
}
