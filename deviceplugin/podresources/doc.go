// Package podresources asks the kubelet which pod it gave a device to, over the
// pod-resources API v1 on the node's local socket. The kubelet is the authority:
// it decides, and its answer holds also for a pod whose sandbox is only being
// made, which is when an attachment must be checked.
package podresources
