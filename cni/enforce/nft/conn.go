package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluice-network/sluice/internal/host"
)

// answerTimeout bounds the wait for the kernel, which holds one lock for all changes of
// a namespace's rules.
var answerTimeout = unix.Timeval{Sec: 30}

// conn is a socket for changes in one network namespace.
type conn struct {
	fd   int
	port uint32 // by which the kernel tells our changes
}

// open opens a socket in the namespace, which receives from the given groups.
func open(ns *host.Netns, groups uint32) (*conn, error) {
	c := &conn{fd: -1}
	err := ns.Do(func() (err error) {
		if c.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER); err != nil {
			return err
		}
		if err = unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
			return err
		}
		address, err := unix.Getsockname(c.fd)
		if err != nil {
			return err
		}
		c.port = address.(*unix.SockaddrNetlink).Pid
		// Without it an errno comes without the kernel's own words; old kernels have none.
		_ = unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
		if groups != 0 {
			return nil
		}
		return unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &answerTimeout)
	})
	if err != nil {
		c.close()
		return nil, fmt.Errorf("open nf_tables socket: %w", err)
	}
	return c, nil
}

func (c *conn) close() {
	if c.fd >= 0 {
		unix.Close(c.fd)
	}
}

// commit does all the operations, or none of them and returns an error.
func (c *conn) commit(ops []op) error {
	if len(ops) == 0 {
		return nil
	}
	b, of, last := transaction(ops)
	// The kernel takes a batch as one datagram, whatever its size.
	if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2*len(b)+65536); err != nil {
		return fmt.Errorf("make room for a transaction of %d bytes: %w", len(b), err)
	}
	if err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send a transaction of %d bytes: %w", len(b), err)
	}
	var failed error
	for {
		messages, err := c.receive()
		if err != nil {
			return errors.Join(failed, fmt.Errorf("wait for the kernel to take a transaction: %w", err))
		}
		for _, m := range messages {
			if m.kind != unix.NLMSG_ERROR {
				continue
			}
			errno, words := m.err()
			if errno != 0 && failed == nil {
				failed = fmt.Errorf("commit %d operations: %w", len(ops), refused(errno, words))
				if o, ok := of[m.sequence]; ok {
					failed = fmt.Errorf("%s: %w", o, refused(errno, words))
				}
			}
			if m.sequence == 0 && errno != 0 {
				// Of the batch as a whole. Errors of its messages may follow, and are
				// of no more interest.
				c.drain()
				return failed
			}
			if m.sequence == last {
				return failed
			}
		}
	}
}

// refused adds the mend to an errno where the cause is known.
func refused(errno unix.Errno, words string) error {
	err := error(errno)
	if words != "" {
		err = fmt.Errorf("%w: %s", errno, words)
	}
	if errno == unix.EOPNOTSUPP || errno == unix.EAFNOSUPPORT {
		err = fmt.Errorf("%w; the kernel needs nf_tables with families inet and netdev, and the egress hook (Linux 5.16, CONFIG_NFT_CT, CONFIG_NF_TABLES_INET, CONFIG_NF_TABLES_NETDEV, CONFIG_NETFILTER_EGRESS)", err)
	}
	return err
}

// drain drops answers that nobody waits for.
func (c *conn) drain() {
	var buffer [4096]byte
	for {
		if _, _, err := unix.Recvfrom(c.fd, buffer[:], unix.MSG_DONTWAIT); err != nil {
			return
		}
	}
}

// received is a message from the kernel.
type received struct {
	kind     uint16
	sequence uint32
	port     uint32
	flags    uint16
	data     []byte
}

// err is the errno of an answer and what the kernel says of it.
func (m received) err() (unix.Errno, string) {
	if len(m.data) < 4 {
		return unix.EPROTO, ""
	}
	errno := unix.Errno(-int32(binary.NativeEndian.Uint32(m.data)))
	if m.flags&unix.NLM_F_ACK_TLVS == 0 || len(m.data) < 4+unix.NLMSG_HDRLEN {
		return errno, ""
	}
	skip := 4 + unix.NLMSG_HDRLEN
	if m.flags&unix.NLM_F_CAPPED == 0 {
		skip = 4 + int(binary.NativeEndian.Uint32(m.data[4:]))
	}
	if skip > len(m.data) {
		return errno, ""
	}
	return errno, text(attributes(m.data[skip:])[1]) // NLMSGERR_ATTR_MSG
}

func (c *conn) receive() ([]received, error) {
	buffer := make([]byte, 65536)
	n, _, err := unix.Recvfrom(c.fd, buffer, 0)
	if err != nil {
		return nil, err
	}
	return parse(buffer[:n])
}

func parse(b []byte) ([]received, error) {
	var messages []received
	for len(b) >= unix.NLMSG_HDRLEN {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			return nil, fmt.Errorf("message of %d bytes in %d", size, len(b))
		}
		messages = append(messages, received{
			kind: binary.NativeEndian.Uint16(b[4:]), flags: binary.NativeEndian.Uint16(b[6:]),
			sequence: binary.NativeEndian.Uint32(b[8:]), port: binary.NativeEndian.Uint32(b[12:]), data: b[unix.NLMSG_HDRLEN:size],
		})
		b = b[min(len(b), (size+3)&^3):]
	}
	return messages, nil
}

var dumps atomic.Uint32

// get asks for objects of a table, or of all of its family if it has no name, and calls
// f for each one's attributes. There are none if there is no table.
func (c *conn) get(kind uint16, t table, ask func(*buffer), f func(map[uint16][]byte)) error {
	for {
		again, err := c.dump(kind, t, ask, f)
		if !again {
			return err
		}
	}
}

// dump is one try of get. It says to try again when the rules changed under it.
func (c *conn) dump(kind uint16, t table, ask func(*buffer), f func(map[uint16][]byte)) (again bool, err error) {
	var b buffer
	sequence := dumps.Add(1) | 1<<31
	b.message(unix.NFNL_SUBSYS_NFTABLES<<8|kind, unix.NLM_F_DUMP, sequence, t.family, 0, func() {
		if t.name != "" {
			b.string(1, t.name)
		}
		if ask != nil {
			ask(&b)
		}
	})
	if err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return false, fmt.Errorf("ask for rules: %w", err)
	}
	var objects []map[uint16][]byte
	for {
		messages, err := c.receive()
		if err != nil {
			return false, fmt.Errorf("read rules: %w", err)
		}
		for _, m := range messages {
			if m.sequence != sequence {
				continue
			}
			again = again || m.flags&unix.NLM_F_DUMP_INTR != 0
			switch m.kind {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				errno, words := m.err()
				if errno == unix.EINTR {
					again, errno = true, 0
				}
				if errno != 0 && errno != unix.ENOENT {
					return false, fmt.Errorf("read rules of table %s: %w", t.name, refused(errno, words))
				}
				if !again {
					for _, o := range objects {
						f(o)
					}
				}
				return again, nil
			default:
				if a := attributes(m.data[4:]); t.name == "" || text(a[1]) == t.name {
					objects = append(objects, a)
				}
			}
		}
	}
}

// attributes are a message's, by type.
func attributes(b []byte) map[uint16][]byte {
	all := map[uint16][]byte{}
	each(b, func(kind uint16, v []byte) { all[kind] = v })
	return all
}

func each(b []byte, f func(kind uint16, v []byte)) {
	for len(b) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:size])
		b = b[min(len(b), (size+3)&^3):]
	}
}

func text(b []byte) string { return strings.TrimRight(string(b), "\x00") }

// tables are the names of those of a family.
func (c *conn) tables(family uint8) (names []string, err error) {
	err = c.get(unix.NFT_MSG_GETTABLE, table{family: family}, nil, func(a map[uint16][]byte) {
		names = append(names, text(a[unix.NFTA_TABLE_NAME]))
	})
	return names, err
}

// counters are the packets that the counters of a table have counted, by name.
func (c *conn) counters(t table) (map[string]uint64, error) {
	found := map[string]uint64{}
	err := c.get(unix.NFT_MSG_GETOBJ, t, nil, func(a map[uint16][]byte) {
		if packets := attributes(a[unix.NFTA_OBJ_DATA])[unix.NFTA_COUNTER_PACKETS]; len(packets) == 8 {
			found[text(a[unix.NFTA_OBJ_NAME])] = binary.BigEndian.Uint64(packets)
		}
	})
	return found, err
}
