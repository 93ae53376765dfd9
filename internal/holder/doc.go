// Package holder names the pods that have devices: by namespace/name, or by UID while the
// kubelet has told no more.
package holder
