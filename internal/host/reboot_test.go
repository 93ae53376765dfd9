package host

import (
	"bufio"
	"encoding/binary"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"
)

// bus is a D-Bus daemon that answers each call of one client with what answer gives: a
// value, or an error's name. Calls arrive in its channel.
func bus(t *testing.T, answer func(member string) (value any, errorName string)) (socket string, calls <-chan *dbus.Message) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "bus")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	got := make(chan *dbus.Message, 100)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		in := bufio.NewReader(conn)
		for { // D-Bus specification, "Authentication Protocol"
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			reply := "ERROR\r\n"
			switch line = strings.Trim(line, "\x00\r\n"); {
			case line == "BEGIN":
				reply = ""
			case strings.HasPrefix(line, "AUTH EXTERNAL"):
				reply = "OK 1234deadbeef\r\n"
			case strings.HasPrefix(line, "AUTH"):
				reply = "REJECTED EXTERNAL\r\n"
			}
			if _, err := conn.Write([]byte(reply)); err != nil {
				return
			}
			if reply == "" {
				break
			}
		}
		for {
			call, err := dbus.DecodeMessage(in)
			if err != nil {
				return
			}
			got <- call
			value, failure := answer(call.Headers[dbus.FieldMember].Value().(string))
			reply := &dbus.Message{Type: dbus.TypeMethodReply, Headers: map[dbus.HeaderField]dbus.Variant{
				dbus.FieldReplySerial: dbus.MakeVariant(call.Serial()), dbus.FieldSender: dbus.MakeVariant("org.freedesktop.DBus"),
			}}
			if value != nil {
				reply.Body = []any{value}
				reply.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(value))
			}
			if failure != "" {
				reply.Type = dbus.TypeError
				reply.Headers[dbus.FieldErrorName] = dbus.MakeVariant(failure)
			}
			if reply.EncodeTo(conn, binary.LittleEndian) != nil {
				return
			}
		}
	}()
	return socket, got
}

func TestReboot(t *testing.T) {
	socket, calls := bus(t, func(member string) (any, string) {
		if member == "Hello" {
			return ":1.7", ""
		}
		return nil, ""
	})
	if err := Reboot(t.Context(), socket); err != nil {
		t.Fatal(err)
	}
	<-calls // Hello
	call := <-calls
	for field, want := range map[dbus.HeaderField]string{
		dbus.FieldDestination: "org.freedesktop.login1", dbus.FieldInterface: "org.freedesktop.login1.Manager", dbus.FieldMember: "Reboot",
	} {
		if got := call.Headers[field].Value(); got != want {
			t.Errorf("header %d is %v, want %s", field, got, want)
		}
	}
	if len(call.Body) != 1 || call.Body[0] != false {
		t.Errorf("arguments %v: logind would ask somebody", call.Body)
	}
}

func TestRebootRefused(t *testing.T) {
	socket, _ := bus(t, func(member string) (any, string) {
		if member == "Hello" {
			return ":1.7", ""
		}
		return nil, "org.freedesktop.DBus.Error.AccessDenied"
	})
	if err := Reboot(t.Context(), socket); err == nil || !strings.Contains(err.Error(), "ask systemd-logind to reboot") || !strings.Contains(err.Error(), "AccessDenied") {
		t.Errorf("refused: %v", err)
	}
	if err := Reboot(t.Context(), filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "by hand") {
		t.Errorf("no systemd: %v", err)
	}
}

func TestBootID(t *testing.T) {
	a, err := BootID()
	if b, _ := BootID(); err != nil || len(a) != 36 || a != b {
		t.Errorf("%q, %q, %v", a, b, err)
	}
}

func TestTimeSinceBootGoesOn(t *testing.T) {
	before, err := SinceBoot()
	if err != nil || before <= 0 {
		t.Fatal(before, err)
	}
	if after, err := SinceBoot(); err != nil || after < before {
		t.Error(before, after, err)
	}
}
