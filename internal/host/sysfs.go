package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// pciAddressForm is domain:bus:device.function as the kernel prints it; the
// domain has more than four digits on machines with VMD.
var pciAddressForm = regexp.MustCompile(`^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)

// ValidPCIAddress tells whether s is a PCI address as the kernel writes them,
// for example "0000:3b:00.0". Everything that becomes a part of a sysfs path is
// checked with it first.
func ValidPCIAddress(s string) bool { return pciAddressForm.MatchString(s) }

// device is the sysfs folder of a PCI function.
func (h *Host) device(pciAddress string) (string, error) {
	if !ValidPCIAddress(pciAddress) {
		return "", fmt.Errorf("%q is not a PCI address like 0000:3b:00.0", pciAddress)
	}
	return filepath.Join(h.sysfs, "bus/pci/devices", pciAddress), nil
}

// readText returns a sysfs file without its line end. Planning reads hundreds of
// them, so each costs three system calls, not the eight of os.ReadFile.
func readText(path string) (string, error) {
	fail := func(op string, err error) (string, error) { return "", &fs.PathError{Op: op, Path: path, Err: err} }
	fd, err := restart(func() (int, error) { return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return fail("open", err)
	}
	defer unix.Close(fd)
	var page [4096]byte // a sysfs file is no longer (sysfs_kf_seq_show in fs/sysfs/file.c), and comes whole
	n, err := restart(func() (int, error) { return unix.Read(fd, page[:]) })
	if err != nil {
		return fail("read", err)
	}
	return strings.TrimSpace(string(page[:n])), nil
}

// restart repeats a system call that a signal broke off.
func restart(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// readInt reads a sysfs file that holds one decimal number.
func readInt(path string) (int, error) {
	s, err := readText(path)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		return 0, fmt.Errorf("read %s: %q is not a number", path, s)
	}
	return n, nil
}

// readPCIID reads a sysfs file that holds a 16-bit hexadecimal number, as
// "0x8086" or, for sriov_vf_device, "154c", and returns four lower-case digits.
func readPCIID(path string) (string, error) {
	s, err := readText(path)
	if err != nil {
		return "", err
	}
	id, err := parsePCIID(s)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return id, nil
}

func parsePCIID(s string) (string, error) {
	n, err := strconv.ParseUint(strings.TrimPrefix(s, "0x"), 16, 16)
	if err != nil {
		return "", fmt.Errorf("%q is not a 16-bit hexadecimal number", s)
	}
	return fmt.Sprintf("%04x", n), nil
}

// linkBase returns the last element of what a sysfs link points to, "" when
// there is no link: a device without driver or IOMMU.
func linkBase(path string) (string, error) {
	target, err := os.Readlink(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return filepath.Base(target), nil
}

// vfIndexes lists the indexes of the virtfn links below a PF, sorted.
func vfIndexes(entries []os.DirEntry) []int {
	var indexes []int
	for _, e := range entries {
		if i, ok := parseVirtfn(e.Name()); ok {
			indexes = append(indexes, i)
		}
	}
	slices.Sort(indexes)
	return indexes
}

// parseVirtfn reads the name of a PF's link to one VF, "virtfn0".
func parseVirtfn(name string) (int, bool) {
	digits, ok := strings.CutPrefix(name, "virtfn")
	if !ok {
		return 0, false
	}
	i, err := strconv.Atoi(digits)
	// No sign, no leading zero: only what the kernel prints.
	if err != nil || i < 0 || strconv.Itoa(i) != digits {
		return 0, false
	}
	return i, true
}

// A port's phys_port_name says what the netdev stands for
// (Documentation/networking/switchdev.rst): "p0" is an uplink, "pf0vf3" the
// representor of a VF, "pf0sf88" of a subfunction, "pf0" of a host's PF seen
// from a DPU, each with "c1" in front when on another controller.
var (
	representorPort   = regexp.MustCompile(`^(c\d+)?pf\d+((vf|sf)\d+)?$`)
	vfRepresentorPort = regexp.MustCompile(`^pf\d+vf(\d{1,5})$`)
	uplinkPort        = regexp.MustCompile(`^p\d+`)
)

// candidate is a netdev below a PCI function.
type candidate struct {
	name     string
	portName string // phys_port_name, empty when the driver has none
	devPort  int    // dev_port, tells two ports of one function apart
}

// ownNetdev picks the netdev that is the function itself: in switchdev mode a
// PF's net folder lists its representors too, in no order.
func ownNetdev(cs []candidate) string {
	best := -1
	better := func(a, b candidate) bool {
		if ua, ub := uplinkPort.MatchString(a.portName), uplinkPort.MatchString(b.portName); ua != ub {
			return ua
		}
		if a.devPort != b.devPort {
			return a.devPort < b.devPort
		}
		return a.name < b.name
	}
	for i, c := range cs {
		if representorPort.MatchString(c.portName) {
			continue
		}
		if best < 0 || better(c, cs[best]) {
			best = i
		}
	}
	if best < 0 {
		return ""
	}
	return cs[best].name
}

// netdevOf returns the name of the function's own netdev in this network
// namespace, "" when it has none here.
func netdevOf(device string) (string, error) {
	name, _, err := netdevsOf(device)
	return name, err
}

// netdevsOf also returns the representors of the function's VFs, by index.
func netdevsOf(device string) (own string, representors map[int]string, err error) {
	dir := filepath.Join(device, "net")
	entries, err := names(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil, nil
	}
	if err != nil {
		return "", nil, err
	}
	var cs []candidate
	for _, name := range entries {
		c := candidate{name: name}
		// Unreadable for a driver without port names (EOPNOTSUPP), and gone when
		// the netdev is just being renamed or moved: its event follows.
		c.portName, _ = readText(filepath.Join(dir, c.name, "phys_port_name"))
		if len(entries) > 1 {
			c.devPort, _ = readInt(filepath.Join(dir, c.name, "dev_port"))
		}
		cs = append(cs, c)
		if vf, ok := representedVF(c.portName); ok {
			if representors == nil {
				representors = map[int]string{}
			}
			representors[vf] = c.name
		}
	}
	return ownNetdev(cs), representors, nil
}

// names lists a folder of sysfs, sorted.
func names(dir string) ([]string, error) {
	fd, err := restart(func() (int, error) { return unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	var all []string
	var entries [4096]byte
	for {
		n, err := restart(func() (int, error) { return unix.ReadDirent(fd, entries[:]) })
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: dir, Err: err}
		}
		if n == 0 {
			slices.Sort(all)
			return all, nil
		}
		_, _, all = unix.ParseDirent(entries[:n], -1, all)
	}
}

// representedVF is the index of the VF, of this controller, that a port stands for.
func representedVF(portName string) (int, bool) {
	m := vfRepresentorPort.FindStringSubmatch(portName)
	if m == nil {
		return 0, false
	}
	vf, err := strconv.Atoi(m[1])
	return vf, err == nil
}
