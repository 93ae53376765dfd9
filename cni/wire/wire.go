package wire

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"time"
)

const (
	// Socket is where the server listens unless told otherwise.
	Socket = "/var/run/sluice/cni.sock"
	// DelQueue is the folder in which the shim leaves each DEL that it could
	// not hand to the agent, as a Request. The server works it off when it starts
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
	Command     string `json:"command"`
	ContainerID string `json:"containerID,omitempty"`
	Netns       string `json:"netns,omitempty"`
	IfName      string `json:"ifName,omitempty"`
	Args        string `json:"args,omitempty"`
	Path        string `json:"path,omitempty"`
	Stdin       []byte `json:"stdin,omitempty"`
}

// Response is what the plugin prints and whether it exits with an error.
type Response struct {
	Stdout []byte `json:"stdout,omitempty"`
	Failed bool   `json:"failed,omitempty"`
}

// QueueName is the name of the file in which the shim leaves a DEL: one for an
// interface of a container, however often it is tried.
func QueueName(req Request) string {
	h := fnv.New128a()
	h.Write([]byte(req.ContainerID + "\x00" + req.IfName))
	return hex.EncodeToString(h.Sum(nil)) + ".json"
}

// Encode makes the frame of a message: its length in four bytes, big endian,
// and the message as JSON.
func Encode(message any) ([]byte, error) {
	b, err := json.Marshal(message)
	if err != nil {
		return nil, err
	}
	if len(b) > maxFrame {
		return nil, errors.New("message is too long")
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...), nil
}

// Decode reads one frame into message.
func Decode(r io.Reader, message any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return fmt.Errorf("read message: %w", err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxFrame {
		return fmt.Errorf("read message: %d bytes are more than the limit of %d", n, maxFrame)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return fmt.Errorf("read message: %w", err)
	}
	if err := json.Unmarshal(b, message); err != nil {
		return fmt.Errorf("read message: %w", err)
	}
	return nil
}
