package cluster

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestStartTimeIsFoundBehindAnyCommandName(t *testing.T) {
	rest := " S 1 10 10 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 98765 1000 10 18446744073709551615\n"
	for _, name := range []string{"(etcd)", "(a b)", "(a) S 1 (b))"} {
		started, ended, err := startTime([]byte("42 " + name + rest))
		if err != nil || started != "98765" || ended {
			t.Errorf("%s: start %q, ended %v, %v", name, started, ended, err)
		}
	}
	if _, ended, err := startTime([]byte("42 (etcd)" + strings.Replace(rest, "S", "Z", 1))); err != nil || !ended {
		t.Errorf("zombie: ended %v, %v", ended, err)
	}
	if _, _, err := startTime([]byte("42 (etcd) S 1")); err == nil {
		t.Error("a short line is accepted")
	}
}

func TestProcessIsFoundAgainAndStopped(t *testing.T) {
	p := Process{Dir: t.TempDir(), Name: "sleeper"}
	ended, err := p.start("", []string{"/bin/sh", "-c", "echo hello; exec sleep 60"})
	if err != nil {
		t.Fatal(err)
	}
	again := Process{Dir: p.Dir, Name: p.Name} // as another process sees it
	if _, running := again.Pid(); !running {
		t.Error("a process that runs is not found")
	}
	for deadline := time.Now().Add(time.Minute); again.Tail(1) != "hello" && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	if tail := again.Tail(1); tail != "hello" {
		t.Errorf("log ends with %q", tail)
	}
	if err := again.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("process ended with %v", err)
	}
	if err := again.Stop(); err != nil {
		t.Errorf("stop for the second time: %v", err)
	}
}

func TestAProcessOfTheSameIDIsNotOurs(t *testing.T) {
	p := Process{Dir: t.TempDir(), Name: "other"}
	own, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(own)
	fields[1] += "0" // another start time
	if err := writeFiles(p.Dir, map[string][]byte{"run/other.pid": []byte(strings.Join(fields, " "))}); err != nil {
		t.Fatal(err)
	}
	if _, running := p.Pid(); running {
		t.Error("a process id that is used again is taken for ours")
	}
	if err := p.Stop(); err != nil { // were it wrong, the test would end here
		t.Error(err)
	}
}
