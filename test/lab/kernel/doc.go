// Package kernel has the build steps of the kernels that lab guests run, and of
// the emulated network card's module.
//
// [UML] is a User-Mode Linux kernel from Debian's 6.12 source with the options
// in uml.config, everything built in. [NIC] is the module of test/nic for it.
// [Debian] is Debian's own kernel, unchanged but for being unpacked: its ELF
// image out of the compressed one, because QEMU starts that at once, and its
// modules decompressed, because an emulated CPU is slow at that.
package kernel
