package host

import (
	"encoding/hex"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// MaxSlots is the most sub-interfaces that one parent is offered for.
const MaxSlots = 4096

var (
	// plainName is a DNS subdomain name (RFC 1123).
	plainName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	hexName   = regexp.MustCompile(`^x([0-9a-f]{2})+$`)
)

// SlotID is the kubelet's device ID for one of the sub-interfaces that parent may have:
// "ens1f0.100-7". It says which link is the parent, is a DNS subdomain name whatever the
// link is called, and never a PCI address. A link's name that is no such name, or
// looks like this encoding, stands there as x and its bytes in hexadecimal digits.
func SlotID(parent string, n int) string {
	if !plainName.MatchString(parent) || hexName.MatchString(parent) {
		parent = "x" + hex.EncodeToString([]byte(parent))
	}
	return parent + "-" + strconv.Itoa(n)
}

// ParseSlotID tells the parent and the number of a slot. It takes what SlotID writes
// and nothing else.
func ParseSlotID(id string) (parent string, n int, err error) {
	at := max(strings.LastIndexByte(id, '-'), 0)
	name, number := id[:at], strings.TrimPrefix(id[at:], "-")
	if n, err = strconv.Atoi(number); err == nil && hexName.MatchString(name) {
		var b []byte
		if b, err = hex.DecodeString(name[1:]); err == nil {
			name = string(b)
		}
	}
	if err != nil || n < 0 || n >= MaxSlots || name == "" || len(name) >= ifNameSize || SlotID(name, n) != id {
		return "", 0, fmt.Errorf("%q is not a MacVLAN slot like ens1f0-0", id)
	}
	return name, n, nil
}

// ifNameSize is IFNAMSIZ: a link's name and its closing zero.
const ifNameSize = 16
