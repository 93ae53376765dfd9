//go:build lab

package host

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %v: %v\n%s", args, err, out)
	}
}

// labLinks gives the guest a link of each kind besides its NICs.
func labLinks(t *testing.T, h *Host) (pf PF) {
	pf = labPF(t, h)
	ip(t, "link", "add", "bond7", "type", "bond", "mode", "active-backup")
	ip(t, "link", "add", "br7", "type", "bridge")
	ip(t, "link", "add", "vx7", "type", "vxlan", "id", "7", "dstport", "4789", "dev", pf.Name)
	ip(t, "link", "add", "va7", "type", "veth", "peer", "name", "vb7")
	ip(t, "link", "set", "vb7", "master", "br7")
	ip(t, "link", "add", "link", pf.Name, "name", "foreign7", "type", "vlan", "id", "7")
	t.Cleanup(func() {
		for _, l := range []string{"foreign7", "va7", "vx7", "br7", "bond7"} {
			_ = exec.Command("ip", "link", "del", l).Run()
		}
	})
	return pf
}

func labLink(t *testing.T, h *Host, name string) *ParentLink {
	t.Helper()
	links, err := h.Links(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range links {
		if links[i].Name == name {
			return &links[i]
		}
	}
	return nil
}

func TestLabLinks(t *testing.T) {
	h := open(t)
	pf := labLinks(t, h)
	for name, kind := range map[string]LinkKind{pf.Name: PhysicalLink, "bond7": BondLink, "br7": BridgeLink, "vx7": VXLANLink, "foreign7": VLANLink} {
		l := labLink(t, h, name)
		if l == nil || l.Kind != kind || l.IfIndex == 0 || l.Managed {
			t.Errorf("%s: %+v", name, l)
		}
	}
	if l := labLink(t, h, "vb7"); l != nil {
		t.Errorf("a veth: %+v", l)
	}
	if l := labLink(t, h, pf.Name); l.PCIAddress != pf.PCIAddress || l.Vendor != pf.Vendor || l.DeviceID != pf.DeviceID || l.MAC.String() != pf.MAC.String() {
		t.Errorf("%+v is not %+v", l, pf)
	}
	if l := labLink(t, h, "foreign7"); l.Lower != pf.Name || l.VLAN != 7 {
		t.Errorf("%+v", l)
	}
}

// A VLAN device of ours is made up and marked, and goes when nothing stands on it; one
// of somebody else's stays.
func TestLabVLAN(t *testing.T) {
	h := open(t)
	pf := labLinks(t, h)
	for _, lower := range []string{pf.Name, "bond7", "br7", "vx7", "foreign7"} {
		t.Run(labLink(t, h, lower).kindName(), func(t *testing.T) {
			ip(t, "link", "set", lower, "up")
			if err := h.AddVLAN(t.Context(), labLink(t, h, lower).Link(), "ours9", 9); err != nil {
				t.Fatal(err)
			}
			l := labLink(t, h, "ours9")
			if l == nil || !l.Managed || !l.AdminUp || l.Lower != lower || l.VLAN != 9 || l.MTU != labLink(t, h, lower).MTU {
				t.Fatalf("%+v", l)
			}
			if err := h.CheckParent("ours9"); err != nil {
				t.Error(err)
			}
			err := h.AddVLAN(t.Context(), labLink(t, h, lower).Link(), "again9", 9)
			if !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "make VLAN device again9") {
				t.Errorf("a second time: %v", err)
			}
			if err := h.RemoveVLAN(t.Context(), l.Link()); err != nil {
				t.Fatal(err)
			}
			if l = labLink(t, h, "ours9"); l != nil {
				t.Errorf("it is still there: %+v", l)
			}
		})
	}
	if err := h.RemoveVLAN(t.Context(), labLink(t, h, "foreign7").Link()); err == nil || labLink(t, h, "foreign7") == nil {
		t.Errorf("a device of somebody else: %v", err)
	}
	ip(t, "link", "set", "bond7", "down")
	if err := h.AddVLAN(t.Context(), labLink(t, h, "bond7").Link(), "ours9", 9); !errors.Is(err, unix.ENETDOWN) || labLink(t, h, "ours9") != nil {
		t.Errorf("on a link that is down: %v", err)
	}
	if err := h.CheckParent("bond7"); err == nil {
		t.Error("a link that is down is a parent")
	}
	err := h.SetMTU(t.Context(), labLink(t, h, "foreign7").Link(), 9000)
	if !errors.Is(err, unix.ERANGE) || !strings.Contains(err.Error(), "smaller MTU") {
		t.Errorf("a larger MTU than the link below: %v", err)
	}
}

func (p *ParentLink) kindName() string { return fmt.Sprintf("on a %s link", p.Kind) }

// What is in a pod's namespace cannot be listed, and is seen all the same.
func TestLabVLANInUse(t *testing.T) {
	h := open(t)
	pf := labPF(t, h)
	ip(t, "netns", "add", "pod9")
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", "pod9").Run() })
	for what, c := range map[string]struct{ start, stop func() }{
		"sub-interface in a pod": {
			func() {
				ip(t, "link", "add", "link", "ours9", "name", "mv9", "netns", "pod9", "type", "macvlan", "mode", "bridge")
				ip(t, "-n", "pod9", "link", "set", "mv9", "up")
			},
			func() { ip(t, "-n", "pod9", "link", "del", "mv9") },
		},
		"passthru in a pod": {
			func() {
				ip(t, "link", "add", "link", "ours9", "name", "mv9", "netns", "pod9", "type", "macvlan", "mode", "passthru")
				ip(t, "-n", "pod9", "link", "set", "mv9", "up")
			},
			func() { ip(t, "-n", "pod9", "link", "del", "mv9") },
		},
		"link of the node": {
			func() { ip(t, "link", "add", "link", "ours9", "name", "up9", "type", "vlan", "id", "3") },
			func() { ip(t, "link", "del", "up9") },
		},
		"address": {
			func() { ip(t, "addr", "add", "192.0.2.1/24", "dev", "ours9") },
			func() { ip(t, "addr", "flush", "dev", "ours9") },
		},
		"bridge": {
			func() { ip(t, "link", "add", "br9", "type", "bridge"); ip(t, "link", "set", "ours9", "master", "br9") },
			func() { ip(t, "link", "del", "br9") },
		},
	} {
		t.Run(what, func(t *testing.T) {
			if err := h.AddVLAN(t.Context(), pf.Link(), "ours9", 9); err != nil {
				t.Fatal(err)
			}
			c.start()
			err := h.RemoveVLAN(t.Context(), labLink(t, h, "ours9").Link())
			if !errors.Is(err, ErrLinkInUse) || labLink(t, h, "ours9") == nil {
				t.Errorf("it was removed: %v", err)
			}
			t.Log(err)
			c.stop()
			if err := h.RemoveVLAN(t.Context(), labLink(t, h, "ours9").Link()); err != nil {
				t.Error(err)
			}
		})
	}
}

// An address that the kernel made for a router's advertisement is nobody's use.
func TestLabVLANWithAdvertisedAddress(t *testing.T) {
	h := open(t)
	pf := labPF(t, h)
	if err := h.AddVLAN(t.Context(), pf.Link(), "ours9", 9); err != nil {
		t.Fatal(err)
	}
	ip(t, "addr", "add", "2001:db8::5/64", "dev", "ours9", "mngtmpaddr", "valid_lft", "1000", "preferred_lft", "500")
	ip(t, "addr", "add", "192.0.2.1/24", "dev", "ours9", "valid_lft", "1000", "preferred_lft", "500") // as DHCP does
	if err := h.RemoveVLAN(t.Context(), labLink(t, h, "ours9").Link()); !errors.Is(err, ErrLinkInUse) || !strings.Contains(err.Error(), "192.0.2.1") {
		t.Errorf("an address by DHCP: %v", err)
	}
	ip(t, "addr", "del", "192.0.2.1/24", "dev", "ours9")
	if err := h.RemoveVLAN(t.Context(), labLink(t, h, "ours9").Link()); err != nil {
		t.Error(err)
	}
}

// The kernel tells of links of each kind, once, and not of what pods do to a bridge.
func TestLabEventsOfLinks(t *testing.T) {
	h := open(t)
	labLinks(t, h)
	events, err := h.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ip(t, "link", "set", "br7", "mtu", "1400")
	ip(t, "link", "set", "br7", "up")
	told(t, events, true, "bridge")
	for _, c := range []struct {
		told bool
		args string
	}{
		{false, "link add va8 type veth peer name vb8"},
		{false, "link set va8 master br7"},
		{false, "link del va8"},
		{true, "link set br7 mtu 1450"},
		{true, "link set foreign7 up"},
		{true, "link add bond8 type bond"},
		{true, "link del bond8"},
		{true, "link del foreign7"},
	} {
		ip(t, strings.Fields(c.args)...)
		told(t, events, c.told, c.args)
	}
}

// told waits for the events to end, and checks whether there were any.
func told(t *testing.T, events <-chan Changes, want bool, what string) {
	t.Helper()
	got := false
	for {
		wait := 300 * time.Millisecond
		if want && !got {
			wait = 20 * time.Second
		}
		select {
		case <-events:
			got = true
			continue
		case <-time.After(wait):
		}
		if got != want {
			t.Errorf("%s: told %t, want %t", what, got, want)
		}
		return
	}
}
