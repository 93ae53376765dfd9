package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrNotNetns says that a file exists but is no network namespace, which is
// what a bind mount of a namespace leaves behind when it is unmounted.
var ErrNotNetns = errors.New("is not a network namespace")

// rtnlTimeout bounds the wait for one answer: the kernel's RTNL lock is shared
// by the whole node and may be held for seconds, but not for a minute.
const rtnlTimeout = 30 * time.Second

// NetnsID names a network namespace for as long as it lives: the device and
// inode of its nsfs file. Paths are reused, these are not while anything holds
// the namespace.
type NetnsID struct {
	Dev   uint64 `json:"dev"`
	Inode uint64 `json:"inode"`
}

// Netns is an open network namespace. It keeps the namespace alive until
// Close. It is not safe for concurrent use.
type Netns struct {
	ID NetnsID

	file *os.File
	conn *rtnl // opened at first use
}

// OpenNetns opens the namespace bound at path. The error wraps fs.ErrNotExist
// when there is no such file and ErrNotNetns when it is something else.
func OpenNetns(path string) (*Netns, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	return NetnsFromFile(f)
}

// NetnsFromFile makes a Netns of an open nsfs file, for example one received
// over a socket. It owns the file from then on, also when it fails.
func NetnsFromFile(f *os.File) (*Netns, error) {
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("%s %w", f.Name(), ErrNotNetns)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("stat network namespace %s: %w", f.Name(), err)
	}
	return &Netns{ID: NetnsID{Dev: st.Dev, Inode: st.Ino}, file: f}, nil
}

// Close lets go of the namespace.
func (n *Netns) Close() {
	if n.conn != nil {
		n.conn.close()
		n.conn = nil
	}
	if n.file != nil {
		n.file.Close()
		n.file = nil
	}
}

// Do runs f on an operating system thread that is inside the namespace. Only
// system calls of f's own goroutine are affected.
func (n *Netns) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open the thread's network namespace: %w", err)
			return
		}
		defer home.Close()
		if err = unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = f()
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
			// The thread stays locked: the runtime ends it with this goroutine
			// and no other goroutine ever runs in the wrong namespace.
			done <- errors.Join(err, fmt.Errorf("leave network namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

// rtnl is a pair of route netlink sockets in one network namespace. A socket
// stays in the namespace it was opened in, whatever thread uses it.
type rtnl struct {
	handle *netlink.Handle
	raw    map[int]*nl.SocketHandle

	within func(func() error) error // runs a function in the namespace
}

// openRtnl opens the sockets in the calling thread's namespace, the raw one when it is
// first used if within is given: most pods' is never needed.
func openRtnl(within func(func() error) error) (*rtnl, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	h.DisableVFInfoCollection()
	r := &rtnl{handle: h, within: within}
	if err = h.SetSocketTimeout(rtnlTimeout); err == nil && within == nil {
		err = r.openRaw()
	}
	if err != nil {
		r.close()
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return r, nil
}

func (r *rtnl) openRaw() error {
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	// Without it an errno comes without the driver's own words.
	_ = s.SetExtAck(true)
	tv := unix.NsecToTimeval(rtnlTimeout.Nanoseconds())
	if err := errors.Join(s.SetSendTimeout(&tv), s.SetReceiveTimeout(&tv)); err != nil {
		s.Close()
		return err
	}
	r.raw = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}
	return nil
}

func (r *rtnl) close() {
	r.handle.Close()
	for _, s := range r.raw {
		s.Close()
	}
}

// execute sends a request on the raw socket.
func (r *rtnl) execute(req *nl.NetlinkRequest) ([][]byte, error) {
	if r.raw == nil {
		if err := r.within(r.openRaw); err != nil {
			return nil, fmt.Errorf("open netlink: %w", err)
		}
	}
	req.Sockets = r.raw
	return req.Execute(unix.NETLINK_ROUTE, 0)
}

// link sends one message about the link with the given index and returns the
// kernel's answers.
func (r *rtnl) link(kind, index int, msg *nl.IfInfomsg, attrs ...*nl.RtAttr) ([][]byte, error) {
	req := nl.NewNetlinkRequest(kind, unix.NLM_F_ACK)
	if msg == nil {
		msg = nl.NewIfInfomsg(unix.AF_UNSPEC)
	}
	msg.Index = int32(index)
	req.AddData(msg)
	for _, a := range attrs {
		req.AddData(a)
	}
	return r.execute(req)
}

// rtnl returns the namespace's sockets.
func (n *Netns) rtnl() (*rtnl, error) {
	if n.conn != nil {
		return n.conn, nil
	}
	err := n.Do(func() (err error) {
		n.conn, err = openRtnl(n.Do)
		return err
	})
	return n.conn, err
}

// temporary tells errors that drivers give while they are busy with a reset of
// the VF and that go away by themselves.
func temporary(err error) bool {
	return errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EBUSY)
}
