package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// modules are the modules of the drivers that no device asks for by itself, and that are
// loaded for whoever asks. No other module is.
var modules = map[string]string{"vfio-pci": "vfio_pci", "virtio_vdpa": "virtio_vdpa", "vhost_vdpa": "vhost_vdpa"}

// loadDriver makes sure that the kernel has the driver on the bus, "pci" or "vdpa". A
// module that is missing systemd loads, at the host's SystemBus, by its unit
// modprobe@.service: as the node's modprobe and its settings say, and nothing else.
func (h *Host) loadDriver(ctx context.Context, bus, driver string) error {
	path := filepath.Join(h.sysfs, "bus", bus, "drivers", driver)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	module := modules[driver]
	if module == "" || h.SystemBus == "" {
		return fmt.Errorf("driver %s is not loaded: %w: load its module on the node", driver, unix.ENXIO)
	}
	err := h.modprobe(ctx, module)
	if _, absent := os.Stat(path); absent == nil {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("modprobe, run by systemd, did not load it: install module %s for the node's kernel, or take it off modprobe's blacklist", module)
	}
	return fmt.Errorf("driver %s is not loaded: %w: %w; load module %s on the node", driver, unix.ENXIO, err, module)
}

// modprobe returns when systemd has done what it can.
func (h *Host) modprobe(ctx context.Context, module string) error {
	const (
		patience = 10 * time.Second
		interval = 20 * time.Millisecond
	)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	bus, err := systemBus(ctx, h.SystemBus)
	if err != nil {
		return err
	}
	defer func() { _ = bus.Close() }() // what it could tell the calls have told
	const systemd, manager = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
	unit := "modprobe@" + module + ".service"
	var job dbus.ObjectPath
	if err := bus.Object(systemd, manager).CallWithContext(ctx, systemd+".Manager.StartUnit", 0, unit, "replace").Store(&job); err != nil {
		return fmt.Errorf("have systemd start %s: %w", unit, err)
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for { // the job is there until it is done
		call := bus.Object(systemd, job).CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, systemd+".Job", "State")
		switch err := call.Err; {
		case ctx.Err() != nil:
			return fmt.Errorf("wait for systemd to start %s: %w", unit, ctx.Err())
		case errors.As(err, new(dbus.Error)):
			return nil
		case err != nil:
			return fmt.Errorf("wait for systemd to start %s: %w", unit, err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}
