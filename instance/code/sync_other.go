//go:build unix && !linux

package code

import "syscall"

// syncTree writes out all file systems; there is no call for one.
func syncTree(string) error { return syscall.Sync() }
