//go:build !linux

package sock

import "syscall"

// CanAsk is false: an ended direction counts as a client that left.
const CanAsk = false

// Dead is true: nothing is known of an ended connection.
func Dead(syscall.RawConn) bool { return true }
