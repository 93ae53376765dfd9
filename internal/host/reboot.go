package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// BootID is another one after each boot (boot_id in drivers/char/random.c).
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot ID: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// SinceBoot is the time since this boot, also that in which the machine was suspended. No
// change of the wall clock changes it (CLOCK_BOOTTIME, clock_gettime(2)).
func SinceBoot() (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0, fmt.Errorf("read the time since boot: %w", err)
	}
	return time.Duration(t.Nano()), nil
}

// Reboot asks systemd-logind, at the D-Bus socket, to shut the node down in order
// and boot it anew (org.freedesktop.login1.Manager.Reboot, not asking anybody). It
// returns when logind has agreed; the caller will be ended.
func Reboot(ctx context.Context, socket string) error {
	bus, err := systemBus(ctx, socket)
	if err != nil {
		return fmt.Errorf("%w; the node must be rebooted by hand where systemd is not there or not reachable", err)
	}
	defer func() { _ = bus.Close() }() // what it could tell the calls have told
	const interactive = false
	call := bus.Object("org.freedesktop.login1", "/org/freedesktop/login1").CallWithContext(ctx, "org.freedesktop.login1.Manager.Reboot", 0, interactive)
	if call.Err != nil {
		return fmt.Errorf("ask systemd-logind to reboot: %w", call.Err)
	}
	return nil
}

// systemBus connects to the D-Bus that systemd listens on.
func systemBus(ctx context.Context, socket string) (*dbus.Conn, error) {
	bus, err := dbus.Dial("unix:path="+socket, dbus.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("connect to systemd at %s: %w", socket, err)
	}
	if err = bus.Auth(nil); err == nil {
		err = bus.Hello()
	}
	if err != nil {
		return nil, fmt.Errorf("speak to systemd at %s: %w", socket, errors.Join(err, bus.Close()))
	}
	return bus, nil
}
