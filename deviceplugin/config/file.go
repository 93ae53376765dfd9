package config

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/fsnotify/fsnotify"
	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/sluice-network/sluice/deviceplugin"
	"github.com/sluice-network/sluice/internal/durable"
)

// File is a configuration that may be changed, also by replacing a folder above it, as
// kubelet does with those of ConfigMaps. Content that is refused leaves the content before
// in effect, also after a restart. Its methods may be called concurrently.
type File struct {
	path, prefix string
	last         string // where the last good content is kept
	log          logr.Logger

	mu      sync.Mutex
	data    []byte // as last read
	config  *Config
	err     error    // why data is not config
	refused []string // by config, when last asked
}

// Open reads the file at path, which need not exist, and keeps its content at last.
func Open(path, last, prefix string, log logr.Logger) *File {
	f := &File{path: path, prefix: prefix, last: last, log: log}
	if data, err := os.ReadFile(last); err == nil {
		f.config, _ = Parse(data, prefix) // it was good once
	}
	f.reload()
	return f
}

// reload tells whether the file's content is another than before.
func (f *File) reload() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	data, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		changed := f.config != nil || f.err != nil
		f.data, f.config, f.err, f.refused = nil, nil, nil, nil
		if changed {
			f.log.Info("there are no device pools in a file any more", "file", f.path)
			f.keep(nil)
		}
		return changed
	}
	if err == nil && f.data != nil && bytes.Equal(data, f.data) {
		return false
	}
	f.data = data
	var c *Config
	if err == nil {
		c, err = Parse(data, f.prefix)
	}
	if f.err = err; err != nil {
		f.log.Error(err, "the file of device pools is refused, what it was before stays in effect", "file", f.path)
		return true
	}
	f.config = c
	f.log.Info("read the file of device pools", "file", f.path, "resources", len(c.Resources))
	f.keep(data)
	return true
}

// keep writes down what is in effect, nil for nothing. mu is held.
func (f *File) keep(data []byte) {
	err := durable.Remove(f.last)
	if data != nil {
		err = durable.WriteFile(f.last, data)
	}
	if err != nil {
		f.log.Error(err, "should the file of device pools be refused later, its content now is not kept over a restart", "file", f.last)
	}
}

// Watch calls changed when the content is another, until ctx ends. The file's folder must
// exist, or there is nothing to follow.
func (f *File) Watch(ctx context.Context, changed func()) error {
	dir := filepath.Dir(f.path)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	w, err := fsnotify.NewWatcher()
	if err == nil {
		err = w.Add(dir)
	}
	if err != nil {
		return fmt.Errorf("follow the file of device pools in %s: %w", dir, err)
	}
	defer func() { _ = w.Close() }()
	for {
		if f.reload() {
			changed()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-w.Events:
		case err := <-w.Errors:
			f.log.Error(err, "following the file of device pools")
		}
	}
}

// Pools are those of the configuration in effect, as Config.Pools has them.
func (f *File) Pools(candidates []Candidate) []deviceplugin.Pool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.config == nil {
		return nil
	}
	pools, refused := f.config.Pools(candidates)
	f.refused = refused
	return pools
}

// State tells what is to be said of the file: that its content is in effect, or why it is not,
// wholly or in part; asked is false when there is no file.
func (f *File) State() (inEffect bool, message string, asked bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.err != nil && f.config == nil:
		return false, fmt.Sprintf("%s is refused, and offers nothing: %v", f.path, f.err), true
	case f.err != nil:
		return false, fmt.Sprintf("%s is refused, and its content before stays in effect: %v", f.path, f.err), true
	case f.config == nil:
		return true, "", false
	case len(f.refused) > 0:
		return false, f.path + ": " + strings.Join(f.refused, "; "), true
	}
	return true, fmt.Sprintf("the %d resources of %s are offered", len(f.config.Resources), f.path), true
}

var validDesc = prometheus.NewDesc("sluice_deviceplugin_config_in_effect",
	"1 when all that the file of device pools asks for is in effect, 0 when it is refused or a part of it.", nil, nil)

// Describe implements prometheus.Collector.
func (f *File) Describe(out chan<- *prometheus.Desc) { out <- validDesc }

// Collect implements prometheus.Collector.
func (f *File) Collect(out chan<- prometheus.Metric) {
	if inEffect, _, asked := f.State(); asked {
		v := 0.0
		if inEffect {
			v = 1
		}
		out <- prometheus.MustNewConstMetric(validDesc, prometheus.GaugeValue, v)
	}
}
