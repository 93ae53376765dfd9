// Package inject works out what a pod must ask for so that it gets the devices of the
// networks that its annotation names.
//
// It is pure: a pod as JSON and the annotations of its NetworkAttachmentDefinitions go in,
// a JSON patch comes out. It does what the network resources injector does: the missing
// resources go to the first container, the definitions' node selectors to the pod, and
// labels, annotations and huge pages into a volume that programs find at /etc/podnetinfo.
package inject
