package main

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/sluice-network/sluice/test/lab/guest"
)

func TestParseJob(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		want job
	}{
		{"nothing", nil, job{timeout: 10 * time.Minute}},
		{"time limit", []string{"-test.timeout=90s"}, job{timeout: 90 * time.Second}},
		{"no time limit", []string{"-test.timeout=0"}, job{}},
		{"as go test does", []string{"-test.paniconexit0", "-test.testlogfile=/w/log.txt", "-test.coverprofile=/w/c.out", "-test.timeout=10m0s", "-test.run=X"},
			job{timeout: 10 * time.Minute, files: []string{"/w/log.txt", "/w/c.out"}}},
		{"profiles go to the output directory", []string{"-test.cpuprofile=cpu.out", "-test.outputdir=out"},
			job{timeout: 10 * time.Minute, files: []string{"/pkg/out/cpu.out"}, dirs: []string{"/pkg/out"}}},
		{"the log does not", []string{"-test.outputdir=/o", "-test.testlogfile=l"},
			job{timeout: 10 * time.Minute, files: []string{"/pkg/l"}, dirs: []string{"/o"}}},
		{"the test's own arguments", []string{"-args", "-test.timeout=1s", "-test.trace=t"}, job{timeout: 10 * time.Minute}},
		{"not a flag of a test", []string{"-coverprofile", "trace=x", "-test.trace="}, job{timeout: 10 * time.Minute}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.want.cwd, tt.want.program = "/pkg", "/b/pkg.test"
			if got := parseJob("/pkg", "/b/pkg.test", tt.args); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestMounts(t *testing.T) {
	repo, err := guest.Repo(".")
	if err != nil {
		t.Fatal(err)
	}
	cwd := repo + "/internal/host"
	j := job{cwd: cwd, program: "/w/b001/host.test", files: []string{"/w/b001/log", "/p/c.out", "/top"}, dirs: []string{"/o"}}
	var got []string
	for i, m := range j.mounts() {
		if m.From != m.To || m.ReadOnly != (i == 0) {
			t.Errorf("mount %d is %+v", i, m)
		}
		got = append(got, m.To)
	}
	if want := []string{repo, cwd, "/w/b001", "/p", "/o"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if tool := (job{cwd: "/", program: "/usr/bin/lspci"}).mounts(); len(tool) != 0 {
		t.Errorf("the guest's own system is covered by %v", tool)
	}
}

func TestEnvironment(t *testing.T) {
	got := environment([]string{"CI=true", "CIRCLE=1", "PATH=/x", "HOME=/h", "GOCOVERDIR=/c", "SLUICE_X=1", "=odd"}, guest.UML)
	if want := []string{"SLUICE_LAB_KIND=uml", "CI=true", "GOCOVERDIR=/c", "SLUICE_X=1"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTrouble(t *testing.T) {
	if got := trouble("fine\n[ 1.0] BUG: kernel NULL pointer dereference\nmore\n"); got != "[ 1.0] BUG: kernel NULL pointer dereference" {
		t.Errorf("got %q", got)
	}
	if got := trouble("fine\n"); got != "" {
		t.Errorf("got %q", got)
	}
}
