package cluster

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Every file that a command line names is one that write makes.
func TestControlPlaneFilesAreThoseItsArgumentsName(t *testing.T) {
	keys, err := NewKeys()
	if err != nil {
		t.Fatal(err)
	}
	c := ControlPlane{Dir: t.TempDir(), Kubelab: "/bin/kubelab"}
	if err := c.write(keys, netip.MustParseAddrPort("127.0.0.1:1")); err != nil {
		t.Fatal(err)
	}
	arguments := c.arguments()
	for _, p := range c.Processes() {
		if len(arguments[p.Name]) == 0 {
			t.Errorf("%s has no arguments", p.Name)
		}
		for _, a := range arguments[p.Name] {
			_, path, _ := strings.Cut(a, "=")
			if !strings.HasPrefix(path, filepath.Join(c.Dir, "pki")) {
				continue
			}
			if _, err := os.Stat(path); err != nil {
				t.Errorf("%s: %v", p.Name, err)
			}
		}
	}
	if config, err := c.RESTConfig(); err != nil || config.Host != "https://127.0.0.1:1" {
		t.Errorf("administrator's server is %v, %v", config, err)
	}
}

func TestManifestsHaveOnlyKindsThatCanBeCreated(t *testing.T) {
	objects, err := split(multusManifest)
	if err != nil {
		t.Fatal(err)
	}
	if len(objects) != 3 {
		t.Errorf("%d objects, want 3", len(objects))
	}
	_, err = split([]byte("kind: Pod\nmetadata: {name: p}\n"))
	if err == nil || !strings.Contains(err.Error(), `kind "Pod" of "p"`) {
		t.Errorf("a kind without collection: %v", err)
	}
}
