package guest

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
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
	// another status than 0 gives an [*ExitError] without output.
	Exec(ctx context.Context, cmd Command) error
	// Put writes a file, by rename, making missing directories.
	Put(ctx context.Context, r io.Reader, mode fs.FileMode, path string) error
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
	// Start is a command run in the background once the guest is set up, its
	// output in /var/log/start.log; for example "/host/start". Empty is none.
	Start string

	Memory int // MiB; a ceiling for UML, an allocation for QEMU; 0 is 1024
	CPU    int // host CPU for all threads of a UML guest, modulo the host's CPUs

	Net  Net // none: a bare guest, reached over its control line alone
	Card Card
	// Modules are further kernel modules to load by name, with parameters,
	// from the image (QEMU: Debian's modules). Built in ones are passed over.
	Modules []string
	// Attached ends the guest when the process that started it ends.
	Attached bool
	// Warm lets a QEMU guest start from a saved state of the same machine,
	// which is made by the first start.
	Warm bool
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

// Start boots a guest and returns when it is set up and runs commands. An
// error carries the end of the console and the likely cause.
func Start(ctx context.Context, spec Spec) (Guest, error) {
	return nil, fmt.Errorf("start guest %s: not built in", spec.Kind)
}

// Attach returns the guest that another process started with the same spec
// and a network, without asking whether it still runs.
func Attach(spec Spec) Guest { return nil }

// Sweep ends the guest that a killed process left in the directory dir, if
// there is one, and removes its files except the console log.
func Sweep(dir string) error { return nil }

// InNetns runs f on a thread inside the named network namespace ("ip netns"
// name; "" is the present one). Sockets and processes that f makes belong to
// it. f must not start goroutines that need the namespace.
func InNetns(name string, f func() error) error { return f() }
