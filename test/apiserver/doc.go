// Package apiserver gives the tests of a package one real API server that knows Sluice's
// CRDs and nothing else of Sluice.
package apiserver
