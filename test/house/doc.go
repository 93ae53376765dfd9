// Package house holds the tests of the house's own rules: who may import whom,
// which packages are pure, and what every package must say of itself.
//
// The rules and their reasons are in docs/design.md.
package house
