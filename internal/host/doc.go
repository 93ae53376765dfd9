// Package host is the kernel as this project sees it: PCI functions and their
// SR-IOV capability from sysfs, netdevs from rtnetlink, speed from ethtool,
// eswitch mode from devlink, and the changes the project makes to them.
//
// Host is the one real implementation. It keeps its sockets open for its whole
// life, in the network namespace of the thread that called Open, and never
// polls: Watch says when something changed. VF lists (IFLA_VFINFO_LIST), which
// drivers may answer with a firmware call per VF while the kernel's RTNL lock
// is held, are read only by ReadVFSettings.
//
// What the kernel refuses comes back as *KernelError: operation, object, value,
// errno and, where the cause is known, the mend.
//
// Consumers declare the few methods they need as an interface of their own;
// package hostfake has an in-memory implementation for unit tests.
package host
