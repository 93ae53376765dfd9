// Package wire is what the CNI shim and the agent's CNI server say to one
// another over a unix socket.
//
// The shim sends a Request, together with the descriptor of the pod's network
// namespace if it could open that. The server answers Ack at once, so that the
// shim knows in time that nobody is there, and a Response when it is done. A
// shim that hangs up before takes its ADD back.
package wire
