//go:build lab

package nic

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// Local experimental EtherType 1 of IEEE 802: nobody else in the guest sends it.
const testType = 0x88b5

// tag is one VLAN tag as it is on the wire.
type tag struct {
	proto uint16
	vid   uint16
	pcp   uint8
}

func (t tag) String() string { return fmt.Sprintf("%04x:%d/%d", t.proto, t.vid, t.pcp) }

// frame is a test frame; tags are outermost first. It is comparable by %v.
type frame struct {
	dst, src string
	tags     []tag
	seq      uint64
}

func (f frame) String() string {
	return fmt.Sprintf("#%d %s>%s %v", f.seq, f.src, f.dst, f.tags)
}

func (f frame) bytes() []byte {
	b := append(append([]byte{}, mac(f.dst)...), mac(f.src)...)
	for _, t := range f.tags {
		b = binary.BigEndian.AppendUint16(b, t.proto)
		b = binary.BigEndian.AppendUint16(b, uint16(t.pcp)<<13|t.vid)
	}
	b = binary.BigEndian.AppendUint16(b, testType)
	b = binary.BigEndian.AppendUint64(b, f.seq)
	return append(b, make([]byte, 46)...)
}

func parseFrame(b []byte, outer *tag) (frame, bool) {
	var f frame
	if len(b) < 14 {
		return f, false
	}
	f.dst = fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", b[0], b[1], b[2], b[3], b[4], b[5])
	f.src = fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", b[6], b[7], b[8], b[9], b[10], b[11])
	if outer != nil {
		f.tags = append(f.tags, *outer)
	}
	for b = b[12:]; len(b) >= 10; b = b[4:] {
		proto := binary.BigEndian.Uint16(b)
		if proto == testType {
			f.seq = binary.BigEndian.Uint64(b[2:])
			return f, true
		}
		if proto != unix.ETH_P_8021Q && proto != unix.ETH_P_8021AD {
			return f, false
		}
		f.tags = append(f.tags, newTag(proto, binary.BigEndian.Uint16(b[2:])))
	}
	return f, false
}

func newTag(proto, tci uint16) tag {
	return tag{proto: proto, vid: tci & 0xfff, pcp: uint8(tci >> 13)}
}

// tap sends and receives whole frames on one netdev of the current namespace.
type tap struct {
	fd   int
	name string
}

func openTap(t *testing.T, name string) tap {
	t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open packet socket for %s: %v", name, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	// The kernel takes the outer tag out of the frame: auxdata tells it.
	for _, opt := range []int{unix.PACKET_AUXDATA, unix.PACKET_IGNORE_OUTGOING} {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, opt, 1); err != nil {
			t.Fatalf("set option %d of packet socket for %s: %v", opt, name, err)
		}
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20); err != nil {
		t.Fatalf("set receive buffer for %s: %v", name, err)
	}
	addr := unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link(t, name).Attrs().Index}
	if err := unix.Bind(fd, &addr); err != nil {
		t.Fatalf("bind packet socket to %s: %v", name, err)
	}
	return tap{fd: fd, name: name}
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// send reports only errors that are not those of a link without carrier.
func (p tap) send(f frame) error {
	_, err := unix.Write(p.fd, f.bytes())
	return err
}

// received returns the test frames that have arrived by now.
func (p tap) received(t *testing.T) []frame {
	t.Helper()
	var frames []frame
	buf, oob := make([]byte, 16384), make([]byte, 256)
	for {
		n, oobn, _, _, err := unix.Recvmsg(p.fd, buf, oob, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENETDOWN) {
			return frames
		}
		if err != nil {
			t.Fatalf("receive on %s: %v", p.name, err)
		}
		outer, err := auxTag(oob[:oobn])
		if err != nil {
			t.Fatalf("receive on %s: %v", p.name, err)
		}
		if f, ok := parseFrame(buf[:n], outer); ok {
			frames = append(frames, f)
		}
	}
}

// auxTag reads the tag of a struct tpacket_auxdata, see packet(7).
func auxTag(oob []byte) (*tag, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("parse control message: %w", err)
	}
	for _, m := range msgs {
		if m.Header.Level != unix.SOL_PACKET || m.Header.Type != unix.PACKET_AUXDATA || len(m.Data) < 20 {
			continue
		}
		status := binary.NativeEndian.Uint32(m.Data)
		if status&unix.TP_STATUS_VLAN_VALID == 0 {
			return nil, nil
		}
		t := newTag(binary.NativeEndian.Uint16(m.Data[18:]), binary.NativeEndian.Uint16(m.Data[16:]))
		return &t, nil
	}
	return nil, nil
}
