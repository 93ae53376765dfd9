package guest

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/sluice-network/sluice/test/lab/guest/control"
	"github.com/sluice-network/sluice/test/lab/kernel"
)

// bootUML starts a User-Mode Linux guest and waits for its greeting.
func (m *machine) bootUML(ctx context.Context) error {
	cpus, err := cpu(m.spec.CPU)
	if err != nil {
		return err
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	m.proc, err = launch(command(m.spec.Parts.Program, umlArgs(m.spec), theirs), m.spec.Dir, m.spec.Net.Namespace, cpus)
	if err != nil {
		ours.Close()
		return err
	}
	theirs.Close() // so that the line closes when the guest ends
	return m.greet(ctx, ours, false)
}

// umlArgs is the command line of a User-Mode Linux kernel.
func umlArgs(s Spec) []string {
	args := []string{
		"umid=" + s.Name, "uml_dir=" + filepath.Join(s.Dir, umlDir),
		fmt.Sprintf("mem=%dM", s.Memory), "ubd0r=" + s.Root, "initrd=" + s.Parts.Initrd,
		"console=tty0", "con=null", "con0=null,fd:1", "ssl=null", "ssl0=fd:3",
		"quiet", "loglevel=4", "panic=-1", "random.trust_cpu=on",
		// These are built in and would make devices that a node has not.
		"dummy.numdummies=0", "ifb.numifbs=0", "bonding.max_bonds=0",
	}
	for i, tap := range []string{s.Net.Mgmt, s.Net.Data[0], s.Net.Data[1]} {
		if tap != "" {
			// Without gro the device refuses the host's large frames.
			args = append(args, fmt.Sprintf("vec%d:transport=tap,ifname=%s,gro=1,mac=%s", i, tap, mac(i, s.Number)))
		}
	}
	return args
}

// mac returns a locally administered address for interface i of guest number n.
func mac(i, n int) string { return fmt.Sprintf("52:54:00:00:%02x:%02x", i, n) }

// setupUML adds the directories of the host and the emulated cards.
func (m *machine) setupUML(s *control.Setup) {
	s.Host = m.spec.Host
	if m.spec.Files != "" {
		s.Host = append(s.Host, control.Host{From: m.spec.Files, To: "/host"})
	}
	card := m.spec.Card
	if card.Count == 0 {
		return
	}
	params := []string{fmt.Sprintf("cards=%d", card.Count)}
	if card.TotalVFs != 0 {
		params = append(params, fmt.Sprintf("total_vfs=%d", card.TotalVFs))
	}
	s.Cards = append(s.Cards, control.Module{Name: kernel.NICModule, Params: append(params, card.Params...)})
	for i := range min(card.Count, len(m.spec.Net.Data)) {
		if m.spec.Net.Data[i] == "" {
			break
		}
		s.Wires = i + 1
	}
}
