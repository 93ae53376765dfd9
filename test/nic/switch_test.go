//go:build lab

package nic

import (
	"fmt"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

const broadcast = "ff:ff:ff:ff:ff:ff"

// port is the model of one function at the switch.
type port struct {
	mac                      string
	vst                      *tag // port VLAN
	isVF                     bool
	up                       bool
	spoofchk, trust, promisc bool
	vlans                    map[tag]bool // VLANs it asked for; without priority
}

// wirePort stands for the cable among the indexes of a model's ports.
const wirePort = -1

// model is the switch as its README promises it. ports[0] is the PF.
type model struct {
	ports  []port
	linkUp bool
}

func multicast(addr string) bool { return mac(addr)[0]&1 != 0 }

// vlanOf returns the VLAN a frame is in; a priority tag names none.
func vlanOf(f frame) (tag, bool) {
	if len(f.tags) == 0 || f.tags[0].vid == 0 && f.tags[0].proto == unix.ETH_P_8021Q {
		return tag{}, false
	}
	return tag{proto: f.tags[0].proto, vid: f.tags[0].vid}, true
}

func (p port) inVLAN(f frame) bool {
	vlan, tagged := vlanOf(f)
	switch {
	case !tagged:
		return p.vst == nil
	case p.vst != nil:
		return vlan == tag{proto: p.vst.proto, vid: p.vst.vid}
	default:
		return p.vlans[vlan] || !p.isVF && p.promisc
	}
}

// spoofs says whether the switch drops f from p for its source address.
func (p port) spoofs(f frame) bool { return p.isVF && p.up && p.spoofchk && f.src != p.mac }

// deliver returns what each port receives of f when it comes in at src.
func (m model) deliver(src int, f frame) map[int]frame {
	out := map[int]frame{}
	if src == wirePort && !m.linkUp {
		return out
	}
	if src != wirePort {
		p := m.ports[src]
		if !p.up || p.spoofs(f) {
			return out
		}
		if p.vst != nil {
			own := len(f.tags) > 0
			if own && !(p.vst.proto == unix.ETH_P_8021AD && f.tags[0].proto == unix.ETH_P_8021Q) {
				return out
			}
			f.tags = append([]tag{*p.vst}, f.tags...)
		}
	}
	local := false
	for i, p := range m.ports {
		if i == src || !p.inVLAN(f) {
			continue
		}
		mine := p.mac == f.dst
		local = local || mine
		if !p.up || !mine && !multicast(f.dst) && !(p.promisc && (!p.isVF || p.trust)) {
			continue
		}
		got := f
		if p.vst != nil {
			got.tags = f.tags[1:]
		}
		out[i] = got
	}
	if src != wirePort && m.linkUp && (multicast(f.dst) || !local) {
		out[wirePort] = f
	}
	return out
}

// bench is a card with a tap on each of its ends.
type bench struct {
	card card
	pf   netlink.Link
	taps map[int]tap // by index of the model's port
	seq  uint64
}

func newBench(t *testing.T, c card, vfs int) *bench {
	t.Helper()
	c.fresh(t, vfs)
	b := &bench{card: c, pf: link(t, c.pf), taps: map[int]tap{}}
	for i := range vfs {
		up(t, c.vf(i))
		b.taps[i+1] = openTap(t, c.vf(i))
	}
	for i := range vfs {
		waitLink(t, c.vf(i), true)
	}
	b.taps[0] = openTap(t, c.pf)
	b.taps[wirePort] = openTap(t, c.wire)
	return b
}

// sent is a frame and the port it was sent from.
type sent struct {
	from int
	f    frame
}

// check sends the frames and compares what arrives everywhere with the model.
func (b *bench) check(t *testing.T, m model, frames []sent) (problem string) {
	t.Helper()
	want := map[int][]string{}
	for _, s := range frames {
		b.seq++
		s.f.seq = b.seq
		for at, f := range m.deliver(s.from, s.f) {
			want[at] = append(want[at], f.String())
		}
		// A link without carrier refuses frames: the model says the same.
		if err := b.taps[s.from].send(s.f); err != nil {
			return fmt.Sprintf("send %v from %d: %v", s.f, s.from, err)
		}
	}
	got := map[int][]string{}
	collect := func() bool {
		done := true
		for at, p := range b.taps {
			for _, f := range p.received(t) {
				got[at] = append(got[at], f.String())
			}
			done = done && len(got[at]) >= len(want[at])
		}
		return done
	}
	for deadline := time.Now().Add(5 * time.Second); !collect() && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	collect() // what the model does not expect comes no later than what it does
	for at, p := range b.taps {
		if !slices.Equal(got[at], want[at]) {
			problem += fmt.Sprintf("\n%s received\n  %v\nwant\n  %v", p.name, got[at], want[at])
		}
	}
	return problem
}

// TestLabSwitch sends random frames through random settings and wants exactly
// what the model says: unicast, flooding, isolation of VLANs, tags, spoof
// check, link state, promiscuity.
func TestLabSwitch(t *testing.T) {
	const vfs = 4
	b := newBench(t, cards[0], vfs)
	pfMAC := b.pf.Attrs().HardwareAddr.String()
	pool := []string{"02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:03"}
	foreign := []string{"02:00:00:00:ff:01", "02:00:00:00:ff:02"}

	// VF 2 and VF 3 ask for VLANs of their own, as a VLAN netdev on them does.
	asked := map[int][]tag{
		2: {{proto: unix.ETH_P_8021Q, vid: 10}},
		3: {{proto: unix.ETH_P_8021Q, vid: 10}, {proto: unix.ETH_P_8021Q, vid: 20}, {proto: unix.ETH_P_8021AD, vid: 10}},
	}
	for vf, tags := range asked {
		for i, a := range tags {
			v := &netlink.Vlan{
				LinkAttrs:    netlink.LinkAttrs{Name: fmt.Sprintf("v%d.%d", vf, i), ParentIndex: link(t, b.card.vf(vf)).Attrs().Index},
				VlanId:       int(a.vid),
				VlanProtocol: netlink.VlanProtocol(a.proto),
			}
			if err := netlink.LinkAdd(v); err != nil {
				t.Fatalf("add VLAN %v on VF %d: %v", a, vf, err)
			}
		}
	}

	rapid.Check(t, func(rt *rapid.T) {
		m := model{linkUp: true, ports: []port{{mac: pfMAC, up: true, vlans: map[tag]bool{{proto: unix.ETH_P_8021Q}: true}}}}
		m.ports[0].promisc = b.promisc(t, rt, b.card.pf)
		for vf := range vfs {
			m.ports = append(m.ports, b.drawVF(t, rt, vf, pool, asked[vf]))
		}
		before := b.spoofed(t, vfs)

		vlans := []tag{
			{unix.ETH_P_8021Q, 0, 5}, {unix.ETH_P_8021Q, 10, 0}, {unix.ETH_P_8021Q, 20, 2},
			{unix.ETH_P_8021AD, 10, 1}, {unix.ETH_P_8021AD, 20, 0},
		}
		dsts := slices.Concat(pool, foreign, []string{pfMAC, broadcast, "01:00:5e:00:00:05"})
		var frames []sent
		spoofs := make([]int, vfs)
		for range rapid.IntRange(1, 30).Draw(rt, "frames") {
			s := sent{from: rapid.IntRange(wirePort, vfs).Draw(rt, "from")}
			s.f.dst = rapid.SampledFrom(dsts).Draw(rt, "dst")
			s.f.src = rapid.SampledFrom(slices.Concat(pool, foreign[1:])).Draw(rt, "src")
			if s.from >= 0 && rapid.IntRange(0, 3).Draw(rt, "honest") > 0 {
				s.f.src = m.ports[s.from].mac
			}
			for range rapid.SampledFrom([]int{0, 0, 1, 1, 2}).Draw(rt, "tags") {
				s.f.tags = append(s.f.tags, rapid.SampledFrom(vlans).Draw(rt, "tag"))
			}
			if s.from > 0 && m.ports[s.from].spoofs(s.f) {
				spoofs[s.from-1]++
			}
			frames = append(frames, s)
		}
		if problem := b.check(t, m, frames); problem != "" {
			rt.Fatalf("the switch and its model differ: %s\nmodel: %+v", problem, m)
		}
		for vf, n := range b.spoofed(t, vfs) {
			if n-before[vf] != spoofs[vf] {
				rt.Fatalf("VF %d counted %d spoofed frames, want %d", vf, n-before[vf], spoofs[vf])
			}
		}
	})
}

func (b *bench) spoofed(t *testing.T, vfs int) []int {
	t.Helper()
	out := make([]int, vfs)
	for vf := range vfs {
		n, err := strconv.Atoi(b.card.dump(t, vf)["tx_spoofed"])
		if err != nil {
			t.Fatal(err)
		}
		out[vf] = n
	}
	return out
}

func (b *bench) promisc(t *testing.T, rt *rapid.T, name string) bool {
	t.Helper()
	on := rapid.IntRange(0, 3).Draw(rt, name+" promisc") == 0
	set := netlink.SetPromiscOff
	if on {
		set = netlink.SetPromiscOn
	}
	if err := set(link(t, name)); err != nil {
		t.Fatalf("set promiscuous mode of %s: %v", name, err)
	}
	return on
}

// drawVF draws the settings of a VF, applies them and returns their model.
func (b *bench) drawVF(t *testing.T, rt *rapid.T, vf int, pool []string, asked []tag) port {
	t.Helper()
	label := fmt.Sprintf("vf%d ", vf)
	p := port{
		isVF:     true,
		mac:      rapid.SampledFrom(pool).Draw(rt, label+"mac"),
		spoofchk: rapid.Bool().Draw(rt, label+"spoofchk"),
		trust:    rapid.Bool().Draw(rt, label+"trust"),
		promisc:  b.promisc(t, rt, b.card.vf(vf)),
		// The 8021q module asks for VLAN 0 on every netdev that comes up.
		vlans: map[tag]bool{{proto: unix.ETH_P_8021Q}: true},
	}
	for _, a := range asked {
		p.vlans[a] = true
	}
	vlan := rapid.SampledFrom([]tag{{}, {}, {unix.ETH_P_8021Q, 10, 3}, {unix.ETH_P_8021Q, 20, 0}, {unix.ETH_P_8021AD, 10, 7}}).Draw(rt, label+"vlan")
	proto := int(vlan.proto)
	if vlan.vid != 0 {
		p.vst = &vlan
	} else {
		proto = unix.ETH_P_8021Q
	}
	state := rapid.SampledFrom([]uint32{0, 0, 1, 2}).Draw(rt, label+"link")
	p.up = state != netlink.VF_LINK_STATE_DISABLE
	for what, err := range map[string]error{
		"trust":    netlink.LinkSetVfTrust(b.pf, vf, p.trust),
		"mac":      netlink.LinkSetVfHardwareAddr(b.pf, vf, mac(p.mac)),
		"spoofchk": netlink.LinkSetVfSpoofchk(b.pf, vf, p.spoofchk),
		"vlan":     netlink.LinkSetVfVlanQosProto(b.pf, vf, int(vlan.vid), int(vlan.pcp), proto),
		"link":     netlink.LinkSetVfState(b.pf, vf, state),
	} {
		if err != nil {
			t.Fatalf("set %s of VF %d: %v", what, vf, err)
		}
	}
	waitLink(t, b.card.vf(vf), p.up)
	return p
}

// waitLink waits until the stack has followed the driver's carrier: until then
// it drops what is sent.
func waitLink(t *testing.T, name string, up bool) {
	t.Helper()
	eventually(t, fmt.Sprintf("operational state of %s is up=%v", name, up), func() bool {
		return link(t, name).Attrs().OperState == netlink.OperUp == up
	})
}

// TestLabSwitchPlain holds the cases a reader looks for by name, in the model's
// stead: what the random test finds must not rest on the model alone.
func TestLabSwitchPlain(t *testing.T) {
	b := newBench(t, cards[0], 3)
	const a0, a1, a2 = "02:00:00:00:01:00", "02:00:00:00:01:01", "02:00:00:00:01:02"
	for vf, addr := range []string{a0, a1, a2} {
		if err := netlink.LinkSetVfHardwareAddr(b.pf, vf, mac(addr)); err != nil {
			t.Fatal(err)
		}
	}
	// expect sends one frame and names all who must receive it, with its tags there.
	expect := func(what string, from int, f frame, want map[int][]tag) {
		t.Helper()
		b.seq++
		f.seq = b.seq
		if err := b.taps[from].send(f); err != nil {
			t.Fatalf("%s: send: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
		for at, p := range b.taps {
			got := p.received(t)
			tags, expected := want[at]
			switch {
			case !expected && len(got) != 0:
				t.Errorf("%s: %s received %v, want nothing", what, p.name, got)
			case expected && (len(got) != 1 || !slices.Equal(got[0].tags, tags)):
				t.Errorf("%s: %s received %v, want one frame with tags %v", what, p.name, got, tags)
			}
		}
	}
	vlan := func(vf, vid, qos int) {
		t.Helper()
		if err := netlink.LinkSetVfVlanQos(b.pf, vf, vid, qos); err != nil {
			t.Fatal(err)
		}
	}
	vid10 := []tag{{unix.ETH_P_8021Q, 10, 3}}
	const vf0, vf1, vf2, pf = 1, 2, 3, 0

	expect("unicast between VFs stays inside", vf0, frame{dst: a1, src: a0}, map[int][]tag{vf1: nil})
	expect("unknown unicast goes to the wire only", vf0, frame{dst: "02:00:00:00:99:99", src: a0}, map[int][]tag{wirePort: nil})
	expect("broadcast reaches all but the sender", vf0, frame{dst: broadcast, src: a0}, map[int][]tag{vf1: nil, vf2: nil, pf: nil, wirePort: nil})
	expect("unicast from the wire", wirePort, frame{dst: a2, src: "02:00:00:00:99:99"}, map[int][]tag{vf2: nil})
	expect("unknown unicast from the wire", wirePort, frame{dst: "02:00:00:00:99:98", src: "02:00:00:00:99:99"}, nil)
	expect("spoofed source is dropped", vf0, frame{dst: a1, src: a2}, nil)
	if n := b.spoofed(t, 1)[0]; n != 1 {
		t.Errorf("VF 0 counted %d spoofed frames, want 1", n)
	}
	vlan(0, 10, 3)
	expect("VST tags on the wire", vf0, frame{dst: broadcast, src: a0}, map[int][]tag{wirePort: vid10})
	expect("no unicast across VLANs", vf0, frame{dst: a1, src: a0}, map[int][]tag{wirePort: vid10})
	expect("no unicast into a VLAN", vf1, frame{dst: a0, src: a1}, map[int][]tag{wirePort: nil})
	expect("VST strips from the wire", wirePort, frame{dst: a0, src: "02:00:00:00:99:99", tags: vid10}, map[int][]tag{vf0: nil})
	expect("another VLAN from the wire", wirePort, frame{dst: a0, src: "02:00:00:00:99:99", tags: []tag{{unix.ETH_P_8021Q, 20, 0}}}, nil)
	expect("a VF's own tag inside VST", vf0, frame{dst: broadcast, src: a0, tags: []tag{{unix.ETH_P_8021Q, 20, 0}}}, nil)
	vlan(1, 10, 0)
	expect("VFs in one VLAN", vf1, frame{dst: a0, src: a1}, map[int][]tag{vf0: nil})
	if err := netlink.LinkSetVfVlanQosProto(b.pf, 0, 10, 3, unix.ETH_P_8021AD); err != nil {
		t.Fatal(err)
	}
	expect("service tag around a VF's own", vf0, frame{dst: broadcast, src: a0, tags: []tag{{unix.ETH_P_8021Q, 20, 0}}},
		map[int][]tag{wirePort: {{unix.ETH_P_8021AD, 10, 3}, {unix.ETH_P_8021Q, 20, 0}}})
	expect("the same id of the other kind of tag is another VLAN", vf0, frame{dst: a1, src: a0}, map[int][]tag{wirePort: {{unix.ETH_P_8021AD, 10, 3}}})
	vlan(0, 0, 0)
	expect("a tag of a VF without VLAN goes out as it is", vf0, frame{dst: broadcast, src: a0, tags: vid10}, map[int][]tag{wirePort: vid10, vf1: nil})

	// VF 1 is in port VLAN 10 still: no 802.1Q VLAN netdev on it, but an 802.1ad one.
	for proto, want := range map[netlink.VlanProtocol]syscall.Errno{unix.ETH_P_8021Q: unix.EPERM, unix.ETH_P_8021AD: 0} {
		v := &netlink.Vlan{
			LinkAttrs:    netlink.LinkAttrs{Name: fmt.Sprintf("v1.%d", proto), ParentIndex: link(t, b.card.vf(1)).Attrs().Index},
			VlanId:       20,
			VlanProtocol: proto,
		}
		wantErrno(t, fmt.Sprintf("VLAN netdev of protocol %v inside a port VLAN", proto), netlink.LinkAdd(v), want)
	}
}

// TestLabCable joins two cards by a bridge, as two guests are joined.
func TestLabCable(t *testing.T) {
	for _, c := range cards {
		c.fresh(t, 1)
		up(t, c.vf(0))
	}
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "brt"}}
	if err := netlink.LinkAdd(br); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(br) })
	up(t, "brt")
	for _, c := range cards {
		if err := netlink.LinkSetMaster(link(t, c.wire), br); err != nil {
			t.Fatal(err)
		}
	}
	one, two := openTap(t, cards[0].vf(0)), openTap(t, cards[1].vf(0))
	src := link(t, cards[0].vf(0)).Attrs().HardwareAddr.String()
	dst := link(t, cards[1].vf(0)).Attrs().HardwareAddr.String()
	var got []frame
	eventually(t, "a frame from card 1 reaches a VF of card 2", func() bool {
		if err := one.send(frame{dst: dst, src: src, seq: 1}); err != nil {
			t.Fatal(err)
		}
		got = append(got, two.received(t)...)
		return len(got) > 0
	})
	// The two cards' VLANs are the same VLANs.
	for vf, vid := range []int{10, 20} {
		if err := netlink.LinkSetVfVlan(link(t, cards[vf].pf), 0, vid); err != nil {
			t.Fatal(err)
		}
	}
	two.received(t)
	for range 5 {
		if err := one.send(frame{dst: broadcast, src: src, seq: 2}); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(50 * time.Millisecond)
	if got := two.received(t); len(got) != 0 {
		t.Errorf("frames of VLAN 10 arrived in VLAN 20: %v", got)
	}
	if err := netlink.LinkSetVfVlan(link(t, cards[1].pf), 0, 10); err != nil {
		t.Fatal(err)
	}
	if err := one.send(frame{dst: broadcast, src: src, seq: 3}); err != nil {
		t.Fatal(err)
	}
	got = nil
	eventually(t, "a frame of VLAN 10 arrives in VLAN 10", func() bool {
		got = append(got, two.received(t)...)
		return len(got) > 0
	})
	if len(got[0].tags) != 0 {
		t.Errorf("the VF received the tags %v, want none", got[0].tags)
	}
}
