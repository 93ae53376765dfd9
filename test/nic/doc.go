// Package nic tests the emulated SR-IOV network card, the kernel module in
// module/. What the rest of the project proves on this card is worth as much
// as the card itself, so its own behaviour is held here: what it shows in
// sysfs, rtnetlink, devlink and ethtool, and, by frames, what its switch
// forwards and what it drops.
//
// The tests need a guest of their own with the module loaded for two cards of
// four VFs or more, and run there as root:
//
//	go test -tags lab -exec labrun ./test/nic
//
// README.md describes the card.
package nic
