package artefact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// QEMUProgram is the emulator's name; [QEMU] installs it.
const QEMUProgram = "qemu-system-x86_64"

// QEMU is the step that installs a QEMU with the SR-IOV card igb. Debian
// bookworm's own, 7.2, has none (it came with 8.0), so it is taken from
// bookworm-backports, by sources and lists of its own: the machine's apt
// configuration stays as it is.
func QEMU() *Step {
	return &Step{
		Name:   "qemu",
		Inputs: []Input{Text("recipe", "1")},
		Ready: func() bool {
			out, err := exec.Command(QEMUProgram, "-device", "help").Output()
			return err == nil && bytes.Contains(out, []byte(`name "igb"`))
		},
		Build: func(ctx context.Context, b *Build) error {
			if os.Geteuid() != 0 {
				return errors.New("install qemu-system-x86 from bookworm-backports: this needs root; run as root, or install it with apt-get")
			}
			sources, err := DebianSources()
			if err != nil {
				return err
			}
			parts, lists := filepath.Join(b.Work, "sources"), filepath.Join(b.Work, "lists")
			if err := errors.Join(os.Mkdir(parts, 0o755), os.Mkdir(lists, 0o755)); err != nil {
				return err
			}
			text := sources.String() + sources.With("bookworm-backports").String()
			if err := os.WriteFile(filepath.Join(parts, "debian.sources"), []byte(text), 0o644); err != nil {
				return err
			}
			options := []string{
				"-o", "Dir::Etc::sourcelist=/dev/null", "-o", "Dir::Etc::sourceparts=" + parts, "-o", "Dir::State::lists=" + lists,
				"-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=", "-o", "DPkg::Lock::Timeout=600", "-o", "APT::Sandbox::User=root",
			}
			apt := func(args ...string) error {
				return b.RunCmd(ctx, Cmd{Env: noninteractive, Args: append(append([]string{"apt-get"}, options...), args...)})
			}
			if err := apt("update", "-q"); err != nil {
				return err
			}
			b.Say("installing qemu-system-x86")
			return apt("install", "-y", "--no-install-recommends", "-t", "bookworm-backports", "qemu-system-x86")
		},
	}
}

// Sources are apt sources in Debian's deb822 form.
type Sources []source

// source is one stanza: field names in lower case and their values.
type source map[string]string

// DebianSources returns the machine's own apt sources of Debian bookworm: its
// archive and the security suite, without third parties.
func DebianSources() (Sources, error) {
	var text strings.Builder
	names, _ := filepath.Glob("/etc/apt/sources.list.d/*")
	for _, name := range append(names, "/etc/apt/sources.list") {
		content, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read apt's sources: %w", err)
		}
		if strings.HasSuffix(name, ".sources") {
			fmt.Fprintf(&text, "%s\n\n", content)
		} else {
			fmt.Fprintf(&text, "%s\n\n", stanzas(string(content)))
		}
	}
	found := parseSources(text.String())
	if len(found) == 0 {
		return nil, errors.New("find Debian bookworm among apt's sources in /etc/apt: none; the lab is built from Debian bookworm's packages")
	}
	return found, nil
}

// parseSources returns the stanzas of Debian bookworm's binary packages.
func parseSources(text string) Sources {
	var found Sources
	for _, block := range strings.Split(text, "\n\n") {
		s, last := source{}, ""
		for line := range strings.Lines(block) {
			line = strings.TrimRight(line, "\n")
			if strings.HasPrefix(line, "#") || strings.TrimSpace(line) == "" {
				continue
			}
			if name, value, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, " ") {
				last = strings.ToLower(strings.TrimSpace(name))
				s[last] = strings.TrimSpace(value)
			} else { // a continued value
				s[last] += "\n" + line
			}
		}
		debian := false
		for _, suite := range strings.Fields(s["suites"]) {
			debian = debian || suite == "bookworm" || suite == "bookworm-security"
		}
		if debian && strings.Contains(" "+s["types"]+" ", " deb ") && !strings.EqualFold(s["enabled"], "no") {
			found = append(found, s)
		}
	}
	return found
}

// stanzas turns one-line sources into deb822 stanzas.
func stanzas(list string) string {
	var out strings.Builder
	for line := range strings.Lines(list) {
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
		if !ok {
			continue
		}
		var options string
		if rest = strings.TrimSpace(rest); strings.HasPrefix(rest, "[") {
			options, rest, _ = strings.Cut(rest[1:], "]")
		}
		f := strings.Fields(rest)
		if len(f) < 3 {
			continue
		}
		fmt.Fprintf(&out, "Types: deb\nURIs: %s\nSuites: %s\nComponents: %s\n", f[0], f[1], strings.Join(f[2:], " "))
		for _, o := range strings.Fields(options) {
			if key, value, _ := strings.Cut(o, "="); key == "signed-by" {
				fmt.Fprintf(&out, "Signed-By: %s\n", value)
			}
		}
		out.WriteString("\n")
	}
	return out.String()
}

// With returns the sources of bookworm's archive with another suite of it.
func (s Sources) With(suite string) Sources {
	var out Sources
	for _, from := range s {
		for _, has := range strings.Fields(from["suites"]) {
			if has == "bookworm" {
				changed := source{}
				for k, v := range from {
					changed[k] = v
				}
				changed["suites"] = suite
				out = append(out, changed)
				break
			}
		}
	}
	return out
}

// String is the text of a .sources file.
func (s Sources) String() string {
	var b strings.Builder
	for _, st := range s {
		for _, f := range []struct{ name, key string }{{"Types", "types"}, {"URIs", "uris"}, {"Suites", "suites"}, {"Components", "components"}, {"Signed-By", "signed-by"}} {
			if v := st[f.key]; v != "" {
				fmt.Fprintf(&b, "%s: %s\n", f.name, v)
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}
