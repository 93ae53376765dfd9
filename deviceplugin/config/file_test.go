package config

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	"github.com/prometheus/client_golang/prometheus"
)

// a ConfigMap's folder: files are links into a folder that is replaced whole.
type configMap struct {
	*testing.T
	dir string
	n   int
}

func (m *configMap) set(content string) {
	m.Helper()
	m.n++
	version := filepath.Join(m.dir, "..v"+string(rune('a'+m.n)))
	must(m.T, os.Mkdir(version, 0o750))
	if content != "" {
		must(m.T, os.WriteFile(filepath.Join(version, "config.json"), []byte(content), 0o600))
	}
	must(m.T, os.Symlink(filepath.Base(version), filepath.Join(m.dir, "..tmp")))
	must(m.T, os.Rename(filepath.Join(m.dir, "..tmp"), filepath.Join(m.dir, "..data")))
	if _, err := os.Lstat(filepath.Join(m.dir, "config.json")); err != nil {
		must(m.T, os.Symlink("..data/config.json", filepath.Join(m.dir, "config.json")))
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestFileIsFollowed(t *testing.T) {
	m := &configMap{T: t, dir: t.TempDir()}
	last := filepath.Join(t.TempDir(), "last.json")
	open := func() *File { return Open(filepath.Join(m.dir, "config.json"), last, "p.io", testr.New(t)) }
	f := open()
	ctx, cancel := context.WithCancel(t.Context())
	changes, done := make(chan struct{}, 100), make(chan error)
	go func() { done <- f.Watch(ctx, func() { changes <- struct{}{} }) }()
	candidates := []Candidate{vf(0, nil), vf(1, func(c *Candidate) { c.Resource = "p.io/policy" })}
	is := func(f *File, pools string, inEffect bool, message string) {
		t.Helper()
		var got []string
		for _, p := range f.Pools(candidates) {
			got = append(got, p.Resource)
		}
		ok, text, asked := f.State()
		if strings.Join(got, " ") != pools || ok != inEffect || !strings.Contains(text, message) || asked != (message != "") {
			t.Errorf("pools %v, in effect %v, %q; want %s, %v, %s", got, ok, text, pools, inEffect, message)
		}
	}
	set := func(content, pools string, inEffect bool, message string) {
		t.Helper()
		m.set(content)
		select {
		case <-changes:
		case <-time.After(time.Minute):
			t.Fatal("the change was not noticed")
		}
		is(f, pools, inEffect, message)
		is(open(), pools, inEffect, message) // after a restart
	}
	is(f, "", true, "")
	const one = `{"resourceList":[{"resourceName":"a","selectors":{"pfNames":["ens1f0#0"]}}]}`
	set(one, "a", true, "the 1 resources")
	set(`{"resourceList":[{"resourceName":"b","selectors":{"vendros":["8086"]}}]}`, "a", false, `before stays in effect: resourceList[0].selectors.vendros: unknown key: did you mean "vendors"?`)
	set(`{"resourceList":[{"resourceName":"b","selectors":{"selectAll":true}}]}`, "b", false, "p.io/b does not get VFs that policies give")
	set(one, "a", true, "the 1 resources")
	m.set(one) // another folder with the same
	set("", "", true, "")
	set("{", "", false, "offers nothing")
	if len(changes) > 0 {
		t.Errorf("%d changes that were none", len(changes))
	}
	cancel()
	must(t, <-done)
}

func TestFileWithoutFolder(t *testing.T) {
	f := Open("/nowhere/at/all/config.json", filepath.Join(t.TempDir(), "last"), "p.io", testr.New(t))
	must(t, f.Watch(t.Context(), func() { t.Error("changed") }))
	if _, _, asked := f.State(); asked || f.Pools(nil) != nil {
		t.Error("something is asked for")
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(f)
	if got, err := registry.Gather(); err != nil || len(got) > 0 {
		t.Errorf("%v, %v", got, err)
	}
}

func TestFileMetric(t *testing.T) {
	dir := t.TempDir()
	for content, want := range map[string]float64{`{"resourceList":[]}`: 1, `{`: 0} {
		path := filepath.Join(dir, "config.json")
		must(t, os.WriteFile(path, []byte(content), 0o600))
		registry := prometheus.NewPedanticRegistry()
		registry.MustRegister(Open(path, filepath.Join(dir, "last"), "p.io", testr.New(t)))
		got, err := registry.Gather()
		must(t, err)
		if v := got[0].GetMetric()[0].GetGauge().GetValue(); v != want {
			t.Errorf("%s: %v, want %v", content, v, want)
		}
	}
}
