// Package netselect reads which networks a pod asks for: the annotation
// k8s.v1.cni.cncf.io/networks of the Network Plumbing Working Group's multi-network
// specification 1.3, in its short form and in its JSON form.
//
// It is stricter than the specification asks: an unknown key, a key given twice,
// or two interfaces of one name is an error, because what is dropped silently is
// an interface that is not what its author meant.
package netselect
