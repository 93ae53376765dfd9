// Package render turns networks into NetworkAttachmentDefinitions.
//
// It is pure, and it builds the CNI configuration as data: what a user writes into ipam,
// capabilities or metaPlugins is parsed and placed as a JSON value, so that it can
// neither break the configuration around it nor add keys to it.
package render
