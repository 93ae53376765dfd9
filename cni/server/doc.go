// Package server is the agent's side of the CNI plugin: it takes the calls of
// the shim from a unix socket, has package attach do them, and answers.
//
// Any number of calls may wait; a bounded number is worked on, each with a
// deadline. Package attach keeps calls for one attachment, one VF and one PF
// apart. A panic ends the call it happened in with an error, and nothing else.
package server
