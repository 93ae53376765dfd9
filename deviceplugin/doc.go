// Package deviceplugin offers pools of virtual functions and MacVLAN slots to the
// kubelet.
//
// Each pool is one extended resource, "<prefix>/<name>", served by its own
// gRPC server (device plugin API v1beta1) on its own socket in the kubelet's
// device-plugin directory. The [Manager] owns the servers. Its caller says what
// the pools are ([Manager.Advertise]) and takes devices out before touching
// them ([Manager.Withdraw]); neither needs a new registration, and running pods
// are not disturbed by either.
//
// A resource is always in one of two states: served and registered, or on its
// way there. The way is walked again, from wherever it broke, whenever the
// kubelet's socket appears, the resource's own socket is gone, or the last
// ListAndWatch stream ends; failures are retried with backoff and reported by
// [Manager.Ready].
//
// A pool that disappears first advertises no devices, so that the node's
// capacity drops at once, and is unregistered (stream and socket closed) after
// a grace of ten seconds. Closing the stream at once could lose the empty list,
// and the kubelet would show the old capacity for its own grace of five minutes.
//
// In whose hands a device is, the [Ledger] knows, for all of the agent: what the kubelet
// was promised, what it allocated, what is attached, and what is left of all that
// after any of these programs was restarted. Package life has the rules.
//
// What a container gets (environment, device nodes, device-info file) is
// computed by pure functions from the pool, the device and what sysfs says.
// A slot is a right to one sub-interface of a link, and nothing in the machine:
// it has an ID that names the link (host.SlotID), and no device nodes.
package deviceplugin
