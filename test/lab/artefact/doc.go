// Package artefact builds what the lab boots from, and keeps it.
//
// A [Step] names its inputs and knows how to build its output directory from
// them. A [Store] is a directory of such outputs, by default
// ${XDG_CACHE_HOME:-~/.cache}/sluice, each in <name>-<hash of the inputs>.
// The same inputs are built once, by one process, however many ask; a build
// that fails or is killed leaves nothing that a later one could trip over,
// because an output appears under its name only by the rename that ends a
// successful build.
//
// The hash covers what a step declares: texts, files, other steps. It does not
// cover the version of a Debian package a build downloads: an artefact stays as
// it was built until its declared inputs change, so a package upload does not
// cost every developer a kernel build.
package artefact
