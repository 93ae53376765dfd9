package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const (
	shimName  = "sluice-cni"
	typeName  = "sluice" // the type that network definitions of ours name: a link to the shim
	aliasName = "sriov"  // the type that existing network definitions name
	// beforeSuffix is added to the name of a plugin that the alias took the place of.
	beforeSuffix = ".before-sluice"
)

// errForeignAlias is the state in which network definitions of type "sriov" run
// another project's plugin.
var errForeignAlias = errors.New("another project's plugin is installed")

// installShim puts the CNI shim at source into the node's CNI directory, unless
// the same is there already, and its type beside it. A runtime that executes it at any moment runs
// either the old or the new one, whole.
func installShim(source, dir string) error {
	want, err := os.ReadFile(source)
	if err != nil {
		return fmt.Errorf("install the CNI shim: %w", err)
	}
	if err = os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("install the CNI shim: %w", err)
	}
	byType := filepath.Join(dir, typeName)
	if is, _ := os.Readlink(byType); is != shimName {
		if err = replace(byType, func(tmp string) error { return os.Symlink(shimName, tmp) }); err != nil {
			return fmt.Errorf("install the CNI shim as %s: %w", byType, err)
		}
	}
	target := filepath.Join(dir, shimName)
	have, err := os.ReadFile(target)
	if st, statErr := os.Stat(target); err == nil && statErr == nil && st.Mode().Perm() == 0o755 && bytes.Equal(have, want) {
		return nil
	}
	err = replace(target, func(tmp string) error {
		f, openErr := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o700)
		if openErr != nil {
			return openErr
		}
		_, writeErr := f.Write(want)
		return errors.Join(writeErr, f.Chmod(0o755), f.Sync(), f.Close())
	})
	if err != nil {
		return fmt.Errorf("install the CNI shim as %s: %w", target, err)
	}
	return nil
}

// installAlias lets network definitions of type "sriov" run the shim. The alias
// is a symbolic link, so that it is known as ours and always the installed
// version. Anything else of that name is left alone, which the error, an
// errForeignAlias, explains, unless replaceForeign is set: then it is kept
// beside as "sriov.before-sluice".
func installAlias(dir string, replaceForeign bool) error {
	alias := filepath.Join(dir, aliasName)
	target, err := os.Readlink(alias)
	switch {
	case err == nil && target == shimName:
		return nil
	case errors.Is(err, fs.ErrNotExist):
	case !replaceForeign:
		return fmt.Errorf("%w as %s, so network definitions with \"type\": \"sriov\" use it and not Sluice: "+
			"remove it, or set configDaemonEnvVars REPLACE_SRIOV_CNI to \"true\" in SriovOperatorConfig default", errForeignAlias, alias)
	default:
		if err := os.Rename(alias, alias+beforeSuffix); err != nil {
			return fmt.Errorf("keep the foreign CNI plugin %s: %w", alias, err)
		}
	}
	if err := replace(alias, func(tmp string) error { return os.Symlink(shimName, tmp) }); err != nil {
		return fmt.Errorf("install the alias %s: %w", alias, err)
	}
	return nil
}

// uninstall undoes installShim and installAlias: the alias goes if it is ours, and
// what it had replaced comes back. It fails while pods have attachments, which
// nobody could end without the shim.
func uninstall(dir string, attached []string) error {
	if len(attached) > 0 {
		return fmt.Errorf("waits for the pods that have interfaces of Sluice: %s; delete them", strings.Join(attached, ", "))
	}
	alias := filepath.Join(dir, aliasName)
	if target, err := os.Readlink(alias); err == nil && target == shimName {
		switch err := os.Rename(alias+beforeSuffix, alias); {
		case errors.Is(err, fs.ErrNotExist):
			if err := os.Remove(alias); err != nil {
				return fmt.Errorf("remove the alias: %w", err)
			}
		case err != nil:
			return fmt.Errorf("bring back the CNI plugin that was there before: %w", err)
		}
	}
	for _, name := range []string{typeName, shimName} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the CNI shim: %w", err)
		}
	}
	return nil
}

// replace makes a new file with write and renames it to path.
func replace(path string, write func(tmp string) error) error {
	// A hidden name: runtimes and people list this directory.
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".sluice-new")
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := write(tmp)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
