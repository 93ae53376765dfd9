package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// rtnlTimeout bounds the wait for one answer: the kernel's RTNL lock is shared
// by the whole node and may be held for seconds, but not for a minute.
const rtnlTimeout = 30 * time.Second

// rtnl is a route netlink socket in one network namespace. A socket stays in the
// namespace it was opened in, whatever thread uses it.
//
// The kernel has answered when sending returns, so the socket blocks and is not in the
// runtime's poller, which each answer would wake; and answers are read
// into few buffers. The library's sockets are for what is not in the way of a pod.
type rtnl struct {
	within func(func() error) error // runs a function in the namespace

	mu   sync.Mutex
	fd   int
	port uint32 // that the kernel gave the socket
	seq  uint32

	opened sync.Mutex
	handle *netlink.Handle
}

// openRtnl opens a socket in a namespace, given by a function that runs another in it.
func openRtnl(within func(func() error) error) (*rtnl, error) {
	r := &rtnl{within: within, fd: -1}
	if err := within(r.open); err != nil {
		r.close()
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return r, nil
}

func (r *rtnl) open() (err error) {
	if r.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE); err != nil {
		return err
	}
	if err = unix.Bind(r.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	own, err := unix.Getsockname(r.fd)
	if err != nil {
		return err
	}
	if a, ok := own.(*unix.SockaddrNetlink); ok {
		r.port = a.Pid
	}
	// Without the first an errno comes without the driver's own words; the second keeps
	// the request out of the answer.
	_ = unix.SetsockoptInt(r.fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	_ = unix.SetsockoptInt(r.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	tv := unix.NsecToTimeval(rtnlTimeout.Nanoseconds())
	return errors.Join(
		unix.SetsockoptTimeval(r.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv),
		unix.SetsockoptTimeval(r.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
	)
}

func (r *rtnl) close() {
	if r.fd >= 0 {
		unix.Close(r.fd)
	}
	if r.handle != nil {
		r.handle.Close()
	}
}

// library returns the library's handle for the namespace.
func (r *rtnl) library() (*netlink.Handle, error) {
	r.opened.Lock()
	defer r.opened.Unlock()
	if r.handle != nil {
		return r.handle, nil
	}
	err := r.within(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		h.DisableVFInfoCollection()
		r.handle = h
		return h.SetSocketTimeout(rtnlTimeout)
	})
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return r.handle, nil
}

// request sends one message and returns the kernel's answers to it.
func (r *rtnl) request(kind, flags int, data ...nl.NetlinkRequestData) ([][]byte, error) {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Data = data
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seq++
	req.Seq = r.seq
	message := req.Serialize()
	for {
		err := unix.Sendto(r.fd, message, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return r.receive()
	}
}

// buffers have room for the largest message there is, of a PF and its VFs: one attribute
// with 64 KiB, and the rest.
var buffers = sync.Pool{New: func() any { return new(make([]byte, 80<<10)) }}

// receive reads the answers to the last request, up to its end.
func (r *rtnl) receive() (answers [][]byte, err error) {
	buffer := buffers.Get().(*[]byte)
	defer buffers.Put(buffer)
	var interrupted error
	for {
		n, from, err := unix.Recvfrom(r.fd, *buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if !fromKernel(from) {
			continue
		}
		messages, err := syscall.ParseNetlinkMessage((*buffer)[:n])
		if err != nil {
			return nil, fmt.Errorf("read netlink message: %w", err)
		}
		for _, m := range messages {
			if m.Header.Seq != r.seq || m.Header.Pid != r.port {
				continue // to a request that was given up
			}
			if m.Header.Flags&unix.NLM_F_DUMP_INTR != 0 {
				interrupted = netlink.ErrDumpInterrupted
			}
			switch m.Header.Type {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				if err := refusalIn(m); err != nil {
					return nil, err
				}
				return answers, interrupted
			}
			answers = append(answers, append([]byte(nil), m.Data...))
			if m.Header.Flags&unix.NLM_F_MULTI == 0 {
				return answers, interrupted
			}
		}
	}
}

// refusalIn is the error that ends an answer, with the words of the driver if there are
// any (struct nlmsgerr in linux/netlink.h); nil when there is none.
func refusalIn(m syscall.NetlinkMessage) error {
	if len(m.Data) < 4 {
		return nil // the end of a dump may say nothing
	}
	errno := -int32(binary.NativeEndian.Uint32(m.Data))
	if errno == 0 {
		return nil
	}
	if m.Header.Type == unix.NLMSG_ERROR && m.Header.Flags&unix.NLM_F_ACK_TLVS != 0 {
		rest := m.Data[4:]
		size := unix.SizeofNlMsghdr
		if m.Header.Flags&unix.NLM_F_CAPPED == 0 && len(rest) >= size {
			size = (int(binary.NativeEndian.Uint32(rest)) + 3) &^ 3 // the whole request
		}
		if len(rest) > size {
			if words, ok := attribute(rest[size:], nl.NLMSGERR_ATTR_MSG); ok {
				return fmt.Errorf("%w: %s", syscall.Errno(errno), text(words))
			}
		}
	}
	return syscall.Errno(errno)
}

// link sends one message about the link with the given index and returns the
// kernel's answers.
func (r *rtnl) link(kind, index int, msg *nl.IfInfomsg, attrs ...*nl.RtAttr) ([][]byte, error) {
	if msg == nil {
		msg = nl.NewIfInfomsg(unix.AF_UNSPEC)
	}
	msg.Index = int32(index)
	flags := unix.NLM_F_ACK
	if kind == unix.RTM_GETLINK {
		flags = 0 // the answer is one
	}
	return r.request(kind, flags, append([]nl.NetlinkRequestData{msg}, list(attrs)...)...)
}

func list(attrs []*nl.RtAttr) []nl.NetlinkRequestData {
	out := make([]nl.NetlinkRequestData, len(attrs))
	for i, a := range attrs {
		out[i] = a
	}
	return out
}
