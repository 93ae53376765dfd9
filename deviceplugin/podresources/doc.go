// Package podresources asks the kubelet which pod it gave a device to, over the
// pod-resources API v1 on the node's local socket. The kubelet is the authority:
// it decides, and its answer holds also for a pod whose sandbox is only being
// made, which is when an attachment must be checked.
//
// The kubelet tells of containers and of init containers that run on beside them
// (restartPolicy Always), but not of what init containers that end were given
// (pkg/kubelet/apis/podresources/server_v1.go). That is in the checkpoint of its device
// manager (kubelet_internal_checkpoint), which names pods by UID.
//
// The checkpoint is as old as the last allocation, or the last list that a device
// plugin sent (genericDeviceUpdateCallback in pkg/kubelet/cm/devicemanager): pods that
// are gone may be in it. The kubelet forgets them when it is asked over the API, and
// then a list sent to it makes the checkpoint tell of no others than live pods.
package podresources
