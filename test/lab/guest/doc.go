// Package guest starts the lab's machines and runs things in them.
//
// There are two kinds behind the one interface [Guest]: a User-Mode Linux
// kernel, which is a few unprivileged processes of the host and answers after
// about a second, and QEMU with Debian's own kernel under emulation. Both boot
// the same root image below a tmpfs, so that every start is pristine, and run
// the same pid 1, guestd.
//
// A guest is driven over two channels. The control line is a socket pair
// between the process that starts the guest and guestd; it needs no network,
// and carries the guest's set-up. A guest that has a management interface
// listens there too, for every process that comes later ([Attach]).
//
// Each guest owns a directory: pid file, console log, and what its kind needs.
// [Start] first ends and removes what a killed predecessor left in it.
package guest
