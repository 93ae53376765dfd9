package main

import (
	"strings"
	"testing"
)

func TestArguments(t *testing.T) {
	for args, want := range map[string]string{
		"explain a":                           "give either --from or --to",
		"explain a --from b --to c":           "give either --from or --to",
		"explain --from b":                    "accepts 1 arg",
		"explain a --from b --protocol ether": `--protocol is "ether"`,
		"explain a --from b --kubeconfig /nonexistent/config": "/nonexistent/config",
	} {
		c := command()
		c.SetArgs(strings.Fields(args))
		if err := c.Execute(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", args, err)
		}
	}
	for text, want := range map[string]uint8{"TCP": 6, "udp": 17, "sctp": 132, "1": 1} {
		if got, err := protocolNumber(text); err != nil || got != want {
			t.Errorf("%s: %d, %v", text, got, err)
		}
	}
}
