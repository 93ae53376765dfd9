package holder

import "strings"

// unnamed is no beginning of namespace/name, which has no colon.
const unnamed = "uid:"

// Unnamed names a pod of which only the UID is known: its init containers alone have the
// device.
func Unnamed(uid string) string { return unnamed + uid }

// UID is that of a pod that Unnamed names; ok is false of any other.
func UID(pod string) (uid string, ok bool) { return strings.CutPrefix(pod, unnamed) }
