//go:build !linux

// Command coldstart measures starts of instances. It needs Linux.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "coldstart: needs Linux")
	os.Exit(1)
}
