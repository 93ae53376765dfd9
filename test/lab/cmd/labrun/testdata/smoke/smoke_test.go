package smoke

import (
	"flag"
	"os"
	"os/exec"
	"testing"
	"time"
)

var what = flag.String("what", "", "how to misbehave: fail, panic or hang")

func TestCards(t *testing.T) {
	if os.Getuid() != 0 || os.Getenv("SLUICE_LAB_KIND") == "" {
		t.Fatalf("uid %d, kind %q: not root of a lab guest", os.Getuid(), os.Getenv("SLUICE_LAB_KIND"))
	}
	driver, vfs := "sluicenic", 5
	if os.Getenv("SLUICE_LAB_KIND") == "qemu" {
		driver, vfs = "igb", 7
	}
	for name, want := range map[string]Card{
		"ens1f0": {"0000:01:00.0", driver, vfs},
		"ens2f0": {"0000:02:00.0", driver, vfs},
	} {
		if got, err := ReadCard(name); err != nil || got != want {
			t.Errorf("card %s: got %+v, %v; want %+v", name, got, err, want)
		}
	}
}

func TestVFs(t *testing.T) {
	const numvfs = "/sys/class/net/ens1f0/device/sriov_numvfs"
	if out, err := exec.Command("ip", "link", "set", "ens1f0", "up").CombinedOutput(); err != nil {
		t.Fatalf("set the PF up: %v: %s", err, out)
	}
	if err := os.WriteFile(numvfs, []byte("2"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile(numvfs, []byte("0"), 0o644)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		vfs, _ := os.ReadDir("/sys/class/net/ens1f0/device/virtfn1/net")
		if len(vfs) == 1 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the second VF has %d interfaces, want 1", len(vfs))
		}
	}
}

func TestFiles(t *testing.T) {
	if got, err := os.ReadFile("testdata/greeting"); err != nil || string(got) != "hello\n" {
		t.Errorf("read testdata: %q, %v", got, err)
	}
}

func TestClock(t *testing.T) {
	if y := time.Now().Year(); y < 2024 {
		t.Errorf("the clock says %d", y)
	}
}

func TestMisbehave(t *testing.T) {
	switch *what {
	case "fail":
		t.Fatal("failed as asked")
	case "panic":
		os.WriteFile("/proc/sys/kernel/sysrq", []byte("1"), 0o644)
		os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0o200)
	case "hang":
		time.Sleep(time.Hour)
	}
}
