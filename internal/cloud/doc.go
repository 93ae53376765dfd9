// Package cloud asks the cloud that a node is a virtual machine of which of its networks
// the node's NICs are on. Only OpenStack is known: by what the machine's DMI says, and by
// the metadata that Nova serves on a link-local address. Nothing is asked of any address
// on other machines.
package cloud
