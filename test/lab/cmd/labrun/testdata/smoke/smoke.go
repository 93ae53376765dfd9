// Package smoke is what labrun's own test runs in a guest.
package smoke

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Card is a network card's PF as sysfs shows it.
type Card struct {
	Address, Driver string
	VFs             int // there can be
}

// ReadCard reads the PF with the given interface name.
func ReadCard(name string) (Card, error) {
	device, err := filepath.EvalSymlinks(filepath.Join("/sys/class/net", name, "device"))
	if err != nil {
		return Card{}, err
	}
	driver, err := os.Readlink(filepath.Join(device, "driver"))
	if err != nil {
		return Card{}, err
	}
	total, err := os.ReadFile(filepath.Join(device, "sriov_totalvfs"))
	if err != nil {
		return Card{}, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(total)))
	return Card{filepath.Base(device), filepath.Base(driver), n}, err
}
