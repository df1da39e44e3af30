//go:build !linux

package sock

import (
	"errors"
	"syscall"
)

// CanAsk is false: an ended direction counts as a client that left.
const CanAsk = false

// Dead is true: nothing is known of an ended connection.
func Dead(syscall.RawConn) bool { return true }

// Finished is false: an end behind bytes that are still to be read cannot be seen.
func Finished(syscall.RawConn) bool { return false }

// Disconnect is Linux's.
func Disconnect(syscall.RawConn) error { return errors.ErrUnsupported }
