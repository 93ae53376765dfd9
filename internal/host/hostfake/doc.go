// Package hostfake is an obedient kernel in memory, for unit tests of what
// stands on package host. Each of its operations can be made to fail with an
// errno, and its NICs can be changed behind the back of the code under test.
package hostfake
