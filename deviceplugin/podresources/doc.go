// Package podresources asks the kubelet which pod it gave a device to, over the
// pod-resources API v1 on the node's local socket. The kubelet is the authority:
// it decides, and its answer holds also for a pod whose sandbox is only being
// made, which is when an attachment must be checked.
//
// The kubelet tells of containers and of init containers that run on beside them
// (restartPolicy Always). Of what init containers that end had it never tells
// (pkg/kubelet/apis/podresources/server_v1.go): such a device is known to be held only
// while it is attached, or from its allocation for as long as the caller remembers that.
package podresources
