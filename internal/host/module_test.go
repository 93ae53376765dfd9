package host

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// systemd is a bus on which systemd starts a unit, by doing start, and knows of its job
// for another two questions.
func systemd(t *testing.T, start func()) (socket string, calls <-chan *dbus.Message) {
	questions := 0
	return bus(t, func(member string) (any, string) {
		switch member {
		case "Hello":
			return ":1.7", ""
		case "StartUnit":
			start()
			return dbus.ObjectPath("/org/freedesktop/systemd1/job/7"), ""
		}
		if questions++; questions <= 2 {
			return dbus.MakeVariant("running"), ""
		}
		return nil, "org.freedesktop.DBus.Error.UnknownObject"
	})
}

func TestMissingDriversAreLoaded(t *testing.T) {
	const vf = "0000:3b:10.0"
	tr := newTree(t)
	tr.pf("0000:3b:00.0", 8, 1)
	tr.write("bus/pci/drivers/iavf/unbind", "")
	h := tr.host()
	socket, calls := systemd(t, func() { tr.write("bus/pci/drivers/vfio-pci/bind", "") })
	h.SystemBus = socket
	if err := h.BindDriver(t.Context(), vf, "vfio-pci"); err != nil {
		t.Fatal(err)
	}
	if got := tr.read("bus/pci/drivers/vfio-pci/bind"); got != vf {
		t.Errorf("bound %q", got)
	}
	<-calls // Hello
	call := <-calls
	if member := call.Headers[dbus.FieldMember].Value(); member != "StartUnit" || len(call.Body) != 2 || call.Body[0] != "modprobe@vfio_pci.service" || call.Body[1] != "replace" {
		t.Errorf("called %v %v", member, call.Body)
	}
	if len(calls) != 3 {
		t.Errorf("asked %d times for the job, want until it is no more", len(calls))
	}
	if err := h.BindDriver(t.Context(), vf, "vfio-pci"); err != nil || len(calls) != 3 {
		t.Errorf("a driver that is there: %v", err)
	}
}

// A vDPA device that is there before its driver is bound by the kernel when that comes, or
// here when another driver had it.
func TestMissingVDPADriversAreLoaded(t *testing.T) {
	for name, bound := range map[string]bool{"the kernel binds it": true, "another driver has it": false} {
		t.Run(name, func(t *testing.T) {
			const device = "vdpa:0000:3b:10.0"
			tr := newTree(t)
			tr.write("bus/vdpa/devices/"+device+"/driver_override", "")
			tr.write("bus/vdpa/drivers/virtio_vdpa/unbind", "")
			if !bound {
				tr.link("../../drivers/virtio_vdpa", "bus/vdpa/devices/"+device+"/driver")
			}
			h := tr.host()
			socket, calls := systemd(t, func() {
				tr.write("bus/vdpa/drivers/vhost_vdpa/bind", "")
				if bound {
					tr.link("../../drivers/vhost_vdpa", "bus/vdpa/devices/"+device+"/driver")
				}
			})
			h.SystemBus = socket
			if err := h.bindVDPA(t.Context(), device, "vhost_vdpa"); err != nil {
				t.Fatal(err)
			}
			<-calls // Hello
			if call := <-calls; call.Body[0] != "modprobe@vhost_vdpa.service" {
				t.Errorf("called %v", call.Body)
			}
			want := map[bool][]string{true: {"", "", ""}, false: {"vhost_vdpa", device, device}}[bound]
			for i, file := range []string{"bus/vdpa/devices/" + device + "/driver_override", "bus/vdpa/drivers/virtio_vdpa/unbind", "bus/vdpa/drivers/vhost_vdpa/bind"} {
				if got := tr.read(file); got != want[i] {
					t.Errorf("%s holds %q, want %q", file, got, want[i])
				}
			}
		})
	}
}

func TestDriversThatCannotBeLoaded(t *testing.T) {
	const vf = "0000:3b:10.0"
	tr := newTree(t)
	tr.pf("0000:3b:00.0", 8, 1)
	tr.write("bus/pci/drivers/iavf/unbind", "")
	inVain, _ := systemd(t, func() {})
	refused, _ := bus(t, func(member string) (any, string) {
		if member == "Hello" {
			return ":1.7", ""
		}
		return nil, "org.freedesktop.systemd1.NoSuchUnit"
	})
	for _, c := range []struct {
		name, socket, driver string
		want                 []string
	}{
		{"modprobe did nothing", inVain, "vfio-pci", []string{"modprobe, run by systemd, did not load it", "blacklist", "load module vfio_pci"}},
		{"systemd has no such unit", refused, "vfio-pci", []string{"NoSuchUnit", "modprobe@vfio_pci.service", "load module vfio_pci"}},
		{"no systemd", filepath.Join(t.TempDir(), "none"), "vfio-pci", []string{"connect to systemd", "load module vfio_pci"}},
		{"a driver that devices ask for themselves", inVain, "ice", []string{"driver ice is not loaded", "load its module"}},
	} {
		h := tr.host()
		h.SystemBus = c.socket
		err := h.BindDriver(t.Context(), vf, c.driver)
		var k *KernelError
		if !errors.As(err, &k) || !errors.Is(err, unix.ENXIO) || k.ErrnoName() != "ENXIO" {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: no %q in %v", c.name, want, err)
			}
		}
		if got := tr.read("bus/pci/drivers/iavf/unbind"); got != "" {
			t.Errorf("%s: the VF left its driver: %q", c.name, got)
		}
	}
}
