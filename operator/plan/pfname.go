package plan

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// maxVF is one more than the highest VF number accepted in a range. PCI allows 65535
// VFs, no NIC comes near; the bound keeps a typing error from using memory.
const maxVF = 10000

// ParsePfName splits an entry of nicSelector.pfNames, such as ens1f0#0-3,8, into the PF's
// name and the VFs chosen, sorted. No choice gives nil VFs.
func ParsePfName(entry string) (name string, vfs []int, err error) {
	name, choice, chosen := strings.Cut(entry, "#")
	if name == "" {
		return "", nil, fmt.Errorf("pfNames %q: no PF name before #: write, for example, ens1f0#0-3", entry)
	}
	if !chosen {
		return name, nil, nil
	}
	var ranges [][2]int
	for part := range strings.SplitSeq(choice, ",") {
		first, last, err := ParseVfRange(part)
		if err != nil {
			return "", nil, fmt.Errorf("pfNames %q: %w", entry, err)
		}
		ranges = append(ranges, [2]int{first, last})
	}
	slices.SortFunc(ranges, func(a, b [2]int) int { return a[0] - b[0] })
	next := 0 // an entry may have the same range thousands of times
	for _, r := range ranges {
		for next = max(next, r[0]); next <= r[1]; next++ {
			vfs = append(vfs, next)
		}
	}
	return name, vfs, nil
}

// ParseVfRange reads "first-last", both included, or a single VF number.
func ParseVfRange(s string) (first, last int, err error) {
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		to = from
	}
	if first, err = vfNumber(from); err != nil {
		return 0, 0, fmt.Errorf("VF range %q: %w", s, err)
	}
	if last, err = vfNumber(to); err != nil {
		return 0, 0, fmt.Errorf("VF range %q: %w", s, err)
	}
	if first > last {
		return 0, 0, fmt.Errorf("VF range %q runs backwards: write %d-%d", s, last, first)
	}
	return first, last, nil
}

func vfNumber(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n >= maxVF {
		return 0, fmt.Errorf("%q is not a VF number: use 0 to %d", s, maxVF-1)
	}
	return int(n), nil
}

// FormatVfRange writes a range as VfGroup.vfRange has it.
func FormatVfRange(first, last int) string {
	return strconv.Itoa(first) + "-" + strconv.Itoa(last)
}

// formatVFs writes sorted VF numbers for people: 0-3,8.
func formatVFs(vfs []int) string {
	var b strings.Builder
	for i := 0; i < len(vfs); {
		j := i
		for j+1 < len(vfs) && vfs[j+1] == vfs[j]+1 {
			j++
		}
		if i > 0 {
			b.WriteByte(',')
		}
		if i == j {
			b.WriteString(strconv.Itoa(vfs[i]))
		} else {
			b.WriteString(FormatVfRange(vfs[i], vfs[j]))
		}
		i = j + 1
	}
	return b.String()
}
