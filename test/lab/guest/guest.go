package guest

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"syscall"

	"github.com/sluice-network/sluice/test/lab/guest/control"
)

// Guest is a running machine.
type Guest interface {
	// Name is the guest's host name.
	Name() string
	// Run runs a script with /bin/sh as root and returns its standard output
	// and error together. A script that ends with another status than 0 gives
	// an [*ExitError].
	Run(ctx context.Context, script string) (string, error)
	// Exec runs a command with its own streams. A command that ends with
	// another status than 0 gives an [*ExitError] without output. The end of
	// ctx kills the command, and ends a guest without a network, whose control
	// line cannot carry anything after a command cut short.
	Exec(ctx context.Context, cmd Command) error
	// Put writes a file, by rename, making missing directories.
	Put(ctx context.Context, r io.Reader, mode fs.FileMode, path string) error
	// PutTree copies the host's directory from to the guest's directory to.
	PutTree(ctx context.Context, from, to string) error
	// Get copies a file of the guest to w.
	Get(ctx context.Context, path string, w io.Writer) error
	// ConsoleTail returns the last n lines of the console.
	ConsoleTail(n int) string
	// Stop ends the guest at once and removes what it left except its console
	// log. Stopping a guest that has ended is no error.
	Stop(ctx context.Context) error
}

// Command is a command to run in a guest, as root.
type Command struct {
	Args []string // program (found by the guest's PATH) and arguments
	Dir  string   // working directory, default /root
	Env  []string // added to the guest's environment, key=value
	// Stdin is sent to the command until its end; nil is no input.
	Stdin io.Reader
	// Stdout and Stderr get the command's output as it comes; nil discards.
	Stdout, Stderr io.Writer
	// Signals are passed on to the command and what it started.
	Signals <-chan syscall.Signal
}

// ExitError is the end of a command with another status than 0.
type ExitError struct {
	Status int    // exit status; 128 + n after signal n
	Output string // what [Guest.Run] collected
}

func (e *ExitError) Error() string {
	if e.Output == "" {
		return fmt.Sprintf("exit status %d", e.Status)
	}
	return fmt.Sprintf("exit status %d: %s", e.Status, e.Output)
}

// Kind is the kind of a machine.
type Kind string

// The kinds of guests.
const (
	UML  Kind = "uml"
	QEMU Kind = "qemu"
)

// Spec is what a guest is started from.
type Spec struct {
	Kind   Kind
	Parts  Parts
	Name   string // host name, and a part of paths and process names
	Number int    // 1 to 99; makes MAC addresses unique among the guests of a network
	Dir    string // the guest's own directory on the host
	Root   string // the root image, see [RootImage]

	// Files is a directory of the host that the guest sees at /host: live in
	// UML, a copy made at the start in QEMU. Empty is none.
	Files string
	// Host are further directories of the host to show in a UML guest.
	Host []control.Host
	// Start is a command run in the background once the guest is set up, its
	// output in /var/log/start.log; for example "/host/start". Empty is none.
	Start string

	Memory int // MiB; a ceiling for UML, an allocation for QEMU; 0 is 1024
	// CPU is the host CPU for all threads of a UML guest, modulo the host's
	// CPUs: a guest whose threads wander is 4 to 7 times slower, since each of
	// its system calls then wakes another CPU.
	CPU int

	Net  Net // none: a bare guest, reached over its control line alone
	Card Card
	// Modules are further modules of Debian's kernel to load in QEMU; the UML
	// kernel has everything built in.
	Modules []string
	// Attached ends the guest when the process that started it ends.
	Attached bool
	// Cold makes a QEMU guest boot. Otherwise it starts from a saved state of
	// the same machine just booted, which the first such start makes.
	Cold bool
}

// Net is a guest's place in a network namespace of the host.
type Net struct {
	Namespace string       // as in "ip netns"; empty is the one of the process
	Mgmt      string       // tap for the management interface "mgmt"
	Data      [2]string    // taps that the wires of the first and second card reach
	Address   netip.Prefix // of mgmt; the guest answers on port [Port] of it
	Gateway   netip.Addr   // of the default route; zero is none
}

// Port is the TCP port guestd listens on at a guest's management address.
const Port = 2222

// Card is the guest's set of SR-IOV network cards: PFs ens1f0, ens2f0, ... at
// 0000:01:00.0, 0000:02:00.0, ...
type Card struct {
	Count    int // emulated cards; QEMU has igb and always 2
	TotalVFs int // per card in UML; igb has 7
	// Params are more parameters of the emulated card's module, key=value.
	Params []string
}
