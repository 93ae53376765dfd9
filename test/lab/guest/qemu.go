package guest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// bootQEMU starts a QEMU guest, from a saved state unless the spec wants it
// cold, and waits for its greeting.
func (m *machine) bootQEMU(ctx context.Context) error {
	hw, err := hardware(m.spec)
	if err != nil {
		return err
	}
	if m.spec.Cold {
		return m.runQEMU(ctx, append(hw, backends(m.spec, true)...), false)
	}
	state, err := m.state(ctx, hw)
	if err != nil {
		return err
	}
	args := slices.Concat(hw, backends(m.spec, true), []string{"-incoming", "file:" + state})
	for {
		try, cancel := context.WithTimeout(ctx, restoreLimit)
		err = m.runQEMU(try, args, true)
		hung := try.Err() != nil && ctx.Err() == nil
		cancel()
		if !hung {
			return err
		}
		if err := Sweep(m.spec.Dir); err != nil {
			return err
		}
	}
}

// restoreLimit bounds the wait for the greeting of a restored guest, which takes a
// second or two. Now and then one hangs as soon as it is restored, in the emulator and
// not for anything in the guest: it is restored again.
const restoreLimit = 30 * time.Second

// runQEMU starts QEMU with a control line as file 3 and further files after it.
func (m *machine) runQEMU(ctx context.Context, args []string, restored bool, extra ...*os.File) error {
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	m.proc, err = launch(command(m.spec.Parts.Program, args, append([]*os.File{theirs}, extra...)...), m.spec.Dir, m.spec.Net.Namespace, nil)
	if err != nil {
		ours.Close()
		return err
	}
	theirs.Close()
	return m.greet(ctx, ours, restored)
}

// hardware is the part of QEMU's arguments that a saved state belongs to: the
// machine as the guest sees it.
func hardware(s Spec) ([]string, error) {
	khz, err := clockKHz()
	if err != nil {
		return nil, err
	}
	// User-Mode Linux guests may have the same image, locked in another way.
	const disk = "format=raw,readonly=on,cache=unsafe,file.locking=off,file="
	args := []string{
		"-machine", "q35,hpet=off", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off",
		"-m", strconv.Itoa(s.Memory), "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", s.Parts.Kernel, "-initrd", s.Parts.Initrd,
		// An emulated CPU on a busy host measures its clock wrongly: it is told. Its timer
		// may lose the one shot it was set to, and then the CPU's RCU callbacks wait for
		// ever: a periodic tick cannot be lost.
		"-append", fmt.Sprintf("console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off tsc=reliable tsc_early_khz=%d no_timer_check rcupdate.rcu_cpu_stall_suppress=1 nohz=off highres=off random.trust_cpu=on", khz),
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=control,name=control",
		"-drive", "if=none,id=root," + disk + s.Root, "-device", "virtio-blk-pci,drive=root",
		"-drive", "if=none,id=modules," + disk + s.Parts.Modules, "-device", "virtio-blk-pci,drive=modules",
		"-device", "pcie-root-port,id=port0,slot=1", "-device", "igb,netdev=data0,bus=port0,romfile=,mac=" + mac(1, s.Number),
		"-device", "pcie-root-port,id=port1,slot=2", "-device", "igb,netdev=data1,bus=port1,romfile=,mac=" + mac(2, s.Number),
	}
	if s.Net.Mgmt != "" {
		args = append(args, "-device", "virtio-net-pci,netdev=mgmt,romfile=,mac="+mac(0, s.Number))
	}
	return args, nil
}

// backends is the rest of the arguments: what the host connects to the machine.
// Without taps each network card has a hub to itself.
func backends(s Spec, taps bool) []string {
	args := []string{
		"-chardev", "socket,id=control,fd=3",
		"-chardev", "file,id=console,append=on,path=" + strings.ReplaceAll(filepath.Join(s.Dir, consoleFile), ",", ",,"), "-serial", "chardev:console",
	}
	for i, n := range []struct{ id, tap string }{{"mgmt", s.Net.Mgmt}, {"data0", s.Net.Data[0]}, {"data1", s.Net.Data[1]}} {
		switch {
		case n.tap != "" && taps:
			args = append(args, "-netdev", fmt.Sprintf("tap,id=%s,ifname=%s,script=no,downscript=no", n.id, n.tap))
		case n.tap != "" || i > 0:
			args = append(args, "-netdev", fmt.Sprintf("hubport,id=%s,hubid=%d", n.id, i))
		}
	}
	return args
}

// clockKHz returns the frequency of the host's time stamp counter. Without KVM
// that is what the emulated one runs at.
func clockKHz() (int, error) {
	value, err := cpuinfo("bogomips")
	if err != nil {
		return 0, err
	}
	mips, err := strconv.ParseFloat(value, 64)
	if err != nil {
		return 0, fmt.Errorf("read bogomips in /proc/cpuinfo: %w", err)
	}
	return int(mips * 500), nil // the kernel prints two loops per cycle, in millions
}

// cpuinfo returns a field of the first CPU.
func cpuinfo(field string) (string, error) {
	content, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(content)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == field {
			return strings.TrimSpace(value), nil
		}
	}
	return "", fmt.Errorf("find %s in /proc/cpuinfo: no such field", field)
}

// stateKey identifies what may not differ between saving and restoring: the
// machine, the images (whose paths name their contents), QEMU, the host's CPU.
func stateKey(s Spec, hw []string) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "state 2 %q\n", hw)
	program, err := filepath.EvalSymlinks(s.Parts.Program)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(program)
	if err != nil {
		return "", err
	}
	fmt.Fprintf(h, "%s %d %d\n", program, info.Size(), info.ModTime().UnixNano())
	for _, field := range []string{"model name", "flags"} {
		value, err := cpuinfo(field)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%s\n", value)
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:6]), nil
}

// state returns the file with the saved state of the machine, booted and not
// yet set up. The first caller on a host makes it; others wait.
func (m *machine) state(ctx context.Context, hw []string) (string, error) {
	key, err := stateKey(m.spec, hw)
	if err != nil {
		return "", fmt.Errorf("name the saved state: %w", err)
	}
	if err := os.MkdirAll(m.spec.Parts.States, 0o755); err != nil {
		return "", err
	}
	file := filepath.Join(m.spec.Parts.States, key)
	lock, err := os.OpenFile(file+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	for unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("wait for the process that makes the saved state %s: %w", file, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
	now := time.Now()
	if err := os.Chtimes(file, now, now); err == nil { // used now: the cache keeps it
		return file, nil
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return "", err
	}
	defer ours.Close()
	defer theirs.Close()
	args := append(append(hw, backends(m.spec, false)...), "-chardev", "socket,id=monitor,fd=4", "-mon", "chardev=monitor,mode=control")
	if err := m.runQEMU(ctx, args, false, theirs); err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, func() { _ = ours.SetDeadline(time.Now()) })
	defer stop()
	tmp := file + ".saving"
	if err := save(ours, tmp); err != nil {
		return "", fmt.Errorf("save the booted state: %w", m.orEnded(err))
	}
	m.line.Close()
	if err := Sweep(m.spec.Dir); err != nil {
		return "", err
	}
	return file, os.Rename(tmp, file)
}

// save writes the state of the machine behind a QMP monitor to a file and leaves
// it stopped. It must run until then: a machine saved stopped is restored so.
func save(monitor io.ReadWriter, file string) error {
	q := qmp{w: monitor, r: json.NewDecoder(bufio.NewReader(monitor))}
	var status struct {
		Status string `json:"status"`
		Desc   string `json:"error-desc"`
	}
	err := errors.Join(
		q.do(nil, "qmp_capabilities", nil),
		q.do(nil, "migrate-set-parameters", map[string]any{"max-bandwidth": int64(20 << 30)}),
		q.do(nil, "migrate", map[string]any{"uri": "file:" + file}),
	)
	for err == nil && status.Status != "completed" {
		time.Sleep(20 * time.Millisecond)
		err = q.do(&status, "query-migrate", nil)
		if status.Status == "failed" {
			err = fmt.Errorf("migrate to %s: %s", file, status.Desc)
		}
	}
	return err
}

// qmp is a QEMU monitor (docs/interop/qmp-spec of QEMU).
type qmp struct {
	w io.Writer
	r *json.Decoder
}

func (q qmp) do(result any, command string, args map[string]any) error {
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	text, err := json.Marshal(request)
	if err != nil {
		return err
	}
	if _, err := q.w.Write(append(text, '\n')); err != nil {
		return fmt.Errorf("ask QEMU to %s: %w", command, err)
	}
	for { // the greeting and events come in between
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := q.r.Decode(&answer); err != nil {
			return fmt.Errorf("ask QEMU to %s: %w", command, err)
		}
		if answer.Error != nil {
			return fmt.Errorf("ask QEMU to %s: %s", command, answer.Error.Desc)
		}
		if answer.Return != nil {
			if result == nil {
				return nil
			}
			return json.NewDecoder(bytes.NewReader(answer.Return)).Decode(result)
		}
	}
}
