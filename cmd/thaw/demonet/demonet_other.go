//go:build !linux

package demonet

import (
	"context"
	"errors"
)

// Run needs Linux.
func Run(context.Context, Config) error { return errors.New("thaw demo net needs Linux") }
