// Package control is what the host and guestd say to each other, over anything
// that carries bytes both ways: a serial line, a virtio port, a TCP connection.
//
// The server greets with [greeting]; whatever a line carried before that (a
// console that echoes, an old session) is skipped. Then both sides send frames:
// a type byte, a length of 4 bytes, big-endian, and the payload. The client
// sends a request and, for as long as it is served, the request's input; the
// server sends output and at last the result. One request is served at a time.
// A client that goes away ends the command it had started.
package control
