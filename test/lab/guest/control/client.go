package control

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// Client sends requests over one line, one at a time.
type Client struct {
	mu   sync.Mutex
	line io.ReadWriteCloser
	w    *frameWriter
	r    frameReader
}

// Connect waits for the server's greeting and returns the client. With ask it
// asks for the greeting, as on a line whose server has greeted someone before.
// The caller bounds the wait by closing the line.
func Connect(line io.ReadWriteCloser, ask bool) (*Client, error) {
	c := &Client{line: line, w: &frameWriter{w: line}, r: frameReader{bufio.NewReaderSize(line, maxFrame)}}
	if ask {
		if err := c.w.put(frameHello, nil); err != nil {
			return nil, fmt.Errorf("ask for the greeting: %w", err)
		}
	}
	for matched := 0; matched < len(greeting); {
		b, err := c.r.r.ReadByte()
		if err != nil {
			return nil, fmt.Errorf("wait for the greeting: %w", err)
		}
		switch b {
		case greeting[matched]:
			matched++
		case greeting[0]: // occurs only at the start
			matched = 1
		default:
			matched = 0
		}
	}
	return c, nil
}

// Close closes the line.
func (c *Client) Close() { _ = c.line.Close() }

// Streams are what a command reads and writes; nil is nothing.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
	// Merge sends the command's standard error to Out.
	Merge bool
	// Signals are passed on to the command.
	Signals <-chan syscall.Signal
}

// Exec runs a command and returns its exit status, 128+n after signal n. When
// ctx ends first, the line is closed, which kills the command.
func (c *Client) Exec(ctx context.Context, args []string, dir string, env []string, s Streams) (int, error) {
	return c.do(ctx, request{Op: opExec, Args: args, Dir: dir, Env: env, Merge: s.Merge}, s)
}

// Put writes a file in the guest.
func (c *Client) Put(ctx context.Context, in io.Reader, mode fs.FileMode, path string) error {
	_, err := c.do(ctx, request{Op: opPut, Path: path, Mode: uint32(mode.Perm())}, Streams{In: in})
	return err
}

// Get copies a file of the guest to w.
func (c *Client) Get(ctx context.Context, path string, w io.Writer) error {
	_, err := c.do(ctx, request{Op: opGet, Path: path}, Streams{Out: w})
	return err
}

// PutTree copies the host's directory from to the guest's directory to:
// directories, files and symbolic links.
func (c *Client) PutTree(ctx context.Context, from, to string) error {
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		err := addTree(tw, from)
		_ = w.CloseWithError(errors.Join(err, tw.Close()))
	}()
	defer func() { _ = r.Close() }()
	_, err := c.do(ctx, request{Op: opUntar, Path: to}, Streams{In: r})
	return err
}

func addTree(tw *tar.Writer, root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var link string
		if info.Mode()&fs.ModeSymlink != 0 {
			if link, err = os.Readlink(path); err != nil {
				return err
			}
		}
		if info.Mode()&fs.ModeSocket != 0 {
			return nil
		}
		h, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		if h.Name, err = filepath.Rel(root, path); err != nil {
			return err
		}
		if err := tw.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.CopyN(tw, f, h.Size)
		return err
	})
}

// Setup sets the machine up.
func (c *Client) Setup(ctx context.Context, s Setup) error {
	_, err := c.do(ctx, request{Op: opSetup, Setup: &s}, Streams{})
	return err
}

func (c *Client) do(ctx context.Context, req request, s Streams) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	stop := context.AfterFunc(ctx, c.Close)
	defer stop()
	status, err := c.exchange(req, s)
	if err != nil && ctx.Err() != nil {
		return 0, fmt.Errorf("%s in the guest: %w", req.Op, ctx.Err())
	}
	return status, err
}

func (c *Client) exchange(req request, s Streams) (int, error) {
	if err := c.w.putJSON(frameRequest, req); err != nil {
		return 0, fmt.Errorf("send the request: %w", err)
	}
	done := make(chan struct{})
	input := &requestInput{w: c.w}
	defer func() {
		close(done)
		input.end()
	}()
	feedErr := make(chan error, 1)
	go func() { feedErr <- c.feed(s.In, input) }()
	if s.Signals != nil {
		go func() {
			for {
				select {
				case sig := <-s.Signals:
					if c.w.put(frameSignal, []byte{byte(sig)}) != nil {
						return // the reading side tells
					}
				case <-done:
					return
				}
			}
		}()
	}
	for {
		f, err := c.r.next()
		if err != nil {
			select {
			case feed := <-feedErr:
				err = errors.Join(feed, err)
			default:
			}
			return 0, fmt.Errorf("read from the guest: %w", err)
		}
		var to io.Writer
		switch f.kind {
		case frameOut:
			to = s.Out
		case frameErr:
			to = s.Err
		case frameResult:
			var res result
			if err := json.Unmarshal(f.payload, &res); err != nil {
				return 0, fmt.Errorf("decode the result: %w", err)
			}
			if res.Error != "" {
				return 0, fmt.Errorf("guest: %s", res.Error)
			}
			return res.Status, nil
		}
		if to != nil {
			if _, err := to.Write(f.payload); err != nil {
				return 0, fmt.Errorf("pass on the guest's output: %w", err)
			}
		}
	}
}

// requestInput sends input frames as long as the request they belong to lasts:
// one that came later would be taken for the next request's.
type requestInput struct {
	mu    sync.Mutex
	w     *frameWriter
	ended bool
}

func (r *requestInput) put(kind byte, p []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return nil
	}
	return r.w.put(kind, p)
}

func (r *requestInput) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
}

// feed sends in as the request's input. It may outlive the request by one read
// that does not end; what that read gives is lost.
func (c *Client) feed(in io.Reader, to *requestInput) error {
	if in == nil {
		return to.put(frameEnd, nil)
	}
	buf := make([]byte, maxFrame/2)
	for {
		n, err := in.Read(buf)
		if n > 0 {
			if err := to.put(frameInput, buf[:n]); err != nil {
				return fmt.Errorf("send input: %w", err)
			}
		}
		if err == io.EOF {
			return to.put(frameEnd, nil)
		}
		if err != nil {
			// The request must not take a part for the whole: cut the line.
			c.Close()
			return fmt.Errorf("read the input: %w", err)
		}
	}
}
