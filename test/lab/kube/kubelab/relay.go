package main

import (
	"fmt"
	"io"
	"net"
	"os"
)

// relay joins two network namespaces by a listening socket: its starter
// opened the socket in one, and this process, which dials, lives in the other.
func relay(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("want one argument, the address to dial, got %d", len(args))
	}
	listener, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return fmt.Errorf("use descriptor 3 as a listening socket: %w", err)
	}
	for {
		client, err := listener.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			defer client.Close()
			server, err := net.Dial("tcp", args[0])
			if err != nil {
				fmt.Fprintln(os.Stderr, "kubelab relay:", err)
				return
			}
			defer server.Close()
			done := make(chan struct{}, 2)
			for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
				go func() {
					_, _ = io.Copy(way[0], way[1]) // ends with either side; nobody is left to tell
					if half, ok := way[0].(*net.TCPConn); ok {
						_ = half.CloseWrite()
					}
					done <- struct{}{}
				}()
			}
			<-done
			<-done
		}()
	}
}
