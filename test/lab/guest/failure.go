package guest

import (
	"fmt"
	"strings"
)

// Failure is a guest that did not start or ended by itself.
type Failure struct {
	Name    string
	Err     error
	Console string // its last lines
	Cause   string // likely cause and mend, may be empty
}

func (e *Failure) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "guest %s: %v", e.Name, e.Err)
	if e.Console != "" {
		fmt.Fprintf(&b, "\n  end of its console:\n    %s", strings.ReplaceAll(e.Console, "\n", "\n    "))
	}
	if e.Cause != "" {
		fmt.Fprintf(&b, "\n  likely cause: %s", e.Cause)
	}
	return b.String()
}

func (e *Failure) Unwrap() error { return e.Err }

// causes maps what appears on a console, or in an error, to what a person can
// do about it; the first that matches counts.
var causes = []struct{ sign, cause string }{
	{"version magic", "module mismatch: the module was built for another kernel; remove its directory from the cache and start again"},
	{"Unknown symbol", "module mismatch: the kernel lacks what the module calls; add the option to uml.config"},
	{"module mismatch", "the module was built for another kernel: remove its directory from the cache and start again"},
	{"load module", "the module does not take these parameters: its own message is on the console"},
	{"uml_load_file: Failed to allocate", "the guest has too little memory to boot: give it more"},
	{"Too few physical memory", "the guest has too little memory to boot: give it more"},
	{"Out of memory", "the guest ran out of memory: give it more"},
	{"oom-kill", "the guest ran out of memory: give it more"},
	{"Cannot allocate memory", "this machine has too little free memory for the guest"},
	{"No space left on device", "this machine's /dev/shm, which holds the guest's memory, is full"},
	{"find the root image", "the root image could not be read: remove its directory from the cache and start again"},
	{"valid erofs superblock", "the root image is damaged: remove its directory from the cache and start again"},
	{"Kernel panic", "the guest's kernel panicked: the lines above say why; a fault in the module of test/nic is the first suspect"},
	{"BUG:", "a fault in the guest's kernel: the lines above say where; the module of test/nic is the first suspect"},
	{"ptrace", "this machine forbids ptrace, which User-Mode Linux needs"},
	{"deadline exceeded", "the guest was too slow: is this machine overloaded?"},
}

func failure(name, dir string, err error) error {
	f := &Failure{Name: name, Err: err, Console: consoleEnd(dir)}
	text := strings.ToLower(consoleTail(dir, 200) + "\n" + err.Error())
	for _, c := range causes {
		if strings.Contains(text, strings.ToLower(c.sign)) {
			f.Cause = c.cause
			break
		}
	}
	return f
}

// consoleEnd returns the last lines of the console, or what begins with the
// report of a kernel fault: its reason stands first and a long trace follows.
func consoleEnd(dir string) string {
	lines := strings.Split(consoleTail(dir, 500), "\n")
	for i, line := range lines {
		if strings.Contains(line, "Kernel panic") || strings.Contains(line, "BUG:") {
			from := max(0, i-5)
			return strings.Join(lines[from:min(len(lines), from+60)], "\n")
		}
	}
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}
