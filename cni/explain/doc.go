// Package explain answers why a packet passes, or does not, between pods' interfaces: by
// which policy, and which of its rules. It asks the code that agents enforce policy by, of
// the objects as they are now.
package explain
