package house

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/sluice-network/sluice"

type pkg struct {
	ImportPath, Dir, Name string
	Imports, Deps         []string
	GoFiles               []string
}

// packages lists this module's packages as the build sees them, test files
// left out: tests may look into other rooms.
func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps=false", "-json=ImportPath,Dir,Name,Imports,Deps,GoFiles", module+"/...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 10 {
		t.Fatalf("go list found %d packages: the test looks in the wrong place", len(all))
	}
	return all
}

// room is the part of the house a package lies in.
func room(path string) string {
	rel := strings.TrimPrefix(strings.TrimPrefix(path, module), "/")
	if rest, ok := strings.CutPrefix(rel, "internal/"); ok {
		first, _, _ := strings.Cut(rest, "/")
		return "internal/" + first
	}
	first, _, _ := strings.Cut(rel, "/")
	return first
}

// mayImport lists, for each room, the other rooms its packages may import.
var mayImport = map[string][]string{
	"apis":               {},
	"internal/holder":    {},
	"internal/host":      {},
	"internal/durable":   {},
	"internal/cloud":     {},
	"internal/netselect": {},
	"internal/ovsdb":     {},
	"internal/spelling":  {},
	"operator":           {"apis", "internal/holder", "internal/host", "internal/durable", "internal/netselect", "internal/ovsdb"},
	"deviceplugin":       {"apis", "internal/holder", "internal/host", "internal/durable", "internal/spelling"},
	"cni":                {"apis", "internal/holder", "internal/host", "internal/durable", "internal/netselect", "internal/spelling"},
}

// compositionRoots wire rooms together: the node agent, and what people ask by kubectl,
// which the rooms answer.
var compositionRoots = []string{module + "/operator/cmd/sluice-agent", module + "/operator/cmd/kubectl-sluice"}

func TestRoomsImportOnlyWhatTheyMay(t *testing.T) {
	for _, p := range packages(t) {
		allowed, ruled := mayImport[room(p.ImportPath)]
		if !ruled || slices.Contains(compositionRoots, p.ImportPath) {
			continue
		}
		for _, i := range p.Imports {
			if !strings.HasPrefix(i, module+"/") || room(i) == room(p.ImportPath) {
				continue
			}
			if !slices.Contains(allowed, room(i)) {
				t.Errorf("%s imports %s: room %q may import only %v", p.ImportPath, i, room(p.ImportPath), allowed)
			}
		}
	}
}

func TestPurePackagesReachNoClientKernelOrClock(t *testing.T) {
	pure := []string{module + "/operator/plan", module + "/operator/render", module + "/operator/inject", module + "/cni/policy", module + "/deviceplugin/life"}
	direct := []string{"time", "os", "os/exec", "syscall", "net/http", "math/rand", "math/rand/v2"}
	reached := []string{"k8s.io/client-go", "sigs.k8s.io/controller-runtime", "github.com/vishvananda", "github.com/safchain", module + "/internal/host"}
	seen := 0
	for _, p := range packages(t) {
		if !slices.Contains(pure, p.ImportPath) {
			continue
		}
		seen++
		for _, i := range p.Imports {
			if slices.Contains(direct, i) {
				t.Errorf("%s is pure and imports %s", p.ImportPath, i)
			}
		}
		for _, d := range p.Deps {
			for _, r := range reached {
				if d == r || strings.HasPrefix(d, r+"/") {
					t.Errorf("%s is pure and depends on %s", p.ImportPath, d)
				}
			}
		}
	}
	if seen != len(pure) {
		t.Errorf("found %d of the pure packages %v", seen, pure)
	}
}

// A doc.go is read in one look: it fits on a screen.
func TestEveryPackageHasAShortDoc(t *testing.T) {
	const screen = 50
	for _, p := range packages(t) {
		if p.Name == "main" || len(p.GoFiles) == 0 {
			continue // a command says what it does at the top of main.go
		}
		doc, err := os.ReadFile(filepath.Join(p.Dir, "doc.go"))
		if err != nil {
			t.Errorf("%s: %v", p.ImportPath, err)
			continue
		}
		if n := strings.Count(string(doc), "\n"); n > screen {
			t.Errorf("%s: doc.go has %d lines, at most %d", p.ImportPath, n, screen)
		}
	}
}
