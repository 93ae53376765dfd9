package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// stockModules mounts the image with Debian's modules and loads those that
// every QEMU guest needs: the control line's, the network cards'.
func stockModules() error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	disk, err := waitFor(5*time.Second, "/dev/vdb")
	if err != nil {
		return fmt.Errorf("find the modules' image: %w", err)
	}
	dir := "/lib/modules/" + unix.ByteSliceToString(uts.Release[:])
	if err := (mount{kind: "erofs", from: disk, to: dir, flags: unix.MS_RDONLY}).do(); err != nil {
		return err
	}
	return modprobe("virtio_console", "virtio_net", "igb", "igbvf", "macvlan")
}

func modprobe(names ...string) error {
	out, err := exec.Command("/usr/sbin/modprobe", append([]string{"-a"}, names...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("load modules %v: %w: %s", names, err, out)
	}
	return nil
}

// driverOf returns the driver's name of a network interface's device, "" if none.
func driverOf(iface string) string {
	target, err := os.Readlink(filepath.Join("/sys/class/net", iface, "device/driver"))
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}

// slotOf returns the name of an interface's device on its bus, such as a PCI address.
func slotOf(iface string) string {
	target, err := os.Readlink(filepath.Join("/sys/class/net", iface, "device"))
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}
